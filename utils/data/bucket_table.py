"""The aspect-ratio bucket of every row, from the sizes of the images, which are read once and stored."""

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from utils.atomic_files import UNFINISHED
from utils.data.geometry import Geometry, Size, make_buckets, nearest_bucket
from utils.data.sources import Source, images_digest
from utils.pixels import BadRow, peek_size

NOT_READ, UNREADABLE = 0, -1


def find_buckets(sources: list[Source], geometry: Geometry) -> list[list[Size]]:
    """The bucket (h, w) of each row of each source.

    A row that cannot be opened gets the square bucket: another row will replace it.
    """
    buckets = make_buckets(geometry.resolution)
    square = min(buckets, key=lambda bucket: abs(bucket[0] - bucket[1]))
    found = []
    for source in sources:
        sizes, which = np.unique(read_sizes(source), axis=0, return_inverse=True)
        of_size = [square if UNREADABLE in size else nearest_bucket(tuple(size.tolist()), buckets) for size in sizes]
        found.append([of_size[index] for index in which.ravel()])
    return found


def read_sizes(source: Source) -> np.ndarray:
    """Stored sizes (h, w) of the original images of a source, int32 (rows, 2); -1 where a row cannot be opened.

    Reads the headers of those that are not in the table of the dataset yet, and stores the table in the cache of
    datasets. It is read again where it cannot be stored.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "image-sizes" / f"{images_digest(source)}.npy"
    table, numbers = _load(path, len(source.whole().rows)), source.numbers()
    if len(unread := np.unique(numbers[table[numbers, 0] == NOT_READ])):
        rows = source.whole().rows.select_columns([source.columns.original]).with_format("arrow")
        for number in tqdm(unread.tolist(), desc="Reading image sizes", unit="image", disable=None):
            try:
                table[number] = peek_size(_stored_image(rows[number]))
            except BadRow:
                table[number] = UNREADABLE
        _store(path, table)
    return table[numbers]


def _load(path: Path, num_rows: int) -> np.ndarray:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        table = np.empty(0)
    is_right = table.shape == (num_rows, 2) and table.dtype == np.int32
    return table if is_right else np.full((num_rows, 2), NOT_READ, dtype=np.int32)


def _store(path: Path, table: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")  # of this process alone
        np.save(unfinished, table, allow_pickle=False)
        unfinished.replace(path)
    except OSError:
        return  # a cache that cannot be written to costs time, not the run


def _stored_image(row: pa.Table) -> object:
    """The image file of a row with one column, without copying it."""
    image = row.column(0)[0]
    if not image.is_valid or isinstance(image, (pa.ListScalar, pa.LargeListScalar)):
        return image.as_py()
    if image["bytes"].is_valid:
        return pa.BufferReader(image["bytes"].as_buffer())
    return image["path"].as_py()
