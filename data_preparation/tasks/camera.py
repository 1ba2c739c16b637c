"""What a camera does to a picture: noise, shake, defocus, softness, too little light, JPEG, no colour.

Each function is uint8 RGB (H, W, 3), clean -> (degraded, of the same type and size; the parameters that were drawn).
"""

from __future__ import annotations

import cv2
import numpy as np

from data_preparation.tasks.light import add_sensor_noise, pixel_scale, to_encoded, to_linear
from data_preparation.tasks.ranges import Choice, Range, Ranges, Whole, draw

DENOISE: Ranges = {
    "kind": Choice(
        {"sensor": 0.7, "gaussian": 0.3}, "noise of a sensor, in linear light; or the same everywhere, encoded"
    ),
    "photons": Range(20, 2000, "sensor: photons that make a pixel white; fewer, more shot noise", is_log=True),
    "read_noise": Range(0.002, 0.02, "sensor: standard deviation of the read noise, of white"),
    "sigma": Range(5, 50, "gaussian: standard deviation, of 255"),
}
DEBLUR: Ranges = {
    "kind": Choice({"shake": 0.5, "linear": 0.2, "defocus": 0.3}, "hand that shook, straight motion, or lens"),
    "length": Range(7, 31, "shake and linear: extent of the path, pixels at 512"),
    "angle": Range(0, 180, "shake and linear: direction, degrees"),
    "radius": Range(2, 8, "defocus: of the disc, pixels at 512"),
}
SHARPEN: Ranges = {"sigma": Range(0.8, 2.5, "standard deviation of the Gaussian, in linear light, pixels")}
LOW_LIGHT: Ranges = {
    "gain": Range(0.05, 0.4, "share of the light that is left", is_log=True),
    "photons": Range(300, 5000, "photons that would make a pixel white", is_log=True),
    "read_noise": Range(0.0005, 0.003, "standard deviation of the read noise, of white"),
    "warmth": Range(-0.12, 0.12, "colour cast: red's gain more, blue's gain less by this share"),
}
JPEG: Ranges = {"quality": Whole(5, 40, "of the JPEG file")}


def identity(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Nothing, for instructions that ask for nothing."""
    return image.copy(), {}


def colorize(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Colour lost: Rec. 601 luma in all channels, as grey files have it."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), {}


def denoise(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Noise of a sensor at high ISO, or the Gaussian noise of papers."""
    parameters = draw(DENOISE, rng, "kind")
    if parameters["kind"] == "sensor":
        parameters |= draw(DENOISE, rng, "photons", "read_noise")
        noisy = add_sensor_noise(to_linear(image), parameters["photons"], parameters["read_noise"], rng)
        return to_encoded(noisy), parameters
    parameters |= draw(DENOISE, rng, "sigma")
    noisy = image + np.float32(parameters["sigma"]) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8), parameters


def low_light(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Too short an exposure: less light, hence noisier, with the colour cast of a lamp."""
    parameters = draw(LOW_LIGHT, rng)
    cast = np.array([1 + parameters["warmth"], 1, 1 - parameters["warmth"]], np.float32)
    dark = to_linear(image) * (np.float32(parameters["gain"]) * cast)
    return to_encoded(add_sensor_noise(dark, parameters["photons"], parameters["read_noise"], rng)), parameters


def jpeg(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Blocks, ringing and coarse colour of a JPEG file of low quality."""
    parameters = draw(JPEG, rng)
    return through_jpeg(image, parameters["quality"]), parameters


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Write the picture as JPEG (colour at half resolution, as most programs do) and read it again."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def sharpen(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Softness: a slight Gaussian blur. In pixels at any size, because sharpness is judged pixel by pixel."""
    parameters = draw(SHARPEN, rng)
    return to_encoded(cv2.GaussianBlur(to_linear(image), (0, 0), parameters["sigma"])), parameters


def deblur(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """One exposure while the camera moved, or with the lens out of focus: a sum of light, hence in linear light."""
    parameters, scale = draw(DEBLUR, rng, "kind"), pixel_scale(image, smallest=256)
    if parameters["kind"] == "defocus":
        parameters |= draw(DEBLUR, rng, "radius")
        kernel = disc_kernel(parameters["radius"] * scale)
    else:
        parameters |= draw(DEBLUR, rng, "length", "angle")
        path = shake_path(rng) if parameters["kind"] == "shake" else np.linspace([-0.5, 0], [0.5, 0], 200)
        kernel = path_kernel(path, parameters["length"] * scale, parameters["angle"])
    return to_encoded(cv2.filter2D(to_linear(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101)), parameters


def disc_kernel(radius: float) -> np.ndarray:
    """(K, K) float32 of sum 1: the image of a point out of focus, with a soft edge one pixel wide."""
    reach = int(np.ceil(radius))
    steps = np.arange(-reach, reach + 1)
    kernel = np.clip(radius + 0.5 - np.hypot(steps[:, None], steps[None]), 0, 1).astype(np.float32)
    return kernel / kernel.sum()


def shake_path(rng: np.random.Generator) -> np.ndarray:
    """(400, 2) points (x, y) of a hand's shake, longest along x: it wanders, sometimes jerks, at uneven speed."""
    turns = rng.standard_normal(400) * 0.06 + (rng.random(400) < 0.006) * rng.uniform(-2, 2, 400)
    speed = np.exp(np.cumsum(rng.standard_normal(400)) * 0.06)
    heading = np.cumsum(turns)
    points = np.cumsum(speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    _, axes = np.linalg.eigh(np.cov(points.T))
    return (points - points.mean(axis=0)) @ axes[:, ::-1]


def path_kernel(path: np.ndarray, extent: float, angle: float) -> np.ndarray:
    """(K, K) float32 of sum 1: a point's trace while the camera goes along `path`, (N, 2) points evenly spaced in time.

    extent: of the path along x, in pixels; angle: degrees by which it is turned. Centred on its mean, so that the
    picture stays where it was.
    """
    points = (path - path.mean(axis=0)) * (extent / np.ptp(path[:, 0]))
    turn = np.deg2rad(angle)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    reach = int(np.ceil(np.abs(points).max())) + 1
    corner = np.floor(points).astype(int)
    share_x, share_y = (points - corner).T
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    # Each point goes to its four neighbours, by how near they are.
    for step_y, part_y in ((0, 1 - share_y), (1, share_y)):
        for step_x, part_x in ((0, 1 - share_x), (1, share_x)):
            np.add.at(kernel, (corner[:, 1] + reach + step_y, corner[:, 0] + reach + step_x), part_y * part_x)
    return (kernel / kernel.sum()).astype(np.float32)
