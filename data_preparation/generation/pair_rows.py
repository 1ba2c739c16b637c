"""The one schema of a pair set, and the row that every generator makes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from PIL import Image

IMAGES = ("original_image", "edited_image")
TEXTS = ("original_prompt", "edited_prompt", "task", "phrasing", "source", "source_dataset", "source_license", "models")
IMAGE_FORMATS = {
    "png": dict(format="PNG", compress_level=3),
    "jpeg": dict(format="JPEG", quality=95, subsampling=0),
    "jpeg100": dict(format="JPEG", quality=100, subsampling=0),
    "webp": dict(format="WEBP", lossless=True, method=2),
}


def pair_features() -> datasets.Features:
    """Columns of a pair set in their order: what training needs, then where each row comes from (docs/data.md)."""
    text = datasets.Value("string")
    return datasets.Features(
        {
            "original_image": datasets.Image(),
            "edit_prompt": text,
            "edited_image": datasets.Image(),
            **dict.fromkeys(TEXTS, text),
            "seed": datasets.Value("int64"),
            "settings": text,
            "scores": text,
        }
    )


def make_pair(
    original: Any,
    edit_prompt: str,
    edited: Any,
    *,
    image_format: str = "png",
    original_prompt: str | None = None,
    edited_prompt: str | None = None,
    task: str | None = None,
    phrasing: str | None = None,
    source: str | None = None,
    source_dataset: str | None = None,
    source_license: str | None = None,
    models: Sequence[Mapping[str, Any]] | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
) -> dict:
    """A row of `pair_features`.

    original, edited: uint8 RGB (H, W, 3), a PIL image, or the bytes of an image file, which are kept as they are.
    phrasing: "train" or "heldout" (a way of asking that training never shows); source: the photograph or caption that
    the pair was made of; models: {"id", "revision"} each; settings: what was drawn for this row; scores: rounded to
    four digits, as more of them would differ between machines.
    """
    return {
        "original_image": _stored(original, image_format),
        "edit_prompt": edit_prompt,
        "edited_image": _stored(edited, image_format),
        "original_prompt": original_prompt,
        "edited_prompt": edited_prompt,
        "task": task,
        "phrasing": phrasing,
        "source": source,
        "source_dataset": source_dataset,
        "source_license": source_license,
        "models": None if models is None else as_json(list(models)),
        "seed": seed,
        "settings": None if settings is None else as_json(settings),
        "scores": None if scores is None else as_json({name: round(float(value), 4) for name, value in scores.items()}),
    }


def as_json(value: Any) -> str:
    """One line with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def encode_image(pixels: np.ndarray | Image.Image, image_format: str = "png") -> bytes:
    """The bytes of an image file: png and webp lose nothing; jpeg is quality 95 and jpeg100 100, both 4:4:4."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    content = io.BytesIO()
    image.convert("RGB").save(content, **IMAGE_FORMATS[image_format])
    return content.getvalue()


def _stored(image: Any, image_format: str) -> dict:
    is_encoded = isinstance(image, (bytes, bytearray, memoryview))
    return {"bytes": bytes(image) if is_encoded else encode_image(image, image_format), "path": None}
