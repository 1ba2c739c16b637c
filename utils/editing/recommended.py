"""The settings that an editor recommends: `recommended.json` in its folder, and the example in its card."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from utils.atomic_files import write_atomically
from utils.errors import InputError

RECOMMENDED = "recommended.json"
LOWER_IS_BETTER = ("l1", "l2")
PRODUCT = "clip_product"
CARD_SCALES = re.compile(r"\b(guidance_scale|image_guidance_scale|num_inference_steps)=[0-9.]+")


@dataclass(frozen=True)
class Recommendation:
    """recommended: settings (keys of `DEFAULT_SETTINGS`); value: their score by the criterion on so many samples."""

    recommended: dict[str, float]
    criterion: str
    value: float
    num_samples: int
    dataset: str


class Measured(Protocol):
    """A choice of settings with its mean scores."""

    settings: dict[str, float]
    scores: dict[str, float]


def choose_best(points: Sequence[Measured], criterion: str | None) -> tuple[Measured, str, float]:
    """The best of measured points, the criterion that was used, and its value. Raises InputError.

    criterion: a score, or "clip_product": CLIP directional similarity, at least 0, times image similarity, which is 0
    both for copying the input and for ignoring it. None: psnr, if there is one, else clip_product.
    """
    scores = [dict(point.scores) for point in points]
    for one in scores:
        if {"clip_direction", "clip_image"} <= one.keys():
            one[PRODUCT] = max(0.0, one["clip_direction"]) * one["clip_image"]
    names = set.intersection(*map(set, scores))
    criterion = criterion or ("psnr" if "psnr" in names else PRODUCT)
    if criterion not in names:
        raise InputError(
            f"--recommend by {criterion}: the samples have no such score (they have {', '.join(sorted(names))}); give "
            "another --criterion, or a dataset with target images, or with captions and --clip_model"
        )
    sign = -1 if criterion in LOWER_IS_BETTER else 1
    best = max(range(len(points)), key=lambda index: sign * scores[index][criterion])
    return points[best], criterion, scores[best][criterion]


def store_recommendation(editor: Path, found: Recommendation) -> str:
    """Write it into the editor's folder and the example of its card; returns a sentence for the user."""
    values = asdict(found) | {"value": round(found.value, 5), "dataset": found.dataset.rstrip("/").rpartition("/")[2]}
    write_atomically(editor / RECOMMENDED, (json.dumps(values, indent=1) + "\n").encode())
    card = editor / "README.md"
    if card.is_file():
        names = {"num_inference_steps" if key == "steps" else key: value for key, value in found.recommended.items()}
        text = card.read_text(encoding="utf-8")
        changed = CARD_SCALES.sub(
            lambda match: f"{match[1]}={names[match[1]]:g}" if match[1] in names else match[0], text
        )
        if changed != text:
            write_atomically(card, changed.encode())
    shown = ", ".join(f"{name} {value:g}" for name, value in found.recommended.items())
    return f"{editor} recommends {shown}: the best {found.criterion} ({found.value:.4g}) of {found.num_samples} samples"
