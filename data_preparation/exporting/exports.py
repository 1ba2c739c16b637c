"""Make an export folder, resume after an interruption, and upload it.

data/train-00000-of-00002.parquet   assets/grid.jpg   README.md   export.json (what was exported, for programs)

The folder gets its name when it is complete; until then it is called NAME.unfinished.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from data_preparation.exporting.card import GRID, ExportFacts, gather_facts, make_card
from data_preparation.exporting.copies import join_copies
from data_preparation.exporting.export_shards import (
    DROPPED,
    RowKeys,
    assign_splits,
    is_written,
    plan_shards,
    read_keys,
    write_shards,
)
from data_preparation.exporting.grid import make_grid
from data_preparation.exporting.licensing import LicenceChoice, choose_licence, model_licences, source_licences
from data_preparation.exporting.reading import ExportInput, ExportOptions, open_input, scrub
from utils.atomic_files import write_atomically
from utils.errors import InputError
from utils.hub import retry_upload, validate_card

FORMAT = 1
RECORD, DATA = "export.json", "data"
UPLOADED = ["data/*.parquet", "assets/*", RECORD]


def make_export(options: ExportOptions, repo_id: str) -> Path:
    """Make the export folder, or what is missing of it, and return it. Raises InputError."""
    former = read_export_record(options.export_dir)
    rows, keys, splits, choice, digest = _plan_export(options)
    has_data = former is not None and former["plan"] == digest
    if former and not has_data and not options.overwrite:
        raise InputError(
            f"--export_dir {options.export_dir}: holds an export with other rows or settings: give another folder, "
            "or --overwrite to replace it when the new one is complete"
        )
    unfinished = options.export_dir.with_name(f"{options.export_dir.name}.unfinished")
    folder = options.export_dir if has_data else unfinished
    try:
        if not has_data:
            _write_data(rows, splits, digest, options, folder)
        if not (folder / GRID).is_file():
            (folder / GRID).parent.mkdir(exist_ok=True)
            write_atomically(folder / GRID, make_grid(folder / DATA))
        facts = gather_facts(folder / DATA, keys, splits)
        write_atomically(folder / RECORD, make_export_record(digest, options, rows, facts, choice).encode())
        write_atomically(folder / "README.md", make_card(repo_id, options, rows, facts, choice).encode())
        if not has_data:
            _put_in_place(folder, options.export_dir)
    except OSError as error:
        raise InputError(
            f"--export_dir {options.export_dir}: cannot be written ({error.strerror or error}). Finished files are "
            "kept: fix the problem and run the same command again"
        ) from error
    return options.export_dir


def _plan_export(options: ExportOptions) -> tuple[ExportInput, RowKeys, np.ndarray, LicenceChoice, str]:
    """The input, its keys, the split of each row, the licence, and a digest of everything that determines the rows."""
    rows = open_input(options.data_root, options.dataset_split)
    if not rows.rows_of.sum():
        raise InputError(f"--data_root {options.data_root}: has no rows")
    if rows.skipped_columns:
        print(f"columns that are not exported: {', '.join(rows.skipped_columns)}", file=sys.stderr)
    keys = read_keys(rows)
    sources, models = source_licences(keys.origins), model_licences(keys.models, options.hub_token)
    choice = choose_licence(sources, models, options.license, options.accept_unknown_license)
    if sum(share > 0 for share in options.split) > 1:
        keys = join_copies(rows, keys, options.num_workers)
    splits = assign_splits(keys, options.split, options.seed)
    if num_dropped := int((splits == DROPPED).sum()):
        print(f"dropped: {num_dropped} rows with held-out phrasings, whose source is in train", file=sys.stderr)
    plan = {"input": keys.digest, "split": list(options.split), "seed": options.seed, "bytes": options.max_shard_size}
    plan["rows"] = hashlib.sha256(splits.tobytes()).hexdigest()
    return rows, keys, splits, choice, hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:32]


def read_export_record(export_dir: Path) -> dict | None:
    """export.json of the folder; None if the folder does not exist or is empty. Raises InputError for anything else."""
    if not export_dir.exists():
        return None
    if not export_dir.is_dir():
        raise InputError(f"--export_dir {export_dir}: is a file; give a folder")
    if not any(export_dir.iterdir()):
        return None
    try:
        record = json.loads((export_dir / RECORD).read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["plan"]:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"--export_dir {export_dir}: is not empty and is not an export; give another folder")


def _write_data(rows: ExportInput, splits: np.ndarray, digest: str, options: ExportOptions, folder: Path) -> None:
    """Write the missing shards, and delete files that do not belong to the plan."""
    shards = plan_shards(rows, splits, options.max_shard_size, digest)
    data = folder / DATA
    data.mkdir(parents=True, exist_ok=True)
    names = {shard.name for shard in shards}
    for path in data.iterdir():  # also the temporary files of a killed process
        if path.name not in names:
            path.unlink()
    missing = [shard for shard in shards if not is_written(shard, data)]
    total = sum(len(shard.rows) for shard in shards)
    done = total - sum(len(shard.rows) for shard in missing)
    if done:
        print(f"resuming: {len(shards) - len(missing)} of {len(shards)} files are complete", file=sys.stderr)
    with tqdm(total=total, initial=done, desc="export", unit="row", mininterval=0.5) as bar:
        for shard in write_shards(rows, missing, data, options.num_workers):
            bar.update(len(shard.rows))


def make_export_record(
    digest: str, options: ExportOptions, rows: ExportInput, facts: ExportFacts, choice: LicenceChoice
) -> str:
    """The text of export.json."""
    record = {
        "format": FORMAT,
        "plan": digest,
        "split": list(options.split),
        "seed": options.seed,
        "splits": facts.sizes,
        "source_images": facts.num_sources,
        "heldout_left_out": facts.num_dropped,
        "license": choice.licence,
        "sources": [asdict(one) for one in choice.sources],
        "models": [asdict(one) for one in choice.models],
        "settings": scrub(rows.settings),
        "rejected": scrub(rows.rejected),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _put_in_place(folder: Path, export_dir: Path) -> None:
    """Rename the complete folder; a former export is deleted only after that."""
    old = export_dir.with_name(f"{export_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if export_dir.exists():
        export_dir.rename(old)
    folder.rename(export_dir)
    shutil.rmtree(old, ignore_errors=True)


def push(folder: Path, repo_id: str, token: str | None = None, waits: Sequence[float] = (5, 20, 60)) -> str:
    """Upload an export and return the URL of the dataset. waits: seconds between attempts.

    The last commit adds the card and deletes files of a former export; until then, readers get the former export.
    Raises InputError.
    """
    login = token or get_token()
    api = HfApi(token=login)
    _quiet_client()

    def send() -> None:
        # Before hours of uploading, because the card is sent last.
        validate_card((folder / "README.md").read_text(encoding="utf-8"), "dataset", str(folder / "README.md"))
        # Commits in batches and skips files that are on the Hub already, so that the same call resumes.
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=list(UPLOADED),
            ignore_patterns=[".*", "*/.*"],
            commit_message="Add pairs",
        )
        _push_card(api, folder, repo_id)

    advice = f"The complete export is in {folder}. Run the same command again: it continues with the missing files"
    retry_upload(send, repo_id, login, waits, advice)
    return f"{api.endpoint}/datasets/{repo_id}"


def _push_card(api: HfApi, folder: Path, repo_id: str) -> None:
    """Add the card and delete the files of a former export, in one commit."""
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    found = api.list_repo_files(repo_id, repo_type="dataset")
    stale = [path for path in found if path.startswith(("data/", "assets/")) and path not in ours]
    operations = [CommitOperationDelete(path) for path in stale]
    operations.append(CommitOperationAdd("README.md", folder / "README.md"))
    api.create_commit(repo_id, operations, repo_type="dataset", commit_message="Card")


def _quiet_client() -> None:
    """Silence the client's warnings; without a terminal, log a line every half minute instead of progress bars."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # The client retries five times and warns each time; `push` prints one line when it has given up.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.getLogger("huggingface_hub").propagate = False  # it has its own handler and would print twice
        logging.getLogger("huggingface_hub._upload_pipeline").setLevel(logging.INFO)
