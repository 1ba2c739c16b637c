"""One rating of editors from pairwise votes, of people or of a judge: the Bradley-Terry model on Elo's scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES, MAX_ITERATIONS, TOLERANCE = 200, 1000, 1e-8
MEAN_RATING, SCALE = 1500.0, 400.0  # of Elo: 400 points are odds of 10 to 1
PRIOR = 0.5  # wins that every editor has over every other one beforehand, so that no rating is infinite


@dataclass(frozen=True)
class Vote:
    """winner: "first", "second" or "tie"; voter: who decided, a person or a judge."""

    first: str
    second: str
    winner: str
    sample: int = 0
    voter: str = "person"


@dataclass(frozen=True)
class Rating:
    """A rating with its 95 % interval, and how many votes the editor was in."""

    name: str
    rating: float
    low: float
    high: float
    num_votes: int


def rate(votes: Sequence[Vote], names: Sequence[str], seed: int = 0) -> list[Rating]:
    """The ratings of all editors, best first. A tie is half a win of each.

    The strengths of Bradley and Terry (1952) by Hunter's iteration (2004, equation 3); the interval is the percentiles
    of 200 resamples of the votes.
    """
    index = {name: position for position, name in enumerate(names)}
    games = np.array([(index[v.first], index[v.second], WINS[v.winner]) for v in votes], dtype=float).reshape(-1, 3)
    ratings = _fit(games, len(names))
    rng = np.random.default_rng(seed)
    resampled = [
        _fit(games[rng.integers(len(games), size=len(games))], len(names)) for _ in range(NUM_RESAMPLES if votes else 1)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    counts = [int(((games[:, 0] == i) | (games[:, 1] == i)).sum()) for i in range(len(names))]
    found = [Rating(n, *map(float, (ratings[i], low[i], high[i])), counts[i]) for n, i in index.items()]
    return sorted(found, key=lambda one: -one.rating)


WINS = {"first": 1.0, "second": 0.0, "tie": 0.5}


def _fit(games: np.ndarray, count: int) -> np.ndarray:
    """Ratings (count,) of games (first, second, share of the win of the first)."""
    wins = np.full((count, count), PRIOR)
    np.fill_diagonal(wins, 0.0)
    for first, second, share in games:
        wins[int(first), int(second)] += share
        wins[int(second), int(first)] += 1 - share
    played, strengths = wins + wins.T, np.ones(count)
    for _ in range(MAX_ITERATIONS):
        sums = strengths[:, None] + strengths[None]
        updated = wins.sum(axis=1) / np.maximum((played / sums).sum(axis=1), 1e-12)
        updated /= np.exp(np.log(np.maximum(updated, 1e-12)).mean())
        if np.abs(np.log(updated) - np.log(strengths)).max() < TOLERANCE:
            break
        strengths = updated
    return MEAN_RATING + SCALE * np.log10(strengths)
