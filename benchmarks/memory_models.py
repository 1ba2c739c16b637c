"""Stable Diffusion 1.5 and XL from their published configurations, without weights."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory_count import StepCount, count_peak, count_saved, count_step, like_cuda
from utils.models.adapters import AdapterOptions, add_adapter, cast_frozen
from utils.training.memory_saving import checkpoint_blocks

KINDS = ("fp32", "bf16", "lora")  # what is trained: all weights in float32, in bfloat16, or an adapter of a bf16 base
PROMPT_TOKENS, PIXELS_PER_LATENT = 77, 8
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # a one-byte scale for 64 weights, a float32 for 256 scales
UNETS = {
    "sd15": dict(
        in_channels=8,
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(320, 640, 1280, 1280),
    ),
    "sdxl": dict(
        in_channels=8,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        layers_per_block=2,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CLIP_L, CLIP_BIG_G = 123_060_480, 694_659_840  # parameters
TEXT_PARAMETERS = {"sd15": CLIP_L, "sdxl": CLIP_L + CLIP_BIG_G}


@dataclass(frozen=True)
class Weights:
    """Sizes of a UNet's weights. nf4_bytes: with the frozen Linear layers in 4 bits."""

    parameters: int
    bytes: int
    nf4_bytes: int
    trained: tuple[tuple[torch.Size, int], ...]  # (shape, bytes of an element)

    @property
    def num_trained(self) -> int:
        return sum(shape.numel() for shape, _ in self.trained)


def make_unet(config: dict, kind: str, quantize_on: torch.device | None = None) -> UNet2DConditionModel:
    """A UNet as in training, on the device of an enclosing `with torch.device(...)`.

    quantize_on: quantize the base of an adapter to nf4 on this device, which needs real tensors.
    """
    unet = UNet2DConditionModel.from_config(config)
    if kind == "bf16":
        for parameter in unet.parameters():
            parameter.data = parameter.data.bfloat16()
    elif kind == "lora":
        if quantize_on is not None:
            from utils.models.quantization import quantize_linears

            quantize_linears(unet, "nf4", quantize_on, torch.bfloat16)
        add_adapter(unet, AdapterOptions(lora_rank=16), train_conv_in=True)
        cast_frozen(unet, torch.bfloat16)
    return unet


def make_vae(dtype: torch.dtype) -> AutoencoderKL:
    """The frozen VAE of both models."""
    vae = AutoencoderKL(**VAE).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)  # `vae.to` would warn about modules to keep in float32
    return vae


@cache
def weigh_vae(dtype: torch.dtype) -> int:
    """Bytes of the VAE's weights."""
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in make_vae(dtype).parameters())


def weigh(config: dict, kind: str) -> Weights:
    """Count the sizes of a UNet's weights."""
    with torch.device("meta"):
        unet = make_unet(config, kind)
    quantized = {
        id(module.weight)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and ".lora_" not in name
    }
    values = list(unet.parameters())
    return Weights(
        parameters=sum(value.numel() for value in values),
        bytes=sum(value.nbytes for value in values),
        nf4_bytes=sum(count_nf4(value.numel()) if id(value) in quantized else value.nbytes for value in values),
        trained=tuple((value.shape, value.element_size()) for value in values if value.requires_grad),
    )


def count_nf4(num_weights: int) -> int:
    """Bytes of a layer's weights in bitsandbytes' nf4 with quantised scales."""
    scales = math.ceil(num_weights / NF4_BLOCK)
    tables = 4 * (16 + 256 + 1)  # the 4-bit and 8-bit code books, and the mean of the scales
    return math.ceil(num_weights / 2) + scales + 4 * math.ceil(scales / NF4_OUTER_BLOCK) + tables


def make_step(unet: UNet2DConditionModel, resolution: int, batch_size: int) -> Callable[[], torch.Tensor]:
    """The forward pass of a training step, under bf16 autocast, on the UNet's device; it returns the loss."""
    device = unet.conv_in.weight.device
    side = resolution // PIXELS_PER_LATENT
    latents = torch.zeros(batch_size, unet.config.in_channels, side, side, device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    prompts = torch.zeros(
        batch_size, PROMPT_TOKENS, unet.config.cross_attention_dim, device=device, dtype=torch.bfloat16
    )
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.zeros(batch_size, pooled, device=device, dtype=torch.bfloat16),
            "time_ids": torch.zeros(batch_size, 6, device=device),
        }

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            prediction = unet(latents, timesteps, prompts, added_cond_kwargs=added, return_dict=False)[0]
        return prediction.float().square().mean()

    return forward


def count_unet(
    config: dict,
    kind: str,
    resolution: int,
    batch_size: int = 1,
    blocks: list[str] | None = None,
    only_saved: bool = False,
    is_fake: bool = True,
) -> StepCount | int:
    """Count a training step of a UNet. blocks: those that are checkpointed; only_saved: count only the saved bytes.

    is_fake: use fake tensors; False uses real tensors on the CPU.
    """
    with torch.device("meta" if is_fake else "cpu"):
        unet = make_unet(config, kind)
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext(), like_cuda():
        if is_fake:
            unet.to_empty(device="cpu")
        if blocks:
            checkpoint_blocks(unet, blocks)
        forward = make_step(unet, resolution, batch_size)
        return count_saved(unet, forward) if only_saved else count_step(unet, forward)


@cache
def count_vae_encoding(resolution: int, num_images: int, dtype: torch.dtype) -> int:
    """Peak bytes of encoding a batch of images, without the VAE's weights."""
    with torch.device("meta"):
        vae = make_vae(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), like_cuda():
        vae.to_empty(device="cpu")
        pixels = torch.zeros(num_images, 3, resolution, resolution, dtype=dtype)
        return count_peak(vae, lambda: vae.encode(pixels, return_dict=False)[0].parameters)
