"""Real training steps on a GPU with random weights; PyTorch measures the peak."""

import torch

from benchmarks.memory_configurations import Configuration, OtherModels
from benchmarks.memory_models import make_step, make_unet, make_vae
from utils.training.ema import MovingAverage
from utils.training.memory_saving import checkpoint_blocks
from utils.training.optimizers import OptimizationOptions, make_optimizer

NUM_STEPS = 3  # the first step allocates the optimizer's state


def measure_peak(
    config: dict,
    configuration: Configuration,
    resolution: int,
    batch_size: int,
    blocks: list[str] | None,
    others: OtherModels,
    vae_dtype: torch.dtype,
    device: str = "cuda",
) -> int | None:
    """Peak bytes that PyTorch allocated; None on the CPU, which tests use."""
    is_gpu = device == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    frozen_models = _allocate_frozen(others, vae_dtype, device)
    with torch.device(device):
        unet = make_unet(config, configuration.kind, torch.device(device) if configuration.is_nf4 else None)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()  # ignore the initialization
    if blocks:
        checkpoint_blocks(unet, blocks)
    _take_steps(unet, configuration, resolution, batch_size, frozen_models)
    return torch.cuda.max_memory_allocated() if is_gpu else None


def _allocate_frozen(others: OtherModels, vae_dtype: torch.dtype, device: str) -> tuple:
    """(VAE or None, a buffer of the size of the text encoders)."""
    if not others.frozen:
        return None, None
    with torch.device(device):
        vae = make_vae(vae_dtype)
    taken = sum(parameter.nbytes for parameter in vae.parameters())
    return vae, torch.empty(max(0, others.frozen - taken), dtype=torch.uint8, device=device)


def _take_steps(
    unet: torch.nn.Module, configuration: Configuration, resolution: int, batch_size: int, frozen_models: tuple
) -> None:
    """Encode, forward, backward, update, EMA."""
    vae, _ = frozen_models
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
    """Encode original and edited images in one call, or in two as diffusers' example."""
    for _ in range(1 if at_once else 2):
        num_images = 2 * batch_size if at_once else batch_size
        pixels = torch.zeros(num_images, 3, resolution, resolution, dtype=vae.dtype, device=vae.device)
        vae.encode(pixels, return_dict=False)[0].mode()
