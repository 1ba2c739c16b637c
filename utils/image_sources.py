"""An image that the user names on the command line, by path or URL -> its bytes, or the decoded image.

Images that are stored in the rows of a dataset are decoded by pixels.py.
"""

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


def load_image_source(source: str, flag: str) -> Image.Image:
    """The upright RGB image at a path or http(s) URL. Raises InputError that names `flag`."""
    try:
        return decode_image(read_image_source(source, flag))
    except BadRow as error:
        raise InputError(f"{flag} {source} cannot be used as an image: {error.reason}") from error


def read_image_source(source: str, flag: str) -> bytes:
    """The bytes at a path or http(s) URL. Raises InputError that names `flag`."""
    if urlsplit(source).scheme in ("http", "https"):
        return download(source, flag)
    if not Path(source).is_file():
        reason = "is a folder" if Path(source).is_dir() else "does not exist"
        raise InputError(f"{flag} {source} {reason}: give the path or the http(s) URL of an image")
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {source} cannot be read: {error.strerror}") from error


def download(url: str, flag: str, max_bytes: int = MAX_BYTES, max_seconds: float = math.inf) -> bytes:
    """The bytes at a URL. Raises InputError if they cannot be fetched, are too many or take too long."""
    content, start = bytearray(), time.monotonic()
    try:
        with requests.get(url, timeout=min(TIMEOUT_SECONDS, max_seconds), stream=True) as response:
            response.raise_for_status()
            for chunk in iter(lambda: response.raw.read1(1 << 16, decode_content=True), b""):  # as it arrives
                content += chunk
                if len(content) > max_bytes:
                    raise InputError(f"{flag} {url} is larger than {max_bytes / 10**6:g} MB: give a smaller image")
                if time.monotonic() - start > max_seconds:
                    raise requests.Timeout(f"not complete after {max_seconds:g} seconds")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise InputError(
            f"{flag} {url} cannot be fetched ({type(error).__name__}): check the URL and the network, "
            "or save the image and give its path"
        ) from error
    return bytes(content)
