"""The logged loss against a float64 reference that is written from the formulas of the papers.

With a learning rate of 0 the weights do not change, so the logged losses are those of the base model. The reference
uses the same random draws (utils/data/draws.py) and the same networks; noise, targets, loss weights, latents, dropout
and widening are implemented a second time.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.pairs import encode, make_dataset
from utils.data.draws import DrawOrder, sample_draws

SEED = 5
SIDE = 32  # the images have the training resolution, so they are not resized
LATENT_SHAPE = (4, SIDE // 2, SIDE // 2)
PROMPTS = ["make it red", "turn the day into night", "a long instruction " * 20]


@dataclass(frozen=True)
class Case:
    """The objective of a run and its batches."""

    script: str = "finetune_instruct_pix2pix"
    num_rows: int = 32
    batch_size: int = 4
    accumulation: int = 1
    steps: int = 50
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    dropout: float = 0.05
    model: str = "tiny_editor"  # the fixture of the base

    def flags(self) -> list[str]:
        return [
            f"--train_batch_size={self.batch_size}",
            f"--gradient_accumulation_steps={self.accumulation}",
            f"--max_train_steps={self.steps}",
            f"--prediction_type={self.prediction_type}",
            f"--noise_offset={self.noise_offset}",
            f"--conditioning_dropout_prob={self.dropout}",
            *([f"--snr_gamma={self.snr_gamma}"] if self.snr_gamma else []),
            *(["--rescale_betas_zero_snr"] if self.rescale_betas_zero_snr else []),
        ]


# After widening, the weights of the image channels are zero: only the loss of an editor depends on the original image.
CASES = {
    "widened base, epsilon": Case(script="train_instruct_pix2pix", model="tiny_base"),
    "epsilon": Case(),
    "v, zero terminal SNR, min-SNR": Case(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_gamma=5.0),
    "epsilon, noise offset, min-SNR, dropout 0.2": Case(noise_offset=0.1, snr_gamma=5.0, dropout=0.2),
    "rows not a multiple of the batch": Case(num_rows=7, batch_size=3, accumulation=2, steps=40),
    "SDXL, widened base": Case(script="train_instruct_pix2pix_sdxl", model="tiny_sdxl"),
    "SDXL, dropout 0.2, rows not a multiple of the batch": Case(
        model="tiny_sdxl_editor", dropout=0.2, num_rows=7, batch_size=3, accumulation=2, steps=40
    ),
    "SDXL, v, zero terminal SNR, min-SNR": Case(
        model="tiny_sdxl_editor", prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_gamma=5.0
    ),
}


class Row(NamedTuple):
    original: np.ndarray
    prompt: str
    edited: np.ndarray


Moments = tuple[torch.Tensor, torch.Tensor]  # each (C, h, w)


# ---- the reference --------------------------------------------------------------------------------------------------


def alpha_bars(zero_terminal_snr: bool) -> torch.Tensor:
    """alpha_bar_t of Stable Diffusion's scaled-linear schedule, (1000,); rescaled by algorithm 1 of 2305.08891."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    result = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return result
    root = result.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class Reference:
    """The loss of each sample in float64."""

    def __init__(self, base: Path, case: Case) -> None:
        self.case = case
        self.alpha_bars = alpha_bars(case.rescale_betas_zero_snr)
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.text_encoders = [CLIPTextModel.from_pretrained(base / "text_encoder").double().eval()]
        if (base / "text_encoder_2").exists():
            second = CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2")
            self.text_encoders.append(second.double().eval())
        self.vae = AutoencoderKL.from_pretrained(base / "vae").double().eval()
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet").double().eval()
        self.scaling_factor = json.loads((base / "vae/config.json").read_text())["scaling_factor"]

    @torch.no_grad()
    def losses(self, rows: list[Row], visits: list[tuple[int, dict]]) -> list[float]:
        """The loss of each (row number, draws)."""
        texts = {prompt: self._encode_text(prompt) for prompt in {"", *(row.prompt for row in rows)}}
        originals = [self._encode_image(row.original) for row in rows]
        edits = [self._encode_image(row.edited) for row in rows]
        samples = [self._noise(rows[row], originals[row], edits[row], texts, draws) for row, draws in visits]
        losses = []
        for start in range(0, len(samples), 20):
            parts = zip(*samples[start : start + 20], strict=True)
            noisy, image, text, pooled, target, weight = (torch.stack(part) for part in parts)
            timesteps = torch.tensor([draws["timestep"] for _, draws in visits[start : start + 20]])
            # A UNet widened with zeros ignores the image.
            unet_input = torch.cat([noisy, image], dim=1) if self.unet.config.in_channels == 8 else noisy
            time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(noisy)).double()
            added = {"text_embeds": pooled, "time_ids": time_ids}
            prediction = self.unet(unet_input, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample
            losses += (weight * ((prediction - target) ** 2).mean(dim=(1, 2, 3))).tolist()
        return losses

    def _noise(self, row: Row, original: Moments, edited: Moments, texts: dict, draws: dict) -> tuple:
        """(noisy latents, image latents, text, pooled text, target, loss weight) of one sample."""
        case, u = self.case, draws["u_dropout"]
        noise, posterior_noise, offset = (
            torch.from_numpy(draws[name]).double() for name in ("noise", "posterior_noise", "offset_noise")
        )
        noise = noise + case.noise_offset * offset
        mean, deviation = edited
        latents = self.scaling_factor * (mean + deviation * posterior_noise)
        image = original[0]  # the mode of a Gaussian is its mean; the condition is not scaled
        if case.dropout <= u < 3 * case.dropout:
            image = torch.zeros_like(image)
        text, pooled = texts["" if u < 2 * case.dropout else row.prompt]
        alpha_bar = self.alpha_bars[draws["timestep"]]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        target = noise if case.prediction_type == "epsilon" else alpha * noise - sigma * latents
        weight = self._weight(alpha_bar / (1 - alpha_bar))
        return alpha * latents + sigma * noise, image, text, pooled, target, weight

    def _weight(self, snr: torch.Tensor) -> torch.Tensor:
        if self.case.snr_gamma is None:
            return torch.ones_like(snr)
        clamped = snr.clamp(max=self.case.snr_gamma)
        return clamped / snr if self.case.prediction_type == "epsilon" else clamped / (snr + 1)

    def _encode_text(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (77, D), and the pooled embedding (P,) of SDXL, or a zero."""
        tokens = self.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        outputs = [encoder(tokens.input_ids, output_hidden_states=True) for encoder in self.text_encoders]
        if len(outputs) == 1:
            return outputs[0].last_hidden_state[0], torch.zeros(1)
        hidden, pooled = (
            torch.cat([output.hidden_states[-2][0] for output in outputs], dim=1),
            outputs[1].text_embeds[0],
        )
        return (hidden, pooled) if prompt else (torch.zeros_like(hidden), torch.zeros_like(pooled))

    def _encode_image(self, pixels: np.ndarray) -> Moments:
        """Mean and standard deviation of the posterior of pixels (h, w, 3)."""
        scaled = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None] / 127.5 - 1
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(scaled))[0].chunk(2)
        return mean, torch.exp(log_variance / 2)


# ---- the scripts ----------------------------------------------------------------------------------------------------


def make_rows(num_rows: int) -> list[Row]:
    """Random colours with noise: every row has a different loss."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(num_rows):
        colour = generator.integers(0, 256, size=(1, 1, 3))
        original = (colour + generator.integers(-60, 60, size=(SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
        rows.append(Row(original, PROMPTS[index % len(PROMPTS)], 255 - original))
    return rows


def write_pairs(folder: Path, rows: list[Row]) -> None:
    def stored(pixels: np.ndarray) -> dict:
        return {"bytes": encode(Image.fromarray(pixels)), "path": None}

    columns = dict(
        original_image=[stored(row.original) for row in rows],
        edit_prompt=[row.prompt for row in rows],
        edited_image=[stored(row.edited) for row in rows],
    )
    folder.mkdir()
    make_dataset(columns).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("name", CASES)
def test_the_logged_loss_equals_the_reference(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case = CASES[name]
    base = request.getfixturevalue(case.model)
    rows = make_rows(case.num_rows)
    write_pairs(tmp_path / "pairs", rows)
    flags = [
        f"--pretrained_model_name_or_path={base}",
        f"--dataset_name={tmp_path / 'pairs'}",
        f"--output_dir={tmp_path / 'editor'}",
        f"--resolution={SIDE}",
        f"--seed={SEED}",
        "--learning_rate=0",
        "--logging_steps=1",
        "--report_to=none",
    ]
    assert importlib.import_module(case.script).main([*flags, *case.flags()]) == 0
    log = (tmp_path / "editor" / "training_log.jsonl").read_text().splitlines()
    logged = np.array([json.loads(line)["loss"] for line in log])

    order = DrawOrder([case.num_rows], [1.0], SEED)
    draws = range(case.steps * case.accumulation * case.batch_size)
    visits = [(order.locate(draw)[1], sample_draws(SEED, draw, LATENT_SHAPE, 1000)) for draw in draws]
    losses = Reference(base, case).losses(rows, visits)
    assert len(losses) >= 200
    assert logged.mean() == pytest.approx(np.mean(losses), rel=2e-6)
    assert logged == pytest.approx(np.reshape(losses, (case.steps, -1)).mean(axis=1), rel=2e-5)
