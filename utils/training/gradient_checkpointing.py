"""Gradient checkpointing of chosen blocks: what the backward pass computes again instead of keeping it."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from utils.errors import InputError

ALL = "all"


def list_blocks(unet_config: dict) -> list[str]:
    """The names of a UNet's blocks in the order of its forward pass, told by its configuration alone."""
    down, up = (len(unet_config.get(f"{side}_block_types") or ("",) * 4) for side in ("down", "up"))  # 4 by default
    middle = ["mid_block"] if unet_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") else []
    return [*(f"down_blocks.{n}" for n in range(down)), *middle, *(f"up_blocks.{n}" for n in range(up))]


def find_block_problems(blocks: list[str], unet_config: dict) -> list[str]:
    """What is wrong with the names given as --gradient_checkpointing_blocks; one sentence each."""
    allowed = list_blocks(unet_config)
    return [
        f"--gradient_checkpointing_blocks names {name!r}, which this UNet does not have: "
        f"its blocks are {', '.join(allowed)}, and {ALL!r} stands for every one"
        for name in dict.fromkeys(blocks)
        if name not in (*allowed, ALL)
    ]


def checkpoint_blocks(unet: UNet2DConditionModel, blocks: list[str] | None) -> None:
    """Let the backward pass compute again what is inside these blocks; None and "all" mean every block.

    Of such a block only the inputs of its resnets and transformer layers (and what its resampling needs) are kept.
    Losses and gradients stay the same. Raises `InputError` for a name that the UNet does not have.
    """
    if blocks is not None and (problems := find_block_problems(blocks, unet.config)):
        raise InputError.from_problems(problems)
    unet.enable_gradient_checkpointing()  # diffusers knows all or nothing, so the others are taken back
    chosen = list_blocks(unet.config) if blocks is None or ALL in blocks else blocks
    for name in set(list_blocks(unet.config)) - set(chosen):
        for module in _checkpointing_modules(unet.get_submodule(name)):
            module.gradient_checkpointing = False


def _checkpointing_modules(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The block and the transformers in it: each decides for itself."""
    return [module for module in block.modules() if hasattr(module, "gradient_checkpointing")]
