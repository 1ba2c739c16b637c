"""Where adapters are: a folder, a file or a repository on the Hub. Their weights are read by `adapter_files`."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path, split_hub_file
from utils.models.adapter_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterContent,
    read_adapter_content,
    read_peft_config,
    refuse_other_kinds,
)
from utils.weight_files import TensorFiles, read_header

CONV_IN = re.compile(
    r"(.*[._])?(conv_in|input_blocks[._]0[._]0)[._](.*[._])?(lora_A(\.\w+)?|lora[._]down|lora_down)\.weight"
)
WHOLE_CONV_IN = re.compile(r"(.*\.)?conv_in(\.modules_to_save\.\w+|\.base_layer)?\.weight")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # of a pickle only tensors are read: no code of it runs
KNOWN_NAMES = (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS, LORA_WEIGHT_NAME, "adapter_model.bin")  # of diffusers and peft
ADAPTER_ADVICE = (
    f"give the folder of an adapter, its {LORA_WEIGHT_NAME_SAFE}, its id on the Hub, or OWNER/NAME/FILE of a "
    "repository with several"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's file, the shapes of its tensors by their names, and peft's configuration beside it."""

    name: str
    file: Path
    shapes: dict[str, tuple[int, ...]]
    peft_config: dict | None = None

    @property
    def in_channels(self) -> int | None:
        """The input channels of its conv_in; None where it does not change conv_in."""
        found = (s for k, s in self.shapes.items() if CONV_IN.fullmatch(k) or WHOLE_CONV_IN.fullmatch(k))
        return next((shape[1] for shape in found if len(shape) > 1), None)

    def read(self, components: dict[str, torch.nn.Module], model: str) -> AdapterContent:
        """Its layers for these components of a model. Raises InputError."""
        shapes = {
            part: {name: tuple(value.shape) for name, value in module.named_parameters()}
            for part, module in components.items()
        }
        files, layers = TensorFiles([self.file], f"the adapter {self.name}"), components["unet"].config.layers_per_block
        return read_adapter_content(files, f"the adapter {self.name}", shapes, layers, self.peft_config, model)


def inspect_adapter(name: str, cache_dir: str | Path | None = None) -> Adapter:
    """The adapter in a folder or file, or downloaded from the Hub; only its header is read. Raises `InputError`."""
    file = _find_adapter_file(name, cache_dir)
    shapes, _ = read_header(file, f"the adapter {name}")
    refuse_other_kinds(shapes, f"the adapter {name}")
    if not any("lora" in key for key in shapes):
        raise InputError(f"the adapter {name} has no LoRA weights: {ADAPTER_ADVICE}")
    is_peft = file.name.startswith(Path(PEFT_WEIGHTS).stem)
    return Adapter(name, file, shapes, read_peft_config(file.parent) if is_peft else None)


def _find_adapter_file(name: str, cache_dir: str | Path | None) -> Path:
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"the adapter {name} is not one of {', '.join(SUFFIXES)}: {ADAPTER_ADVICE}")
        return path
    if path.is_dir():
        return _find_in_folder(path, name)
    hub_file = split_hub_file(name)
    if hub_file is None and (looks_like_path(name) or path.suffix.lower() in SUFFIXES):
        raise InputError(f"the adapter {name} does not exist ({ADAPTER_ADVICE})")
    with explaining_load_errors(f"the adapter {name}", ADAPTER_ADVICE):
        return _download(*hub_file, cache_dir) if hub_file else _find_on_hub(name, cache_dir)


def _find_in_folder(folder: Path, name: str) -> Path:
    for known in KNOWN_NAMES:
        if (folder / known).is_file():
            return folder / known
    others = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(others) == 1:
        return others[0]
    found = f"; it has {', '.join(path.name for path in others[:5])}: give one of these files" if others else ""
    raise InputError(f"the adapter {name} is incomplete: missing {LORA_WEIGHT_NAME_SAFE} or {PEFT_WEIGHTS}{found}")


def _find_on_hub(name: str, cache_dir: str | Path | None) -> Path:
    """The adapter's file under a name that diffusers or peft uses, else the only file of an adapter's kind."""
    for known in KNOWN_NAMES:
        try:
            return _download(name, known, cache_dir)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    others = [file for file in HfApi().list_repo_files(name) if Path(file).suffix.lower() in SUFFIXES]
    if len(others) != 1:
        found = f"it has {', '.join(others[:5])}: give one, such as {name}/{others[0]}" if others else "it has none"
        raise InputError(f"the adapter {name} has no {LORA_WEIGHT_NAME_SAFE} ({found})")
    return _download(name, others[0], cache_dir)


def _download(repo_id: str, file: str, cache_dir: str | Path | None) -> Path:
    """The file, with peft's configuration beside it where it has one."""
    path = Path(hf_hub_download(repo_id, file, cache_dir=cache_dir))
    if path.name.startswith(Path(PEFT_WEIGHTS).stem):
        with suppress(EntryNotFoundError):
            hf_hub_download(repo_id, (Path(file).parent / PEFT_CONFIG).as_posix(), cache_dir=cache_dir)
    return path
