"""One request at a time on one device: the queue, its slots, and running the first one in a thread of its own."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from utils.errors import InputError

POLL_SECONDS = 0.5  # how often a waiting request checks whether it was stopped


class Stopped(Exception):
    """A request that ends before its last step; the text says why."""


@dataclass(frozen=True)
class RequestProgress:
    """A sentence for the status line, and the fraction of the request that is done."""

    text: str
    fraction: float = 0.0


class QueueSlot:
    """One request's place in the queue. `stop` may be called from any thread, at any time, more than once."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._deadline, self._clock = timeout, float("inf"), clock
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def start_clock(self) -> None:
        """The timeout starts when the request starts to run: waiting does not count."""
        self._deadline = self._clock() + self._timeout

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """The time inside does not count: loading a model can take longer than any edit."""
        start = self._clock()
        yield
        self._deadline += self._clock() - start

    def check(self) -> None:
        """Raise `Stopped` if the request was stopped or its time is over."""
        if self._stopped.is_set():
            raise Stopped("Stopped.")
        if self._clock() > self._deadline:
            raise Stopped(
                f"Stopped after {self._timeout:g} seconds, the longest time for one request: "
                "ask for fewer steps or fewer images."
            )


class RequestQueue:
    """The queue of one device. A full queue refuses new requests.

    timeout: seconds for one request, as `clock` counts them.
    """

    def __init__(self, timeout: float, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._max_waiting, self._clock = timeout, max_waiting, clock
        self._slots: deque[QueueSlot] = deque()  # the first one runs
        self._moved = threading.Condition()

    def join(self) -> QueueSlot:
        """A slot at the end of the queue. Raises InputError when the queue is full."""
        with self._moved:
            if len(self._slots) > self._max_waiting:
                raise InputError(f"{len(self._slots)} requests are waiting already: try again later")
            self._slots.append(QueueSlot(self._timeout, self._clock))
            return self._slots[-1]

    def wait(self, slot: QueueSlot, seconds: float) -> int:
        """Wait up to `seconds` and return how many requests are before a slot; 0 means that it may run."""
        with self._moved:
            if place := self._slots.index(slot):
                self._moved.wait(seconds)
                place = self._slots.index(slot)
            return place

    def leave(self, slot: QueueSlot) -> None:
        with self._moved:
            self._slots.remove(slot)
            self._moved.notify_all()

    def stop_all(self) -> None:
        with self._moved:
            for slot in self._slots:
                slot.stop()

    def run(self, slot: QueueSlot, work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
        """Wait for the slot's turn, then run `work(report)` in a thread; yields progress and whatever it reports.

        Raises what `work` raises, and `Stopped`. Closing the iterator stops the request at its next step, so that the
        queue does not wait for a visitor who has left.
        """
        events: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(slot, work, events.put), daemon=True).start()
        try:
            while (event := _latest(events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            slot.stop()

    def _run(self, slot: QueueSlot, work: Callable, report: Callable[[Any], None]) -> None:
        """The last report is None, or the exception."""
        try:
            while place := self.wait(slot, POLL_SECONDS):
                slot.check()
                report(RequestProgress(f"Waiting: {place} {'request' if place == 1 else 'requests'} before yours"))
            slot.start_clock()
            work(report)
        except BaseException as error:
            last = error
        else:
            last = None
        finally:
            self.leave(slot)
        report(last)


def _latest(events: queue.SimpleQueue) -> Any:
    """The next event, or of several progress events the last one, so that a slow browser does not lag behind."""
    event = events.get()
    while isinstance(event, RequestProgress) and not events.empty():
        event = events.get()
    return event
