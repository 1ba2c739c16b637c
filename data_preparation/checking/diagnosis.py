"""Diagnose a dataset: inspect each row, then compare rows with each other and with the images of other datasets.

Similar images have 64-bit perceptual hashes that differ in few bits. If two hashes differ in up to 3 bits, at least one
of their four 16-bit bands is equal; up to 7 bits, one band differs in at most one bit. Comparing only hashes that share
such a band misses no pair and takes about n log n steps.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_preparation.checking.scan import DatasetToCheck, scan_hashes, scan_rows
from utils.checks.findings import Findings
from utils.data.sources import Source

OVERLAP_DISTANCE = 7  # bits; different photographs differ in 18 or more, recompressed ones in 0 to 4
COPY_DISTANCE = 3  # within one dataset, where chains of near copies must not join different images
CANDIDATES_AT_ONCE = 1 << 22
BIT_FLIPS = np.array([0] + [1 << bit for bit in range(16)], dtype=np.uint16)
MAX_TINT = 6.0  # difference in brightness and colourfulness between copies


@dataclass
class Diagnosis:
    """Everything a report shows. records: `ROW_RECORD` (rows,); compared_with: rows of each other dataset."""

    dataset: DatasetToCheck
    source: Source
    records: np.ndarray
    findings: Findings
    tasks: Counter
    num_originals: int
    compared_with: dict[str, int]
    seconds: float


def diagnose(
    dataset: DatasetToCheck, against: list[DatasetToCheck], num_workers: int = 0, tokenizer: str | None = None
) -> Diagnosis:
    """Check every row by itself, against the other rows, and against the images of other datasets."""
    started = time.monotonic()
    source = dataset.open()
    others = [(other, other.open()) for other in against]  # before the scan, so that a wrong name fails at once
    records, findings, tasks = scan_rows(dataset, len(source.rows), num_workers, tokenizer)
    num_originals = compare_rows(records, findings, source)
    for other, opened in others:
        hashes = scan_hashes(other, len(opened.rows), num_workers)
        find_overlap(records, findings, hashes, f"{other.dataset_name}, {opened.name}")
    compared_with = {other.dataset_name: len(opened.rows) for other, opened in others}
    seconds = time.monotonic() - started
    return Diagnosis(dataset, source, records, findings, tasks, num_originals, compared_with, seconds)


def compare_rows(records: np.ndarray, findings: Findings, source: Source) -> int:
    """Add the findings that need two rows. Returns the number of different originals."""
    original, edited = records["original"], records["edited"]
    readable = np.flatnonzero((original["height"] > 0) & (edited["height"] > 0) & (records["prompt"] != 0))
    original, edited, prompts = original[readable], edited[readable], records["prompt"][readable]
    groups = group_similar(original["hash"])
    groups = groups[first_equal(original["pixels"])]  # images without contrast have no hash
    same = first_equal(original["pixels"], prompts, edited["pixels"])
    near = first_equal(groups, prompts)
    for place, row in enumerate(readable):
        first = same[place]
        if first != place:
            findings.add("duplicate", int(row), f"as {source.row_name(readable[first])}")
        elif near[place] != place and all(_is_copy(side, near[place], place) for side in (original, edited)):
            findings.add("near_duplicate", int(row), f"as {source.row_name(readable[near[place]])}")
        if groups[place] != place:
            findings.add("same_source", int(row), f"as {source.row_name(readable[groups[place]])}")
    swapped = set(findings.rows.get("swapped", ()))
    identical = set(findings.rows.get("identical", ()))
    for place, other in sorted(find_exchanged(original["pixels"], prompts, edited["pixels"]).items()):
        row, partner = int(readable[place]), int(readable[other])
        # If one of the two was found swapped, it is the wrong one and the other is correct.
        if not {row, partner} & swapped and row not in identical:
            findings.add("exchanged", row, f"as {source.row_name(partner)}, the other way round")
    return len(np.unique(groups))


def _is_copy(images: np.ndarray, one: int, other: int) -> bool:
    """Whether two images are copies; the hash alone does not distinguish day from night."""
    first, second = images[one], images[other]
    is_similar = first["hash"] != 0 and hash_distance(first["hash"], second["hash"]) <= COPY_DISTANCE
    return is_similar and all(abs(first[name] - second[name]) <= MAX_TINT for name in ("brightness", "colourfulness"))


def find_overlap(records: np.ndarray, findings: Findings, hashes: np.ndarray, name: str) -> None:
    """Add a finding for each row with an image that is in another dataset, also mirrored.

    hashes: of that dataset, from `scan_hashes`; name: of that dataset in messages.
    """
    flat = hashes.reshape(-1)
    rows: dict[int, str] = {}
    for side in ("original", "edited"):
        for row, place in near_pairs(records[side]["hash"], flat):
            other, (other_side, mirrored) = place // 4, divmod(place % 4, 2)
            label = f"{side} image: as the {('original', 'edited')[other_side]} image of {name}[{other}]"
            rows.setdefault(int(row), label + (", mirrored" if mirrored else ""))
    for row in sorted(rows):
        findings.add("overlap", row, rows[row])


def hash_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes differ."""
    return np.bitwise_count(np.asarray(one, np.uint64) ^ np.asarray(other, np.uint64))


def near_pairs(hashes: np.ndarray, others: np.ndarray, max_distance: int = OVERLAP_DISTANCE) -> np.ndarray:
    """All (index in hashes, index in others) at most `max_distance` (7 or less) bits apart: int64 (n, 2), sorted.

    A hash of 0 (an image without contrast) is near nothing.
    """
    if not len(hashes) or not len(others):
        return np.empty((0, 2), np.int64)
    found = [np.empty(0, np.int64)]
    for left, right in _candidates(hashes, others, BIT_FLIPS if max_distance > 3 else BIT_FLIPS[:1]):
        is_near = (hash_distance(hashes[left], others[right]) <= max_distance) & (hashes[left] != 0)
        is_near &= others[right] != 0
        found.append(left[is_near] * np.int64(len(others)) + right[is_near])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), len(others)), axis=1)


def _candidates(hashes: np.ndarray, others: np.ndarray, flips: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index arrays of hashes with a band that is equal after a flip, about `CANDIDATES_AT_ONCE` at a time."""
    for band in range(4):
        mine = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.uint16)
        theirs = ((others >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.uint16)
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        for flip in flips:
            flipped = mine ^ flip
            starts = np.searchsorted(theirs, flipped, "left")
            counts = np.searchsorted(theirs, flipped, "right") - starts
            ends = np.cumsum(counts)
            cuts = np.searchsorted(ends, np.arange(CANDIDATES_AT_ONCE, ends[-1], CANDIDATES_AT_ONCE), "right")
            for rows in np.split(np.arange(len(counts)), np.unique(cuts)):
                left = np.repeat(rows, counts[rows])
                offset = np.arange(len(left)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
                yield left, order[np.repeat(starts[rows], counts[rows]) + offset]


def group_similar(hashes: np.ndarray) -> np.ndarray:
    """For each image the first one that is nearly the same, also through a chain of near copies: int64 (n,)."""
    values, groups, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    one, other = near_pairs(values, values, COPY_DISTANCE).T
    is_changed = True
    while is_changed:  # once for each link of the longest chain
        former = groups.copy()
        np.minimum.at(groups, one, former[other])
        is_changed = not np.array_equal(groups, former)
    return np.where(hashes == 0, np.arange(len(hashes)), groups[inverse])


def first_equal(*columns: np.ndarray) -> np.ndarray:
    """For each row the first row that is equal in all columns, possibly itself: int64 (n,)."""
    table = np.stack([column.astype(np.uint64) for column in columns], axis=1)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def find_exchanged(originals: np.ndarray, prompts: np.ndarray, editeds: np.ndarray) -> dict[int, int]:
    """Rows that occur again with the images exchanged and the same instruction: row -> the other row."""
    rows = {key: row for row, key in reversed(list(enumerate(zip(originals, prompts, editeds, strict=True))))}
    exchanged = enumerate(zip(editeds, prompts, originals, strict=True))
    found = {row: rows[key] for row, key in exchanged if key in rows}
    return {row: other for row, other in found.items() if originals[row] != editeds[row]}
