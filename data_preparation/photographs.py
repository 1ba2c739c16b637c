"""Photographs in a folder: listing and reading them, and their crops."""

from pathlib import Path

import cv2
import numpy as np

from utils.image_folders import Skipped, find_images
from utils.json_lines import read_json_lines
from utils.pixels import decode_image
from utils.stored_images import BadRow

DESCRIPTIONS = ("metadata.jsonl", "README.md", "LICENSE", "LICENSES.md")  # of the photographs
MIN_SIDE = 64  # pixels of a photograph that can be used


def seeded_rng(seed: int, row: int) -> np.random.Generator:
    """A counter-based generator: the same (seed, row) gives the same numbers, in whatever order rows are generated."""
    return np.random.Generator(np.random.Philox(key=[seed, row]))


def read_metadata(folder: Path) -> list[dict]:
    """The rows of metadata.jsonl in `folder`, [] without that file. Raises InputError for a line that is not JSON."""
    metadata = folder / "metadata.jsonl"
    return [row for _, row in read_json_lines(metadata)] if metadata.exists() else []


def list_photographs(folder: Path, split: str = "all") -> list[Path]:
    """Sorted image files below `folder`. If its metadata.jsonl names splits, only those of `split`, or all."""
    return find_photographs(folder, split)[0]


def find_photographs(folder: Path, split: str = "all") -> tuple[list[Path], Skipped]:
    """`list_photographs`, and what else is in the folder."""
    images, skipped = find_images(folder, recursive=True)
    rows = read_metadata(folder) if split != "all" else []
    if any("split" in row for row in rows):
        listed = {folder / row["file_name"]: row.get("split") for row in rows}
        skipped["without a split in metadata.jsonl"] = [path for path in images if listed.get(path) is None]
        images = sorted(path for path, its_split in listed.items() if its_split == split)
    others = {reason: [path for path in paths if path.name not in DESCRIPTIONS] for reason, paths in skipped.items()}
    return images, {reason: paths for reason, paths in others.items() if paths}


def read_photograph(path: Path) -> np.ndarray | None:
    """uint8 RGB (H, W, 3), upright; None if the file has no readable image."""
    try:
        return np.asarray(decode_image(path))
    except BadRow:
        return None


def centre_square(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest square in the middle, resized to (resolution, resolution, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[top : top + side, left : left + side], resolution)


def random_square(image: np.ndarray, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """A random square with half to all of the shorter side, mirrored half the time; (resolution, resolution, 3)."""
    height, width = image.shape[:2]
    side = round(min(height, width) * rng.uniform(0.5, 1.0))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    square = _resize(image[top : top + side, left : left + side], resolution)
    return np.ascontiguousarray(square[:, ::-1]) if rng.random() < 0.5 else square


def fit_image(image: np.ndarray, resolution: int, is_square: bool = False) -> np.ndarray:
    """The whole image with its shorter side at `resolution`, or its centre square; never enlarged.

    Both sides are cropped to multiples of 8, which the VAE needs. Raises BadRow for less than 64 pixels.
    """
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadRow(f"is too small: {width}x{height} pixels, each side must have at least {MIN_SIDE}")
    if is_square:
        return centre_square(image, min(resolution, min(height, width) // 8 * 8))
    scale = resolution / min(height, width)
    if scale < 1:
        size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    height, width = (side // 8 * 8 for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _resize(square: np.ndarray, resolution: int) -> np.ndarray:
    is_smaller = square.shape[0] >= resolution
    return cv2.resize(square, (resolution, resolution), interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC)
