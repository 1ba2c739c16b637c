"""What degradations are built from: parameter ranges, and the conversion between sRGB and linear light.

Linear light is proportional to the number of photons: 0 is black, 1 is white. Blur, haze, rain and noise are applied
there; image files store values encoded for sRGB.
"""

from typing import NamedTuple

import cv2
import numpy as np

REFERENCE_SIDE = 512  # the shorter side, in pixels, for which the sizes and strengths of all degradations are given
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


def draw(ranges: Ranges, rng: np.random.Generator, *names: str) -> dict:
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
    """The factor for sizes given in pixels of an image at REFERENCE_SIDE: the shorter side / REFERENCE_SIDE.

    smallest: the shorter side counts as at least this, for details that would vanish in a small image.
    """
    return max(min(image.shape[:2]), smallest) / REFERENCE_SIDE
