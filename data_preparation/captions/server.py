"""A language model behind a server with OpenAI's API, with whatever part of that API the server knows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from data_preparation.captions.backend import Answer, Usage
from data_preparation.captions.client import Client, Refusal, Server
from data_preparation.captions.prompts import SCHEMA, Ask, Sampling, chat_messages, legacy_prompt
from utils.errors import InputError

STRUCTURES = ("json_schema", "json_object", "text")  # from the strictest on
OPTIONAL = ("seed", "frequency_penalty", "temperature", "top_p")  # what some servers and models do not take
MAX_REFUSALS = 20  # of the first requests: then it is not the captions

Given, Gained = TypeVar("Given"), TypeVar("Gained")


@dataclass(frozen=True)
class Dialect:
    """What a server takes: how the answer's form is asked for, what the limit is called, what is left out."""

    structure: str = "json_schema"
    limit_name: str = "max_tokens"
    left_out: tuple[str, ...] = ()


class ServedModel:
    """A `Backend`. structure: "auto" asks for what the server takes, from a JSON schema down to plain text.

    Opening it asks one question, so that a wrong address, key or name of a model is told before any work.
    """

    def __init__(self, server: Server, model: str, sampling: Sampling, structure: str = "auto") -> None:
        self.usage, self.client = Usage(), Client(server)
        self._name, self._sampling, self._concurrency = model, sampling, server.concurrency
        self._is_legacy = sampling.format == "legacy"
        fixed = "text" if self._is_legacy else None if structure == "auto" else structure
        self.dialect, said = self._negotiate(fixed)
        # Servers take a name such as gpt-4o-mini for whatever it stands for today, and say which that was.
        said = said.get("model")
        self.model = {"id": model, "revision": said if isinstance(said, str) and said != model else None}
        self.style = {"structure": self.dialect.structure, "left_out": list(self.dialect.left_out)}
        self._answered = self._refused = 0

    def with_sampling(self, sampling: Sampling) -> ServedModel:
        """The same model, asked in another way; of the same format."""
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        return list(self.map(self._answer, asks))

    def map(self, function: Callable[[Given], Gained], values: Iterable[Given]) -> list[Gained]:
        """As many at once as --concurrency says. The first error ends them all."""
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            return list(pool.map(function, values))
        except BaseException:
            self.client.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.client.start()

    def _answer(self, ask: Ask) -> Answer:
        try:
            said = self._post(ask, self.dialect)
        except Refusal as refusal:
            self._refused += 1
            if self._refused >= MAX_REFUSALS and not self._answered:
                raise InputError(f"the server refused the first {self._refused} captions: {refusal}") from None
            return Answer(refusal=str(refusal))
        self._answered += 1
        self.usage.add(*count_usage(said))
        choice = said["choices"][0]
        if not self._is_legacy and choice["message"].get("refusal"):
            return Answer(refusal=str(choice["message"]["refusal"]))
        text = choice["text"] if self._is_legacy else choice["message"].get("content") or ""
        return Answer(text, choice.get("finish_reason") in ("stop", None))

    def _post(self, ask: Ask, dialect: Dialect) -> dict:
        kind = "completions" if self._is_legacy else "chat/completions"
        return self.client.post(kind, self._body(ask, dialect), self._find_fault)

    def _body(self, ask: Ask, dialect: Dialect) -> dict[str, Any]:
        sampling = self._sampling
        body = {
            "model": self._name,
            "seed": ask.seed,
            dialect.limit_name: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "frequency_penalty": sampling.frequency_penalty,
        }
        if self._is_legacy:
            body |= {"prompt": legacy_prompt(ask), "stop": sampling.stop, "presence_penalty": 0}
        else:
            body["messages"] = chat_messages(ask, sampling.num_examples)
        if dialect.structure == "json_schema":
            schema = {"name": "edited_caption", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.structure == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {name: value for name, value in body.items() if name not in dialect.left_out}

    def _find_fault(self, said: dict) -> str | None:
        choices = said.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            return "no choices"
        if self._is_legacy:
            return None if isinstance(choices[0].get("text"), str) else "a choice without text"
        message = choices[0].get("message")
        is_text = isinstance(message, dict) and isinstance(message.get("content"), str | None)
        return None if is_text else "a choice without message"

    def _negotiate(self, structure: str | None) -> tuple[Dialect, dict]:
        """What the server takes, found with one caption, and its answer to that."""
        dialect = Dialect(structure or STRUCTURES[0])
        while True:
            try:
                said = self._post(Ask("a boat on a lake", 0), dialect)
                self.usage.add(*count_usage(said))
                return dialect, said
            except Refusal as refusal:
                simpler = simplify(dialect, str(refusal), structure is not None)
                if simpler is None:
                    raise InputError(f"the server refused a simple request: {refusal}") from None
                dialect = simpler


def simplify(dialect: Dialect, refusal: str, keeps_structure: bool) -> Dialect | None:
    """The dialect without what the server named in its refusal, else with a looser form of answer; None: at the end."""
    if "max_completion_tokens" in refusal and dialect.limit_name != "max_completion_tokens":
        return replace(dialect, limit_name="max_completion_tokens")
    for name in OPTIONAL:
        if name in refusal and name not in dialect.left_out:
            return replace(dialect, left_out=(*dialect.left_out, name))
    if keeps_structure or dialect.structure == STRUCTURES[-1]:
        return None
    return replace(dialect, structure=STRUCTURES[STRUCTURES.index(dialect.structure) + 1])


def count_usage(said: dict) -> tuple[int, int]:
    """Tokens (in, out) that an answer has cost; 0 where the server does not say."""
    usage = said.get("usage") if isinstance(said.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return tuple(int(count) if isinstance(count, (int, float)) and math.isfinite(count) else 0 for count in counts)
