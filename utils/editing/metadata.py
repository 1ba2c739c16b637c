"""What an edit keeps of its input's metadata with `--keep_metadata`: when and where it was taken, with what, by whom.

Everything else stays behind: previews show the unedited photograph, and orientation, sizes and colour profile are those
of the input. By default an edit keeps nothing, because a place is private.
"""

from PIL import ExifTags, Image

from utils.pixels import BadRow, open_image

TAGS = {ExifTags.Base[name] for name in ("Make", "Model", "DateTime", "Artist", "Copyright")}
NAMES = ("DateTimeOriginal", "DateTimeDigitized", "OffsetTime", "OffsetTimeOriginal", "OffsetTimeDigitized")
NAMES += ("SubsecTime", "SubsecTimeOriginal", "SubsecTimeDigitized", "LensModel", "ExposureTime", "FNumber")
NAMES += ("ISOSpeedRatings", "FocalLength")
EXIF_TAGS = {ExifTags.Base[name] for name in NAMES}


def kept_metadata(content: bytes) -> Image.Exif | None:
    """The date, place, camera and author of an image file; None if it has none or its EXIF is damaged."""
    try:
        source = open_image(content)
        source.load()  # a PNG may store EXIF after its pixels
        exif = source.getexif()
        kept = Image.Exif()
        for tag in TAGS & set(exif):
            kept[tag] = exif[tag]
        for block, allowed in ((ExifTags.IFD.Exif, EXIF_TAGS), (ExifTags.IFD.GPSInfo, None)):
            values = {tag: value for tag, value in exif.get_ifd(block).items() if allowed is None or tag in allowed}
            if values:
                kept.get_ifd(block).update(values)
        kept.tobytes()
    except (BadRow, OSError, ValueError, TypeError, KeyError, SyntaxError, AttributeError):
        return None
    return kept if len(kept) or any(map(kept.get_ifd, (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo))) else None
