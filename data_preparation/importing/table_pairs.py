"""Pairs of a CSV, JSONL, JSON or parquet table whose rows name images by path or URL."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import datasets
import requests
import urllib3

from data_preparation.importing.dataset_pairs import ProvenanceMap, map_provenance
from data_preparation.importing.source_pairs import PairOrError, ReadPairs, SourcePair, digest_json, read_each
from utils.archives import is_member_path, read_member
from utils.data.columns import ROLES, Columns, resolve_columns
from utils.data.image_paths import ImageFinder
from utils.data.tables import TABLE_SUFFIXES, image_column_name, names_images, read_columns
from utils.errors import InputError
from utils.image_sources import download
from utils.stored_images import BadRow, decode_base64, is_base64

logger = logging.getLogger(__name__)
# Tables of published datasets, recognised by their columns.
KNOWN_TABLES = (
    Columns("input_images", "prompt", "output_images"),  # sysuyy/ImgEdit
    Columns("local_input_image", "text", "output_image"),  # apple/pico-banana-400k, after its own script
    Columns("open_image_input_url", "text", "output_image"),  # apple/pico-banana-400k
)
MAX_DEAD_TRIES = 3  # images of a server that are tried before it is given up
MIN_UNREACHABLE = 10  # if at least so many images fail without any answer, the network is down
COLUMN_ENDINGS = ("_url", "_path", "_file")


@dataclass(frozen=True)
class DownloadLimits:
    """Limits for each image. retries: further attempts, after 1, 2, 4 ... seconds."""

    max_mb: float = 50.0
    timeout: float = 30.0
    retries: int = 2
    threads: int = 16


@dataclass(frozen=True)
class TableSource:
    """columns: as named in the table. image_root: folder or URL that paths are relative to."""

    path: Path
    columns: Columns
    provenance: ProvenanceMap
    image_root: str
    num_items: int
    digest: str
    limits: DownloadLimits = DownloadLimits()

    def open(self) -> ReadPairs:
        table = read_table(self.path)
        used = {self.columns.original, self.columns.prompt, self.columns.edited, *self.provenance.columns}
        finder, hosts = ImageFinder([Path(self.image_root), self.path.parent, Path.cwd()]), DeadHosts()

        def read(items: Sequence[int]) -> Iterator[tuple[int, PairOrError]]:
            rows = {item: {name: table[name][item] for name in used} for item in items}
            images = self._fetch_images(list(rows.values()), finder, hosts)
            return read_each(items, lambda item: [self._pair_of(rows[item], images)])

        return read

    def identity(self) -> dict[str, Any]:
        columns = [self.columns.original, self.columns.prompt, self.columns.edited]
        root = self.image_root if _is_url(self.image_root) else None
        return {"format": "table", "rows": self.digest, "columns": columns, "image_root": root}

    def _pair_of(self, row: dict[str, Any], images: dict[str, Path | bytes | BadRow]) -> SourcePair:
        pair = []
        for what, column in (("original image", self.columns.original), ("edited image", self.columns.edited)):
            names = _image_names(row[column])
            if len(names) != 1:
                raise BadRow(f"{what}: {'several' if names else 'none named'}")
            if isinstance(images[names[0]], BadRow):
                raise BadRow(f"{what}: {images[names[0]].reason}")
            pair.append(images[names[0]])
        provenance = self.provenance.read(row)
        name = _image_names(row[self.columns.original])[0]
        if is_base64(name):
            return SourcePair(*pair, row[self.columns.prompt], provenance)
        is_private = not _is_url(name) and Path(name).is_absolute()
        provenance["source"] = provenance.get("source") or (Path(name).name if is_private else name)
        return SourcePair(*pair, row[self.columns.prompt], provenance)

    def _fetch_images(
        self, rows: list[dict[str, Any]], finder: ImageFinder, hosts: "DeadHosts"
    ) -> dict[str, Path | bytes | BadRow]:
        """By name in the table: a path, the content behind a URL, or why there is none.

        Raises InputError if no server answers at all.
        """
        columns = (self.columns.original, self.columns.edited)
        names = dict.fromkeys(name for row in rows for column in columns for name in _image_names(row[column])[:1])
        images = {name: locate(name, self.image_root) for name in names}
        local = [name for name in names if isinstance(images[name], Path)]
        images |= {name: _open_local(place) for name, place in zip(local, finder.find(local), strict=True)}
        urls = [name for name in names if _is_url(images[name])]
        with ThreadPoolExecutor(self.limits.threads) as threads:
            contents = threads.map(lambda name: hosts.fetch(images[name], self.limits), urls)
            images |= dict(zip(urls, contents, strict=True))
        if len(urls) >= MIN_UNREACHABLE and all(isinstance(images[name], Unreachable) for name in urls):
            raise InputError(
                f"none of {len(urls)} images can be downloaded: check the network and run the same command again to "
                f"resume; remove rows whose server no longer exists. The first error: {images[urls[0]].reason}"
            )
        return images


def _open_local(path: str) -> Path | bytes | BadRow:
    """A path, or the bytes of a file in an archive."""
    if not is_member_path(path):
        return Path(path)
    try:
        return read_member(path)
    except (OSError, ValueError) as error:
        return BadRow(f"cannot be read: {error}")


class Unreachable(BadRow):
    """No server answered."""


class DeadHosts:
    """Servers that never answered, so that the thousands of rows that name them need not wait for each time-out.

    A server is given up after `MAX_DEAD_TRIES` images without any answer; one that has answered never is.
    """

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()
        self._answered: set[str] = set()

    def fetch(self, url: str, limits: DownloadLimits) -> bytes | BadRow:
        """As `fetch`, without asking a server that was given up."""
        host = urlsplit(url).netloc
        if self._failures[host] >= MAX_DEAD_TRIES and host not in self._answered:
            return Unreachable(f"no server answered: {host} was given up")
        content = fetch(url, limits)
        if not isinstance(content, Unreachable):
            self._answered.add(host)
        else:
            self._failures[host] += 1
            if self._failures[host] == MAX_DEAD_TRIES and host not in self._answered:
                logger.warning("%s does not answer: its other images are skipped and counted", host)
        return content


def fetch(url: str, limits: DownloadLimits) -> bytes | BadRow:
    """The content at a URL, or why it cannot be fetched. Temporary failures are retried."""
    for attempt in range(limits.retries + 1):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            return download(url, "the image", int(limits.max_mb * 1e6), limits.timeout)
        except InputError as error:
            reason, is_temporary = _classify(error)
        if not is_temporary:
            break
    return reason


def _classify(error: InputError) -> tuple[BadRow, bool]:
    """(reason, whether another attempt may succeed) of a failed download."""
    cause = error.__cause__
    if cause is None:
        return BadRow(f"too large to download: {error}"), False
    if isinstance(cause, requests.HTTPError):
        status = cause.response.status_code
        return BadRow(f"not downloaded, status {status}"), status in (408, 425, 429) or status >= 500
    if isinstance(cause, requests.Timeout) and not isinstance(cause, requests.ConnectTimeout):
        return BadRow("download timed out"), True
    if isinstance(cause, requests.ConnectionError):
        return Unreachable(f"no server answered: {error}"), True
    is_temporary = isinstance(cause, (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.HTTPError))
    return BadRow(f"not downloaded, {type(cause).__name__}"), is_temporary


def find_table_pairs(path: Path, given: Columns, image_root: str | None, limits: DownloadLimits) -> TableSource:
    """Find the columns of a table as the training scripts do. given: the column flags, None where not given.

    Raises InputError.
    """
    table = read_table(path)
    num_rows = len(next(iter(table.values()), []))
    if num_rows == 0:
        raise InputError(f"{path} has no rows")
    columns = next((known for known in KNOWN_TABLES if all(getattr(known, role) in table for role in ROLES)), None)
    if columns is None or given != Columns(None, None, None):
        features, names = _image_features(table, given)
        found = resolve_columns(path.name, features, given.original, given.prompt, given.edited)
        columns = Columns(**{role: names.get(getattr(found, role), getattr(found, role)) for role in ROLES})
    provenance = map_provenance(datasets.Features({name: _feature_of(one) for name, one in table.items()}), columns)
    used = {name: table[name] for name in (columns.original, columns.prompt, columns.edited)}
    root = image_root or str(path.parent)
    root = root if _is_url(root) else str(Path(root).expanduser().absolute())
    return TableSource(path, columns, provenance, root, num_rows, digest_json(used), limits)


def table_in(folder: Path) -> Path:
    """The only table in a folder. Raises InputError."""
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    if len(tables) != 1:
        names = ", ".join(path.name for path in tables) or "no table"
        raise InputError(f"--source {folder}: has {names}; give the path of one table ({', '.join(TABLE_SUFFIXES)})")
    return tables[0]


def read_table(path: Path) -> dict[str, list]:
    """The values of each column. Raises InputError."""
    table = read_columns(path)
    for name, values in table.items():
        value = next((value for value in values if value is not None), None)
        if isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value):
            raise InputError(f"{path} holds images in column {name}: give its folder as --source, to import a dataset")
    return table


def locate(name: str, image_root: str) -> Path | str | bytes:
    """The URL of an image, the path of its file, or its content if the table holds it as base64 text."""
    name = name.strip()
    if is_base64(name):
        return decode_base64(name)
    if _is_url(name):
        return name
    if _is_url(image_root):
        return urljoin(image_root.rstrip("/") + "/", name.lstrip("/"))
    return Path(image_root) / name


def _image_features(table: dict[str, list], given: Columns) -> tuple[datasets.Features, dict[str, str]]:
    """(types of the columns, with those of paths as images under short names; name in the table by short name)."""
    features, names = {}, {}
    for name, values in table.items():
        is_given = name in (given.original, given.edited)
        if not is_given and not _names_images(name, values):
            features[name] = _feature_of(values)
            continue
        short = image_column_name(name)
        short = next((short.removesuffix(ending) for ending in COLUMN_ENDINGS if short.endswith(ending)), short)
        if is_given or short in table:
            short = name
        features[short], names[short] = datasets.Image(), name
    return datasets.Features(features), names


def _names_images(name: str, values: list) -> bool:
    firsts = [value[0] if isinstance(value, list) and value else value for value in values]  # lists of one path
    present = [value for value in firsts if value not in (None, "", [])]
    if not present or not all(isinstance(value, str) for value in present):
        return False
    return 2 * sum(map(_is_url, present)) > len(present) or names_images(name, [urlsplit(v).path for v in present])


def _feature_of(values: list) -> datasets.Value | datasets.List:
    value = next((value for value in values if value is not None), None)
    if isinstance(value, list):
        return datasets.List(datasets.Value("string"))
    dtype = "null" if value is None else {bool: "bool", int: "int64", float: "float64"}.get(type(value), "string")
    return datasets.Value(dtype)


def _image_names(value: Any) -> list[str]:
    """The paths and URLs in a value, a string or a list."""
    values = value if isinstance(value, list) else [value]
    return [name for name in values if isinstance(name, str) and name.strip()]


def _is_url(name: Path | str | bytes) -> bool:
    return isinstance(name, (str, Path)) and str(name).lower().startswith(("http://", "https://"))
