"""An adapter (LoRA, DoRA) in diffusers' format, merged into an editor when that is loaded.

On a text-to-image model it makes the editor: then it holds conv_in, whose inputs it widens to 8 (`adapters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from utils.editing.edit_images import Editor
from utils.errors import InputError, explaining_load_errors
from utils.models.stable_diffusion import EDITOR_CHANNELS, widen_conv_in

CONV_IN = "unet.conv_in.lora_A.weight"  # (rank, inputs, 3, 3)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ADVICE = "give the folder of an adapter, its pytorch_lora_weights.safetensors, or its id on the Hub"


@dataclass(frozen=True)
class Adapter:
    """A file, and the shapes of its tensors by their names."""

    name: str
    file: Path
    shapes: dict[str, list[int]]

    @property
    def in_channels(self) -> int | None:
        """The inputs of its conv_in; None where it leaves conv_in alone."""
        return self.shapes[CONV_IN][1] if CONV_IN in self.shapes else None


def read_adapter_file(name: str, cache_dir: str | Path | None = None) -> Adapter:
    """An adapter by its folder, its file or its id on the Hub, from where it is downloaded. Raises `InputError`."""
    file = _find_file(name, cache_dir)
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"the adapter {file} is not a whole safetensors file ({error}): copy it again") from error
    if not any("lora" in key for key in shapes):
        raise InputError(f"{file} is no adapter: it holds no LoRA weights")
    return Adapter(name, file, shapes)


def _find_file(name: str, cache_dir: str | Path | None) -> Path:
    path = Path(name)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"the adapter {name} is no .safetensors file, and other formats can carry programs")
    if path.is_file():
        return path
    if path.is_dir():
        if (path / LORA_WEIGHT_NAME_SAFE).is_file():
            return path / LORA_WEIGHT_NAME_SAFE
        raise InputError(f"the folder {name} is no adapter's: it lacks {LORA_WEIGHT_NAME_SAFE}")
    looks_local = name.startswith(("/", ".", "~")) or path.suffix == ".safetensors" or name.count("/") != 1
    if looks_local:
        raise InputError(f"the adapter {name} does not exist ({ADVICE})")
    with explaining_load_errors(f"the adapter {name}", ADVICE):
        return Path(hf_hub_download(name, LORA_WEIGHT_NAME_SAFE, cache_dir=cache_dir))


def require_fitting(adapter: Adapter, unet_config: dict, model: str) -> None:
    """Refuse an adapter that is none of this model, by its shapes; no weights are needed. Raises `InputError`."""
    is_text_to_image = unet_config.get("in_channels", 4) != EDITOR_CHANNELS
    if is_text_to_image and adapter.in_channels is None:
        raise InputError(
            f"the adapter {adapter.name} makes no editor of the text-to-image model {model}: it has no conv_in for "
            f"{EDITOR_CHANNELS} channels. An adapter of an editor goes on that editor: give it as the model"
        )
    if adapter.in_channels not in (None, EDITOR_CHANNELS):
        raise InputError(
            f"the adapter {adapter.name} is for a UNet of {adapter.in_channels} channels, and an editor's takes "
            f"{EDITOR_CHANNELS}"
        )
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config({**unet_config, "in_channels": EDITOR_CHANNELS})
    if problem := _find_misfit(adapter, unet):
        raise InputError(f"the adapter {adapter.name} was made for another model than {model}: {problem}")


def _find_misfit(adapter: Adapter, unet: UNet2DConditionModel) -> str | None:
    """What an adapter of peft's names does not find in the UNet, or finds in another size; None for other names."""
    modules = dict(unet.named_modules())
    for key, shape in adapter.shapes.items():
        for part, side, kind in ((".lora_A.weight", 1, "inputs"), (".lora_B.weight", 0, "outputs")):
            if not (key.startswith("unet.") and key.endswith(part)):
                continue
            layer = key.removeprefix("unet.").removesuffix(part)
            if layer not in modules:
                return f"it changes the layer {layer}, which that one has not"
            size = modules[layer].weight.shape[side]
            if shape[side] != size:
                return f"its {layer} has {shape[side]} {kind}, and that one's {size}"
    return None


@torch.no_grad()
def merge_into(pipeline: Editor, adapter: Adapter, scale: float = 1.0) -> None:
    """Add the adapter to the weights, so that editing takes no longer than without. Raises `InputError`.

    scale: what its change is multiplied by; 0 is the model without the adapter, but for the magnitudes of DoRA.
    """
    with explaining_load_errors(f"the adapter {adapter.name}", ADVICE):
        if pipeline.unet.config.in_channels != EDITOR_CHANNELS:
            widen_conv_in(pipeline.unet)
        pipeline.load_lora_weights(str(adapter.file.parent), weight_name=adapter.file.name)
        if not any(pipeline.get_list_adapters().values()):
            raise InputError(f"the adapter {adapter.name} changes nothing in a {type(pipeline).__name__}")
        pipeline.fuse_lora(lora_scale=scale, safe_fusing=True)
        pipeline.unload_lora_weights()
