"""The folder of a dataset during and after its generation.

    manifest.json                          the settings, and whether the dataset is complete
    data/train-00000-of-00002.parquet      the rows; the folder appears in one rename, when all shards are finished
    .making/shard-00007.parquet            a finished shard, until then; datasets ignores hidden folders
    .making/lock, lock-3-of-10             held by the run that writes, or by each of the runs that share the work

A shard holds the rows of consecutive items as one parquet file, and in its footer how many items were rejected.
Each file is renamed into place when it is complete, so that a run killed at any moment can resume.
"""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from utils.atomic_files import remove_path, remove_unfinished, write_atomically
from utils.errors import InputError

MANIFEST, DATA, SHARDS = "manifest.json", "data", ".making"
SHARD_NAME = re.compile(r"shard-(\d+)\.parquet")
FORMAT = 1
REJECTED = b"rejected"  # key in the footer of a shard
ROWS_PER_GROUP = 100  # a reader holds one row group in memory
PARTITION_WAIT = 60  # seconds in which the other partitions of an array of jobs prepare the folder one by one


class FolderInUse(InputError):
    """Another run writes to the folder."""


class ShardCounts(NamedTuple):
    """rows: in the shard; rejected: its items without rows, by reason."""

    rows: int
    rejected: Counter


def encode_shard(rows: list[dict], rejected: dict[str, int], features: datasets.Features) -> bytes:
    """The content of a parquet file with the rows and the counts of rejected items."""
    columns = {name: [row[name] for row in rows] for name in features}
    return _encode_table(pa.table(columns, schema=features.arrow_schema), rejected)


class DatasetFolder:
    """A dataset being generated. Raises InputError if the folder holds something else, or another run writes to it.

    partition: (number from 0, count) of the runs that write to the folder at the same time, each its own shards.
    """

    def __init__(
        self,
        data_root: Path,
        settings: dict[str, Any],
        overwrite: bool = False,
        partition: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.settings = data_root.absolute(), json.loads(json.dumps(settings))
        self._shards = self.root / SHARDS
        self._refuse_other_content(overwrite)
        with self._explaining_write_errors():
            self._shards.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._shards / "lock", data_root, PARTITION_WAIT if partition else 0)
            try:
                self._prepare(overwrite, partition is not None)
                if partition is not None:
                    own = _lock(self._shards / "lock-{}-of-{}".format(*partition), data_root)
                    self._lock.release()
                    self._lock = own
            except BaseException:
                self._lock.release()  # otherwise the exception would keep the folder locked for this process
                raise

    def take_over(self) -> None:
        """Lock the whole folder, after all partitions have finished; waits for another one that does the same."""
        self._lock.release()
        self._lock = _lock(self._shards / "lock", self.root, timeout=-1)

    def _prepare(self, overwrite: bool, is_partition: bool) -> None:
        is_shared = any(map(_is_locked, self._shards.glob("lock-*")))
        manifest = self._read_manifest()
        has_changed = manifest is not None and manifest["settings"] != self.settings
        if is_shared and (not is_partition or (has_changed and overwrite)):
            raise InputError(f"--data_root {self.root}: runs with --partition are writing it; wait, or stop them")
        if has_changed:
            has_rows = (self.root / DATA).exists() or any(self._shards.glob("shard-*"))
            if has_rows and not overwrite:
                self._refuse_settings(manifest["settings"])
            # The manifest goes last: without it, --overwrite would refuse the folder after a kill.
            for path in (self.root / DATA, *self._shards.glob("shard-*"), self.root / MANIFEST):
                remove_path(path)
            manifest = None
        if manifest is None:
            self._write_manifest({"complete": False})
        remove_unfinished(self.root)
        remove_path(self._shards / DATA)
        for unfinished in () if is_shared else self._shards.glob("*.unfinished"):
            remove_path(unfinished)

    def close(self) -> None:
        """Release the lock; shards of a complete dataset are removed."""
        self._lock.release()
        if self.complete_counts() is not None:
            shutil.rmtree(self._shards, ignore_errors=True)

    def complete_counts(self) -> tuple[int, Counter] | None:
        """(rows, rejected items by reason) of a complete dataset, else None."""
        manifest = self._read_manifest() or {}
        is_complete = manifest.get("complete") and (self.root / DATA).is_dir()
        return (manifest["rows"], Counter(manifest["rejected"])) if is_complete else None

    def finished_shards(self, known: Mapping[int, ShardCounts] | None = None) -> dict[int, ShardCounts]:
        """Counts of the finished shards by index, without damaged files. known: those that need not be read again."""
        known = known or {}
        counts = {}
        for entry in os.scandir(self._shards):  # a listing alone; opening 200,000 files takes minutes on a network disk
            if match := SHARD_NAME.fullmatch(entry.name):
                index = int(match[1])
                counts[index] = known.get(index) or _read_counts(Path(entry.path))
        return {index: counts[index] for index in sorted(counts) if counts[index] is not None}

    def add(self, index: int, content: bytes) -> ShardCounts:
        """Store the content of a shard."""
        with self._explaining_write_errors():
            write_atomically(self._shard(index), content)
        return _read_counts(self._shard(index))

    def finish(self, shards: dict[int, ShardCounts], max_rows: int | None) -> tuple[int, Counter]:
        """Turn the shards into data/, with `max_rows` rows at most; returns (rows, rejected items by reason)."""
        used = _rows_to_use(shards, max_rows)
        last = max(shards, default=0) if max_rows is None else max(used, default=max(shards, default=0))
        rejected = sum((shards[index].rejected for index in shards if index <= last), Counter())
        if not used:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in rejected.most_common())
            raise InputError(f"no rows were generated ({reasons or 'the input has no items'})")
        with self._explaining_write_errors():
            if not (self.root / DATA).exists():  # it exists after a kill between the rename and the manifest
                self._write_data(shards, used)
            self._write_manifest({"complete": True, "rows": sum(used.values()), "rejected": dict(rejected)})
        return sum(used.values()), rejected

    def _write_data(self, shards: dict[int, ShardCounts], used: dict[int, int]) -> None:
        folder = self._shards / DATA
        folder.mkdir()
        for number, (index, rows) in enumerate(used.items()):
            path = folder / f"train-{number:05d}-of-{len(used):05d}.parquet"
            if rows < shards[index].rows:
                table = pq.ParquetFile(self._shard(index)).read()
                write_atomically(path, _encode_table(table.slice(0, rows), shards[index].rejected))
            else:
                try:
                    os.link(self._shard(index), path)
                except OSError:  # a file system without hard links
                    write_atomically(path, self._shard(index).read_bytes())
        folder.rename(self.root / DATA)

    def _shard(self, index: int) -> Path:
        return self._shards / f"shard-{index:06d}.parquet"

    def _read_manifest(self) -> dict | None:
        try:
            manifest = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None

    def _write_manifest(self, state: dict) -> None:
        content = {"format": FORMAT, "settings": self.settings, **state}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(self.root / MANIFEST, text.encode(), self._shards)

    def _refuse_other_content(self, overwrite: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--data_root {self.root}: is a file; give a folder")
        found = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        if found <= {SHARDS} or MANIFEST in found and self._read_manifest() is not None:
            return
        other = sorted(found - {MANIFEST, DATA, SHARDS}) or sorted(found)
        advice = " (--overwrite only replaces datasets generated by these scripts)" if overwrite else ""
        raise InputError(
            f"--data_root {self.root}: contains {other[0]}, which is not part of a generated dataset; give another "
            f"folder{advice}"
        )

    def _refuse_settings(self, old: dict[str, Any]) -> None:
        new = self.settings
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        differences = [f"{name} was {_shorten(old.get(name))} and is now {_shorten(new.get(name))}" for name in changed]
        raise InputError(
            f"--data_root {self.root}: holds a dataset with different settings ({'; '.join(differences)}). Give "
            "another folder, use the former settings to resume, or replace the dataset with --overwrite"
        )

    @contextmanager
    def _explaining_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"--data_root {self.root}: cannot be written ({error.strerror or error}). Finished shards are kept: "
                "fix the problem and run the same command again to resume"
            ) from error


def _encode_table(table: pa.Table, rejected: dict[str, int]) -> bytes:
    metadata = {**(table.schema.metadata or {}), REJECTED: json.dumps(rejected, sort_keys=True).encode()}
    table, content = table.replace_schema_metadata(metadata), io.BytesIO()
    # No dictionaries: images are compressed already, and a dictionary would hold them in memory twice.
    pq.write_table(table, content, row_group_size=ROWS_PER_GROUP, use_dictionary=False)
    return content.getvalue()


def _read_counts(path: Path) -> ShardCounts | None:
    """The counts in the footer of a shard; None if the file is incomplete."""
    try:
        footer = pq.read_metadata(path)
        return ShardCounts(footer.num_rows, Counter(json.loads(footer.metadata[REJECTED])))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _rows_to_use(shards: dict[int, ShardCounts], max_rows: int | None) -> dict[int, int]:
    """Number of rows to use of each shard in order, up to `max_rows`; shards without rows are left out."""
    used, left = {}, max_rows
    for index in sorted(shards):
        rows = shards[index].rows if left is None else min(left, shards[index].rows)
        if rows:
            used[index] = rows
            left = None if left is None else left - rows
    return used


def _lock(path: Path, data_root: Path, timeout: float = 0) -> FileLock:
    """A held lock. It ends when it is released or the process ends, also by SIGKILL. timeout: seconds, -1 for ever."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise FolderInUse(f"--data_root {data_root}: another run is writing it; wait, or give another folder") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return lock


def _is_locked(path: Path) -> bool:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
