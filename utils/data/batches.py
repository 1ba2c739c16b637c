"""Rows -> micro-batches: an endless stream that depends on (seed, draw) and on nothing else.

Micro-batch m holds draws m * B * N … (m + 1) * B * N - 1 (batch size B, N processes); rank r takes every N-th from its
r-th on. None is partial, none is dropped. Resuming is starting at micro-batch m: nothing before it is decoded, and no
generator has a state. Workers get the draws to make, hold nothing, and so their number does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.buckets import scan_buckets
from utils.data.draws import DrawOrder, check_seed
from utils.data.geometry import Geometry, Size, prepare_pair
from utils.data.latent_cache import LatentCache
from utils.data.samples import (
    MAX_CONSECUTIVE_BAD_ROWS,
    SampleSettings,
    choose_prompt,
    collate,
    make_cached_sample,
    make_sample,
    too_many_bad_rows,
)
from utils.data.sources import Source
from utils.data.streaming import StreamedBatches, check_streamable
from utils.data.workers import BatchLoader
from utils.errors import InputError
from utils.pixels import BadRow

logger = logging.getLogger(__name__)

MIN_STREAMED_ROWS = 1000  # a fraction of fewer rows than these says nothing


class Visit(NamedTuple):
    """One draw and the row that it visits."""

    draw: int
    source: int
    row: int
    bucket: Size | None = None


class PairBatches(Dataset):
    """A list of visits -> its batch. A bad row is replaced by the next good one of its source, its draw unchanged."""

    def __init__(self, sources: list[Source], settings: SampleSettings, cache: LatentCache | None = None) -> None:
        self.sources = sources
        self.settings = settings
        self.cache = cache
        self.prompts = [source.rows.select_columns([source.columns.prompt]) for source in sources] if cache else []

    def __getitem__(self, visits: list[Visit]) -> dict | InputError:
        bad_rows: list[tuple[str, str]] = []
        try:
            made = [self._make(visit, bad_rows) for visit in visits]
        except InputError as error:
            return error  # a worker's exception would reach the user in a traceback: utils/data/workers.py
        return collate([sample for sample, _ in made], [row for _, row in made], bad_rows)

    def _make(self, visit: Visit, bad_rows: list[tuple[str, str]]) -> tuple[dict, str]:
        """(sample, name of the row it was made from); the bad rows met are added to `bad_rows`."""
        source = self.sources[visit.source]
        num_tries = min(MAX_CONSECUTIVE_BAD_ROWS, len(source.rows))
        for step in range(num_tries):
            row = (visit.row + step) % len(source.rows)
            name = source.row_name(row)
            try:
                return self._make_from(row, visit), name
            except BadRow as error:
                bad_rows.append((name, error.reason))
        raise too_many_bad_rows(bad_rows[-num_tries:])

    def _make_from(self, row: int, visit: Visit) -> dict:
        source = self.sources[visit.source]
        if self.cache is None:
            return make_sample(source.rows[row], source, visit.draw, self.settings, visit.bucket)
        prompt = self.prompts[visit.source][row][source.columns.prompt]
        return make_cached_sample(prompt, visit.draw, self.settings, partial(self.cache.read, visit.source, row))


class BatchPlans(Sampler):
    """Without end, from `start_batch` on: the visits of this rank's part of each micro-batch."""

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
        self.buckets = buckets  # of every row of every source

    def __iter__(self) -> Iterator[list[Visit]]:
        micro_batches = self._by_order() if self.buckets is None else self._by_bucket()
        for micro_batch in micro_batches:
            yield micro_batch[self.rank :: self.world_size]

    def _by_order(self) -> Iterator[list[Visit]]:
        for batch in count(self.start_batch):
            draws = range(batch * self.global_batch_size, (batch + 1) * self.global_batch_size)
            yield [Visit(draw, *self.order.locate(draw)) for draw in draws]

    def _by_bucket(self) -> Iterator[list[Visit]]:
        """Draws queue by bucket; a queue that fills a micro-batch is one. Resuming replays the queues of integers."""
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
    """The endless loader of this rank's micro-batches from number `start_batch` on; it has no length.

    A batch is a dict. uint8 in [0, 255]: `original_pixels`, `edited_pixels` (B, 3, H, W). int64: `timesteps` (B,),
    `original_sizes`, `crop_top_lefts`, `target_sizes` (B, 2) as (h, w) or (y, x). float32: `noise`, `posterior_noise`
    (B, C, h, w), `offset_noise` (B, C, 1, 1), `dropout` (B,) uniform in [0, 1). Lists: `prompts`, `rows` (names such as
    "train[12]"), `bad_rows` (pairs of name and reason, any number). Iterating raises an `InputError` when all rows, or
    100 in a row, are bad. With a `cache`, `moments` float32 (B, 3C, h, w) stands in the place of pixels and sizes.
    """
    settings = SampleSettings(geometry, check_seed(seed), num_train_timesteps, latent_channels, vae_scale_factor)
    if any(source.is_streaming for source in sources):
        check_streamable(sources, geometry)
        dataset = StreamedBatches(sources[0], settings, batch_size, rank, world_size, start_batch, num_workers)
        sampler, num_workers = None, min(num_workers, 1)
    else:
        buckets = scan_buckets(sources, geometry) if geometry.resize_mode == "bucket" else None
        dataset = PairBatches(sources, settings, cache)
        sampler = BatchPlans(sources, seed, batch_size, rank, world_size, start_batch, buckets)
    return BatchLoader(dataset, sampler, num_workers, pin_memory)


def check_first_rows(sources: list[Source], geometry: Geometry, count: int = 8) -> list[tuple[str, str]]:
    """Decode the first `count` rows of each source -> the bad ones as (row, reason).

    Raises an `InputError` if all of a source's are bad: then a column is wrong, or the files are elsewhere.
    """
    found = []
    for source in sources:
        checked, bad_rows = 0, []
        for row, values in enumerate(islice(source.rows, count)):
            checked += 1
            try:
                prompt = choose_prompt(values[source.columns.prompt], 0.0)
                original, edited = values[source.columns.original], values[source.columns.edited]
                prepare_pair(original, edited, geometry, prompt=prompt)
            except BadRow as error:
                bad_rows.append((source.row_name(row), error.reason))
        if checked == 0:
            raise InputError(f"the split {source.name!r} has no rows")
        if len(bad_rows) == checked:
            raise too_many_bad_rows(bad_rows)
        found += bad_rows
    return found


class BadRowLimit:
    """Counts distinct bad rows and stops the run when they are too many.

    `limit` below 1 is a fraction of `num_rows`, from 1 on a number of rows. Of a stream (`num_rows` None) the fraction
    is of the rows drawn so far, at least 1000.
    """

    def __init__(self, limit: float, num_rows: int | None) -> None:
        if limit < 0:
            raise InputError(
                f"--max_bad_rows is {limit}; it must be 0 or more (below 1 a fraction, else a number of rows)"
            )
        self.limit = limit
        self.num_rows = num_rows
        self.reasons: dict[str, str] = {}

    def add(self, bad_rows: list[tuple[str, str]], num_drawn: int = 0) -> None:
        """Log each new bad row; raise an `InputError` over the limit. `num_drawn` counts rows drawn, for streams."""
        for row, reason in bad_rows:
            if row not in self.reasons:
                self.reasons[row] = reason
                logger.warning("skipped %s: %s (bad rows so far: %d)", row, reason, len(self.reasons))
        num_rows = max(num_drawn, MIN_STREAMED_ROWS) if self.num_rows is None else self.num_rows
        allowed = self.limit * num_rows if self.limit < 1 else self.limit
        if len(self.reasons) > allowed:
            worst = "".join(f"\n  - {row}: {reason}" for row, reason in list(self.reasons.items())[:20])
            raise InputError(
                f"{len(self.reasons)} bad rows are more than --max_bad_rows {self.limit:g} allows "
                f"({allowed:g} of {num_rows}); mend them, or raise the limit:{worst}"
            )
