"""The upload of an export with the Hub's own client: its files, and then the card, which makes them the dataset."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from utils.errors import InputError
from utils.hub import failure_reason, may_pass

# `upload_folder` of huggingface_hub 2 is what `upload_large_folder` was before: it commits in batches, and what stands
# on the Hub already is not sent again, so that the same call goes on after an interruption.
UPLOADED = ["data/*.parquet", "assets/*", "export.json"]
MESSAGE = "Add pairs"


def push(folder: Path, repo_id: str, token: str | None = None, waits: Sequence[float] = (5, 20, 60)) -> str:
    """Upload an export and return the address of the dataset; `waits` are the pauses between tries.

    Files of a former export that this one has not are deleted in the last commit, together with the new card: until
    then readers get the former export whole. Raises InputError: what failed, and that the same command goes on.
    """
    login = token or get_token()
    api = HfApi(token=login)
    _quiet_client()
    for pause in (*waits, None):
        try:
            api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=list(UPLOADED),
                ignore_patterns=[".*", "*/.*"],
                commit_message=MESSAGE,
            )
            _finish(api, folder, repo_id)
            return f"{api.endpoint}/datasets/{repo_id}"
        except Exception as error:  # wide, because hf_xet raises types of its own
            failure = error
            if pause is None or not may_pass(error):
                break
            print(f"upload: {failure_reason(error, login)}; trying again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise InputError(
        f"the upload to {repo_id} stopped: {failure_reason(failure, login)}\nNothing is lost: the export stands whole "
        f"in {folder}. Run the same command again: what has arrived is not sent again"
    ) from failure


def _finish(api: HfApi, folder: Path, repo_id: str) -> None:
    """Put the card in place, and what no longer belongs to the dataset away, in one commit."""
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    there = api.list_repo_files(repo_id, repo_type="dataset")
    stale = [path for path in there if path.startswith(("data/", "assets/")) and path not in ours]
    operations = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd("README.md", folder / "README.md")]
    api.create_commit(repo_id, operations, repo_type="dataset", commit_message="Card")


def _quiet_client() -> None:
    """On a terminal the client draws bars; elsewhere they would fill a log, and a line each half minute stands in."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # It tries five times on its own and warns of each; our own line comes when it has given up.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would tell it twice
        logging.getLogger("huggingface_hub._upload_pipeline").setLevel(logging.INFO)
