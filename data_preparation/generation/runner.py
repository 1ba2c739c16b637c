"""The way from a recipe to a whole pair set: shards in any order, by any number of workers, killed at any moment."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from data_preparation.generation.pools import Workers, run_shards
from data_preparation.generation.recipe import Made, Recipe
from data_preparation.generation.shards import Counts, shard_items
from data_preparation.generation.store import Store

__all__ = ["Made", "Recipe", "Summary", "Workers", "produce"]


@dataclass(frozen=True)
class Summary:
    """rows: of the whole set; rejected: items that gave none, by reason; seconds: of this run."""

    rows: int
    rejected: Counter = field(default_factory=Counter)
    was_complete: bool = False
    seconds: float = 0.0

    def describe(self, data_root: Path, unit: str = "pair") -> str:
        """The lines that a script ends with."""
        kind = f"{unit}s"
        lines = [f"{data_root} holds {self.rows:,} {kind}" + (", made before" if self.was_complete else "")]
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in self.rejected.most_common()]
        return "\n".join(lines)


def produce(
    recipe: Recipe,
    data_root: Path,
    settings: dict[str, Any],
    *,
    items_per_shard: int | None = None,
    max_rows: int | None = None,
    workers: Workers | None = None,
    unit: str = "pair",
    overwrite: bool = False,
    note: Callable[[], str] | None = None,
) -> Summary:
    """Make every shard that is not there yet, then the set.

    settings: what decides the rows, as JSON; a folder with others is refused. max_rows: rows that are wanted, where
    items may give none or several: no more shards are made than needed, and the last one is cut. note: what else the
    progress bar says, such as the cost so far. items_per_shard: default a 32nd of them, 4 to 100. Raises InputError.
    """
    started = time.monotonic()
    items_per_shard = items_per_shard or min(max(recipe.num_items // 32, 4), 100)
    plan = {"items": recipe.num_items, "items_per_shard": items_per_shard, "max_rows": max_rows}
    store = Store(data_root, settings | plan, overwrite)
    try:
        if store.is_complete:
            return Summary(*store.counts(), was_complete=True)
        shards = _make_missing(recipe, store, items_per_shard, max_rows, workers or Workers(), unit, note)
        return Summary(*store.finish(shards, max_rows), seconds=time.monotonic() - started)
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on where this one was ({data_root})", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        store.close()


def _make_missing(
    recipe: Recipe,
    store: Store,
    items_per_shard: int,
    max_rows: int | None,
    workers: Workers,
    unit: str,
    note: Callable[[], str] | None,
) -> dict[int, Counts]:
    num_shards = -(-recipe.num_items // items_per_shard)
    shards = store.finished_shards()
    jobs = [(index, shard_items(recipe, items_per_shard, index)) for index in range(num_shards) if index not in shards]
    sizes = {index: len(items) for index, items in jobs}
    # Where rows are wanted they are counted, as most of a million captions may never be needed.
    total = recipe.num_items if max_rows is None else max_rows
    done = recipe.num_items - sum(sizes.values()) if max_rows is None else sum(part.rows for part in shards.values())
    if _has_enough(shards, max_rows):
        return shards
    running = run_shards(recipe, jobs, workers)
    try:
        with tqdm(total=total, initial=min(done, total), desc=f"{unit}s", unit=unit, smoothing=0.05) as bar:
            for index, content in running:
                shards[index] = store.add(index, content)
                bar.update(min(sizes[index] if max_rows is None else shards[index].rows, total - bar.n))
                bar.set_postfix_str(_describe(shards, unit) + (f", {note()}" if note else ""))
                if _has_enough(shards, max_rows):
                    break
    finally:
        if hasattr(running, "close"):
            running.close()
    return shards


def _has_enough(shards: dict[int, Counts], max_rows: int | None) -> bool:
    """Whether the shards from the first on without a gap hold the rows wanted: later ones must not decide them."""
    rows, index = 0, 0
    while max_rows is not None and rows < max_rows and index in shards:
        rows, index = rows + shards[index].rows, index + 1
    return max_rows is not None and rows >= max_rows


def _describe(shards: dict[int, Counts], unit: str) -> str:
    rows = sum(counts.rows for counts in shards.values())
    rejected = sum(counts.rejected.total() for counts in shards.values())
    return f"{rows:,} {unit}s" + (f", {rejected:,} rejected" if rejected else "")
