"""One edit at a time on one device: whoever comes waits in a line, and may leave it, or stop, at any step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import InputError


class Stopped(Exception):
    """An edit that ends before its last step; the text says why, for the one who asked for it."""


class Ticket:
    """One edit's place in the line. `stop` may be called from any thread, at any time, more than once."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._deadline = timeout, float("inf")
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def start_clock(self) -> None:
        """The timeout counts from an edit's turn: nobody loses time to those before them."""
        self._deadline = time.monotonic() + self._timeout

    def check(self) -> None:
        """Raise `Stopped` when the edit was stopped or has had its time."""
        if self._stopped.is_set():
            raise Stopped("Stopped.")
        if time.monotonic() > self._deadline:
            raise Stopped(
                f"Stopped after {self._timeout:g} seconds, the most that an edit may take here: "
                "ask for fewer steps or fewer images."
            )


class Turns:
    """The line before one device. A line that has become too long turns newcomers away at once."""

    def __init__(self, timeout: float, most_waiting: int) -> None:
        self._timeout, self._most_waiting = timeout, most_waiting
        self._line: deque[Ticket] = deque()  # the first has its turn
        self._moved = threading.Condition()

    def join(self) -> Ticket:
        """A ticket at the end of the line. Raises InputError when the line is full."""
        with self._moved:
            if len(self._line) > self._most_waiting:
                raise InputError(f"{len(self._line)} edits are waiting already: try again in a while")
            self._line.append(Ticket(self._timeout))
            return self._line[-1]

    def wait(self, ticket: Ticket, seconds: float) -> int:
        """How many are before a ticket, after at most so many seconds; 0 means that its turn has come."""
        with self._moved:
            if place := self._line.index(ticket):
                self._moved.wait(seconds)
                place = self._line.index(ticket)
            return place

    @contextmanager
    def leaving(self, ticket: Ticket) -> Iterator[None]:
        """Whatever happens inside, the line moves on after it."""
        try:
            yield
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()

    def stop_all(self) -> None:
        with self._moved:
            for ticket in self._line:
                ticket.stop()
