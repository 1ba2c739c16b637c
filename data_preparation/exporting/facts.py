"""What the card tells of an export, counted in its files: tasks, scores, models, settings, sizes of pictures."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.exporting.splitting import SPLITS

EXAMPLES = 3  # instructions shown of each task
MAX_CHOICES = 6  # values listed of a setting that is no number
UNNAMED_TASK = "unnamed"
SIZED_ROWS = 200  # whose pictures are measured


@dataclass
class Range:
    """Values that a setting took: low and high of its numbers, and the first of its other values."""

    low: float = np.inf
    high: float = -np.inf
    values: list[str] = field(default_factory=list)

    def add(self, value: object) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.low, self.high = min(self.low, value), max(self.high, value)
        elif isinstance(value, (str, bool)) and str(value) not in self.values and len(self.values) <= MAX_CHOICES:
            self.values.append(str(value))


@dataclass
class Facts:
    """rows: by (task, split). scores: name -> float64 of the rows that have it. settings: task -> name -> Range.

    sides: (n, 2) int, height and width of measured originals. places: of rows for the picture, by task.
    """

    rows: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    held_out: Counter = field(default_factory=Counter)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    models: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    settings: dict[str, dict[str, Range]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    has_captions: bool = False
    sides: np.ndarray | None = None

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.rows})


def gather(folder: Path) -> Facts:
    """Read the text columns of every file in `folder`."""
    facts, scores, seeds = Facts(), {}, set()
    for split in SPLITS:
        for _, _, columns in text_groups(folder, split):
            _count(facts, columns, split)
            _add_scores(scores, columns)
            seeds.update(columns.get("seed") or ())
            facts.has_captions |= any(columns.get("edited_prompt") or ())
    facts.scores = {name: np.array(values) for name, values in sorted(scores.items())}
    facts.seeds = sorted(seed for seed in seeds if seed is not None)
    facts.sides = _measure(folder)
    return facts


def text_groups(folder: Path, split: str) -> Iterator[tuple[Path, int, dict[str, list]]]:
    """(file, row group, its columns without the images) of a split, in order."""
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name not in ("original_image", "edited_image")]
        for group in range(file.num_row_groups):
            yield path, group, file.read_row_group(group, names).to_pydict()


def first_text(prompt: str | list | None) -> str:
    """An instruction; the first, where a row has several."""
    return (prompt[0] if prompt else "") if isinstance(prompt, list) else prompt or ""


def parse(text: str | None) -> object:
    """The value of a column of JSON text; None where it is no JSON."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _count(facts: Facts, columns: dict[str, list], split: str) -> None:
    absent = [None] * len(columns["edit_prompt"])

    def of(name: str) -> list:
        return columns.get(name) or absent

    for prompt, task, phrasing, models, settings in zip(
        columns["edit_prompt"], of("task"), of("phrasing"), of("models"), of("settings"), strict=True
    ):
        task = task or UNNAMED_TASK
        facts.rows[task, split] += 1
        facts.held_out[split] += phrasing == "heldout"
        shown, text = facts.examples.setdefault(task, []), first_text(prompt)
        if text and len(shown) < EXAMPLES and text not in shown:
            shown.append(text)
        for entry in parse(models) or ():
            if isinstance(entry, dict):
                facts.models[str(entry.get("id")), entry.get("revision") or ""] += 1
        drawn = parse(settings)
        for name, value in (_flat(drawn) if isinstance(drawn, dict) else {}).items():
            facts.settings.setdefault(task, {}).setdefault(name, Range()).add(value)
    facts.sources.update(zip(of("source_dataset"), of("source_license"), strict=True))


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    """Settings within settings under dotted names; of a list, each value counts."""
    flat: dict[str, object] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat


def _add_scores(scores: dict[str, list[float]], columns: dict[str, list]) -> None:
    for text in columns.get("scores") or ():
        for name, value in (parse(text) or {}).items():
            if isinstance(value, (int, float)) and np.isfinite(value):
                scores.setdefault(name, []).append(float(value))


def _measure(folder: Path) -> np.ndarray:
    """(n, 2) int: height, width of originals, of a few rows out of every part of the set; headers only."""
    from PIL import Image

    groups = [
        (path, i) for path in sorted(folder.glob("*.parquet")) for i in range(pq.read_metadata(path).num_row_groups)
    ]
    chosen = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, min(20, len(groups))).astype(int))]
    sides = []
    for path, group in chosen:
        images = pq.ParquetFile(path).read_row_group(group, ["original_image"])["original_image"]
        for image in images.slice(0, SIZED_ROWS // len(chosen)).to_pylist():
            try:
                with Image.open(io.BytesIO(image["bytes"])) as opened:
                    sides.append(opened.size[::-1])
            except (OSError, TypeError, ValueError, pa.ArrowException):
                continue
    return np.array(sides, dtype=int).reshape(-1, 2)
