"""Who makes the shards: this process, several processes, or a Ray cluster (ray_pool.py). All give the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from data_preparation.making.recipe import Recipe, open_recipe
from data_preparation.making.shards import make_shard
from utils.errors import InputError

MAX_LOSSES = 3  # of workers in a row, without a shard in between
AHEAD = 2  # shards in hand for each worker


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
    """(number, bytes of the shard), in the order in which they get ready. Closing the iterator stops the workers."""
    if not jobs:
        return iter(())
    if workers.ray:
        from data_preparation.making.ray_pool import run_on_ray

        return run_on_ray(recipe, jobs, workers)
    return run_in_processes(recipe, jobs, workers.num_workers) if workers.num_workers else run_here(recipe, jobs)


def run_here(recipe: Recipe, jobs: Sequence[Job]) -> Iterator[tuple[int, bytes]]:
    make, features = open_recipe(recipe, 0), recipe.features()
    for index, items in jobs:
        yield index, make_shard(make, features, items)


def run_in_processes(recipe: Recipe, jobs: Sequence[Job], num_workers: int) -> Iterator[tuple[int, bytes]]:
    """A worker that is lost (killed, out of memory) is replaced, and what it had in hand is made again."""
    left, losses = dict(jobs), 0
    while left:
        try:
            for index, content in _run_pool(recipe, list(left.items()), num_workers):
                losses = 0
                del left[index]
                yield index, content
        except BrokenProcessPool:
            losses += 1
            if losses >= MAX_LOSSES:
                raise InputError(
                    f"workers were lost {losses} times in a row (killed for memory?): give a smaller --num_workers. "
                    "Finished shards stand: the same command goes on"
                ) from None


def _run_pool(recipe: Recipe, jobs: list[Job], num_workers: int) -> Iterator[tuple[int, bytes]]:
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA and locks of threads
    ranks = context.Value("i", 0)
    size = min(num_workers, len(jobs))
    pool = ProcessPoolExecutor(size, mp_context=context, initializer=_start_worker, initargs=(recipe, ranks))
    running: dict[Future, int] = {}
    try:
        todo = iter(jobs)
        while True:
            while len(running) < AHEAD * size and (job := next(todo, None)) is not None:
                running[pool.submit(_work, job[1])] = job[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                yield index, _result(future)
    finally:
        if running:  # what the workers still make is not wanted: the pool notices that they are gone, and ends
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown()


def _result(future: Future) -> bytes:
    result = future.result()
    if isinstance(result, InputError):
        raise result
    return result


_worker: dict[str, Any] = {}


def _start_worker(recipe: Recipe, ranks: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    leave_with_parent()
    with ranks.get_lock():
        rank, ranks.value = ranks.value, ranks.value + 1
    _worker.update(recipe=recipe, rank=rank)


def leave_with_parent() -> None:
    """End this worker when its parent is gone, however it went: it would wait for work, and hold a GPU, for ever."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def _work(items: range) -> bytes | InputError:
    """The first shard of a worker also opens the recipe: what goes wrong there then reaches the user as it is."""
    try:
        if "make" not in _worker:
            _worker["make"] = open_recipe(_worker["recipe"], _worker["rank"])
        return make_shard(_worker["make"], _worker["recipe"].features(), items)
    except InputError as error:
        return error
