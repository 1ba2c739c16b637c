"""Sends files of functions and folders of models to the nodes of a Ray cluster that do not have them."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from data_preparation.generation.user_functions import find_imported_files

# Fields of a generator's settings that name a function or a model: PATH, KIND:PATH or KIND:PATH:NAME.
FIELDS = ("teacher", "image_check", "moderation", "model", "vae", "lora", "clip_model", "safety_checker")
CHUNK = 32 << 20  # bytes sent at a time
ReadChunk = Callable[[str, int], bytes]  # (absolute path, offset) -> at most `CHUNK` bytes


class SentFiles(NamedTuple):
    """The files that one setting names.

    setting: as the generator has it; prefix, suffix: the setting without its path. root: folder of `name`, which is the
    file or folder that the setting names. files: path below root, size and time of change in ns, of each file.
    """

    setting: str
    prefix: str
    suffix: str
    root: str
    name: str
    files: tuple[tuple[str, int, int], ...]

    def setting_in(self, root: Path) -> str:
        """The setting for a node that has the files in another folder."""
        return f"{self.prefix}{root / self.name}{self.suffix}"


def find_files_to_send(generator: Any) -> list[SentFiles]:
    """The local files that the settings of a generator name."""
    return [sent for setting in dict.fromkeys(_settings_of(generator)) if (sent := _list_files(setting))]


def _settings_of(value: Any) -> Iterator[str]:
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _settings_of(inner)
    elif _is_settings(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if isinstance(inner, str) and field.name in FIELDS:
                yield inner
            yield from _settings_of(inner)


def _list_files(setting: str) -> SentFiles | None:
    kind, colon, rest = setting.partition(":")
    path, name_colon, name = rest.rpartition(":")
    for prefix, text, suffix in (("", setting, ""), (f"{kind}:", rest, ""), (f"{kind}:", path, name_colon + name)):
        if text and Path(text).exists():
            found = Path(text).absolute()
            listed = ((str(file.relative_to(found.parent)), file.stat()) for file in _files_of(found))
            files = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in listed)
            return SentFiles(setting, prefix, suffix, str(found.parent), found.name, files)
    return None


def _files_of(path: Path) -> Iterable[Path]:
    """All files below a folder; a file with those that it needs beside it."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix == ".py":
        return find_imported_files(path)
    return sorted(path.parent.glob(f"{path.name}*")) if path.suffix == ".onnx" else [path]  # weights beside a graph


class FileServer:
    """Reads the files that are sent, on the machine that has them; no others."""

    def __init__(self, sent: list[SentFiles]) -> None:
        self._allowed = {os.path.join(one.root, name) for one in sent for name, _, _ in one.files}

    def read(self, path: str, offset: int) -> bytes:
        """At most `CHUNK` bytes of a file."""
        if path not in self._allowed:
            raise PermissionError(path)
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)


def receive(open_worker: partial, sent: list[SentFiles], read: ReadChunk) -> partial:
    """The worker's settings with the paths of this node, which has all files afterwards."""
    places = {one.setting: one.setting_in(_find_or_fetch(one, read)) for one in sent}
    return partial(open_worker.func, *(_replace(value, places) for value in open_worker.args), **open_worker.keywords)


def _find_or_fetch(sent: SentFiles, read: ReadChunk) -> Path:
    """The folder of the files on this node. They are fetched once for all its workers."""
    if _has_files(Path(sent.root), sent):
        return Path(sent.root)
    own = Path(tempfile.gettempdir()) / f"instruct-pix2pix-{os.getuid() if hasattr(os, 'getuid') else 'files'}"
    own.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256(json.dumps([sent.root, sent.files]).encode()).hexdigest()[:16]
    with FileLock(own / f"{digest}.lock"):
        if not _has_files(own / digest, sent):
            for name, size, _ in sent.files:
                _fetch(os.path.join(sent.root, name), own / digest / name, size, read)
    return own / digest


def _has_files(root: Path, sent: SentFiles) -> bool:
    """Whether the files are there with their sizes: machines with a common disk, or an earlier run."""
    paths = [(root / name, size) for name, size, _ in sent.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _fetch(source: str, target: Path, size: int, read: ReadChunk) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    with unfinished.open("wb") as file:
        while file.tell() < size and (chunk := read(source, file.tell())):
            file.write(chunk)
    unfinished.replace(target)


def _replace(value: Any, places: dict[str, str]) -> Any:
    """A copy of nested settings in which the fields of `FIELDS`, and keys of dictionaries, name this node's files."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_replace(inner, places) for inner in value)
    if isinstance(value, dict):
        return {places.get(key, key) if isinstance(key, str) else key: inner for key, inner in value.items()}
    if not _is_settings(value):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        is_named = isinstance(inner, str) and field.name in FIELDS
        changed[field.name] = places.get(inner, inner) if is_named else _replace(inner, places)
    return dataclasses.replace(value, **changed)


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
