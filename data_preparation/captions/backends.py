"""The common interface of language models on this machine and behind a server, and a log of the tokens they used."""

import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from data_preparation.captions.prompts import PARSERS, Question, Rejected, SamplingOptions, Triple


class Answer(NamedTuple):
    """is_finished: the model ended the text by itself; refusal: why there is no text, or None."""

    text: str = ""
    is_finished: bool = True
    refusal: str | None = None


class UsageCounter:
    """A thread-safe count of "requests", "tokens_in" and "tokens_out"."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter()

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """Count one request."""
        with self._lock:
            self._counts.update(requests=1, tokens_in=tokens_in, tokens_out=tokens_out)

    def take(self) -> Counter[str]:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts


SHOWN = 200  # characters of a rejected answer


@dataclass(frozen=True)
class LocalModelOptions:
    """A model in transformers' format. device: "auto" is the best device; several workers share the GPUs."""

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class ServerOptions:
    """A model behind a server with OpenAI's API. Holds the name of the key's environment variable, never the key.

    structure: how JSON is requested, or "auto"; timeout: seconds without data; retries: further attempts of a request;
    retry_wait: seconds before the first of them, doubled for each further one; requests_per_minute: None for no limit;
    concurrency: simultaneous requests.
    """

    base_url: str
    model: str
    structure: str = "auto"
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 6
    retry_wait: float = 1.0
    requests_per_minute: float | None = None
    concurrency: int = 8


ModelOptions = LocalModelOptions | ServerOptions


class Backend(Protocol):
    """model: {"id", "revision"}; style: how questions are put, apart from the sampling. Both are stored in each row."""

    model: dict
    style: dict
    usage: UsageCounter

    def answer(self, questions: Sequence[Question], sampling: SamplingOptions) -> list[Answer]:
        """One answer for each question, in order. sampling: of the same format as when the backend was opened.

        Raises InputError if the model cannot be used at all.
        """


def ask_model(backend: Backend, questions: Sequence[Question], sampling: SamplingOptions) -> list[Triple | Rejected]:
    """The parsed answers, in the order of the questions. Raises InputError if the model cannot be used at all."""
    parse, results = PARSERS[sampling.format], []
    for question, answer in zip(questions, backend.answer(questions, sampling), strict=True):
        result = parse(question.caption, answer.text, answer.is_finished)
        if answer.refusal:
            result = Rejected("refused by the server", answer.refusal)
        elif isinstance(result, Rejected) and not result.detail:
            result = Rejected(result.reason, " ".join(answer.text.split())[:SHOWN])  # to look at
        results.append(result)
    return results


class UsageLog:
    """A file to which any number of processes append what they used, also for rejected answers and killed runs."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._total = path, 0, Counter()

    def append(self, usage: Counter[str]) -> None:
        """Write one line at once, so that lines of several processes do not mix.

        Does nothing if the folder does not exist, as on another machine of a Ray cluster.
        """
        if usage["requests"] and self._path.parent.is_dir():
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, (json.dumps(usage) + "\n").encode())
            finally:
                os.close(file)

    def total(self) -> Counter[str]:
        """The sum of all lines; each line is read once."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._position)
                lines = file.read()
            self._position += len(lines)
            for line in lines.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line cut by a crash of the machine
                    usage = json.loads(line)
                    self._total.update({name: int(usage[name]) for name in ("requests", "tokens_in", "tokens_out")})
        return self._total.copy()


def describe_token_cost(usage: Counter[str], price_in: float | None, price_out: float | None) -> str:
    """Requests, tokens, and the cost if a price per million tokens is given."""
    text = f"{usage['requests']:,} requests, {usage['tokens_in']:,} tokens in and {usage['tokens_out']:,} out"
    if price_in is None and price_out is None:
        return text
    cost = (usage["tokens_in"] * (price_in or 0) + usage["tokens_out"] * (price_out or 0)) / 1e6
    return f"{text}, cost {cost:,.4f}" if cost < 1 else f"{text}, cost {cost:,.2f}"
