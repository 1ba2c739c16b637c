"""Opens the rows of a dataset: on the Hub, in data files, saved by `save_to_disk`, or in a metadata file of images."""

import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa

from utils.archives import is_member_path
from utils.data.dataset_cache import announce_copy
from utils.data.folder_pairs import find_folders, match_files, read_captions, refuse_packed_folders
from utils.data.image_columns import unify_image_columns
from utils.data.image_paths import ImageFinder
from utils.data.parquet_files import has_parquet_pairs, list_parquet_files
from utils.data.seed_folders import has_seed_folders, read_pairs
from utils.data.suffix_pairs import find_suffix_pairs
from utils.data.tables import TEXT_SUFFIXES, image_column_name, locate_images, names_images, read_columns
from utils.data.web_dataset import find_tars, read_samples, refuse_missing_split
from utils.errors import InputError
from utils.hub_names import looks_like_path

logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


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
        rows = _open_files(path, split) if rows is None else rows
        if rows is not None and config:
            raise InputError(f"--dataset_config_name {config}: {name} has no configurations; drop the flag")
        if rows is not None:
            rows = unify_image_columns(rows, path)
            return rows.to_iterable_dataset() if streaming else rows
        name = str(path)
    elif path.suffix.lower() in TEXT_SUFFIXES and path.is_file():
        rows = unify_image_columns(open_table(path), path.parent)
        return rows.to_iterable_dataset() if streaming else rows
    elif path.exists():
        raise InputError(f"{name} is a file; give its folder, or a table ({', '.join(TEXT_SUFFIXES)})")
    elif is_folder or looks_like_path(name):
        raise InputError(
            f"the folder {name} does not exist; --dataset_name takes a folder, a table or an id of the Hub"
        )
    try:
        has_tars = path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*/*.tar")))
        files = list_parquet_files(path) if has_tars else None
        of_files = {"path": "parquet", "data_files": files} if files else {"path": name, "name": config}
        builder = datasets.load_dataset_builder(**of_files, cache_dir=cache_dir, revision=revision)
        _check_split(name, split, builder)
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
            return unify_image_columns(_with_features(name, rows), path)
        announce_copy(builder, name, path)
        builder.download_and_prepare()
        if split in builder.info.splits and builder.info.splits[split].num_examples == 0:
            raise InputError(f"{name}, split {split!r}, has no rows")  # the error of as_dataset does not say so
        return unify_image_columns(builder.as_dataset(split=split), path)
    except InputError:
        raise
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise InputError(
            f"{name} consists of a script, which `datasets` no longer runs: give a dataset of parquet files (many have "
            "them at --revision refs/convert/parquet), or download its files and give their folder"
        ) from error
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


def _open_files(folder: Path, split: str) -> datasets.Dataset | None:
    """The rows of a metadata file, a table, tars, seeds.json or pairs of image files; None for what datasets opens.

    A table of pairs decides over the tars beside it, which may hold its images.
    """
    if path := _find_metadata(folder, split):
        return open_table(path, folder)
    place = folder / split if (folder / split).is_dir() else folder if split == "train" else None
    has_parquet = any(folder.rglob("*.parquet"))
    table = None if has_parquet else _find_table(folder, split)
    if tars := find_tars(folder, split):
        return None if has_parquet_pairs(folder) else _open_tars(folder, tars, table)
    if place and has_seed_folders(place):
        return _make_rows(place, read_pairs(place), [place])
    if place and (found := find_folders(place)):
        return _open_folder_pairs(place, *found)
    if table:
        return open_table(table, folder)
    if place and (pairs := find_suffix_pairs(place)):
        return _open_pairs(place, place, place, pairs)
    has_tables = has_parquet or any(path.suffix.lower() in TEXT_SUFFIXES for path in folder.iterdir())
    if not has_tables:  # which may name what is in the archives
        refuse_missing_split(folder, split)
        refuse_packed_folders(place or folder)
    return None


def _find_table(folder: Path, split: str) -> Path | None:
    """The table of a split: in the folder of its name or beside that; named as the split, or the only one."""
    for place in (folder / split, folder):
        tables = [path for path in sorted(place.glob("*")) if path.suffix.lower() in TEXT_SUFFIXES]
        named = [path for path in tables if path.stem == split]
        is_whole = place != folder or split == "train"
        if len(found := named or (tables if is_whole else [])) == 1:
            return found[0]
    return None


def _open_tars(folder: Path, tars: list[Path], table: Path | None) -> datasets.Dataset:
    """The samples of tars, or the rows of a table beside them if it has two columns of images and is no index."""
    problem = None
    try:
        if table and _count_image_columns(rows := open_table(table, folder)) >= 2:
            return rows
    except InputError as error:  # of an index, it does not matter
        problem = error
    rows = _make_rows(folder, read_samples(tars), [tars[0].parent])
    if problem and _count_image_columns(rows) < 2:
        raise problem
    return rows


def _count_image_columns(rows: datasets.Dataset) -> int:
    return sum(isinstance(feature, datasets.Image) for feature in rows.features.values())


def open_table(path: Path, folder: Path | None = None) -> datasets.Dataset:
    """The rows of a table. folder: of its dataset. Raises InputError.

    Unlike datasets' imagefolder, any column of image paths becomes an image column, so that a row can have two images
    (huggingface/diffusers#8824). Paths are relative to the table, to the dataset or to the current folder.
    """
    bases = [path.parent, *([folder] if folder else []), Path.cwd()]
    return _make_rows(path, read_columns(path), bases)


def _make_rows(source: Path, columns: dict[str, list], bases: list[Path]) -> datasets.Dataset:
    image_columns, other_columns = {}, {}
    finder = ImageFinder(bases)
    for name, values in columns.items():
        if all(isinstance(value, str) and is_member_path(value) for value in values):
            image_columns[name] = values
        elif names_images(name, values):
            image_columns[image_column_name(name)] = locate_images(name, values, finder)
        else:
            other_columns[name] = _with_one_type(source, name, values)
    try:
        rows = datasets.Dataset.from_dict({**other_columns, **image_columns})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{source}: a column has values of different types: {error}") from error
    for name in image_columns:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _with_one_type(source: Path, name: str, values: list) -> list:
    """A column as it is, or as text where its values have types that no column can have."""
    try:
        pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        logger.warning("%s: the values of column %s have different types and are used as text", source, name)
        is_kept = [value is None or isinstance(value, str) for value in values]
        return [v if kept else json.dumps(v, default=str) for v, kept in zip(values, is_kept, strict=True)]
    return values


def _open_folder_pairs(folder: Path, originals: Path, edited: Path) -> datasets.Dataset:
    pairs, problems = match_files(originals, edited)
    if not pairs:
        first = f"{folder}: no image of {originals.name} has the name of an image in {edited.name}"
        raise InputError.from_problems([first, *problems])
    for problem in problems:
        logger.warning("not used: %s", problem)
    return _open_pairs(folder, originals, edited, pairs)


def _open_pairs(folder: Path, originals: Path, edited: Path, pairs: list[tuple[str, str]]) -> datasets.Dataset:
    prompts = read_captions(originals, edited, pairs, folder)
    if not any(prompts):
        raise InputError(
            f"{folder}: none of the {len(pairs)} pairs of {originals.name} and {edited.name} has an instruction: "
            f"create a text file with the name of each image, such as {edited.name}/{Path(pairs[0][1]).stem}.txt, "
            "or give one for all with data_preparation/import_pairs.py --edit_prompt"
        )
    columns = {
        "original_image": [str((originals / original).resolve()) for original, _ in pairs],
        "edit_prompt": prompts,
        "edited_image": [str((edited / changed).resolve()) for _, changed in pairs],
    }
    return _make_rows(folder, columns, [folder])


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
