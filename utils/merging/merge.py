"""An editor's UNet plus a weighted change, computed rows by rows in float32, and what is to be told of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt

import torch

from utils.errors import InputError
from utils.merging.deltas import Delta
from utils.merging.methods import add_dare, add_linear, add_ties, make_generator
from utils.merging.unet_names import block_of
from utils.merging.unet_weights import CONV_IN, UNetWeights
from utils.weight_files import ALL, split_rows

Rows = tuple[str, slice, torch.Tensor]


@dataclass(frozen=True)
class MergeOptions:
    """W* = W + weight dW.

    block_weights: (regular expression, factor) each; the factor of the last one found in a parameter's name multiplies
    the weight (None: not decided yet). conv_in: "first_four" or "skip". density, seed: of TIES and DARE.
    """

    weight: float | None = 1.0
    block_weights: tuple[tuple[str, float], ...] = ()
    conv_in: str = "first_four"
    method: str = "linear"
    density: float = 1.0
    seed: int = 0

    def weight_of(self, name: str) -> float:
        """What a parameter's change is multiplied by."""
        factors = [factor for pattern, factor in self.block_weights if re.search(pattern, name)]
        return self.weight * factors[-1] if factors else self.weight


@dataclass
class Sizes:
    """Sums of squares of a block's weights, and of its change as it was added."""

    weight: float = 0.0
    change: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self.weight += _sum_of_squares(before)
        if after is not before:
            self.change += _sum_of_squares(after - before)

    def join(self, other: Sizes) -> None:
        self.weight += other.weight
        self.change += other.change

    @property
    def relative(self) -> float:
        return sqrt(self.change / self.weight) if self.weight else float("nan")


@dataclass
class MergeReport:
    """What a merge did. blocks: sizes by block; skipped: stored name -> why it was left out."""

    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Sizes] = field(default_factory=dict)
    conv_in: str = "not changed: the source does not change it"

    def as_json(self) -> dict:
        blocks = {
            name: {
                "relative_change": sizes.relative,
                "change_norm": sqrt(sizes.change),
                "weight_norm": sqrt(sizes.weight),
            }
            for name, sizes in self.blocks.items()
        }
        return {
            "blocks": blocks,
            "conv_in": self.conv_in,
            "changed": self.changed,
            "unchanged": self.unchanged,
            "skipped": self.skipped,
        }

    def describe(self) -> str:
        """What the terminal shows."""
        lines = [f"{len(self.changed)} parameters changed, {len(self.unchanged)} left as they were"]
        lines += [f"conv_in: {self.conv_in}", "change relative to the weights, by block:"]
        lines += [f"  {name:<18} {sizes.relative:.4g}" for name, sizes in self.blocks.items()]
        reasons: dict[str, list[str]] = {}
        for key, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(key)
        for reason, keys in reasons.items():
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            lines.append(f"not used: {', '.join(keys[:2])}{more}: {reason}")
        return "\n".join(lines)


def check_options(options: MergeOptions, parameters: list[str]) -> None:
    """Raises `InputError` for a block weight that concerns no parameter, or is no regular expression."""
    for pattern, _ in options.block_weights:
        try:
            found = any(re.search(pattern, name) for name in parameters)
        except re.error as error:
            raise InputError(f"--block_weights {pattern!r} is no regular expression: {error}") from error
        if not found:
            blocks = ", ".join(dict.fromkeys(map(block_of, parameters)))
            raise InputError(f"--block_weights {pattern!r} is found in no parameter's name; the blocks are {blocks}")


def merge_rows(
    editor: UNetWeights, delta: Delta, options: MergeOptions, base: UNetWeights | None, report: MergeReport
) -> Iterator[Rows]:
    """(parameter, its rows, their merged values in float32), in the editor's order; fills the report.

    base: what editor and delta came from, which TIES needs. The values given are the caller's to change.
    """
    report.skipped |= delta.skipped
    for name, shape in editor.shapes.items():
        is_changed = name in delta.shapes
        if name == CONV_IN and is_changed and options.conv_in == "skip":
            is_changed, report.conv_in = False, "not changed: --conv_in skip"
        (report.changed if is_changed else report.unchanged).append(name)
        sizes, generator = Sizes(), make_generator(options.seed, name)
        # TIES looks for the greatest values of a whole tensor.
        for rows in [ALL] if is_changed and options.method == "ties" else split_rows(shape):
            weight = editor.read(name, rows).to(torch.float32)
            merged = _merge(name, rows, weight, delta, options, base, generator) if is_changed else weight
            sizes.add(weight, merged)
            yield name, rows, merged
        if name == CONV_IN and is_changed:
            channels = delta.shapes[name][1]
            report.conv_in = f"changed on {channels} of its {shape[1]} inputs, by {sizes.relative:.3g} of its size"
        report.blocks.setdefault(block_of(name), Sizes()).join(sizes)


def _merge(
    name: str,
    rows: slice,
    weight: torch.Tensor,
    delta: Delta,
    options: MergeOptions,
    base: UNetWeights | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Merged rows; of conv_in the inputs that the change has, the others stay."""
    change, factor = delta.read(name, rows), options.weight_of(name)
    kept = None
    if name == CONV_IN and change.shape[1] < weight.shape[1]:
        weight, kept = weight[:, : change.shape[1]], weight[:, change.shape[1] :]
    if options.method == "ties":
        own = base.read(name, rows).float()
        merged = add_ties(
            weight, own[:, : weight.shape[1]] if name == CONV_IN else own, change, factor, options.density
        )
    elif options.method == "dare":
        merged = add_dare(weight, change, factor, options.density, generator)
    else:
        merged = add_linear(weight, change, factor)
    return merged if kept is None else torch.cat([merged, kept], dim=1)


def cast_rows(rows: Iterator[Rows], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Merged values in the dtype of the file. Raises `InputError` where they are no numbers or run over it."""
    greatest = torch.finfo(dtype).max
    for name, _, value in rows:
        least, most = value.aminmax() if value.numel() else (0.0, 0.0)  # several times quicker than a norm
        if not (-greatest <= least and most <= greatest):  # NaN neither
            raise InputError(
                f"{name} holds values that are no numbers, or too great for {str(dtype).removeprefix('torch.')}: a "
                "source is damaged, the weight too great, or --dtype fp32 is needed"
            )
        yield name, value.to(dtype)


def _sum_of_squares(values: torch.Tensor) -> float:
    flat = values.flatten()
    return float(torch.dot(flat, flat))  # several times quicker than a norm
