"""Measures of the images of a pair: similarity, shift, noise, sharpness, colour, perceptual hash.

Images are uint8 RGB (H, W, 3); `gray` is float32 (H, W) in 0-255.
"""

from typing import NamedTuple

import cv2
import numpy as np

HASH_SIDE = 32
MIN_SIDE_FOR_SHIFT = 24
SEARCH_RADIUS, MAX_SEARCH_STEPS = 2, 4  # around the peak of a phase correlation, in pixels
NEIGHBOUR_DISTANCE = 4  # pixels
ALIGNED = 0.95  # correlation of edges from which no shift could fit much better
MIN_CONTRAST = 4.0  # standard deviation of a gray image below which it has no perceptual hash


class Shift(NamedTuple):
    """The shift of the edited image against the original in pixels: to the right (x) and down (y)."""

    x: int
    y: int
    correlation: float  # of the edges after shifting back, -1 to 1
    gain: float = 0.0  # the increase in correlation by shifting back: the least of the four halves of the image
    distinctness: float = 0.0  # the decrease in correlation `NEIGHBOUR_DISTANCE` pixels away, in the best direction

    @property
    def length(self) -> float:
        return float(np.hypot(self.x, self.y))


def to_gray(image: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> float32 luminance (H, W) in 0-255."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two images of one size; infinite if they are equal."""
    error = cv2.norm(one, other, cv2.NORM_L2SQR) / one.size
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def mean_and_deviation(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel, float64 (channels,). Ten times as fast as numpy's, which makes a copy for the deviation."""
    mean, deviation = cv2.meanStdDev(image)
    return mean[:, 0], deviation[:, 0]


def largest_local_change(one: np.ndarray, other: np.ndarray, tiles: int = 16) -> float:
    """The largest mean change of a tile, in 0-255: small if the images differ only in compression."""
    difference = one.astype(np.float32) - other.astype(np.float32)
    return float(np.abs(cv2.resize(difference, (tiles, tiles), interpolation=cv2.INTER_AREA)).max())


def edge_map(gray: np.ndarray) -> np.ndarray:
    """Edge strength, float32 (H, W), mean 0 and standard deviation 1: similar for a photograph, its negative and a
    drawing of it. Strong edges are clipped, so that a single one does not dominate."""
    smooth = cv2.GaussianBlur(gray, (0, 0), 1.0) - cv2.GaussianBlur(gray, (0, 0), 6.0)  # removes gradients of light
    strength = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    strength = np.minimum(np.sqrt(strength / (cv2.mean(strength)[0] + 1e-6)), 2.5)
    (mean,), (deviation,) = mean_and_deviation(strength)
    return (strength - np.float32(mean)) / np.float32(deviation + 1e-6)


def find_shift(original: np.ndarray, edited: np.ndarray) -> Shift:
    """The shift between two gray images of one size, by phase correlation of their edges.

    Phase correlation always finds a peak: `gain` and `distinctness` tell whether it is a shift. If the styles differ,
    the peak is up to two pixels off, so its surroundings are searched.
    """
    edges = [edge_map(gray) for gray in (original, edited)]
    best = Shift(0, 0, _correlation(*edges, 0, 0))
    if min(original.shape) < MIN_SIDE_FOR_SHIFT or best.correlation >= ALIGNED:
        return best
    for factor in (2, 1):  # half size ignores fine texture, which an edit may have replaced
        peak = _phase_peak(*edges, factor)
        if peak == (0, 0):  # its peak is exact to parts of a pixel: the full size, four times the work, finds the same
            break
        candidate = _search_around(*edges, *peak)
        best = candidate if candidate.correlation > best.correlation else best
    return best if (best.x, best.y) == (0, 0) else _with_confidence(*edges, best)


def _with_confidence(one: np.ndarray, other: np.ndarray, shift: Shift) -> Shift:
    """The shift with `gain`, which is low if a single object moved, and `distinctness`, low along a straight edge."""
    x, y = shift.x, shift.y
    height, width = one.shape
    halves = np.s_[: height // 2, :], np.s_[height // 2 :, :], np.s_[:, : width // 2], np.s_[:, width // 2 :]
    gains = [_correlation(one, other, x, y, half) - _correlation(one, other, 0, 0, half) for half in halves]
    step = NEIGHBOUR_DISTANCE
    neighbours = [_correlation(one, other, *at) for at in ((x + step, y), (x - step, y), (x, y + step), (x, y - step))]
    return shift._replace(gain=min(gains), distinctness=shift.correlation - max(neighbours))


def _overlap(one: np.ndarray, other: np.ndarray, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """The overlap of two maps after shifting the second back by (x, y) pixels."""
    height, width = one.shape
    first = one[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
    second = other[max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)]
    return first, second


def _correlation(one: np.ndarray, other: np.ndarray, x: int, y: int, part: tuple = np.s_[:, :]) -> float:
    """Correlation (-1 to 1) of two maps in a part of their overlap, after shifting the second back by (x, y) pixels."""
    first, second = (image[part] for image in _overlap(one, other, x, y))
    if not first.size:
        return 0.0
    ((mean,), (deviation,)), ((other_mean,), (other_deviation,)) = map(mean_and_deviation, (first, second))
    covariance = float(np.vdot(first, second)) / first.size - mean * other_mean
    return float(covariance / (deviation * other_deviation + 1e-6))


def _phase_peak(one: np.ndarray, other: np.ndarray, factor: int) -> tuple[int, int]:
    """(x, y) in pixels of the images, measured after downscaling them by `factor`."""
    if factor > 1:
        size = (one.shape[1] // factor, one.shape[0] // factor)
        one, other = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (one, other))
    window = cv2.createHanningWindow(one.shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(one, other, window)
    return round(x * factor), round(y * factor)


def _search_around(one: np.ndarray, other: np.ndarray, x: int, y: int) -> Shift:
    """The best shift near (x, y); the search continues while the best one is at its border."""
    (height, width), reach, best = one.shape, SEARCH_RADIUS, Shift(x, y, -1.0)
    for _ in range(MAX_SEARCH_STEPS):
        if abs(best.x) > width // 3 or abs(best.y) > height // 3:
            break
        first, second = _overlap(one, other, best.x, best.y)
        inside = first[reach : first.shape[0] - reach, reach : first.shape[1] - reach]
        correlations = cv2.matchTemplate(second, inside, cv2.TM_CCOEFF_NORMED)  # (2 reach + 1, 2 reach + 1)
        row, column = (int(index) for index in np.unravel_index(int(correlations.argmax()), correlations.shape))
        if correlations[row, column] <= best.correlation:
            break
        best = Shift(best.x + column - reach, best.y + row - reach, float(correlations[row, column]))
        if 0 < row < 2 * reach and 0 < column < 2 * reach:
            break
    return best


def noise_level(gray: np.ndarray) -> float:
    """Standard deviation of the noise in 0-255: the median of second differences, which flat areas dominate."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(cv2.filter2D(gray, cv2.CV_32F, kernel)[1:-1, 1:-1]))) / (6 * 0.6745)


def sharpness(gray: np.ndarray) -> float:
    """Ratio of the finest details to all edges: any blur lowers it, contrast does not change it."""
    edges = cv2.magnitude(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
    return cv2.mean(np.abs(cv2.Laplacian(gray, cv2.CV_32F)))[0] / (cv2.mean(edges)[0] + 1.0)


def flat_noise(gray: np.ndarray) -> float:
    """`noise_level` of the flattest fifth of the image, in blocks of 16 pixels: unlike fur and leaves, noise is also
    there. Blocks that are black or white are ignored, because clipping hides noise; 0 if there are only such blocks."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    second_differences = _in_blocks(np.abs(cv2.filter2D(gray, cv2.CV_32F, kernel)))
    light = _in_blocks(gray).mean(axis=1)
    medians = np.median(second_differences, axis=1)[(light > 8) & (light < 247)]
    return float(np.percentile(medians, 20)) / (6 * 0.6745) if len(medians) else 0.0


def _in_blocks(gray: np.ndarray, side: int = 16) -> np.ndarray:
    """(H, W) -> (number of whole blocks, side * side)"""
    height, width = (length // side for length in gray.shape)
    blocks = gray[: height * side, : width * side].reshape(height, side, width, side)
    return blocks.swapaxes(1, 2).reshape(-1, side * side)


def blockiness(gray: np.ndarray, phase: int | None = 7) -> float:
    """How much larger the steps across the borders of JPEG's 8x8 blocks are than those inside; 1: no blocks.

    phase: index of the first border; None finds the strongest, for an image that was cropped after compression.
    """
    ratios = []
    across = cv2.reduce(cv2.absdiff(gray[:, 1:], gray[:, :-1]), 0, cv2.REDUCE_AVG)[0]
    down = cv2.reduce(cv2.absdiff(gray[1:], gray[:-1]), 1, cv2.REDUCE_AVG)[:, 0]
    for steps in (across, down):
        found = []
        for first in range(8) if phase is None else (phase,):
            is_border = np.arange(len(steps)) % 8 == first
            found.append((steps[is_border].mean() + 0.5) / (steps[~is_border].mean() + 0.5))
        ratios.append(max(found))
    return float(np.mean(ratios))


def rain(gray: np.ndarray) -> float:
    """The share of the image, 0 to 1, with thin bright streaks in one direction, at most 50 degrees from the vertical.

    The streaks are what a morphological opening by a horizontal line removes; the structure tensor gives their
    direction. Grass and fences have up to 0.2, rain 0.1 to 0.8.
    """
    smooth, width = cv2.GaussianBlur(gray, (0, 0), 0.7), 2 * max(1, round(min(gray.shape) / 170)) + 1
    bright = smooth - cv2.morphologyEx(smooth, cv2.MORPH_OPEN, np.ones((1, width), np.uint8))
    across, down = cv2.Sobel(bright, cv2.CV_32F, 1, 0), cv2.Sobel(bright, cv2.CV_32F, 0, 1)
    parts = (across**2 - down**2, 2 * across * down, across**2 + down**2)
    real, imaginary, energy = (
        np.maximum(cv2.blur(part, (8, 8))[::8, ::8], limit)
        for part, limit in zip(parts, (-np.inf, -np.inf, 0), strict=True)
    )
    coherence = np.hypot(real, imaginary) / (energy + 50)
    angle = np.rad2deg(0.5 * np.arctan2(imaginary, real))
    is_streak = (coherence > 0.5) & (energy > 150)
    return max(float((is_streak & (np.abs(angle - main) < 20)).mean()) for main in range(-45, 46, 10))


def ink(original: np.ndarray, edited: np.ndarray) -> float:
    """The share of an edited image, 0 to 1, with thin dark lines that its original does not have.

    A morphological closing removes such lines (black-hat transform). Outlined drawings have 0.01 or more.
    """
    width = 2 * max(1, round(min(original.shape[:2]) / 100)) + 1
    grays = [to_gray(image) for image in (original, edited)]
    dark = [cv2.morphologyEx(gray, cv2.MORPH_BLACKHAT, np.ones((width, width), np.uint8)) for gray in grays]
    return float(((dark[1] - dark[0] > 25) & (grays[0] - grays[1] > 25)).mean())


def veil(image: np.ndarray) -> float:
    """The dark channel of haze (He et al. 2009), in 0-255: high if no pixel of a neighbourhood is dark."""
    side = max(3, min(image.shape[:2]) // 16)
    red, green, blue = cv2.split(image)  # numpy's minimum over the channels takes 20 times as long
    darkest = cv2.min(cv2.min(red, green), blue)
    return cv2.mean(cv2.erode(darkest, np.ones((side, side), np.uint8)))[0]


def brightness(image: np.ndarray) -> float:
    """Mean luminance in 0-255."""
    return cv2.mean(to_gray(image))[0]


def colourfulness(image: np.ndarray) -> float:
    """Hasler and Süsstrunk's measure (2003): 0 for grey, about 30 for a photograph, above 100 for strong colours."""
    red, green, blue = cv2.split(image)
    first = cv2.subtract(red, green, dtype=cv2.CV_16S)
    second = cv2.subtract(
        cv2.add(red, green, dtype=cv2.CV_16S), cv2.add(blue, blue, dtype=cv2.CV_16S)
    )  # twice the paper's
    ((mean,), (deviation,)), ((other_mean,), (other_deviation,)) = map(mean_and_deviation, (first, second))
    return float(np.hypot(deviation, other_deviation / 2) + 0.3 * np.hypot(mean, other_mean / 2))


def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """(v, u) of the 64 lowest frequencies of an image except the mean, lowest first."""
    order = sorted((v + u, v, u) for v in range(16) for u in range(16) if v + u)
    return np.array([v for _, v, _ in order[:64]]), np.array([u for _, _, u in order[:64]])


FREQUENCIES = _lowest_frequencies()
BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def perceptual_hash(gray: np.ndarray) -> int:
    """64 bits: the signs of the 64 lowest frequencies of the cosine transform, after resizing to a square.

    Compression, scaling, brightness and contrast change few bits; a negative inverts all. 0 for an image without
    contrast.
    """
    small = cv2.resize(gray, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    if mean_and_deviation(small)[1][0] < MIN_CONTRAST:
        return 0
    return int(BITS[cv2.dct(small)[FREQUENCIES] > 0].sum(dtype=np.uint64))
