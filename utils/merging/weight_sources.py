"""Where weights come from: what a user names (a file, a folder, an id on the Hub) becomes files on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from utils.errors import InputError, explaining_load_errors
from utils.hub_names import snapshot_revision

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
STEMS = {"unet": "diffusion_pytorch_model", "lora": "pytorch_lora_weights"}


Fetch = Callable[[str], Path | None]  # a file's path in the source -> where it lies; None: the source lacks it


@dataclass(frozen=True)
class WeightSource:
    """What the flags say of a source. flag: the first of them, such as "--distilled"."""

    flag: str
    name: str
    subfolder: str | None = None
    weight_name: str | None = None
    variant: str | None = None
    revision: str | None = None

    @property
    def what(self) -> str:
        return f"{self.flag} {self.name}"


@dataclass(frozen=True)
class Located:
    """A source's files. revision: the commit on the Hub that they are of; None where they were always here."""

    source: WeightSource
    files: tuple[Path, ...]
    revision: str | None


def locate(source: WeightSource, kind: str, cache_dir: str | None = None) -> Located:
    """The files of a source; from the Hub they are downloaded. kind: "unet" or "lora".

    A UNet is looked for at the source's root and in unet/, or in its subfolder: one file or shards with their index,
    .safetensors before .bin. Raises `InputError` that says what was looked for.
    """
    path = Path(source.name)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{source.what} is no file of weights: it must end in {', '.join(SUFFIXES)}")
        return Located(source, (path,), None)
    if path.is_dir():
        return _find(source, kind, lambda name: path / name if (path / name).is_file() else None)
    looks_local = source.name.startswith(("/", ".", "~")) or path.suffix in SUFFIXES or source.name.count("/") != 1
    if looks_local:
        raise InputError(f"{source.what} does not exist: give a folder, a file of weights, or an id on the Hub")
    with explaining_load_errors(source.what, "give a folder, a file of weights, or an id on the Hub"):
        return _locate_on_hub(source, kind, cache_dir)


def _locate_on_hub(source: WeightSource, kind: str, cache_dir: str | None) -> Located:
    unreached: list[LocalEntryNotFoundError] = []

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(source.name, name, revision=source.revision, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:  # offline, another name may be cached
            unreached.append(error)
        except EntryNotFoundError:
            pass
        return None

    try:
        return _find(source, kind, fetch)
    except InputError:
        if unreached:
            raise unreached[0] from None  # not the source lacks it: nobody knows
        raise


def _find(source: WeightSource, kind: str, fetch: Fetch) -> Located:
    for name in _candidates(source, kind):
        found = fetch(name)
        if found is None:
            continue
        files = _shards(source, name, found, fetch) if ".index" in name else (found,)
        return Located(source, files, snapshot_revision(found))
    names = _weight_files(source)
    there = f"; it has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else ""
    looked = ", ".join(name for name in _candidates(source, kind) if ".index" not in name)
    advice = f"Name the file with {source.flag}_weight_name, or its place with {source.flag}_subfolder and "
    raise InputError(
        f"{source.what} lacks {looked}{there}. {'Give ' if source.flag == '--model' else advice}{source.flag}_variant"
    )


def _candidates(source: WeightSource, kind: str) -> Iterator[str]:
    """The names to look for, the likeliest first."""
    if source.subfolder is not None:
        folders = [source.subfolder.strip("/")]
    else:
        folders = ["unet", ""] if kind == "unet" and not source.weight_name else [""]
    variant = f".{source.variant}" if source.variant else ""
    names = [source.weight_name]
    if not source.weight_name:
        stem = STEMS[kind]
        names = [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
        names += [f"{stem}{variant}.bin", f"{stem}.bin.index{variant}.json"]
        names = [name for name in names if kind == "unet" or ".index" not in name]
    for folder in folders:
        for name in names:
            yield f"{folder}/{name}" if folder else name


def _shards(source: WeightSource, name: str, index: Path, fetch: Fetch) -> tuple[Path, ...]:
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{source.what}: {name} is no index of shards: copy it again") from error
    folder = name.rpartition("/")[0]
    found = {shard: fetch(f"{folder}/{shard}" if folder else shard) for shard in shards}
    if missing := [shard for shard, path in found.items() if path is None]:
        raise InputError(f"{source.what} is not whole: it lacks {', '.join(missing)}")
    return tuple(found.values())


def _weight_files(source: WeightSource) -> list[str]:
    """The weight files that there are instead, for the message; empty where the Hub does not say."""
    root = Path(source.name)
    if root.is_dir():
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        try:
            names = HfApi().list_repo_files(source.name, revision=source.revision)
        except (HfHubHTTPError, OSError, ValueError):
            names = []
    return sorted(name for name in names if Path(name).suffix in SUFFIXES)
