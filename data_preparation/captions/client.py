"""A small client for any server with OpenAI's API (OpenAI, vLLM, llama.cpp, ...): patient, and careful with its key."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import requests

from utils.errors import InputError

MAX_WAIT = 60.0  # seconds between two tries
MAX_RETRY_AFTER = 600.0  # seconds that a server may ask us to wait
PASSING = (408, 409, 425, 429)  # what may be otherwise in a moment, beside every 5xx
FOR_GOOD = {"insufficient_quota", "billing_hard_limit_reached", "account_deactivated"}  # said with 429


class Refusal(Exception):
    """The server understood and said no (400, 413, 422) to this one request. The text is the server's, without key."""


@dataclass(frozen=True)
class Server:
    """Where a server is and how it is treated. Holds the name of the key's variable, never the key.

    retries: further tries of a request; first_wait: seconds before the first of them, doubled for each further one;
    requests_per_minute: None for no limit.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 6
    first_wait: float = 1.0
    requests_per_minute: float | None = None
    concurrency: int = 8


class Client:
    """Posts JSON and returns JSON; used from many threads at once. Raises `Refusal`, or InputError when all is lost."""

    def __init__(self, server: Server) -> None:
        self._server, self._root = server, api_root(server.base_url)
        self._key = os.environ.get(server.api_key_env) or None
        self._threads, self._lock, self._not_before = threading.local(), threading.Lock(), 0.0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the tries of all threads; what waits does not wait on."""
        self._stopped.set()

    def start(self) -> None:
        """Take requests again after `stop`."""
        self._stopped.clear()

    def post(self, path: str, body: dict, find_fault: Callable[[dict], str | None] = lambda answer: None) -> dict:
        """The answer to a request, tried again while that can help. find_fault: what an answer lacks, if anything."""
        fault = ""
        for attempt in range(self._server.retries + 1):
            self._wait_for_turn()
            retry_after = None
            try:
                response = self._session().post(
                    f"{self._root}/{path}", json=body, timeout=(min(10.0, self._server.timeout), self._server.timeout)
                )
                answer, fault = self._read(response, path, body, find_fault)
                if answer is not None:
                    return answer
                retry_after = read_retry_after(response.headers.get("Retry-After"))
            except requests.RequestException as error:
                fault = _describe(error)
            self._hold_back(attempt, retry_after)
        raise InputError(
            f"the server at {self._root} did not answer, {self._server.retries + 1} times in a row; the last time: "
            f"{self.redact(fault)}. What is finished stands: the same command goes on from there, when the server is "
            "back (--retries, --timeout and --concurrency say how patient this is)"
        )

    def redact(self, text: str) -> str:
        """Without the key, and without what looks like one."""
        from utils.hub import redact

        return redact(text, self._key)

    def _read(
        self, response: requests.Response, path: str, body: dict, find_fault: Callable[[dict], str | None]
    ) -> tuple[dict | None, str]:
        """(answer, "") or (None, what may pass). Raises Refusal and InputError for what does not pass."""
        status = response.status_code
        if status == 200:
            try:
                answer = response.json()
                fault = find_fault(answer) if isinstance(answer, dict) else "no JSON object"
            except (ValueError, RecursionError):
                fault = f"no JSON: {response.text[:80]!r}"
            return (answer, "") if fault is None else (None, f"an answer with {fault}")
        message, code = _read_error(response)
        said = f"{status} {self.redact(message)}"
        if (status in PASSING and code not in FOR_GOOD) or status >= 500:
            return None, said
        if status in (401, 403):
            has_key = f"the key in {self._server.api_key_env}" if self._key else f"no key ({self._server.api_key_env})"
            raise InputError(f"the server at {self._root} does not accept {has_key}: {said}")
        if status in (400, 413, 422):
            raise Refusal(said)
        model = f", --model {body['model']}" if "model" in body else ""
        raise InputError(f"the server at {self._root} refused /{path}{model}: {said}")

    def _session(self) -> requests.Session:
        """One for each thread: its connection stays open."""
        if not hasattr(self._threads, "session"):
            session = self._threads.session = requests.Session()
            session.auth = self._sign  # with none at all, requests would take a login from ~/.netrc
        return self._threads.session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _wait_for_turn(self) -> None:
        """At most so many requests a minute, evenly; and none before the server wants one again."""
        with self._lock:
            start = max(time.monotonic(), self._not_before)
            if self._server.requests_per_minute:
                self._not_before = start + 60 / self._server.requests_per_minute
        if self._stopped.wait(max(0.0, start - time.monotonic())):
            raise InputError("stopped")

    def _hold_back(self, attempt: int, retry_after: float | None) -> None:
        """Doubled each time and drawn, so that many threads do not come back at one moment."""
        if attempt == self._server.retries:
            return
        if retry_after is not None:
            with self._lock:  # the server means all threads
                self._not_before = max(self._not_before, time.monotonic() + retry_after)
            return
        pause = min(MAX_WAIT, self._server.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        if self._stopped.wait(pause):
            raise InputError("stopped")


def api_root(base_url: str) -> str:
    """`base_url` without a slash at its end; `/v1` is added to a bare host, where all of these servers have it."""
    bare = base_url.rstrip("/")
    return bare if urlsplit(bare).path else f"{bare}/v1"


def find_url_problem(base_url: str) -> str | None:
    """What cannot be with an address, without showing a password in it."""
    try:
        parts = urlsplit(base_url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return "--base_url is no http(s) address, such as http://127.0.0.1:8000/v1"
    if parts.username or parts.password or parts.query:
        return "--base_url holds a login or a query: put the key into the environment variable named by --api_key_env"
    return None if is_http else f"--base_url {base_url}: must be an http(s) address, such as http://127.0.0.1:8000/v1"


def read_retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None where the header says nothing that can be used."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError, AttributeError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if seconds == seconds else None


def _read_error(response: requests.Response) -> tuple[str, str | None]:
    """(message, code) of an error, in any of the shapes that servers give it."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return response.text.strip()[:200] or response.reason or "", None
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or json.dumps(error)[:300]
        code = error.get("code") or error.get("type")
        return str(message)[:300], code if isinstance(code, str) else None
    return str(error)[:300], None


def _describe(error: requests.RequestException) -> str:
    """The cause at the end of a chain such as `HTTPConnectionPool(...): ...: [Errno 111] Connection refused`."""
    cause = str(error).rsplit(": ", 1)[-1].strip("'\"() ")
    return f"{type(error).__name__}, {cause[:200]}"
