"""The same resizing, cropping and mirroring for both images of a pair."""

from __future__ import annotations  # a method returns its own class

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.pixels import BadRow, decode, peek_size

RESIZE_MODES = ("crop", "squash", "bucket")
MAX_ASPECT_DIFFERENCE = 0.02
# Words that are wrong after mirroring both images.
DIRECTION = re.compile(r"\b((left|right)(most|wards?|hand|handed)?|(counter|anti)?-?clockwise)\b", re.IGNORECASE)

Size = tuple[int, int]  # always (h, w)


@dataclass(frozen=True)
class Geometry:
    """How a pair is resized and cropped to the training size, and whether it may be mirrored."""

    resolution: int
    resize_mode: str = "crop"
    center_crop: bool = False
    random_flip: bool = False
    max_aspect_difference: float = MAX_ASPECT_DIFFERENCE

    def __post_init__(self) -> None:
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"--resize_mode is {self.resize_mode!r}; use one of {', '.join(RESIZE_MODES)}")
        if self.resolution < 8:
            raise ValueError(f"--resolution is {self.resolution}; it must be at least 8")
        if not 0 <= self.max_aspect_difference < math.inf:
            raise ValueError(f"--max_aspect_difference is {self.max_aspect_difference}; it must be 0 or more")


class DecodedPair(NamedTuple):
    """Both images of a pair, and the size (h, w) of the stored original image."""

    images: tuple[Image.Image, Image.Image]
    original_size: Size


def held_out_geometry(geometry: Geometry) -> Geometry:
    """Of held-out rows: crops are centred, nothing is mirrored, and no bucket changes the order of the rows."""
    mode = "crop" if geometry.resize_mode == "bucket" else geometry.resize_mode
    return replace(geometry, resize_mode=mode, center_crop=True, random_flip=False)


@dataclass(frozen=True)
class PreparedPair:
    """Both images at training size, and the sizes and crop for SDXL's time ids."""

    original: np.ndarray  # (3, H, W) uint8
    edited: np.ndarray  # (3, H, W) uint8
    original_size: Size  # of the stored original image
    crop_top_left: tuple[int, int]  # (y, x) in the resized image, after mirroring
    target_size: Size  # (H, W)
    is_flipped: bool
    spare_width: int = 0  # of the resized image, beside the crop

    def mirrored(self) -> PreparedPair:
        """The same crop of the mirrored images."""
        original, edited = (np.ascontiguousarray(pixels[:, :, ::-1]) for pixels in (self.original, self.edited))
        top, left = self.crop_top_left
        crop, is_flipped = (top, self.spare_width - left), not self.is_flipped
        return replace(self, original=original, edited=edited, crop_top_left=crop, is_flipped=is_flipped)


def mentions_direction(prompt: str) -> bool:
    """Whether the prompt mentions left, right or a direction of rotation: then the pair must not be mirrored."""
    return DIRECTION.search(prompt) is not None


def is_mirrored(geometry: Geometry, u_flip: float, prompt: str) -> bool:
    """Whether a pair is mirrored under `random_flip`: half of those that may be, by the uniform draw `u_flip`."""
    return geometry.random_flip and u_flip < 0.5 and not mentions_direction(prompt)


def make_buckets(resolution: int) -> list[Size]:
    """Training sizes (h, w) of about resolution² pixels, from 1:2.5 to 2.5:1, in multiples of 64 (or less)."""
    step = next((step for step in (64, 32, 16) if resolution >= 4 * step), 8)
    square = resolution // 8 * 8
    buckets = {(square, square)}
    for short in range(step, resolution + 1, step):
        # At most as many pixels as the square, to need no more memory.
        long = resolution * resolution // short // step * step
        if long <= 2.5 * short:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets)


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket with the aspect ratio nearest to that of `size`; the larger one of two."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]))


def bucket_of(original: object, geometry: Geometry) -> Size | None:
    """The bucket of a stored original image, from its header; None in other modes. Raises BadRow."""
    is_bucket = geometry.resize_mode == "bucket"
    return nearest_bucket(peek_size(original), make_buckets(geometry.resolution)) if is_bucket else None


def prepare_pair(
    original: object,
    edited: object,
    geometry: Geometry,
    u_crop: tuple[float, float] = (0.5, 0.5),
    u_flip: float = 1.0,
    prompt: str = "",
    bucket: Size | None = None,
) -> PreparedPair:
    """Two stored images (anything `decode_image` accepts) -> the pair at training size.

    u_crop (y, x), u_flip: uniform draws in [0, 1). bucket: the training size (h, w) in the mode "bucket", by default
    the nearest one. Raises BadRow.
    """
    pair = crop_pair(decode_pair(original, edited, geometry, bucket), geometry, u_crop, bucket)
    return pair.mirrored() if is_mirrored(geometry, u_flip, prompt) else pair


def decode_pair(original: object, edited: object, geometry: Geometry, bucket: Size | None = None) -> DecodedPair:
    """Two stored images, decoded at about the size that `crop_pair` needs. Raises BadRow."""
    needed_side = max(bucket) if bucket else geometry.resolution * (2 if geometry.resize_mode == "bucket" else 1)
    images, stored_sizes = [], []
    for name, value in (("original image", original), ("edited image", edited)):
        try:
            decoded = decode(value, shorter_side=needed_side, is_tight=True)
            image, size = decoded.rgb, decoded.stored_size
        except BadRow as error:
            raise BadRow(f"{name}: {error.reason}") from error
        images.append(image)
        stored_sizes.append(size)
    if geometry.resize_mode != "squash":  # which gives both images the same shape
        check_aspects(*stored_sizes, geometry.max_aspect_difference)
    return DecodedPair(tuple(images), stored_sizes[0])


def crop_pair(
    decoded: DecodedPair, geometry: Geometry, u_crop: tuple[float, float] = (0.5, 0.5), bucket: Size | None = None
) -> PreparedPair:
    """The pair at training size. u_crop (y, x): the position of the crop in [0, 1), for a random one."""
    images, original_size = decoded
    resized, target = _sizes(original_size, geometry, bucket)
    u_crop = (0.5, 0.5) if geometry.center_crop else u_crop
    top, left = (min(int(u * (r - t + 1)), r - t) for u, r, t in zip(u_crop, resized, target, strict=True))
    pixels = [_resize_and_crop(image, resized, (top, left), target) for image in images]
    original_pixels, edited_pixels = (np.ascontiguousarray(array.transpose(2, 0, 1)) for array in pixels)
    spare = resized[1] - target[1]
    return PreparedPair(original_pixels, edited_pixels, original_size, (top, left), target, False, spare)


def check_aspects(original_size: Size, edited_size: Size, max_difference: float = MAX_ASPECT_DIFFERENCE) -> None:
    """Raise BadRow for two images whose aspect ratios differ too much to show the same view.

    max_difference: 0.02 allows that one is up to 2 % wider than the other.
    """
    ratio = (original_size[0] / original_size[1]) / (edited_size[0] / edited_size[1])
    if max(ratio, 1 / ratio) > 1 + max_difference:
        sizes = " and ".join(f"{width}x{height}" for height, width in (original_size, edited_size))
        raise BadRow(
            f"the aspect ratios of the two images differ by more than {100 * max_difference:.3g}% ({sizes}): crop them "
            "alike, raise --max_aspect_difference, or train with --resize_mode squash"
        )


def _sizes(size: Size, geometry: Geometry, bucket: Size | None) -> tuple[Size, Size]:
    """(size that the whole image is resized to, size of the crop)."""
    target = (geometry.resolution, geometry.resolution)
    if geometry.resize_mode == "squash":
        return target, target
    if geometry.resize_mode == "bucket":
        target = bucket or nearest_bucket(size, make_buckets(geometry.resolution))
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = tuple(max(round(side * scale), least) for side, least in zip(size, target, strict=True))
    return resized, target


def _resize_and_crop(image: Image.Image, resized: Size, top_left: tuple[int, int], target: Size) -> np.ndarray:
    """Resize to `resized` and crop `target` at `top_left` -> (H, W, 3) uint8.

    In one step, which resamples only the crop. `image` may have another size than the stored original: an edited image
    of another size, or a JPEG decoded at a reduced size.
    """
    y_scale, x_scale = image.height / resized[0], image.width / resized[1]
    (top, left), (height, width) = top_left, target
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding may exceed the edge
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))
