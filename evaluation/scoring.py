"""All scores of edits: against the original, the captions, the target image, inside and outside the edited area.

| score | range | compares |
|---|---|---|
| clip_image | -1 to 1 | the edit with the original, by CLIP (InstructPix2Pix, section 4) |
| clip_direction | -1 to 1 | the change of the image with the change of the caption, by CLIP (section 4) |
| clip_text | -1 to 1 | the edit with the caption of the target, by CLIP (MagicBrush's CLIP-T, Emu Edit's CLIPout) |
| dino | -1 to 1 | the edit with the original, by DINO |
| clip_target, dino_target | -1 to 1 | the edit with the target image (MagicBrush's CLIP-I and DINO) |
| l1, l2, psnr, ssim | 0 to 1, 0 to 1, dB, -1 to 1 | the edit with the target image |
| source_l1 | 0 to 1 | the edit with the original |
| outside_l1, outside_psnr, outside_ssim | | outside the mask, the edit with the original: the area to leave alone |
| inside_l1, inside_psnr, inside_ssim | | inside the mask, the edit with the target image |
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from evaluation.feature_metrics import (
    ImageEncoder,
    cmmd,
    direction_similarity,
    load_image_encoder,
    load_image_text_encoder,
)
from evaluation.mask_model import MaskModel, load_mask_model
from evaluation.samples import Edit, Sample, read_edit
from utils.models.image_text_encoder import ImageTextEncoder
from utils.pixel_metrics import pixel_scores

BATCH = 32
AREA_SCORES = ("l1", "psnr", "ssim")
Features = torch.Tensor


@dataclass
class Scorer:
    """Scores edits. Features of originals, targets and captions are kept, because many edits share them.

    mask_model: finds the area of the instruction in originals without a mask.
    """

    clip: ImageTextEncoder | None = None
    dino: ImageEncoder | None = None
    mask_model: MaskModel | None = None
    _kept: dict[tuple, Features] = field(default_factory=dict)

    def score(self, samples: list[Sample], edits: Sequence[Edit]) -> tuple[list[dict[str, float]], float | None]:
        """(the scores of the edit of each sample that exist for it, CMMD of all edits and targets).

        Files are read a batch at a time. CMMD is None without CLIP, or where a target is missing.
        """
        rows, features = [], []
        for start in range(0, len(samples), BATCH):
            part, images = samples[start : start + BATCH], [read_edit(edit) for edit in edits[start : start + BATCH]]
            found = [self._pixel_scores(sample, np.asarray(image)) for sample, image in zip(part, images, strict=True)]
            if self.clip:
                features.append(self._add_clip(found, part, images))
            if self.dino:
                self._add_dino(found, part, images)
            rows += found
        if not features or len(samples) < 2 or any(sample.edited is None for sample in samples):
            return rows, None
        return rows, cmmd(torch.cat(features), self._features("clip", self.clip, samples, "edited"))

    def _pixel_scores(self, sample: Sample, edit: np.ndarray) -> dict[str, float]:
        scores = {"source_l1": pixel_scores(edit, sample.pixels)["l1"]}
        target, mask = sample.target_pixels, self._mask(sample)
        if target is not None:
            scores |= pixel_scores(edit, target)
        if mask is not None:
            outside = pixel_scores(edit, sample.pixels, ~mask)
            scores |= {f"outside_{name}": outside[name] for name in AREA_SCORES}
        if mask is not None and target is not None and target.shape[:2] == mask.shape:
            inside = pixel_scores(edit, target, mask)
            scores |= {f"inside_{name}": inside[name] for name in AREA_SCORES}
        return scores

    def _mask(self, sample: Sample) -> np.ndarray | None:
        if sample.mask is not None or not self.mask_model:
            return sample.mask
        if ("mask", sample.number) not in self._kept:
            self._kept["mask", sample.number] = self.mask_model.find(sample.original, sample.instruction)
        return self._kept["mask", sample.number]

    def _add_clip(self, rows: list[dict], samples: list[Sample], edits: list[Image.Image]) -> Features:
        """Returns the features of the edits."""
        edited = self._encode(self.clip, edits)
        original = self._features("clip", self.clip, samples, "original")
        _add(rows, "clip_image", (edited * original).sum(-1))
        captioned = [index for index, sample in enumerate(samples) if sample.edited_caption]
        texts = {index: self._caption(samples[index].edited_caption) for index in captioned}
        for index in captioned:
            rows[index]["clip_text"] = float(edited[index] @ texts[index])
            if samples[index].has_captions:
                before = self._caption(samples[index].original_caption)
                images = torch.stack([original[index], edited[index]])[None]
                rows[index]["clip_direction"] = float(
                    direction_similarity(images, torch.stack([before, texts[index]])[None])
                )
        self._add_target(rows, samples, edited, "clip", self.clip)
        return edited

    def _add_dino(self, rows: list[dict], samples: list[Sample], edits: list[Image.Image]) -> None:
        edited = self._encode(self.dino, edits)
        _add(rows, "dino", (edited * self._features("dino", self.dino, samples, "original")).sum(-1))
        self._add_target(rows, samples, edited, "dino", self.dino)

    def _add_target(
        self, rows: list[dict], samples: list[Sample], edited: Features, name: str, encoder: ImageEncoder
    ) -> None:
        with_target = [index for index, sample in enumerate(samples) if sample.edited is not None]
        if with_target:
            targets = self._features(name, encoder, [samples[index] for index in with_target], "edited")
            similarities = (edited[with_target] * targets).sum(-1).tolist()
            for index, value in zip(with_target, similarities, strict=True):
                rows[index][f"{name}_target"] = value

    def _features(self, name: str, encoder: ImageEncoder, samples: list[Sample], part: str) -> Features:
        missing = [sample for sample in samples if (name, part, sample.number) not in self._kept]
        encoded = self._encode(encoder, [getattr(sample, part) for sample in missing])
        self._kept |= {(name, part, sample.number): one for sample, one in zip(missing, encoded, strict=True)}
        return torch.stack([self._kept[name, part, sample.number] for sample in samples])

    def _caption(self, text: str) -> Features:
        if ("text", text) not in self._kept:
            self._kept["text", text] = self.clip.encode_texts([text])[0].cpu()
        return self._kept["text", text]

    @staticmethod
    def _encode(encoder: ImageEncoder | ImageTextEncoder, images: list[Image.Image]) -> Features:
        parts = [encoder.encode_images(images[start : start + BATCH]).cpu() for start in range(0, len(images), BATCH)]
        return torch.cat(parts) if parts else torch.empty(0)


def _add(rows: list[dict], name: str, values: Features) -> None:
    for row, value in zip(rows, values.tolist(), strict=True):
        row[name] = value


def load_scorer(
    clip_model: str, dino_model: str, device: str, mask_model: str | None = None, legacy: bool = False
) -> Scorer:
    """clip_model, dino_model: a Hub id, a folder, or "none". Raises InputError."""
    clip = None if clip_model == "none" else load_image_text_encoder(clip_model, device, legacy)
    dino = None if dino_model == "none" else load_image_encoder(dino_model, device)
    return Scorer(clip, dino, load_mask_model(mask_model, device) if mask_model else None)
