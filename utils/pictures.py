"""A picture that the user names on the command line: a file or a URL."""

from __future__ import annotations

import math
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from PIL import Image

from utils.errors import InputError
from utils.pixels import BadRow, decode_image

TIMEOUT_SECONDS = 20
MAX_BYTES = 100_000_000


def load_picture(source: str, flag: str) -> Image.Image:
    """The RGB picture at a path or http(s) URL, upright. Raises `InputError` that names `flag` and what is wrong."""
    try:
        return decode_image(read_source(source, flag))
    except BadRow as error:
        raise InputError(f"{flag} {source} is not a picture that can be used: {error.reason}") from error


def read_source(source: str, flag: str) -> bytes:
    """The bytes at a path or http(s) URL. Raises `InputError` that names `flag` and what is wrong."""
    if urlsplit(source).scheme in ("http", "https"):
        return download(source, flag)
    if not Path(source).is_file():
        kind = "is a folder" if Path(source).is_dir() else "does not exist"
        raise InputError(f"{flag} {source} {kind}: give a picture's path or its http(s) address")
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {source} cannot be read: {error.strerror}") from error


def download(url: str, flag: str, max_bytes: int = MAX_BYTES, max_seconds: float = math.inf) -> bytes:
    """The bytes behind an address, `max_bytes` at most. Raises `InputError` when they do not arrive, or too slowly."""
    content, start = bytearray(), time.monotonic()
    try:
        with requests.get(url, timeout=min(TIMEOUT_SECONDS, max_seconds), stream=True) as response:
            response.raise_for_status()
            for chunk in iter(lambda: response.raw.read1(1 << 16, decode_content=True), b""):  # as it arrives
                content += chunk
                if len(content) > max_bytes:
                    raise InputError(f"{flag} {url} is larger than {max_bytes / 10**6:g} MB: give a smaller picture")
                if time.monotonic() - start > max_seconds:
                    raise requests.Timeout(f"not there after {max_seconds:g} seconds")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise InputError(
            f"{flag} {url} cannot be fetched ({type(error).__name__}): check the address and the network, "
            "or save the picture and give its path"
        ) from error
    return bytes(content)
