"""Shards by a Ray cluster: Ray Data feeds actors of one model each, scales their number, and replaces lost ones.

The bytes of a shard come back to this process, which alone writes: the cluster needs no common disk for the output,
and a node that is lost loses nothing that stood. Ray is optional (requirements-ray.txt).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_preparation.generation.pools import Job, Workers
from data_preparation.generation.recipe import Recipe, open_recipe
from data_preparation.generation.shards import make_shard
from utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_ROUNDS = 3  # times that missing shards are asked for, beyond Ray's own retries


class ShardMaker:
    """An actor: the recipe, opened once, and a shard for each call."""

    def __init__(self, recipe: Recipe) -> None:
        self._features = recipe.features()
        self._error = None
        try:
            self._make = open_recipe(recipe, 0)  # Ray shows each actor its own GPUs alone
        except InputError as error:
            self._error = str(error)

    def __call__(self, batch: dict) -> dict:
        """One job, {"index", "start", "stop"} of one value each -> {"index", "content", "error"}."""
        content, error = b"", self._error or ""
        if not error:
            try:
                content = make_shard(self._make, self._features, range(int(batch["start"][0]), int(batch["stop"][0])))
            except InputError as problem:  # raised here, Ray would try again and show a traceback
                error = str(problem)
        return {"index": [int(batch["index"][0])], "content": [content], "error": [error]}


def run_on_ray(recipe: Recipe, jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every shard, in the order in which they get ready. Raises InputError."""
    with _cluster(workers.ray):
        left = dict(jobs)
        for _ in range(MAX_ROUNDS):
            for index, content in _run_round(recipe, left, workers):
                if left.pop(index, None) is not None:
                    yield index, content
            if not left:
                return
    raise InputError(f"the Ray cluster lost {len(left)} shards {MAX_ROUNDS} times; the same command goes on")


def _run_round(recipe: Recipe, jobs: dict[int, range], workers: Workers) -> Iterator[tuple[int, bytes]]:
    import ray

    items = [{"index": index, "start": items.start, "stop": items.stop} for index, items in jobs.items()]
    most = workers.num_workers or _capacity(workers.gpus_per_worker)
    needs = {"num_gpus": workers.gpus_per_worker} if workers.gpus_per_worker else {"num_cpus": 1}
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardMaker,
        fn_constructor_args=(recipe,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(most, len(items)))),
        **needs,
    )
    for row in rows.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        yield int(row["index"]), row["content"]


def _capacity(gpus_per_worker: float) -> int:
    """Actors that the cluster has room for now."""
    import ray

    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0) / gpus_per_worker if gpus_per_worker else resources.get("CPU", 1))


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    try:
        # Before the import: else a warning for each actor without a GPU, and one about restarts that cannot befall us.
        os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        import ray
        import ray.data
    except ImportError:
        raise InputError(f"--ray {address} needs Ray: pip install -r requirements-ray.txt") from None
    is_ours, is_local = not ray.is_initialized(), address == "local"
    if is_ours:
        # Ray tells its workers the folder of the script and the working folder, of which neither need be ours.
        place = dict(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}})
        place = place if is_local else dict(address=address, runtime_env=_our_code())
        try:
            ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--ray {address}: no cluster can be reached there ({reason})") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts items
    context.max_errored_blocks = -1  # what Ray gives up, the next round asks for again
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _our_code() -> dict:
    """The two packages of which recipes are made; what they import must be installed on the nodes."""
    return {"py_modules": [str(REPOSITORY / "data_preparation"), str(REPOSITORY / "utils")]}
