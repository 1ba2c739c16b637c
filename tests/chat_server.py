"""A small server with OpenAI's API that answers by a rule (no model runs) and simulates failures.

    python -m tests.chat_server --port 8000

serves the scripts of data_preparation, so that they can be tried without a model.
"""

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
    """One failing response. kind: "status", "garbage", "no choices", "cut", "slow" or "disconnect"."""

    kind: str
    status: int = 500
    headers: dict = {}
    body: Any = None


class ReceivedRequest(NamedTuple):
    path: str
    body: dict
    authorization: str | None
    time: float


@dataclass
class ChatServer:
    """The settings and the record of a running server.

    reply: (caption, body) -> text; key: required in the Authorization header; unsupported: request fields answered with
    status 400; faults: consumed by the next requests, one each.
    """

    reply: Callable[[str, dict], str] | None = None
    key: str | None = None
    unsupported: set[str] = field(default_factory=set)
    structures: set[str] = field(default_factory=lambda: {"json_schema", "json_object"})
    faults: deque[Fault] = field(default_factory=deque)
    flagged: set[str] = field(default_factory=set)
    finish_reason: str = "stop"
    delay: float = 0.0
    requests: list[ReceivedRequest] = field(default_factory=list)
    concurrency: int = 0
    max_concurrency: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def bodies(self, path_end: str = "completions") -> list[dict]:
        """Bodies of the requests to an endpoint."""
        return [request.body for request in self.requests if request.path.endswith(path_end)]


class ErrorResponse(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": "invalid_request", "code": code}}


def default_reply(caption: str, body: dict) -> str:
    """An answer in the requested format that depends only on the caption and the seed."""
    draw = hashlib.sha256(f"{caption} {body.get('seed')}".encode()).digest()[0]
    edit, output = EDITS[draw % len(EDITS)]
    if "prompt" in body:
        return f"{edit}\n%%\n{output.format(caption)}"
    return json.dumps({"edit": edit, "output": output.format(caption)})


def chat(server: ChatServer, body: dict) -> dict:
    structure = (body.get("response_format") or {}).get("type", "text")
    if structure not in (*server.structures, "text"):
        raise ErrorResponse(400, f"response_format.type {structure!r} is not supported")
    content = body["messages"][-1]["content"]
    caption = content.removeprefix("Caption: ") if isinstance(content, str) else content  # of images: a list of parts
    message = {"role": "assistant", "content": (server.reply or default_reply)(caption, body)}
    return complete(server, body, {"message": message}, str(body["messages"]))


def continue_text(server: ChatServer, body: dict) -> dict:
    caption = body["prompt"].removesuffix("\n##\n")
    return complete(server, body, {"text": (server.reply or default_reply)(caption, body)}, body["prompt"])


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
            request = ReceivedRequest(self.path, body, self.headers["Authorization"], time.monotonic())
            state.requests.append(request)
            fault = state.faults.popleft() if state.faults else None
            state.concurrency += 1
            state.max_concurrency = max(state.max_concurrency, state.concurrency)
        try:
            time.sleep(state.delay)
            if fault is not None:
                return self.fail(fault)
            return self.send(200, self.answer(body))
        except ErrorResponse as error:
            return self.send(error.status, error.body)
        finally:
            with state.lock:
                state.concurrency -= 1

    def answer(self, body: dict) -> dict:
        state = self.server_state
        if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
            raise ErrorResponse(401, f"Incorrect API key provided: {self.headers['Authorization']}", "invalid_api_key")
        for name in sorted(state.unsupported & body.keys()):
            hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            raise ErrorResponse(400, f"Unsupported parameter: '{name}'.{hint}")
        if self.path not in ENDPOINTS:
            raise ErrorResponse(404, f"no endpoint {self.path}")
        if body.get("model", "echo") == "unknown":
            raise ErrorResponse(404, "The model `unknown` does not exist", "model_not_found")
        return ENDPOINTS[self.path](state, body)

    def fail(self, fault: Fault) -> None:
        if fault.kind == "status":
            return self.send(fault.status, fault.body or {"error": {"message": "try again later"}}, fault.headers)
        if fault.kind == "slow":
            time.sleep(float(fault.body))
            return self.send(200, {})
        if fault.kind == "disconnect":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault.kind == "no choices":
            return self.send(200, {"choices": []})
        if fault.kind == "garbage":
            return self.send(200, fault.body or b'{"choices": [{"mess', fault.headers)
        body = b'{"choices": [{"message": {"content": "half of it"}}]}'
        self.send(200, body[:20], {"Content-Length": str(len(body))})  # cut
        self.close_connection = True
        return None

    def send(self, status: int, body: Any, headers: dict | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        defaults = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        try:
            self.send_response(status)
            for name, value in (defaults | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has disconnected, for example after a time-out

    def log_message(self, *_: object) -> None:
        """Logs nothing: the tests read `requests`."""


@contextmanager
def chat_server(port: int = 0, **settings: Any) -> Iterator[ChatServer]:
    """A server that runs within the context."""
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
        print(f"--base_url {served.url} --model echo; stop with Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")
