"""Which rows go to train, validation and test: all rows of one source image to one side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_preparation.exporting.reading import Pairs
from utils.errors import InputError

SPLITS = ("train", "validation", "test")
LEFT_OUT = -1
HELD_OUT = "heldout"


class Keys(NamedTuple):
    """Of every row: sources, 16 bytes that name its source image; is_held_out: bool (rows,), whether its phrasing must
    not be trained on. digest: hex, changes with the texts of the input and with the bytes that were looked at.

    origins: rows by (source_dataset, source_license); models: rows by the text of their `models`.
    """

    sources: list[bytes]
    is_held_out: np.ndarray
    digest: str
    origins: Counter
    models: Counter


def read_keys(pairs: Pairs) -> Keys:
    """One pass over the text columns; the bytes of originals are read only where a row names no source."""
    names = [name for name in pairs.features if name not in ("original_image", "edited_image")]
    digest, sources, held_out, origins, models = hashlib.sha256(), [], [], Counter(), Counter()
    digest.update(repr((pairs.rows_of.tolist(), pairs.bytes_of.tolist(), str(pairs.features))).encode())
    for chunk, count in enumerate(pairs.rows_of):
        columns = pairs.read(chunk, names).to_pydict()
        digest.update(repr(columns).encode())
        absent = [None] * count
        datasets_of = columns.get("source_dataset") or absent
        found = [
            _digest(f"{dataset}\0{name}".encode()) if name else None
            for dataset, name in zip(datasets_of, columns.get("source") or absent, strict=True)
        ]
        if None in found:
            originals = pairs.read(chunk, ["original_image"])["original_image"].to_pylist()
            found = [key or _digest(_bytes(image)) for key, image in zip(found, originals, strict=True)]
        digest.update(b"".join(found))
        sources += found
        held_out += [phrasing == HELD_OUT for phrasing in columns.get("phrasing") or absent]
        origins.update(zip(datasets_of, columns.get("source_license") or absent, strict=True))
        models.update(text for text in columns.get("models") or absent if text)
    return Keys(sources, np.array(held_out, dtype=bool), digest.hexdigest()[:32], origins, models)


def assign(keys: Keys, fractions: Sequence[float], seed: int) -> np.ndarray:
    """(rows,) int8: the split of each row by its number in SPLITS, or LEFT_OUT.

    Sources stand in the order of a keyed hash, those with held-out phrasings first; test takes from the front until it
    has its share of the rows, then validation, and train gets the rest. So shares are met to within one source, and
    sources that come later move few of the others. A held-out phrasing of a training source is left out: in train it
    would be learned, in test its photograph would be known.
    """
    rows_of: dict[bytes, int] = {}
    asks: set[bytes] = set()
    for key, is_held_out in zip(keys.sources, keys.is_held_out, strict=True):
        rows_of[key] = rows_of.get(key, 0) + 1
        if is_held_out:
            asks.add(key)
    order = sorted(rows_of, key=lambda key: (key not in asks, _digest(seed.to_bytes(8, "little") + key)))
    wanted = [fraction > 0 for fraction in fractions]
    if len(order) < sum(wanted):
        raise InputError(
            f"--split {','.join(f'{100 * fraction:g}' for fraction in fractions)}: {sum(wanted)} splits need as many "
            f"source images, and there {'is' if len(order) == 1 else 'are'} {len(order)}: give --split 100,0,0"
        )
    side = _take(order, rows_of, fractions)
    splits = np.array([side[key] for key in keys.sources], dtype=np.int8)
    splits[keys.is_held_out & (splits == SPLITS.index("train"))] = LEFT_OUT
    if fractions[0] and not (splits == SPLITS.index("train")).any():
        raise InputError("no row is left to train on: all rows of the training sources are held-out phrasings")
    return splits


def _take(order: list[bytes], rows_of: dict[bytes, int], fractions: Sequence[float]) -> dict[bytes, int]:
    """The split of each source: shares of the rows, at least one source for each split that is wanted."""
    total, side, start = sum(rows_of.values()), {}, 0
    for split in (2, 1):
        after = sum(fraction > 0 for fraction in fractions[:split])  # splits that still need a source
        taken = 0
        while fractions[split] and start < len(order) - after:
            size = rows_of[order[start]]
            # A source goes to the side to which it is nearer.
            if taken and taken + size / 2 > fractions[split] * total:
                break
            side[order[start]], taken, start = split, taken + size, start + 1
    rest = 0 if fractions[0] else 1 if fractions[1] else 2
    return {**dict.fromkeys(order, rest), **side}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _bytes(image: dict | bytes | None) -> bytes:
    return image if isinstance(image, bytes) else (image or {}).get("bytes") or b""
