"""What is added to an editor: the difference of two UNets, a difference that was published as one, or a LoRA's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from utils.errors import InputError
from utils.merging.unet_weights import COND_PROJ, Shape, UNetWeights
from utils.weight_files import ALL

FOLDED = "time_embedding.linear_1.bias"
FOLDED_WEIGHT = "time_embedding.linear_1.weight"


class Delta(Protocol):
    """A change of a UNet's parameters, read as rows.

    shapes: parameter -> shape, of what is changed; conv_in's may have the four noise channels alone.
    skipped: what the source holds besides and is not used, with the reason.
    """

    shapes: Mapping[str, Shape]
    skipped: dict[str, str]

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Some rows of the change, float32."""
        ...


class Difference:
    """A distilled (or fine-tuned) UNet minus the one that it came from."""

    def __init__(self, distilled: UNetWeights, base: UNetWeights, lcm_guidance: float | None = None) -> None:
        """lcm_guidance: the scale for which the distilled UNet's guidance embedding is folded into a bias.

        Raises `InputError` where the two differ in shape, or there is no embedding to fold.
        """
        for name, shape in distilled.shapes.items():
            if name != COND_PROJ and shape != base.shapes.get(name, shape):
                raise InputError(
                    f"{distilled.what} and {base.what} are no pair: {name} has the shape {shape} in the one and "
                    f"{base.shapes[name]} in the other. The base must be what the distilled model was trained from"
                )
        if base.has_guidance_embedding:
            raise InputError(f"{base.what} is distilled itself (it has {COND_PROJ}): give what it was trained from")
        self._distilled, self._base, self._shift = distilled, base, None
        self.shapes = {name: shape for name, shape in distilled.shapes.items() if name != COND_PROJ}
        self.skipped = dict.fromkeys(distilled.skipped, "of another part than the UNet")
        if distilled.has_guidance_embedding and lcm_guidance is None:
            self.skipped[COND_PROJ] = "guidance embedding dropped, as the pipelines never feed it; --lcm_guidance folds"
        if lcm_guidance is not None:
            if not distilled.has_guidance_embedding:
                raise InputError(f"--lcm_guidance {lcm_guidance:g}: {distilled.what} has no {COND_PROJ} to fold")
            self._shift = fold_guidance(distilled, lcm_guidance)
            self.skipped[COND_PROJ] = f"folded into {FOLDED} for the guidance scale {lcm_guidance:g}"

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        change = self._distilled.read(name, rows).float() - self._base.read(name, rows).float()
        return change + self._shift[rows] if name == FOLDED and self._shift is not None else change


class StoredDifference:
    """A folder or file whose UNet is the difference itself (PeRFlow's form)."""

    def __init__(self, weights: UNetWeights) -> None:
        self._weights, self.shapes = weights, weights.shapes
        self.skipped = dict.fromkeys(weights.skipped, "of another part than the UNet")
        if weights.has_guidance_embedding:
            raise InputError(f"{weights.what} is no difference of weights: it has {COND_PROJ}")

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self._weights.read(name, rows).float()


def fold_guidance(unet: UNetWeights, scale: float) -> torch.Tensor:
    """What a fixed guidance scale adds to the bias of `time_embedding.linear_1`, float32 (width of the embedding).

    LCM (2310.04378) adds P e(scale - 1) to the timestep's sinusoids before linear_1, so the bias gets W1 P e.
    """
    projection = unet.read(COND_PROJ).float()  # (sinusoids, 256)
    embedding = embed_guidance(scale - 1, projection.shape[1])
    return unet.read(FOLDED_WEIGHT).float() @ (projection @ embedding)


def embed_guidance(scale: float, width: int) -> torch.Tensor:
    """The sinusoids (width,) that LCM's pipeline makes of its guidance scale minus one, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = scale * 1000.0 * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return torch.nn.functional.pad(embedding, (0, width % 2))
