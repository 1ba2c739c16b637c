"""Rows that are held out of training, to measure its loss on images that it never sees."""

import re
from dataclasses import replace
from pathlib import PurePath

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.draws import random_order
from utils.data.seed_folders import IMAGE_NAME
from utils.data.sources import Source
from utils.errors import InputError

MAX_HELD_OUT = 512  # rows: more cost time at every validation and hardly change the mean
TAIL = 64  # bytes at the end of a file that, with its size, tell images apart without reading them


def hold_out(
    sources: list[Source], fraction: float, seed: int, limit: int = MAX_HELD_OUT
) -> tuple[list[Source], list[Source]]:
    """(training sources, held-out sources): about `fraction` of the rows of each, at least one and never all.

    Rows of the same original image stay together: a loss on an image that another row trains is too low. limit: of the
    held-out rows of all sources together. Raises InputError.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--validation_split is {fraction}; it must be above 0 and below 1")
    if any(source.is_streaming for source in sources):
        raise InputError(
            "--validation_split needs the number of rows, which is unknown with --streaming: give --validation_samples "
            "N to hold out the first N rows, or drop --streaming"
        )
    kept, held_out, total = [], [], sum(len(source.rows) for source in sources)
    for source in sources:
        num_rows = len(source.rows)
        size = min(max(1, round(fraction * num_rows)), max(1, limit * num_rows // total))
        chosen = _choose_rows(group_rows(source), size, seed)
        kept.append(source.select(np.setdiff1d(np.arange(num_rows), chosen)))
        if len(chosen):
            # Each held-out row is evaluated once, whatever the weights for training.
            held_out.append(replace(source.select(chosen), weight=float(len(chosen))))
    if not held_out:
        raise InputError("--validation_split needs a dataset with at least two rows of different original images")
    return kept, held_out


def hold_out_first(source: Source, count: int) -> tuple[Source, Source]:
    """(the rest of a stream, its first `count` rows, which stay in memory). Raises InputError if there are no more."""
    first = list(source.rows.take(count + 1))
    if len(first) <= count:
        raise InputError(
            f"--validation_samples {count}: the stream has {len(first)} rows, and none is left to train on"
        )
    rows = datasets.Dataset.from_list(first[:count], features=source.rows.features)
    held_out = replace(source, rows=rows, is_streaming=False, weight=float(count), row_numbers=np.arange(count))
    return replace(source, rows=source.rows.skip(count)), held_out


def group_rows(source: Source) -> np.ndarray:
    """The group of each row, int64 (rows,): equal for rows with the same original image.

    Files are told apart by their paths, images in the table by their sizes and last bytes. The images of one prompt of
    the original's generated dataset, which are in one folder, are one group.
    """
    rows = source.rows
    images = rows.data.column(source.columns.original)
    if pa.types.is_struct(images.type):
        keys = [key for chunk in images.chunks for key in _keys_of(chunk)]
    else:  # lists of none or several images, which are bad rows
        keys = list(range(len(images)))
    if rows._indices is not None:
        keys = [keys[index] for index in rows._indices.column(0).to_pylist()]
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _keys_of(images: pa.Array) -> list[object]:
    contents, paths = pc.struct_field(images, "bytes"), pc.struct_field(images, "path").to_pylist()
    sizes = pc.binary_length(contents).to_pylist()
    ends = pc.binary_slice(contents.cast(pa.large_binary()), -TAIL).to_pylist()
    return [_place(path) if size is None else (size, end) for size, end, path in zip(sizes, ends, paths, strict=True)]


def _place(path: str | None) -> str | None:
    name = PurePath(path).name if path else ""
    return str(PurePath(path).parent) if re.fullmatch(IMAGE_NAME, name) else path


def _choose_rows(groups: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows of random whole groups, `size` or fewer, of the smallest group if all are larger; none of a single group."""
    counts = np.bincount(groups)
    if len(counts) < 2:
        return np.empty(0, dtype=np.int64)
    chosen, total = [], 0
    for group in random_order(seed, len(counts)):
        if total + counts[group] <= size and len(chosen) < len(counts) - 1:
            chosen.append(group)
            total += counts[group]
    return np.flatnonzero(np.isin(groups, chosen or [int(np.argmin(counts))]))
