"""What is measured on the two pictures of a pair: likeness, shift, noise, sharpness, colour, a hash. Plain numbers out.

Pictures are uint8 RGB (H, W, 3) in 0-255; `gray` is float32 (H, W) in 0-255.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

HASH_SIDE = 32
MIN_MATCHED = 24  # pixels of a side below which too little is left to compare
REACH = 2  # pixels around the peak of a phase correlation
MAX_CLIMB = 4
AROUND = 4  # pixels
MIN_CONTRAST = 4.0  # standard deviation of a gray picture below which there is nothing to recognise


class Shift(NamedTuple):
    """How far the edited picture lies from the original, in pixels: to the right (x) and down (y)."""

    x: int
    y: int
    likeness: float  # of the edges after moving it back, -1 to 1
    gain: float = 0.0  # of that likeness by moving it back: the least of each half of the picture
    distinct: float = 0.0  # how much less likeness there is `AROUND` pixels to any side

    @property
    def length(self) -> float:
        return float(np.hypot(self.x, self.y))


def to_gray(image: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> float32 luminance (H, W) in 0-255."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite where they are equal."""
    error = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def largest_local_change(one: np.ndarray, other: np.ndarray, tiles: int = 16) -> float:
    """The largest mean change of a tile, in 0-255: small where only the compression differs, whatever was edited."""
    difference = one.astype(np.float32) - other.astype(np.float32)
    return float(np.abs(cv2.resize(difference, (tiles, tiles), interpolation=cv2.INTER_AREA)).max())


def edge_map(gray: np.ndarray) -> np.ndarray:
    """Strength of the edges, float32 (H, W), of mean 0 and deviation 1: alike for a photograph, its negative, its
    night and its drawing. Strong edges are cut down to common ones, so that no single one decides."""
    smooth = cv2.GaussianBlur(gray, (0, 0), 1.0) - cv2.GaussianBlur(gray, (0, 0), 6.0)  # without the light's gradient
    strength = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    strength = np.sqrt(strength / (strength.mean() + 1e-6))
    strength = np.minimum(strength, 2.5)
    return (strength - strength.mean()) / (strength.std() + 1e-6)


def find_shift(original: np.ndarray, edited: np.ndarray) -> Shift:
    """The shift between two gray pictures of one size, by phase correlation of their edges.

    Phase correlation always answers; `gain` says whether the answer explains the pictures better than no shift. Its
    peak is up to two pixels off between pictures of different style, so the best place near it is looked for.
    """
    edges = [edge_map(gray) for gray in (original, edited)]
    here = _likeness_at(*edges, 0, 0)
    best = Shift(0, 0, here)
    if min(original.shape) < MIN_MATCHED:
        return best
    for factor in (1, 2):  # at half size, fine texture, which an edit may have replaced, has no say
        for x, y in {_phase_peak(*edges, factor)} - {(0, 0)}:
            likeness, x, y = _climb(*edges, x, y)
            if likeness > best.likeness:
                best = Shift(x, y, likeness)
    return best if (best.x, best.y) == (0, 0) else _judge(*edges, best)


def _judge(one: np.ndarray, other: np.ndarray, shift: Shift) -> Shift:
    """The shift with `gain` and `distinct`: a single object that moved, or an edge along which nothing tells one place
    from another, must not pass for a shift of the picture."""
    x, y = shift.x, shift.y
    height, width = one.shape
    halves = np.s_[: height // 2, :], np.s_[height // 2 :, :], np.s_[:, : width // 2], np.s_[:, width // 2 :]
    gains = [_likeness_at(one, other, x, y, half) - _likeness_at(one, other, 0, 0, half) for half in halves]
    sides = [(x + AROUND, y), (x - AROUND, y), (x, y + AROUND), (x, y - AROUND)]
    return shift._replace(gain=min(gains), distinct=shift.likeness - max(_likeness_at(one, other, *at) for at in sides))


def _overlap(one: np.ndarray, other: np.ndarray, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """What two maps share once the second is moved back by (x, y) pixels."""
    height, width = one.shape
    first = one[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
    second = other[max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)]
    return first, second


def _likeness_at(one: np.ndarray, other: np.ndarray, x: int, y: int, part: tuple = np.s_[:, :]) -> float:
    """Correlation (-1 to 1) of two maps in a part of what they share once the second is moved back by (x, y) pixels."""
    first, second = (image[part] for image in _overlap(one, other, x, y))
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).mean() / (first.std() * second.std() + 1e-6))


def _phase_peak(one: np.ndarray, other: np.ndarray, factor: int) -> tuple[int, int]:
    """(x, y) in pixels, from pictures that are `factor` times smaller."""
    if factor > 1:
        size = (one.shape[1] // factor, one.shape[0] // factor)
        one, other = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (one, other))
    window = cv2.createHanningWindow(one.shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(one, other, window)
    return round(x * factor), round(y * factor)


def _climb(one: np.ndarray, other: np.ndarray, x: int, y: int) -> tuple[float, int, int]:
    """(likeness, x, y) of the best place near (x, y), going on where it lies at the border of what was looked at."""
    height, width = one.shape
    best = -1.0
    for _ in range(MAX_CLIMB):
        if abs(x) > width // 3 or abs(y) > height // 3:
            break
        around = _likeness_around(one, other, x, y, REACH)
        row, column = np.unravel_index(int(around.argmax()), around.shape)
        if around[row, column] <= best:
            break
        best, x, y = float(around[row, column]), x + int(column) - REACH, y + int(row) - REACH
        if 0 < row < 2 * REACH and 0 < column < 2 * REACH:
            break
    return best, x, y


def _likeness_around(one: np.ndarray, other: np.ndarray, x: int, y: int, reach: int) -> np.ndarray:
    """Correlation (-1 to 1) of two maps where they overlap once the second is moved back by (x, y) pixels and up to
    `reach` more or less: (2 reach + 1, 2 reach + 1), the first column and row for the smallest shift."""
    first, second = _overlap(one, other, x, y)
    # What is moved is the first, hence the other way round.
    inside = first[reach : first.shape[0] - reach, reach : first.shape[1] - reach]
    return cv2.matchTemplate(second, inside, cv2.TM_CCOEFF_NORMED)


def noise_level(gray: np.ndarray) -> float:
    """Deviation of the noise in 0-255: the median of what a second difference finds, which flat areas decide."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(cv2.filter2D(gray, cv2.CV_32F, kernel)[1:-1, 1:-1]))) / (6 * 0.6745)


def sharpness(gray: np.ndarray) -> float:
    """Energy of the finest details against that of all edges: falls with any blur, whatever the contrast."""
    edges = cv2.magnitude(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
    return float(np.abs(cv2.Laplacian(gray, cv2.CV_32F)).mean() / (edges.mean() + 1.0))


def blockiness(gray: np.ndarray) -> float:
    """How much larger the steps across the borders of JPEG's 8x8 blocks are than within them; 1 is none."""
    ratios = []
    for steps in (np.abs(np.diff(gray, axis=1)).mean(0), np.abs(np.diff(gray, axis=0)).mean(1)):
        is_border = np.arange(len(steps)) % 8 == 7
        ratios.append((steps[is_border].mean() + 0.5) / (steps[~is_border].mean() + 0.5))
    return float(np.mean(ratios))


def veil(image: np.ndarray) -> float:
    """The dark channel of haze (He et al. 2009), in 0-255: high where no pixel of a neighbourhood is dark."""
    side = max(3, min(image.shape[:2]) // 16)
    return float(cv2.erode(image.min(axis=2), np.ones((side, side), np.uint8)).mean())


def brightness(image: np.ndarray) -> float:
    """Mean luminance in 0-255."""
    return float(to_gray(image).mean())


def colourfulness(image: np.ndarray) -> float:
    """Hasler and Süsstrunk's measure (2003): 0 for greys, about 30 for a photograph, above 100 for paint."""
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    first, second = red - green, (red + green) / 2 - blue
    deviation = np.hypot(first.std(), second.std())
    return float(deviation + 0.3 * np.hypot(first.mean(), second.mean()))


def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """(v, u) of the 64 lowest frequencies of a picture but its mean, lowest first."""
    order = sorted((v + u, v, u) for v in range(16) for u in range(16) if v + u)
    return np.array([v for _, v, _ in order[:64]]), np.array([u for _, _, u in order[:64]])


FREQUENCIES = _lowest_frequencies()
BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def perceptual_hash(gray: np.ndarray) -> int:
    """64 bits: the signs of the 64 lowest frequencies of the picture's cosine transform, squashed to a square.

    Compression, scaling, brightness and contrast change few bits; a negative has them all inverted. 0 for a picture
    without contrast.
    """
    small = cv2.resize(gray, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    if small.std() < MIN_CONTRAST:
        return 0
    return int(BITS[cv2.dct(small)[FREQUENCIES] > 0].sum(dtype=np.uint64))
