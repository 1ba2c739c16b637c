"""The filters of generate_pairs.py: scores of CLIP with bounds, a safety checker, and a function of the user.

The CLIP scores and bounds are those of InstructPix2Pix (section 3.1.2) and UltraEdit (2407.05282). All similarities are
cosines. Images go through the preprocessing of the CLIP model (resize, centre crop, normalise), unlike the code of
InstructPix2Pix, which squashes them to a square without antialiasing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image

from data_preparation.generation.user_functions import call_function, load_function
from data_preparation.pairs.settings import PairSettings
from utils.errors import InputError
from utils.models.image_text_encoder import ImageTextEncoder

# (score, its lower bound) in the order of the checks; a rejected candidate counts for the first bound that it violates.
LOWER_BOUNDS = (
    ("clip_sim_image", "min_clip_image"),
    ("clip_sim_dir", "min_clip_dir"),
    ("clip_sim_0", "min_clip_text"),
    ("clip_sim_1", "min_clip_text"),
    ("change", "min_change"),
)
ImageCheck = Callable[[list[np.ndarray]], list[bool]]  # uint8 images (H, W, 3) -> whether to reject each


class CaptionFeatures(NamedTuple):
    """CLIP features of the original and the edited caption, (D,) each, of length 1."""

    original: torch.Tensor
    edited: torch.Tensor

    @property
    def similarity(self) -> float:
        return float(self.original @ self.edited)


@dataclass(frozen=True)
class ClipScorer:
    """Scores pairs by the features of a CLIP model."""

    encoder: ImageTextEncoder

    def encode_captions(self, original: str, edited: str) -> CaptionFeatures:
        """Captions longer than the context of CLIP are truncated."""
        return CaptionFeatures(*self.encoder.encode_texts([original, edited]))

    def score(
        self, originals: list[np.ndarray], edited: list[np.ndarray], captions: list[CaptionFeatures]
    ) -> list[dict[str, float]]:
        """The scores of P pairs of uint8 images (H, W, 3).

        clip_sim_0, clip_sim_1: original and edited image with their captions; clip_sim_image: with each other;
        clip_sim_dir: change of the image with change of the caption; change: mean absolute difference of the pixels
        in [0, 1].
        """
        images = [Image.fromarray(np.ascontiguousarray(image)) for image in (*originals, *edited)]
        first, second = self.encoder.encode_images(images).chunk(2)
        text_0, text_1 = (torch.stack(features) for features in zip(*captions, strict=True))
        columns = {
            "clip_sim_0": F.cosine_similarity(first, text_0),
            "clip_sim_1": F.cosine_similarity(second, text_1),
            "clip_sim_dir": F.cosine_similarity(second - first, text_1 - text_0),
            "clip_sim_image": F.cosine_similarity(first, second),
        }
        rows = [dict(zip(columns, values, strict=True)) for values in torch.stack([*columns.values()], 1).tolist()]
        for row, before, after in zip(rows, originals, edited, strict=True):
            row["change"] = float(np.abs(before.astype(np.int16) - after.astype(np.int16)).mean() / 255)
        return rows


def find_violated_bound(scores: dict[str, float], settings: PairSettings) -> str | None:
    """The first bound that the scores violate, as the reason of the rejection; None if they pass."""
    for score, bound in LOWER_BOUNDS:
        limit = getattr(settings, bound)
        if limit is not None and not scores[score] >= limit:  # NaN is rejected too
            return f"{score} below {limit}"
    if settings.max_clip_image is not None and scores["clip_sim_image"] > settings.max_clip_image:
        return f"clip_sim_image above {settings.max_clip_image}"
    return None


def make_safety_check(checker: StableDiffusionSafetyChecker, image_processor: Any) -> ImageCheck:
    weight = next(checker.parameters())

    @torch.no_grad()
    def check(images: list[np.ndarray]) -> list[bool]:
        pixels = image_processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        # The checker blackens flagged images in place, so it gets placeholders of one pixel.
        placeholders = np.zeros((len(images), 1, 1, 3))
        flags = checker(images=placeholders, clip_input=pixels.to(weight.device, weight.dtype))[1]
        return [bool(flag) for flag in flags]

    return check


def load_image_check(spec: str) -> ImageCheck:
    """The function `python:FILE:FUNCTION`. Raises InputError if it does not exist or does not fit."""
    function = load_function("--image_check", spec)

    def check(images: list[np.ndarray]) -> list[bool]:
        flags = call_function("--image_check", spec, lambda: [bool(flag) for flag in function(images)])
        if len(flags) != len(images):
            raise InputError(f"--image_check {spec}: returned {len(flags)} values for {len(images)} images")
        return flags

    return check
