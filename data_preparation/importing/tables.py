"""A CSV, JSONL, JSON or parquet table whose rows name pictures by path or address."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import datasets
import requests
import urllib3

from data_preparation.importing.folders import digest_of
from data_preparation.importing.pairs import Found, Reader
from data_preparation.importing.provenance import Extras, find_extras
from utils.data.columns import ROLES, Columns, resolve_columns
from utils.data.rows import image_column_name, names_images, read_columns
from utils.errors import InputError
from utils.image_sources import download
from utils.pixels import BadRow

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
# Tables of published datasets, by the names of their columns.
KNOWN_TABLES = (
    Columns("input_images", "prompt", "output_images"),  # sysuyy/ImgEdit
    Columns("local_input_image", "text", "output_image"),  # apple/pico-banana-400k, after its own script
    Columns("open_image_input_url", "text", "output_image"),  # apple/pico-banana-400k
)
MIN_UNREACHABLE = 10  # so many pictures at once and not one answer: the fault is not theirs
COLUMN_ENDINGS = ("_url", "_path", "_file")


@dataclass(frozen=True)
class Downloads:
    """Limits of each picture that is fetched. retries: further attempts, after pauses of 1, 2, 4 ... seconds."""

    max_mb: float = 50.0
    timeout: float = 30.0
    retries: int = 2
    threads: int = 16


@dataclass(frozen=True)
class PictureTable:
    """columns: as the table calls them. image_root: folder or address to which paths are relative."""

    path: Path
    columns: Columns
    extras: Extras
    image_root: str
    num_items: int
    digest: str
    downloads: Downloads = Downloads()

    def open(self) -> Reader:
        table = read_table(self.path)
        pictures = (self.columns.original, self.columns.edited)
        extras = self.extras.columns
        values = {name: table[name] for name in {*pictures, self.columns.prompt, *extras}}

        def read(items: Sequence[int]) -> Iterator[tuple[int, Found | BadRow]]:
            rows = [{name: column[item] for name, column in values.items()} for item in items]
            places = dict.fromkeys(place for row in rows for name in pictures for place in _places(row[name])[:1])
            fetched = self._fetch_all(list(places))
            for item, row in zip(items, rows, strict=True):
                try:
                    yield item, self._found(row, fetched)
                except BadRow as error:
                    yield item, error

        return read

    def identity(self) -> dict[str, Any]:
        columns = [self.columns.original, self.columns.prompt, self.columns.edited]
        root = self.image_root if _is_address(self.image_root) else None
        return {"format": "table", "rows": self.digest, "columns": columns, "image_root": root}

    def _found(self, row: dict[str, Any], fetched: dict[str, Any]) -> Found:
        originals, edited = (_places(row[name]) for name in (self.columns.original, self.columns.edited))
        for what, places in (("original picture", originals), ("edited picture", edited)):
            if len(places) != 1:
                raise BadRow(f"{what}: {'several' if places else 'none named'}")
            if isinstance(fetched[places[0]], BadRow):
                raise BadRow(f"{what}: {fetched[places[0]].reason}")
        provenance = self.extras.read(row)
        provenance["source"] = provenance.get("source") or _source_name(originals[0])
        prompts = row[self.columns.prompt]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return Found(fetched[originals[0]], fetched[edited[0]], prompts, provenance)

    def _fetch_all(self, places: list[str]) -> dict[str, Any]:
        """Path, bytes or `BadRow` of each place. Raises InputError when the network gives nothing at all."""
        located = {place: locate(place, self.image_root) for place in places}
        addresses = [place for place in places if _is_address(located[place])]
        with ThreadPoolExecutor(self.downloads.threads) as threads:
            contents = threads.map(lambda place: fetch(located[place], self.downloads), addresses)
            located |= dict(zip(addresses, contents, strict=True))
        if len(addresses) >= MIN_UNREACHABLE and all(isinstance(located[place], Unreachable) for place in addresses):
            raise InputError(
                f"none of {len(addresses)} pictures can be fetched; is there a network? The same command goes on from "
                f"here; rows whose server is gone for good must go. The first: {located[addresses[0]].reason}"
            )
        return located


class Unreachable(BadRow):
    """No server answered."""


def fetch(address: str, downloads: Downloads) -> bytes | BadRow:
    """The content behind an address, or why it does not come; what may pass is tried again."""
    for attempt in range(downloads.retries + 1):
        try:
            return download(address, "the picture", int(downloads.max_mb * 1e6), downloads.timeout)
        except InputError as error:
            reason, may_pass = _why_not(error)
        if not may_pass or attempt == downloads.retries:
            break
        time.sleep(2**attempt)
    return reason


def _why_not(error: InputError) -> tuple[BadRow, bool]:
    """(reason, whether another attempt may succeed) of a failed download."""
    cause = error.__cause__
    if cause is None:
        return BadRow(f"too large to fetch: {error}"), False
    if isinstance(cause, requests.HTTPError):
        status = cause.response.status_code
        return BadRow(f"not fetched, status {status}"), status in (408, 425, 429) or status >= 500
    if isinstance(cause, requests.Timeout):
        return BadRow("not fetched in time"), True
    if isinstance(cause, requests.ConnectionError):
        return Unreachable(f"no server answered: {error}"), True
    is_passing = isinstance(cause, (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.HTTPError))
    return BadRow(f"not fetched, {type(cause).__name__}"), is_passing


def find_table(path: Path, given: Columns, image_root: str | None, downloads: Downloads) -> PictureTable:
    """Look at a table: its columns, found as the training scripts find them, or named by flags. Raises InputError."""
    table = read_table(path)
    num_rows = len(next(iter(table.values()), []))
    if num_rows == 0:
        raise InputError(f"{path} has no rows")
    features, real_names = _features_of(table, given)
    known = next((known for known in KNOWN_TABLES if all(getattr(known, role) in table for role in ROLES)), None)
    if known is not None and given == Columns(None, None, None):
        columns = known
    else:
        found = resolve_columns(path.name, features, given.original, given.prompt, given.edited)
        columns = Columns(**{role: real_names.get(getattr(found, role), getattr(found, role)) for role in ROLES})
    plain = datasets.Features({name: _feature_of(values) for name, values in table.items()})
    used = {name: table[name] for name in (columns.original, columns.prompt, columns.edited)}
    extras = find_extras(plain, columns)
    root = image_root or str(path.parent)
    root = root if _is_address(root) else str(Path(root).expanduser().absolute())
    return PictureTable(path, columns, extras, root, num_rows, digest_of(used), downloads)


def read_table(path: Path) -> dict[str, list]:
    """Columns of a table. Raises InputError."""
    if path.suffix.lower() != ".json":
        table = read_columns(path)
    else:
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from None
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path} must hold a list of objects, one for each pair")
        table = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    for name, values in table.items():
        value = next((value for value in values if value is not None), None)
        if isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value):
            raise InputError(
                f"{path} holds pictures in {name}: give the folder that it lies in, to be read as a dataset"
            )
    return table


def locate(place: str, image_root: str) -> Any:
    """An address, or the path of a file."""
    place = place.strip()
    if _is_address(place):
        return place
    if _is_address(image_root):
        return urljoin(image_root.rstrip("/") + "/", place.lstrip("/"))
    return Path(image_root) / place


def _features_of(table: dict[str, list], given: Columns) -> tuple[datasets.Features, dict[str, str]]:
    """(types of columns as the training scripts would see them, with paths as images; real names of those renamed)."""
    features, real_names = {}, {}
    for name, values in table.items():
        is_named = name in (given.original, given.edited)
        if not is_named and not _names_pictures(name, values):
            features[name] = _feature_of(values)
            continue
        short = image_column_name(name)
        short = next((short.removesuffix(ending) for ending in COLUMN_ENDINGS if short.endswith(ending)), short)
        if is_named or short in table:
            short = name
        features[short], real_names[short] = datasets.Image(), name
    return datasets.Features(features), real_names


def _names_pictures(name: str, values: list) -> bool:
    present = [value for value in values if value not in (None, "")]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    return 2 * sum(map(_is_address, present)) > len(present) or names_images(name, [urlsplit(v).path for v in present])


def _feature_of(values: list) -> datasets.Value | datasets.List:
    value = next((value for value in values if value is not None), None)
    if isinstance(value, list):
        return datasets.List(datasets.Value("string"))
    dtype = "null" if value is None else {bool: "bool", int: "int64", float: "float64"}.get(type(value), "string")
    return datasets.Value(dtype)


def _places(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [place for place in values if isinstance(place, str) and place.strip()]


def _source_name(place: str) -> str:
    """As the table has it, but for the place of files on this machine."""
    return Path(place).name if not _is_address(place) and Path(place).is_absolute() else place


def _is_address(place: str | Path) -> bool:
    return str(place).lower().startswith(("http://", "https://"))
