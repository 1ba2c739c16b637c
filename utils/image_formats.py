"""Which image formats are read, and what other files are called, so that a refusal names them."""

import re
from functools import cache
from pathlib import Path

# Importing a plugin registers it; Image.init() would import every format.
from PIL import AvifImagePlugin, Image, Jpeg2KImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401

# Everything else that Pillow knows is refused: EPS starts Ghostscript. "JPEG" also opens an MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
HEIF = "HEIF"
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # an MPO's other images are views of one photograph
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", *HEIF_SUFFIXES),
)
PILLOW_HEIF_MISSING = "a HEIC image, which needs pillow-heif: run pip install pillow-heif"
CAMERA_RAW = "a camera's raw file: export it as JPEG, PNG or TIFF"

# The beginnings of files that are often named like images; the first that fits names the file.
_KNOWN_FILES = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS or PostScript file: export it as PNG"),
    (rb"%PDF", "a PDF: export its pages as PNG"),
    (rb"8BPS", "a Photoshop file: export it as PNG"),
    (rb"gimp xcf", "a GIMP file: export it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image: convert it to PNG or JPEG"),
    (rb"(?s).{4}ftypcrx|FUJIFILMCCD-RAW|IIRO|IIU\0|(II\*\0|MM\0\*).{4}CR", CAMERA_RAW),
    (rb"(?s).{4}ftyp(hei|hev|mif1|msf1)", "a HEIC image"),
    (rb"(?s).{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "not an image but a video: save its frames as PNG or JPEG"),
    (rb"version https://git-lfs", "a Git LFS pointer and not the image: run git lfs pull"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "not an image but an archive: unpack it"),
    (
        rb"(?is)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg",
        "an SVG: export it as PNG",
    ),
    (rb"(?is)(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<body)", "not an image but a web page: its download failed"),
    (rb"(?s)\s*[{\[]", "not an image but JSON text"),
)


def open_allowed(content: object) -> Image.Image:
    """Open a file object by the formats of the list. Raises Image.UnidentifiedImageError for all others."""
    formats = (*FORMATS, HEIF) if HEIF in Image.OPEN else FORMATS
    return Image.open(content, formats=formats)


@cache
def register_heif() -> bool:
    """Let Pillow read HEIC; False if pillow-heif is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def is_heif(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a HEIC image."""
    return re.match(_KNOWN_FILES[6][0], start) is not None


def name_refused(start: bytes) -> str:
    """What a file is whose first bytes are `start`, if it is not an image of the list."""
    if is_heif(start) and not register_heif():
        return PILLOW_HEIF_MISSING
    found = next((name for pattern, name in _KNOWN_FILES if re.match(pattern, start)), None)
    return found or f"not an image in a format that is read ({', '.join(FORMATS)}, HEIC)"


def is_camera_raw(image: Image.Image) -> bool:
    """Whether an opened TIFF is a camera's raw file (DNG, NEF, ARW, ...), of which Pillow reads only a thumbnail."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2
    is_dng, is_thumbnail, is_mosaic = 50706 in tags, tags.get(254) == 1, tags.get(262) in (32803, 34892)
    return is_dng or is_thumbnail or is_mosaic


def has_image_suffix(path: str | Path) -> bool:
    return Path(path).suffix.lower() in IMAGE_SUFFIXES
