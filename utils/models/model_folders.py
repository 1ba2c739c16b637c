"""Model folders as they are found on disks: which weight files a part has, what is wrong with them, and what to do."""

import json
import re
import struct
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import CLIPTokenizer

from utils.errors import InputError
from utils.hub_names import is_hub_id

WEIGHT_FILE = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+?))?(?:-\d{5}-of-\d{5})?\.(safetensors|bin)"
)
INDEX_FILE = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)\.(safetensors|bin)\.index(\.\w+)?\.json")
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
CLIP_LENGTH = 77  # tokens of every Stable Diffusion text encoder
OPEN_CLIP_WIDTHS = (1024, 1280)  # SD 2.x and the second encoder of SDXL: they pad with "!"


def list_files(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> tuple[str, ...]:
    """The files of a model folder or of a repository on the Hub, as paths relative to it.

    Without a connection, those of the Hub's cache; () where there are none: loading the model then explains why.
    """
    if Path(name).is_dir():
        return _list_folder(Path(name))
    if not is_hub_id(str(name)):
        return ()
    return _list_repository(str(name), revision, cache_dir, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


def _list_folder(folder: Path) -> tuple[str, ...]:
    return tuple(path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern))


@lru_cache(maxsize=64)  # of failures, too: a dead network is waited for once
def _list_repository(
    repo_id: str, revision: str | None, cache_dir: str | Path | None, endpoint: str, is_offline: bool
) -> tuple[str, ...]:
    with suppress(HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return tuple(HfApi(endpoint).list_repo_files(repo_id, revision=revision))
    index = try_to_load_from_cache(repo_id, "model_index.json", revision=revision, cache_dir=cache_dir)
    return _list_folder(Path(index).parent) if isinstance(index, str) else ()


def _find_variants(files: Iterable[str], part: str) -> set[str | None]:
    """The variants of a part's weight files; None is that of files without one."""
    prefix = f"{part}/" if part else ""
    names = (name.removeprefix(prefix) for name in files if name.startswith(prefix))
    return {match["variant"] for name in names if (match := WEIGHT_FILE.fullmatch(name))}


def choose_variant(name: str | Path, part: str, variant: str | None, **place: Any) -> str | None:
    """The variant to load a part with: the given one, the default files, or the only variant that the part has.

    place: revision and cache_dir of a repository on the Hub. Raises InputError where the part has several variants and
    none is given.
    """
    found = _find_variants(list_files(name, **place), part)
    if variant in found or not found:
        return variant
    if None in found:
        return None
    if len(found) > 1:
        names = " or ".join(f"--variant {one}" for one in sorted(found))
        raise InputError(f"{name}: its {part} has only the variants {', '.join(sorted(found))}: give {names}")
    return found.pop()


def require_variant(name: str | Path, parts: Collection[str], variant: str | None, what: str, **place: Any) -> None:
    """Raise InputError where no part of a model has the variant that was asked for."""
    files = list_files(name, **place) if variant is not None else ()
    if not files:
        return
    found = set().union(*(_find_variants(files, part) for part in parts))
    if variant not in found:
        others = " or ".join(f"--variant {one}" for one in sorted(found - {None}))
        raise InputError(f"{what} has no variant {variant}: " + (f"give {others}" if others else "remove --variant"))


def require_model_folder(name: str, what: str) -> None:
    """Raise InputError for a folder that is not a pipeline but something that is easily taken for one.

    what: the start of the message, such as "--model name".
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return
    if snapshots := sorted(folder.glob("snapshots/*/model_index.json")):
        raise InputError(f"{what} is a folder of the Hub's cache: give {snapshots[-1].parent}, or the model's id")
    if below := sorted(folder.glob("*/model_index.json")):
        raise InputError(f"{what} holds a model in a subfolder: give {below[0].parent}")
    if (folder / "adapter_config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        raise InputError(f"{what} is an adapter: give its base model, and the adapter with --lora")
    if (folder / "config.json").is_file() and (folder.parent / "model_index.json").is_file():
        raise InputError(f"{what} is only the {folder.name} of a model: give the folder above it, {folder.parent}")
    if files := sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt")):
        raise InputError(f"{what} has no model_index.json, but a file: give {files[0]} if it is a whole model")
    raise InputError(f"{what} has no model_index.json: it is not a diffusers pipeline. Give the folder that has one")


def require_whole_files(name: str, what: str, parts: list[str]) -> None:
    """Raise InputError that names the part and the file for damaged, missing or unfetched weights of a folder."""
    for part in parts:
        folder = Path(name) / part
        if not folder.is_dir():
            continue
        weights = [path for path in sorted(folder.iterdir()) if WEIGHT_FILE.fullmatch(path.name)]
        for path in weights:
            if problem := find_damage(path):
                raise InputError(f"{what}: {part}/{path.name} {problem}")
        for index in (path for path in folder.iterdir() if INDEX_FILE.fullmatch(path.name)):
            missing = [shard for shard in _list_shards(index, what) if not (folder / shard).is_file()]
            if missing:
                raise InputError(f"{what}: its {part} is incomplete: missing {', '.join(missing[:3])}. Copy them")
        has_weights = weights or any(INDEX_FILE.fullmatch(path.name) for path in folder.iterdir())
        if not has_weights and part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            has = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
            raise InputError(f"{what}: its {part} has no weights (it has {has}): copy them")


def find_damage(path: Path) -> str | None:
    """Why a weight file cannot be read, with the remedy; None if its beginning is right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if size == 0:
        return "is empty (0 bytes): copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights: run git lfs pull in the folder"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "is a web page and not weights: its download failed"
    if path.suffix == ".safetensors":
        if len(start) < 8:
            return "is truncated: copy it again"
        length = struct.unpack("<Q", start[:8])[0]
        if length > size - 8 or start[8:9] != b"{":
            return "is truncated or not a safetensors file: copy it again"
        end = _data_end(path, length)
        if end is not None and 8 + length + end > size:
            return f"is truncated ({size:,} of {8 + length + end:,} bytes): copy it again"
    return None


def _data_end(path: Path, length: int) -> int | None:
    """Where the last tensor of a safetensors file ends, relative to its data."""
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            return max((value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            return None


def _list_shards(index: Path, what: str) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{what}: {index.parent.name}/{index.name} is not an index of shards: copy it again") from None


def load_tokenizer(name: str, subfolder: str, location: dict, width: int) -> CLIPTokenizer:
    """The tokenizer of a model; of incomplete files, what is missing is known from the text encoder.

    width: hidden size of its text encoder. Raises InputError where the vocabulary itself is missing.
    """
    folder = Path(name) / subfolder
    if Path(name).is_dir() and not (folder / "tokenizer.json").is_file():
        missing = [file for file in ("vocab.json", "merges.txt") if not (folder / file).is_file()]
        if missing:
            raise InputError(f"{name}: its {subfolder} is incomplete: missing {' and '.join(missing)}: copy it again")
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder, **location)
    if len(tokenizer) < 256:  # byte-level: at least one token per byte
        raise InputError(f"{name}: its {subfolder} is incomplete: missing vocab.json or tokenizer.json: copy it again")
    complete_tokenizer(tokenizer, folder, width)
    return tokenizer


def complete_tokenizer(tokenizer: CLIPTokenizer, folder: Path, width: int) -> None:
    """Set the length and padding token that tokenizer_config.json would say, where a folder lacks that file."""
    if tokenizer.model_max_length > 10 * CLIP_LENGTH:
        tokenizer.model_max_length = CLIP_LENGTH
    has_settings = any((folder / file).is_file() for file in ("tokenizer_config.json", "special_tokens_map.json"))
    if folder.is_dir() and not has_settings and width in OPEN_CLIP_WIDTHS:
        tokenizer.pad_token = "!"
