"""Weather between the camera and the scene: haze, and rain that falls.

Each function is uint8 RGB (H, W, 3), clean -> (degraded, of the same type and size; the parameters that were drawn).
Light is added and taken away in linear light.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_preparation.tasks.light import pixel_scale, pseudo_depth, smooth_field, to_encoded, to_linear
from data_preparation.tasks.ranges import Range, Ranges, Whole, draw

DEHAZE: Ranges = {
    "beta": Range(0.6, 1.8, "scattering: t = exp(-beta * depth), with a depth of 0.2 to 1"),
    "airlight": Range(0.7, 1.0, "light of the haze, of white, linear"),
    "tint": Range(-0.04, 0.04, "blue of the haze more, red less by this share"),
}
DERAIN: Ranges = {
    "slant": Range(-30, 30, "of the streaks from the vertical, degrees"),
    "length": Range(28, 60, "of the nearest streaks, pixels at 512; the farthest have a third of it"),
    "streaks": Whole(700, 4000, "how many, of all sizes, in a square picture"),
    "strength": Range(0.35, 0.85, "how much of the light behind the brightest streaks is replaced"),
    "veil": Range(0.0, 0.3, "share of the light that rain too far to be seen as streaks hides, at the farthest"),
    "airlight": Range(0.55, 0.9, "light of the streaks and the veil, of white, linear"),
}
# Far, middle, near: length, width and strength relative to the nearest, and share of all streaks.
_LAYERS = ((0.35, 0.3, 0.4, 0.75), (0.6, 0.55, 0.7, 0.2), (1.0, 1.0, 1.0, 0.05))
_BRIGHTNESSES = (0.45, 0.7, 1.0)
_SHIFT = 4  # cv2 takes coordinates in 1/16 of a pixel


def dehaze(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Koschmieder's law: I = J t + A (1 - t), t = exp(-beta d), over a pseudo-depth d."""
    parameters = draw(DEHAZE, rng)
    airlight = parameters["airlight"] * np.array([1 - parameters["tint"], 1, 1 + parameters["tint"]])
    transmission = np.exp(-parameters["beta"] * pseudo_depth(image, rng))
    return to_encoded(add_haze(to_linear(image), transmission, airlight)), parameters


def add_haze(linear: np.ndarray, transmission: np.ndarray, airlight: np.ndarray) -> np.ndarray:
    """linear (H, W, 3), transmission (H, W) in 0-1, airlight (3,) -> (H, W, 3) float32."""
    airlight = np.asarray(airlight, np.float32)
    return airlight + (linear - airlight) * transmission[..., None]


def derain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Rain: streaks of three distances, denser here than there, before a veil that thickens with depth."""
    parameters, (height, width) = draw(DERAIN, rng), image.shape[:2]
    airlight = np.full(3, parameters["airlight"], np.float32)
    veil = 1 - np.float32(parameters["veil"]) * pseudo_depth(image, rng)
    streaks = rain_streaks(height, width, pixel_scale(image, smallest=128), parameters, rng)
    streaks *= 0.6 + 0.4 * smooth_field(height, width, 4, rng)
    return to_encoded(add_haze(add_haze(to_linear(image), veil, airlight), 1 - streaks, airlight)), parameters


def rain_streaks(height: int, width: int, scale: float, parameters: dict, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in 0-1: how much of the light behind is replaced by the streaks'."""
    total = np.zeros((height, width), np.float32)
    in_all = parameters["streaks"] * max(height, width) / min(height, width)
    for length, thickness, strength, share in _LAYERS:
        layer = np.zeros((height, width), np.uint8)
        for brightness in _BRIGHTNESSES:
            count = max(1, round(in_all * share / len(_BRIGHTNESSES)))
            size = length * parameters["length"] * scale
            lines = _random_lines(height, width, size, parameters["slant"], count, rng)
            draw_lines(layer, lines, 255 * brightness, max(1, round(1.2 * thickness * scale)))
        # Out of focus the more, the nearer: also what makes the ends taper.
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.45, 0.8 * thickness * scale))
        # No line is thinner than a pixel: below 256 pixels it covers less of the pixel instead.
        total += layer * np.float32(strength * parameters["strength"] * min(1, 2 * scale) / 255)
    return np.minimum(total, 1)


def _random_lines(height: int, width: int, length: float, slant: float, count: int, rng) -> np.ndarray:
    """(count, 2, 2) ends (x, y) of streaks in and around the picture, their length and slant uneven."""
    middle = rng.uniform([-length, -length], [width + length, height + length], (count, 2))
    angle = np.deg2rad(slant + rng.normal(0, 1.5, count))
    half = 0.5 * length * rng.uniform(0.5, 1, count)[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.stack([middle - half, middle + half], axis=1)


def draw_lines(layer: np.ndarray, lines: np.ndarray, brightness: float, thickness: int) -> None:
    """Draw (N, 2, 2) lines into the uint8 layer, with a faint outer part and a bright core."""
    middle = lines.mean(axis=1, keepdims=True)
    for part, share in ((1.0, 0.55), (0.6, 1.0)):
        points = np.round((middle + part * (lines - middle)) * 2**_SHIFT).astype(np.int32)
        cv2.polylines(layer, list(points), False, round(brightness * share), thickness, cv2.LINE_AA, _SHIFT)
