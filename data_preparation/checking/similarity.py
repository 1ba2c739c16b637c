"""Rows against one another: copies, pairs the other way round, near copies, pictures of another dataset.

Near copies are pictures whose 64-bit hashes differ in few bits. Of four bands of 16 bits one is then equal (up to 3
bits) or differs in one (up to 7 = 4 * 1 + 3), so comparing the pictures that share a band, or all but one bit of it,
misses none and takes about n log n steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_DISTANCE = 7  # bits; different photographs differ in 18 and more, a recompressed one in 0 to 4
SAME_DISTANCE = 3  # within one dataset: chains of near ones must not join what differs
CHUNK = 1 << 22  # candidates that are compared at once
FLIPS = np.array([0] + [1 << bit for bit in range(16)], dtype=np.uint16)


def hash_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes differ."""
    return np.bitwise_count(np.asarray(one, np.uint64) ^ np.asarray(other, np.uint64))


def near_pairs(hashes: np.ndarray, others: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """All (index in hashes, index in others) at most `max_distance` (7 or less) apart, (n, 2), without repeats.

    A hash of 0 (a picture without contrast) is like nothing.
    """
    if not len(hashes) or not len(others):
        return np.empty((0, 2), np.int64)
    found = [np.empty(0, np.int64)]
    for left, right in _candidates(hashes, others, FLIPS if max_distance > 3 else FLIPS[:1]):
        is_near = (hash_distance(hashes[left], others[right]) <= max_distance) & (hashes[left] != 0)
        is_near &= others[right] != 0
        found.append(left[is_near] * np.int64(len(others)) + right[is_near])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), len(others)), axis=1)


def _candidates(hashes: np.ndarray, others: np.ndarray, flips: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index arrays of hashes that share a band but for one bit, at most about `CHUNK` at once."""
    for band in range(4):
        mine = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.uint16)
        theirs = ((others >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.uint16)
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        for flip in flips:
            wanted = mine ^ flip
            starts = np.searchsorted(theirs, wanted, "left")
            counts = np.searchsorted(theirs, wanted, "right") - starts
            ends = np.cumsum(counts)
            for first, last in _slices(ends):
                counted = counts[first:last]
                left = np.repeat(np.arange(first, last), counted)
                offset = np.arange(len(left)) - np.repeat(np.cumsum(counted) - counted, counted)
                yield left, order[np.repeat(starts[first:last], counted) + offset]


def _slices(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of about `CHUNK` candidates; `ends` is their running sum."""
    first = 0
    while first < len(ends):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + CHUNK, "right")))
        yield first, last
        first = last


def group_hashes(hashes: np.ndarray, max_distance: int = SAME_DISTANCE) -> np.ndarray:
    """For each row the first row whose picture is nearly the same, through any chain of near ones, int64 (n,)."""
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    parents = np.arange(len(values))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for one, other in near_pairs(values, values, max_distance):
        if one < other and (one := root(one)) != (other := root(other)):
            keep, lose = (one, other) if first[one] < first[other] else (other, one)
            parents[lose] = keep
    roots = np.array([root(index) for index in range(len(values))], dtype=np.int64)
    groups = first[roots][inverse].astype(np.int64)
    return np.where(hashes == 0, np.arange(len(hashes)), groups)


def first_equal(*columns: np.ndarray) -> np.ndarray:
    """For each row the first row that is equal in all columns (itself, where none is), int64 (n,)."""
    table = np.stack([column.astype(np.uint64) for column in columns], axis=1)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def find_exchanged(originals: np.ndarray, prompts: np.ndarray, editeds: np.ndarray) -> dict[int, int]:
    """Rows that occur again with the two pictures exchanged and the same instruction: row -> the other row."""
    places = {key: row for row, key in reversed(list(enumerate(zip(originals, prompts, editeds, strict=True))))}
    mirrored = zip(editeds, prompts, originals, strict=True)
    found = ((row, places.get(key)) for row, key in enumerate(mirrored))
    return {row: other for row, other in found if other is not None and originals[row] != editeds[row]}
