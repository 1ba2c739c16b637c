"""The folder of a pair set while it is made and when it is whole.

    manifest.json                          the settings, and whether all is there
    data/train-00000-of-00002.parquet      the rows; appears by one rename when every shard is there
    .making/shard-00007.parquet            a finished shard, until then; datasets does not look into hidden folders

Each file is written beside its place and renamed into it, so that kill -9 at any moment leaves nothing half-written,
and what is there is gone on with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_preparation.generation.shards import Counts, first_rows, read_counts
from utils.errors import InputError

MANIFEST, DATA, MAKING = "manifest.json", "data", ".making"
FORMAT = 1
OURS = {MANIFEST, DATA, MAKING}


class Store:
    """One pair set being made. Raises InputError where the folder holds something else, or another run is at it."""

    def __init__(self, data_root: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.root, self.settings = data_root.absolute(), json.loads(json.dumps(settings))
        self._refuse_foreign(overwrite)
        with _writing(self.root):
            self._making.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._making / "lock", data_root)
            try:
                self._begin(overwrite)
            except BaseException:
                self._lock.close()  # or a second run in this process would wait for the first one's exception
                raise

    def _begin(self, overwrite: bool) -> None:
        if self._read_manifest() is not None and not self._is_same() and (overwrite or self._is_bare()):
            self._clear()
        self._refuse_other_settings()
        if self._read_manifest() is None:
            self._write_manifest({"complete": False})
        for unfinished in (*self._making.glob("*.unfinished"), self._making / DATA):
            _remove(unfinished)

    def close(self) -> None:
        self._lock.close()
        if self.is_complete:
            shutil.rmtree(self._making, ignore_errors=True)

    @property
    def is_complete(self) -> bool:
        return bool((self._read_manifest() or {}).get("complete")) and (self.root / DATA).is_dir()

    def finished_shards(self) -> dict[int, Counts]:
        """Counts of the shards that are there and whole; a damaged one is made again."""
        found = {}
        for path in sorted(self._making.glob("shard-*.parquet")):
            counts = read_counts(path)
            if counts is not None:
                found[int(path.stem.removeprefix("shard-"))] = counts
        return found

    def add(self, index: int, content: bytes) -> Counts:
        """Put the bytes of a shard in place."""
        with _writing(self.root):
            write_whole(self._shard(index), content)
        return read_counts(self._shard(index))

    def finish(self, shards: dict[int, Counts], max_rows: int | None) -> tuple[int, Counter]:
        """Make data/ of the shards in order, cut at `max_rows`; returns (rows, rejected items by reason)."""
        taken = _take(shards, max_rows)
        last = max(shards, default=0) if max_rows is None else max(taken, default=max(shards, default=0))
        rejected = sum((shards[index].rejected for index in shards if index <= last), Counter())
        if not taken:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in rejected.most_common())
            raise InputError(f"not one row could be made ({reasons or 'there was nothing to make rows of'})")
        if not (self.root / DATA).exists():  # it does after a kill between the rename and the manifest
            with _writing(self.root):
                self._gather(shards, taken)
        with _writing(self.root):
            self._write_manifest({"complete": True, "rows": sum(taken.values()), "rejected": dict(rejected)})
        return sum(taken.values()), rejected

    def _gather(self, shards: dict[int, Counts], taken: dict[int, int]) -> None:
        folder = self._making / DATA
        folder.mkdir()
        for number, (index, rows) in enumerate(taken.items()):
            place = folder / f"train-{number:05d}-of-{len(taken):05d}.parquet"
            if rows < shards[index].rows:
                write_whole(place, first_rows(self._shard(index).read_bytes(), rows))
            else:
                _link(self._shard(index), place)
        folder.rename(self.root / DATA)

    def counts(self) -> tuple[int, Counter]:
        """(rows, rejected items by reason) of a complete set."""
        manifest = self._read_manifest()
        return manifest["rows"], Counter(manifest["rejected"])

    @property
    def _making(self) -> Path:
        return self.root / MAKING

    def _shard(self, index: int) -> Path:
        return self._making / f"shard-{index:06d}.parquet"

    def _read_manifest(self) -> dict | None:
        try:
            manifest = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None

    def _write_manifest(self, state: dict) -> None:
        content = {"format": FORMAT, "settings": self.settings, **state}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_whole(self.root / MANIFEST, text.encode(), self._making)

    def _is_same(self) -> bool:
        return self._read_manifest()["settings"] == self.settings

    def _is_bare(self) -> bool:
        """Whether no row was made with the settings of then, as when a model's name was wrong."""
        return not (self.root / DATA).exists() and not any(self._making.glob("shard-*"))

    def _clear(self) -> None:
        """Remove a former set; its manifest last, so that a kill in between leaves what --overwrite takes."""
        for path in (self.root / DATA, *self._making.glob("shard-*"), self.root / MANIFEST):
            _remove(path)

    def _refuse_foreign(self, overwrite: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--data_root {self.root}: is a file; give a folder")
        found = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        if found <= {MAKING} or MANIFEST in found and self._read_manifest() is not None:
            return
        foreign = sorted(found - OURS) or sorted(found)
        advice = "; --overwrite replaces only what this suite has made" if overwrite else ""
        raise InputError(f"--data_root {self.root}: holds {foreign[0]}, which is no pair set: give another{advice}")

    def _refuse_other_settings(self) -> None:
        manifest = self._read_manifest()
        if manifest is None or manifest["settings"] == self.settings:
            return
        old, new = manifest["settings"], self.settings
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        told = [f"{name} was {_show(old.get(name))} and is now {_show(new.get(name))}" for name in changed]
        raise InputError(
            f"--data_root {self.root}: holds a set of other settings ({'; '.join(told)}): give another folder, the "
            "settings of then to go on, or --overwrite to start anew"
        )


def write_whole(path: Path, content: bytes, folder: Path | None = None) -> None:
    """Write beside the place (or in `folder`), flush to the disk, rename. Raises OSError; nothing stays behind."""
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


def _take(shards: dict[int, Counts], max_rows: int | None) -> dict[int, int]:
    """Rows of each shard in order, without empty ones, until there are `max_rows`."""
    taken, left = {}, max_rows
    for index in sorted(shards):
        rows = shards[index].rows if left is None else min(left, shards[index].rows)
        if rows:
            taken[index] = rows
            left = None if left is None else left - rows
    return taken


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Say what could not be written, and that what stands is not lost."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--data_root {root}: cannot be written ({reason}). What is there stands: mend this, and the same command "
            "goes on"
        ) from error


def _lock(path: Path, data_root: Path) -> IO:
    """Held until closed, or until the process is gone, however it went."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"--data_root {data_root}: another run is writing it; wait for it, or give another") from None
    except OSError:
        pass  # a file system without locks
    return file


def _link(source: Path, place: Path) -> None:
    """The same bytes under a second name; copied where the file system has no hard links."""
    try:
        os.link(source, place)
    except OSError:
        write_whole(place, source.read_bytes())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
