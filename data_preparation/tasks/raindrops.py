"""Drops of water on the glass before the lens: each is a small, unsharp lens that shows the scene upside down."""

from __future__ import annotations

import cv2
import numpy as np

from data_preparation.tasks.light import pixel_scale, to_encoded, to_linear
from data_preparation.tasks.ranges import Range, Ranges, Whole, draw

RAINDROP: Ranges = {
    "drops": Whole(20, 80, "how many, large and small, in a square picture"),
    "radius": Range(16, 36, "of the largest, pixels at 512; small ones are many"),
    "reach": Range(0.25, 0.45, "how far off the rim of the largest looks, of the shorter side"),
    "unsharpness": Range(1.2, 3.5, "standard deviation of the blur of the drops' edges, pixels at 512"),
    "shade": Range(0.1, 0.35, "share of the light lost at the rim"),
}
SMALLEST = 0.18  # radius of the smallest drop, of the largest's
_SHRINK = 6  # a drop shows much of the scene on few pixels: it looks at a picture this many times smaller, at 512


def raindrop(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """uint8 RGB (H, W, 3), clean -> (seen through wet glass, of the same type and size; the parameters drawn)."""
    parameters, scale = draw(RAINDROP, rng), pixel_scale(image)
    linear = to_linear(image)
    cover, shift, shine = drop_maps(image.shape[:2], scale, parameters, rng)
    cover, shine = (
        cv2.GaussianBlur(part, (0, 0), max(0.5, parameters["unsharpness"] * scale)) for part in (cover, shine)
    )
    seen = _refract(linear, shift, max(2, round(_SHRINK * scale)))
    # Light from the rim comes at a steep angle, and little of it: a drop is darkest where its cover ends.
    rim = np.clip(cover * (1 - cover) * 4, 0, 1) * np.float32(parameters["shade"])
    seen = seen * (1 - rim[..., None]) + (shine * np.float32(max(0.25, linear.max())))[..., None]
    return to_encoded(linear + (seen - linear) * cover[..., None]), parameters


def _refract(linear: np.ndarray, shift: np.ndarray, shrink: int) -> np.ndarray:
    """(H, W, 3), (H, W, 2) shifts (x, y) in pixels -> (H, W, 3): what the drops show, slightly blurred."""
    height, width = linear.shape[:2]
    size = (width // shrink, height // shrink)
    small = cv2.GaussianBlur(cv2.resize(linear, size, interpolation=cv2.INTER_AREA), (0, 0), 1.5)
    ratio = (size[0] / width, size[1] / height)
    columns = (np.arange(width, dtype=np.float32)[None] + shift[..., 0]) * np.float32(ratio[0])
    rows = (np.arange(height, dtype=np.float32)[:, None] + shift[..., 1]) * np.float32(ratio[1])
    return cv2.remap(small, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def drop_maps(size: tuple[int, int], scale: float, parameters: dict, rng: np.random.Generator):
    """For a picture of `size` (height, width): cover (H, W) in 0-1, shift (H, W, 2) in pixels, shine (H, W) in 0-1."""
    height, width = size
    cover, shine = np.zeros(size, np.float32), np.zeros(size, np.float32)
    shift = np.zeros((*size, 2), np.float32)
    count = round(parameters["drops"] * max(size) / min(size))
    # Many small drops, few large ones; the large ones come last and swallow what they meet.
    shares = np.sort(SMALLEST + (1 - SMALLEST) * rng.random(count) ** 2.5)
    centres = rng.uniform([0, 0], [width, height], (count, 2))
    for share, centre in zip(shares, centres, strict=True):
        reach = parameters["reach"] * np.sqrt(share)  # a small one shows less: it has too few pixels for more
        _add_drop((cover, shift, shine), centre, share * parameters["radius"] * scale, reach, rng)
    return cover, shift, shine


def _add_drop(maps, centre: np.ndarray, radius: float, reach: float, rng: np.random.Generator) -> None:
    """Put one drop into the maps, in place: an uneven disc, heavier below."""
    cover, shift, shine = maps
    height, width = cover.shape
    stretch, waves, phases = rng.uniform(0.95, 1.35), rng.uniform(0, 0.09, 3), rng.uniform(0, 2 * np.pi, 3)
    extent = 1.6 * radius * stretch + 2
    left, right = max(0, int(centre[0] - extent)), min(width, int(centre[0] + extent) + 1)
    top, bottom = max(0, int(centre[1] - extent)), min(height, int(centre[1] + extent) + 1)
    x = (np.arange(left, right, dtype=np.float32)[None] - np.float32(centre[0])) / np.float32(radius)
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[1])) / np.float32(radius * stretch)
    angle = np.arctan2(y, x)
    outline = 1 + sum(
        wave * np.sin((n + 2) * angle + phase) for n, (wave, phase) in enumerate(zip(waves, phases, strict=True))
    )
    distance = np.hypot(x * (1 - 0.12 * y), y) / outline
    inside = np.clip((1 - distance) * np.float32(radius) + 0.5, 0, 1).astype(np.float32)
    window = np.s_[top:bottom, left:right]
    # A lens of short focal length turns the scene around its middle, more strongly towards the rim.
    turned = np.float32(-reach * min(cover.shape)) * (0.6 + 0.4 * distance**2)
    touched = inside > 0
    for axis, offset in enumerate((x, y)):
        shift[window][..., axis] = np.where(touched, turned * offset - offset * radius, shift[window][..., axis])
    gleam = np.exp(-(((x + 0.38) / 0.16) ** 2 + ((y + 0.42) / 0.1) ** 2)) * 0.6
    shine[window] = np.where(touched, gleam * inside, shine[window])
    cover[window] = np.maximum(cover[window], inside)
