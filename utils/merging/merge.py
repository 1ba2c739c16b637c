"""W* = W + w dW, computed a few rows at a time in float32: by addition, TIES or DARE; and the report of a merge.

Where the papers leave a choice: the delta is multiplied by its weight first, TIES trims each tensor by itself, and
agreeing values are summed, not averaged. So at density 1 and without conflicts every method is plain addition.
"""

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from utils.errors import InputError
from utils.merging.deltas import CONV_IN, Delta, UNetWeights
from utils.models.unet_names import block_of, shorten_list
from utils.weight_files import ALL, split_rows

DEFAULT_DENSITY = {"linear": 1.0, "ties": 0.2, "dare": 0.5}  # by method; TIES: the paper's 20 %
Rows = tuple[str, slice, torch.Tensor]


@dataclass(frozen=True)
class MergeOptions:
    """weight: w in W* = W + w dW; None: chosen later.

    block_weights: (regular expression, factor) each; the last one found in a parameter's name multiplies the weight.
    conv_in: "first_four" or "skip". method: a key of `DEFAULT_DENSITY`. density: of TIES and DARE; seed: of DARE.
    """

    weight: float | None = 1.0
    block_weights: tuple[tuple[str, float], ...] = ()
    conv_in: str = "first_four"
    method: str = "linear"
    density: float = 1.0
    seed: int = 0

    def weight_of(self, name: str) -> float:
        """The weight of one parameter's delta."""
        factors = [factor for pattern, factor in self.block_weights if re.search(pattern, name)]
        return self.weight * factors[-1] if factors else self.weight


@dataclass
class BlockNorms:
    """Sums of squares of a block's weights and of its weighted delta."""

    weight: float = 0.0
    delta: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        self.weight += _sum_of_squares(before)
        if after is not before:
            self.delta += _sum_of_squares(after - before)

    @property
    def relative(self) -> float:
        return math.sqrt(self.delta / self.weight) if self.weight else float("nan")

    def as_json(self) -> dict[str, float]:
        norms = {"change_norm": math.sqrt(self.delta), "weight_norm": math.sqrt(self.weight)}
        return {"relative_change": self.relative} | norms


@dataclass
class MergeReport:
    """What a merge did. skipped: stored name -> why the tensor is not used; conv_in: a sentence."""

    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, BlockNorms] = field(default_factory=dict)
    conv_in: str = "unchanged: the source does not change it"

    def as_json(self) -> dict:
        blocks = {name: norms.as_json() for name, norms in self.blocks.items()}
        return {"blocks": blocks} | {
            name: getattr(self, name) for name in ("conv_in", "changed", "unchanged", "skipped")
        }

    def describe(self) -> str:
        """The report for the terminal."""
        lines = [f"{len(self.changed)} parameters changed, {len(self.unchanged)} unchanged"]
        lines += [f"conv_in: {self.conv_in}", "change relative to the weights, by block:"]
        lines += [f"  {name:<18} {norms.relative:.4g}" for name, norms in self.blocks.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            keys = [key for key, value in self.skipped.items() if value == reason]
            lines.append(f"not used: {shorten_list(keys, limit=2)}: {reason}")
        return "\n".join(lines)


def check_block_weights(options: MergeOptions, parameters: list[str]) -> None:
    """Raises `InputError` for an invalid regular expression, and for one that no parameter's name matches."""
    for pattern, _ in options.block_weights:
        try:
            is_found = any(re.search(pattern, name) for name in parameters)
        except re.error as error:
            raise InputError(f"--block_weights {pattern!r} is not a regular expression: {error}") from error
        if not is_found:
            blocks = ", ".join(dict.fromkeys(map(block_of, parameters)))
            raise InputError(f"--block_weights {pattern!r} matches no parameter's name; the blocks are {blocks}")


def merge_rows(
    editor: UNetWeights, delta: Delta, options: MergeOptions, base: UNetWeights | None, report: MergeReport
) -> Iterator[Rows]:
    """(parameter, rows, merged values in float32) in the editor's order; fills the report.

    base: for TIES, the model that both the editor and the distilled model were trained from.
    """
    report.skipped |= delta.skipped
    for name, shape in editor.shapes.items():
        is_changed = name in delta.shapes
        if name == CONV_IN and is_changed and options.conv_in == "skip":
            is_changed, report.conv_in = False, "unchanged: --conv_in skip"
        (report.changed if is_changed else report.unchanged).append(name)
        norms, generator = BlockNorms(), make_generator(options.seed, name)
        # TIES needs the largest values of the whole tensor.
        for rows in [ALL] if is_changed and options.method == "ties" else split_rows(shape):
            weight = editor.read(name, rows).to(torch.float32)
            merged = _merge(name, rows, weight, delta, options, base, generator) if is_changed else weight
            norms.add(weight, merged)
            yield name, rows, merged
        if name == CONV_IN and is_changed:
            num_inputs = f"{delta.shapes[name][1]} of its {shape[1]} inputs"
            report.conv_in = f"changed on {num_inputs}, relative change {norms.relative:.3g}"
        block = report.blocks.setdefault(block_of(name), BlockNorms())
        block.weight += norms.weight
        block.delta += norms.delta


def _merge(
    name: str,
    rows: slice,
    weight: torch.Tensor,
    delta: Delta,
    options: MergeOptions,
    base: UNetWeights | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Merged rows. Inputs of conv_in that the delta does not have keep the editor's weights."""
    change, factor, image_inputs = delta.read(name, rows), options.weight_of(name), None
    if name == CONV_IN and change.shape[1] < weight.shape[1]:
        weight, image_inputs = weight[:, : change.shape[1]], weight[:, change.shape[1] :]
    if options.method == "ties":
        base_weight = base.read(name, rows).float()
        base_weight = base_weight[:, : weight.shape[1]] if name == CONV_IN else base_weight
        merged = add_ties(weight, base_weight, change, factor, options.density)
    elif options.method == "dare":
        merged = add_dare(weight, change, factor, options.density, generator)
    else:
        merged = torch.add(weight, change, alpha=factor)  # task arithmetic (2212.04089)
    return merged if image_inputs is None else torch.cat([merged, image_inputs], dim=1)


def add_ties(
    weight: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, factor: float, density: float
) -> torch.Tensor:
    """TIES-Merging (2306.01708) of the deltas of editing (W - base) and of distillation (w dW).

    Trim: keep the fraction `density` of each tensor's values, the largest in magnitude. Elect: the sign of their sum.
    Merge: the base plus the sum of the values with that sign.
    """
    deltas = torch.stack([trim(weight - base, density), trim(delta * factor, density)])
    sign = deltas.sum(dim=0).sign()
    agreeing = torch.where(deltas.sign() == sign, deltas, 0.0)
    return base + agreeing.sum(dim=0)


def trim(values: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the fraction `density` of the values, the largest in magnitude; the others become zero."""
    count = math.ceil(density * values.numel())
    if count >= values.numel():
        return values
    magnitudes = values.abs().flatten()
    threshold = magnitudes.kthvalue(values.numel() - count + 1).values
    return torch.where(values.abs() >= threshold, values, 0.0)


def add_dare(
    weight: torch.Tensor, delta: torch.Tensor, factor: float, density: float, generator: torch.Generator
) -> torch.Tensor:
    """DARE (2311.03099): keep each value of the delta with probability `density`, and divide it by that."""
    is_kept = torch.rand(delta.shape, generator=generator) < density
    return torch.add(weight, torch.where(is_kept, delta / density, 0.0), alpha=factor)


def make_generator(seed: int, name: str) -> torch.Generator:
    """DARE's generator for one parameter, independent of the other parameters and their order."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # the generator uses 32 bits of a seed


def cast_rows(rows: Iterator[Rows], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Merged values in the dtype of the file. Raises `InputError` for NaN and values that overflow."""
    largest = torch.finfo(dtype).max
    for name, _, value in rows:
        least, most = value.aminmax() if value.numel() else (0.0, 0.0)  # several times faster than isfinite().all()
        if not (-largest <= least and most <= largest):  # also true for NaN
            raise InputError(
                f"{name} has values that are NaN or overflow in {str(dtype).removeprefix('torch.')}: use --dtype fp32 "
                "or a smaller --weight, and check that the sources are not damaged"
            )
        yield name, value.to(dtype)


def _sum_of_squares(values: torch.Tensor) -> float:
    flat = values.flatten()
    return float(torch.dot(flat, flat))  # several times faster than a norm
