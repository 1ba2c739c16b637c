"""From a pair as a source gives it to a row: what is kept as it is stored, what is made over, what is rejected."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image

from data_preparation.generation.pair_rows import encode_image, make_pair, pair_features
from data_preparation.generation.runner import GeneratedRows, GenerateRows
from data_preparation.photographs import seeded_rng
from utils.data.geometry import Size, check_aspects
from utils.pixels import ORIENTATION_TAG, BadRow, decode_image

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # rejected items that a worker names; all are counted
KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
KEPT_MODES = ("RGB", "L", "P")  # no alpha, CMYK or 16 bits, of which other programs make other colours than ours
CARTOONIZER_SIDE, CARTOONIZER_MULTIPLE = 720, 8


@dataclass(frozen=True)
class Found:
    """One pair as a source gives it; its pictures are not looked at yet.

    original, edited: what `utils.pixels` takes: bytes, a path, or a dict with "bytes" and "path".
    prompts: ways to ask for the edit, of which one is drawn. provenance: further keywords of `make_pair`.
    is_cartoonized: the edited picture has been through the resizing of `cartoonized_size`.
    """

    original: Any
    edited: Any
    prompts: Sequence[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    is_cartoonized: bool = False


Reader = Callable[[Sequence[int]], Iterable[tuple[int, Found | BadRow]]]  # item numbers -> (number, pair) each


class Source(Protocol):
    """Where pairs come from: plain, picklable values. An item gives any number of pairs, a bad one its reason."""

    num_items: int

    def open(self) -> Reader:
        """Once per worker."""

    def identity(self) -> dict[str, Any]:
        """What decides its pairs, as JSON, without the place that it stands at."""


@dataclass(frozen=True)
class PairRecipe:
    """A source as a recipe of `making.production`.

    all_prompts: one row for each way to ask, in the place of one drawn. is_shuffled: items in an order drawn by the
    seed, so that the first of them stand for all. provenance: keywords of `make_pair` for every row.
    """

    source: Source
    seed: int = 0
    image_format: str = "png"
    all_prompts: bool = False
    is_shuffled: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return self.source.num_items

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> GenerateRows:
        return _PairMaker(self)


class _PairMaker:
    """Items -> rows; the first rejected ones are named in the log, all are counted."""

    def __init__(self, recipe: PairRecipe) -> None:
        self._recipe, self._read, self._num_named, self._order = recipe, recipe.source.open(), 0, None
        if recipe.is_shuffled:
            # No item has this number, and so no draw of an item is drawn again here.
            self._order = seeded_rng(recipe.seed, recipe.num_items).permutation(recipe.num_items).tolist()

    def __call__(self, items: range) -> GeneratedRows:
        rows, rejected = [], Counter()
        generators: dict[int, np.random.Generator] = {}
        for item, found in self._read(items if self._order is None else [self._order[item] for item in items]):
            if item not in generators:
                generators[item] = seeded_rng(self._recipe.seed, item)
            try:
                rows += self._rows_of(found, generators[item])
            except BadRow as error:
                rejected[reason_of(error)] += 1
                self._num_named += 1
                if self._num_named <= MAX_NAMED:
                    logger.warning("rejected %s: %s", name_of(found, item), error.reason)
        return GeneratedRows(rows, dict(rejected))

    def _rows_of(self, found: Found | BadRow, generator: np.random.Generator) -> list[dict]:
        if isinstance(found, BadRow):
            raise found
        recipe, prompts = self._recipe, usable_prompts(found.prompts)
        if not recipe.all_prompts and len(prompts) > 1:
            prompts = [prompts[generator.integers(len(prompts))]]
        if not prompts:
            raise BadRow("no instruction")
        original, edited = stored_pair(found.original, found.edited, recipe.image_format, found.is_cartoonized)
        known = recipe.provenance | {name: value for name, value in found.provenance.items() if value is not None}
        return [make_pair(original, prompt, edited, image_format=recipe.image_format, **known) for prompt in prompts]


def name_of(found: Found | BadRow, item: int) -> str:
    """As the user finds it: the file, or the number of the item."""
    return str(getattr(found, "provenance", {}).get("source") or f"item {item}")


def usable_prompts(values: Sequence[Any]) -> list[str]:
    """The different ones that hold text, without the blanks around it."""
    return list(dict.fromkeys(value.strip() for value in values if isinstance(value, str) and value.strip()))


def reason_of(error: BadRow) -> str:
    """A reason without what differs from row to row (a path, sizes), so that it can be counted."""
    what, colon, rest = error.reason.partition(": ")
    is_of_one = colon and what in ("original picture", "edited picture")
    reason = f"{what} {rest.partition(':')[0]}" if is_of_one else what
    return reason.partition(" (")[0]


def stored_pair(original: Any, edited: Any, image_format: str, is_cartoonized: bool = False) -> tuple[bytes, bytes]:
    """The files of both pictures, as they are stored wherever they can be. Raises `BadRow`."""
    original_bytes, original_image = _read("original picture", original)
    edited_bytes, edited_image = _read("edited picture", edited)
    if is_cartoonized:
        aligned = as_cartoonized(original_image, edited_image.size[::-1])
        original_bytes = original_bytes if aligned is original_image else None
        original_image = aligned
    check_aspects(original_image.size[::-1], edited_image.size[::-1])
    return _stored(original_bytes, original_image, image_format), _stored(edited_bytes, edited_image, image_format)


def cartoonized_size(size: Size) -> tuple[Size, Size]:
    """(size after resizing, size of its top left part that is kept), of a picture that became a cartoon.

    instruction-tuning-sd/cartoonization ran White-box Cartoonization over each photograph, whose `resize_crop` brings
    the shorter side to 720 if it is longer, and cuts both to multiples of 8. The photograph itself was left as it was.
    """
    height, width = size
    if min(height, width) > CARTOONIZER_SIDE:
        shorter = min(height, width)
        height, width = (CARTOONIZER_SIDE * side // shorter for side in (height, width))
    return (height, width), tuple(side // CARTOONIZER_MULTIPLE * CARTOONIZER_MULTIPLE for side in (height, width))


def as_cartoonized(original: Image.Image, edited_size: Size) -> Image.Image:
    """The photograph resized and cut as its cartoon was, so that both show the same; another size is left alone.

    The photograph, not the cartoon: the target keeps its pixels, and is not made larger than it was drawn.
    """
    (height, width), kept = cartoonized_size((original.height, original.width))
    if kept != edited_size or edited_size == (original.height, original.width):
        return original
    box = (0, 0, kept[1] * original.width / width, kept[0] * original.height / height)
    return original.resize(kept[::-1], Image.Resampling.LANCZOS, box=box)


def _read(what: str, value: Any) -> tuple[bytes, Image.Image]:
    """(content of the file, upright RGB image)."""
    try:
        content = _content(value)
        return content, decode_image(content)
    except BadRow as error:
        raise BadRow(f"{what}: {error.reason}") from error


def _content(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and "://" in value:  # in a stream: "hf://…", "zip://…::…"
        from datasets.utils.file_utils import xopen

        with xopen(value, "rb") as file:
            return file.read()
    if not isinstance(value, (str, Path)):
        return value
    try:
        return Path(value).read_bytes()
    except FileNotFoundError:
        raise BadRow(f"no such file: {value}") from None
    except OSError as error:
        raise BadRow(f"cannot be read: {error}") from None


def _stored(content: bytes | None, image: Image.Image, image_format: str) -> bytes:
    is_kept = content is not None and not isinstance(content, Image.Image) and _is_plain(content)
    return content if is_kept else encode_image(image, image_format)


def _is_plain(content: bytes) -> bool:
    """Whether a file that decodes is one that every program shows alike: upright, one picture, no alpha."""
    image = Image.open(io.BytesIO(content))
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF is common in photographs, and counts as upright (utils/pixels.py)
        orientation = 1
    is_single = getattr(image, "n_frames", 1) == 1
    is_known = image.format in KEPT_FORMATS and image.mode in KEPT_MODES and not image.has_transparency_data
    return is_known and is_single and orientation in (0, 1)
