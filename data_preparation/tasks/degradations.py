"""All degradations and the ranges of their parameters, by task.

A pair for restoring is made backwards: the clean photograph is the edited image, the degraded one the original. Every
degradation is a function of (clean picture, generator) that leaves the picture alone, returns uint8 RGB of the same
size with the parameters that it drew, and draws the same from the same generator. Pictures from 64 to 2048 pixels.
Sizes said to be in "pixels at 512" follow the shorter side (deblur's down to 256 pixels and derain's to 128, but no
further); all others are in pixels of the picture.

    python -c "from data_preparation.tasks.degradations import *; print(show_ranges(RANGES))"     # the table
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_preparation.tasks import camera, weather
from data_preparation.tasks.low_resolution import SUPER_RESOLVE, super_resolve
from data_preparation.tasks.raindrops import RAINDROP, raindrop
from data_preparation.tasks.ranges import Ranges, show_ranges

__all__ = ["DEGRADATIONS", "RANGES", "show_ranges"]

DEGRADATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, dict]]] = {
    "derain": weather.derain,
    "denoise": camera.denoise,
    "deblur": camera.deblur,
    "dehaze": weather.dehaze,
    "low_light": camera.low_light,
    "raindrop": raindrop,
    "sharpen": camera.sharpen,
    "colorize": camera.colorize,
    "super_resolve": super_resolve,
    "jpeg": camera.jpeg,
    "identity": camera.identity,
}
RANGES: dict[str, Ranges] = {
    "derain": weather.DERAIN,
    "denoise": camera.DENOISE,
    "deblur": camera.DEBLUR,
    "dehaze": weather.DEHAZE,
    "low_light": camera.LOW_LIGHT,
    "raindrop": RAINDROP,
    "sharpen": camera.SHARPEN,
    "colorize": {},
    "super_resolve": SUPER_RESOLVE,
    "jpeg": camera.JPEG,
    "identity": {},
}
