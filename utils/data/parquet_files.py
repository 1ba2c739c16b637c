"""Parquet files beside tars, in a folder that `datasets` would take for the tars alone."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, get_data_patterns

from utils.data.tables import names_images
from utils.errors import InputError

PROBED_ROWS = 20  # whose values decide whether a column of text names images


def list_parquet_files(folder: Path) -> dict[str, list[str]]:
    """The parquet files of each split, which is in their names or folders as `datasets` reads it."""
    try:
        patterns = get_data_patterns(str(folder))
    except FileNotFoundError:
        return {}
    files = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    found = {str(split): [file for file in paths if file.endswith(".parquet")] for split, paths in files.items()}
    return {split: paths for split, paths in found.items() if paths}


def has_parquet_pairs(folder: Path) -> bool:
    """Whether parquet files have two columns of images or of their paths; else they are an index of something else.

    Raises InputError for a file that cannot be read.
    """
    path = next((path for path in sorted(folder.rglob("*.parquet"))), None)
    if path is None:
        return False
    try:
        with pq.ParquetFile(path) as file:
            first = next(file.iter_batches(PROBED_ROWS), None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if first is None:
        return False
    columns = zip(first.schema.names, first.columns, strict=True)
    return sum(_holds_images(column.type) or names_images(name, column.to_pylist()) for name, column in columns) >= 2


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
