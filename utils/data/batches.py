"""Rows -> micro-batches: an endless stream that depends only on (seed, draw).

Micro-batch m holds the draws m * B * N … (m + 1) * B * N - 1 (batch size B, N processes); rank r takes every N-th of
them, starting at the r-th. No batch is partial, no draw is dropped. Resuming starts at micro-batch m: no earlier row is
decoded, and there are no generator states. Workers hold no state, so their number does not matter.
"""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.bucket_table import find_buckets
from utils.data.draws import DrawOrder, check_seed
from utils.data.geometry import Geometry, Size
from utils.data.latent_cache import LatentCache
from utils.data.samples import (
    MAX_CONSECUTIVE_BAD_ROWS,
    SampleSettings,
    collate,
    make_cached_sample,
    make_sample,
    too_many_bad_rows,
)
from utils.data.sources import Source
from utils.data.streaming import StreamedBatches, check_streamable
from utils.errors import InputError
from utils.parent_process import signal_when_parent_dies
from utils.pixels import BadRow


def make_loader(
    sources: list[Source],
    geometry: Geometry,
    *,
    seed: int,
    batch_size: int,
    num_train_timesteps: int,
    latent_channels: int = 4,
    vae_scale_factor: int = 8,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    cache: LatentCache | None = None,
) -> DataLoader:
    """The endless loader of this rank's micro-batches, starting at number `start_batch`; it has no length.

    A batch is a dict. uint8 in [0, 255]: `original_pixels`, `edited_pixels` (B, 3, H, W). int64: `timesteps` (B,),
    `original_sizes`, `crop_top_lefts`, `target_sizes` (B, 2) as (h, w) or (y, x). float32: `noise`, `posterior_noise`
    (B, C, h, w), `offset_noise` (B, C, 1, 1), `dropout` (B,) uniform in [0, 1). Lists: `prompts`, `rows` (names such as
    "train[12]"), `bad_rows` (pairs of name and reason, any number). With a `cache`, `moments` float32 (B, 3C, h, w)
    replaces the pixels. Iterating raises InputError if all rows, or 100 consecutive ones, are bad.
    """
    settings = SampleSettings(geometry, check_seed(seed), num_train_timesteps, latent_channels, vae_scale_factor)
    if any(source.is_streaming for source in sources):
        check_streamable(sources, geometry)
        dataset = StreamedBatches(sources[0], settings, batch_size, rank, world_size, start_batch, num_workers)
        sampler, num_workers = None, min(num_workers, 1)
    else:
        buckets = find_buckets(sources, geometry) if geometry.resize_mode == "bucket" else None
        dataset = PairBatches(sources, settings, cache)
        sampler = VisitSampler(sources, seed, batch_size, rank, world_size, start_batch, buckets)
    return BatchLoader(dataset, sampler, num_workers, pin_memory)


class Visit(NamedTuple):
    """One draw and the row that it visits."""

    draw: int
    source: int
    row: int
    bucket: Size | None = None


class VisitSampler(Sampler):
    """Yields this rank's visits of each micro-batch, endlessly, starting at micro-batch `start_batch`."""

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        start_batch: int,
        buckets: list[list[Size]] | None = None,
    ) -> None:
        self.order = DrawOrder([len(source.rows) for source in sources], [source.weight for source in sources], seed)
        self.global_batch_size = batch_size * world_size
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.buckets = buckets  # of each row of each source

    def __iter__(self) -> Iterator[list[Visit]]:
        for micro_batch in self._in_order() if self.buckets is None else self._by_bucket():
            yield micro_batch[self.rank :: self.world_size]

    def _in_order(self) -> Iterator[list[Visit]]:
        for batch in count(self.start_batch):
            draws = range(batch * self.global_batch_size, (batch + 1) * self.global_batch_size)
            yield [Visit(draw, *self.order.locate(draw)) for draw in draws]

    def _by_bucket(self) -> Iterator[list[Visit]]:
        """Each bucket collects its draws until they fill a micro-batch. Resuming replays this, decoding nothing."""
        queues: dict[Size, list[Visit]] = {}
        num_batches = 0
        for draw in count():
            source, row = self.order.locate(draw)
            bucket = self.buckets[source][row]
            queue = queues.setdefault(bucket, [])
            queue.append(Visit(draw, source, row, bucket))
            if len(queue) == self.global_batch_size:
                if num_batches >= self.start_batch:
                    yield queue
                num_batches += 1
                queues[bucket] = []


class PairBatches(Dataset):
    """A list of visits -> a batch. The next good row of its source replaces a bad row; the draw stays the same.

    With a cache of several buckets, it is the next good row of the same bucket.
    """

    def __init__(self, sources: list[Source], settings: SampleSettings, cache: LatentCache | None = None) -> None:
        self.sources = sources
        self.settings = settings
        self.cache = cache
        self.prompts = [source.rows.select_columns([source.columns.prompt]) for source in sources] if cache else []

    def __getitem__(self, visits: list[Visit]) -> dict | InputError:
        bad_rows: list[tuple[str, str]] = []
        try:
            samples, names = zip(*(self._sample(visit, bad_rows) for visit in visits), strict=True)
        except InputError as error:
            return error  # raised by BatchLoader
        return collate(samples, list(names), bad_rows)

    def _sample(self, visit: Visit, bad_rows: list[tuple[str, str]]) -> tuple[dict, str]:
        """(sample, name of its row); appends the bad rows to `bad_rows`."""
        source = self.sources[visit.source]
        num_tries = min(MAX_CONSECUTIVE_BAD_ROWS, len(source.rows))
        for step in range(num_tries):
            row = (visit.row + step) % len(source.rows)
            name = source.row_name(row)
            try:
                if sample := self._sample_of_row(row, visit):
                    return sample, name
            except BadRow as error:
                bad_rows.append((name, error.reason))
        raise too_many_bad_rows(bad_rows[-num_tries:])

    def _sample_of_row(self, row: int, visit: Visit) -> dict | None:
        source = self.sources[visit.source]
        if self.cache is None:
            return make_sample(source.rows[row], source, visit.draw, self.settings, visit.bucket)
        prompt = self.prompts[visit.source][row][source.columns.prompt]
        read = partial(self.cache.read, visit.source, row)
        sample = make_cached_sample(prompt, visit.draw, self.settings, read, visit.bucket)
        shape = sample["arrays"]["moments"].shape[1:]
        return sample if shape == sample["draws"]["noise"].shape[1:] else None  # another bucket


class BatchLoader(DataLoader):
    """A DataLoader of whole batches. The dataset may return an InputError, which is raised here.

    Raised inside a worker process, it would reach the user wrapped in a traceback.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler | None, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise starting the loader draws from torch's global generator
            worker_init_fn=partial(_prepare_worker, os.getpid()),
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _identity(batch: dict) -> dict:
    return batch


def _prepare_worker(parent: int, _worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM reach all processes, but the current step still needs its workers.

    A SIGTERM from the training process itself ends a worker, and so does the end of that process: PyTorch's own watch
    never notices a parent that was killed before the worker had started.
    """
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of, args=(parent,), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
