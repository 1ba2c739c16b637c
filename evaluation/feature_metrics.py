"""Similarities of images and texts by pretrained encoders: CLIP or SigLIP, and DINO.

All similarities are cosines of features, in [-1, 1]. Images are RGB; each encoder resizes and crops them as it was
trained (CLIP: the shorter side to its size with a bicubic filter, then the centre).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from utils.errors import explaining_load_errors
from utils.models.image_text_encoder import ImageTextEncoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_ADVICE = "give the folder or Hub id of a CLIP or SigLIP model of transformers, or none"
DINO_ADVICE = "give the folder or Hub id of a DINO or DINOv2 model of transformers, or none"
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. (2401.09603), section 4
# What the original's ClipSimilarity normalises with
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LegacyEncoder(ImageTextEncoder):
    """CLIP with the preprocessing of the original InstructPix2Pix's metrics/clip_similarity.py, faults included."""

    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Features float32 (N, D) of length 1."""
        return self.encode_pixels(torch.cat([self._squashed(image) for image in images]))

    def _squashed(self, image: Image.Image) -> torch.Tensor:
        """Squashed to a square without antialiasing, and normalised as if [-1, 1] were [0, 1] (unclamped)."""
        size = self.model.config.vision_config.image_size
        values = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None] / 127.5 - 1
        values = F.interpolate(values, (size, size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
        return (values - mean) / std


@dataclass(frozen=True)
class ImageEncoder:
    """DINO or DINOv2: the class token of the last layer."""

    model: Any

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Features float32 (N, D) of length 1.

        As MagicBrush's scorer for dino_vits16: the shorter side to 8/7 of the model's size (224: 256) with a bicubic
        filter, the centre, and ImageNet's mean and deviation.
        """
        pixels = torch.stack([self._pixels(image) for image in images]).to(self.model.device, self.model.dtype)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        size = min(self.model.config.image_size, 224)  # DINOv2 is trained up to 518, and evaluated at 224
        scale = size * 8 / 7 / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.array(resized)).float().permute(2, 0, 1) / 255
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        return (values - mean) / std


def load_image_text_encoder(name: str, device: str, legacy: bool = False) -> ImageTextEncoder:
    """CLIP or SigLIP, of the Hub or a folder. Raises InputError."""
    with explaining_load_errors(f"--clip_model {name}", CLIP_ADVICE):
        model = AutoModel.from_pretrained(name).eval().to(device)
        parts = (AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name))
        return (LegacyEncoder if legacy else ImageTextEncoder)(model, *parts)


def load_image_encoder(name: str, device: str) -> ImageEncoder:
    """DINO or DINOv2, of the Hub or a folder. Raises InputError."""
    with explaining_load_errors(f"--dino_model {name}", DINO_ADVICE):
        return ImageEncoder(AutoModel.from_pretrained(name).eval().to(device))


def direction_similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP directional similarity (B,): the change of the image with the change of the caption (2108.00946).

    images, texts: features (B, 2, D) before and after the edit. 0 where nothing changes.
    """
    return F.cosine_similarity(images[:, 1] - images[:, 0], texts[:, 1] - texts[:, 0])


def cmmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """CLIP-embedding maximum mean discrepancy of two sets of features (N, D) and (M, D) of length 1; 0 for equal sets.

    The squared discrepancy with a Gaussian kernel of deviation 10, times 1000 (2401.09603, equation 4).
    """
    gamma = 1 / (2 * CMMD_SIGMA**2)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-gamma * torch.cdist(a.double(), b.double()) ** 2).mean()

    return float(CMMD_SCALE * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)))
