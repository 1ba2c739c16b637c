"""What to export: the options, the rows of the input in chunks that fit into memory, and texts without secrets."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.generation.pair_rows import IMAGES, pair_features, parse_json
from data_preparation.importing.folder_pairs import has_pair_folders
from utils.data.columns import resolve_columns
from utils.data.rows import open_rows
from utils.errors import InputError
from utils.hub import HIDDEN, redact

ROWS_PER_CHUNK = 100
# An absolute path, also of Windows, of a home folder or as file://; not the `//` of a URL, nor a single `/`.
_PATH = re.compile(r"(?<![\w./:~\\-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:|\\)?[/\\](?:[^/\\\s\"'|]+[/\\])+([^/\\\s\"'|]*)")
_WHOLE_PATH = re.compile(r"(?:file://)?(?:~[\w.-]*|[A-Za-z]:|\\)?[/\\](?:[^/\\\n]+[/\\])*([^/\\\n]*)[/\\]?")
_SECRET_NAME = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)


@dataclass(frozen=True)
class ExportOptions:
    """The flags of export_to_hub.py. split: shares of train, validation and test; max_shard_size: bytes."""

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


class ExportInput:
    """The rows of a dataset of pairs; picklable, so that every worker reads for itself. Subclasses define `_read`.

    features: the exported columns: those of `pair_features` that the input has. skipped_columns: its other columns.
    rows_of: int64, rows of each chunk; bytes_of: float64, approximate bytes per row of each chunk.
    settings, rejected: of the generation, from the manifest; empty for other datasets.
    """

    settings: dict = {}
    rejected: dict = {}
    rows_of: np.ndarray
    bytes_of: np.ndarray

    def __init__(self, data_root: Path, found: datasets.Features) -> None:
        columns = resolve_columns(data_root.name, found)
        self._input_names = {name: name for name in pair_features()}
        self._input_names |= {
            "original_image": columns.original,
            "edit_prompt": columns.prompt,
            "edited_image": columns.edited,
        }
        exported = {name: feature for name, feature in pair_features().items() if self._input_names[name] in found}
        if not isinstance(found[columns.prompt], datasets.Value):
            exported["edit_prompt"] = found[columns.prompt]  # a list of instructions: training draws one of them
        self.features = datasets.Features(exported)
        self.skipped_columns = [name for name in found if name not in {self._input_names[name] for name in exported}]

    def read(self, chunk: int, names: list[str]) -> pa.Table:
        """Columns of a chunk, under our names; images with their bytes and without paths."""
        input_names = [self._input_names[name] for name in names]
        table = self._read(chunk, input_names).select(input_names).rename_columns(names)
        for name in set(IMAGES) & set(names):
            table = table.set_column(names.index(name), name, [embed_images(table[name])])
        return table


class GeneratedInput(ExportInput):
    """The parquet files of a generated dataset, read directly; datasets would copy all of them into its cache."""

    def __init__(self, data_root: Path, manifest: dict) -> None:
        self.settings = manifest.get("settings") or {}
        self.rejected = manifest.get("rejected") or {}
        paths = sorted((data_root / "data").glob("*.parquet"))
        if not paths:
            raise InputError(f"--data_root {data_root}: has a manifest.json but no data/*.parquet")
        footers = [(path, self._read_footer(path)) for path in paths]
        self._chunks = [(path, group) for path, footer in footers for group in range(footer.num_row_groups)]
        groups = [footer.row_group(group) for _, footer in footers for group in range(footer.num_row_groups)]
        self.rows_of = np.array([group.num_rows for group in groups], dtype=np.int64)
        self.bytes_of = np.array([group.total_byte_size / max(1, group.num_rows) for group in groups])
        super().__init__(data_root, datasets.Features.from_arrow_schema(pq.read_schema(paths[0])))

    def _read(self, chunk: int, input_names: list[str]) -> pa.Table:
        path, group = self._chunks[chunk]
        return pq.ParquetFile(path).read_row_group(group, input_names)

    @staticmethod
    def _read_footer(path: Path) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is not a complete parquet file ({error}): generate the dataset again") from None


class DatasetInput(ExportInput):
    """Any other dataset that the training scripts accept: data files, `save_to_disk`, or images with metadata."""

    def __init__(self, data_root: Path, split: str) -> None:
        self._location = (str(data_root), split)
        super().__init__(data_root, self._rows.features)
        count = len(self._rows)
        self.rows_of = np.diff(np.append(np.arange(0, count, ROWS_PER_CHUNK), count))
        sample = self.read(0, list(self.features)) if count else None
        self.bytes_of = np.full(len(self.rows_of), sample.nbytes / sample.num_rows if count else 0.0)

    @cached_property
    def _rows(self) -> datasets.Dataset:
        folder, split = self._location
        rows = open_rows(folder, True, None, split, False, None)
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def _read(self, chunk: int, input_names: list[str]) -> pa.Table:
        rows = self._rows.select_columns(input_names).with_format("arrow")
        return rows[chunk * ROWS_PER_CHUNK : (chunk + 1) * ROWS_PER_CHUNK]


def open_input(data_root: Path, split: str) -> ExportInput:
    """Raises InputError if there are no pairs, or if their generation is not complete."""
    path = data_root / "manifest.json"
    if not path.is_file() and has_pair_folders(data_root):
        advice = f"run import_pairs.py --source {data_root} --task FILE (one instruction per line)"
        raise InputError(f"--data_root {data_root}: has a folder for each pair and no instructions; {advice}")
    if not path.is_file():
        return DatasetInput(data_root, split)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not manifest.get("complete"):
        raise InputError(
            f"--data_root {data_root}: its generation is not complete; run the command that generates it again"
        )
    return GeneratedInput(data_root, manifest)


def embed_images(images: pa.ChunkedArray) -> pa.Array:
    """Bytes, or {bytes, path} -> {bytes, null}: files are read, and paths are removed because they are private."""
    image_type = datasets.Image().pa_type
    column = images.combine_chunks()
    if column.type == image_type and not column.null_count and not column.field("bytes").null_count:
        contents = column.field("bytes")  # the usual case: no bytes are copied
        return pa.StructArray.from_arrays([contents, pa.nulls(len(contents), pa.string())], fields=list(image_type))
    rows = [None if image is None else {"bytes": _read_image(image), "path": None} for image in column.to_pylist()]
    return pa.array(rows, type=image_type)


def _read_image(image: bytes | dict) -> bytes | None:
    if isinstance(image, bytes):
        return image
    if image.get("bytes") is not None or not image.get("path"):
        return image.get("bytes")
    path = Path(image["path"])
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"image {path.name} of a row cannot be read ({error.strerror}): run check_dataset.py"
        ) from None


def scrub_text(text: str) -> str:
    """A text without tokens, and with only the last part of absolute paths."""
    whole = _WHOLE_PATH.fullmatch(text)
    return redact(whole.group(1) if whole else _PATH.sub(r"\1", text))


def scrub(value: Any) -> Any:
    """`scrub_text` for every text in a JSON value; texts with the name of a secret are hidden."""
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, dict):
        return {
            str(name): HIDDEN if _SECRET_NAME.search(str(name)) and isinstance(inner, str) else scrub(inner)
            for name, inner in value.items()
        }
    return [scrub(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def scrub_json(text: str | None) -> str | None:
    """`scrub` for JSON text; returned unchanged to the byte if nothing is private."""
    value = parse_json(text)
    if value is None:
        return text and scrub_text(text)
    scrubbed = scrub(value)
    return text if scrubbed == value else json.dumps(scrubbed, sort_keys=True, ensure_ascii=False)
