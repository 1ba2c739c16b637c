"""The columns of a pair dataset, and the row that every generator of pairs returns."""

import io
import json
from typing import Any

import datasets
import numpy as np
from PIL import Image

from data_preparation.generation.generation_flags import IMAGE_FORMATS

IMAGES = ("original_image", "edited_image")
TEXT_COLUMNS = ("original_prompt", "edited_prompt", "task", "phrasing", "source", "source_dataset", "source_license")
JSON_COLUMNS = ("models", "settings", "scores")  # stored as text
PROVENANCE_COLUMNS = (*TEXT_COLUMNS, "models", "seed", "settings", "scores")  # all but images and instruction


def pair_features(has_mask: bool = False) -> datasets.Features:
    """Columns in order: what training needs, then the provenance of each row (docs/data.md).

    has_mask: with a column `mask`, white where the edit may change the image, for evaluation.
    """
    text = datasets.Value("string")
    columns = {"original_image": datasets.Image(), "edit_prompt": text, "edited_image": datasets.Image()}
    columns |= dict.fromkeys(PROVENANCE_COLUMNS, text) | {"seed": datasets.Value("int64")}
    return datasets.Features(columns | ({"mask": datasets.Image()} if has_mask else {}))


def make_pair(original: Any, edit_prompt: str, edited: Any, image_format: str = "png", **provenance: Any) -> dict:
    """A row with the columns of `pair_features`.

    original, edited: uint8 RGB (H, W, 3), a PIL image, or the bytes of an image file, which are stored unchanged.
    image_format: a key of `IMAGE_FORMATS`. provenance: `PROVENANCE_COLUMNS`, None where not given:
    phrasing "train" or "heldout" (an instruction that training never shows); source: the photograph or caption;
    models: list of {"id", "revision"}; settings: dict of the values drawn for this row; scores: dict of floats,
    rounded to four digits because further digits differ between machines.
    """
    if unknown := provenance.keys() - set(PROVENANCE_COLUMNS):
        raise TypeError(f"make_pair() got unknown columns: {', '.join(sorted(unknown))}")
    row = dict.fromkeys(PROVENANCE_COLUMNS) | provenance
    if row["scores"] is not None:
        row["scores"] = {name: round(float(value), 4) for name, value in row["scores"].items()}
    for name in JSON_COLUMNS:
        row[name] = None if row[name] is None else as_json(row[name])
    images = (_stored(original, image_format), _stored(edited, image_format))
    return {"original_image": images[0], "edit_prompt": edit_prompt, "edited_image": images[1], **row}


def as_json(value: Any) -> str:
    """One line with sorted keys, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def parse_json(text: Any) -> Any:
    """The value of JSON text; None for anything else."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def encode_image(pixels: np.ndarray | Image.Image, image_format: str = "png") -> bytes:
    """The bytes of an image file. image_format: a key of `IMAGE_FORMATS`."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    content = io.BytesIO()
    image.convert("RGB").save(content, **IMAGE_FORMATS[image_format])
    return content.getvalue()


def _stored(image: Any, image_format: str) -> dict:
    is_encoded = isinstance(image, (bytes, bytearray, memoryview))
    return {"bytes": bytes(image) if is_encoded else encode_image(image, image_format), "path": None}
