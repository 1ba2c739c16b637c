"""The rows to export, by chunks that fit into memory: of a pair set's own parquet files, or of any dataset of pairs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.generation.pair_rows import IMAGES, pair_features
from utils.data.columns import Columns, resolve_columns
from utils.data.rows import open_rows
from utils.errors import InputError

ROWS_PER_CHUNK = 100


class Pairs(Protocol):
    """An opened input; picklable, so that each worker reads for itself.

    columns: the three of the input, by role. features: of what is exported: our columns, as far as the input has them.
    rows_of: int64 rows of each chunk; bytes_of: about how many bytes a row of each chunk takes.
    """

    columns: Columns
    features: datasets.Features
    rows_of: np.ndarray
    bytes_of: np.ndarray
    settings: dict
    rejected: dict
    left_out: list[str]

    def read(self, chunk: int, names: list[str]) -> pa.Table: ...  # under our names, images as {bytes, path}


def open_pairs(data_root: Path, split: str = "train") -> Pairs:
    """Raises InputError where there are no pairs, or where they are not complete."""
    manifest = read_manifest(data_root)
    if manifest is not None:
        return PairFiles(data_root, manifest)
    return SavedPairs(data_root, split)


def read_manifest(data_root: Path) -> dict | None:
    """The manifest of a pair set; None where there is none. Raises InputError for a set that is still being made."""
    path = data_root / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not manifest.get("complete"):
        raise InputError(
            f"--data_root {data_root}: its making was not finished; run the command that makes it again, it goes on"
        )
    return manifest


class PairFiles:
    """The files of a pair set, read directly: datasets would first copy all of them into its cache."""

    def __init__(self, data_root: Path, manifest: dict) -> None:
        self.settings = manifest.get("settings") or {}
        self.rejected = manifest.get("rejected") or {}
        self._files = sorted((data_root / "data").glob("*.parquet"))
        if not self._files:
            raise InputError(f"--data_root {data_root}: has a manifest.json but no data/*.parquet")
        footers = [self._footer(path) for path in self._files]
        groups = [(i, j, footer.row_group(j)) for i, footer in enumerate(footers) for j in range(footer.num_row_groups)]
        self._chunks = [(file, group) for file, group, _ in groups]
        self.rows_of = np.array([group.num_rows for _, _, group in groups], dtype=np.int64)
        self.bytes_of = np.array([group.total_byte_size / max(1, group.num_rows) for _, _, group in groups])
        found = datasets.Features.from_arrow_schema(pq.read_schema(self._files[0]))
        self.columns = resolve_columns(data_root.name, found)
        self.features, self.left_out = exported_features(found, self.columns)

    def read(self, chunk: int, names: list[str]) -> pa.Table:
        file, group = self._chunks[chunk]
        theirs = _their_names(self.columns)
        table = pq.ParquetFile(self._files[file]).read_row_group(group, [theirs.get(name, name) for name in names])
        return table.select([theirs.get(name, name) for name in names]).rename_columns(names)

    @staticmethod
    def _footer(path: Path) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is not a whole parquet file ({error}): make the set again") from None


class SavedPairs:
    """A folder of data files, of `save_to_disk` or with a metadata file: whatever the training scripts open."""

    settings: dict = {}
    rejected: dict = {}

    def __init__(self, data_root: Path, split: str) -> None:
        self._place = (str(data_root), split)
        found = self._rows.features
        self.columns = resolve_columns(data_root.name, found)
        self.features, self.left_out = exported_features(found, self.columns)
        count = len(self._rows)
        self.rows_of = np.diff(np.append(np.arange(0, count, ROWS_PER_CHUNK), count))
        sample = self.read(0, list(self.features)) if count else None
        size = sample.nbytes / sample.num_rows if count else 0.0
        self.bytes_of = np.full(len(self.rows_of), size)

    @cached_property
    def _rows(self) -> datasets.Dataset:
        folder, split = self._place
        rows = open_rows(folder, True, None, split, False, None)
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def read(self, chunk: int, names: list[str]) -> pa.Table:
        theirs = _their_names(self.columns)
        rows = self._rows.select_columns([theirs.get(name, name) for name in names]).with_format("arrow")
        table = rows[chunk * ROWS_PER_CHUNK : (chunk + 1) * ROWS_PER_CHUNK]
        table = table.select([theirs.get(name, name) for name in names]).rename_columns(names)
        for name in set(IMAGES) & set(names):
            table = table.set_column(names.index(name), name, [embedded(table[name])])
        return table


def exported_features(found: datasets.Features, columns: Columns) -> tuple[datasets.Features, list[str]]:
    """(our columns that the input has, with their types; the names of its others, which stay behind)."""
    ours = pair_features()
    theirs = _their_names(columns)
    kept = {name: feature for name, feature in ours.items() if theirs.get(name, name) in found}
    if not isinstance(found[columns.prompt], datasets.Value):
        kept["edit_prompt"] = found[columns.prompt]  # a list of ways to ask: training draws one of them
    return datasets.Features(kept), [name for name in found if name not in {theirs.get(k, k) for k in kept}]


def embedded(images: pa.ChunkedArray) -> pa.Array:
    """Images as {bytes, path} or bytes -> {bytes, no path}: files are read, and paths are private."""
    kind = datasets.Image().pa_type
    column = images.combine_chunks()
    if column.type == kind and not column.null_count and not column.field("bytes").null_count:
        contents = column.field("bytes")  # as nearly always: no byte is copied
        return pa.StructArray.from_arrays([contents, pa.nulls(len(contents), pa.string())], fields=list(kind))
    rows = [None if image is None else {"bytes": _content(image), "path": None} for image in column.to_pylist()]
    return pa.array(rows, type=kind)


def _content(image: bytes | dict) -> bytes | None:
    if isinstance(image, bytes):
        return image
    if image.get("bytes") is not None or not image.get("path"):
        return image.get("bytes")
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        name = Path(image["path"]).name
        raise InputError(
            f"the picture {name} of a row cannot be read ({error.strerror}): run check_dataset.py"
        ) from None


def _their_names(columns: Columns) -> dict[str, str]:
    """Our name of a column -> that of the input, for the three."""
    return {"original_image": columns.original, "edit_prompt": columns.prompt, "edited_image": columns.edited}
