"""A language model behind a server with OpenAI's API (OpenAI, vLLM, llama.cpp, ...), through the `openai` package."""

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai

from data_preparation.captions.backends import Answer, ServerOptions, UsageCounter
from data_preparation.captions.prompts import SCHEMA, STOP, Question, SamplingOptions, chat_messages, legacy_prompt
from utils.errors import InputError
from utils.hub import redact

STRUCTURES = ("json_schema", "json_object", "text")  # strictest first
OPTIONAL_FIELDS = ("seed", "frequency_penalty", "temperature", "top_p")  # not supported by every server and model
MAX_REFUSALS = 20  # if all of the first requests are refused, the captions are not the reason
TEXTS_PER_REQUEST = 32  # of /v1/moderations
MAX_WAIT = 60.0  # seconds between two attempts
MAX_RETRY_AFTER = 600.0  # seconds
TEMPORARY = (408, 409, 425, 429)  # and every 5xx
PERMANENT_CODES = {"insufficient_quota", "billing_hard_limit_reached", "account_deactivated"}  # sent with 429


class RequestRefused(Exception):
    """The server refused this one request (400, 413, 422)."""


class ServerClient:
    """Sends requests, with retries; thread-safe.

    The retries of the `openai` package are off: they repeat a request after an exceeded quota, ignore a Retry-After
    above two minutes, and their waits cannot be set (--retry_wait, --requests_per_minute).
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options, self._pacer = options, RequestPacer(options.requests_per_minute)
        self._key = os.environ.get(options.api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"--api_key_env {options.api_key_env}: the key contains characters that keys cannot have")
        url = options.base_url.rstrip("/")
        try:
            self.openai = openai.OpenAI(
                base_url=url if urlsplit(url).path else f"{url}/v1",
                api_key=self._key or "none",  # without an argument the package reads OPENAI_API_KEY
                timeout=openai.Timeout(options.timeout, connect=min(10.0, options.timeout)),
                max_retries=0,
            )
        except Exception as error:  # an invalid address or proxy: its HTTP library has several types
            reason = redact(f"{type(error).__name__}: {error}", self._key)
            raise InputError(f"--base_url {options.base_url} cannot be used: {reason}") from error

    def request(self, send: Callable, body: dict, read: Callable, cancelled: threading.Event | None = None) -> Any:
        """`read(send(**body))`, repeated after temporary errors and after a ValueError of `read`.

        Raises RequestRefused; InputError if no request can succeed, or when `cancelled` is set.
        """
        cancelled, retries = cancelled or threading.Event(), self._options.retries
        headers = {} if self._key else {"Authorization": openai.omit}
        for attempt in range(retries + 1):
            self._pacer.wait_for_turn(cancelled)
            retry_after = None
            try:
                return read(send(**body, extra_headers=headers))
            except openai.APIConnectionError as error:  # includes time-outs
                cause = error.__cause__ or error
                reason = f"{type(cause).__name__}: {cause}"[:300]
            except openai.APIStatusError as error:
                reason = self._temporary_reason(error, body)
                retry_after = read_retry_after(error.response.headers.get("Retry-After"))
            except (ValueError, RecursionError) as error:  # also invalid JSON
                reason = f"incomplete answer ({error})"
            if attempt < retries and retry_after:  # 0 says nothing: without a wait, all attempts would be used at once
                self._pacer.hold_all(retry_after)
            elif attempt < retries:  # jitter, so that the threads do not all return at once
                wait = min(MAX_WAIT, self._options.retry_wait * 2**attempt) * random.uniform(0.5, 1.0)
                _sleep(wait, cancelled)
        raise InputError(
            f"--base_url {self._options.base_url}: no answer after {retries + 1} attempts; last error: "
            f"{redact(reason, self._key)}. Finished shards are kept: run the same command again to resume. If the "
            "server is slow, use a higher --retries or --timeout, or a lower --concurrency"
        )

    def _temporary_reason(self, error: openai.APIStatusError, body: dict) -> str:
        """The error as text if another attempt can help. Otherwise raises RequestRefused or InputError."""
        status, options = error.status_code, self._options
        reason = f"{status} {redact(_error_message(error), self._key)}"
        if status >= 500 or (status in TEMPORARY and (error.code or error.type) not in PERMANENT_CODES):
            return reason
        if status in (401, 403):
            problem = "rejects the key" if self._key else "needs a key, and the variable is not set"
            raise InputError(f"--api_key_env {options.api_key_env}: {options.base_url} {problem}: {reason}")
        if status in (400, 413, 422):
            raise RequestRefused(reason)
        model = f", --model {body['model']}" if "model" in body else ""
        raise InputError(f"--base_url {options.base_url}{model}: the server refused the request: {reason}")


class RequestPacer:
    """Decides when each request of all threads may start."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._lock, self._not_before = threading.Lock(), 0.0

    def wait_for_turn(self, cancelled: threading.Event) -> None:
        """Space the requests evenly. Raises InputError when `cancelled` is set."""
        with self._lock:
            start = max(time.monotonic(), self._not_before)
            self._not_before = start + self._interval
        _sleep(start - time.monotonic(), cancelled)

    def hold_all(self, seconds: float) -> None:
        """Start no request for so long: a Retry-After concerns all threads."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)


@dataclass(frozen=True)
class RequestFormat:
    """What the server supports. structure: how JSON is requested; limit_name: the field that holds --max_tokens."""

    structure: str
    limit_name: str = "max_tokens"
    omitted: tuple[str, ...] = ()


class ServerBackend:
    """A `Backend`. Creating it sends one request, so that a wrong address, key or model name fails early."""

    def __init__(self, options: ServerOptions, sampling: SamplingOptions) -> None:
        self.usage, self._client = UsageCounter(), ServerClient(options)
        self._options, self._is_legacy = options, sampling.format == "legacy"
        self._flag = f"--base_url {options.base_url}"
        self._answered = self._refused = 0
        answered_by = self._negotiate(sampling)
        # A name such as gpt-4o-mini stands for different versions over time; servers return the exact one.
        revision = answered_by if isinstance(answered_by, str) and answered_by != options.model else None
        self.model = {"id": options.model, "revision": revision}
        self.style = {"structure": self._format.structure, "left_out": list(self._format.omitted)}

    def answer(self, questions: Sequence[Question], sampling: SamplingOptions) -> list[Answer]:
        """Sends up to `concurrency` requests at a time. The first error cancels the others."""
        cancelled, errors = threading.Event(), []

        def answer_one(question: Question) -> Answer:
            try:
                return self._answer(question, sampling, cancelled)
            except InputError as error:
                errors.append(error)
                cancelled.set()
                raise errors[0] from None

        pool = ThreadPoolExecutor(self._options.concurrency)
        try:
            return list(pool.map(answer_one, questions))
        finally:  # also after Ctrl-C
            cancelled.set()
            pool.shutdown(cancel_futures=True)

    def moderate(self, texts: Sequence[str]) -> list[bool]:
        """Whether the server's moderation endpoint flags each text."""
        flagged: list[bool] = []
        for start in range(0, len(texts), TEXTS_PER_REQUEST):
            part = list(texts[start : start + TEXTS_PER_REQUEST])
            send, read = self._client.openai.moderations.create, partial(_read_flags, count=len(part))
            try:
                flagged += self._client.request(send, {"input": part}, read)
            except RequestRefused as refusal:
                raise InputError(f"--moderation server: the server refused {len(part)} texts: {refusal}") from refusal
        return flagged

    def _negotiate(self, sampling: SamplingOptions) -> Any:
        """Find out with one caption which request format the server supports. Returns the name of its model."""
        structure = "text" if self._is_legacy else self._options.structure
        self._format = RequestFormat(STRUCTURES[0] if structure == "auto" else structure)
        while True:
            try:
                return self._send(Question("a boat on a lake", 0), sampling, None)[1]
            except RequestRefused as refusal:
                simpler = simplify_format(self._format, str(refusal), keeps_structure=structure != "auto")
                if simpler is None:
                    raise InputError(f"{self._flag}: the server refused a simple request: {refusal}") from None
                self._format = simpler

    def _answer(self, question: Question, sampling: SamplingOptions, cancelled: threading.Event) -> Answer:
        try:
            answer, _ = self._send(question, sampling, cancelled)
        except RequestRefused as refusal:
            self._refused += 1
            if self._refused >= MAX_REFUSALS and not self._answered:
                raise InputError(f"{self._flag}: the server refused the first captions: {refusal}") from None
            return Answer(refusal=str(refusal))
        self._answered += 1
        return answer

    def _send(self, question: Question, sampling: SamplingOptions, cancelled: threading.Event | None) -> tuple:
        """(answer, name of the model that gave it)."""
        endpoint = self._client.openai.completions if self._is_legacy else self._client.openai.chat.completions
        return self._client.request(endpoint.create, self._body(question, sampling), self._read, cancelled)

    def _body(self, question: Question, sampling: SamplingOptions) -> dict[str, Any]:
        """Arguments of the `openai` package's `create`."""
        body = {
            "model": self._options.model,
            "seed": question.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "frequency_penalty": sampling.frequency_penalty,
            "extra_body": {self._format.limit_name: sampling.max_tokens},
        }
        if self._is_legacy:
            body |= {"prompt": legacy_prompt(question.caption), "stop": [STOP], "presence_penalty": 0}
        else:
            body["messages"] = chat_messages(question, sampling.num_examples)
        if self._format.structure == "json_schema":
            schema = {"name": "edited_caption", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self._format.structure == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {name: value for name, value in body.items() if name not in self._format.omitted}

    def _read(self, completion: Any) -> tuple[Answer, Any]:
        """As `_send`. Raises ValueError: the `openai` package does not validate what servers send."""
        try:
            choice = completion.choices[0]
            text = choice.text if self._is_legacy else choice.message.content or ""
            refusal = None if self._is_legacy else choice.message.refusal
        except (AttributeError, LookupError, TypeError):
            raise ValueError("no choices") from None
        if not isinstance(text, str):
            raise ValueError("no text")
        usage = getattr(completion, "usage", None)
        counts = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
        self.usage.add(*(count if isinstance(count, int) else 0 for count in counts))
        is_finished = getattr(choice, "finish_reason", None) in ("stop", None)
        answer = Answer(refusal=str(refusal)) if refusal else Answer(text, is_finished)
        return answer, getattr(completion, "model", None)


def simplify_format(request_format: RequestFormat, refusal: str, keeps_structure: bool) -> RequestFormat | None:
    """Without the field that the refusal names, or else with a looser structure. None: nothing is left to change."""
    if "max_completion_tokens" in refusal and request_format.limit_name != "max_completion_tokens":
        return replace(request_format, limit_name="max_completion_tokens")
    for name in OPTIONAL_FIELDS:
        if name in refusal and name not in request_format.omitted:
            return replace(request_format, omitted=(*request_format.omitted, name))
    if keeps_structure or request_format.structure == STRUCTURES[-1]:
        return None
    return replace(request_format, structure=STRUCTURES[STRUCTURES.index(request_format.structure) + 1])


def read_retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date; None if it is missing or invalid."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError, AttributeError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _sleep(seconds: float, cancelled: threading.Event) -> None:
    if cancelled.wait(max(0.0, seconds)):
        raise InputError("cancelled, because another request failed")


def _error_message(error: openai.APIStatusError) -> str:
    """The message of an error response, in any of the forms that servers use."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or json.dumps(body)
    return str(body or error.response.reason_phrase)[:300]


def _read_flags(response: Any, count: int) -> list[bool]:
    try:
        flags = [bool(result.flagged) for result in response.results]
    except (AttributeError, TypeError):
        flags = []
    if len(flags) != count:
        raise ValueError("no result for each text")
    return flags
