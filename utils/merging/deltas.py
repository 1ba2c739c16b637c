"""What is added to an editor: the difference of two UNets, or a stored difference, read a few rows at a time."""

from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch

from utils.errors import InputError
from utils.merging.weight_sources import SourceFiles
from utils.models.latents import LATENT_CHANNELS
from utils.models.unet_names import match_parameters, shorten_list
from utils.weight_files import ALL, TensorFiles

Shape = tuple[int, ...]
CONV_IN = "conv_in.weight"
COND_PROJ = "time_embedding.cond_proj.weight"  # (width, 256): LCM's guidance embedding
FOLDED_BIAS = "time_embedding.linear_1.bias"
FOLDED_WEIGHT = "time_embedding.linear_1.weight"
OTHER_COMPONENT = "not a weight of the UNet"
MAX_PROBLEMS = 8


class Delta(Protocol):
    """A difference of UNet weights.

    shapes: of the parameters it changes; conv_in may have only the 4 channels of the noisy latents.
    skipped: stored name -> why the tensor is not used.
    """

    shapes: Mapping[str, Shape]
    skipped: dict[str, str]

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Rows of a parameter's delta, float32."""
        ...


class UNetWeights:
    """The weights of a whole UNet, under the names and in the shapes of the editor's. skipped: see `Delta`."""

    def __init__(self, source: SourceFiles, shapes: Mapping[str, Shape], layers_per_block: int | list[int]) -> None:
        """shapes: of the editor's parameters.

        conv_in may have 4 channels instead of 8, and 1x1 convolutions may be stored as matrices or the reverse. LCM's
        guidance embedding may be there too. Raises `InputError` for missing and unknown names and other shapes.
        """
        self.flag = source.source.flag_and_name
        self._files = TensorFiles(source.files, self.flag)
        stored = self._files.shapes
        self._names, others, unknown = match_parameters(stored, {*shapes, COND_PROJ}, layers_per_block)
        self.skipped = dict.fromkeys(others, OTHER_COMPONENT)
        self.shapes = {name: stored[key] for name, key in self._names.items()}
        for name in self.shapes.keys() & shapes.keys():
            shape, expected = self.shapes[name], shapes[name]
            if shape[:2] == expected[:2] and prod(shape) == prod(expected):
                self.shapes[name] = expected
        self._refuse_mismatch(shapes, unknown)

    @property
    def has_guidance_embedding(self) -> bool:
        return COND_PROJ in self._names

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Rows of a parameter in the stored dtype. Do not change them in place: they may be memory-mapped."""
        value = self._files.read(self._names[name], rows)
        return value.reshape(len(value), *self.shapes[name][1:]) if value.ndim else value

    def _refuse_mismatch(self, shapes: Mapping[str, Shape], unknown: list[str]) -> None:
        problems = []
        if unknown and self._names and not shapes.keys() & self._names.keys():
            problems.append(f"it is not a UNet in diffusers' or the original format: {shorten_list(unknown)}")
        elif unknown:
            problems.append(f"unknown weights: {shorten_list(unknown)}")
        if missing := [name for name in shapes if name not in self._names]:
            problems.append(f"missing weights: {shorten_list(missing)}")
        for name, expected in shapes.items():
            shape = self.shapes.get(name, expected)
            narrow = (expected[0], LATENT_CHANNELS, *expected[2:])
            if shape != expected and not (name == CONV_IN and shape == narrow):
                problems.append(f"{name} has shape {shape}, in the editor {expected}")
        if problems:
            more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            raise InputError(
                f"{self.flag} does not match the editor: {'; '.join(problems[:MAX_PROBLEMS])}{more}. "
                "Both must be of the same family (SD 1.x, SD 2.x, SDXL)"
            )


class UNetDifference:
    """A distilled or fine-tuned UNet minus the UNet that it was trained from."""

    def __init__(self, distilled: UNetWeights, base: UNetWeights, lcm_guidance: float | None = None) -> None:
        """lcm_guidance: the guidance scale for which the distilled UNet's guidance embedding is folded into a bias.

        Raises `InputError` if the shapes differ, or there is no guidance embedding to fold.
        """
        self.shapes = {name: shape for name, shape in distilled.shapes.items() if name != COND_PROJ}
        for name, shape in self.shapes.items():
            if shape != base.shapes.get(name, shape):
                shapes = f"{name} has shape {shape} and {base.shapes[name]}"
                advice = "--base must be the model that --distilled was trained from"
                raise InputError(f"{distilled.flag} does not match {base.flag}: {shapes}. {advice}")
        if base.has_guidance_embedding:
            raise InputError(f"{base.flag} is distilled (it has {COND_PROJ}): give the model it was trained from")
        self._distilled, self._base, self._bias_delta = distilled, base, None
        self.skipped = dict(distilled.skipped)
        if lcm_guidance is not None:
            if not distilled.has_guidance_embedding:
                raise InputError(f"--lcm_guidance {lcm_guidance:g}: {distilled.flag} has no {COND_PROJ} to fold")
            self._bias_delta = fold_guidance(distilled, lcm_guidance)
            self.skipped[COND_PROJ] = f"folded into {FOLDED_BIAS} for guidance scale {lcm_guidance:g}"
        elif distilled.has_guidance_embedding:
            self.skipped[COND_PROJ] = "guidance embedding, which the pipelines do not use; --lcm_guidance folds it"

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        delta = self._distilled.read(name, rows).float() - self._base.read(name, rows).float()
        return delta + self._bias_delta[rows] if name == FOLDED_BIAS and self._bias_delta is not None else delta


class StoredDifference:
    """A difference that was published as a UNet (PeRFlow)."""

    def __init__(self, weights: UNetWeights) -> None:
        self._weights, self.shapes, self.skipped = weights, weights.shapes, weights.skipped
        if weights.has_guidance_embedding:
            raise InputError(f"{weights.flag} is not a difference of weights: it has {COND_PROJ}")

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self._weights.read(name, rows).float()


def fold_guidance(unet: UNetWeights, scale: float) -> torch.Tensor:
    """What a fixed guidance scale adds to the bias of `time_embedding.linear_1`, float32 (width,).

    LCM (2310.04378) adds P e(scale - 1) to the sinusoids of the timestep before linear_1: the bias grows by W1 P e.
    """
    projection = unet.read(COND_PROJ).float()  # (sinusoids, 256)
    embedding = embed_guidance(scale - 1, projection.shape[1])
    return unet.read(FOLDED_WEIGHT).float() @ (projection @ embedding)


def embed_guidance(scale: float, width: int) -> torch.Tensor:
    """LCM's sinusoidal embedding (width,) of its guidance scale minus one, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = scale * 1000.0 * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return torch.nn.functional.pad(embedding, (0, width % 2))
