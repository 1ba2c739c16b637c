"""Runs jobs in processes of this machine, or on a Ray cluster (requirements-ray.txt). Lost workers are replaced."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data_preparation.generation.shipping import FileServer, SentFiles, find_files_to_send, receive
from utils.errors import InputError, first_line

MAX_LOSSES = 3  # of workers in a row, without a result in between
JOBS_PER_WORKER = 2  # submitted at a time
MAX_RAY_ROUNDS = 3  # how often jobs are submitted, in addition to Ray's own retries
REPOSITORY = Path(__file__).resolve().parents[2]

Work = Callable[[Any], Any]


def run_in_processes(
    open_worker: Callable[[int], Work], jobs: Mapping[Hashable, Any], num_workers: int
) -> Iterator[tuple[Hashable, Any]]:
    """(key, result) of every job, in the order in which they finish.

    open_worker: is pickled, and called once in each worker with the worker's rank; it returns the function that turns a
    job into its result. num_workers: 0 to run the jobs in this process, in their order. A worker that is lost (killed,
    out of memory) is replaced, and its jobs are run again.
    Closing the iterator stops the workers. Raises InputError for one that a worker raised, or for repeated losses.
    """
    if not num_workers:
        work = open_worker(0)
        yield from ((key, work(job)) for key, job in jobs.items())
        return
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
    # A worker ends with its parent, however that ends; otherwise it would hold its GPU forever.
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
    with ranks.get_lock():
        rank, ranks.value = ranks.value, ranks.value + 1
    _worker.update(open=open_worker, rank=rank)


def _run_job(job: Any) -> Any:
    """The first job also opens the worker, so that an InputError there reaches the user unchanged."""
    try:
        if "work" not in _worker:
            _worker["work"] = _worker["open"](_worker["rank"])
        return _worker["work"](job)
    except InputError as error:
        return error


def run_on_ray(
    open_worker: Callable[[int], Work], jobs: Mapping[int, range], address: str, num_workers: int, num_gpus: float
) -> Iterator[tuple[int, bytes]]:
    """(key, result) of every job, in the order in which they finish, from the actors of a Ray cluster.

    address: of the cluster, "auto", or "local" for one on this machine. num_workers: actors, 0 for as many as fit.
    num_gpus: per actor, may be a fraction.
    The results come back to this process, so that the cluster needs no shared disk. Raises InputError.
    """
    with ray_cluster(address), _serving_files(open_worker) as open_on_node:
        left = dict(jobs)
        for _ in range(MAX_RAY_ROUNDS):
            for key, result in _run_ray_round(open_on_node, left, num_workers, num_gpus):
                if left.pop(key, None) is not None:
                    yield key, result
            if not left:
                return
    raise InputError(f"--ray {address}: the cluster lost {len(left)} jobs; run the same command again to resume")


@contextmanager
def _serving_files(open_worker: Callable[[int], Work]) -> Iterator[Callable[[int], Work]]:
    """A worker that first fetches the files of functions and models that its node lacks, from an actor on this one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    sent = find_files_to_send(getattr(open_worker, "args", ()))
    if not sent:
        yield open_worker
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    server = ray.remote(FileServer).options(num_cpus=0, scheduling_strategy=here).remote(sent)
    try:
        yield partial(_open_on_node, open_worker, sent, server)
    finally:
        ray.kill(server)


def _open_on_node(open_worker: Callable, sent: list[SentFiles], server: Any, rank: int) -> Work:
    import ray

    return receive(open_worker, sent, lambda path, offset: ray.get(server.read.remote(path, offset)))(rank)


class _RayWorker:
    """An actor: opens its worker once, then runs one job per call."""

    def __init__(self, open_worker: Callable[[int], Work]) -> None:
        self._open_worker, self._work = open_worker, None

    def __call__(self, batch: dict) -> dict:
        """{"key", "start", "stop"} of one job, in lists -> {"key", "result", "error"}."""
        key, start, stop = (int(batch[name][0]) for name in ("key", "start", "stop"))
        result, error = b"", ""
        try:
            self._work = self._work or self._open_worker(0)  # Ray shows each actor only its own GPUs
            result = self._work(range(start, stop))
        except InputError as problem:  # if raised here, Ray would retry and print a traceback
            error = str(problem)
        except Exception as problem:  # retried, it would be reported as a lost job, without its cause
            error = f"--ray: a worker failed with {type(problem).__name__}: {first_line(problem)}"
        return {"key": [key], "result": [result], "error": [error]}


def _run_ray_round(
    open_worker: Callable, jobs: dict[int, range], num_workers: int, num_gpus: float
) -> Iterator[tuple[int, bytes]]:
    import ray

    items = [{"key": key, "start": items.start, "stop": items.stop} for key, items in jobs.items()]
    kind, needed = ("GPU", num_gpus) if num_gpus else ("CPU", 1)
    available = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
    capacity = sum(int(count / needed) for count in available)
    if not capacity:  # Ray would wait for such a node forever
        advice = "give --device cpu or --gpus_per_worker 0 to use CPUs, or add" if num_gpus else "add"
        largest = max(available, default=0)
        raise InputError(
            f"--ray: a worker needs {needed:g} {kind}, and no node has more than {largest:g}: {advice} nodes"
        )
    max_size = min(num_workers or capacity, capacity, len(items))
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _RayWorker,
        fn_constructor_args=(open_worker,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max_size),
        **({"num_gpus": num_gpus} if num_gpus else {"num_cpus": 1}),
    )
    for row in rows.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        yield int(row["key"]), row["result"]


def _use_token_if_any(address: str) -> None:
    """Send the token of `ray start`: for an explicit address, Ray does so only if RAY_AUTH_MODE asks for it."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if address not in ("local", "auto") and (os.environ.get("RAY_AUTH_TOKEN") or file.is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _explain_connection(error: Exception) -> str:
    """Why there is no connection. Never holds the token."""
    reasons, cause = "", error
    while cause is not None:  # Ray puts the traceback of the real error into the text of another one
        reasons, cause = f"{reasons}\n{cause}", cause.__cause__ or cause.__context__
    if "AuthenticationError" in reasons or "InvalidAuthToken" in reasons:
        return (
            "the cluster refuses the token of this machine: copy ~/.ray/auth_token of its head node to this one, or "
            "name its place in RAY_AUTH_TOKEN_PATH, and do not set RAY_AUTH_MODE to disabled"
        )
    if "ersion mismatch" in reasons:
        return f"its nodes have another version of Ray or Python: {' '.join(str(error).split())}"
    return f"no cluster can be reached ({first_line(error)})"


@contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Connect to a cluster, or start one for "local". An existing connection is used, and kept open."""
    try:
        _use_token_if_any(address)
        # Set before the import, against a warning for each actor without a GPU and one about restarts.
        os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        import ray
        import ray.data
    except ImportError:
        raise InputError(f"--ray {address} needs Ray: pip install -r requirements-ray.txt") from None
    is_started_here = not ray.is_initialized()
    if is_started_here:
        # Workers of a remote cluster get our two packages; what these import must be installed on its nodes.
        local = dict(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}})
        packages = [str(REPOSITORY / name) for name in ("data_preparation", "utils")]
        remote = dict(runtime_env={"py_modules": packages})
        options = dict(address=address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            ray.init(**(local if address == "local" else remote), **options)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise InputError(f"--ray {address}: {_explain_connection(error)}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.max_errored_blocks = -1  # the next round submits failed jobs again
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        if is_started_here:
            ray.shutdown()
