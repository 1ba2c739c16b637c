"""The flow of an image: the direction of its edges at each pixel, and filters across and along them."""

import cv2
import numpy as np

SURROUND = 1.6  # width of the wide Gaussian, relative to the narrow one: their difference acts like a Laplacian


def gradients(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (H, W, C) -> derivatives per pixel to the right and down, of the same shape."""
    return cv2.Sobel(image, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(image, cv2.CV_32F, 0, 1, scale=1 / 8)


def dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W, C), (H, W, C) -> (H, W): the sum over the channels, several times as fast as (one * other).sum(2)."""
    return np.einsum("hwc,hwc->hw", one, other)


def edge_flow(image: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 (H, W, C) -> (unit vectors (x, y) along the edges (H, W, 2), their coherence in 0-1 (H, W)).

    From the structure tensor, smoothed by `sigma` pixels (Kyprianidis and Kang 2011). Coherence: 1 along a line, 0
    where there are edges of all directions. float32.
    """
    across, down = gradients(image)
    products = np.dstack([dot(across, across), dot(across, down), dot(down, down)])
    xx, xy, yy = cv2.split(cv2.GaussianBlur(products, (0, 0), sigma))
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.float32(np.pi / 2)  # the gradient, turned by 90 degrees
    return np.dstack([np.cos(angle), np.sin(angle)]), np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-4)


def smooth_along(values: np.ndarray, flow: np.ndarray, sigma: float, step: float) -> np.ndarray:
    """Gaussian mean of float32 `values` (H, W, C) along the streamlines of `flow`; sigma and step in pixels."""
    total, weights = values.copy(), 1.0
    for sign in (1, -1):
        place, heading = pixel_grid(values), flow * np.float32(sign)
        for count in range(1, int(np.ceil(2 * sigma / step)) + 1):
            place = place + np.float32(step) * heading
            weight = np.float32(np.exp(-((count * step) ** 2) / (2 * sigma**2)))
            total += weight * _sample(values, place)
            weights += weight
            following = _sample(flow, place, cv2.INTER_NEAREST)
            # The direction of an edge has no sign: keep walking the same way.
            heading = following * np.where(dot(following, heading) < 0, np.float32(-1), 1)[..., None]
    return total / np.float32(weights)


def across_edges(gray: np.ndarray, flow: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W): how much darker a line of width `sigma` pixels is than both of its sides (Kang et al. 2007)."""
    normal = np.dstack([-flow[..., 1], flow[..., 0]])
    reach = int(np.ceil(2 * SURROUND * sigma))
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    narrow, wide = (np.exp(-(offsets**2) / (2 * width**2)) for width in (sigma, SURROUND * sigma))
    weights = wide / wide.sum() - narrow / narrow.sum()
    grid = pixel_grid(gray)
    return sum(weight * _sample(gray, grid + step * normal) for step, weight in zip(offsets, weights, strict=True))


def pixel_grid(image: np.ndarray) -> np.ndarray:
    """(H, W, 2) float32: the (x, y) of each pixel."""
    height, width = image.shape[:2]
    return np.dstack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)))


def _sample(values: np.ndarray, place: np.ndarray, way: int = cv2.INTER_LINEAR) -> np.ndarray:
    return cv2.remap(values, place, None, way, borderMode=cv2.BORDER_REPLICATE)
