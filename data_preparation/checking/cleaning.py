"""A cleaned copy of a dataset: bad rows left out, swapped pairs exchanged, shifted ones cropped, in our schema."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from data_preparation.checking.doctor import Diagnosis
from data_preparation.checking.scan import PairSet
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.pools import Workers
from data_preparation.generation.recipe import Made, Maker
from data_preparation.generation.runner import Summary, produce
from utils.checks import image_measures as measures
from utils.checks.findings import KINDS
from utils.checks.pair_inspection import WORKING_SIDE, working_pair
from utils.checks.prompt_checks import usable_prompts
from utils.data.sources import sources_digest
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

MIN_KEPT = 0.5  # of each side after cropping a shifted pair
KEPT_COLUMNS = tuple(name for name in pair_features() if name not in ("original_image", "edit_prompt", "edited_image"))
JSON_COLUMNS = ("models", "settings", "scores")


@dataclass(frozen=True)
class CleanCopy:
    """Recipe: item n is row n of the dataset. dropped: row -> kind of finding, for rows that are left out."""

    pairs: PairSet
    num_items: int
    dropped: dict[int, str] = field(default_factory=dict)
    swapped: frozenset[int] = frozenset()
    shifted: frozenset[int] = frozenset()

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> Maker:
        source = self.pairs.open()
        others = self.pairs.open_others(source, KEPT_COLUMNS)

        def make(items: range) -> Made:
            rows, rejected = [], Counter()
            for item in items:
                kind = self.dropped.get(item)
                if kind is None:
                    try:
                        kept = keep_columns(others[item]) if others is not None else {}
                        rows.append(self._make_row(item, source.rows[item], source.columns, kept))
                        continue
                    except BadRow:
                        kind = "misaligned"
                rejected[KINDS[kind].title] += 1
            return Made(rows, dict(rejected))

        return make

    def _make_row(self, item: int, row: dict, columns: Any, kept: dict[str, Any]) -> dict:
        prompt = usable_prompts(row[columns.prompt])[0]
        original, edited = row[columns.original], row[columns.edited]
        if item in self.swapped:
            original, edited = edited, original
            captions = kept.get("edited_prompt"), kept.get("original_prompt")
            kept = kept | dict(zip(("original_prompt", "edited_prompt"), captions, strict=True))
        if item in self.shifted:
            first, second = crop_shift(original, edited)
        else:
            first, second = read_stored(original), read_stored(edited)
        return make_pair(first, prompt, second, **kept)


def read_stored(image: dict) -> bytes:
    """The file of a stored image (a dict with "bytes" or "path"), as it is."""
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def keep_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Of the other columns what is of our schema, as `make_pair` takes it; a value of another type is left out."""
    kept: dict[str, Any] = {}
    for name, value in row.items():
        if name in JSON_COLUMNS:
            value = _parse_json(value)
        elif name == "seed":
            value = value if isinstance(value, int) else None
        elif not isinstance(value, str):
            value = None
        if value is not None:
            kept[name] = value
    return kept


def _parse_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return None


def crop_shift(original: object, edited: object) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures cut to what they share, on the original's grid: uint8 RGB of one size. Raises `BadRow`."""
    one = decode_image(original)
    other = decode_image(edited)
    other = other if other.size == one.size else other.resize(one.size, Image.Resampling.LANCZOS)
    first, second = np.asarray(one), np.asarray(other)
    size = first.shape
    first, second = _cut(first, second, *_coarse_shift(first, second))
    if max(first.shape) > WORKING_SIDE and min(first.shape[:2]) >= WORKING_SIDE // 2:
        first, second = _cut(first, second, *_fine_shift(first, second))
    if first.shape[0] < MIN_KEPT * size[0] or first.shape[1] < MIN_KEPT * size[1]:
        raise BadRow("the two images share too little")
    return first, second


def _coarse_shift(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """(x, y) in pixels, found on reduced pictures."""
    small = working_pair(first, second)
    shift = measures.find_shift(*map(measures.to_gray, small))
    scale = first.shape[1] / small[0].shape[1], first.shape[0] / small[0].shape[0]
    return round(shift.x * scale[0]), round(shift.y * scale[1])


def _fine_shift(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """What reduced pictures could not show, in the middle at full resolution."""
    top, left = (max(0, (side - WORKING_SIDE) // 2) for side in first.shape[:2])
    middle = (slice(top, top + WORKING_SIDE), slice(left, left + WORKING_SIDE))
    shift = measures.find_shift(*(measures.to_gray(np.ascontiguousarray(image[middle])) for image in (first, second)))
    return shift.x, shift.y


def _cut(first: np.ndarray, second: np.ndarray, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """What two pictures share when the second lies (x, y) pixels to the right and down."""
    height, width = first.shape[:2]
    if abs(x) >= width or abs(y) >= height:
        raise BadRow("the two images share nothing")
    return tuple(
        np.ascontiguousarray(image[max(0, sy) : height - max(0, -sy), max(0, sx) : width - max(0, -sx)])
        for image, sx, sy in ((first, -x, -y), (second, x, y))
    )


def clean(
    diagnosis: Diagnosis,
    folder: Path,
    *,
    fix_swapped: bool = False,
    fix_shifts: bool = False,
    num_workers: int = 0,
    overwrite: bool = False,
) -> Summary:
    """Write the cleaned copy; begun again after a stop, it goes on. Raises `InputError`."""
    findings = diagnosis.findings
    swapped = set(findings.rows.get("swapped", ())) - findings.dropped({"swapped"}).keys() if fix_swapped else set()
    dropped = {row: kind for row, kind in findings.dropped().items() if row not in swapped}
    shifted = {row for row in findings.rows.get("misaligned", ()) if fix_shifts and row not in dropped}
    pairs = replace(diagnosis.pairs, dataset=_absolute(diagnosis.pairs.dataset))
    recipe = CleanCopy(pairs, diagnosis.num_rows, dropped, frozenset(swapped), frozenset(shifted))
    decided = json.dumps([sorted(dropped.items()), sorted(swapped), sorted(shifted)]).encode()
    settings = {
        "generator": "check_dataset --fix",
        "dataset": diagnosis.pairs.dataset,
        "split": diagnosis.pairs.split,
        "rows": sources_digest([diagnosis.source]),
        "rows left out or mended": hashlib.sha256(decided).hexdigest()[:32],
    }
    try:
        return produce(recipe, folder, settings, workers=Workers(num_workers), overwrite=overwrite)
    except InputError as error:
        raise InputError(str(error).replace("--data_root", "--fix")) from error


def _absolute(dataset: str) -> str:
    """A folder by its whole path: a worker may have another working folder."""
    path = Path(dataset).expanduser()
    return str(path.resolve()) if path.is_dir() else dataset
