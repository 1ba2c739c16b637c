"""Finds the file of an adapter: in a folder, as a file, or on the Hub."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path, split_hub_file
from utils.models.adapter_files import PEFT_CONFIG, read_adapter_content, read_peft_config
from utils.models.adapter_layers import AdapterContent
from utils.models.adapter_names import describe_no_adapter, refuse_other_kinds
from utils.models.model_folders import find_damage
from utils.weight_files import TensorFiles, read_header

KNOWN_FILES = (LORA_WEIGHT_NAME_SAFE, "adapter_model.safetensors", LORA_WEIGHT_NAME, "adapter_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ADAPTER_ADVICE = f"give the folder of an adapter, its {LORA_WEIGHT_NAME_SAFE}, or its id on the Hub"
_CONV_IN = re.compile(
    r"(.*[._])?(conv_in|input_blocks[._]0[._]0)[._](.*[._])?(lora_A(\.[^.]+)?|lora[._]down|lora_down)\.weight"
)
_WHOLE_CONV_IN = re.compile(r"(.*\.)?conv_in(\.modules_to_save\.[^.]+|\.base_layer)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter's file, the shapes of its tensors by their names, and peft's configuration beside it."""

    name: str
    file: Path
    shapes: dict[str, tuple[int, ...]]
    peft_config: dict[str, Any] | None = None

    @property
    def in_channels(self) -> int | None:
        """The input channels of its conv_in; None where it does not change conv_in."""
        found = (s for k, s in self.shapes.items() if _CONV_IN.fullmatch(k) or _WHOLE_CONV_IN.fullmatch(k))
        return next((shape[1] for shape in found if len(shape) > 1), None)

    def read(self, components: Mapping[str, nn.Module], model: str) -> AdapterContent:
        """Its layers for these components of a model ("unet" and text encoders). Raises InputError."""
        shapes = {
            part: {name: tuple(value.shape) for name, value in module.named_parameters()}
            for part, module in components.items()
        }
        what, layers = f"the adapter {self.name}", components["unet"].config.layers_per_block
        return read_adapter_content(TensorFiles([self.file], what), what, shapes, layers, self.peft_config, model)


def inspect_adapter(name: str, cache_dir: str | Path | None = None) -> Adapter:
    """The adapter in a folder or file, or downloaded from the Hub; only its header is read. Raises `InputError`."""
    what, file = f"the adapter {name}", _find_file(name, cache_dir)
    if problem := find_damage(file):
        raise InputError(f"{what} cannot be loaded: {file.name} {problem}")
    shapes, _ = read_header(file, what)
    refuse_other_kinds(shapes, what)
    if not any("lora" in key for key in shapes):
        raise InputError(f"{what} {describe_no_adapter(shapes)}: {ADAPTER_ADVICE}")
    is_peft = any("lora_A" in key for key in shapes)
    return Adapter(name, file, shapes, read_peft_config(file, what) if is_peft else None)


def _find_file(name: str, cache_dir: str | Path | None) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return _find_in_folder(path, name)
    part_of_hub = split_hub_file(name)
    if not part_of_hub and (looks_like_path(name) or path.suffix in SUFFIXES):
        raise InputError(f"the adapter {name} does not exist ({ADAPTER_ADVICE})")
    repo_id, inside, revision = part_of_hub or (name, "", None)
    with explaining_load_errors(f"the adapter {name}", ADAPTER_ADVICE):
        return _find_on_hub(repo_id, inside, dict(revision=revision, cache_dir=cache_dir))


def _find_in_folder(folder: Path, name: str) -> Path:
    for known in KNOWN_FILES:
        if (folder / known).is_file():
            return folder / known
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    if len(others) == 1:
        return folder / others[0]
    found = f"; it has {', '.join(others[:5])}: give one of these files" if others else ""
    raise InputError(f"the adapter {name} is incomplete: missing {' or '.join(KNOWN_FILES[:2])}{found}")


def _find_on_hub(repo_id: str, inside: str, place: dict[str, Any]) -> Path:
    """The file `inside` a repository, or the adapter in that folder of it, named as diffusers or peft do."""
    is_file = Path(inside).suffix in SUFFIXES
    folder = str(Path(inside).parent.as_posix() if is_file else inside).strip("./")
    prefix = f"{folder}/" if folder else ""
    for known in [inside] if is_file else [prefix + file for file in KNOWN_FILES]:
        try:
            file = Path(hf_hub_download(repo_id, known, **place))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        with suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(repo_id, prefix + PEFT_CONFIG, **place)
        return file
    files = HfApi().list_repo_files(repo_id, revision=place["revision"])
    others = [file for file in files if file.endswith(".safetensors") and file.startswith(prefix)]
    if is_file or len(others) != 1:
        found = f"it has {', '.join(others[:5])}: give {repo_id}/{others[0]}" if others else "it has none"
        raise InputError(f"the adapter {repo_id} has no {inside if is_file else KNOWN_FILES[0]} ({found})")
    return Path(hf_hub_download(repo_id, others[0], **place))
