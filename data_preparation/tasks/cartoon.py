"""The default teacher of cartoonize: flat colours, few tones and ink lines, with OpenCV only: no model and no licence.

Bilateral filtering flattens surfaces (Winnemöller et al. 2006), k-means in CIELAB finds the palette of the image, and
an extended difference of Gaussians (XDoG, Winnemöller 2011) draws the lines.
"""

import cv2
import numpy as np

PALETTE = 18  # colours that k-means finds; tones are then stepped between them
WORK_SIDE = 512  # larger images are reduced to this shorter side for flattening
SHARPNESS = 0.08  # of the steps between colours, per squared unit of CIELAB
SATURATION = 1.45
BRIGHTEST = 92  # lightness of a bright image, of 100


def draw_cartoon(image: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> a cartoon of the same size; deterministic."""
    height, width = image.shape[:2]
    scale = min(1.0, WORK_SIDE / min(height, width))
    work = image
    if scale < 1:
        work = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    unit = min(work.shape[:2]) / 512  # one pixel at 512
    flat = smooth_tones(work, unit)
    colours = step_colours(flat)
    ink = draw_ink(flat, work, unit)
    if scale < 1:
        colours = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
        ink = cv2.resize(ink, (width, height), interpolation=cv2.INTER_CUBIC)
    inked = colours.astype(np.float32) * (1 - 0.88 * np.clip(ink, 0, 1)[..., None])
    return np.clip(inked + 0.5, 0, 255).astype(np.uint8)


def smooth_tones(image: np.ndarray, unit: float) -> np.ndarray:
    """uint8 RGB -> uint8 RGB with smooth surfaces and sharp edges: several light bilateral passes."""
    flat = cv2.medianBlur(image, 3) if unit > 0.4 else image
    diameter = max(5, 2 * round(3 * unit) + 1)
    for strength in (34, 30, 28, 25):
        flat = cv2.bilateralFilter(flat, diameter, strength, max(1.5, 4 * unit))
    return flat


def step_colours(flat: np.ndarray) -> np.ndarray:
    """uint8 RGB -> uint8 RGB in few colours, more saturated and a little brighter."""
    lab = cv2.cvtColor(flat.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    palette = find_palette(lab)
    points = lab.reshape(-1, 3)
    # Soft steps: colours mix gradually, which avoids jagged contours. The weight of a colour falls with its squared
    # distance |p - c|^2; |p|^2 is the same for all colours and cancels.
    nearness = (2 * SHARPNESS * palette) @ points.T - SHARPNESS * (palette**2).sum(axis=1, keepdims=True)
    nearness -= nearness.max(axis=0)
    weights = np.exp(np.maximum(nearness, -20, out=nearness), out=nearness)  # weights of at least e^-20
    weights /= weights.sum(axis=0)
    mixed = weights.T @ palette
    # Dark images are brightened halfway, up to a limit; midtones always are, because ink darkens the image.
    lift = min(1.2, 1 + 0.5 * (BRIGHTEST / np.clip(palette[:, 0].max(), 1, BRIGHTEST) - 1))
    mixed[:, 0] = 100 * np.clip(mixed[:, 0] * lift / 100, 0, 1) ** 0.85
    mixed[:, 1:] *= SATURATION
    rgb = cv2.cvtColor(mixed.reshape(lab.shape).astype(np.float32), cv2.COLOR_LAB2RGB)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def find_palette(lab: np.ndarray) -> np.ndarray:
    """(H, W, 3) CIELAB -> (PALETTE, 3): k-means, initialised with groups of similar lightness."""
    small = cv2.resize(lab, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    order = np.argsort(small[:, 0] + 0.5 * small[:, 1] + 0.25 * small[:, 2], kind="stable")
    labels = np.empty((len(small), 1), np.int32)
    labels[order, 0] = np.arange(len(small)) * PALETTE // len(small)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.3)
    return cv2.kmeans(small, PALETTE, labels, criteria, 1, cv2.KMEANS_USE_INITIAL_LABELS)[2]


def draw_ink(flat: np.ndarray, image: np.ndarray, unit: float) -> np.ndarray:
    """(H, W) float32 in 0-1: lines on the dark side of edges, without specks."""
    gray = cv2.cvtColor(cv2.addWeighted(flat, 0.7, image, 0.3, 0), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    sigma = max(0.6, 0.9 * unit)
    difference = cv2.GaussianBlur(gray, (0, 0), 1.6 * sigma) - cv2.GaussianBlur(gray, (0, 0), sigma)
    ink = np.clip((difference - 0.007) / 0.010, 0, 1)
    return ink * keep_long(ink > 0.3, max(4, round(20 * unit)))


def keep_long(mask: np.ndarray, length: int) -> np.ndarray:
    """bool (H, W) -> float32 (H, W): 1 at and around strokes with a bounding box at least `length` pixels long."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_long = np.maximum(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT]) >= length
    is_long[0] = False
    return cv2.dilate(is_long[labels].astype(np.float32), np.ones((3, 3), np.uint8))
