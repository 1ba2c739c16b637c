"""Pairs of a dataset: on the Hub, in a folder, or saved. Knows the columns and peculiarities of published datasets."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from data_preparation.generation.pair_rows import JSON_COLUMNS, PROVENANCE_COLUMNS
from data_preparation.importing.source_pairs import PairOrError, ReadPairs, SourcePair, read_each
from utils.data.columns import DEFAULT_COLUMNS, Columns, describe_features, is_image_feature, is_prompt_feature
from utils.data.rows import open_rows
from utils.data.sources import COLUMN_KEYS, open_source, sources_digest
from utils.errors import InputError
from utils.masks import MASK_COLUMNS
from utils.pixels import BadRow

SECOND_INPUT = "visual_input"  # Bin1117/AnyEdit: edits that need a second image
CARTOONS = "cartoonized_image"  # instruction-tuning-sd/cartoonization
INVERSE = "inverse_edit"  # UCSC-VLAA/HQ-Edit: the instruction from the edited to the original image
TEXT_NAMES = {
    "original_prompt": ("original_prompt", "input", "source_caption", "original_caption", "INPUT_CAPTION_BY_LLAMA"),
    "edited_prompt": ("edited_prompt", "output", "target_caption", "edited_caption", "OUTPUT_CAPTION_BY_LLAMA"),
    "task": ("task", "edit_type", "EDITING_TYPE", "task_type"),
}
# Ids of the original image. Rows that share one go into the same split.
SOURCE_NAMES = ("img_id", "omni_edit_id", "IMAGE_ID", "image_id")
SETTING_NAMES = ("img_id", "turn_index", "omni_edit_id", "IMAGE_ID", "idx", "edit_object", "summarized_text")
SCORE = re.compile(r"clip_sim_\w+|dinov2_sim|dino_sim|ssim|\w*_score(_\d+)?", re.IGNORECASE)
SCORE_NAMES = {"clip_sim_source": "clip_sim_0", "clip_sim_target": "clip_sim_1"}


@dataclass(frozen=True)
class ProvenanceMap:
    """texts, scores, settings: our name -> column of the dataset; source: column of an id, or None.

    is_ours: the rows have the columns of `pair_features`, which are copied.
    """

    texts: dict[str, str]
    scores: dict[str, str]
    settings: dict[str, str]
    source: str | None = None
    is_ours: bool = False

    @property
    def columns(self) -> set[str]:
        if self.is_ours:
            return set(PROVENANCE_COLUMNS)
        return {*self.texts.values(), *self.scores.values(), *self.settings.values()} | {self.source} - {None}

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `make_pair`, None where the row has no value. Raises BadRow."""
        if self.is_ours:
            return {name: _parse_json(name, row[name]) for name in PROVENANCE_COLUMNS}
        texts = {name: row[column] or None for name, column in self.texts.items()}
        scores = finite_numbers({name: row[column] for name, column in self.scores.items()})
        settings = {name: row[column] for name, column in self.settings.items() if row[column] not in (None, "")}
        source = None if self.source is None or row[self.source] is None else str(row[self.source])
        return texts | {"scores": scores or None, "settings": settings or None, "source": source}


def map_provenance(features: datasets.Features, columns: Columns) -> ProvenanceMap:
    """The columns of captions, scores, tasks and ids, by their names. columns: of the pair itself."""
    pair = {columns.original, columns.prompt, columns.edited}
    free = {name: feature for name, feature in features.items() if name not in pair and not _is_null(feature)}
    if columns == DEFAULT_COLUMNS and set(PROVENANCE_COLUMNS) <= set(free):
        return ProvenanceMap({}, {}, {}, is_ours=True)
    plain = [name for name, one in free.items() if isinstance(one, datasets.Value) and not is_image_feature(one)]
    texts = {}
    for name, candidates in TEXT_NAMES.items():
        column = next((column for column in candidates if column in free and is_prompt_feature(free[column])), None)
        if column is not None and isinstance(free[column], datasets.Value):
            texts[name] = column
    scores = {SCORE_NAMES.get(name, name): name for name in plain if SCORE.fullmatch(name)}
    settings = {name: name for name in SETTING_NAMES if name in plain}
    return ProvenanceMap(texts, scores, settings, next((name for name in SOURCE_NAMES if name in plain), None))


@dataclass(frozen=True)
class DatasetSource:
    """second_input: column of a second image, whose rows are rejected. inverse: column of the instruction for the
    swapped pair, which follows the pair of its row. mask: column of masks. All are None if unused."""

    name: str
    config: str | None
    split: str
    is_streaming: bool
    columns: Columns
    provenance: ProvenanceMap
    num_items: int
    digest: str
    second_input: str | None = None
    inverse: str | None = None
    mask: str | None = None

    def open(self) -> ReadPairs:
        rows = open_rows(self.name, False, self.config, self.split, self.is_streaming, None)
        used = {self.columns.original, self.columns.prompt, self.columns.edited, *self.provenance.columns}
        used |= {self.second_input, self.inverse, self.mask}
        rows = rows.select_columns([name for name in rows.features if name in used])
        for name, feature in rows.features.items():
            if is_image_feature(feature):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        row_at = _StreamReader(rows).row_at if self.is_streaming else rows.__getitem__
        return partial(read_each, pairs_of=lambda item: self._pairs_of(row_at(item), item))

    def identity(self) -> dict[str, Any]:
        columns = [self.columns.original, self.columns.prompt, self.columns.edited, self.inverse]
        place = {"split": self.split, "config": self.config}
        mask = {"mask": self.mask} if self.mask else {}
        return {"format": "dataset", "rows": self.digest, "columns": columns, **place, **mask}

    def _pairs_of(self, row: Mapping[str, Any] | None, item: int) -> Iterator[PairOrError]:
        if row is None:  # after the end of a stream
            return
        if self.second_input and _holds_image(row[self.second_input]):
            raise BadRow("needs a second image (visual_input)")
        provenance = self.provenance.read(row)
        original, edited = row[self.columns.original], row[self.columns.edited]
        provenance["source"] = provenance.get("source") or self._source_of(original, item)
        is_cartoonized = self.columns.edited == CARTOONS
        mask = row[self.mask] if self.mask else None
        yield SourcePair(original, edited, row[self.columns.prompt], provenance, is_cartoonized, mask)
        if self.inverse:
            yield SourcePair(edited, original, row[self.inverse], _swap(provenance), mask=mask)

    def _source_of(self, original: Mapping[str, Any] | None, item: int) -> str:
        """The path of an image file in the folder of the dataset, else the row."""
        path = (original or {}).get("path")
        folder = Path(self.name).expanduser().resolve()
        if path and Path(path).is_absolute() and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return f"{self.split}[{item}]"


def find_dataset_pairs(
    name: str,
    config: str | None,
    split: str,
    is_streaming: bool,
    max_rows: int | None,
    given: Columns,
    has_inverse: bool,
) -> DatasetSource:
    """Find the columns of a dataset. given: the column flags, None where not given. Raises InputError."""
    flags = {key: getattr(given, role) for key, role in COLUMN_KEYS.items()}
    source = open_source(name, config, None, split, is_streaming, **flags)
    rows = open_rows(name, False, config, split, is_streaming, None)
    features = rows.features
    if has_inverse and not (INVERSE in features and is_prompt_feature(features[INVERSE])):
        raise InputError(
            f"--inverse needs a text column {INVERSE}, which {name} does not have; its columns: "
            f"{describe_features(features)}"
        )
    columns, provenance = source.columns, map_provenance(features, source.columns)
    num_items = _stream_length(rows, split, max_rows, name) if is_streaming else len(rows)
    second_input = SECOND_INPUT if SECOND_INPUT in features and not _is_null(features[SECOND_INPUT]) else None
    inverse, digest = INVERSE if has_inverse else None, sources_digest([source])
    place = (name, config, split, is_streaming, columns, provenance, num_items, digest)
    return DatasetSource(*place, second_input, inverse, _find_mask(features, columns))


def _find_mask(features: datasets.Features, columns: Columns) -> str | None:
    names = [name for name in MASK_COLUMNS if name in features and is_image_feature(features[name])]
    return next((name for name in names if name not in (columns.original, columns.edited)), None)


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are finite numbers, or the text of one (as in a CSV file)."""
    numbers = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            numbers[name] = number
    return numbers


class _StreamReader:
    """Rows of a stream by index. Going back, or skipping rows, restarts the stream."""

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows, self._iterator, self._next = rows, iter(rows), 0

    def row_at(self, index: int) -> dict | None:
        """None after the end."""
        if index != self._next:
            self._iterator = iter(self._rows.skip(index))
        self._next = index + 1
        return next(self._iterator, None)


def _stream_length(rows: datasets.IterableDataset, split: str, max_rows: int | None, name: str) -> int:
    info = (getattr(rows.info, "splits", None) or {}).get(split)
    if info is not None and info.num_examples:
        return info.num_examples
    if max_rows is None:
        raise InputError(f"--streaming: the number of rows of {name} is unknown; give --max_num_samples")
    return max_rows


def _swap(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of the swapped pair: captions change places, and so do the scores of each image."""
    scores = dict(provenance.get("scores") or {})
    swapped = {"clip_sim_0": scores.pop("clip_sim_1", None), "clip_sim_1": scores.pop("clip_sim_0", None)}
    scores |= {name: value for name, value in swapped.items() if value is not None}
    return dict(provenance) | {
        "original_prompt": provenance.get("edited_prompt"),
        "edited_prompt": provenance.get("original_prompt"),
        "scores": scores or None,
        "settings": {**(provenance.get("settings") or {}), "inverse": True},
    }


def _parse_json(name: str, value: Any) -> Any:
    if name not in JSON_COLUMNS or value is None:
        return value
    try:
        return json.loads(value)
    except (ValueError, TypeError):
        raise BadRow(f"{name} is not JSON") from None


def _is_null(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype == "null"


def _holds_image(value: Any) -> bool:
    return bool(value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else bool(value)
