"""What the cell of an image column may hold: bytes, a path, base64 text, a dict or a list of one; not decoded here."""

import base64
import binascii
import re
from pathlib import Path

from utils.archives import is_member_path, read_member

BASE64_START = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk|SUkq|TU0AK)[A-Za-z0-9+/\s]{90}")  # JPEG, PNG, WebP, ...


class BadRow(Exception):
    """A row that cannot be used. `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def kind(self) -> str:
        """The reason without what differs between rows, such as names and sizes: for counts, which may be published."""
        what, _, rest = self.reason.partition(": ")
        if rest and what in ("original image", "edited image"):
            what = f"{what} {rest.partition(':')[0]}"
        return what.partition(" (")[0]


def unpack_image_value(value: object) -> object:
    """What a cell of an image column holds: of a list of one image that image, of a dict its bytes or its path."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise BadRow(f"a list of {len(value)} images: give one image in each row")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


def is_base64(text: str) -> bool:
    """Whether a text is a data URL or an image as base64, not a path."""
    return text.startswith("data:image/") or bool(BASE64_START.match(text))


def decode_base64(text: str) -> bytes | None:
    """The bytes of a data URL or of an image as base64 text; None for any other text, such as a path."""
    if not is_base64(text):
        return None
    content = text.partition(";base64,")[2] if text.startswith("data:image/") else text
    try:
        return base64.b64decode(content, validate=False)
    except binascii.Error:
        raise BadRow("damaged base64 text") from None


def read_image_file(path: str) -> bytes:
    """The bytes of a file, or of a streamed file such as "hf://…". Raises BadRow if it does not exist, and OSError."""
    if is_member_path(path):
        try:
            return read_member(path)
        except FileNotFoundError as error:
            raise BadRow(f"no such file: {error}") from None
    if "://" in path:  # such as "hf://…"
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    file = Path(path)
    if not file.is_file():  # a named pipe would be read for ever
        reason = "is a folder" if file.is_dir() else "is not a regular file" if file.exists() else None
        raise BadRow(f"{reason or 'no such file'}: {path}")
    return file.read_bytes()
