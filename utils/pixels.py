"""Decodes one stored image, in any form, to an upright RGB image in sRGB; `BadRow` says why that fails.

Images that a user names on the command line are read by image_sources.py.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.colour_profiles import convert_to_srgb, find_profile
from utils.image_formats import (
    ANIMATED_FORMATS,
    CAMERA_RAW,
    PILLOW_HEIF_MISSING,
    is_camera_raw,
    is_heif,
    name_refused,
    open_allowed,
    register_heif,
)
from utils.stored_images import BadRow, decode_base64, read_image_file, unpack_image_value

MAX_PIXELS = 178_956_970  # twice Pillow's limit for a warning: above this, Pillow refuses to open a file
MIN_SIDE = 8  # one latent pixel of Stable Diffusion
SNIFFED_BYTES = 512
ORIENTATION_TAG = 0x0112
TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns at half of our limit, without naming the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Decoded:
    """An upright image in sRGB. rgb: mode RGB, alpha composited on the background; alpha: mode L, None if opaque;
    stored_size: (h, w) upright, before a reduced decoding."""

    rgb: Image.Image
    alpha: Image.Image | None
    stored_size: tuple[int, int]


@dataclass(frozen=True)
class Animation:
    """The frames of an image. frames: mode RGB; alphas: mode L or None; durations: milliseconds; loop: 0 is endless.

    loop is None where the format stores none. A still image has one frame of duration 0.
    """

    frames: list[Image.Image]
    alphas: list[Image.Image | None]
    durations: list[int]
    loop: int | None


def decode_image(value: object, *, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a stored image to an upright RGB image in sRGB, with alpha composited on white; of an animation, frame 1.

    value: a dict with "bytes" and "path" (an undecoded `datasets.Image`), bytes, a path, base64 text, a PIL image, or a
    list of one of these.
    shorter_side: allows decoding a JPEG at a reduced size, whose shorter side is at least twice this many pixels.
    Raises BadRow.
    """
    return decode(value, shorter_side=shorter_side, max_pixels=max_pixels).rgb


def decode(
    value: object,
    *,
    shorter_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    background: str = "white",
    is_tight: bool = False,
) -> Decoded:
    """Like `decode_image`, with alpha, any background (a CSS colour) and the stored size. Raises BadRow.

    is_tight: the reduced size of a JPEG may be `shorter_side` itself. At half or a quarter of the stored size, that is
    nearer to Lanczos interpolation of all pixels than bilinear interpolation is. An eighth must be twice as large.
    """
    with _damage_is_a_bad_row():
        image = open_image(value)
        _check_size(image, max_pixels)
        if _start_frames(image):
            image.seek(1)
        stored_size = image.size
        if shorter_side is not None and image.format in ("JPEG", "MPO") and image is not value:
            factor = shorter_side / min(stored_size)
            factor *= 1 if is_tight and factor > 1 / 8 else 2
            image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        image.load()
        orientation = _orientation(image)  # after loading: a PNG may store EXIF after its pixels, Pillow rotates a TIFF
        if image.format == "TIFF":
            stored_size = image.size
        rgb, alpha = _to_rgb_and_alpha(image, orientation, background)
        return Decoded(rgb, alpha, _upright_size(stored_size, orientation))


def decode_animation(
    value: object, *, max_frames: int = 1000, max_pixels: int = MAX_PIXELS, background: str = "white"
) -> Animation:
    """All frames of a GIF, WebP, APNG, AVIF or multi-page TIFF; one frame of any other image. Raises BadRow."""
    with _damage_is_a_bad_row():
        image = open_image(value)
        _check_size(image, max_pixels)
        first, count = _start_frames(image), num_frames(image)
        if count > max_frames:
            raise BadRow(f"{count} frames, at most {max_frames} are decoded")
        frames, alphas, durations = [], [], []
        for number in range(first, first + count):
            if image.format in ANIMATED_FORMATS and first + count > 1:
                image.seek(number)
            image.load()
            rgb, alpha = _to_rgb_and_alpha(image, _orientation(image), background)
            frames.append(rgb)
            alphas.append(alpha)
            durations.append(round(image.info.get("duration", 0) or 0))
        return Animation(frames, alphas, durations, image.info.get("loop") if count > 1 else None)


def num_frames(value: object) -> int:
    """The number of frames of an animation or pages of a TIFF; 1 for any other image. Raises BadRow."""
    with _damage_is_a_bad_row():
        image = open_image(value)
        if image.format not in ANIMATED_FORMATS:
            return 1
        return max(1, getattr(image, "n_frames", 1) - _start_frames(image))


def _start_frames(image: Image.Image) -> int:
    """1 for an APNG whose first image is a replacement for viewers without animation, else 0."""
    has_replacement = image.format == "PNG" and image.info.get("default_image") and getattr(image, "n_frames", 1) > 1
    return int(bool(has_replacement))


@contextmanager
def _damage_is_a_bad_row() -> Iterator[None]:
    """On damaged bytes, Pillow raises anything from SyntaxError to struct.error: raise BadRow instead."""
    try:
        yield
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow(f"too large: {error}") from None
    except Exception as error:
        raise BadRow(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def peek_size(value: object, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The upright size (h, w) of a stored image, read from its header. Raises BadRow, also above `max_pixels`."""
    path = unpack_image_value(value)
    if isinstance(path, (str, Path)) and Path(path).is_file():
        with Path(path).open("rb") as file:  # does not read the whole file, unlike `read_image_file`
            return peek_size(file, max_pixels=max_pixels)
    with _damage_is_a_bad_row():
        image = open_image(value)
        _check_size(image, max_pixels)
        # A TIFF's size is already upright; for a PNG, `getexif` would decode all pixels to find EXIF after them.
        has_no_exif = image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info)
        if image.format == "TIFF" or has_no_exif:
            return image.height, image.width
        return _upright_size(image.size, _orientation(image))


def open_image(value: object) -> Image.Image:
    """Open a stored image, without decoding its pixels. Only formats of image_formats.py. Raises BadRow."""
    value = unpack_image_value(value)
    if value is None:
        raise BadRow("no image")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, Path)):
        value = decode_base64(str(value)) or read_image_file(str(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = io.BytesIO(value)
    elif not hasattr(value, "read"):
        raise BadRow(f"not an image but {type(value).__name__}")
    start = value.read(SNIFFED_BYTES)
    value.seek(0)
    if not start:
        raise BadRow("empty file (0 bytes)")
    if is_heif(start) and not register_heif():
        raise BadRow(PILLOW_HEIF_MISSING)
    try:
        image = open_allowed(value)
    except Image.UnidentifiedImageError:
        raise BadRow(name_refused(start)) from None
    except Image.DecompressionBombError as error:
        raise BadRow(f"too large: {error}") from None
    if is_camera_raw(image):
        raise BadRow(CAMERA_RAW)
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadRow(f"too small: {width}x{height} pixels, each side must have at least {MIN_SIDE}")
    if width * height > max_pixels:
        raise BadRow(f"too large: {width}x{height} pixels, at most {max_pixels:,} are decoded")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Damaged EXIF is common in photographs: it counts as upright."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1


def _upright_size(stored_size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Pillow's (width, height) -> upright (h, w)."""
    width, height = stored_size
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _to_rgb_and_alpha(image: Image.Image, orientation: int, background: str) -> tuple[Image.Image, Image.Image | None]:
    """A loaded image -> upright in sRGB: mode RGB with alpha composited, and the alpha of mode L or None."""
    profile = find_profile(image)
    method = TRANSPOSE_BY_ORIENTATION.get(orientation)
    image = image if method is None else image.transpose(method)
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        is_grey = image.mode in ("1", "L", "LA", "La")
        alpha, image = rgba.getchannel("A"), rgba.getchannel("R") if is_grey else rgba.convert("RGB")
    elif image.mode.startswith("I") or image.mode == "F":
        image = _wide_grey_to_8_bits(image)
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = convert_to_srgb(image, profile)
    if alpha is None or alpha.getextrema()[0] == 255:
        return image, None
    rgba = Image.merge("RGBA", (*image.split(), alpha))
    # Dropping alpha would show the hidden colours of transparent pixels.
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB"), alpha


def _wide_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale, scaled to 8 bits: Pillow's `convert` would clip it at 255."""
    values = np.asarray(image).astype(np.float64)  # (h, w)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise BadRow(f"values of mode {image.mode} outside 0..65535")
    if image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257
    elif image.mode == "F" and values.max() <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).astype(np.uint8))
