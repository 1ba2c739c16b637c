"""Convolution kernels of blur: defocus, camera motion, Gaussian, and the sinc of a low-pass filter."""

import numpy as np


def disc_kernel(radius: float) -> np.ndarray:
    """(K, K) float32 of sum 1: the image of a point out of focus, with a soft edge one pixel wide."""
    reach = int(np.ceil(radius))
    steps = np.arange(-reach, reach + 1)
    kernel = np.clip(radius + 0.5 - np.hypot(steps[:, None], steps[None]), 0, 1).astype(np.float32)
    return kernel / kernel.sum()


def shake_path(rng: np.random.Generator) -> np.ndarray:
    """(400, 2) points (x, y) of camera shake, longest along x: a random walk with jerks and uneven speed."""
    turns = rng.standard_normal(400) * 0.06 + (rng.random(400) < 0.006) * rng.uniform(-2, 2, 400)
    speed = np.exp(np.cumsum(rng.standard_normal(400)) * 0.06)
    heading = np.cumsum(turns)
    points = np.cumsum(speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    _, axes = np.linalg.eigh(np.cov(points.T))
    return (points - points.mean(axis=0)) @ axes[:, ::-1]


def path_kernel(path: np.ndarray, extent: float, angle: float) -> np.ndarray:
    """(K, K) float32 of sum 1: the trace of a point while the camera moves along `path`.

    path: (N, 2) points, evenly spaced in time; extent: length of the path along x, pixels; angle: rotation of the path,
    degrees. The kernel is centred on its mean, so the image does not shift.
    """
    points = (path - path.mean(axis=0)) * (extent / np.ptp(path[:, 0]))
    turn = np.deg2rad(angle)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    reach = int(np.ceil(np.abs(points).max())) + 1
    corner = np.floor(points).astype(int)
    share_x, share_y = (points - corner).T
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    # Bilinear: each point is distributed over its four neighbours.
    for step_y, part_y in ((0, 1 - share_y), (1, share_y)):
        for step_x, part_x in ((0, 1 - share_x), (1, share_x)):
            np.add.at(kernel, (corner[:, 1] + reach + step_y, corner[:, 0] + reach + step_x), part_y * part_x)
    return (kernel / kernel.sum()).astype(np.float32)


def anisotropic_kernel(sigma: float, aspect: float, angle: float) -> np.ndarray:
    """(K, K) float32 of sum 1: a Gaussian of `sigma` pixels along `angle` (radians) and `sigma * aspect` across."""
    steps = np.arange(-int(np.ceil(3 * sigma)), int(np.ceil(3 * sigma)) + 1)
    along = np.cos(angle) * steps[None] + np.sin(angle) * steps[:, None]
    across = np.cos(angle) * steps[:, None] - np.sin(angle) * steps[None]
    kernel = np.exp(-0.5 * ((along / sigma) ** 2 + (across / (sigma * aspect)) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(cutoff: float, reach: int = 10) -> np.ndarray:
    """(K, K) float32 of sum 1, K = 2 reach + 1: passes frequencies below `cutoff` radians per pixel, and rings.

    cutoff * J1(cutoff * r) / (2 pi r), with the Bessel function as an integral, because NumPy has none.
    """
    steps = np.arange(-reach, reach + 1)
    radius = np.maximum(np.hypot(steps[:, None], steps[None]), 1e-6)
    angles = (np.arange(256) + 0.5) * (np.pi / 256)
    bessel = np.cos(angles - cutoff * radius[..., None] * np.sin(angles)).mean(axis=-1)
    kernel = cutoff * bessel / (2 * np.pi * radius)
    return (kernel / kernel.sum()).astype(np.float32)
