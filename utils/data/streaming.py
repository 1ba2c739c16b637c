"""Micro-batches from a streamed dataset (`--streaming`): the draw is the position in the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
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
    """Raise InputError for options that need to know all rows beforehand."""
    problems = []
    if len(sources) > 1:
        problems.append("--streaming reads one dataset; drop it to use --train_mix")
    if geometry.resize_mode == "bucket":
        problems.append("--resize_mode bucket needs the size of every image beforehand, which --streaming cannot know")
    if problems:
        raise InputError.from_problems(problems)


@dataclass(eq=False)
class StreamedBatches(IterableDataset):
    """One rank's micro-batches, endlessly, starting at `start_batch`.

    Every rank reads the whole stream and decodes its own draws. One process reads, and `num_threads` threads decode
    (Pillow releases the interpreter lock): the batches do not depend on their number. Rows before `start_batch` are
    read but not decoded. The next good row of the stream replaces a bad row; the draw stays the same.
    """

    source: Source
    settings: SampleSettings
    batch_size: int
    rank: int
    world_size: int
    start_batch: int
    num_threads: int

    def __iter__(self) -> Iterator[dict | InputError]:
        try:
            yield from self._batches()
        except InputError as error:
            yield error  # raised by BatchLoader

    def _batches(self) -> Iterator[dict]:
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # it was copied from the forked process
        size = self.batch_size * self.world_size
        # A parquet file that is still being read when Python ends hangs or aborts the process (apache/arrow#45214).
        with closing(self._endless_rows()) as rows, ThreadPoolExecutor(max(self.num_threads, 1)) as threads:
            window = _Window(rows)
            for batch in count(self.start_batch):
                window.drop_before(batch * size)
                draws = range(batch * size, (batch + 1) * size)[self.rank :: self.world_size]
                samples = list(threads.map(self._try, draws, [window.row(draw) for draw in draws]))
                yield self._replace_bad_rows(draws, samples, window)

    def _endless_rows(self) -> Iterator[dict]:
        """The rows of all epochs, each shuffled differently."""
        shuffled = self.source.rows.shuffle(seed=self.settings.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in count():
            shuffled.set_epoch(epoch)
            is_empty = True
            # Not `for row in shuffled`: inside a worker, datasets would split its shards among the workers, and the
            # order would depend on their number.
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

    def _replace_bad_rows(self, draws: Sequence[int], samples: list[dict | BadRow], window: _Window) -> dict:
        """Try the next rows in place of the bad ones, and collate."""
        good, names, bad_rows = [], [], []
        for draw, sample in zip(draws, samples, strict=True):
            position = draw
            while isinstance(sample, BadRow):
                bad_rows.append((f"{self.source.name}[stream {position}]", sample.reason))
                position += 1
                if position - draw >= MAX_CONSECUTIVE_BAD_ROWS:
                    raise too_many_bad_rows(bad_rows[-MAX_CONSECUTIVE_BAD_ROWS:])
                sample = self._try(draw, window.row(position))
            good.append(sample)
            names.append(f"{self.source.name}[stream {position}]")
        return collate(good, names, bad_rows)


class _Window:
    """The rows of a stream from the oldest one still needed to the furthest one read."""

    def __init__(self, rows: Iterator[dict]) -> None:
        self._rows, self._first = rows, 0
        self._kept: deque[dict] = deque()

    def row(self, position: int) -> dict:
        while self._first + len(self._kept) <= position:
            self._kept.append(next(self._rows))
        return self._kept[position - self._first]

    def drop_before(self, position: int) -> None:
        while self._first < position:
            self._kept.popleft() if self._kept else next(self._rows)
            self._first += 1
