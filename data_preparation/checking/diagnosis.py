"""Diagnose a dataset: inspect each row, then compare rows with each other and with the images of other datasets."""

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_preparation.checking.scan import DatasetToCheck, scan_hashes, scan_rows
from utils.checks.findings import Findings
from utils.checks.near_copies import COPY_DISTANCE, group_similar, hash_distance, near_pairs
from utils.data.sources import Source

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
    records, findings, tasks = scan_rows(dataset, source, num_workers, tokenizer)
    num_originals = compare_rows(records, findings, source)
    for other, opened in others:
        hashes = scan_hashes(other, opened, num_workers)
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
