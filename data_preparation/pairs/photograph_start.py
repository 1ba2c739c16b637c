"""Pairs that begin with a photograph: both images start from its noised latents (SDEdit, 2108.01073).

With `keeps_photograph` the first image stays the photograph itself: at every step the UNet is asked about the
photograph at that step's noise, for the queries and keys which the second image takes, and its prediction is replaced
by the true one, the noise that is really there. The first image so ends as the photograph's own latents, and the
second has its geometry, not that of a similar picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.editing.encodings import device_of, vae_in_its_precision
from utils.models.latents import encode_moments, scale_latents


@dataclass(frozen=True)
class PhotographStart:
    """latents (P, 4, h, w): of the photographs, scaled; strength in (0, 1]: the share of the steps that is taken."""

    latents: torch.Tensor
    strength: float
    keeps_photograph: bool = False

    def timesteps(self, scheduler: Any) -> torch.Tensor:
        """Those that are left of a schedule, as diffusers' image-to-image pipelines count them."""
        return scheduler.timesteps[self._num_skipped(scheduler) :]

    def begin(self, scheduler: Any, noise: torch.Tensor) -> torch.Tensor:
        """The photographs at the noise of the first step, for both images of each pair: (2P, 4, h, w)."""
        skipped = self._num_skipped(scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        first = scheduler.timesteps[skipped : skipped + 1]
        return scheduler.add_noise(self._pairs, noise, first.repeat(len(noise)))

    def correct(
        self, scheduler: Any, prediction: torch.Tensor, model_input: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The prediction (2P, 4, h, w), with the true one for first images that are to stay the photograph."""
        if not self.keeps_photograph:
            return prediction
        signal, sigma = _noise_level(scheduler, timestep)
        noisy, clean = model_input[::2], self.latents
        noise = (noisy - signal * clean) / sigma
        true = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}
        corrected = prediction.clone()
        corrected[::2] = true[scheduler.config.prediction_type]
        return corrected

    @property
    def _pairs(self) -> torch.Tensor:
        return self.latents.repeat_interleave(2, dim=0)

    def _num_skipped(self, scheduler: Any) -> int:
        total = scheduler.num_inference_steps
        kept = min(int(total * self.strength), total)
        return max(total - kept, 0) * scheduler.order


def _noise_level(scheduler: Any, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet's input is made of at a step: signal * clean + sigma * noise, of unit variance together."""
    if hasattr(scheduler, "is_scale_input_called"):  # Euler's family, which carries clean + sigma * noise
        ratio = scheduler.sigmas[scheduler.step_index]
        signal = (ratio**2 + 1) ** -0.5
        return signal, ratio * signal
    signal_power = scheduler.alphas_cumprod.to(timestep.device)[timestep.long()]
    return signal_power**0.5, (1 - signal_power) ** 0.5


@torch.no_grad()
def encode_photographs(pipeline: Any, photographs: list[np.ndarray]) -> torch.Tensor:
    """P uint8 photographs (H, W, 3) -> latents (P, 4, h, w), scaled, float32: the mode of the VAE's posterior.

    One at a time, so that the latents do not depend on the batch.
    """
    encoded = []
    with vae_in_its_precision(pipeline) as vae:
        for photograph in photographs:
            pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None]
            mode = encode_moments(vae, pixels).chunk(2, dim=1)[0]
            encoded.append(scale_latents(mode, vae.config))
    return torch.cat(encoded).to(device_of(pipeline))
