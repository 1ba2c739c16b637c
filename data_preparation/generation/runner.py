"""Runs a row generator to a finished dataset: in this process, in worker processes, or on a Ray cluster.

The items of a generator are split into shards, which finish in any order. A run that is killed resumes with the
missing shards. The rows do not depend on the kind or the number of workers.

Several runs (partitions) may share the shards: partition p of n generates the shards p, p + n, p + 2n and so on, and
the one that finishes last completes the dataset.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    """num_workers: extra processes, 0 for none; ray: address of a cluster, or "local"; gpus_per_worker: for Ray.

    partition: number of this run, of num_partitions runs that share the work.
    """

    num_workers: int = 0
    ray: str | None = None
    gpus_per_worker: float = 0.0
    partition: int = 0
    num_partitions: int = 1


@dataclass(frozen=True)
class GenerationSummary:
    """rows: of the whole dataset; rejected: items without rows, by reason; seconds: duration of this run.

    unfinished: the numbers of the other partitions that are not finished, without which there is no dataset yet; rows
    and rejected are then those of this partition.
    """

    rows: int
    rejected: Counter
    was_complete: bool = False
    seconds: float = 0.0
    unfinished: tuple[int, ...] = ()

    def describe(self, data_root: Path, unit: str = "pair") -> str:
        """The lines that a script prints at its end."""
        plural = "" if self.rows == 1 else "s"
        lines = [f"{data_root} holds {self.rows:,} {unit}{plural}{' (already complete)' if self.was_complete else ''}"]
        if self.unfinished:
            others = ", ".join(map(str, self.unfinished[:20])) + (", ..." if len(self.unfinished) > 20 else "")
            lines = [f"this partition has {self.rows:,} {unit}{plural}; {data_root} waits for the partitions {others}"]
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
    started, workers = time.monotonic(), workers or WorkerSettings()
    num_items, num_partitions = generator.num_items, workers.num_partitions
    items_per_shard = items_per_shard or min(max(num_items // 32, 4), 100)
    if num_partitions > 1:  # work for all of them
        items_per_shard = min(items_per_shard, max(1, num_items // num_partitions))
    plan = {"items": num_items, "items_per_shard": items_per_shard, "max_rows": max_rows}
    partition = (workers.partition, num_partitions) if num_partitions > 1 else None
    folder = DatasetFolder(data_root, settings | plan, overwrite, partition)
    generate = partial(_generate_missing, generator, folder, workers=workers, unit=unit, note=note)
    try:
        if (counts := folder.complete_counts()) is not None:
            return GenerationSummary(*counts, was_complete=True)
        whole, shares = _plan_shares(num_items, items_per_shard, max_rows, num_partitions)
        summary = _run_partition(folder, generate, shares, workers.partition) if partition else None
        summary = summary or GenerationSummary(*folder.finish(generate(whole), max_rows))
        return replace(summary, seconds=time.monotonic() - started)
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to resume {data_root}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        folder.close()


@dataclass(frozen=True)
class Share:
    """The shards of a run. items: those of each shard, by its index; max_rows: enough rows, None for all shards."""

    items: dict[int, range]
    max_rows: int | None

    def is_done(self, shards: Mapping[int, ShardCounts]) -> bool:
        return Tally(self, shards).is_done


class Tally:
    """The finished shards of a share, with running totals: a further one costs the same after 200,000 others."""

    def __init__(self, share: Share, shards: Mapping[int, ShardCounts]) -> None:
        self._max_rows, self._ahead = share.max_rows, iter(share.items)
        self.shards: dict[int, ShardCounts] = {}
        self.rows = self.rejected = self._rows_in_order = 0
        self._next = next(self._ahead, None)
        for index in share.items:
            if index in shards:
                self.add(index, shards[index])

    def add(self, index: int, counts: ShardCounts) -> None:
        self.shards[index] = counts
        self.rows += counts.rows
        self.rejected += counts.rejected.total()
        while self._next in self.shards:
            self._rows_in_order += self.shards[self._next].rows
            self._next = next(self._ahead, None)

    @property
    def is_done(self) -> bool:
        """All shards, or enough rows before the first missing one: later shards must not decide the rows."""
        has_enough = self._max_rows is not None and self._rows_in_order >= self._max_rows
        return has_enough or self._next is None

    def describe(self, unit: str) -> str:
        return f"{self.rows:,} {unit}s" + (f", {self.rejected:,} rejected" if self.rejected else "")


def _plan_shares(
    num_items: int, items_per_shard: int, max_rows: int | None, num_partitions: int
) -> tuple[Share, list[Share]]:
    """(all shards, the share of each partition): with `max_rows`, a partition stops at its part of them."""
    starts = range(0, num_items, items_per_shard)
    items = {index: range(start, min(start + items_per_shard, num_items)) for index, start in enumerate(starts)}
    part = None if max_rows is None else -(-max_rows // num_partitions)
    indices = [range(partition, len(items), num_partitions) for partition in range(num_partitions)]
    return Share(items, max_rows), [Share({index: items[index] for index in own}, part) for own in indices]


def _run_partition(
    folder: DatasetFolder, generate: Callable[[Share], dict[int, ShardCounts]], shares: list[Share], partition: int
) -> GenerationSummary | None:
    """Generate a share. None if all are finished and nobody has completed the dataset: then this run has locked it."""
    shards = generate(shares[partition])
    others = tuple(index for index, share in enumerate(shares) if not share.is_done(shards))
    if others and folder.complete_counts() is None:
        own = [shards[index] for index in shares[partition].items if index in shards]
        rejected = sum((one.rejected for one in own), Counter())
        return GenerationSummary(sum(one.rows for one in own), rejected, unfinished=others)
    folder.take_over()
    counts = folder.complete_counts()  # by another partition that finished just now
    return None if counts is None else GenerationSummary(*counts)


def _generate_missing(
    generator: RowGenerator,
    folder: DatasetFolder,
    share: Share,
    workers: WorkerSettings,
    unit: str,
    note: Callable[[], str] | None,
) -> dict[int, ShardCounts]:
    """Counts of all finished shards, after those of the share are, or as many of them as it needs."""
    shards = folder.finished_shards()
    if share.is_done(shards):
        return shards
    own = Tally(share, shards)
    jobs = {index: part for index, part in share.items.items() if index not in shards}
    # With max_rows the bar counts rows, because most of a million captions may never be needed.
    total, done = share.max_rows, own.rows
    if share.max_rows is None:
        total = sum(map(len, share.items.values()))
        done = total - sum(map(len, jobs.values()))
    running = _run_jobs(partial(_open_shard_worker, generator), jobs, workers)
    try:
        with tqdm(total=total, initial=min(done, total), desc=f"{unit}s", unit=unit, smoothing=0.05) as bar:
            for index, content in running:
                counts = folder.add(index, content)
                own.add(index, counts)
                bar.update(min(len(jobs[index]) if share.max_rows is None else counts.rows, total - bar.n))
                bar.set_postfix_str(own.describe(unit) + (f", {note()}" if note else ""), refresh=False)
                if own.is_done:
                    break
    finally:
        running.close()  # stops the workers
    return folder.finished_shards(shards | own.shards)  # also those of other partitions


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
