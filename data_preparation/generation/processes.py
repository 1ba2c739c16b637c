"""Work spread over processes of this machine: lost workers are replaced, and all workers end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from utils.errors import InputError

MAX_LOSSES = 3  # of workers in a row, without a result in between
JOBS_PER_WORKER = 2  # submitted at a time

Work = Callable[[Any], Any]


def run_in_processes(
    open_worker: Callable[[int], Work], jobs: Mapping[Hashable, Any], num_workers: int
) -> Iterator[tuple[Hashable, Any]]:
    """(key, result) of every job, in the order in which they finish.

    open_worker: is pickled, and called once in each worker with the worker's rank; it returns the function that turns a
    job into its result. A worker that is lost (killed, out of memory) is replaced, and its jobs are run again.
    Closing the iterator stops the workers. Raises InputError for one that a worker raised, or for repeated losses.
    """
    left, losses = dict(jobs), 0
    while left:
        try:
            for key, result in _run_pool(open_worker, left, num_workers):
                losses = 0
                del left[key]
                yield key, result
        except BrokenProcessPool:
            losses += 1
            if losses >= MAX_LOSSES:
                raise InputError(
                    f"workers were killed {losses} times in a row, probably because memory ran out: use a smaller "
                    "--num_workers and run the same command again, it continues with what is finished"
                ) from None


def _run_pool(
    open_worker: Callable[[int], Work], jobs: Mapping[Hashable, Any], num_workers: int
) -> Iterator[tuple[Hashable, Any]]:
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA, and locks held by threads
    size = min(num_workers, len(jobs))
    pool = ProcessPoolExecutor(size, context, _start_worker, (open_worker, context.Value("i", 0)))
    running: dict[Future, Hashable] = {}
    try:
        todo = iter(list(jobs.items()))
        while True:
            while len(running) < JOBS_PER_WORKER * size and (job := next(todo, None)) is not None:
                running[pool.submit(_run_job, job[1])] = job[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key, result = running.pop(future), future.result()
                if isinstance(result, InputError):
                    raise result
                yield key, result
    finally:
        if running:  # their results are not wanted: the pool notices that the processes are gone, and ends
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown()


_worker: dict[str, Any] = {}


def _start_worker(open_worker: Callable[[int], Work], ranks: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    leave_with_parent()
    with ranks.get_lock():
        rank, ranks.value = ranks.value, ranks.value + 1
    _worker.update(open=open_worker, rank=rank)


def leave_with_parent() -> None:
    """End this process when its parent is gone, however it ended; otherwise it would hold a GPU forever."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def _run_job(job: Any) -> Any:
    """The first job also opens the worker, so that an InputError there reaches the user unchanged."""
    try:
        if "work" not in _worker:
            _worker["work"] = _worker["open"](_worker["rank"])
        return _worker["work"](job)
    except InputError as error:
        return error
