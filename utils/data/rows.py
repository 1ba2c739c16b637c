"""The rows of a dataset: of the Hub, or of a folder with data files, a `save_to_disk`, or a metadata file of images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.errors import InputError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # datasets' imagefolder calls columns of paths `file_name` and `<column>_file_name`


def open_rows(
    name: str, is_folder: bool, config: str | None, split: str, streaming: bool, cache_dir: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """All rows of one split, every column. `InputError` says what is wrong and what exists."""
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _open_saved(path, split)
        rows = _open_metadata(path, split) if rows is None else rows
        if rows is not None and config:
            raise InputError(f"--dataset_config_name {config}: {name} has no configurations, drop the flag")
        if rows is not None:
            return rows.to_iterable_dataset() if streaming else rows
        name = str(path)
    elif path.exists():
        raise InputError(f"{name} is a file; give the folder that holds it")
    elif is_folder or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name} (--dataset_name and --train_data_dir take folders, or a Hub id)")
    try:
        builder = datasets.load_dataset_builder(name, config, cache_dir=cache_dir)
        _check_split(name, split, builder)
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
            return _with_features(name, rows)
        builder.download_and_prepare()
        if split in builder.info.splits and builder.info.splits[split].num_examples == 0:
            raise InputError(f"{name}, split {split!r}, has no rows")  # as_dataset would answer with a riddle
        return builder.as_dataset(split=split)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        what = f"the folder {name}" if path.is_dir() else f"the dataset {name} from the Hugging Face Hub"
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)
        advice = "" if path.is_dir() else ". Check the id and the network; a folder of your own is given by its path"
        raise InputError(f"cannot open {what}, config {config!r}, split {split!r}: {reason}{advice}") from error


def _with_features(name: str, rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """A stream that knows the types of its columns; for formats without a schema, datasets reads its first rows."""
    rows = rows if rows.features else rows._resolve_features()
    if not rows.features:
        raise InputError(f"{name} has no rows")
    return rows


def _check_split(name: str, split: str, builder: datasets.DatasetBuilder) -> None:
    """Refuse an absent split before anything is downloaded, and name those that exist."""
    splits = list(builder.info.splits or getattr(builder.config, "data_files", None) or [])
    asked = [part.split("[")[0] for part in split.split("+")]
    missing = [part for part in asked if part not in splits]
    if splits and missing:
        raise InputError(f"--dataset_split {split!r} is not in {name}; its splits: {', '.join(map(str, splits))}")


def _open_saved(folder: Path, split: str) -> datasets.Dataset | None:
    """The dataset that `save_to_disk` wrote into `folder`, or None if none did."""
    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{folder} looks written by save_to_disk but cannot be read: {error}") from error
    except IndexError:  # how datasets 5 answers to a saved dataset without rows
        raise InputError(f"{folder} has no rows") from None
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved, str(saved.split or "train"): saved}  # it stands alone: the default finds it too
    if split not in saved:
        raise InputError(f"--dataset_split {split!r} is not in {folder}; its splits: {', '.join(sorted(saved))}")
    return saved[split]


def _open_metadata(folder: Path, split: str) -> datasets.Dataset | None:
    """The rows of a metadata file in `folder` or `folder/<split>`, its path columns as images; None if there is none.

    Unlike datasets' imagefolder: any column of image paths is an image column, whatever its name, so that one row can
    name two images (huggingface/diffusers#8824). Paths are relative to the metadata file.
    """
    path = _find_metadata(folder, split)
    if path is None:
        return None
    columns = read_columns(path)
    are_images = {name: names_images(name, values) for name, values in columns.items()}
    image_columns, other_columns = {}, {}
    for name, values in columns.items():
        if are_images[name]:
            folder = path.parent.resolve()
            image_columns[image_column_name(name)] = [str(folder / value) if value else None for value in values]
        else:
            other_columns[name] = values
    try:
        rows = datasets.Dataset.from_dict({**other_columns, **image_columns})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{path}: a column holds values of different types: {error}") from error
    for name in image_columns:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of a split; one directly in the folder is the split "train"."""
    for name in METADATA_NAMES:
        if (folder / split / name).is_file():
            return folder / split / name
    found = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if found is not None and split == "train":
        return found
    splits = {path.parent.name for name in METADATA_NAMES for path in folder.glob(f"*/{name}")}
    if found is not None:
        splits.add("train")
    if splits and split != "train":
        raise InputError(f"--dataset_split {split!r} is not in {folder}; its splits: {', '.join(sorted(splits))}")
    return None


def read_columns(path: Path) -> dict[str, list]:
    """All rows of a .jsonl, .csv or .parquet file by column; a value that a row lacks is None. Raises `InputError`."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pydict()
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else _read_json_lines(path, file)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if any(None in row for row in rows):
        raise InputError(f"{path}: a row has more fields than the header; put quotes around prompts that hold a comma")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_json_lines(path: Path, lines: object) -> list[dict]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not an object with column names but {line.strip()[:60]}")
        rows.append(row)
    return rows


def names_images(name: str, values: list) -> bool:
    """Whether a column holds paths of images: by datasets' naming rule, or because most values end like one."""
    present = [value for value in values if value is not None]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    extensions = Image.registered_extensions()
    num_images = sum(Path(value).suffix.lower() in extensions and "://" not in value for value in present)
    return name.endswith(FILE_NAME) or 2 * num_images > len(present)


def image_column_name(name: str) -> str:
    """`original_image_file_name` is the column `original_image`, `file_name` is `image`: as datasets does."""
    if name == FILE_NAME:
        return "image"
    return name.removesuffix(f"_{FILE_NAME}")
