"""Rows to look at: their pictures as small JPEG data URIs."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_preparation.checking.doctor import Diagnosis
from utils.checks import image_measures as measures
from utils.checks.pair_inspection import WORKING_SIDE, working_pair
from utils.checks.prompt_checks import usable_prompts
from utils.pixels import BadRow, decode_image

SIDE = 224
MAX_EXAMPLES = 6


class Example(NamedTuple):
    """original, edited: data URIs, None for what cannot be read; edges: of both pictures, where they are shifted."""

    name: str
    prompt: str
    detail: str
    original: str | None
    edited: str | None
    edges: str | None = None


def make_examples(diagnosis: Diagnosis, kind: str) -> list[Example]:
    """The first rows with a finding, as many as a page shows."""
    details = diagnosis.findings.details[kind]
    rows = list(diagnosis.findings.rows[kind][:MAX_EXAMPLES])
    return [_make_example(diagnosis, row, details.get(row, ""), with_edges=kind == "misaligned") for row in rows]


def _make_example(diagnosis: Diagnosis, row: int, detail: str, with_edges: bool) -> Example:
    source = diagnosis.source
    values, columns = source.rows[row], source.columns
    prompt = " / ".join(usable_prompts(values[columns.prompt]))
    images = [_read(values[name]) for name in (columns.original, columns.edited)]
    edges = draw_edges(*images) if with_edges and None not in images else None
    pictures = [image and as_data_uri(image) for image in images]
    return Example(source.row_name(row), prompt, detail, *pictures, edges and as_data_uri(edges))


def _read(value: object) -> Image.Image | None:
    try:
        return decode_image(value, shorter_side=WORKING_SIDE // 2)
    except BadRow:
        return None


def draw_edges(original: Image.Image, edited: Image.Image) -> Image.Image:
    """Edges of the original in red, of the edited image in blue, on white; violet where both have one."""
    pair = working_pair(np.asarray(original), np.asarray(edited))
    ink = [np.clip(measures.edge_map(measures.to_gray(image)) * 110, 0, 255) for image in pair]
    return Image.fromarray(np.stack([255 - ink[1], 255 - np.maximum(*ink), 255 - ink[0]], axis=-1).astype(np.uint8))


def as_data_uri(image: Image.Image) -> str:
    """A small JPEG, or what is smaller already without scaling."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=84)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
