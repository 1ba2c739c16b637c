"""Means with confidence intervals, and the front of a trade-off."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES, CONFIDENCE = 1000, 0.95


class Mean(NamedTuple):
    """A mean with the bounds of its confidence interval, and the number of values; NaN of none."""

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: Iterable[float], seed: int = 0) -> Mean:
    """The mean of the values that are not NaN, with a 95 % interval: percentiles of the means of 1000 resamples."""
    numbers = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=np.float64)
    if not len(numbers):
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    means = numbers[rng.integers(len(numbers), size=(NUM_RESAMPLES, len(numbers)))].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Mean(float(numbers.mean()), float(low), float(high), len(numbers))


def summarize(rows: list[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The mean of each score of rows: {score: {"mean", "low", "high", "count"}}."""
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: bootstrap_mean([row.get(name) for row in rows]) for name in names}
    return {
        name: {"mean": mean.value, "low": mean.low, "high": mean.high, "count": mean.count}
        for name, mean in means.items()
        if mean.count
    }


def find_front(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other one exceeds in both coordinates, by falling first coordinate."""
    order, front, best = sorted(range(len(points)), key=lambda i: points[i], reverse=True), [], -np.inf
    for index in order:
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def area_under_front(points: list[tuple[float, float]]) -> float:
    """The area of all (x, y) >= (0, 0) that some point exceeds in both coordinates; higher is better."""
    area, height = 0.0, 0.0
    for index in find_front([(max(x, 0.0), max(y, 0.0)) for x, y in points]):
        x, y = (max(value, 0.0) for value in points[index])
        area += x * (y - height)
        height = y
    return area
