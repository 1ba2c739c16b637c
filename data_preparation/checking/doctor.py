"""From a dataset to everything that was found in it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_preparation.checking.scan import PairSet, Scan, scan_hashes, scan_pairs
from data_preparation.checking.similarity import (
    SAME_DISTANCE,
    find_exchanged,
    first_equal,
    group_hashes,
    hash_distance,
    near_pairs,
)
from utils.checks.findings import Findings
from utils.data.sources import Source

MAX_TINT = 6.0  # in brightness and colourfulness, between copies


@dataclass
class Diagnosis:
    """What a report is made from. against: the datasets that were compared with, and their numbers of rows."""

    pairs: PairSet
    source: Source
    records: np.ndarray
    findings: Findings
    tasks: Counter
    num_sources: int
    against: dict[str, int]
    seconds: float

    @property
    def num_rows(self) -> int:
        return len(self.records)


def examine(
    pairs: PairSet, against: list[PairSet] | None = None, num_workers: int = 0, tokenizer: str | None = None
) -> Diagnosis:
    """Check every row by itself, against the others, and against the pictures of other datasets."""
    started = time.monotonic()
    source = pairs.open()
    others = [(other, other.open()) for other in against or []]  # a mistake in their names is told at once
    scan = scan_pairs(pairs, len(source.rows), num_workers, tokenizer)
    num_sources = compare_rows(scan, source)
    for other, opened in others:
        hashes = scan_hashes(other, len(opened.rows), num_workers)
        find_overlap(scan, hashes, f"{other.dataset}, {opened.name}")
    names = {other.dataset: len(opened.rows) for other, opened in others}
    seconds = time.monotonic() - started
    return Diagnosis(pairs, source, scan.records, scan.findings, scan.tasks, num_sources, names, seconds)


def compare_rows(scan: Scan, source: Source) -> int:
    """Add what shows only between rows; returns the number of different originals."""
    records, findings = scan.records, scan.findings
    original, edited = records["original"], records["edited"]
    readable = np.flatnonzero((original["height"] > 0) & (edited["height"] > 0) & (records["prompt"] != 0))
    original, edited, prompts = original[readable], edited[readable], records["prompt"][readable]
    groups = group_hashes(original["hash"])
    groups = groups[first_equal(original["pixels"])]  # pictures without contrast have no hash
    same = first_equal(original["pixels"], prompts, edited["pixels"])
    near = first_equal(groups, prompts)
    for place, row in enumerate(readable):
        first = same[place]
        if first != place:
            findings.add("duplicate", int(row), f"as {source.row_name(readable[first])}")
        elif near[place] != place and all(_is_near(side, near[place], place) for side in (original, edited)):
            findings.add("near_duplicate", int(row), f"as {source.row_name(readable[near[place]])}")
        if groups[place] != place:
            findings.add("same_source", int(row), f"as {source.row_name(readable[groups[place]])}")
    swapped = set(findings.rows.get("swapped", ()))
    identical = set(findings.rows.get("identical", ()))
    for place, other in sorted(find_exchanged(original["pixels"], prompts, edited["pixels"]).items()):
        row, partner = int(readable[place]), int(readable[other])
        if not {row, partner} & swapped and row not in identical:  # else it is known which of the two is wrong
            findings.add("exchanged", row, f"as {source.row_name(partner)}, the other way round")
    return len(np.unique(groups))


def _is_near(pictures: np.ndarray, one: int, other: int) -> bool:
    """Whether two pictures are copies; a hash alone does not tell a photograph from its night."""
    first, second = pictures[one], pictures[other]
    is_alike = first["hash"] != 0 and hash_distance(first["hash"], second["hash"]) <= SAME_DISTANCE
    return is_alike and all(abs(first[name] - second[name]) <= MAX_TINT for name in ("brightness", "colourfulness"))


def find_overlap(scan: Scan, hashes: np.ndarray, name: str) -> None:
    """Add a finding for each row of which either picture is one of `hashes` (rows, 2, 2), also as its mirror image."""
    flat = hashes.reshape(-1)
    rows: dict[int, str] = {}
    for what in ("original", "edited"):
        for row, place in near_pairs(scan.records[what]["hash"], flat):
            other, (side, mirrored) = place // 4, divmod(place % 4, 2)
            label = f"{what} image: as the {('original', 'edited')[side]} image of {name}[{other}]"
            rows.setdefault(int(row), label + (", mirrored" if mirrored else ""))
    for row in sorted(rows):
        scan.findings.add("overlap", row, rows[row])
