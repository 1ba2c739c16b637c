"""Colours of any embedded profile -> sRGB, in which Stable Diffusion was trained and viewers without a profile show.

Profiles are found in this order: ICC profile; gAMA and cHRM of a PNG; Adobe RGB by the Exif convention of cameras
(DCF 2.0, "R03"). A damaged profile, or one of other channels than the image, counts as sRGB, as in browsers.
"""

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

PROBE_STEPS = 17  # values of each channel that decide whether a profile is sRGB
MAX_SRGB_DIFFERENCE = 2  # of 255: the profiles that are called sRGB differ by rounding
D50 = (0.9642, 1.0, 0.8249)  # white of the profile connection space, ICC.1:2010 section 7.2.16
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue, each x and y
ADOBE_RGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
ADOBE_RGB_GAMMA = 563 / 256
SRGB_GAMMA = 2.2  # a file gamma near it stands for the curve of sRGB


def find_profile(image: Image.Image) -> bytes | None:
    """The ICC profile that tells what the colours of an opened image mean; None for sRGB."""
    if icc_profile := image.info.get("icc_profile"):
        return bytes(icc_profile)
    if image.format == "PNG" and "srgb" not in image.info and {"gamma", "chromaticity"} & set(image.info):
        return _profile_of_png(image.info.get("gamma"), image.info.get("chromaticity"))
    if image.format in ("JPEG", "MPO", "TIFF") and _is_adobe_rgb(image):
        return make_profile(ADOBE_RGB_CHROMATICITIES, ADOBE_RGB_GAMMA)
    return None


def is_srgb(image: Image.Image) -> bool:
    """Whether an opened image shows the same colours without its profile."""
    profile = find_profile(image)
    mode = image.mode if image.mode in ("L", "CMYK", "LAB") else "RGB"
    return mode != "LAB" and (profile is None or _transform(profile, mode) is None)


def convert_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB, CMYK or LAB -> mode RGB in sRGB. Colours that are sRGB already stay as they are."""
    transform = None if profile is None and image.mode != "LAB" else _transform(profile, image.mode)
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=64)  # a dataset has few profiles
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a profile to sRGB; None if the profile is sRGB, damaged, or of other channels."""
    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode in ("L", "RGB"):
        probe = _probe(mode)
        changed = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if np.abs(changed - np.asarray(probe.convert("RGB"))).max() <= MAX_SRGB_DIFFERENCE:
            return None
    return transform


def _probe(mode: str) -> Image.Image:
    values = np.linspace(0, 255, PROBE_STEPS).round().astype(np.uint8)
    if mode == "L":
        return Image.fromarray(values[None])
    grid = np.stack(np.meshgrid(values, values, values, indexing="ij"), axis=-1)  # (n, n, n, 3)
    return Image.fromarray(grid.reshape(PROBE_STEPS, -1, 3))


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether Exif says Adobe RGB as cameras do: an uncalibrated colour space of the interoperability index R03."""
    try:
        exif = image.getexif()
        is_uncalibrated = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) in (2, 0xFFFF)
        return is_uncalibrated and str(exif.get_ifd(ExifTags.IFD.Interop).get(1, "")).startswith("R03")
    except Exception:  # damaged EXIF is common in photographs
        return False


def _profile_of_png(gamma: float | None, chromaticity: tuple[float, ...] | None) -> bytes | None:
    """gamma: the exponent that the encoder applied, such as 0.45455; chromaticity: white, red, green, blue."""
    decoding_gamma = SRGB_GAMMA if not gamma else 1 / gamma
    is_srgb_curve = abs(decoding_gamma / SRGB_GAMMA - 1) < 0.05
    values = chromaticity or SRGB_CHROMATICITIES
    is_srgb_gamut = np.abs(np.subtract(values, SRGB_CHROMATICITIES)).max() < 0.005
    if (is_srgb_curve and is_srgb_gamut) or not 0.1 < decoding_gamma < 10:
        return None
    return make_profile(tuple(values), None if is_srgb_curve else decoding_gamma)


@lru_cache(maxsize=64)
def make_profile(chromaticities: tuple[float, ...], gamma: float | None = None) -> bytes | None:
    """A matrix profile (ICC.1:2010) of an RGB space; None if the chromaticities span no space.

    chromaticities: x and y of white, red, green and blue; gamma: exponent from values to light, None the curve of sRGB.
    """
    white, *primaries = [np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in _pairs(chromaticities) if y > 0] or [None]
    if len(primaries) != 3 or np.linalg.matrix_rank(np.stack(primaries)) < 3:
        return None
    matrix = np.stack(primaries, axis=1)
    matrix = matrix * np.linalg.solve(matrix, white)  # columns: XYZ of full red, green, blue
    scale = np.diag(BRADFORD @ np.array(D50) / (BRADFORD @ white))
    red, green, blue = (np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix).T
    curve = _curve(gamma)
    tags = {b"wtpt": _xyz(D50), b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4xI", start + len(body), 0x04300000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += b"".join(map(_fixed, D50))
    return header.ljust(128, b"\0") + table + body


def _pairs(values: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(float(value) * 65536))


def _xyz(values: tuple[float, ...] | np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _curve(gamma: float | None) -> bytes:
    """A parametric curve: type 0 a power, type 3 that of sRGB (IEC 61966-2-1)."""
    values = (gamma,) if gamma else (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(4) + struct.pack(">HH", 0 if gamma else 3, 0) + b"".join(map(_fixed, values))
