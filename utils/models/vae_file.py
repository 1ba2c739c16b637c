"""An autoencoder (VAE) in one file, by the names of the original Stable Diffusion or of diffusers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from utils.errors import InputError
from utils.models.model_folders import find_damage
from utils.weight_files import TensorFiles

PREFIXES = ("first_stage_model.", "vae.")
ORIGINAL = "encoder.down.0.block.0.conv1.weight"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def load_vae_file(name: str, own: dict[str, Any], what: str) -> AutoencoderKL:
    """The autoencoder of a .safetensors, .ckpt, .pt or .bin file in float32, alone or inside a whole model.

    own: configuration of the VAE that it replaces, of the same family. Raises InputError, beginning with `what`.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{what} does not exist")
    if problem := find_damage(path):
        raise InputError(f"{what} {problem}")
    files = TensorFiles([path], what)
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in files.shapes)), "")
    names = [key for key in files.shapes if key.startswith(prefix) and not key.startswith(("loss.", "model_ema."))]
    tensors = {key.removeprefix(prefix): files.read(key).float() for key in names}
    vae = AutoencoderKL.from_config(own)
    if ORIGINAL in tensors:
        tensors = convert_ldm_vae_checkpoint(tensors, dict(vae.config))
    tensors = {_current_name(key): value for key, value in tensors.items()}
    expected = vae.state_dict()
    for key, value in tensors.items():  # attention was a 1x1 convolution once
        if key in expected and value.ndim == 4 and expected[key].ndim == 2:
            tensors[key] = value[:, :, 0, 0]
    missing = [key for key in expected if key not in tensors or tensors[key].shape != expected[key].shape]
    if missing:
        raise InputError(
            f"{what} is not an autoencoder (VAE) of this model's family: missing {missing[0]} and {len(missing) - 1} "
            "more. Give a VAE file, folder or Hub id"
        )
    vae.load_state_dict({key: tensors[key].to(torch.float32) for key in expected})
    return vae


def _current_name(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) > 2 and parts[-2] in OLD_ATTENTION:
        parts[-2] = OLD_ATTENTION[parts[-2]]
    return ".".join(parts)
