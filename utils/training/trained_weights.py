"""What training changes of a UNet: all of its parameters, or those of its adapter. Kept, read and put back by name."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from utils.errors import InputError
from utils.models.adapters import has_adapter, read_adapter, save_adapter
from utils.weight_files import load_weights, save_weights

Weights = dict[str, torch.Tensor]  # by the names of the UNet's own parameters


def trained_weights(unet: UNet2DConditionModel) -> Weights:
    """The parameters that training changes, as they are now; not copies."""
    return {name: value.detach() for name, value in unet.named_parameters() if value.requires_grad}


def save_trained(folder: Path, unet: UNet2DConditionModel, weights: Weights | None = None) -> None:
    """Write what stock diffusers loads: the folder of a UNet, or an adapter in LoRA format.

    weights: values to write in place of the UNet's own, such as averaged ones.
    """
    if has_adapter(unet):
        save_adapter(folder, unet, weights)
    else:
        save_weights(folder, unet, unet.state_dict() | (weights or {}))


def read_trained(folder: Path, unet: UNet2DConditionModel) -> Weights:
    """What `save_trained` wrote, to the bit. Raises `InputError` when it is of another model."""
    if has_adapter(unet):
        return read_adapter(folder, unet)
    stored, expected = load_weights(folder), unet.state_dict()
    if {name: value.shape for name, value in stored.items()} != {n: v.shape for n, v in expected.items()}:
        raise InputError(
            f"the UNet of {folder} does not fit the model of this command, so the run began with another: "
            "give that one as --pretrained_model_name_or_path"
        )
    return stored


@torch.no_grad()
def put_weights(unet: UNet2DConditionModel, weights: Weights) -> None:
    """Copy values into the UNet's parameters, whatever device and dtype these have."""
    parameters = dict(unet.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)
