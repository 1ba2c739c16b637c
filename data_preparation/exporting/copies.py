"""Source images that are near copies of each other, which must not be in two splits."""

import sys
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from data_preparation.exporting.export_shards import RowKeys
from data_preparation.exporting.reading import ExportInput
from data_preparation.generation.processes import run_in_processes
from utils.checks.near_copies import OVERLAP_DISTANCE, group_similar, hash_both_ways


def join_copies(rows: ExportInput, keys: RowKeys, num_workers: int) -> RowKeys:
    """The keys, in which near copies of an image (resized, recompressed, mirrored) are one source.

    One row of each source is looked at. num_workers: 0 for this process.
    """
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys.sources):
        first.setdefault(key, row)
    hashes = _hash_originals(rows, np.array(list(first.values()), dtype=np.int64), num_workers)
    names = list(first)
    groups = group_similar(hashes[:, 0], hashes[:, 1], OVERLAP_DISTANCE)
    # The smallest key of a group, so that the name does not depend on the order of the rows.
    name_of_group: dict[int, bytes] = {}
    for name, group in zip(names, groups.tolist(), strict=True):
        name_of_group[group] = min(name, name_of_group.get(group, name))
    joined = {name: name_of_group[group] for name, group in zip(names, groups.tolist(), strict=True)}
    if copies := len(joined) - len(name_of_group):
        print(f"{copies} source images are near copies of others, and go to the same split", file=sys.stderr)
    return keys._replace(sources=[joined[key] for key in keys.sources])


def _hash_originals(rows: ExportInput, numbers: np.ndarray, num_workers: int) -> np.ndarray:
    """Hashes of the original images of some rows: uint64 (n, as stored and mirrored). numbers: ascending."""
    starts = np.concatenate([[0], np.cumsum(rows.rows_of)])
    chunks = np.searchsorted(starts, numbers, side="right") - 1
    jobs = {int(chunk): (numbers[chunks == chunk] - starts[chunk]).tolist() for chunk in np.unique(chunks)}
    found: dict[int, np.ndarray] = {}
    with tqdm(total=len(numbers), desc="compare", unit="image", mininterval=0.5) as bar:
        for chunk, hashes in run_in_processes(partial(_open_hasher, rows), _numbered(jobs), num_workers):
            found[chunk] = hashes
            bar.update(len(hashes))
    return np.concatenate([found[chunk] for chunk in sorted(found)])


def _numbered(jobs: dict[int, list[int]]) -> dict[int, tuple[int, list[int]]]:
    return {chunk: (chunk, indices) for chunk, indices in jobs.items()}


def _open_hasher(rows: ExportInput, rank: int) -> Callable[[tuple[int, list[int]]], np.ndarray]:
    """The function of a worker: (chunk, rows in it) -> their hashes."""
    cv2.setNumThreads(1)

    def hash_rows(job: tuple[int, list[int]]) -> np.ndarray:
        chunk, indices = job
        images = rows.read(chunk, ["original_image"])["original_image"].take(indices).to_pylist()
        return np.array([hash_both_ways(image) for image in images], np.uint64)

    return hash_rows
