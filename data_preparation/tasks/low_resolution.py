"""Low resolution as it is found: the second-order degradation of Real-ESRGAN (Wang et al. 2021, section 3).

A picture is blurred, shrunk, made noisy and stored as JPEG, twice, and comes back at its own size. Unlike Real-ESRGAN
the noise has half the strength, because noise has a task of its own here, and no picture shrinks beyond recognition.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_preparation.tasks.camera import through_jpeg
from data_preparation.tasks.ranges import Choice, Range, Ranges, Whole, draw

_WAYS = {"area": 1 / 3, "linear": 1 / 3, "cubic": 1 / 3}
_INTERPOLATION = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
_NOISES = {"gaussian": 0.5, "poisson": 0.5}
_BLURS = {"gaussian": 0.9, "sinc": 0.1}
SECOND_BLUR_SHARE = 0.8  # of the pictures are blurred a second time
GREY_NOISE_SHARE = 0.4  # of the noises are alike in all channels
SMALLEST = 1 / 6  # of the sides: no picture becomes smaller on its way, or nothing is left to build on

SUPER_RESOLVE: Ranges = {
    "shrink": Range(2, 4, "the picture ends at 1/shrink of its sides before it is enlarged again"),
    "blur_1": Choice(_BLURS, "first blur; sinc rings as after a low-pass filter"),
    "sigma_1": Range(0.2, 3, "first blur: standard deviation along its wide axis, pixels"),
    "aspect_1": Range(0.5, 1, "first blur: narrow by wide axis"),
    "cutoff_1": Range(1.05, 3.14, "first blur, sinc: frequency above which nothing passes, radians per pixel"),
    "resize_1": Range(0.15, 1.5, "first resize: of the sides"),
    "way_1": Choice(_WAYS, "first resize: interpolation"),
    "noise_1": Choice(_NOISES, "first noise"),
    "gaussian_1": Range(1, 15, "first noise: standard deviation, of 255"),
    "poisson_1": Range(0.05, 1.5, "first noise: in units of that of 256 photons at white"),
    "quality_1": Whole(30, 95, "first JPEG"),
    "blur_2": Choice(_BLURS, "second blur, where there is one"),
    "sigma_2": Range(0.2, 1.5, "second blur: as the first"),
    "aspect_2": Range(0.5, 1, "second blur: as the first"),
    "cutoff_2": Range(1.05, 3.14, "second blur, sinc: as the first"),
    "resize_2": Range(0.3, 1.2, "second resize: of the sides at 1/shrink"),
    "way_2": Choice(_WAYS, "second resize: interpolation"),
    "noise_2": Choice(_NOISES, "second noise"),
    "gaussian_2": Range(1, 12.5, "second noise: as the first"),
    "poisson_2": Range(0.05, 1.25, "second noise: as the first"),
    "quality_2": Whole(30, 95, "second JPEG"),
}


def super_resolve(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """uint8 RGB (H, W, 3) -> the same size with the detail of a picture 2 to 4 times smaller; the parameters drawn."""
    height, width = image.shape[:2]
    parameters = draw(SUPER_RESOLVE, rng, "shrink")
    small = (width / parameters["shrink"], height / parameters["shrink"])
    result = _stage(image, (width, height), 1, SMALLEST, parameters, rng)
    result = _stage(result, small, 2, SMALLEST * parameters["shrink"], parameters, rng)
    result = _resize(result, small, "cubic")
    return _resize(result, (width, height), "cubic"), parameters


def _stage(image, size: tuple[float, float], stage: int, floor: float, parameters: dict, rng) -> np.ndarray:
    """Blur, resize to a part of `size` (width, height), noise, JPEG; notes what it drew in `parameters`.

    floor: the smallest part to resize to, whatever is drawn.
    """

    def drawn(*names: str) -> list:
        values = draw(SUPER_RESOLVE, rng, *(f"{name}_{stage}" for name in names))
        parameters.update(values)
        return [values[f"{name}_{stage}"] for name in names]

    if stage == 1 or rng.random() < SECOND_BLUR_SHARE:
        if drawn("blur")[0] == "sinc":
            kernel = sinc_kernel(*drawn("cutoff"))
        else:
            kernel = oval_kernel(*drawn("sigma", "aspect"), turn=rng.uniform(0, np.pi))
        image = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    resize, way = drawn("resize", "way")
    image = _resize(image, (size[0] * max(resize, floor), size[1] * max(resize, floor)), way)
    values = image.astype(np.float32)
    if drawn("noise")[0] == "gaussian":
        deviation = np.float32(drawn("gaussian")[0])
    else:
        deviation = np.float32(drawn("poisson")[0]) * np.sqrt(values * (255 / 256))
    channels = 1 if rng.random() < GREY_NOISE_SHARE else 3
    values += deviation * rng.standard_normal((*image.shape[:2], channels), dtype=np.float32)
    return through_jpeg(np.clip(values + 0.5, 0, 255).astype(np.uint8), drawn("quality")[0])


def _resize(image: np.ndarray, size: tuple[float, float], way: str) -> np.ndarray:
    width, height = (max(8, round(side)) for side in size)
    # As Real-ESRGAN does: linear and cubic without antialiasing, hence with the jagged edges of careless programs.
    return cv2.resize(image, (width, height), interpolation=_INTERPOLATION[way])


def oval_kernel(sigma: float, aspect: float, turn: float) -> np.ndarray:
    """(K, K) float32 of sum 1: a Gaussian `sigma` pixels wide along `turn` (radians), `aspect` times that across."""
    steps = np.arange(-int(np.ceil(3 * sigma)), int(np.ceil(3 * sigma)) + 1)
    along = np.cos(turn) * steps[None] + np.sin(turn) * steps[:, None]
    across = np.cos(turn) * steps[:, None] - np.sin(turn) * steps[None]
    kernel = np.exp(-0.5 * ((along / sigma) ** 2 + (across / (sigma * aspect)) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(cutoff: float, reach: int = 10) -> np.ndarray:
    """(K, K) float32 of sum 1, K = 2 reach + 1: passes frequencies below `cutoff` radians per pixel, and rings.

    cutoff * J1(cutoff * r) / (2 pi r), with Bessel's function by its integral: NumPy has none.
    """
    steps = np.arange(-reach, reach + 1)
    radius = np.maximum(np.hypot(steps[:, None], steps[None]), 1e-6)
    angles = (np.arange(256) + 0.5) * (np.pi / 256)
    bessel = np.cos(angles - cutoff * radius[..., None] * np.sin(angles)).mean(axis=-1)
    kernel = cutoff * bessel / (2 * np.pi * radius)
    return (kernel / kernel.sum()).astype(np.float32)
