"""What every language model behind these scripts does: answer a list of questions, and count what that took."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from data_preparation.captions.prompts import Ask, Sampling


class Answer(NamedTuple):
    """What a model has said. is_finished: it ended by itself; refusal: why it said nothing, where it did not."""

    text: str = ""
    is_finished: bool = True
    refusal: str | None = None


@dataclass
class Usage:
    """Requests and tokens so far; added to from many threads."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, tokens_in: int, tokens_out: int) -> None:
        with self._lock:
            self.requests += 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def take(self) -> dict[str, int]:
        """What was added since the last call."""
        with self._lock:
            taken = {name: getattr(self, name) for name in ("requests", "tokens_in", "tokens_out")}
            self.requests = self.tokens_in = self.tokens_out = 0
        return taken


class Backend(Protocol):
    """model: {"id", "revision"}; style: how it is asked, beyond the sampling, as is kept with each row."""

    model: dict
    style: dict
    usage: Usage

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer for each question, in order. Raises InputError for what no question can do without."""

    def with_sampling(self, sampling: Sampling) -> Backend:
        """The same model, asked in another way; of the same format."""


@dataclass(frozen=True)
class LocalModel:
    """Which model, and how it runs. device: "auto" is the best there is, and each worker's own of several GPUs."""

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 8
