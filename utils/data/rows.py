"""Opens the rows of a dataset: on the Hub, in data files, saved by `save_to_disk`, or in a metadata file of images."""

import csv
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.errors import InputError
from utils.hub_names import looks_like_path
from utils.json_lines import read_json_lines

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # in datasets' imagefolder, columns of paths are `file_name` and `<column>_file_name`


def open_rows(
    name: str,
    is_folder: bool,
    config: str | None,
    split: str,
    streaming: bool,
    cache_dir: str | None,
    revision: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """All rows and columns of one split. Raises InputError that says what is wrong and what exists."""
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _open_saved(path, split)
        rows = _open_metadata(path, split) if rows is None else rows
        if rows is not None and config:
            raise InputError(f"--dataset_config_name {config}: {name} has no configurations; drop the flag")
        if rows is not None:
            return rows.to_iterable_dataset() if streaming else rows
        name = str(path)
    elif path.exists():
        raise InputError(f"{name} is a file; give its folder")
    elif is_folder or looks_like_path(name):
        raise InputError(f"there is no folder {name}; give an existing folder, or for --dataset_name a Hub id")
    try:
        builder = datasets.load_dataset_builder(name, config, cache_dir=cache_dir, revision=revision)
        _check_split(name, split, builder)
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
            return _with_features(name, rows)
        builder.download_and_prepare()
        if split in builder.info.splits and builder.info.splits[split].num_examples == 0:
            raise InputError(f"{name}, split {split!r}, has no rows")  # the error of as_dataset does not say so
        return builder.as_dataset(split=split)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        what = f"the folder {name}" if path.is_dir() else f"the dataset {name} from the Hugging Face Hub"
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)
        advice = "" if path.is_dir() else ". Check the id and the network; to use a local folder, give its path"
        raise InputError(f"cannot open {what}, config {config!r}, split {split!r}: {reason}{advice}") from error


def _with_features(name: str, rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream with known column types; for formats without a schema, datasets reads the first rows."""
    rows = rows if rows.features else rows._resolve_features()
    if not rows.features:
        raise InputError(f"{name} has no rows")
    return rows


def _check_split(name: str, split: str, builder: datasets.DatasetBuilder) -> None:
    """Raise InputError for a missing split before anything is downloaded."""
    splits = list(builder.info.splits or getattr(builder.config, "data_files", None) or [])
    missing = [part for part in split.split("+") if part.split("[")[0] not in splits]
    if splits and missing:
        raise InputError(f"--dataset_split {split!r} is not in {name}; its splits: {', '.join(map(str, splits))}")


def _open_saved(folder: Path, split: str) -> datasets.Dataset | None:
    """The dataset that `save_to_disk` wrote into `folder`; None if there is none."""
    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{folder} was written by save_to_disk but cannot be read: {error}") from error
    except IndexError:  # datasets 5 raises it for a saved dataset without rows
        raise InputError(f"{folder} has no rows") from None
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved, str(saved.split or "train"): saved}  # a single split is also found by the default
    if split not in saved:
        raise InputError(f"--dataset_split {split!r} is not in {folder}; its splits: {', '.join(sorted(saved))}")
    return saved[split]


def _open_metadata(folder: Path, split: str) -> datasets.Dataset | None:
    """The rows of a metadata file in `folder` or `folder/<split>`; None if there is none.

    Unlike datasets' imagefolder, any column of image paths becomes an image column, so that a row can have two images
    (huggingface/diffusers#8824). Paths are relative to the metadata file.
    """
    path = _find_metadata(folder, split)
    if path is None:
        return None
    image_columns, other_columns, parent = {}, {}, path.parent.resolve()
    for name, values in read_columns(path).items():
        if names_images(name, values):
            image_columns[image_column_name(name)] = [str(parent / value) if value else None for value in values]
        else:
            other_columns[name] = values
    try:
        rows = datasets.Dataset.from_dict({**other_columns, **image_columns})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{path}: a column has values of different types: {error}") from error
    for name in image_columns:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of a split; the one directly in the folder is the split "train"."""
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
    """The columns of a .jsonl, .csv or .parquet file; missing values are None. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pydict()
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix == ".csv"
            rows = list(csv.DictReader(file)) if is_csv else [row for _, row in read_json_lines(path, file)]
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if any(None in row for row in rows):
        raise InputError(
            f"{path}: a row has more fields than the header; put quotes around prompts that contain a comma"
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def names_images(name: str, values: list) -> bool:
    """Whether a column holds image paths: by its name as in datasets, or because most values end in an image suffix."""
    present = [value for value in values if value is not None]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    extensions = Image.registered_extensions()
    num_images = sum(Path(value).suffix.lower() in extensions and "://" not in value for value in present)
    return name.endswith(FILE_NAME) or 2 * num_images > len(present)


def image_column_name(name: str) -> str:
    """`original_image_file_name` -> `original_image`, `file_name` -> `image`, as in datasets."""
    if name == FILE_NAME:
        return "image"
    return name.removesuffix(f"_{FILE_NAME}")
