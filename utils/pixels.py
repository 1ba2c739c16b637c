"""Decodes one stored image of a dataset row, in any form, to an upright RGB image; `BadRow` says why that fails.

Images that a user names on the command line are read by image_sources.py.
"""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 178_956_970  # twice Pillow's limit for a warning: above this, Pillow refuses to open a file
MIN_SIDE = 8  # one latent pixel of Stable Diffusion
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


class BadRow(Exception):
    """A row that cannot be used. `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(value: object, *, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a stored image to an upright RGB image, with alpha composited on white.

    value: a dict with "bytes" and "path" (an undecoded `datasets.Image`), bytes, a path or a PIL image.
    shorter_side: allows decoding a JPEG at a reduced size, whose shorter side is at least twice this many pixels.
    Raises BadRow.
    """
    return decode_image_and_size(value, shorter_side=shorter_side, max_pixels=max_pixels)[0]


def decode_image_and_size(
    value: object, *, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """Like `decode_image`, and also the size (h, w) of the stored image, upright. Raises BadRow."""
    try:
        image = _open(value)
        _check_size(image, max_pixels)
        stored_size = image.size
        if shorter_side is not None and image.format in ("JPEG", "MPO") and image is not value:
            factor = 2 * shorter_side / min(stored_size)
            image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        image.load()
        orientation = _orientation(image)  # after loading: a PNG may store EXIF after its pixels, Pillow rotates a TIFF
        if image.format == "TIFF":
            stored_size = image.size
        method = TRANSPOSE_BY_ORIENTATION.get(orientation)
        image = image if method is None else image.transpose(method)
        return _to_rgb(image), _upright_size(stored_size, orientation)
    except BadRow:
        raise
    except Exception as error:  # on damaged bytes, Pillow raises anything from SyntaxError to struct.error
        raise BadRow(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def peek_size(value: object) -> tuple[int, int]:
    """The upright size (h, w) of a stored image, read from its header. Raises BadRow."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
    if isinstance(path, (str, Path)) and Path(path).is_file():
        with Path(path).open("rb") as file:  # does not read the whole file, unlike `read_image_file`
            return peek_size(file)
    try:
        image = _open(value)
        _check_size(image, MAX_PIXELS)
        # A TIFF's size is already upright; for a PNG, `getexif` would decode all pixels to find EXIF after them.
        has_no_exif = image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info)
        if image.format == "TIFF" or has_no_exif:
            return image.height, image.width
        return _upright_size(image.size, _orientation(image))
    except BadRow:
        raise
    except Exception as error:  # as in decode_image_and_size
        raise BadRow(f"cannot be opened: {str(error) or type(error).__name__}") from error


def _open(value: object) -> Image.Image:
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise BadRow("no image")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, Path)):
        value = read_image_file(str(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 0:
            raise BadRow("empty file (0 bytes)")
        value = io.BytesIO(value)
    elif not hasattr(value, "read"):
        raise BadRow(f"not an image but {type(value).__name__}")
    try:
        return Image.open(value)
    except Image.UnidentifiedImageError:
        raise BadRow("not an image in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise BadRow(f"too large: {error}") from None


def read_image_file(path: str) -> bytes:
    """The bytes of a file, or of a streamed file such as "hf://…". Raises BadRow if it does not exist, and OSError."""
    if "://" in path:  # "hf://…", "zip://…::…"
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BadRow(f"no such file: {path}") from None


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        # White, as in a browser; dropping alpha would show the hidden colours of transparent pixels.
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale, scaled to 8 bits: Pillow's `convert` would clip it at 255."""
    values = np.asarray(image).astype(np.float64)  # (h, w)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise BadRow(f"values of mode {image.mode} outside 0..65535")
    if image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257
    elif image.mode == "F" and values.max() <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
