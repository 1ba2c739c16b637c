"""Editors with an adapter of random weights, created like those of training."""

from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)

from utils.models.adapters import AdapterOptions, add_adapter
from utils.models.stable_diffusion import widen_conv_in

PLAIN, DORA = AdapterOptions(lora_rank=4, lora_alpha=8), AdapterOptions(lora_rank=4, use_dora=True)
EDITORS = {"sd": StableDiffusionInstructPix2PixPipeline, "sdxl": StableDiffusionXLInstructPix2PixPipeline}


def load_trained(folder: Path, options: AdapterOptions) -> DiffusionPipeline:
    """An editor with an unmerged adapter of random weights."""
    family = "sdxl" if (folder / "text_encoder_2").exists() else "sd"
    pipeline = EDITORS[family].from_pretrained(folder)
    is_base = pipeline.unet.config.in_channels == 4
    if is_base:
        widen_conv_in(pipeline.unet)
    add_adapter(pipeline.unet, options, train_conv_in=is_base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            if ".lora_B." in name or ("conv_in" in name and value.requires_grad):
                value.normal_(std=0.2)
            elif "magnitude" in name:
                value.mul_(torch.rand_like(value) + 0.5)
    return pipeline
