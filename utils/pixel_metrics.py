"""Differences of two images in pixels: L1, L2, PSNR and SSIM, of the whole image or of an area of it.

Images are uint8 RGB (H, W, 3); where the sizes differ, the first is resized to the second with a Lanczos filter, as
MagicBrush's scorer resizes the edit to its target. Values in [0, 1] are used: pixel / 255.
"""

import numpy as np
import torch
from PIL import Image

MAX_PSNR = 100.0  # of equal images, whose PSNR has no bound
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM (Wang et al. 2004, sections III.B and III.C)


def same_size(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`image` in the size of `target`."""
    if image.shape == target.shape:
        return image
    size = (target.shape[1], target.shape[0])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def pixel_scores(image: np.ndarray, target: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """l1, l2, psnr and ssim of an image and its target; NaN where the mask is empty.

    mask: bool (H, W), the area that counts; None is the whole image.
    """
    image = same_size(image, target)
    area = np.ones(target.shape[:2], bool) if mask is None else mask
    if not area.any():
        return dict.fromkeys(("l1", "l2", "psnr", "ssim"), float("nan"))
    difference = (image.astype(np.float64) - target)[area] / 255
    l2 = float(np.mean(difference**2))
    return {"l1": float(np.mean(np.abs(difference))), "l2": l2, "psnr": psnr(l2), "ssim": ssim(image, target, mask)}


def psnr(l2: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most `MAX_PSNR`."""
    return MAX_PSNR if l2 <= 10 ** (-MAX_PSNR / 10) else float(-10 * np.log10(l2))


def ssim(image: np.ndarray, target: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity in [-1, 1], 1 for equal images (Wang et al. 2004, equation 13), the mean of the channels.

    Gaussian windows of 11 pixels with a deviation of 1.5, only where they lie inside the image, and population
    covariances: as scikit-image's with gaussian_weights and use_sample_covariance=False. torchmetrics 1.9 pads the
    images by reflection and averages the border, too, which gives other values. A window counts by its centre for the
    mask. NaN for images smaller than a window, and for a mask without a window.
    """
    if min(target.shape[:2]) < WINDOW:
        return float("nan")
    first, second = (torch.from_numpy(np.array(values)).double() / 255 for values in (image, target))
    first, second = (values.permute(2, 0, 1)[:, None] for values in (first, second))  # (3, 1, H, W)
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.conv2d(values, weights.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))

    mean_1, mean_2 = mean(first), mean(second)
    variance_1, variance_2 = mean(first**2) - mean_1**2, mean(second**2) - mean_2**2
    covariance = mean(first * second) - mean_1 * mean_2
    c1, c2 = K1**2, K2**2
    values = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)
    values /= (mean_1**2 + mean_2**2 + c1) * (variance_1 + variance_2 + c2)
    if mask is not None:
        edge = WINDOW // 2
        inner = torch.from_numpy(mask[edge:-edge, edge:-edge].copy())
        values = values[:, :, inner]
    return float(values.mean()) if values.numel() else float("nan")


def changed_area(original: np.ndarray, edited: np.ndarray, threshold: int = 0) -> np.ndarray:
    """bool (H, W): where an exact result differs from the original by more than `threshold` of 255 in a channel."""
    difference = np.abs(original.astype(np.int16) - same_size(edited, original))
    return difference.max(axis=2) > threshold
