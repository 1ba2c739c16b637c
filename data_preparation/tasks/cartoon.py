"""The default teacher of cartoonize: flat regions and ink lines, with OpenCV only: no model and no licence.

Bilateral filtering flattens surfaces (Winnemöller et al. 2006), segmentation finds the shapes (`regions.py`), and
differences of Gaussians along the flow of the edges (Kang et al. 2007, `flow.py`) draw smooth lines. The threshold of
the lines is relative to the local contrast, so that shadows get lines and fur does not get too many.
"""

import cv2
import numpy as np

from data_preparation.tasks.flow import across_edges, dot, edge_flow, gradients, smooth_along
from data_preparation.tasks.regions import find_regions, smooth_borders

WORK_SIDE, MAX_ENLARGEMENT = 512, 2  # the shorter side at which a cartoon is drawn, except for tiny images
SIMPLICITY = 110.0  # of the regions, at WORK_SIDE
SATURATION = 1.35
BRIGHTEST = 92  # lightness of a bright image, of 100
INK = 0.9  # share of the light that a line takes


def draw_cartoon(image: np.ndarray, has_ink: bool = True) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> a cartoon of the same size, with ink lines or with flat colours only; deterministic."""
    height, width = image.shape[:2]
    scale = min(MAX_ENLARGEMENT, WORK_SIDE / min(height, width))
    work = _resize(image, (round(width * scale), round(height * scale)))
    unit = min(work.shape[:2]) / WORK_SIDE
    lab, smooth = _to_lab(work), _to_lab(smooth_surfaces(work, unit))
    texture = cv2.GaussianBlur(np.abs(lab - smooth).sum(axis=2), (0, 0), 14 * unit)  # fur and leaves have much of it
    flat = flatten(smooth, texture, unit)
    cartoon = cv2.GaussianBlur(liven(flat), (0, 0), 0.7).astype(np.float32)  # softens the steps at the borders
    if has_ink:
        ink = draw_ink((lab + smooth) / 2, smooth, flat, texture, unit)
        cartoon *= 1 - np.float32(INK) * ink[..., None]
    return _resize(np.clip(cartoon + 0.5, 0, 255).astype(np.uint8), (width, height))


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (width, height)."""
    if image.shape[1::-1] == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if size[1] < image.shape[0] else cv2.INTER_CUBIC)


def _to_lab(image: np.ndarray) -> np.ndarray:
    """uint8 RGB -> float32 CIELAB: lightness 0 to 100, a and b about -100 to 100."""
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def smooth_surfaces(image: np.ndarray, unit: float) -> np.ndarray:
    """uint8 RGB -> uint8 RGB with smooth surfaces and sharp edges: several light bilateral passes.

    unit: one pixel at WORK_SIDE.
    """
    smooth = cv2.medianBlur(image, 3) if unit > 0.4 else image
    diameter = max(5, 2 * round(3 * unit) + 1)
    for strength in (34, 30, 28, 25):
        smooth = cv2.bilateralFilter(smooth, diameter, strength, max(1.5, 4 * unit))
    return smooth


def flatten(smooth: np.ndarray, texture: np.ndarray, unit: float) -> np.ndarray:
    """CIELAB (H, W, 3), smooth -> CIELAB with one colour for each region. texture: (H, W)."""
    labels, colours = find_regions(smooth, 1 + texture / 6, SIMPLICITY * unit)
    soft = cv2.GaussianBlur(smooth, (0, 0), max(0.5, 0.8 * unit))
    for reach in (6, 4):
        labels = smooth_borders(labels, colours, soft, max(1, round(reach * unit)))
    return colours[labels]


def liven(lab: np.ndarray) -> np.ndarray:
    """CIELAB -> uint8 RGB, more saturated and a little brighter, without specks."""
    # Dark images are brightened halfway, up to a limit; midtones always are, because ink darkens the image.
    brightest = np.clip(np.percentile(lab[..., 0], 99), 1, BRIGHTEST)
    lift = min(1.2, 1 + 0.5 * (BRIGHTEST / brightest - 1))
    lightness = 100 * np.clip(lab[..., :1] * lift / 100, 0, 1) ** 0.85
    lively = np.concatenate([lightness, SATURATION * lab[..., 1:]], axis=2).astype(np.float32)
    rgb = (np.clip(cv2.cvtColor(lively, cv2.COLOR_LAB2RGB), 0, 1) * 255 + 0.5).astype(np.uint8)
    return cv2.medianBlur(rgb, 5)


def draw_ink(fine: np.ndarray, smooth: np.ndarray, flat: np.ndarray, texture: np.ndarray, unit: float) -> np.ndarray:
    """(H, W) float32 in 0-1: bold outlines of the flat regions, thin lines of details, and dark spots such as eyes.

    fine, smooth, flat: CIELAB (H, W, 3), of decreasing detail; texture: (H, W).
    """
    flow, coherence = edge_flow((smooth + flat) / 2, 2.5 * unit)
    light = fine[..., 0]
    contrast = np.minimum(local_contrast(smooth[..., 0], 12 * unit), 14) + 6
    strokes = np.dstack([across_edges(flat[..., 0], flow, 1.8 * unit), across_edges(light, flow, 1.0 * unit)])
    strokes = smooth_along(strokes, flow, 4 * unit, step=max(0.5, 1.5 * unit))
    strokes *= ((0.5 + 0.5 * coherence) / contrast)[..., None]
    # A border between two regions is no outline where the photograph changes gradually, as a sky does.
    change = np.sqrt(sum(dot(part, part) for part in gradients(cv2.GaussianBlur(smooth, (0, 0), 2.5 * unit))))
    outlines = strokes[..., 0] * np.clip((change * unit - 0.4) / 0.6, 0, 1) / (1 + texture / 30)
    spots = (cv2.GaussianBlur(light, (0, 0), 5.5 * unit) - cv2.GaussianBlur(light, (0, 0), 2 * unit)) / contrast
    outlines = ramp(outlines, 0.04, 0.07)
    details = np.maximum(ramp(strokes[..., 1], 0.035, 0.07, texture), ramp(spots, 0.2, 0.3, texture))
    return np.maximum(keep_long(outlines, 24 * unit), keep_long(details, 14 * unit))


def ramp(values: np.ndarray, low: float, high: float, texture: np.ndarray | float = 0.0) -> np.ndarray:
    """0 below `low`, 1 above `high`; texture lowers the values, so that fur and leaves get fewer lines."""
    return np.clip((values / (1 + texture / 10) - low) / (high - low), 0, 1)


def local_contrast(gray: np.ndarray, sigma: float) -> np.ndarray:
    """Standard deviation in Gaussian windows, (H, W)."""
    mean = cv2.GaussianBlur(gray, (0, 0), sigma)
    return np.sqrt(np.maximum(cv2.GaussianBlur(gray * gray, (0, 0), sigma) - mean * mean, 0))


def keep_long(ink: np.ndarray, length: float) -> np.ndarray:
    """The ink (H, W) of strokes with a bounding box at least `length` pixels long."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats((ink > 0.3).astype(np.uint8), connectivity=8)
    is_long = np.maximum(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT]) >= max(4, round(length))
    is_long[0] = False
    return ink * cv2.dilate(is_long[labels].astype(np.float32), np.ones((3, 3), np.uint8))
