"""An export folder: made beside its place, gone on with after a kill, and renamed when it is whole.

data/train-00000-of-00002.parquet   assets/grid.jpg   README.md   export.json (what was exported, for machines)
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_preparation.exporting.card import GRID, card_text, save_card
from data_preparation.exporting.facts import gather
from data_preparation.exporting.grid import save_grid
from data_preparation.exporting.licensing import Decision, decide, model_licences, source_licences
from data_preparation.exporting.reading import Pairs, open_pairs
from data_preparation.exporting.scrubbing import scrub
from data_preparation.exporting.sections import Export
from data_preparation.exporting.splitting import LEFT_OUT, SPLITS, Keys, assign, read_keys
from data_preparation.exporting.writing import is_written, plan_digest, plan_shards, sizes_of, write_shards
from utils.errors import InputError

FORMAT = 1
RECORD, DATA = "export.json", "data"


@dataclass(frozen=True)
class Options:
    """What an export is made of and how. split: shares of train, validation, test; max_shard_size: bytes."""

    data_root: Path
    export_dir: Path
    split: Sequence[float]
    max_shard_size: int
    seed: int = 0
    num_workers: int = 0
    license: str | None = None
    accept_unknown_license: bool = False
    language: str = "en"
    dataset_split: str = "train"
    overwrite: bool = False
    hub_token: str | None = None


def make_export(options: Options, repo_id: str) -> Path:
    """Make the folder, or what is missing of it, and return it. Raises InputError."""
    former = read_record(options.export_dir)
    pairs = open_pairs(options.data_root, options.dataset_split)
    if not pairs.rows_of.sum():
        raise InputError(f"--data_root {options.data_root}: has no rows")
    if pairs.left_out:
        print(f"not exported: columns {', '.join(pairs.left_out)}, which are none of our schema", file=sys.stderr)
    keys = read_keys(pairs)
    sources, models = source_licences(keys.origins), model_licences(keys.models, options.hub_token)
    decision = decide(sources, models, options.license, options.accept_unknown_license)
    splits = assign(keys, options.split, options.seed)
    left_out = int((splits == LEFT_OUT).sum())
    if left_out:
        print(
            f"left out: {left_out} rows whose way of asking is held out and whose source is in train", file=sys.stderr
        )
    plan = plan_digest(
        {"input": keys.digest, "split": list(options.split), "seed": options.seed, "bytes": options.max_shard_size}
    )
    if former and former.get("plan") != plan and not options.overwrite:
        raise InputError(
            f"--export_dir {options.export_dir}: holds an export of other rows or other settings: give another folder, "
            "or --overwrite to replace it once the new one is complete"
        )
    is_there = bool(former) and former.get("plan") == plan
    folder = options.export_dir if is_there else _unfinished(options.export_dir)
    try:
        if not is_there:
            _write_data(pairs, splits, plan, options, folder)
        _describe(folder, repo_id, options, pairs, keys, splits, decision, plan)
        if not is_there:
            _put_in_place(folder, options.export_dir)
    except OSError as error:
        raise InputError(
            f"--export_dir {options.export_dir}: cannot be written ({error.strerror or error}). What is there stands: "
            "mend this, and the same command goes on"
        ) from error
    return options.export_dir


def read_record(export_dir: Path) -> dict | None:
    """What stands in the folder, or None where it is not there, or empty. Raises InputError: something else is."""
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
    raise InputError(f"--export_dir {export_dir}: is not empty and holds no export; give another folder")


def _write_data(pairs: Pairs, splits: np.ndarray, plan: str, options: Options, folder: Path) -> None:
    """Write the shards that are not there yet; those of another plan go."""
    shards = plan_shards(pairs, splits, options.max_shard_size, plan)
    data = folder / DATA
    data.mkdir(parents=True, exist_ok=True)
    names = {shard.name for shard in shards}
    for path in data.iterdir():  # also what a killed process left half-written
        if path.name not in names:
            path.unlink()
    todo = [shard for shard in shards if not is_written(shard, data)]
    total = sum(len(shard.rows) for shard in shards)
    done = total - sum(len(shard.rows) for shard in todo)
    if done:
        print(f"going on: {len(shards) - len(todo)} of {len(shards)} files are there", file=sys.stderr)
    with tqdm(total=total, initial=done, desc="export", unit="row", mininterval=0.5) as bar:
        for shard in write_shards(pairs, todo, data, options.num_workers):
            bar.update(len(shard.rows))


def _describe(
    folder: Path,
    repo_id: str,
    options: Options,
    pairs: Pairs,
    keys: Keys,
    splits: np.ndarray,
    decision: Decision,
    plan: str,
) -> None:
    """Write the card, its picture and the record of a folder whose data are complete."""
    sizes, facts = sizes_of(folder / DATA), gather(folder / DATA)
    sources = {
        split: len({key for key, is_here in zip(keys.sources, splits == number, strict=True) if is_here})
        for number, split in enumerate(SPLITS)
    }
    export = Export(
        repo_id,
        pairs.features,
        sizes,
        pairs.settings,
        pairs.rejected,
        decision,
        options.split,
        options.seed,
        sources,
        left_out=int((splits == LEFT_OUT).sum()),
        language=options.language,
    )
    if not (folder / GRID).is_file():
        save_grid(folder / DATA, folder / GRID)
    record = {
        "format": FORMAT,
        "plan": plan,
        "split": list(options.split),
        "seed": options.seed,
        "splits": sizes,
        "source_images": sources,
        "heldout_left_out": export.left_out,
        "license": decision.carried,
        "sources": [asdict(one) for one in decision.sources],
        "models": [asdict(one) for one in decision.models],
        "settings": scrub(dict(pairs.settings)),
        "rejected": scrub(dict(pairs.rejected)),
    }
    _write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    save_card(card_text(export, facts), folder)


def _write_text(path: Path, text: str) -> None:
    half_written = path.with_name(f".{path.name}")
    half_written.write_text(text, encoding="utf-8")
    half_written.replace(path)


def _unfinished(export_dir: Path) -> Path:
    return export_dir.with_name(f"{export_dir.name}.unfinished")


def _put_in_place(folder: Path, export_dir: Path) -> None:
    """One rename; a former export goes only when the new one is there to follow it."""
    old = export_dir.with_name(f"{export_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if export_dir.exists():
        export_dir.rename(old)
    folder.rename(export_dir)
    shutil.rmtree(old, ignore_errors=True)
