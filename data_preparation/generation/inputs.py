"""What rows are made of: photographs or captions, in a folder, in a saved dataset, or on the Hub.

`Photographs` and `Captions` are descriptions that every worker opens for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from data_preparation.generation.opening import (
    SAMPLED_ROWS,
    digest_rows,
    find_license,
    name_column,
    open_dataset,
    public_name,
    whole_path,
)
from data_preparation.photographs import SUFFIXES, list_photographs, read_metadata
from utils.data.rows import METADATA_NAMES
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

IMAGE_COLUMNS = ("image", "original_image", "input_image", "source_image", "photo", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "prompt", "input", "original_prompt", "sentence", "description")


@dataclass(frozen=True)
class Photographs:
    """dataset_id: a folder of images (searched with its subfolders), a folder of data files or of `save_to_disk`, or
    an id on the Hub. split: of the dataset; of a folder of images, that of its metadata.jsonl where it has one."""

    dataset_id: str
    split: str = "train"
    image_column: str | None = None
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_id", whole_path(self.dataset_id))

    def open(self) -> OpenPhotographs:
        """Raises InputError: what is wrong, and what exists."""
        folder = Path(self.dataset_id).expanduser()
        if folder.is_dir() and not _holds_rows(folder):
            return _open_folder(folder, self.split)
        rows = open_dataset(self.dataset_id, self.config, self.split, self.revision)
        column = _find_image_column(self.dataset_id, rows, self.image_column)
        names = name_column(rows)
        read = rows.cast_column(column, datasets.Image(decode=False))
        return OpenPhotographs(
            _RowImages(read, column, names),
            digest_rows(read, [column, *([names] if names else [])]),
            public_name(self.dataset_id),
            find_license(self.dataset_id, rows),
        )


class OpenPhotographs:
    """digest: changes with the photographs; dataset: the name of where they come from; license: None where unknown."""

    def __init__(
        self, images: Sequence, digest: str, dataset: str, license_name: str | None, licenses: dict | None = None
    ) -> None:
        self._images, self.digest, self.dataset, self.license = images, digest, dataset, license_name
        self._licenses = licenses or {}

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """What a row calls its photograph: a path in the folder, or what the dataset calls it."""
        return self._images[index][0]

    def license_of(self, index: int) -> str | None:
        """The licence of one photograph, where the folder's metadata.jsonl names it; else that of all."""
        return self._licenses.get(self.name(index), self.license) if self._licenses else self.license

    def read(self, index: int) -> np.ndarray:
        """uint8 RGB (H, W, 3), upright. Raises BadRow."""
        return np.asarray(decode_image(self._images[index][1]()))


class _FolderImages:
    def __init__(self, folder: Path, paths: list[Path]) -> None:
        self._folder, self._paths = folder, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple:
        path = self._paths[index]
        return path.relative_to(self._folder).as_posix(), lambda: path


class _RowImages:
    def __init__(self, rows: datasets.Dataset, column: str, names: str | None) -> None:
        self._images, self._column = rows.select_columns([column]), column
        self._names = rows.select_columns([names]) if names else None
        self.name_column = names

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple:
        index = int(index)
        name = str(self._names[index][self.name_column]) if self._names is not None else str(index)
        return name, lambda: self._images[index][self._column]


@dataclass(frozen=True)
class Captions:
    """dataset_id: a .txt file (a caption in each line), a .jsonl, .json, .csv or .parquet file, a folder of such or of
    `save_to_disk`, or an id on the Hub."""

    dataset_id: str
    caption_column: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_id", whole_path(self.dataset_id))

    def open(self) -> OpenCaptions:
        """Raises InputError: what is wrong, and what exists."""
        rows = _open_texts(self)
        texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _TEXT_TYPES]
        column = self.caption_column or next((name for name in CAPTION_COLUMNS if name in texts), None)
        if column is None and len(texts) == 1:
            column = texts[0]
        if column not in texts:
            given = "which column holds the captions is not known" if column is None else f"no text column {column!r}"
            raise InputError(f"{self.dataset_id}: {given}; --caption_column takes {', '.join(texts) or 'none here'}")
        rows = rows.select_columns(texts)
        return OpenCaptions(
            rows, column, digest_rows(rows, texts), public_name(self.dataset_id), find_license(self.dataset_id, rows)
        )


_TEXT_TYPES = ("string", "large_string")


class OpenCaptions:
    """column: the one that holds the captions; digest, dataset, license: as of photographs."""

    def __init__(
        self, rows: datasets.Dataset, column: str, digest: str, dataset: str, license_name: str | None
    ) -> None:
        self._rows, self.column = rows, column
        self.digest, self.dataset, self.license = digest, dataset, license_name
        self._names = name_column(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, str | None]:
        """All text columns."""
        return self._rows[int(index)]

    def text(self, index: int) -> str:
        """The caption, without space around it; "" where there is none."""
        return (self.row(index)[self.column] or "").strip()

    def texts(self) -> list[str]:
        """All captions, as `text` gives them."""
        return [(text or "").strip() for text in self._rows[self.column]]

    def name(self, index: int) -> str:
        """What the dataset calls the row, or its number."""
        return str((self._names and self.row(index)[self._names]) or index)


def _holds_rows(folder: Path) -> bool:
    """Whether a folder holds a dataset, and not loose images."""
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return saved or any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow"))


def _open_folder(folder: Path, split: str) -> OpenPhotographs:
    try:
        paths, described = list_photographs(folder, split), read_metadata(folder)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'metadata.jsonl'}: a line is not a JSON object with file_name ({error})") from None
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{folder / METADATA_NAMES[0]} names {missing[0].name}, which is not there")
    if not paths:
        raise InputError(f"{folder} holds no image of split {split!r}; {', '.join(sorted(SUFFIXES))} files are read")
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]).encode())
    for index in np.unique(np.linspace(0, len(paths) - 1, SAMPLED_ROWS).astype(int)):
        digest.update(paths[index].read_bytes())
    licenses = {row["file_name"]: found for row in described if (found := row.get("license") or row.get("licence"))}
    name, license_name = folder.resolve().name, find_license(str(folder), None)
    return OpenPhotographs(_FolderImages(folder, paths), digest.hexdigest(), name, license_name, licenses)


def _open_texts(captions: Captions) -> datasets.Dataset:
    path = Path(captions.dataset_id).expanduser()
    if not path.is_file():
        return open_dataset(captions.dataset_id, captions.config, captions.split, captions.revision)
    kind = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind is None:
        raise InputError(f"{path}: captions are read from .txt, .jsonl, .json, .csv and .parquet files")
    if kind == "text":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
        rows = datasets.Dataset.from_dict({"caption": [line for line in lines if line]})
    else:
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if len(rows) == 0:
        raise InputError(f"{path} holds no caption")
    return rows


def _find_image_column(dataset: str, rows: datasets.Dataset, wanted: str | None) -> str:
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if wanted is not None and wanted not in images:
        raise InputError(
            f"--image_column {wanted}: no image column of {dataset}; they are {', '.join(images) or 'none'}"
        )
    found = wanted or next((name for name in IMAGE_COLUMNS if name in images), None)
    if found is None and len(images) == 1:
        found = images[0]
    if found is None:
        raise InputError(f"{dataset}: give --image_column; its image columns are {', '.join(images) or 'none'}")
    return found


__all__ = ["BadRow", "Captions", "OpenCaptions", "OpenPhotographs", "Photographs"]
