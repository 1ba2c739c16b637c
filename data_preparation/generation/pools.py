"""Who makes the shards: this process, several processes, or a Ray cluster (ray_runner.py). All give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from data_preparation.generation.processes import run_in_processes
from data_preparation.generation.recipe import Recipe, open_recipe
from data_preparation.generation.shards import make_shard


@dataclass(frozen=True)
class Workers:
    """num_workers: processes beside this one, 0 for none; ray: address of a cluster, or "local".

    gpus_per_worker: what a Ray worker asks for; processes of one machine share its GPUs by their rank.
    """

    num_workers: int = 0
    ray: str | None = None
    gpus_per_worker: float = 0.0


Job = tuple[int, range]  # number of a shard, and its items


def run_shards(recipe: Recipe, jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[int, bytes]]:
    """(number, bytes of the shard), in the order in which they finish. Closing the iterator stops the workers."""
    if not jobs:
        return iter(())
    if workers.ray:
        from data_preparation.generation.ray_runner import run_on_ray

        return run_on_ray(recipe, jobs, workers)
    open_worker = partial(open_shard_worker, recipe)
    if workers.num_workers:
        return run_in_processes(open_worker, dict(jobs), workers.num_workers)
    return run_here(open_worker, jobs)


def open_shard_worker(recipe: Recipe, rank: int) -> Callable[[range], bytes]:
    """The function from the items of a shard to its bytes."""
    return partial(make_shard, open_recipe(recipe, rank), recipe.features())


def run_here(
    open_worker: Callable[[int], Callable[[range], bytes]], jobs: Sequence[Job]
) -> Iterator[tuple[int, bytes]]:
    make = open_worker(0)
    for index, items in jobs:
        yield index, make(items)
