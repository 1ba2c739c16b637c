"""Tables of rows in files, and their columns of image paths."""

import codecs
import csv
import json
import logging
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from utils.data.image_paths import ImageFinder
from utils.errors import InputError
from utils.image_formats import has_image_suffix
from utils.json_lines import read_json_lines
from utils.stored_images import decode_base64, is_base64

logger = logging.getLogger(__name__)

CSV_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (*CSV_SUFFIXES, ".jsonl", ".json")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
SEPARATORS = ",;\t"
MAX_FIELD = 2**31 - 1  # characters: the largest that csv accepts on every system
FILE_NAME = (
    "file_name"  # in datasets' imagefolder, columns of paths are `file_name` and `<column>_file_name`, also plural
)


def read_columns(path: Path) -> dict[str, list]:
    """The columns of a .jsonl, .json, .csv, .tsv or .parquet file; missing values are None. Raises InputError.

    Text is UTF-8 or UTF-16. Fields of a CSV may be separated by commas, semicolons or tabs.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return pq.read_table(path).to_pydict()
        with path.open(encoding=_find_encoding(path), newline="") as file:
            if kind in CSV_SUFFIXES:
                rows = list(_read_csv(file))
            elif kind == ".json":
                rows = _rows_of_json(path, json.load(file))
            else:
                rows = [row for _, row in read_json_lines(path, file)]
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read{' as JSON' if kind == '.json' else ''}: {error}") from error
    if any(None in row for row in rows):
        raise InputError(
            f"{path}: a row has more fields than the header; put quotes around prompts that contain a comma"
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _find_encoding(path: Path) -> str:
    """UTF-16 by its mark or, without one, by the zero byte of the first character; else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    return {(True, False): "utf-16-be", (False, True): "utf-16-le"}.get(tuple(not b for b in start), "utf-8-sig")


def _read_csv(file: TextIO) -> csv.DictReader:
    """The rows of a CSV; the separator is the one that gives its header the most columns."""
    csv.field_size_limit(MAX_FIELD)  # images as base64 text are longer than csv's own limit
    header = file.readline()
    file.seek(0)
    num_columns = {separator: len(next(csv.reader([header], delimiter=separator), [])) for separator in SEPARATORS}
    return csv.DictReader(file, delimiter=max(num_columns, key=num_columns.get))


def _rows_of_json(path: Path, content: object) -> list[dict]:
    """A list of objects, also below "data", or objects by the name of their image, as kohya's metadata has them."""
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = [{FILE_NAME: name, **values} for name, values in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path} must hold a list of objects, one for each pair")
    return content


def names_images(name: str, values: list) -> bool:
    """Whether a column holds image paths: by its name as in datasets, or because most values end in an image suffix.

    A value may also be a list of paths.
    """
    present = [value[0] if isinstance(value, list) and value else value for value in values if value not in (None, [])]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    num_images = sum(has_image_suffix(value[-10:]) and "://" not in value or is_base64(value) for value in present)
    return name.endswith((FILE_NAME, f"{FILE_NAME}s")) or 2 * num_images > len(present)


def image_column_name(name: str) -> str:
    """`original_image_file_name` -> `original_image`, `file_name` -> `image`, as in datasets; the plural too."""
    name = name.removesuffix("s") if name.endswith(f"{FILE_NAME}s") else name
    if name == FILE_NAME:
        return "image"
    return name.removesuffix(f"_{FILE_NAME}")


def locate_images(name: str, values: list, finder: ImageFinder) -> list[str | dict | None]:
    """The absolute path of each image of a column, None if there is none or the value lists several.

    Base64 text becomes {"bytes", "path"}. finder: one for all columns of a table.
    """
    several = sum(isinstance(value, list) and len(value) > 1 for value in values)
    if several:
        logger.warning("column %s: %d of %d rows list several images and are skipped", name, several, len(values))
    names = [_only(value) for value in values]
    if any(value and is_base64(value) for value in names):
        return [{"bytes": decode_base64(value) if value else None, "path": None} for value in names]
    found = iter(finder.find([value for value in names if value]))
    return [next(found) if value else None for value in names]


def _only(value: object) -> str | None:
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value.strip() if isinstance(value, str) and value.strip() else None
