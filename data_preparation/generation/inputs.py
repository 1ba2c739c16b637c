"""The inputs of generators: photographs or captions in a folder, in a saved dataset, or on the Hub.

`Photographs` and `Captions` are picklable descriptions, which each worker opens for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_preparation.photographs import find_photographs, read_metadata
from data_preparation.published_prompts import find_published_prompts
from utils.data.rows import open_rows
from utils.errors import InputError
from utils.hub_names import public_name
from utils.image_folders import describe_skipped
from utils.image_formats import IMAGE_SUFFIXES
from utils.licences import find_dataset_license
from utils.pixels import decode_image

IMAGE_COLUMNS = ("image", "original_image", "input_image", "source_image", "photo", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "prompt", "input", "original_prompt", "sentence", "description")
# Columns of triples, and their names in datasets of pairs such as timbrooks/instructpix2pix-clip-filtered.
TRIPLE_COLUMNS = {
    "edit": ("edit_prompt", "edit_instruction", "instruction"),
    "output": ("edited_prompt", "edited_caption", "target_caption"),
}
NAME_COLUMNS = ("file_name", "source", "id", "image_id", "img_id", "key", "url", "URL", "filename")
CAPTION_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NUM_DIGESTED = 64  # rows or files whose content goes into a digest


@dataclass(frozen=True)
class Photographs:
    """dataset_id: a folder of images (with subfolders), a folder of data files or of `save_to_disk`, or a Hub id.

    split: of the dataset, or of the metadata.jsonl in a folder of images, if it names splits.
    """

    dataset_id: str
    split: str = "train"
    image_column: str | None = None
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_id", _absolute(self.dataset_id))

    def open(self) -> OpenPhotographs:
        """Raises InputError if the dataset or its column does not exist, or has no images."""
        folder = Path(self.dataset_id)
        if folder.is_dir() and not _holds_dataset(folder):
            return _open_image_folder(folder, self.split)
        rows = open_rows(self.dataset_id, False, self.config, self.split, False, None, self.revision)
        columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        column = _choose_column("--image_column", self.image_column, self.dataset_id, columns, IMAGE_COLUMNS)
        rows = rows.cast_column(column, datasets.Image(decode=False))
        names, images = _find_name_column(rows), rows.select_columns([column])
        name_rows = rows.select_columns([names]) if names else None
        return OpenPhotographs(
            len(rows),
            lambda index: str(name_rows[index][names]) if names else str(index),
            lambda index: images[index][column],
            _digest_rows(rows, [column, *([names] if names else [])]),
            public_name(self.dataset_id),
            find_dataset_license(self.dataset_id) or rows.info.license or None,
        )


@dataclass(frozen=True)
class OpenPhotographs:
    """digest: changes with the photographs; dataset: public name of the source; license: None if unknown.

    get_name, get_image: name and stored image of an index. licenses: of single photographs, by name. skipped: a line
    for each kind of file in the folder that is no photograph.
    """

    count: int
    get_name: Callable[[int], str]
    get_image: Callable[[int], Any]
    digest: str
    dataset: str
    license: str | None
    licenses: dict[str, str] | None = None
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """The path in the folder, the value of a name column, or the row number."""
        return self.get_name(int(index))

    def license_of(self, index: int) -> str | None:
        """The licence of one photograph: from metadata.jsonl, else that of the dataset."""
        return self.licenses.get(self.name(index), self.license) if self.licenses else self.license

    def read(self, index: int, shorter_side: int | None = None) -> np.ndarray:
        """uint8 RGB (H, W, 3), upright. shorter_side: of `decode_image`. Raises BadRow."""
        return np.asarray(decode_image(self.get_image(int(index)), shorter_side=shorter_side))


@dataclass(frozen=True)
class Captions:
    """dataset_id: a .txt file (one caption per line), a .jsonl, .json, .csv or .parquet file, a folder, or a Hub id."""

    dataset_id: str
    caption_column: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_id", _absolute(self.dataset_id))

    def open(self) -> OpenCaptions:
        """Raises InputError if the dataset or its column does not exist, or has no captions."""
        published = find_published_prompts(self.dataset_id)
        file = published or Path(self.dataset_id)
        if file.is_file():
            rows = _read_caption_file(file)
        else:
            rows = open_rows(self.dataset_id, False, self.config, self.split, False, None, self.revision)
        texts = [name for name, feature in rows.features.items() if _is_text(feature)]
        column = _choose_column("--caption_column", self.caption_column, self.dataset_id, texts, CAPTION_COLUMNS)
        rows = _rename_triples(rows.select_columns(texts), column)
        license_name = find_dataset_license(str(published or self.dataset_id)) or rows.info.license or None
        return OpenCaptions(rows, column, _digest_rows(rows, texts), public_name(self.dataset_id), license_name)


@dataclass(frozen=True)
class OpenCaptions:
    """rows: all text columns; column: of the captions; digest, dataset, license: as in `OpenPhotographs`."""

    rows: datasets.Dataset
    column: str
    digest: str
    dataset: str
    license: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, str | None]:
        """All text columns."""
        return self.rows[int(index)]

    def name(self, index: int) -> str:
        """The value of a name column, or the row number."""
        column = _find_name_column(self.rows)
        return str((column and self.row(index)[column]) or index)


def _rename_triples(rows: datasets.Dataset, caption_column: str) -> datasets.Dataset:
    """The rows with the columns "edit" and "output", if columns of pairs such as edit_prompt mean the same."""
    for name, others in TRIPLE_COLUMNS.items():
        found = next((other for other in (name, *others) if other in rows.features and other != caption_column), name)
        if found != name and name not in rows.features:
            rows = rows.rename_column(found, name)
    return rows


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _absolute(dataset: str) -> str:
    """An absolute path, because a worker may have another working directory; a Hub id unchanged."""
    path = Path(dataset).expanduser()
    return str(path.absolute()) if path.exists() else dataset


def _holds_dataset(folder: Path) -> bool:
    """Whether a folder holds a dataset, not image files."""
    is_saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return is_saved or any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow"))


def _open_image_folder(folder: Path, split: str) -> OpenPhotographs:
    metadata = folder / "metadata.jsonl"
    try:
        paths, skipped = find_photographs(folder, split)
        rows = [row for row in read_metadata(folder) if row.get("license") or row.get("licence")]
        licenses = {row["file_name"]: row.get("license") or row.get("licence") for row in rows}
    except KeyError:
        raise InputError(f"{metadata}: a line has no file_name") from None
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{metadata} names {missing[0]}, which does not exist")
    if not paths:
        raise InputError(f"{folder} has no images of split {split!r}; supported are {', '.join(IMAGE_SUFFIXES)}")
    names = [path.relative_to(folder).as_posix() for path in paths]
    digest = hashlib.blake2b(digest_size=16)
    for name, path in zip(names, paths, strict=True):
        digest.update(json.dumps([name, path.stat().st_size]).encode())
    for index in _sampled(len(paths)):
        digest.update(paths[index].read_bytes())
    public, license_name = folder.resolve().name, find_dataset_license(str(folder))
    return OpenPhotographs(
        len(paths),
        names.__getitem__,
        paths.__getitem__,
        digest.hexdigest(),
        public,
        license_name,
        licenses,
        describe_skipped(skipped),
    )


def _read_caption_file(path: Path) -> datasets.Dataset:
    kind = CAPTION_READERS.get(path.suffix)
    if kind is None:
        raise InputError(f"{path}: captions must be in a {', '.join(CAPTION_READERS)} file")
    if kind == "text":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
        rows = datasets.Dataset.from_dict({"caption": [line for line in lines if line]})
    else:
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if len(rows) == 0:
        raise InputError(f"{path} has no captions")
    return rows


def _choose_column(flag: str, given: str | None, dataset: str, columns: list[str], known: tuple[str, ...]) -> str:
    """The given column, else the first known one, else the only one. columns: those of the right type."""
    column = given or next((name for name in known if name in columns), None)
    if column is None and len(columns) == 1:
        return columns[0]
    if column not in columns:
        problem = f"{flag} {given}: cannot be used for {dataset}" if given else f"{dataset}: {flag} is required"
        raise InputError(f"{problem}; it must be one of: {', '.join(columns) or '(no column of this type)'}")
    return column


def _find_name_column(rows: datasets.Dataset) -> str | None:
    return next((name for name in NAME_COLUMNS if name in rows.features), None)


def _digest_rows(rows: datasets.Dataset, columns: list[str]) -> str:
    """A digest of the number of rows and of the content of some of them."""
    digest = hashlib.blake2b(json.dumps([len(rows), columns]).encode(), digest_size=16)
    for index in _sampled(len(rows)):
        for name, value in sorted(rows[int(index)].items()):
            if name in columns:
                content = value.get("bytes") or str(value.get("path")).encode() if isinstance(value, dict) else None
                digest.update(content if content is not None else json.dumps(value, default=str).encode())
    return digest.hexdigest()


def _sampled(count: int) -> np.ndarray:
    """Indices of `NUM_DIGESTED` items at most, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, NUM_DIGESTED).astype(int))
