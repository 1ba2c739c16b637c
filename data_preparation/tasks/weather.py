"""What weather does to a photograph: haze, falling rain, and raindrops on the glass in front of the lens.

Each degradation maps a clean uint8 RGB image (H, W, 3) to (degraded image of the same type and size, the parameters
that were drawn). All of them work in linear light. Sizes hold for an image whose shorter side is 512 pixels and are
scaled to others.
"""

import cv2
import numpy as np

from data_preparation.tasks.primitives import IntegerRange, Range, draw, pixel_scale, to_encoded, to_linear

DEHAZE = {
    "beta": Range(0.6, 1.8, "scattering: t = exp(-beta * depth), with a depth of 0.2 to 1"),
    "airlight": Range(0.7, 1.0, "light of the haze, relative to white, linear"),
    "tint": Range(-0.04, 0.04, "colour of the haze: blue more, red less by this share"),
}
DERAIN = {
    "slant": Range(-30, 30, "angle between the streaks and the vertical, degrees"),
    "length": Range(28, 60, "length of the nearest streaks, pixels at 512; the farthest have a third of it"),
    "streaks": IntegerRange(700, 4000, "number of streaks of all sizes in a square image"),
    "strength": Range(0.35, 0.85, "share of the light behind the brightest streaks that they replace"),
    "veil": Range(0.0, 0.3, "share of the light that rain too far away to show streaks hides, at the farthest"),
    "airlight": Range(0.55, 0.9, "light of the streaks and the veil, relative to white, linear"),
}
# Far, middle, near: length, width and strength relative to the nearest streaks, and share of all streaks.
_LAYERS = ((0.35, 0.3, 0.4, 0.75), (0.6, 0.55, 0.7, 0.2), (1.0, 1.0, 1.0, 0.05))
_BRIGHTNESSES = (0.45, 0.7, 1.0)
_SHIFT = 4  # cv2 accepts coordinates in 1/16 of a pixel
RAINDROP = {
    "drops": IntegerRange(20, 80, "number of drops of all sizes in a square image"),
    "radius": Range(16, 36, "radius of the largest drops, pixels at 512; most are small"),
    "reach": Range(0.25, 0.45, "how far away the rim of the largest drop looks, relative to the shorter side"),
    "unsharpness": Range(1.2, 3.5, "standard deviation of the blur of the drops' edges, pixels at 512"),
    "shade": Range(0.1, 0.35, "share of the light lost at the rim"),
}
DropMaps = tuple[np.ndarray, np.ndarray, np.ndarray]  # cover, shift, shine: see `drop_maps`
_SMALLEST_DROP = 0.18  # radius of the smallest drop, relative to the largest
_REFRACTION_SHRINK = 6  # a drop shows much of the scene on few pixels: it samples an image this much smaller, at 512


def dehaze(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Add haze by Koschmieder's law: I = J t + A (1 - t), t = exp(-beta d), with a pseudo-depth d."""
    parameters = draw(DEHAZE, rng)
    airlight = parameters["airlight"] * np.array([1 - parameters["tint"], 1, 1 + parameters["tint"]])
    transmission = np.exp(-parameters["beta"] * pseudo_depth(image, rng))
    return to_encoded(add_haze(to_linear(image), transmission, airlight)), parameters


def add_haze(linear: np.ndarray, transmission: np.ndarray, airlight: np.ndarray) -> np.ndarray:
    """linear (H, W, 3), transmission (H, W) in 0-1, airlight (3,) -> (H, W, 3) float32."""
    airlight = np.asarray(airlight, np.float32)
    return airlight + (linear - airlight) * transmission[..., None]


def smooth_field(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in 0-1: smooth noise with about `cells` hills per side."""
    grid = rng.random((cells + 2, cells + 2), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def pseudo_depth(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 in 0.2-1: a guess of the distance of each pixel (1: farthest), smooth except at image edges.

    The top of the image counts as far, and so do pale areas such as the sky (dark channel, He et al. 2009); a smooth
    random field is added. A fast guided filter (He and Sun 2015) then aligns the guess with the outlines.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, 192 / min(height, width))
    small_size = (max(8, round(width * shrink)), max(8, round(height * shrink)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    rows = np.linspace(1, 0, small_size[1], dtype=np.float32)[:, None] ** 1.3
    pale = cv2.blur(cv2.erode(small.min(axis=2), np.ones((7, 7), np.uint8)), (9, 9))
    guess = 0.55 * rows + 0.45 * pale + 0.35 * smooth_field(small_size[1], small_size[0], 3, rng)
    guide, radius = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (25, 25)
    mean_guide, mean_guess = cv2.blur(guide, radius), cv2.blur(guess, radius)
    covariance = cv2.blur(guide * guess, radius) - mean_guide * mean_guess
    slope = covariance / (cv2.blur(guide * guide, radius) - mean_guide**2 + 4e-3)
    offset = mean_guess - slope * mean_guide
    slope, offset = (cv2.resize(cv2.blur(part, radius), (width, height)) for part in (slope, offset))
    depth = slope * (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255) + offset
    low, high = float(depth.min()), float(depth.max())
    return 0.2 + (depth - low) * np.float32(0.8 / max(high - low, 1e-6))


def derain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Add rain: streaks at three distances, of uneven density, in front of a veil that thickens with depth."""
    parameters, (height, width) = draw(DERAIN, rng), image.shape[:2]
    airlight = np.full(3, parameters["airlight"], np.float32)
    veil = 1 - np.float32(parameters["veil"]) * pseudo_depth(image, rng)
    streaks = rain_streaks(height, width, pixel_scale(image, smallest=128), parameters, rng)
    streaks *= 0.6 + 0.4 * smooth_field(height, width, 4, rng)
    return to_encoded(add_haze(add_haze(to_linear(image), veil, airlight), 1 - streaks, airlight)), parameters


def rain_streaks(height: int, width: int, scale: float, parameters: dict, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in 0-1: the share of the light that the streaks replace.

    They are drawn at 512 pixels, whatever the `scale` of the image, because no line can be thinner than a pixel.
    """
    drawn_height, drawn_width = round(height / scale), round(width / scale)
    total = np.zeros((drawn_height, drawn_width), np.float32)
    num_streaks = parameters["streaks"] * max(height, width) / min(height, width)
    for length, thickness, strength, share in _LAYERS:
        layer = np.zeros(total.shape, np.uint8)
        for brightness in _BRIGHTNESSES:
            count = max(1, round(num_streaks * share / len(_BRIGHTNESSES)))
            size = length * parameters["length"]
            lines = _random_lines(drawn_height, drawn_width, size, parameters["slant"], count, rng)
            _draw_lines(layer, lines, 255 * brightness, max(1, round(1.2 * thickness)))
        # Nearer streaks are more out of focus; the blur also tapers their ends.
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.45, 0.8 * thickness))
        total += layer * np.float32(strength * parameters["strength"] / 255)
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.clip(cv2.resize(total, (width, height), interpolation=way), 0, 1)


def _random_lines(
    height: int, width: int, length: float, slant: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """(count, 2, 2) end points (x, y) of streaks in and around the image, of varying length and slant."""
    middle = rng.uniform([-length, -length], [width + length, height + length], (count, 2))
    angle = np.deg2rad(slant + rng.normal(0, 1.5, count))
    half = 0.5 * length * rng.uniform(0.5, 1, count)[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.stack([middle - half, middle + half], axis=1)


def _draw_lines(layer: np.ndarray, lines: np.ndarray, brightness: float, thickness: int) -> None:
    """Draw (N, 2, 2) lines into the uint8 layer, each with a faint outer part and a bright core."""
    middle = lines.mean(axis=1, keepdims=True)
    for part, share in ((1.0, 0.55), (0.6, 1.0)):
        points = np.round((middle + part * (lines - middle)) * 2**_SHIFT).astype(np.int32)
        cv2.polylines(layer, list(points), False, round(brightness * share), thickness, cv2.LINE_AA, _SHIFT)


def raindrop(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Add raindrops on glass: each is a small, unsharp lens that shows the scene upside down."""
    parameters, scale = draw(RAINDROP, rng), pixel_scale(image)
    linear = to_linear(image)
    cover, shift, shine = drop_maps(image.shape[:2], scale, parameters, rng)
    sigma = max(0.5, parameters["unsharpness"] * scale)
    cover, shine = (cv2.GaussianBlur(part, (0, 0), sigma) for part in (cover, shine))
    seen = _refract(linear, shift, max(2, round(_REFRACTION_SHRINK * scale)))
    # Little light arrives at the rim, at a steep angle: a drop is darkest where its cover ends.
    rim = np.clip(cover * (1 - cover) * 4, 0, 1) * np.float32(parameters["shade"])
    seen = seen * (1 - rim[..., None]) + (shine * np.float32(max(0.25, linear.max())))[..., None]
    return to_encoded(linear + (seen - linear) * cover[..., None]), parameters


def _refract(linear: np.ndarray, shift: np.ndarray, shrink: int) -> np.ndarray:
    """(H, W, 3), shifts (H, W, 2) of (x, y) in pixels -> (H, W, 3): what the drops show, slightly blurred."""
    height, width = linear.shape[:2]
    size = (width // shrink, height // shrink)
    small = cv2.GaussianBlur(cv2.resize(linear, size, interpolation=cv2.INTER_AREA), (0, 0), 1.5)
    columns = (np.arange(width, dtype=np.float32)[None] + shift[..., 0]) * np.float32(size[0] / width)
    rows = (np.arange(height, dtype=np.float32)[:, None] + shift[..., 1]) * np.float32(size[1] / height)
    return cv2.remap(small, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def drop_maps(size: tuple[int, int], scale: float, parameters: dict, rng: np.random.Generator) -> DropMaps:
    """For `size` (height, width): cover (H, W) in 0-1, shift (H, W, 2) in pixels, shine (H, W) in 0-1."""
    height, width = size
    cover, shine = np.zeros(size, np.float32), np.zeros(size, np.float32)
    shift = np.zeros((*size, 2), np.float32)
    count = round(parameters["drops"] * max(size) / min(size))
    # Most drops are small; the large ones come last and absorb the drops they touch.
    shares = np.sort(_SMALLEST_DROP + (1 - _SMALLEST_DROP) * rng.random(count) ** 2.5)
    centres = rng.uniform([0, 0], [width, height], (count, 2))
    for share, centre in zip(shares, centres, strict=True):
        reach = parameters["reach"] * np.sqrt(share)  # a small drop has too few pixels to show as much of the scene
        _add_drop((cover, shift, shine), centre, share * parameters["radius"] * scale, reach, rng)
    return cover, shift, shine


def _add_drop(maps: DropMaps, centre: np.ndarray, radius: float, reach: float, rng: np.random.Generator) -> None:
    """Add one drop to the maps, in place: an uneven disc that is heavier at the bottom."""
    cover, shift, shine = maps
    height, width = cover.shape
    stretch, waves, phases = rng.uniform(0.95, 1.35), rng.uniform(0, 0.09, 3), rng.uniform(0, 2 * np.pi, 3)
    extent = 1.6 * radius * stretch + 2
    left, right = max(0, int(centre[0] - extent)), min(width, int(centre[0] + extent) + 1)
    top, bottom = max(0, int(centre[1] - extent)), min(height, int(centre[1] + extent) + 1)
    x = (np.arange(left, right, dtype=np.float32)[None] - np.float32(centre[0])) / np.float32(radius)
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[1])) / np.float32(radius * stretch)
    angle = np.arctan2(y, x)
    terms = enumerate(zip(waves, phases, strict=True), start=2)
    outline = 1 + sum(wave * np.sin(n * angle + phase) for n, (wave, phase) in terms)
    distance = np.hypot(x * (1 - 0.12 * y), y) / outline
    inside = np.clip((1 - distance) * np.float32(radius) + 0.5, 0, 1).astype(np.float32)
    window = np.s_[top:bottom, left:right]
    # A lens of short focal length turns the scene around its centre, more strongly towards the rim.
    turned = np.float32(-reach * min(cover.shape)) * (0.6 + 0.4 * distance**2)
    is_inside = inside > 0
    for axis, offset in enumerate((x, y)):
        shift[window][..., axis] = np.where(is_inside, turned * offset - offset * radius, shift[window][..., axis])
    gleam = np.exp(-(((x + 0.38) / 0.16) ** 2 + ((y + 0.42) / 0.1) ** 2)) * 0.6
    shine[window] = np.where(is_inside, gleam * inside, shine[window])
    cover[window] = np.maximum(cover[window], inside)
