"""A page on this machine where people choose the better one of two edits, without knowing which editor made it."""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from evaluation.votes import Ballot, Question
from utils.errors import InputError

PAGE = Path(__file__).with_name("vote.html")
MAX_BODY = 1000
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class VoteHandler(BaseHTTPRequestHandler):
    """GET / (the page), /question, /ratings, /image/ID/original|first|second; POST /vote {"id", "winner"}."""

    def __init__(self, ballot: Ballot, images: dict, instructions: dict[int, str], *arguments: object) -> None:
        """images: (editor or None for the original, number of the sample) -> path; instructions: by that number."""
        self._ballot, self._images, self._instructions = ballot, images, instructions
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if not self._is_local():
            return
        path = urlsplit(self.path).path
        parts = path.strip("/").split("/")
        if path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/question":
            question = self._ballot.ask()
            shown = {"id": question.id, "instruction": self._instructions[question.sample]}
            self._send_json(shown | {"votes": len(self._ballot.votes)})
        elif path == "/ratings":
            self._send_json([rating.__dict__ for rating in self._ballot.ratings()])
        elif parts[0] == "image" and len(parts) == 3 and parts[1].isdigit():
            self._send_image(self._ballot.question(int(parts[1])), parts[2])
        else:
            self._send_json({"error": "there is no such page"}, 404)

    def do_POST(self) -> None:
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/vote" or not length.isdigit() or int(length) > MAX_BODY:
            problem, status = "a vote is a short POST to /vote", 400
        else:
            problem, status = self._store(self.rfile.read(int(length)))
        self._send_json({"error": problem} if problem else {"votes": len(self._ballot.votes)}, status)

    def _store(self, body: bytes) -> tuple[str | None, int]:
        """(what is wrong with a vote, HTTP status)."""
        try:
            content = json.loads(body)
            problem = self._ballot.answer(int(content["id"]), str(content["winner"]))
        except (ValueError, TypeError, KeyError):
            problem = 'a vote is {"id": NUMBER, "winner": "first", "second" or "tie"}'
        except OSError as error:
            return f"the vote cannot be stored: {error.strerror}", 500
        return problem, 400 if problem else 200

    def _is_local(self) -> bool:
        """Refuse requests that name another host: a page of the Internet could otherwise read this one's answers."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host in LOCAL_HOSTS:
            return True
        self._send_json({"error": "this page is for this machine alone"}, 403)
        return False

    def _send_image(self, question: Question | None, side: str) -> None:
        name = {"original": None, "first": question.first, "second": question.second} if question else {}
        if side in name:
            self._send(self._images[name[side], question.sample].read_bytes(), "image/png")
        else:
            self._send_json({"error": "there is no such image"}, 404)

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a person votes beside the terminal."""


def make_vote_server(ballot: Ballot, images: dict, instructions: dict[int, str], port: int) -> ThreadingHTTPServer:
    """The server on localhost. port 0: any free one. Raises InputError where the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(VoteHandler, ballot, images, instructions))
    except OSError as error:
        raise InputError(f"--port {port} cannot be used ({error.strerror}): give another one") from error
