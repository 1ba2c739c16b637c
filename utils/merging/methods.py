"""How a change joins an editor's weights: added (task arithmetic), or by TIES or DARE, which resolve interference.

Ours, where the papers leave room: the change is multiplied by its weight first, TIES trims tensor by tensor, and what
agrees is summed and not averaged, so that at density 1, without conflicts, each method is the plain sum.
"""

from __future__ import annotations

import math
import zlib

import torch

METHODS = ("linear", "ties", "dare")
DEFAULT_DENSITY = {"linear": 1.0, "ties": 0.2, "dare": 0.5}  # TIES: the paper's 20 %


def add_linear(weight: torch.Tensor, change: torch.Tensor, factor: float) -> torch.Tensor:
    """W + w dW (2212.04089): the editor's own change of the base stays whole."""
    return torch.add(weight, change, alpha=factor)


def add_ties(
    weight: torch.Tensor, base: torch.Tensor, change: torch.Tensor, factor: float, density: float
) -> torch.Tensor:
    """TIES-Merging (2306.01708) of what editing and what distillation changed of the base.

    Trim: of W - base and of w dW, the `density` of each tensor's values with the greatest magnitude stays. Elect: the
    sign of their sum. Merge: the base plus the sum of those that have that sign.
    """
    changes = torch.stack([trim(weight - base, density), trim(change * factor, density)])
    sign = changes.sum(dim=0).sign()
    agreeing = torch.where(changes.sign() == sign, changes, 0.0)
    return base + agreeing.sum(dim=0)


def trim(values: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` of the values with the greatest magnitude, zeros in place of the others."""
    count = math.ceil(density * values.numel())
    if count >= values.numel():
        return values
    magnitudes = values.abs().flatten()
    threshold = magnitudes.kthvalue(values.numel() - count + 1).values
    return torch.where(values.abs() >= threshold, values, 0.0)


def add_dare(
    weight: torch.Tensor, change: torch.Tensor, factor: float, density: float, generator: torch.Generator
) -> torch.Tensor:
    """DARE (2311.03099): each value of the change is dropped by chance, and the `density` kept is divided by it."""
    is_kept = torch.rand(change.shape, generator=generator) < density
    return torch.add(weight, torch.where(is_kept, change / density, 0.0), alpha=factor)


def make_generator(seed: int, name: str) -> torch.Generator:
    """The chance of one tensor: the same for a seed, whatever else is merged and in which order."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it heeds 32 bits of a seed
