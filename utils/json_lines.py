"""Files with one JSON object per line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.errors import InputError


def read_json_lines(path: Path, lines: Iterable[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each line that is not blank.

    lines: the lines of the file, if the caller has read them. Raises InputError that names the file and the line.
    """
    if lines is None:
        with path.open(encoding="utf-8-sig") as file:
            yield from read_json_lines(path, file)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_json_object(line, f"{path}, line {number}")


def parse_json_object(text: str, where: str) -> dict:
    """Parse one JSON object. where: the start of the message of the InputError for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise InputError(f'{where} is not a JSON object such as {{"name": "value"}}: {text.strip()[:60]}')
    return value


def append_json_line(path: Path, values: dict) -> None:
    """Append one object; a half-written last line, as a killed run leaves it, is ended first. Raises OSError."""
    with path.open("ab+") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
        is_ended = file.read(1) in (b"", b"\n")
        file.write((b"" if is_ended else b"\n") + json.dumps(values).encode() + b"\n")
