"""Runs a row generator to a finished dataset: in this process, in worker processes, or on a Ray cluster.

The items of a generator are split into shards, which finish in any order. A run that is killed resumes with the
missing shards. The rows do not depend on the kind or the number of workers.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
from tqdm.auto import tqdm

from data_preparation.generation.dataset_folder import DatasetFolder, ShardCounts, encode_shard
from data_preparation.generation.processes import run_in_processes, run_on_ray


class GeneratedRows(NamedTuple):
    """The rows of some items in order, and how many items gave none, by reason."""

    rows: list[dict]
    rejected: dict[str, int] = {}


GenerateRows = Callable[[range], GeneratedRows]


class RowGenerator(Protocol):
    """Picklable settings, from which each worker opens the same function.

    num_items: number of captions, photographs or rows to draw. The rows of an item depend only on the settings and on
    its index: random numbers come from `seeded_rng(seed, index)`. An item that cannot be used is counted in
    `GeneratedRows.rejected`; if nothing can work (no server, no model), InputError is raised.
    """

    num_items: int

    def features(self) -> datasets.Features:
        """Columns of the rows."""

    def open(self, rank: int) -> GenerateRows:
        """Load models and open inputs. rank: index of the worker, which chooses its GPU."""


@dataclass(frozen=True)
class WorkerSettings:
    """num_workers: extra processes, 0 for none; ray: address of a cluster, or "local"; gpus_per_worker: for Ray."""

    num_workers: int = 0
    ray: str | None = None
    gpus_per_worker: float = 0.0


@dataclass(frozen=True)
class GenerationSummary:
    """rows: of the whole dataset; rejected: items without rows, by reason; seconds: duration of this run."""

    rows: int
    rejected: Counter
    was_complete: bool = False
    seconds: float = 0.0

    def describe(self, data_root: Path, unit: str = "pair") -> str:
        """The lines that a script prints at its end."""
        plural = "" if self.rows == 1 else "s"
        lines = [f"{data_root} holds {self.rows:,} {unit}{plural}{' (already complete)' if self.was_complete else ''}"]
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in self.rejected.most_common()]
        return "\n".join(lines)


def run_generation(
    generator: RowGenerator,
    data_root: Path,
    settings: dict[str, Any],
    *,
    items_per_shard: int | None = None,
    max_rows: int | None = None,
    workers: WorkerSettings | None = None,
    unit: str = "pair",
    overwrite: bool = False,
    note: Callable[[], str] | None = None,
) -> GenerationSummary:
    """Generate the missing shards, then the dataset.

    settings: JSON values that determine the rows; a folder with different settings is refused. items_per_shard:
    default a 32nd of the items, from 4 to 100. max_rows: stop after so many rows, for items that give none or
    several. note: further text for the progress bar, such as the cost. Raises InputError.
    """
    started = time.monotonic()
    items_per_shard = items_per_shard or min(max(generator.num_items // 32, 4), 100)
    plan = {"items": generator.num_items, "items_per_shard": items_per_shard, "max_rows": max_rows}
    folder = DatasetFolder(data_root, settings | plan, overwrite)
    try:
        if (counts := folder.complete_counts()) is not None:
            return GenerationSummary(*counts, was_complete=True)
        starts = range(0, generator.num_items, items_per_shard)
        items = [range(start, min(start + items_per_shard, generator.num_items)) for start in starts]
        shards = _generate_missing(generator, folder, items, max_rows, workers or WorkerSettings(), unit, note)
        return GenerationSummary(*folder.finish(shards, max_rows), seconds=time.monotonic() - started)
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to resume {data_root}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        folder.close()


def _generate_missing(
    generator: RowGenerator,
    folder: DatasetFolder,
    items: list[range],
    max_rows: int | None,
    workers: WorkerSettings,
    unit: str,
    note: Callable[[], str] | None,
) -> dict[int, ShardCounts]:
    """Counts of all shards, or of as many as `max_rows` needs. items: those of each shard."""
    shards = folder.finished_shards()
    if _has_enough(shards, max_rows):
        return shards
    jobs = {index: part for index, part in enumerate(items) if index not in shards}
    # With max_rows the bar counts rows, because most of a million captions may never be needed.
    total, done = max_rows, sum(counts.rows for counts in shards.values())
    if max_rows is None:
        total, done = generator.num_items, generator.num_items - sum(map(len, jobs.values()))
    running = _run_jobs(partial(_open_shard_worker, generator), jobs, workers)
    try:
        with tqdm(total=total, initial=min(done, total), desc=f"{unit}s", unit=unit, smoothing=0.05) as bar:
            for index, content in running:
                shards[index] = folder.add(index, content)
                bar.update(min(len(jobs[index]) if max_rows is None else shards[index].rows, total - bar.n))
                bar.set_postfix_str(_describe(shards, unit) + (f", {note()}" if note else ""))
                if _has_enough(shards, max_rows):
                    break
    finally:
        running.close()  # stops the workers
    return shards


def _run_jobs(
    open_worker: Callable[[int], Callable[[range], bytes]], jobs: Mapping[int, range], workers: WorkerSettings
) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of each shard, in the order in which they finish."""
    if jobs and workers.ray:
        yield from run_on_ray(open_worker, jobs, workers.ray, workers.num_workers, workers.gpus_per_worker)
    elif jobs:
        yield from run_in_processes(open_worker, jobs, workers.num_workers)


def _open_shard_worker(generator: RowGenerator, rank: int) -> Callable[[range], bytes]:
    """The function from the items of a shard to the bytes of its file."""
    generate, features = generator.open(rank), generator.features()
    # The number of threads would change the last bits of a row.
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return lambda items: encode_shard(*generate(items), features)


def _has_enough(shards: dict[int, ShardCounts], max_rows: int | None) -> bool:
    """Whether the shards before the first missing one have `max_rows` rows; later shards must not decide the rows."""
    rows, index = 0, 0
    while max_rows is not None and rows < max_rows and index in shards:
        rows, index = rows + shards[index].rows, index + 1
    return max_rows is not None and rows >= max_rows


def _describe(shards: dict[int, ShardCounts], unit: str) -> str:
    rows = sum(counts.rows for counts in shards.values())
    rejected = sum(counts.rejected.total() for counts in shards.values())
    return f"{rows:,} {unit}s" + (f", {rejected:,} rejected" if rejected else "")
