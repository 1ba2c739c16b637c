"""From what the parameters of a degradation are drawn: tables that code, tests and docs share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DIGITS = 4  # parameters are rounded before they are used: what a row stores is what was done to it


class Range(NamedTuple):
    """A number between two bounds (both can be drawn), evenly or, where `is_log`, evenly in its logarithm."""

    low: float
    high: float
    meaning: str
    is_log: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        if self.is_log:
            value = np.exp(rng.uniform(np.log(self.low), np.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return min(max(round(float(value), DIGITS), self.low), self.high)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


class Whole(NamedTuple):
    """A whole number, both bounds included."""

    low: int
    high: int
    meaning: str

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))

    def holds(self, value: int) -> bool:
        return isinstance(value, int) and self.low <= value <= self.high


class Choice(NamedTuple):
    """One of several names, with a probability each."""

    options: dict[str, float]
    meaning: str

    def draw(self, rng: np.random.Generator) -> str:
        return str(rng.choice(list(self.options), p=list(self.options.values())))

    def holds(self, value: str) -> bool:
        return value in self.options


Ranges = dict[str, Range | Whole | Choice]


def draw(ranges: Ranges, rng: np.random.Generator, *names: str) -> dict:
    """One value of each of the named ranges (default: of all), in the order of the table."""
    return {name: entry.draw(rng) for name, entry in ranges.items() if not names or name in names}


def show_ranges(table: dict[str, Ranges]) -> str:
    """A Markdown table of all tasks' parameters."""
    lines = ["| Task | Parameter | Drawn from | What it is |", "|---|---|---|---|"]
    for task, ranges in table.items():
        for name, entry in ranges.items():
            if isinstance(entry, Choice):
                span = ", ".join(f"{option} ({share:.0%})" for option, share in entry.options.items())
            else:
                span = f"{entry.low:g} to {entry.high:g}" + (", logarithmic" if getattr(entry, "is_log", False) else "")
            lines.append(f"| {task} | {name} | {span} | {entry.meaning} |")
    return "\n".join(lines)
