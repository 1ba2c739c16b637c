"""Masks of the area that an edit may change, as published datasets have them."""

import numpy as np
from PIL import Image

from utils.pixels import open_image

MASK_COLUMNS = ("mask", "mask_img", "mask_image", "MASK_IMG")


def read_mask(value: object, size: tuple[int, int]) -> np.ndarray:
    """A stored mask as bool (H, W), True where the image may be edited. size: (width, height) to resize it to.

    The area is bright, or transparent where the mask has an alpha channel, as MagicBrush's. Raises BadRow.
    """
    image = open_image(value)
    has_alpha = image.mode in ("RGBA", "LA")
    channel = image.getchannel("A") if has_alpha else image.convert("L")
    marked = np.asarray(channel.resize(size, Image.Resampling.NEAREST))
    return marked < 128 if has_alpha else marked >= 128
