"""The adapter of --init_adapter: a LoRA or DoRA in any format that infer.py reads, trained further on new data."""

import hashlib
import logging

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from utils.errors import InputError
from utils.models.adapter_files import AdapterContent, AdapterLayer
from utils.models.adapter_sources import inspect_adapter
from utils.models.adapters import CONV_IN
from utils.models.latents import EDITOR_CHANNELS

logger = logging.getLogger(__name__)
ADVICE = "merge it into its model with the tool that made it, and train from that model"


def read_initial_adapter(name: str, unet_config: dict, model: str, cache_dir: str | None = None) -> AdapterContent:
    """The adapter's layers for this UNet, without its weights. Raises InputError for what cannot be trained further.

    An adapter of a text-to-image model is accepted: the first convolution then gets the channels of the image latents.
    """
    adapter = inspect_adapter(name, cache_dir)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config({**unet_config, "in_channels": EDITOR_CHANNELS})
    content = adapter.read({"unet": unet}, model)
    layers = content.layers.get("unet", {})
    if problem := _find_problem(content, layers):
        raise InputError(f"--init_adapter {name} {problem}: {ADVICE}")
    for message in content.messages:
        logger.warning(message)
    return content


def _find_problem(content: AdapterContent, layers: dict[str, AdapterLayer]) -> str | None:
    if content.skipped:
        return f"also changes text encoders ({content.skipped[0]}), which are not trained here"
    if not any(name != CONV_IN for name in layers):
        return "changes no layers of the UNet besides conv_in"
    if others := sorted(content.replaced.get("unet", {}).keys() - {CONV_IN}):
        return f"stores whole weights ({others[0]})"
    if tucker := [name for name, layer in layers.items() if layer.mid is not None]:
        return f"is a Tucker decomposition ({tucker[0]})"
    magnitudes = {name: layer.magnitude for name, layer in layers.items() if layer.magnitude is not None}
    if len(magnitudes) not in (0, len(layers)) or (magnitudes and CONV_IN in content.replaced.get("unet", {})):
        return "is a DoRA in some layers and a LoRA in others"
    if per_input := [name for name in magnitudes if layers[name].has_norms_per_input]:
        return f"has the norms of DoRA per input ({per_input[0]})"
    return None


def digest_adapter(content: AdapterContent) -> str:
    """A digest of all values, so that a run is not resumed with another adapter."""
    digest = hashlib.blake2b(digest_size=8)
    values = {name: (layer.down, layer.up, layer.magnitude) for name, layer in content.layers["unet"].items()}
    values |= {f"whole {name}": (value,) for name, value in content.replaced.get("unet", {}).items()}
    for name, tensors in sorted(values.items()):
        scale = content.layers["unet"][name].scale if name in content.layers["unet"] else 1
        digest.update(f"{name} {scale}".encode())
        for value in tensors:
            if value is not None:
                digest.update(value.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
