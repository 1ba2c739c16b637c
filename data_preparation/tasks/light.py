"""Light and sensors: sRGB's transfer functions, sensor noise, smooth random fields, a pseudo-depth.

"Linear light" is proportional to the photons that came in: 0 black, 1 white. Blur, fog, rain and noise happen there;
what a file stores is encoded.
"""

from __future__ import annotations

import cv2
import numpy as np

_STEPS = 65535  # a step of linear light this small is at most 0.05 of a step of the 8 bits, so a round trip is exact


def _decode(encoded: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: encoded 0-1 -> linear 0-1, in float64."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encode(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


_TO_LINEAR = _decode(np.arange(256) / 255).astype(np.float32)
_TO_ENCODED = np.round(_encode(np.arange(_STEPS + 1) / _STEPS) * 255).astype(np.uint8)


def to_linear(image: np.ndarray) -> np.ndarray:
    """uint8, encoded -> float32 0-1 of the same shape, linear."""
    return cv2.LUT(image, _TO_LINEAR)


def to_encoded(linear: np.ndarray) -> np.ndarray:
    """float32, linear, clipped to 0-1 -> uint8 of the same shape, encoded."""
    return _TO_ENCODED[(np.clip(linear, 0, 1) * _STEPS + 0.5).astype(np.uint16)]


def pixel_scale(image: np.ndarray, smallest: int = 1) -> float:
    """By how much to multiply a size given in pixels of a picture of 512 (shorter side).

    smallest: sides below it count as this one, for what would vanish in a small picture.
    """
    return max(min(image.shape[:2]), smallest) / 512


def add_sensor_noise(linear: np.ndarray, photons: float, read_noise: float, rng: np.random.Generator) -> np.ndarray:
    """Light with shot noise (Poisson's variance, of `photons` at white) and read noise (standard deviation).

    Poisson's distribution is taken as normal: at the counts that show, the two differ by less than the 8 bits do.
    """
    deviation = np.sqrt(np.maximum(linear, 0) / np.float32(photons) + np.float32(read_noise**2))
    return linear + deviation * rng.standard_normal(linear.shape, dtype=np.float32)


def smooth_field(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in 0-1: a random landscape with about `cells` hills to a side."""
    grid = rng.random((cells + 2, cells + 2), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def pseudo_depth(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 in 0.2-1, a guess of how far things are, 1 farthest; smooth but for the picture's edges.

    What is high up is far; so is what is pale all over (sky; the dark channel of He et al. 2009); hills of chance are
    added. A guided filter (He and Sun 2015, the fast one) then lets it follow the outlines.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, 192 / min(height, width))
    small_size = (max(8, round(width * shrink)), max(8, round(height * shrink)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    rows = np.linspace(1, 0, small_size[1], dtype=np.float32)[:, None] ** 1.3
    pale = cv2.blur(cv2.erode(small.min(axis=2), np.ones((7, 7), np.uint8)), (9, 9))
    guess = 0.55 * rows + 0.45 * pale + 0.35 * smooth_field(small_size[1], small_size[0], 3, rng)
    guide, radius = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (25, 25)
    mean_guide, mean_guess = cv2.blur(guide, radius), cv2.blur(guess, radius)
    slope = (cv2.blur(guide * guess, radius) - mean_guide * mean_guess) / (
        cv2.blur(guide * guide, radius) - mean_guide**2 + 4e-3
    )
    offset = mean_guess - slope * mean_guide
    slope, offset = (cv2.resize(cv2.blur(part, radius), (width, height)) for part in (slope, offset))
    depth = slope * (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255) + offset
    low, high = float(depth.min()), float(depth.max())
    return 0.2 + (depth - low) * np.float32(0.8 / max(high - low, 1e-6))
