"""A diagnosis as numbers: histograms, and the JSON report."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from data_preparation.checking.doctor import Diagnosis
from utils.checks.findings import KINDS, SEVERITIES

NO_END = 1 << 31
SIDES = [0, 64, 128, 256, 384, 512, 768, 1024, 2048, NO_END]
TOKENS = [0, 8, 16, 24, 32, 48, 64, 78, NO_END]
BRIGHTNESS = list(range(0, 257, 16))
COLOURS = [0, 2, 10, 20, 30, 40, 50, 60, 80, 100, NO_END]
MAX_TASKS = 24


class Histogram(NamedTuple):
    """labels: one for each bin; series: counts of each bin, by name."""

    title: str
    labels: list[str]
    series: dict[str, list[int]]


def make_histograms(diagnosis: Diagnosis) -> dict[str, Histogram]:
    """Sizes, brightness, colour and lengths of instructions, and the rows of each task."""
    records = diagnosis.records
    found: dict[str, Histogram] = {}
    pictures = {name: records[name][records[name]["height"] > 0] for name in ("original", "edited")}
    measures = {
        "longer_side": ("Longer side in pixels", SIDES, lambda p: np.maximum(p["height"], p["width"])),
        "brightness": ("Brightness (mean luminance, 0 to 255)", BRIGHTNESS, lambda p: p["brightness"]),
        "colourfulness": ("Colourfulness (0 is grey, 30 a photograph)", COLOURS, lambda p: p["colourfulness"]),
    }
    for name, (title, edges, measure) in measures.items():
        counts = {what: _count(measure(values), edges) for what, values in pictures.items()}
        found[name] = Histogram(title, _labels(edges), counts)
    tokens = records["tokens"][records["tokens"] > 0]
    found["tokens"] = Histogram("Tokens of the instruction", _labels(TOKENS), {"rows": _count(tokens, TOKENS)})
    tasks = diagnosis.tasks.most_common(MAX_TASKS)
    if len(diagnosis.tasks) > MAX_TASKS:
        tasks.append(("(others)", sum(diagnosis.tasks.values()) - sum(count for _, count in tasks)))
    found["tasks"] = Histogram(
        "Rows of each task", [name or "(not said)" for name, _ in tasks], {"rows": [count for _, count in tasks]}
    )
    return found


def _count(values: np.ndarray, edges: list[int]) -> list[int]:
    return np.histogram(values, bins=np.array(edges, dtype=np.float64))[0].tolist()


def _labels(edges: list[int]) -> list[str]:
    ranges = zip(edges, edges[1:], strict=False)
    return [f"{low}+" if high == NO_END else f"{low}-{high - 1}" for low, high in ranges]


def row_number(diagnosis: Diagnosis, row: int) -> int:
    """The number that a row has in the dataset."""
    numbers = diagnosis.source.row_numbers
    return row if numbers is None else int(numbers[row])


def verdict(diagnosis: Diagnosis) -> str:
    """The worst severity that was found below information, or "fine"."""
    return next((severity for severity in SEVERITIES[:2] if any(diagnosis.findings.kinds(severity))), "fine")


def make_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything for machines: every row number of every finding, and the words on the first thousand."""
    findings, source = diagnosis.findings, diagnosis.source
    return {
        "dataset": diagnosis.pairs.dataset,
        "split": diagnosis.pairs.split,
        "columns": vars(source.columns),
        "rows": diagnosis.num_rows,
        "different_originals": diagnosis.num_sources,
        "compared_with": diagnosis.against,
        "seconds": round(diagnosis.seconds, 1),
        "verdict": verdict(diagnosis),
        "rows_with_errors": findings.num_rows("error"),
        "rows_with_warnings": findings.num_rows("warning"),
        "findings": {
            kind: {
                **KINDS[kind]._asdict(),
                "count": findings.count(kind),
                "rows": [row_number(diagnosis, row) for row in findings.rows[kind]],
                "details": {str(row_number(diagnosis, row)): text for row, text in findings.details[kind].items()},
            }
            for kind in findings.kinds()
        },
        "histograms": {name: histogram._asdict() for name, histogram in make_histograms(diagnosis).items()},
    }
