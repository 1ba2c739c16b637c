"""Which photographs are clean targets of a restoration: each task has a measure of the flaw that it removes.

A photograph is unfit only for the tasks whose limit it misses: a dark one is no target of low_light, but may be one of
colorize. The limits were set on the photographs in assets/photos and in common Python packages, at 128, 256 and 512
pixels: all but a few percent pass, and most of their degraded copies do not (docs/data.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from data_preparation.tasks.primitives import REFERENCE_SIDE
from utils.checks import image_measures as measures

MEASURED_SIDE = 1024  # pixels in the middle of a stored photograph that are measured: a multiple of JPEG's blocks


class TargetRule(NamedTuple):
    """measure: of a uint8 RGB image (H, W, 3); the target must have at least `low` and at most `high` of it."""

    measure: Callable[[np.ndarray], float]
    flaw: str
    low: float = -np.inf
    high: float = np.inf
    is_stored: bool = False  # measure the photograph before it is resized and cropped


def sharpness(image: np.ndarray) -> float:
    """0 to about 0.5: the finest details in relation to all edges. Photographs in focus have 0.11 or more."""
    return measures.sharpness(measures.to_gray(image))


def noise(image: np.ndarray) -> float:
    """0 to 255: standard deviation of the noise in flat areas (Immerkær 1996, with medians)."""
    return measures.flat_noise(measures.to_gray(image))


def blocks(image: np.ndarray) -> float:
    """About 1 to 4: steps at the borders of 8x8 blocks in relation to others, in the middle of the image."""
    height, width = image.shape[:2]
    top, left = (max(0, (side - MEASURED_SIDE) // 2) for side in (height, width))
    return measures.blockiness(measures.to_gray(image[top:, left:][:MEASURED_SIDE, :MEASURED_SIDE]), phase=None)


def streaks(image: np.ndarray) -> float:
    """0 to 1: the share of the image with parallel bright streaks, at a shorter side of at most 512 pixels."""
    gray, scale = measures.to_gray(image), REFERENCE_SIDE / min(image.shape[:2])
    if scale < 1:
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return measures.rain(gray)


BLURRED = TargetRule(sharpness, "too blurred", low=0.11)
NOISY = TargetRule(noise, "too noisy", high=2.6)
BLOCKY = TargetRule(blocks, "too blocky", high=1.3, is_stored=True)
HAZY = TargetRule(measures.veil, "too hazy", high=125)  # dark channel (He et al. 2009), 0 to 255
TARGET_RULES: dict[str, tuple[TargetRule, ...]] = {
    "derain": (TargetRule(streaks, "too rainy", high=0.22, is_stored=True), HAZY),  # rain far away is a veil
    "denoise": (NOISY,),
    "deblur": (BLURRED,),
    "dehaze": (HAZY,),
    "low_light": (TargetRule(measures.brightness, "too dark", low=60),),  # mean luminance, 0 to 255
    "raindrop": (BLURRED,),  # a lens with drops on it focuses on neither them nor the scene
    "sharpen": (BLURRED,),
    "colorize": (TargetRule(measures.colourfulness, "too grey", low=10),),  # Hasler and Süsstrunk 2003, 0 to 150
    "super_resolve": (BLURRED, NOISY, BLOCKY),  # low resolution comes with all of them
    "jpeg": (BLOCKY,),
}


def find_flaw(task: str, target: np.ndarray, stored: np.ndarray) -> str | None:
    """Why an image is no clean target of a task, such as "too dark for low_light"; None if it is one.

    target: uint8 RGB (H, W, 3) at the resolution of the pair; stored: the whole photograph. Other tasks than
    restorations accept every image.
    """
    for rule in TARGET_RULES.get(task, ()):
        if not rule.low <= rule.measure(stored if rule.is_stored else target) <= rule.high:
            return f"{rule.flaw} for {task}"
    return None
