"""What cameras and image files do to a photograph: noise, blur, low light, lost colour, JPEG, low resolution.

Each degradation maps a clean uint8 RGB image (H, W, 3) to (degraded image of the same type and size, the parameters
that were drawn). All sizes hold for an image whose shorter side is 512 pixels and are scaled to others, so that a
photograph looks equally degraded at 256, 512 and 1024 pixels.
"""

import cv2
import numpy as np

from data_preparation.tasks.kernels import anisotropic_kernel, disc_kernel, path_kernel, shake_path, sinc_kernel
from data_preparation.tasks.primitives import Choice, IntegerRange, Range, draw, pixel_scale, to_encoded, to_linear

DENOISE = {
    "kind": Choice(
        {"sensor": 0.7, "gaussian": 0.3}, "sensor noise in linear light, or uniform noise in encoded values"
    ),
    "photons": Range(12, 500, "sensor: photons at white per pixel at 512; fewer give more shot noise", is_log=True),
    "read_noise": Range(0.004, 0.03, "sensor: standard deviation of the read noise at 512, relative to white"),
    "sigma": Range(10, 60, "gaussian: standard deviation at 512, of 255"),
}
DEBLUR = {
    "kind": Choice({"shake": 0.5, "linear": 0.2, "defocus": 0.3}, "camera shake, straight motion, or defocus"),
    "length": Range(14, 31, "shake and linear: length of the path, pixels at 512"),
    "angle": Range(0, 180, "shake and linear: direction, degrees"),
    "radius": Range(4.5, 9, "defocus: radius of the disc, pixels at 512"),
}
SHARPEN = {"sigma": Range(1.5, 2.2, "standard deviation of the Gaussian blur in linear light, pixels at 512")}
LOW_LIGHT = {
    "gain": Range(0.05, 0.4, "share of the light that is left", is_log=True),
    "photons": Range(200, 3000, "photons at white per pixel at 512", is_log=True),
    "read_noise": Range(0.0005, 0.004, "standard deviation of the read noise at 512, relative to white"),
    "warmth": Range(-0.12, 0.12, "colour cast: gain of red more, of blue less, by this share"),
}
JPEG = {"quality": IntegerRange(5, 40, "quality of the JPEG file at 512; its quantization steps scale with the side")}
_WAYS = {"area": 1 / 3, "linear": 1 / 3, "cubic": 1 / 3}
_INTERPOLATION = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
_NOISES = {"gaussian": 0.5, "poisson": 0.5}
_BLURS = {"gaussian": 0.9, "sinc": 0.1}
SUPER_RESOLVE = {
    "shrink": Range(3, 5, "an image at 512 is reduced to 1/shrink of its sides, then enlarged again"),
    "blur_1": Choice(_BLURS, "first blur; sinc rings like a low-pass filter"),
    "sigma_1": Range(0.2, 3, "first blur: standard deviation along its wide axis, pixels at 512"),
    "aspect_1": Range(0.5, 1, "first blur: narrow axis / wide axis"),
    "cutoff_1": Range(1.05, 3.14, "first blur, sinc: highest frequency that passes, radians per pixel at 512"),
    "resize_1": Range(0.15, 1.5, "first resize: factor of the sides"),
    "way_1": Choice(_WAYS, "first resize: interpolation"),
    "noise_1": Choice(_NOISES, "first noise"),
    "gaussian_1": Range(1, 8, "first noise: standard deviation, of 255"),
    "poisson_1": Range(0.05, 0.8, "first noise: relative to that of 256 photons at white"),
    "quality_1": IntegerRange(30, 95, "first JPEG"),
    "blur_2": Choice(_BLURS, "second blur, if applied"),
    "sigma_2": Range(0.2, 1.5, "second blur: as in the first"),
    "aspect_2": Range(0.5, 1, "second blur: as in the first"),
    "cutoff_2": Range(1.05, 3.14, "second blur, sinc: as in the first"),
    "resize_2": Range(0.3, 1.2, "second resize: factor of the sides at 1/shrink"),
    "way_2": Choice(_WAYS, "second resize: interpolation"),
    "noise_2": Choice(_NOISES, "second noise"),
    "gaussian_2": Range(1, 6, "second noise: as in the first"),
    "poisson_2": Range(0.05, 0.6, "second noise: as in the first"),
    "quality_2": IntegerRange(30, 95, "second JPEG"),
}
SECOND_BLUR_SHARE = 0.8  # probability of the second blur
GREY_NOISE_SHARE = 0.4  # probability that the noise is the same in all channels
SMALLEST_SIDE = 256  # smaller images are degraded as if they had this shorter side, or nothing would be seen
SMALLEST = 1 / 5  # factor of the sides below which no intermediate image is reduced, so that content remains


def identity(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """No change, for instructions that ask for none."""
    return image.copy(), {}


def colorize(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Remove colour: Rec. 601 luma in all three channels, as in grey image files."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), {}


def denoise(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Add the noise of a sensor at high ISO, or the Gaussian noise common in papers."""
    parameters = draw(DENOISE, rng, "kind")
    scale = pixel_scale(image, smallest=SMALLEST_SIDE)
    if parameters["kind"] == "sensor":
        parameters |= draw(DENOISE, rng, "photons", "read_noise")
        noisy = add_sensor_noise(to_linear(image), parameters["photons"], parameters["read_noise"], rng, scale)
        return to_encoded(noisy), parameters
    parameters |= draw(DENOISE, rng, "sigma")
    noisy = image + np.float32(parameters["sigma"]) * make_grain(image.shape, scale, rng)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8), parameters


def make_grain(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Float32 noise of `shape` (H, W[, 3]) that looks like noise of deviation 1 in each pixel of an image at 512.

    scale: `pixel_scale`. A smaller image averages the noise of several pixels; a larger one shows enlarged grain.
    """
    if scale <= 1:
        return np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)
    height, width = (int(np.ceil(side / scale)) for side in shape[:2])
    grain = rng.standard_normal((height, width, *shape[2:]), dtype=np.float32)
    return cv2.resize(grain, shape[1::-1], interpolation=cv2.INTER_CUBIC)


def add_sensor_noise(
    linear: np.ndarray, photons: float, read_noise: float, rng: np.random.Generator, scale: float = 1.0
) -> np.ndarray:
    """Add shot noise (Poisson variance, with `photons` at white) and read noise (standard deviation).

    The Poisson distribution is approximated by a normal one: where noise is visible, they differ by less than 8 bits
    resolve. scale: of `make_grain`.
    """
    deviation = np.sqrt(np.maximum(linear, 0) / np.float32(photons) + np.float32(read_noise**2))
    return linear + deviation * make_grain(linear.shape, scale, rng)


def low_light(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Underexpose: less light, therefore more noise, and the colour cast of a lamp."""
    parameters = draw(LOW_LIGHT, rng)
    cast = np.array([1 + parameters["warmth"], 1, 1 - parameters["warmth"]], np.float32)
    dark = to_linear(image) * (np.float32(parameters["gain"]) * cast)
    scale = pixel_scale(image, smallest=SMALLEST_SIDE)
    return to_encoded(add_sensor_noise(dark, parameters["photons"], parameters["read_noise"], rng, scale)), parameters


def sharpen(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Apply a slight Gaussian blur, weaker than that of `deblur`."""
    parameters = draw(SHARPEN, rng)
    sigma = parameters["sigma"] * pixel_scale(image, smallest=SMALLEST_SIDE)
    return to_encoded(cv2.GaussianBlur(to_linear(image), (0, 0), sigma)), parameters


def deblur(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Blur by camera motion or defocus during one exposure, which adds up light: in linear light."""
    parameters, scale = draw(DEBLUR, rng, "kind"), pixel_scale(image, smallest=SMALLEST_SIDE)
    if parameters["kind"] == "defocus":
        parameters |= draw(DEBLUR, rng, "radius")
        kernel = disc_kernel(parameters["radius"] * scale)
    else:
        parameters |= draw(DEBLUR, rng, "length", "angle")
        path = shake_path(rng) if parameters["kind"] == "shake" else np.linspace([-0.5, 0], [0.5, 0], 200)
        kernel = path_kernel(path, parameters["length"] * scale, parameters["angle"])
    return to_encoded(cv2.filter2D(to_linear(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101)), parameters


def jpeg(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Compress as JPEG of low quality: blocks, ringing and coarse colour."""
    parameters = draw(JPEG, rng)
    return compress_jpeg(image, scale_quality(parameters["quality"], pixel_scale(image, SMALLEST_SIDE))), parameters


def scale_quality(quality: int, scale: float) -> int:
    """The quality (1 to 100) of a file with quantization steps `scale` times those of `quality`.

    The blocks of a small image cover more of it; finer steps make up for that. The formula is libjpeg's.
    """
    step = (5000 / quality if quality < 50 else 200 - 2 * quality) * scale
    return max(1, round(5000 / step if step > 100 else 100 - step / 2))


def compress_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Encode the image as JPEG (4:2:0, as most programs do) and decode it again."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def super_resolve(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Remove detail as in images 3 to 5 times smaller: the second-order degradation of Real-ESRGAN.

    The image is blurred, reduced, made noisy and compressed, twice, and then enlarged to its own size (Wang et al.
    2021, section 3). All of this happens at 512 pixels, whatever the size of the image. Unlike Real-ESRGAN, the noise
    has a quarter of the strength, because noise has a task of its own here, and no intermediate image is smaller than
    SMALLEST.
    """
    scale = pixel_scale(image, smallest=SMALLEST_SIDE)
    width, height = (side / scale for side in image.shape[1::-1])
    parameters = draw(SUPER_RESOLVE, rng, "shrink")
    small = (width / parameters["shrink"], height / parameters["shrink"])
    result = _resize(image, (width, height), "cubic" if scale < 1 else "area")
    result = _degrade_once(result, (width, height), 1, SMALLEST, parameters, rng)
    result = _degrade_once(result, small, 2, SMALLEST * parameters["shrink"], parameters, rng)
    result = _resize(result, small, "cubic")
    # The shrunk image may be larger than a small image, whose pixels must then be averages.
    return _resize(result, image.shape[1::-1], "area" if small[0] > image.shape[1] else "cubic"), parameters


def _degrade_once(
    image: np.ndarray,
    size: tuple[float, float],
    stage: int,
    smallest: float,
    parameters: dict,
    rng: np.random.Generator,
) -> np.ndarray:
    """Blur, resize to a factor (at least `smallest`) of `size` (width, height), add noise and compress.

    stage: 1 or 2. The drawn values are added to `parameters`.
    """

    def draw_stage(*names: str) -> list:
        values = draw(SUPER_RESOLVE, rng, *(f"{name}_{stage}" for name in names))
        parameters.update(values)
        return [values[f"{name}_{stage}"] for name in names]

    if stage == 1 or rng.random() < SECOND_BLUR_SHARE:
        if draw_stage("blur")[0] == "sinc":
            kernel = sinc_kernel(*draw_stage("cutoff"))
        else:
            kernel = anisotropic_kernel(*draw_stage("sigma", "aspect"), angle=rng.uniform(0, np.pi))
        image = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    resize, way = draw_stage("resize", "way")
    image = _resize(image, (size[0] * max(resize, smallest), size[1] * max(resize, smallest)), way)
    values = image.astype(np.float32)
    if draw_stage("noise")[0] == "gaussian":
        deviation = np.float32(draw_stage("gaussian")[0])
    else:
        deviation = np.float32(draw_stage("poisson")[0]) * np.sqrt(values * (255 / 256))
    channels = 1 if rng.random() < GREY_NOISE_SHARE else 3
    values += deviation * rng.standard_normal((*image.shape[:2], channels), dtype=np.float32)
    return compress_jpeg(np.clip(values + 0.5, 0, 255).astype(np.uint8), draw_stage("quality")[0])


def _resize(image: np.ndarray, size: tuple[float, float], way: str) -> np.ndarray:
    width, height = (max(8, round(side)) for side in size)
    # As in Real-ESRGAN, linear and cubic do not antialias, which leaves the jagged edges of careless programs.
    return cv2.resize(image, (width, height), interpolation=_INTERPOLATION[way])
