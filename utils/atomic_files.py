"""Files and folders that are either complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError

UNFINISHED = ".unfinished-"  # prefix of what is being written; removed when the next run starts


@contextmanager
def written_beside(place: Path, advice: str = "start again") -> Iterator[Path]:
    """An empty folder to fill and to rename to `place`; it is removed when anything goes wrong.

    Raises `InputError` when the disk refuses; what stood before stands still.
    """
    unfinished = place.with_name(f"{UNFINISHED}{place.name}")
    try:
        remove_whole(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
    except Exception as error:
        remove_whole(unfinished)
        if not is_write_failure(error):
            raise
        raise InputError(f"{place} could not be written (a full disk?): {error}. Make room, and {advice}") from error


def is_write_failure(error: Exception) -> bool:
    """Whether a file could not be written, as on a full disk: torch and safetensors have their own words for it."""
    words = ("PytorchStreamWriter", "inline_container", "iostream")
    is_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or is_torch


def remove_unfinished(output_dir: Path) -> None:
    """Clear away what a killed run was writing."""
    for path in output_dir.glob(f"{UNFINISHED}*"):
        remove_whole(path)


def flush_to_disk(path: Path) -> None:
    """fsync: a rename that reaches the disk before the data would leave a checkpoint of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_whole(path: Path) -> None:
    """Remove a file or a folder; in two steps, so that a kill leaves no half checkpoint under a whole one's name."""
    if path.is_file():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f"{UNFINISHED}removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def make_writable(folder: Path, flag: str) -> None:
    """Make the folder and try to write to it. Raises `InputError` that names `flag`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 65536)
    except OSError as error:
        message = f"{flag} {folder} cannot be written to ({error.strerror}): name another folder, or make room"
        raise InputError(message) from error
