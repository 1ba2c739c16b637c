"""The training configurations that are compared, from the most memory to the least, and the sum of their parts."""

import math
from dataclasses import dataclass

import torch

from benchmarks.memory_count import FLOAT32_BYTES, UPDATE_COPIES, StepCount
from benchmarks.memory_models import Weights

CACHED = "VAE (latents cached)"
CARDS = (8, 12, 16, 24, 40, 80)  # GB
MARGIN = 1.0  # GB, assumed: CUDA context (about 0.5), workspaces of cuDNN and cuBLAS, fragmentation
MIN_8BIT_ELEMENTS, OPTIMIZER_BLOCK = 4096, 256  # bitsandbytes: smaller tensors keep float32 states


@dataclass(frozen=True)
class Configuration:
    """A training configuration. kind: see `KINDS`; ema: the device of the moving average."""

    name: str
    flags: str
    kind: str
    optimizer: str
    ema: str | None = None
    is_fused: bool = False
    is_nf4: bool = False
    is_peer: bool = (
        False  # diffusers' example: everything stays on the GPU, and PyTorch's default AdamW needs temporaries
    )


EMA_ON_CPU = "--use_ema --ema_device cpu"
FUSED = "--fused_backward --max_grad_norm 0"
CONFIGURATIONS = (
    Configuration("diffusers' example", "--use_ema --gradient_checkpointing", "fp32", "adamw", ema="gpu", is_peer=True),
    Configuration("full, float32, 8-bit Adam", f"--optimizer adamw8bit {EMA_ON_CPU}", "fp32", "adamw8bit", ema="cpu"),
    Configuration(
        "full, float32, Adafactor, fused",
        f"--optimizer adafactor {FUSED} {EMA_ON_CPU}",
        "fp32",
        "adafactor",
        ema="cpu",
        is_fused=True,
    ),
    Configuration(
        "full, bf16, 8-bit Adam",
        f"--weights_dtype bf16 --optimizer adamw8bit {EMA_ON_CPU}",
        "bf16",
        "adamw8bit",
        ema="cpu",
    ),
    Configuration(
        "full, bf16, 8-bit Adam, fused",
        f"--weights_dtype bf16 --optimizer adamw8bit {FUSED} {EMA_ON_CPU}",
        "bf16",
        "adamw8bit",
        ema="cpu",
        is_fused=True,
    ),
    Configuration("LoRA r16, bf16 base", "--lora_rank 16", "lora", "adamw"),
    Configuration("LoRA r16, nf4 base", "--lora_rank 16 --quantize_base nf4", "lora", "adamw", is_nf4=True),
)


@dataclass(frozen=True)
class OtherModels:
    """The other models on the GPU.

    frozen: their bytes; encoding: peak bytes of encoding the images of a step, 0 with cached latents.
    """

    name: str
    frozen: int
    encoding: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak."""

    moment: str
    weights: int
    optimizer: int
    ema: int
    frozen: int
    gradients: int
    activations: int

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "optimizer", "ema", "frozen", "gradients", "activations")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, card: float) -> bool:
        """Whether it fits on a card of this many GB with the margin. 10^9 bytes; real cards have 7 % more."""
        return self.total / 1e9 + MARGIN <= card


def count_optimizer(name: str, weights: Weights) -> int:
    """Bytes of an optimizer's state for the trained parameters."""
    sizes = {"adamw": lambda shape: 8 * shape.numel(), "adamw8bit": _count_adam_8bit, "adafactor": _count_adafactor}
    return sum(sizes[name](shape) for shape, _ in weights.trained)


def _count_adam_8bit(shape: torch.Size) -> int:
    """Two moments of one byte each, and a float32 scale per block."""
    size = shape.numel()
    return 8 * size if size < MIN_8BIT_ELEMENTS else 2 * (size + 4 * math.ceil(size / OPTIMIZER_BLOCK))


def _count_adafactor(shape: torch.Size) -> int:
    """Float32 sums over the last and the second-to-last dimension: small for matrices, two thirds for 3x3 kernels."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * (shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel())


def estimate(
    configuration: Configuration, weights: Weights, count: StepCount, others: OtherModels, accumulates: bool = False
) -> Memory:
    """The peak of one step. accumulates: gradients of several micro-batches are accumulated.

    During the backward pass gradients are allocated while activations are freed, so the peak is not their sum. It is in
    the backward pass, in the update, or when the images are encoded.
    """
    largest = max(shape.numel() for shape, _ in weights.trained)
    update = FLOAT32_BYTES * UPDATE_COPIES * largest
    if configuration.is_peer:
        update = 4 * weights.num_trained  # foreach: the square roots of all second moments at once
    moments = {
        "backward": (count.peak_gradients, count.peak - count.peak_gradients),
        "update": (count.gradients, update),
        "encoding": (0, others.encoding),
    }
    if configuration.is_fused:
        moments |= {"backward": (0, count.fused_peak), "update": (0, 0)}
    elif accumulates:
        moments |= {"backward": (count.gradients, count.bare_peak), "encoding": (count.gradients, others.encoding)}
    moment = max(moments, key=lambda name: sum(moments[name]))
    return Memory(
        moment,
        weights.nf4_bytes if configuration.is_nf4 else weights.bytes,
        count_optimizer(configuration.optimizer, weights),
        4 * weights.num_trained if configuration.ema == "gpu" else 0,
        others.frozen,
        *moments[moment],
    )
