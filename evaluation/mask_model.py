"""--mask_model: the area that an instruction is about, by CLIPSeg (2112.10003), for datasets without masks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

from evaluation.feature_metrics import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import explaining_load_errors

THRESHOLD = 0.5
ADVICE = "give the folder or Hub id of a CLIPSeg model of transformers, such as CIDAS/clipseg-rd64-refined"


@dataclass(frozen=True)
class MaskModel:
    """A CLIPSeg model with its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def find(self, image: Image.Image, text: str) -> np.ndarray:
        """bool (H, W): where the model sees what the text names, with a probability of at least 0.5.

        The image is squashed to the model's size, as CLIPSeg's processor does, and the mask resized back.
        """
        size = self.model.config.vision_config.image_size
        pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).float() / 255
        mean, std = (torch.tensor(numbers) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        inputs = {"pixel_values": ((pixels - mean) / std).permute(2, 0, 1)[None]} | dict(tokens)
        logits = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()}).logits
        logits = logits.reshape(1, 1, *logits.shape[-2:])
        found = torch.nn.functional.interpolate(logits.float(), image.size[::-1], mode="bilinear", align_corners=False)
        return (found.sigmoid()[0, 0] >= THRESHOLD).cpu().numpy()


def load_mask_model(name: str, device: str) -> MaskModel:
    """CLIPSeg, of the Hub or a folder. Raises InputError."""
    with explaining_load_errors(f"--mask_model {name}", ADVICE):
        model = CLIPSegForImageSegmentation.from_pretrained(name).eval().to(device)
        return MaskModel(model, AutoTokenizer.from_pretrained(name))
