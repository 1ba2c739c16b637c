"""Tables of scores: measured rows with confidence intervals, and published ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.judge import Judge
from evaluation.samples import Edit, Sample
from evaluation.scoring import Scorer
from evaluation.statistics import summarize
from utils.atomic_files import write_atomically

HIGHER, LOWER = "↑", "↓"
LOWER_IS_BETTER = ("l1", "l2", "cmmd")
MAX_COLUMNS = 10


@dataclass(frozen=True)
class TableRow:
    """scores: {score: {"mean", "low", "high", "count"}}; samples: the scores of each sample."""

    name: str
    scores: dict[str, dict[str, float]]
    samples: list[dict]

    @classmethod
    def measure(
        cls, name: str, scorer: Scorer, samples: list[Sample], edits: Sequence[Edit], judge: Judge | None = None
    ) -> TableRow:
        """Score one edit of each sample."""
        rows, discrepancy = scorer.score(samples, edits)
        if judge:
            rows = [row | marks for row, marks in zip(rows, judge.mark(samples, edits), strict=True)]
        scores = summarize(rows)
        if discrepancy is not None:
            scores["cmmd"] = {"mean": discrepancy, "low": discrepancy, "high": discrepancy, "count": len(samples)}
        return cls(name, scores, [{"row": sample.number} | row for sample, row in zip(samples, rows, strict=True)])


def read_published(benchmark: str) -> dict:
    """{"source", "rows"} of the figures that papers give for a benchmark; {} for others."""
    return json.loads(Path(__file__).with_name("published.json").read_text("utf-8")).get(benchmark, {})


def write_results(
    rows: list[TableRow], published: dict, shown: tuple[str, ...] | None, folder: Path, flags: dict
) -> str:
    """Write results.json and results.md; returns the table as Markdown. shown: its scores, None for all."""
    results = {
        "flags": flags,
        "rows": {row.name: row.scores for row in rows},
        "published": published,
        "samples": {row.name: row.samples for row in rows},
    }
    write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    table = draw_table(rows, published, shown)
    write_atomically(folder / "results.md", f"{table}\n".encode())
    return table


def draw_table(rows: list[TableRow], published: dict, shown: tuple[str, ...] | None) -> str:
    """A Markdown table: mean ± half of the 95 % interval; an arrow tells which direction is better."""
    names = list(shown or [name for name in rows[-1].scores if not name.startswith("source")])
    names = names[:MAX_COLUMNS] + [name for name in names[MAX_COLUMNS:] if name.startswith("judge")]
    names = [name for name in names if any(name in row.scores for row in rows)]
    heads = [f"{name} {LOWER if name.rpartition('_')[2] in LOWER_IS_BETTER else HIGHER}" for name in names]
    lines = [f"| {' | '.join(['', *heads])} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join([row.name, *(_cell(row.scores.get(name)) for name in names)])} |")
    for name, scores in published.get("rows", {}).items():
        cells = [f"{scores[score]:.4f}" if score in scores else "" for score in names]
        lines.append(f"| {' | '.join([f'*{name}, published*', *cells])} |")
    counts = sorted({score["count"] for row in rows for score in row.scores.values()})
    notes = [f"{counts[-1]} samples; ± half of the 95 % bootstrap interval."] if counts else []
    if published:
        notes.append(f"Published figures: {published['source']}.")
    return "\n".join([*lines, "", *notes])


def _cell(score: dict[str, float] | None) -> str:
    if score is None:
        return ""
    half = (score["high"] - score["low"]) / 2
    digits = 2 if abs(score["mean"]) >= 10 else 4
    return f"{score['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")
