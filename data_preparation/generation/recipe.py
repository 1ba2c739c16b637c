"""What a generator is: a function from a batch of items to a batch of rows, and how many items there are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol

import datasets


class Made(NamedTuple):
    """The rows of some items in order, and how many items gave none, by reason."""

    rows: list[dict]
    rejected: dict[str, int] = {}


Maker = Callable[[range], Made]


class Recipe(Protocol):
    """Plain, picklable values, from which every worker builds the same maker.

    num_items: rows to draw, captions, photographs ...; numbered from 0. What the maker returns for some items depends
    on the recipe and on their numbers alone: randomness comes from generators keyed by (seed, number). An item that
    cannot be used is counted in `Made.rejected`; what no item can do without (a server, a model) raises InputError.
    """

    num_items: int

    def features(self) -> datasets.Features:
        """Columns of the rows."""

    def open(self, rank: int) -> Maker:
        """Load models and open inputs. rank: number of the worker from 0, by which several GPUs are shared out."""


def open_recipe(recipe: Recipe, rank: int) -> Maker:
    """`recipe.open`, with one thread for arithmetic: the number of threads would decide the last bits of a row."""
    make = recipe.open(rank)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return make
