"""CLIP's judgement of a pair, and the bounds that it must keep (InstructPix2Pix, section 3.1.2; UltraEdit, 2407.05282).

All similarities are cosines. Pictures go through the model's own preprocessing (shorter side resized, middle cropped,
its mean and deviation). Unlike the reference, which squashes pictures to a square without antialiasing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_preparation.pairs.presets import PairSettings

# The order in which bounds are tried; a candidate counts for the first that it breaks.
BELOW = (
    ("clip_sim_image", "min_clip_image"),
    ("clip_sim_dir", "min_clip_dir"),
    ("clip_sim_0", "min_clip_text"),
    ("clip_sim_1", "min_clip_text"),
    ("change", "min_change"),
)


class CaptionFeatures(NamedTuple):
    """Of the original's and the edited caption, (D,) each and of length 1."""

    original: torch.Tensor
    edited: torch.Tensor


class ClipScorer:
    """A CLIPModel with its tokenizer and preprocessing. The features of a caption are kept while `captions` has it."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor

    @torch.no_grad()
    def encode_captions(self, original: str, edited: str) -> CaptionFeatures:
        """Features of a pair of captions; what is longer than CLIP reads is cut."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(
            [original, edited], padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        return CaptionFeatures(*F.normalize(_features(self.model.get_text_features(**inputs)).float(), dim=-1))

    @torch.no_grad()
    def encode_images(self, images: list[np.ndarray]) -> torch.Tensor:
        """N uint8 pictures (H, W, 3) -> features (N, D) of length 1."""
        pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
        pixels = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def score(
        self, originals: list[np.ndarray], edited: list[np.ndarray], captions: list[CaptionFeatures]
    ) -> list[dict[str, float]]:
        """The scores of P pairs, from pictures in uint8 (H, W, 3).

        clip_sim_0, clip_sim_1: original and edited picture with their captions; clip_sim_image: with each other;
        clip_sim_dir: change of the picture with change of the caption; change: mean absolute difference of the pixels
        in [0, 1].
        """
        first, second = self.encode_images([*originals, *edited]).chunk(2)
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


def similarity_of(captions: CaptionFeatures) -> float:
    """Of the two captions with each other."""
    return float(captions.original @ captions.edited)


def find_fault(scores: dict[str, float], settings: PairSettings) -> str | None:
    """The first bound that a candidate breaks, as a reason to be counted; None: it passes."""
    for score, bound in BELOW:
        least = getattr(settings, bound)
        if least is not None and not scores[score] >= least:  # not a number is below
            return f"{score} below {least}"
    if settings.max_clip_image is not None and scores["clip_sim_image"] > settings.max_clip_image:
        return f"clip_sim_image above {settings.max_clip_image}"
    return None


def _features(output: Any) -> torch.Tensor:
    """transformers 4 gives the features themselves, 5 an object that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
