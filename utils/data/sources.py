"""The sources of training pairs: a dataset on the Hub, a local folder, or a mix of several."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from utils.data.columns import Columns, refuse_unreadable, resolve_columns
from utils.data.draws import random_subset
from utils.data.rows import open_rows
from utils.errors import InputError
from utils.stored_images import BadRow, read_image_file, unpack_image_value

COLUMN_KEYS = {"original_image_column": "original", "edit_prompt_column": "prompt", "edited_image_column": "edited"}
DIGESTED_ROWS, DIGESTED_STREAM_ROWS = 64, 8  # whose bytes go into the digest
MAX_SIZED_FILES = 20_000  # whose sizes go into it
ENTRY_KEYS = ("name", "config", "split", "weight", *COLUMN_KEYS)


@dataclass(frozen=True)
class Source:
    """The rows of one dataset: three columns, images not decoded (a dict with "bytes" and "path")."""

    rows: datasets.Dataset | datasets.IterableDataset
    columns: Columns
    name: str  # before a row number in messages, such as "train"
    weight: float = 1.0  # share of the draws, relative to the weights of the other sources
    is_streaming: bool = False
    row_numbers: np.ndarray | None = None  # of a subset: the number of each row in the dataset
    all_rows: datasets.Dataset | None = None  # of a subset: the rows of the dataset

    def row_name(self, row: int) -> str:
        """The name of a row in messages, such as "train[12]"."""
        return f"{self.name}[{row if self.row_numbers is None else self.row_numbers[row]}]"

    def select(self, rows: np.ndarray) -> Source:
        """The source with only these rows (integers), which keep their numbers."""
        numbers = rows if self.row_numbers is None else self.row_numbers[rows]
        return replace(self, rows=self.rows.select(rows), row_numbers=numbers, all_rows=self.whole().rows)

    def whole(self) -> Source:
        """The source with all rows of its dataset."""
        return self if self.all_rows is None else replace(self, rows=self.all_rows, row_numbers=None, all_rows=None)

    def numbers(self) -> np.ndarray:
        """The number of each row in the dataset, int64 (rows,)."""
        return np.arange(len(self.rows)) if self.row_numbers is None else np.asarray(self.row_numbers, dtype=np.int64)


def open_source(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    streaming: bool = False,
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
    original_image_column: str | None = None,
    edit_prompt_column: str | None = None,
    edited_image_column: str | None = None,
    seed: int = 0,
) -> Source:
    """Open a dataset on the Hub or a local folder and find its columns. Raises InputError with what exists."""
    if bool(dataset_name) == bool(train_data_dir):
        raise InputError("give either --dataset_name (Hub id or folder) or --train_data_dir (folder)")
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"--max_train_samples is {max_train_samples}; it must be at least 1")
    name = dataset_name or train_data_dir
    if not Path(name).expanduser().exists():
        refuse_unreadable(name)
    rows = open_rows(name, bool(train_data_dir), dataset_config_name, split, streaming, cache_dir)
    if not streaming and len(rows) == 0:
        raise InputError(f"{name}, split {split!r}, has no rows")
    columns = resolve_columns(name, rows.features, original_image_column, edit_prompt_column, edited_image_column)
    # Images are decoded in the workers, where a corrupt one is a bad row.
    rows = rows.select_columns([columns.original, columns.prompt, columns.edited])
    for column in (columns.original, columns.edited):
        is_list = not isinstance(rows.features[column], datasets.Image) and hasattr(rows.features[column], "feature")
        stored = datasets.Image(decode=False)
        rows = rows.cast_column(column, datasets.List(stored) if is_list else stored)
    source = Source(rows, columns, split, is_streaming=streaming)
    if max_train_samples is None:
        return source
    if streaming:
        return replace(source, rows=rows.take(max_train_samples))
    # A random subset, as in diffusers: the first rows of many datasets are alike.
    is_subset = max_train_samples < len(rows)
    return source.select(random_subset(seed, len(rows), max_train_samples)) if is_subset else source


def open_mix(
    path: str | Path, *, max_train_samples: int | None = None, cache_dir: str | None = None, seed: int = 0
) -> list[Source]:
    """Open all datasets that a YAML file lists under `datasets:`. Raises one InputError with all problems.

    Keys of an entry: name (Hub id, or folder, which may be relative to the file), config, split, weight and the three
    column flags. The weights (default 1) are the proportions of the draws, independent of the numbers of rows.
    """
    path = Path(path)
    entries = _read_mix(path)
    sources, problems = [], []
    for index, entry in enumerate(entries):
        split = entry.get("split", "train")
        relative = path.parent / entry["name"]
        name = str(relative) if relative.is_dir() and not Path(entry["name"]).exists() else entry["name"]
        columns = {key: entry.get(key) for key in COLUMN_KEYS}
        try:
            source = open_source(
                name, entry.get("config"), None, split, False, max_train_samples, cache_dir, **columns, seed=seed
            )
            label = "/".join(part for part in (entry["name"], entry.get("config")) if part)
            sources.append(replace(source, name=f"{label}:{split}", weight=float(entry.get("weight", 1.0))))
        except InputError as error:
            problems.append(f"--train_mix {path}, datasets[{index}]: {error}")
    if problems:
        raise InputError.from_problems(problems)
    return sources


def images_digest(source: Source) -> str:
    """A hex digest of the images of a source's dataset: its image columns, sizes or names of files, some files.

    The same for other prompts, weights and parts of the dataset. Of a dataset of known length.
    """
    source = source.whole()
    digest = hashlib.sha256()
    _add(digest, [source.columns.original, source.columns.edited, len(source.rows)])
    _add_images(digest, source, _add_image_files)
    return digest.hexdigest()[:32]


def sources_digest(sources: list[Source]) -> str:
    """A hex digest of columns, weights, row numbers, all prompts, sizes or names of files, and the files of some rows.

    The same in all processes and runs, unlike datasets' own fingerprint, which depends on the folder's path and the
    library version. Of a stream, only the first rows are digested.
    """
    digest = hashlib.sha256()
    for source in sources:
        _add(digest, [source.columns.original, source.columns.prompt, source.columns.edited, source.weight])
        if source.is_streaming:
            for row in source.rows.take(DIGESTED_STREAM_ROWS):
                _add_row(digest, source, row)
        else:
            _add_map_style(digest, source)
    return digest.hexdigest()[:32]


def _add(digest: hashlib._Hash, value: object) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=str).encode())


def _add_map_style(digest: hashlib._Hash, source: Source) -> None:
    num_rows = len(source.rows)
    _add(digest, num_rows)
    _add_row_numbers(digest, source)
    for batch in source.rows.select_columns([source.columns.prompt]).iter(batch_size=10_000):
        _add(digest, batch[source.columns.prompt])
    _add_images(digest, source, _add_row)


def _add_row_numbers(digest: hashlib._Hash, source: Source) -> None:
    if source.row_numbers is not None:
        digest.update(np.asarray(source.row_numbers, dtype="<i8").tobytes())


def _add_images(digest: hashlib._Hash, source: Source, add_row: Callable[..., None]) -> None:
    for name in (source.columns.original, source.columns.edited):
        digest.update(_file_sizes(source.rows, name).tobytes())
    for row in np.unique(np.linspace(0, len(source.rows) - 1, DIGESTED_ROWS).astype(int)):
        add_row(digest, source, source.rows[int(row)])


def _file_sizes(rows: datasets.Dataset, column: str) -> np.ndarray:
    """The file size of each image of the whole table, selected or not, as int64; -1 if there is none.

    Of more than `MAX_SIZED_FILES` files on disk only every nth is asked for: a size takes a millisecond on a network
    disk, and the original's dataset has 900,000 files. The others have a checksum of their names, below -1, so that
    another choice among the same files (a new seeds.json) is another dataset.
    """
    images = rows.data.column(column)
    sizes = [np.empty(0, dtype="<i8")]
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        return np.full(len(images), -1, dtype="<i8")  # lists of none or several images, which are bad rows
    for chunk in images.chunks:
        # Reads only offsets: the images of a memory-mapped table stay on disk.
        lengths = pc.binary_length(pc.struct_field(chunk, "bytes"))
        sizes.append(pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy(zero_copy_only=False).astype("<i8"))
        if lengths.null_count:
            is_on_disk = pc.is_null(lengths)
            paths = pc.struct_field(chunk, "path").filter(is_on_disk).to_pylist()
            every = -(-len(paths) // MAX_SIZED_FILES)
            sizes[-1][is_on_disk.to_numpy(zero_copy_only=False)] = [
                _file_size(path) if index % every == 0 else _name_checksum(path) for index, path in enumerate(paths)
            ]
    return np.concatenate(sizes)


def _name_checksum(path: str | None) -> int:
    """Of the last part alone: the folder may be another one after the dataset was moved."""
    return -2 - zlib.crc32((path or "").partition("::")[0].rpartition("/")[2].encode("utf-8", "surrogateescape"))


def _file_size(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path else -1
    except OSError:  # missing, or in an archive
        return -1


def _add_row(digest: hashlib._Hash, source: Source, row: dict) -> None:
    _add(digest, row[source.columns.prompt])
    _add_image_files(digest, source, row)


def _add_image_files(digest: hashlib._Hash, source: Source, row: dict) -> None:
    for name in (source.columns.original, source.columns.edited):
        content = _read_content(row[name])
        digest.update(hashlib.sha256(content or b"").digest())


def _read_content(value: object) -> bytes | None:
    try:
        value = unpack_image_value(value)
        return value if isinstance(value, bytes) or value is None else read_image_file(value)
    except (BadRow, OSError, ValueError):
        return None


def _read_mix(path: Path) -> list[dict]:
    """The entries of a mix file, after checking their keys and values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--train_mix {path} cannot be read: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"--train_mix {path} must contain a list under `datasets:`, each entry with at least a `name:`"
        )
    problems = [f"unknown key {key!r} next to `datasets`" for key in content if key != "datasets"]
    for index, entry in enumerate(entries):
        problems += [f"datasets[{index}]: {problem}" for problem in _entry_problems(entry)]
    if problems:
        raise InputError.from_problems([f"--train_mix {path}: {problem}" for problem in problems])
    return entries


def _entry_problems(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{entry!r} is not a mapping with the keys {', '.join(ENTRY_KEYS)}"]
    problems = [f"unknown key {key!r}; the keys are {', '.join(ENTRY_KEYS)}" for key in entry if key not in ENTRY_KEYS]
    if not entry.get("name"):
        problems.append("`name` is missing (a Hub id or a folder)")
    for key in ENTRY_KEYS:
        if key != "weight" and entry.get(key, "") is not None and not isinstance(entry.get(key, ""), str):
            problems.append(f"{key} is {entry[key]!r}; it must be a string")
    weight = entry.get("weight", 1.0)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight <= 0:
        problems.append(f"weight is {weight!r}; it must be a number above 0")
    return problems
