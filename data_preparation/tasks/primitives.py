"""What degradations are built from: parameter ranges, linear light, sensor noise, smooth random fields, a pseudo-depth.

"Linear light" is proportional to the number of photons: 0 is black, 1 is white. Blur, haze, rain and noise are applied
there; image files store values encoded for sRGB.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

DIGITS = 4  # parameters are rounded before use, so that a row stores exactly what was applied
_STEPS = 65535  # one step of linear light is at most 0.05 of an 8-bit step, so the round trip is exact


class Range(NamedTuple):
    """A float between two bounds, inclusive; uniform, or uniform in its logarithm if `is_log`."""

    low: float
    high: float
    meaning: str
    is_log: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        if self.is_log:
            value = np.exp(rng.uniform(np.log(self.low), np.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return min(max(round(float(value), DIGITS), self.low), self.high)

    def describe(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (", logarithmic" if self.is_log else "")


class IntegerRange(NamedTuple):
    """An integer between two bounds, inclusive."""

    low: int
    high: int
    meaning: str

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))

    def describe(self) -> str:
        return f"{self.low} to {self.high}"


class Choice(NamedTuple):
    """One of several names, each with its probability."""

    options: dict[str, float]
    meaning: str

    def draw(self, rng: np.random.Generator) -> str:
        return str(rng.choice(list(self.options), p=list(self.options.values())))

    def describe(self) -> str:
        return ", ".join(f"{option} ({share:.0%})" for option, share in self.options.items())


Ranges = dict[str, Range | IntegerRange | Choice]


def draw_parameters(ranges: Ranges, rng: np.random.Generator, *names: str) -> dict:
    """Draw one value from each of the named ranges (default: all), in the order of the dictionary."""
    return {name: entry.draw(rng) for name, entry in ranges.items() if not names or name in names}


def _decode_srgb(encoded: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: encoded 0-1 -> linear 0-1, in float64."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encode_srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


_TO_LINEAR = _decode_srgb(np.arange(256) / 255).astype(np.float32)
_TO_ENCODED = np.round(_encode_srgb(np.arange(_STEPS + 1) / _STEPS) * 255).astype(np.uint8)


def to_linear(image: np.ndarray) -> np.ndarray:
    """uint8, encoded -> float32 in 0-1 of the same shape, linear."""
    return cv2.LUT(image, _TO_LINEAR)


def to_encoded(linear: np.ndarray) -> np.ndarray:
    """float32, linear, clipped to 0-1 -> uint8 of the same shape, encoded."""
    return _TO_ENCODED[(np.clip(linear, 0, 1) * _STEPS + 0.5).astype(np.uint16)]


def pixel_scale(image: np.ndarray, smallest: int = 1) -> float:
    """The factor for sizes given in pixels of a 512-pixel image: the shorter side / 512.

    smallest: the shorter side counts as at least this, for details that would vanish in a small image.
    """
    return max(min(image.shape[:2]), smallest) / 512


def add_sensor_noise(linear: np.ndarray, photons: float, read_noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add shot noise (Poisson variance, with `photons` at white) and read noise (standard deviation).

    The Poisson distribution is approximated by a normal one: where noise is visible, they differ by less than 8 bits
    resolve.
    """
    deviation = np.sqrt(np.maximum(linear, 0) / np.float32(photons) + np.float32(read_noise**2))
    return linear + deviation * rng.standard_normal(linear.shape, dtype=np.float32)


def smooth_field(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in 0-1: smooth noise with about `cells` hills per side."""
    grid = rng.random((cells + 2, cells + 2), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def pseudo_depth(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 in 0.2-1: a guess of the distance of each pixel (1: farthest), smooth except at image edges.

    The top of the image counts as far, and so do pale areas such as the sky (dark channel, He et al. 2009); a smooth
    random field is added. A fast guided filter (He and Sun 2015) then aligns the guess with the outlines.
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
    covariance = cv2.blur(guide * guess, radius) - mean_guide * mean_guess
    slope = covariance / (cv2.blur(guide * guide, radius) - mean_guide**2 + 4e-3)
    offset = mean_guess - slope * mean_guide
    slope, offset = (cv2.resize(cv2.blur(part, radius), (width, height)) for part in (slope, offset))
    depth = slope * (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255) + offset
    low, high = float(depth.min()), float(depth.max())
    return 0.2 + (depth - low) * np.float32(0.8 / max(high - low, 1e-6))
