"""A small server with OpenAI's API on this machine: it answers by a rule, and its faults are a script.

    python -m tests.chat_server --port 8000

answers captions by a rule (no model runs), so that the scripts can be tried without one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

EDITS = (
    ("make it winter", "{} in deep snow"),
    ("turn it into an oil painting", "an oil painting of {}"),
    ("let it be night", "{} at night"),
    ("set it on fire", "{} on fire"),
    ("bring in a thunderstorm", "{} under dark thunderclouds"),
    ("build it of glass", "{} made of glass"),
    ("as a pencil drawing", "a pencil drawing of {}"),
    ("move the scene to the moon", "{} on the moon"),
)


class Fault(NamedTuple):
    """One answer that is not as it should be. kind: status, garbage, no choices, cut, slow, or gone."""

    kind: str
    status: int = 500
    headers: dict = {}
    body: Any = None


class Request(NamedTuple):
    path: str
    body: dict
    authorization: str | None
    time: float


@dataclass
class ChatServer:
    """faults: taken one by one by the next requests, before any answer; say: what to answer, (caption, body) -> text.

    refused: names of request fields that are refused with 400; key: what the Authorization header must hold.
    """

    say: Callable[[str, dict], str] | None = None
    key: str | None = None
    refused: set[str] = field(default_factory=set)
    structures: set[str] = field(default_factory=lambda: {"json_schema", "json_object"})
    faults: deque[Fault] = field(default_factory=deque)
    flagged: set[str] = field(default_factory=set)
    finish_reason: str = "stop"
    delay: float = 0.0
    requests: list[Request] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, kind: str = "completions") -> list[dict]:
        """Bodies of the requests to an endpoint."""
        return [request.body for request in self.requests if request.path.endswith(kind)]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": "invalid_request", "code": code}}


def speak(caption: str, body: dict) -> str:
    """An answer that depends on the caption and the seed alone, in the format that is asked for."""
    draw = hashlib.sha256(f"{caption} {body.get('seed')}".encode()).digest()[0]
    edit, output = EDITS[draw % len(EDITS)]
    if "prompt" in body:
        return f"{edit}\n%%\n{output.format(caption)}"
    return json.dumps({"edit": edit, "output": output.format(caption)})


def chat(server: ChatServer, body: dict) -> dict:
    structure = (body.get("response_format") or {}).get("type", "text")
    if structure not in (*server.structures, "text"):
        raise Refused(400, f"response_format.type {structure!r} is not supported")
    caption = body["messages"][-1]["content"].removeprefix("Caption: ")
    message = {"role": "assistant", "content": (server.say or speak)(caption, body)}
    return complete(server, body, {"message": message}, str(body["messages"]))


def continue_text(server: ChatServer, body: dict) -> dict:
    caption = body["prompt"].removesuffix("\n##\n")
    return complete(server, body, {"text": (server.say or speak)(caption, body)}, body["prompt"])


def complete(server: ChatServer, body: dict, choice: dict, prompt: str) -> dict:
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(str(choice).split())}
    choices = [{"index": 0, "finish_reason": server.finish_reason, **choice}]
    return {"id": "answer", "model": f"{body['model']}-2026-01", "choices": choices, "usage": usage}


def moderate(server: ChatServer, body: dict) -> dict:
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    return {"results": [{"flagged": any(word in text for word in server.flagged)} for text in texts]}


ENDPOINTS = {"/v1/chat/completions": chat, "/v1/completions": continue_text, "/v1/moderations": moderate}


class Handler(BaseHTTPRequestHandler):
    server_state: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "echo", "object": "model"}]}
        self.send(*((200, models) if self.path == "/v1/models" else (404, {"error": {"message": "no such page"}})))

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append(Request(self.path, body, self.headers["Authorization"], time.monotonic()))
            fault = state.faults.popleft() if state.faults else None
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            time.sleep(state.delay)
            if fault is not None:
                return self.fail(fault)
            return self.send(200, self.answer(body))
        except Refused as refusal:
            return self.send(refusal.status, refusal.body)
        finally:
            with state.lock:
                state.at_once -= 1

    def answer(self, body: dict) -> dict:
        state = self.server_state
        if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
            raise Refused(401, f"Incorrect API key provided: {self.headers['Authorization']}", "invalid_api_key")
        for name in sorted(state.refused & body.keys()):
            hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            raise Refused(400, f"Unsupported parameter: '{name}'.{hint}")
        if self.path not in ENDPOINTS:
            raise Refused(404, f"no endpoint {self.path}")
        if body.get("model", "echo") == "unknown":
            raise Refused(404, "The model `unknown` does not exist", "model_not_found")
        return ENDPOINTS[self.path](state, body)

    def fail(self, fault: Fault) -> None:
        if fault.kind == "status":
            return self.send(fault.status, fault.body or {"error": {"message": "come back later"}}, fault.headers)
        if fault.kind == "slow":
            time.sleep(float(fault.body))
            return self.send(200, {})
        if fault.kind == "gone":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault.kind == "no choices":
            return self.send(200, {"choices": []})
        if fault.kind == "garbage":
            return self.send(200, fault.body or b'{"choices": [{"mess')
        whole = b'{"choices": [{"message": {"content": "half of it"}}]}'
        self.send(200, whole[:20], {"Content-Length": str(len(whole))})  # cut
        self.close_connection = True
        return None

    def send(self, status: int, body: Any, headers: dict | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has gone, as after a time-out

    def log_message(self, *_: object) -> None:
        """Silent: the tests read `requests`."""


@contextmanager
def chat_server(port: int = 0, **settings: Any) -> Iterator[ChatServer]:
    """A server that lives as long as the context."""
    state = ChatServer(**settings)
    handler = type("BoundHandler", (Handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    given = parser.parse_args()
    with chat_server(given.port, delay=given.delay) as served:
        print(f"--base_url {served.url} --model echo; Ctrl-C stops", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")
