"""Finds the weight files of what the user names: a file, a folder, or a repository on the Hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    _add_variant,
)
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path, snapshot_revision

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
FILE_NAMES = {  # by kind, the most likely first
    "unet": (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    "lora": (LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME),
}
ADVICE = "give a folder, a weight file, or a Hub id"

Fetch = Callable[[str], Path | None]  # path in the source -> path on this machine; None if the source has no such file


@dataclass(frozen=True)
class WeightSource:
    """A source as the flags describe it. flag: the first of them, such as "--distilled"."""

    flag: str
    name: str
    subfolder: str | None = None
    weight_name: str | None = None
    variant: str | None = None
    revision: str | None = None

    @property
    def flag_and_name(self) -> str:
        return f"{self.flag} {self.name}"


@dataclass(frozen=True)
class SourceFiles:
    """The weight files of a source. revision: their commit on the Hub; None for local files."""

    source: WeightSource
    files: tuple[Path, ...]
    revision: str | None


def find_source_files(source: WeightSource, kind: str, cache_dir: str | None = None) -> SourceFiles:
    """Find the files of a source, or download them from the Hub. kind: "unet" or "lora".

    A UNet is searched in its subfolder, or in unet/ and then at the root: one file or shards with an index,
    .safetensors before .bin. Raises `InputError` with the names that were searched.
    """
    path = Path(source.name)
    if path.is_file():
        if path.suffix.lower() not in WEIGHT_SUFFIXES:
            raise InputError(f"{source.flag_and_name} is not a weight file ({', '.join(WEIGHT_SUFFIXES)})")
        return SourceFiles(source, (path,), None)
    if path.is_dir():
        return _search(source, kind, lambda name: path / name if (path / name).is_file() else None)
    if looks_like_path(source.name) or path.suffix in WEIGHT_SUFFIXES:
        raise InputError(f"{source.flag_and_name} does not exist: {ADVICE}")
    with explaining_load_errors(source.flag_and_name, ADVICE):
        return _search_hub(source, kind, cache_dir)


def _search_hub(source: WeightSource, kind: str, cache_dir: str | None) -> SourceFiles:
    offline_errors: list[LocalEntryNotFoundError] = []

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source.name, name, revision=source.revision, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:  # offline; another name may be cached
            offline_errors.append(error)
        except EntryNotFoundError:
            pass
        return None

    try:
        return _search(source, kind, fetch)
    except InputError:
        if offline_errors:  # the repository may have the file
            raise offline_errors[0] from None
        raise


def _search(source: WeightSource, kind: str, fetch: Fetch) -> SourceFiles:
    names = _list_candidates(source, kind)
    for name in names:
        if found := fetch(name):
            files = _fetch_shards(source, name, found, fetch) if ".index" in name else (found,)
            return SourceFiles(source, files, snapshot_revision(found))
    existing = _list_weight_files(source)
    has = f"; it has {', '.join(existing[:12])}{', ...' if len(existing) > 12 else ''}" if existing else ""
    searched = ", ".join(name for name in names if ".index" not in name)
    flags = f"{source.flag}_weight_name, {source.flag}_subfolder or " if source.flag != "--model" else ""
    raise InputError(f"{source.flag_and_name} has no {searched}{has}. Set {flags}{source.flag}_variant")


def _list_candidates(source: WeightSource, kind: str) -> list[str]:
    """File names to search, the most likely first."""
    names = [source.weight_name] if source.weight_name else [_add_variant(n, source.variant) for n in FILE_NAMES[kind]]
    folders = ["unet", ""] if kind == "unet" and not source.weight_name else [""]
    if source.subfolder is not None:
        folders = [source.subfolder.strip("/")]
    return [f"{folder}/{name}".lstrip("/") for folder in folders for name in names]


def _fetch_shards(source: WeightSource, name: str, index: Path, fetch: Fetch) -> tuple[Path, ...]:
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{source.flag_and_name}: {name} is not an index of shards: copy it again") from error
    folder = name.rpartition("/")[0]
    found = {shard: fetch(f"{folder}/{shard}".lstrip("/")) for shard in shards}
    if missing := [shard for shard, path in found.items() if path is None]:
        raise InputError(f"{source.flag_and_name} is incomplete: missing {', '.join(missing)}")
    return tuple(found.values())


def _list_weight_files(source: WeightSource) -> list[str]:
    """The weight files that the source has; empty if the Hub cannot be reached."""
    root = Path(source.name)
    if root.is_dir():
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        try:
            names = HfApi().list_repo_files(source.name, revision=source.revision)
        except (HfHubHTTPError, OSError, ValueError):
            names = []
    return sorted(name for name in names if Path(name).suffix in WEIGHT_SUFFIXES)
