"""The limit of all files that the server keeps for its visitors: uploads and edits."""

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ABANDONED_SECONDS = 3600  # after this, a file that is still being uploaded counts as abandoned
LENGTH_REQUIRED, STORAGE_FULL = 411, 507


class UploadLimit:
    """ASGI middleware that refuses an upload, before its first byte is read, for which the folder has no room.

    folder: of uploads and edits; max_bytes: of all its files. Uploads that still run count with their whole size.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, max_bytes: int) -> None:
        self._app, self._folder, self._max_bytes = app, folder, max_bytes
        self._running = 0  # bytes

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            await _refuse(send, LENGTH_REQUIRED, "An upload needs a Content-Length.")
            return
        size = int(length)
        if measure_folder(self._folder) + self._running + size > self._max_bytes:
            used = f"The uploads of all visitors may have {self._max_bytes / 2**20:g} MB together"
            await _refuse(send, STORAGE_FULL, f"{used}, and there is no room for this one: try again later.")
            return
        self._running += size
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= size


def measure_folder(folder: Path) -> int:
    """The bytes of all files in a folder, after removing files of uploads that were broken off."""
    total, oldest = 0, time.time() - ABANDONED_SECONDS
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            try:
                status = file.stat()
                if Path(parent) == folder and name.startswith("tmp") and status.st_mtime < oldest:
                    file.unlink()  # Gradio leaves it behind when a client disconnects
                else:
                    total += status.st_size
            except FileNotFoundError:  # deleted since it was listed
                continue
    return total


async def _refuse(send: Callable, status: int, text: str) -> None:
    """Gradio's page shows the text of an answer to an upload that failed."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
