"""Micro-batches from a stream (`--streaming`): the draw is the position in the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import fsspec.asyn
from torch.utils.data import IterableDataset, get_worker_info

from utils.data.geometry import Geometry
from utils.data.samples import MAX_CONSECUTIVE_BAD_ROWS, SampleSettings, collate, make_sample, too_many_bad_rows
from utils.data.sources import Source
from utils.errors import InputError
from utils.pixels import BadRow

SHUFFLE_BUFFER = 1000


def check_streamable(sources: list[Source], geometry: Geometry) -> None:
    """Refuse what needs to know the rows beforehand."""
    problems = []
    if len(sources) > 1:
        problems.append("--streaming reads one dataset; for --train_mix, drop --streaming")
    if geometry.resize_mode == "bucket":
        problems.append("--resize_mode bucket needs the size of every image beforehand, which --streaming cannot know")
    if problems:
        raise InputError.from_problems(problems)


class StreamedBatches(IterableDataset):
    """Micro-batches of one rank, without end, from `start_batch` on.

    Every rank reads the whole stream and decodes its own draws. One process reads, and `num_threads` threads in it
    decode (Pillow releases the interpreter lock), so that the batches do not depend on their number. Rows before
    `start_batch` are only read. A bad row is replaced by the next good one of the stream, its draw unchanged.
    """

    def __init__(
        self,
        source: Source,
        settings: SampleSettings,
        batch_size: int,
        rank: int,
        world_size: int,
        start_batch: int,
        num_threads: int,
    ) -> None:
        self.source, self.settings = source, settings
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.global_batch_size = batch_size * world_size
        self.num_threads = max(num_threads, 1)

    def __iter__(self) -> Iterator[dict | InputError]:
        try:
            yield from self._batches()
        except InputError as error:
            yield error  # raised by BatchLoader

    def _batches(self) -> Iterator[dict]:
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # the lock of remote files came along from the process that was forked
        window = _Window(self._endless_rows())
        window.skip(self.start_batch * self.global_batch_size)
        with ThreadPoolExecutor(self.num_threads) as threads:
            for batch in count(self.start_batch):
                first = batch * self.global_batch_size
                rows = [(draw, window.row(draw)) for draw in range(first, first + self.global_batch_size)]
                attempts = list(threads.map(self._try, *zip(*rows[self.rank :: self.world_size], strict=True)))
                draws = [draw for draw, _ in rows[self.rank :: self.world_size]]
                yield self._mend(draws, attempts, window)
                window.drop_before(first + self.global_batch_size)

    def _endless_rows(self) -> Iterator[dict]:
        """All passes through the stream, each in its own shuffled order."""
        shuffled = self.source.rows.shuffle(seed=self.settings.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in count():
            shuffled.set_epoch(epoch)
            is_empty = True
            # Not `for row in shuffled`: inside a worker, datasets would deal its shards out among the workers and
            # shuffle in another order than without one.
            for rows in shuffled.iter(batch_size=1):
                is_empty = False
                yield {name: values[0] for name, values in rows.items()}
            if is_empty:
                raise InputError(f"the stream of the split {self.source.name!r} has no rows")

    def _try(self, draw: int, row: dict) -> dict | BadRow:
        try:
            return make_sample(row, self.source, draw, self.settings)
        except BadRow as error:
            return error

    def _mend(self, draws: list[int], attempts: list[dict | BadRow], window: _Window) -> dict:
        """Replace the bad rows among the attempts and collate."""
        bad_rows: list[tuple[str, str]] = []
        samples, positions = [], []
        for draw, sample in zip(draws, attempts, strict=True):
            position = draw
            while isinstance(sample, BadRow):
                bad_rows.append((f"{self.source.name}[stream {position}]", sample.reason))
                position += 1
                if position - draw >= MAX_CONSECUTIVE_BAD_ROWS:
                    raise too_many_bad_rows(bad_rows[-MAX_CONSECUTIVE_BAD_ROWS:])
                sample = self._try(draw, window.row(position))
            samples.append(sample)
            positions.append(position)
        return collate(samples, [f"{self.source.name}[stream {position}]" for position in positions], bad_rows)


class _Window:
    """The rows of a stream between the oldest that is still needed and the furthest that was looked at."""

    def __init__(self, rows: Iterator[dict]) -> None:
        self._rows = rows
        self._first = 0
        self._kept: deque[dict] = deque()

    def row(self, position: int) -> dict:
        while self._first + len(self._kept) <= position:
            self._kept.append(next(self._rows))
        return self._kept[position - self._first]

    def drop_before(self, position: int) -> None:
        while self._first < position:
            self._kept.popleft() if self._kept else next(self._rows)
            self._first += 1

    skip = drop_before
