"""Write a cleaned copy of a dataset: bad rows dropped, swapped pairs exchanged, shifted pairs cropped."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from data_preparation.checking.diagnosis import Diagnosis
from data_preparation.checking.scan import DatasetToCheck
from data_preparation.generation.pair_rows import JSON_COLUMNS, PROVENANCE_COLUMNS, make_pair, pair_features, parse_json
from data_preparation.generation.runner import (
    GeneratedRows,
    GenerateRows,
    GenerationSummary,
    WorkerSettings,
    run_generation,
)
from utils.checks import image_measures as measures
from utils.checks.findings import KINDS
from utils.checks.pair_inspection import WORKING_SIDE, working_pair
from utils.data.columns import Columns, usable_prompts
from utils.data.sources import sources_digest
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

MIN_SHARED = 0.5  # of each side, after cropping a shifted pair


@dataclass(frozen=True)
class CleanedCopy:
    """Row generator whose item n is row n of the dataset. dropped: row -> kind of finding, for rows to drop."""

    dataset: DatasetToCheck
    num_items: int
    dropped: dict[int, str]
    swapped: frozenset[int]
    shifted: frozenset[int]

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> GenerateRows:
        source = self.dataset.open()
        others = self.dataset.open_other_columns(source, PROVENANCE_COLUMNS)

        def generate(items: range) -> GeneratedRows:
            rows, rejected = [], Counter()
            for item in items:
                kind = self.dropped.get(item)
                if kind is None:
                    try:
                        provenance = read_provenance(others[item]) if others is not None else {}
                        rows.append(self._make_row(item, source.rows[item], source.columns, provenance))
                        continue
                    except BadRow:
                        kind = "misaligned"
                rejected[KINDS[kind].title] += 1
            return GeneratedRows(rows, dict(rejected))

        return generate

    def _make_row(self, item: int, row: dict, columns: Columns, provenance: dict[str, Any]) -> dict:
        prompt = usable_prompts(row[columns.prompt])[0]
        original, edited = row[columns.original], row[columns.edited]
        if item in self.swapped:
            original, edited = edited, original
            captions = {"original_prompt": provenance.get("edited_prompt")}
            captions["edited_prompt"] = provenance.get("original_prompt")
            provenance = provenance | captions
        if item in self.shifted:
            original, edited = crop_shift(original, edited)
        else:
            original, edited = read_stored(original), read_stored(edited)
        return make_pair(original, prompt, edited, **provenance)


def read_stored(image: dict) -> bytes:
    """The unchanged file of a stored image, a dict with "bytes" or "path"."""
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def read_provenance(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `make_pair`, without values of another type than ours."""
    provenance: dict[str, Any] = {}
    for name, value in row.items():
        if name in JSON_COLUMNS:
            value = parse_json(value)
        elif not isinstance(value, int if name == "seed" else str):
            value = None
        if value is not None:
            provenance[name] = value
    return provenance


def crop_shift(original: object, edited: object) -> tuple[np.ndarray, np.ndarray]:
    """Both images cropped to what they share, on the grid of the original: uint8 RGB of one size. Raises BadRow."""
    first_image, second_image = decode_image(original), decode_image(edited)
    if second_image.size != first_image.size:
        second_image = second_image.resize(first_image.size, Image.Resampling.LANCZOS)
    first, second = np.asarray(first_image), np.asarray(second_image)
    height, width = first.shape[:2]
    first, second = _crop_to_shared(first, second, *_coarse_shift(first, second))
    if max(first.shape) > WORKING_SIDE and min(first.shape[:2]) >= WORKING_SIDE // 2:
        first, second = _crop_to_shared(first, second, *_fine_shift(first, second))
    if first.shape[0] < MIN_SHARED * height or first.shape[1] < MIN_SHARED * width:
        raise BadRow("the two images share too little")
    return first, second


def _coarse_shift(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """(x, y) in pixels, measured on reduced images."""
    small = working_pair(first, second)
    shift = measures.find_shift(*map(measures.to_gray, small))
    scale = first.shape[1] / small[0].shape[1], first.shape[0] / small[0].shape[0]
    return round(shift.x * scale[0]), round(shift.y * scale[1])


def _fine_shift(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """(x, y) of what remains at full resolution, measured in the centre."""
    top, left = (max(0, (side - WORKING_SIDE) // 2) for side in first.shape[:2])
    centre = (slice(top, top + WORKING_SIDE), slice(left, left + WORKING_SIDE))
    shift = measures.find_shift(*(measures.to_gray(np.ascontiguousarray(image[centre])) for image in (first, second)))
    return shift.x, shift.y


def _crop_to_shared(first: np.ndarray, second: np.ndarray, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """The shared part, if the second image is shifted by x pixels to the right and y pixels down."""
    height, width = first.shape[:2]
    if abs(x) >= width or abs(y) >= height:
        raise BadRow("the two images share nothing")
    return tuple(
        np.ascontiguousarray(image[max(0, sy) : height - max(0, -sy), max(0, sx) : width - max(0, -sx)])
        for image, sx, sy in ((first, -x, -y), (second, x, y))
    )


def write_cleaned_copy(
    diagnosis: Diagnosis, folder: Path, fix_swapped: bool, fix_shifts: bool, num_workers: int, overwrite: bool
) -> GenerationSummary:
    """Write the cleaned copy, or resume writing it. Raises InputError."""
    findings = diagnosis.findings
    swapped = set(findings.rows.get("swapped", ())) - findings.dropped({"swapped"}).keys() if fix_swapped else set()
    dropped = {row: kind for row, kind in findings.dropped().items() if row not in swapped}
    shifted = {row for row in findings.rows.get("misaligned", ()) if fix_shifts and row not in dropped}
    name = diagnosis.dataset.dataset_name
    path = Path(name).expanduser()
    # A worker may have another working directory.
    dataset = replace(diagnosis.dataset, dataset_name=str(path.resolve()) if path.is_dir() else name)
    copy = CleanedCopy(dataset, len(diagnosis.records), dropped, frozenset(swapped), frozenset(shifted))
    changes = json.dumps([sorted(dropped.items()), sorted(swapped), sorted(shifted)]).encode()
    settings = {
        "generator": "check_dataset --fix",
        "dataset": name,
        "split": dataset.split,
        "rows": sources_digest([diagnosis.source]),
        "dropped_or_fixed_rows": hashlib.sha256(changes).hexdigest()[:32],
    }
    try:
        return run_generation(copy, folder, settings, workers=WorkerSettings(num_workers), overwrite=overwrite)
    except InputError as error:
        raise InputError(str(error).replace("--data_root", "--fix")) from error
