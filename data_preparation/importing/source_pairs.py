"""From the pairs of any source to rows: which files are stored unchanged, re-encoded or rejected."""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image

from data_preparation.generation.pair_rows import encode_image, make_pair, pair_features
from data_preparation.generation.runner import GeneratedRows, GenerateRows
from data_preparation.photographs import seeded_rng
from utils.colour_profiles import is_srgb
from utils.data.columns import usable_prompts
from utils.data.geometry import Size, check_aspects
from utils.masks import read_mask
from utils.pixels import ORIENTATION_TAG, decode_image, num_frames, open_image
from utils.stored_images import BadRow, read_image_file

logger = logging.getLogger(__name__)

MAY_BE_ANIMATED = (b"GIF8", b"RIFF", b"\x89PNG", b"II*\0", b"MM\0*")
_num_animated = 0  # reported by this process
MAX_LOGGED = 5  # rejected items that a worker logs; all of them are counted
UNCHANGED_FORMATS = ("JPEG", "PNG", "WEBP")
UNCHANGED_MODES = ("RGB", "L", "P")  # programs decode alpha, CMYK and 16 bits differently
CARTOONIZER_SIDE, CARTOONIZER_MULTIPLE = 720, 8


@dataclass(frozen=True)
class SourcePair:
    """One pair as its source stores it, not decoded yet.

    original, edited: bytes, a path, or a dict with "bytes" and "path". prompts: one or several, of which one is drawn.
    provenance: further keywords of `make_pair`. is_cartoonized: the edited image was resized, see
    `cartoonized_size`. mask: a stored mask of the area to be edited (`masks.read_mask`).
    """

    original: Any
    edited: Any
    prompts: str | Sequence[str] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    is_cartoonized: bool = False
    mask: Any = None


PairOrError = SourcePair | BadRow
ReadPairs = Callable[[Sequence[int]], Iterable[tuple[int, PairOrError]]]  # items -> (item, pair or error)


class PairSource(Protocol):
    """Where pairs come from: picklable values. An item gives any number of pairs or errors."""

    num_items: int

    def open(self) -> ReadPairs:
        """Called once per worker."""

    def identity(self) -> dict[str, Any]:
        """JSON values that determine the pairs, without the location of the source."""


def read_each(items: Sequence[int], pairs_of: Callable[[int], Iterable[PairOrError]]) -> Iterator:
    """A `ReadPairs` for sources that read one item at a time. pairs_of: may raise BadRow."""
    for item in items:
        try:
            yield from ((item, pair) for pair in pairs_of(item))
        except BadRow as error:
            yield item, error


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def clean_prompts(value: str | Sequence[Any] | None) -> list[str]:
    """The different prompts that are not blank, stripped."""
    return list(dict.fromkeys(prompt.strip() for prompt in usable_prompts(value)))


@dataclass(frozen=True)
class ImportedPairs:
    """The row generator of import_pairs.py.

    all_prompts: one row per instruction instead of one drawn. is_shuffled: in an order drawn from the seed, so that the
    first items are a random sample. provenance: keywords of `make_pair` for every row.
    """

    source: PairSource
    seed: int = 0
    image_format: str = "png"
    all_prompts: bool = False
    is_shuffled: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return self.source.num_items

    def features(self) -> datasets.Features:
        return pair_features(self._has_mask)

    @property
    def _has_mask(self) -> bool:
        return getattr(self.source, "mask", None) is not None

    def open(self, rank: int) -> GenerateRows:
        read, order, num_logged = self.source.open(), None, 0
        if self.is_shuffled:
            # num_items is not the index of any item, so no item draws the same numbers.
            order = seeded_rng(self.seed, self.num_items).permutation(self.num_items).tolist()

        def generate(items: range) -> GeneratedRows:
            nonlocal num_logged
            rows, rejected = [], Counter()
            rngs: dict[int, np.random.Generator] = {}  # one per item, also of an item with several pairs
            for item, pair in read(items if order is None else [order[item] for item in items]):
                if item not in rngs:
                    rngs[item] = seeded_rng(self.seed, item)
                try:
                    rows += self._rows_of(pair, rngs[item])
                except BadRow as error:
                    rejected[error.kind] += 1
                    num_logged += 1
                    if num_logged <= MAX_LOGGED:
                        name = getattr(pair, "provenance", {}).get("source") or f"item {item}"
                        logger.warning("rejected %s: %s", name, error.reason)
            return GeneratedRows(rows, dict(rejected))

        return generate

    def _rows_of(self, pair: PairOrError, rng: np.random.Generator) -> list[dict]:
        if isinstance(pair, BadRow):
            raise pair
        prompts = clean_prompts(pair.prompts)
        if not self.all_prompts and len(prompts) > 1:
            prompts = [prompts[rng.integers(len(prompts))]]
        if not prompts:
            raise BadRow("no instruction")
        original, edited = stored_images(pair, self.image_format)
        known = self.provenance | {name: value for name, value in pair.provenance.items() if value is not None}
        mask = {"mask": stored_mask(pair.mask, original)} if self._has_mask else {}
        return [make_pair(original, prompt, edited, **known) | mask for prompt in prompts]


def stored_mask(value: Any, original: bytes) -> dict | None:
    """A mask as a black and white PNG of the size of the stored original image; None for none, or a damaged one."""
    if not value:
        return None
    try:
        mask = read_mask(_read(value), decode_image(original).size)
    except BadRow:
        return None
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def stored_images(pair: SourcePair, image_format: str) -> tuple[bytes, bytes]:
    """The files to store for both images, unchanged where possible. Raises BadRow."""
    original_bytes, original = read_and_decode("original image", pair.original)
    edited_bytes, edited = read_and_decode("edited image", pair.edited)
    if pair.is_cartoonized:
        aligned = resize_like_cartoon(original, edited.size[::-1])
        original_bytes = original_bytes if aligned is original else None
        original = aligned
    check_aspects(original.size[::-1], edited.size[::-1])
    return stored_image(original_bytes, original, image_format), stored_image(edited_bytes, edited, image_format)


def stored_image(content: bytes | None, image: Image.Image, image_format: str) -> bytes:
    """The file to store: `content` if all programs decode it to `image`, otherwise the image encoded again."""
    is_kept = content is not None and _can_store_unchanged(content)
    return content if is_kept else encode_image(image, image_format)


def cartoonized_size(size: Size) -> tuple[Size, Size]:
    """(size after resizing, size of the top left crop) of a photograph that was cartoonized; (h, w) each.

    instruction-tuning-sd/cartoonization used White-box Cartoonization, whose `resize_crop` reduces the shorter side to
    720 and crops both sides to multiples of 8. The original images of the dataset have not been resized.
    """
    height, width = size
    if min(height, width) > CARTOONIZER_SIDE:
        height, width = (CARTOONIZER_SIDE * side // min(size) for side in size)
    return (height, width), tuple(side // CARTOONIZER_MULTIPLE * CARTOONIZER_MULTIPLE for side in (height, width))


def resize_like_cartoon(original: Image.Image, edited_size: Size) -> Image.Image:
    """The photograph resized and cropped like its cartoon; unchanged if the sizes do not say that it was cropped.

    The photograph is resized, not the cartoon, because the target should keep its pixels.
    """
    (height, width), cropped = cartoonized_size((original.height, original.width))
    if cropped != edited_size or edited_size == (original.height, original.width):
        return original
    box = (0, 0, cropped[1] * original.width / width, cropped[0] * original.height / height)
    return original.resize(cropped[::-1], Image.Resampling.LANCZOS, box=box)


def read_and_decode(what: str, value: Any) -> tuple[bytes | None, Image.Image]:
    """(content of the file or None, upright RGB image). what: for the BadRow."""
    try:
        content = _read(value)
        image = decode_image(content)
        if isinstance(content, bytes) and content.startswith(MAY_BE_ANIMATED) and (count := num_frames(content)) > 1:
            _report_animation(what, value, count)
        return content if isinstance(content, bytes) else None, image
    except BadRow as error:
        raise BadRow(f"{what}: {error.reason}") from error


def _report_animation(what: str, value: Any, count: int) -> None:
    """Of each worker the first ones are named; check_dataset.py counts all."""
    global _num_animated
    _num_animated += 1
    if _num_animated <= MAX_LOGGED:
        name = Path(value).name if isinstance(value, (str, Path)) else "an image"
        logger.warning("%s: %s has %d frames or pages, of which the first is imported", what, name, count)
    if _num_animated == MAX_LOGGED:
        logger.warning("further animations are not named: check_dataset.py --report_dir counts and lists the source's")


def _read(value: Any) -> Any:
    """The bytes of a file; values that are not files are returned unchanged."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, (str, Path)):
        return value
    try:
        return read_image_file(str(value))
    except (OSError, ValueError) as error:  # ValueError: of a damaged archive
        raise BadRow(f"cannot be read: {error}") from None


def _can_store_unchanged(content: bytes) -> bool:
    """Whether all programs decode an image file to the same pixels: upright, a single frame, no alpha, sRGB."""
    image = open_image(content)
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF is common in photographs, and means upright (utils/pixels.py)
        orientation = 1
    is_single = getattr(image, "n_frames", 1) == 1
    is_plain = image.format in UNCHANGED_FORMATS and image.mode in UNCHANGED_MODES and not image.has_transparency_data
    return is_plain and is_single and orientation in (0, 1) and is_srgb(image)
