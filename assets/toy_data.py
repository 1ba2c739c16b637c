"""Training data of the toy Stable Diffusion: crops of the photographs, plain or in a style, with captions."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from assets.toy_models import SIZE
from data_preparation.instructions import read_phrasings
from data_preparation.toy_edits import EDITS

ASSETS = Path(__file__).resolve().parent
# Names of each style, and templates that join style and subject. Several names for each style teach the text encoder,
# which is frozen when an editor is trained, that "monochrome" and "black and white" mean the same.
CAPTIONS = json.loads((ASSETS / "captions.json").read_text())


def generator(seed: int, stage: str, step: int) -> np.random.Generator:
    """A counter-based generator: equal (seed, stage, step) give equal numbers."""
    key = np.array([seed, int.from_bytes(stage.encode()[:8], "little")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


def load_photographs(folder: Path, split: str) -> list[tuple[np.ndarray, str]]:
    """[(uint8 RGB (H, W, 3), caption)] of one split of metadata.jsonl."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [
        (cv2.imread(str(folder / row["file_name"]))[..., ::-1], row["caption"]) for row in rows if row["split"] == split
    ]


def random_crop(image: np.ndarray, rng: np.random.Generator, largest: bool = False) -> np.ndarray:
    """A square crop of SIZE pixels: 60 to 100 % of the shorter side (at least 96 pixels), half of them mirrored."""
    height, width = image.shape[:2]
    side = min(height, width)
    if largest:
        top, left = (height - side) // 2, (width - side) // 2
    else:
        side = int(rng.integers(max(96, int(side * 0.6)), side + 1))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop = cv2.resize(
        np.ascontiguousarray(image[top : top + side, left : left + side]), (SIZE, SIZE), interpolation=cv2.INTER_AREA
    )
    return np.ascontiguousarray(crop[:, ::-1]) if not largest and rng.random() < 0.5 else crop


def random_example(photographs: list, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(uint8 RGB (SIZE, SIZE, 3), caption): a crop, in a random style in three of four cases."""
    image, subject = photographs[rng.integers(len(photographs))]
    crop = random_crop(image, rng)
    style = "photograph" if rng.random() < 0.25 else list(EDITS)[rng.integers(len(EDITS))]
    styles, templates = CAPTIONS["styles"][style], CAPTIONS["templates"]
    words = styles[rng.integers(len(styles))]
    caption = templates[rng.integers(len(templates))].format(style=words, subject=subject)
    return (EDITS[style](crop) if style in EDITS else crop), caption


def tokenizer_texts(photographs: list) -> list[str]:
    """All possible captions and all instructions."""
    texts = [
        template.format(style=style, subject=subject)
        for _, subject in photographs
        for styles in CAPTIONS["styles"].values()
        for style in styles
        for template in CAPTIONS["templates"]
    ]
    for path in sorted((ASSETS.parent / "data_preparation" / "instructions" / "toy").glob("*.txt")):
        texts += path.read_text().splitlines()
    return texts


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 RGB images -> float (B, 3, SIZE, SIZE) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def text_examples(photographs: list) -> tuple[list[str], torch.Tensor]:
    """Captions and training instructions, and labels (N, 2): style, subject (-1: none)."""
    texts, labels = [], []
    for number, (task, styles) in enumerate(CAPTIONS["styles"].items()):
        for style in styles:
            for template in CAPTIONS["templates"]:
                for index in range(len(photographs)) if "{subject}" in template else [-1]:
                    subject = photographs[index][1]
                    texts.append(template.format(style=style, subject=subject))
                    labels.append((number, index))
        if task in EDITS:
            phrasings = read_phrasings(f"toy/{task}")[0]
            # Repeated, because they are few among many captions.
            texts += phrasings * 20
            labels += [(number, -1)] * (20 * len(phrasings))
    return texts, torch.tensor(labels)
