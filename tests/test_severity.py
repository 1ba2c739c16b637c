"""How strong the degradations are: the same at every resolution, in order, and never beyond recognition."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_preparation.photographs import centre_square, read_photograph, seeded_rng
from data_preparation.tasks import camera, weather
from data_preparation.tasks.camera import make_grain, scale_quality
from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.tasks.primitives import Choice, IntegerRange, Range
from utils.checks.image_measures import to_gray

PHOTOS = Path(__file__).parent.parent / "assets" / "photos"
RANDOM = [name for name in DEGRADATIONS if name not in ("colorize", "identity")]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """uint8 RGB (512, 512, 3)"""
    return centre_square(read_photograph(PHOTOS / "astronaut.jpg"), 512)


def resize(image: np.ndarray, side: int) -> np.ndarray:
    way = cv2.INTER_AREA if side <= image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (side, side), interpolation=way)


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of the luminance, with Gaussian windows of deviation 1.5."""
    first, second = to_gray(one), to_gray(other)

    def blur(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (0, 0), 1.5)

    means = blur(first), blur(second)
    spreads = blur(first**2) - means[0] ** 2 + blur(second**2) - means[1] ** 2
    product = means[0] * means[1]
    covariance = blur(first * second) - product
    light = (2 * product + 6.5) / (means[0] ** 2 + means[1] ** 2 + 6.5)
    return float((light * (2 * covariance + 58.5) / (spreads + 58.5)).mean())


def gradient(image: np.ndarray) -> float:
    return float(np.hypot(*np.gradient(to_gray(image))).mean())


@pytest.mark.parametrize("name", RANDOM)
def test_strength_is_the_same_at_all_resolutions(name, photograph):
    """Degraded at 512 or 1024 pixels and then reduced, a photograph looks as if degraded at 256."""
    clean, likeness = resize(photograph, 256), []
    for side in (256, 512, 1024):
        image = resize(photograph, side)
        degraded = [resize(DEGRADATIONS[name](image, seeded_rng(3, row))[0], 256) for row in range(4)]
        likeness.append(np.mean([ssim(each, clean) for each in degraded]))
    assert max(likeness) < 0.97, "something was degraded"
    assert np.ptp(likeness) < (0.06 if name == "jpeg" else 0.04), likeness


@pytest.mark.parametrize("side", [256, 512])
def test_an_image_to_sharpen_is_less_blurred_than_one_to_deblur(side, photograph):
    image = resize(photograph, side)
    sharpen, deblur = (
        [gradient(DEGRADATIONS[name](image, seeded_rng(0, row))[0]) for row in range(20)]
        for name in ("sharpen", "deblur")
    )
    assert np.min(sharpen) > np.mean(deblur) and np.mean(sharpen) > np.max(deblur)
    assert np.max(sharpen) < 0.95 * gradient(image), "but blurred"


@pytest.mark.parametrize("side", [256, 512])
def test_super_resolve_stays_recognizable(side, photograph):
    image = resize(photograph, side)
    likeness = [
        ssim(resize(DEGRADATIONS["super_resolve"](image, seeded_rng(0, row))[0], 128), resize(photograph, 128))
        for row in range(30)
    ]
    assert min(likeness) > 0.55, likeness


SEVERITIES = [  # task, its ranges, parameter, mild and strong value, kind
    ("denoise", camera.DENOISE, "photons", 500, 12, "sensor"),
    ("denoise", camera.DENOISE, "sigma", 10, 60, "gaussian"),
    ("deblur", camera.DEBLUR, "length", 14, 31, "shake"),
    ("deblur", camera.DEBLUR, "radius", 4.5, 9, "defocus"),
    ("sharpen", camera.SHARPEN, "sigma", 1.5, 2.2, None),
    ("low_light", camera.LOW_LIGHT, "gain", 0.4, 0.05, None),
    ("jpeg", camera.JPEG, "quality", 40, 5, None),
    ("super_resolve", camera.SUPER_RESOLVE, "resize_1", 1.5, 0.15, None),
    ("dehaze", weather.DEHAZE, "beta", 0.6, 1.8, None),
    ("derain", weather.DERAIN, "strength", 0.35, 0.85, None),
    ("raindrop", weather.RAINDROP, "drops", 20, 80, None),
]


@pytest.mark.parametrize(("name", "ranges", "parameter", "mild", "strong", "kind"), SEVERITIES)
def test_stronger_parameters_degrade_more(name, ranges, parameter, mild, strong, kind, photograph, monkeypatch):
    image, likeness = resize(photograph, 256), []
    if kind:
        monkeypatch.setitem(ranges, "kind", Choice({kind: 1.0}, ""))
    assert {mild, strong} == {ranges[parameter].low, ranges[parameter].high}
    for value in (mild, (mild + strong) / 2, strong):
        fixed = IntegerRange(int(value), int(value), "") if isinstance(ranges[parameter], IntegerRange) else None
        monkeypatch.setitem(ranges, parameter, fixed or Range(value, value, ""))
        results = [DEGRADATIONS[name](image, seeded_rng(2, row))[0] for row in range(3)]
        likeness.append(np.mean([ssim(result, image) for result in results]))
    assert likeness == sorted(likeness, reverse=True), likeness


def test_grain_has_the_size_of_a_pixel_at_512():
    for scale, side in ((0.5, 256), (1.0, 512), (2.0, 1024)):
        grain = make_grain((side, side, 3), scale, np.random.default_rng(0))
        assert grain.shape == (side, side, 3) and grain.dtype == np.float32
        assert cv2.resize(grain, (256, 256), interpolation=cv2.INTER_AREA).std() == pytest.approx(0.5, rel=0.1)


def test_quality_of_smaller_and_larger_images():
    assert [scale_quality(quality, 1.0) for quality in (5, 40, 50, 90)] == [5, 40, 50, 90]
    assert [scale_quality(quality, 0.5) for quality in (5, 40, 90)] == [10, 69, 95]
    assert [scale_quality(quality, 2.0) for quality in (10, 69, 95)] == [5, 40, 90]
