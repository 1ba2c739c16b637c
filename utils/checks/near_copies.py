"""Near copies of images: resized, recompressed, brightened or mirrored ones, found by their perceptual hashes.

Similar images have 64-bit perceptual hashes that differ in few bits. If two hashes differ in up to 3 bits, at least one
of their four 16-bit bands is equal; up to 7 bits, one band differs in at most one bit. Comparing only hashes that share
such a band misses no pair and takes about n log n steps.
"""

from collections.abc import Iterator

import numpy as np

from utils.checks.image_measures import perceptual_hash, to_gray
from utils.pixels import BadRow, decode_image

OVERLAP_DISTANCE = 7  # bits; different photographs differ in 18 or more, recompressed ones in 0 to 4
COPY_DISTANCE = 3  # within one dataset, where chains of near copies must not join different images
CANDIDATES_AT_ONCE = 1 << 22
BIT_FLIPS = np.array([0] + [1 << bit for bit in range(16)], dtype=np.uint16)
HASHED_SIDE = 192  # pixels of the shorter side from which an image is hashed; it need not be decoded larger


def hash_both_ways(value: object) -> tuple[int, int]:
    """Perceptual hashes of a stored image and of its mirror image; 0 for one that cannot be read."""
    try:
        gray = to_gray(np.asarray(decode_image(value, shorter_side=HASHED_SIDE)))
    except BadRow:
        return 0, 0
    return perceptual_hash(gray), perceptual_hash(np.ascontiguousarray(gray[:, ::-1]))


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


def group_similar(
    hashes: np.ndarray, mirrored: np.ndarray | None = None, max_distance: int = COPY_DISTANCE
) -> np.ndarray:
    """For each image the first one that is nearly the same, also through a chain of near copies: int64 (n,).

    mirrored: hashes of the mirrored images, to find mirrored copies, too.
    """
    values, groups, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    one, other = near_pairs(values, values, max_distance).T
    if mirrored is not None:
        left, place = near_pairs(values, mirrored, max_distance).T
        one, other = np.concatenate([one, left, inverse[place]]), np.concatenate([other, inverse[place], left])
    is_changed = True
    while is_changed:  # once for each link of the longest chain
        former = groups.copy()
        np.minimum.at(groups, one, former[other])
        is_changed = not np.array_equal(groups, former)
    return np.where(hashes == 0, np.arange(len(hashes)), groups[inverse])
