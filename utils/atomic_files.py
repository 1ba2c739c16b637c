"""Files and folders that are either complete or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import InputError

UNFINISHED = ".unfinished-"  # prefix of what is being written; the next run removes it


@contextmanager
def atomic_folder(path: Path, advice: str = "start again") -> Iterator[Path]:
    """An empty temporary folder, which the caller fills and renames to `path`; removed on any error.

    An existing `path` is not changed. Raises InputError if the files cannot be written, such as on a full disk.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        remove_path(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
    except Exception as error:
        remove_path(unfinished)
        if not _is_write_failure(error):
            raise
        raise InputError(f"{path} could not be written (a full disk?): {error}. Make room and {advice}") from error


def _is_write_failure(error: Exception) -> bool:
    """Whether a file could not be written: torch and safetensors do not raise OSError on a full disk."""
    words = ("PytorchStreamWriter", "inline_container", "iostream")
    is_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or is_torch


def remove_unfinished(output_dir: Path, older_than: float = 0.0) -> None:
    """Remove what an interrupted run left half-written, if nothing was written to it for `older_than` seconds."""
    for path in output_dir.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process removed it
            if not older_than or time.time() - path.stat().st_mtime >= older_than:
                remove_path(path)


def flush_to_disk(path: Path) -> None:
    """fsync: without it, a power failure after the rename could leave a checkpoint of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file or folder. A folder is renamed first: an interruption must not leave half of it under its name."""
    if path.is_file():
        path.unlink()
    elif path.exists():
        renamed = path.with_name(f"{UNFINISHED}removing-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)


def make_writable(folder: Path, flag: str) -> None:
    """Create the folder and test writing to it. Raises InputError that names `flag`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 65536)
    except OSError as error:
        message = f"{flag} {folder} cannot be written to ({error.strerror}): choose another folder or make room"
        raise InputError(message) from error


class FileWriter:
    """Writes files in a thread while the caller goes on; the first error is raised by the next call or at the end."""

    def __init__(self, max_waiting: int = 4) -> None:
        self._thread, self._waiting, self._max_waiting = ThreadPoolExecutor(1), deque(), max_waiting

    def submit(self, write: Callable[..., object], *arguments: object) -> None:
        """Call write(*arguments) soon; waits if many files are unwritten."""
        self._waiting.append(self._thread.submit(write, *arguments))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > self._max_waiting):
            self._waiting.popleft().result()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown(wait=True)  # also after an interruption: no file is half-written
        if error_type is None:
            for future in self._waiting:
                future.result()


def write_atomically(path: Path, content: bytes, folder: Path | None = None) -> None:
    """Write a temporary file beside `path` (or in `folder`), flush it to disk, and rename it. Raises OSError."""
    unfinished = (folder or path.parent) / f"{path.name}.unfinished"
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a rename that reaches the disk before the data would leave an empty file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
