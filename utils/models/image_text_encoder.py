"""Features of images and texts by CLIP or SigLIP."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image


@dataclass(frozen=True)
class ImageTextEncoder:
    """A CLIP or SigLIP model of transformers with its tokenizer and image processor."""

    model: Any
    tokenizer: Any
    image_processor: Any

    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Features float32 (N, D) of length 1. Images are resized and cropped as the model was trained."""
        return self.encode_pixels(self.image_processor(images=images, return_tensors="pt")["pixel_values"])

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features float32 (N, D) of length 1 of normalised pixels (N, 3, H, W) of the model's size."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Features float32 (N, D) of length 1. Texts longer than the model's context are truncated."""
        config = self.model.config.text_config
        padding = "max_length" if config.model_type.startswith("siglip") else True  # SigLIP was trained without a mask
        settings = dict(padding=padding, max_length=config.max_position_embeddings, truncation=True)
        inputs = self.tokenizer(texts, return_tensors="pt", **settings).to(self.model.device)
        return F.normalize(_features(self.model.get_text_features(**inputs)).float(), dim=-1)


def _features(output: Any) -> torch.Tensor:
    """transformers 4 returns the features themselves, 5 an object that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
