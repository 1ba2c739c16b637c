"""The same steps for real, on a GPU: random weights, the suite's own parts, PyTorch's own account of the peak."""

from __future__ import annotations

import torch

from benchmarks.memory_ladder import Configuration, Surroundings
from benchmarks.memory_models import make_step, make_unet, make_vae
from utils.training.ema import MovingAverage
from utils.training.memory_saving import checkpoint_blocks
from utils.training.optimizers import OptimizationOptions, make_optimizer

NUM_STEPS = 3  # the optimizer's state comes with the first


def measure_peak(
    config: dict,
    configuration: Configuration,
    resolution: int,
    batch_size: int,
    blocks: list[str] | None,
    around: Surroundings,
    vae_dtype: torch.dtype,
    device: str = "cuda",
) -> int | None:
    """The most bytes that PyTorch had allocated; None where the device keeps no account (tests run on the CPU)."""
    is_gpu = device == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    around_unet = _allocate_frozen(around, vae_dtype, device)
    with torch.device(device):
        unet = make_unet(config, configuration.kind, torch.device(device) if configuration.is_nf4 else None)
    if is_gpu:
        unet.to(memory_format=torch.channels_last)
        torch.cuda.reset_peak_memory_stats()  # of the making, which is done layer by layer in training
    if blocks:
        checkpoint_blocks(unet, blocks)
    _take_steps(unet, configuration, resolution, batch_size, around_unet)
    return torch.cuda.max_memory_allocated() if is_gpu else None


def _allocate_frozen(around: Surroundings, vae_dtype: torch.dtype, device: str) -> tuple:
    """(VAE or None, the bytes of the text encoders): they only take their place, as they do while a UNet is trained."""
    if not around.frozen:
        return None, None
    with torch.device(device):
        vae = make_vae(vae_dtype)
    taken = sum(parameter.nbytes for parameter in vae.parameters())
    return vae, torch.empty(max(0, around.frozen - taken), dtype=torch.uint8, device=device)


def _take_steps(
    unet: torch.nn.Module, configuration: Configuration, resolution: int, batch_size: int, around_unet: tuple
) -> None:
    """Encode, forward, backward, update, average."""
    vae, _ = around_unet
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if configuration.is_peer:
        optimizer = torch.optim.AdamW(trained)
    else:
        weights_dtype = "bf16" if configuration.kind == "bf16" else "fp32"
        options = OptimizationOptions(
            optimizer=configuration.optimizer, weights_dtype=weights_dtype, fused_backward=configuration.is_fused
        )
        optimizer = make_optimizer(trained, options, samples_per_step=1)
    average = None
    if configuration.ema:
        average = MovingAverage(unet, 0.9999, "cpu" if configuration.ema == "cpu" else None)
    forward = make_step(unet, resolution, batch_size)
    for step in range(1, NUM_STEPS + 1):
        if vae is not None:
            _encode(vae, resolution, batch_size, at_once=not configuration.is_peer)
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update(unet, step)
    if average:
        average.close()


@torch.no_grad()
def _encode(vae: torch.nn.Module, resolution: int, batch_size: int, at_once: bool) -> None:
    """Original and edited images: in one call, as the suite does, or in two, as diffusers' example does."""
    for _ in range(1 if at_once else 2):
        num_images = 2 * batch_size if at_once else batch_size
        pixels = torch.zeros(num_images, 3, resolution, resolution, dtype=vae.dtype, device=vae.device)
        vae.encode(pixels, return_dict=False)[0].mode()
