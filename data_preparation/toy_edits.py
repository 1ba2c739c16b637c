"""The exact edits of the toy world: the result of each instruction for any photograph.

Each edit is a pure function, uint8 RGB (H, W, 3) -> uint8 RGB of the same size. All are local, so that a small UNet can
learn them at 64 pixels. They differ strongly from one another and from the original image, because the demo counts an
edit as correct if it is closer to its own exact result than to any other.
"""

import cv2
import numpy as np


def _scale(image: np.ndarray) -> int:
    """Width of a line in pixels: 1 at 64 pixels, proportional to the image, so that edits look alike at any size."""
    return max(1, round(min(image.shape[:2]) / 64))


def _gray(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 luminance in 0-1."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats in 0-1 (clipped) -> uint8; one channel is repeated to three."""
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def _rows(image: np.ndarray) -> np.ndarray:
    """(H, 1, 1) float32: 0 at the top row, 1 at the bottom row."""
    return np.linspace(0, 1, image.shape[0], dtype=np.float32)[:, None, None]


def _lines(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0-1: ink, 1 on the darker side of a strong edge (a difference of Gaussians)."""
    scale, gray = _scale(image), _gray(image)
    difference = cv2.GaussianBlur(gray, (0, 0), 2.0 * scale) - cv2.GaussianBlur(gray, (0, 0), 0.6 * scale)
    return np.clip((difference - 0.025) / 0.075, 0, 1)


def cartoonize(image: np.ndarray) -> np.ndarray:
    """Flat, vivid colours in few brightness steps, with dark ink lines."""
    scale = _scale(image)
    flat = image
    for _ in range(3):
        flat = cv2.bilateralFilter(flat, 4 * scale + 1, 60, 2.0 * scale)
    hue, saturation, value = np.moveaxis(cv2.cvtColor(flat.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), 2, 0)
    saturation = np.clip(saturation * 1.9 + 0.08, 0, 1)
    # Four brightened steps: only the ink of a cartoon is dark.
    value = (np.floor(np.clip(value, 0, 0.999) * 4) + 1.4) / 4.4
    colours = cv2.cvtColor(np.dstack([hue, saturation, value]).astype(np.float32), cv2.COLOR_HSV2RGB)
    return _to_uint8(colours * (1 - 0.9 * _lines(image)[..., None]))


def grayscale(image: np.ndarray) -> np.ndarray:
    """Black and white."""
    return _to_uint8(_gray(image))


def sepia(image: np.ndarray) -> np.ndarray:
    """Brown tones of an old print: dark brown shadows, cream highlights."""
    gray = _gray(image)[..., None]
    dark, light = np.array([0.20, 0.09, 0.0], np.float32), np.array([1.0, 0.80, 0.48], np.float32)
    return _to_uint8(dark + (light - dark) * gray)


def negative(image: np.ndarray) -> np.ndarray:
    """All colours inverted."""
    return 255 - image


def night(image: np.ndarray) -> np.ndarray:
    """Darkness with blue moonlight."""
    values = (image.astype(np.float32) / 255) ** 1.3
    gray = _gray(image)[..., None] ** 1.3
    muted = 0.35 * values + 0.65 * gray
    return _to_uint8(muted * np.array([0.16, 0.24, 0.50], np.float32) + np.array([0.0, 0.01, 0.05], np.float32))


def sunset(image: np.ndarray) -> np.ndarray:
    """Warm light: red and orange at the top, purple towards the bottom."""
    values = image.astype(np.float32) / 255
    top, bottom = np.array([1.0, 0.45, 0.05], np.float32), np.array([0.55, 0.08, 0.35], np.float32)
    glow = top + (bottom - top) * _rows(image)
    return _to_uint8(0.55 * values * np.array([1.25, 0.75, 0.5], np.float32) + 0.45 * glow)


def fog(image: np.ndarray) -> np.ndarray:
    """A white veil, thick at the top and thinner at the bottom."""
    values = image.astype(np.float32) / 255
    veil = 0.85 - 0.35 * _rows(image)
    return _to_uint8(values * (1 - veil) + np.array([0.90, 0.92, 0.95], np.float32) * veil)


def sketch(image: np.ndarray) -> np.ndarray:
    """Pencil on white paper: dark where a pixel is darker than its surroundings, with a hint of shading."""
    shading = 0.84 + 0.16 * _gray(image)
    return _to_uint8(shading * (1 - 0.85 * _lines(image)))


def mosaic(image: np.ndarray) -> np.ndarray:
    """Square tiles of one colour each, eight to a side at any size, with dark joints between them."""
    height, width = image.shape[:2]
    tiles = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA)
    result = cv2.resize(tiles, (width, height), interpolation=cv2.INTER_NEAREST)
    for size, axis in ((height, 0), (width, 1)):
        joint = (np.arange(size) * 8 % size) < 8 * _scale(image)
        result = np.where(joint[:, None, None] if axis == 0 else joint[None, :, None], np.uint8(20), result)
    return result


def thermal(image: np.ndarray) -> np.ndarray:
    """False colours of a thermal camera: blue where dark, red in the middle, yellow where bright."""
    stops = np.array([0.0, 0.3, 0.6, 0.85, 1.0], np.float32)
    colours = np.array([[0, 0, 90], [110, 0, 160], [235, 40, 60], [255, 190, 0], [255, 255, 200]], np.float32) / 255
    gray = _gray(image)
    return _to_uint8(np.dstack([np.interp(gray, stops, colours[:, channel]) for channel in range(3)]))


_EDITS = (cartoonize, grayscale, sepia, negative, night, sunset, fog, sketch, mosaic, thermal)
EDITS = {edit.__name__: edit for edit in _EDITS}


def exact_results(image: np.ndarray, tasks: list[str] | None = None) -> dict[str, np.ndarray]:
    """The exact result of each task (default: all) for one photograph, by name, in the given order."""
    return {task: EDITS[task](image) for task in (EDITS if tasks is None else tasks)}
