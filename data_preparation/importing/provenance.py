"""What else a published row tells beside its pair, under the names that published datasets use, in ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from data_preparation.generation.pair_rows import pair_features
from utils.data.columns import Columns, is_image_feature, is_prompt_feature
from utils.pixels import BadRow

TEXT_NAMES = {
    "original_prompt": ("original_prompt", "input", "source_caption", "original_caption", "INPUT_CAPTION_BY_LLAMA"),
    "edited_prompt": ("edited_prompt", "output", "target_caption", "edited_caption", "OUTPUT_CAPTION_BY_LLAMA"),
    "task": ("task", "edit_type", "EDITING_TYPE", "task_type"),
}
# What names the photograph, by which a set is split into training and test: several turns or edits share one.
SOURCE_NAMES = ("img_id", "omni_edit_id", "IMAGE_ID", "image_id")
SETTING_NAMES = ("img_id", "turn_index", "omni_edit_id", "IMAGE_ID", "idx", "edit_object", "summarized_text")
SCORE = re.compile(r"clip_sim_\w+|dinov2_sim|dino_sim|ssim|\w*_score(_\d+)?", re.IGNORECASE)
OUR_SCORES = {"clip_sim_source": "clip_sim_0", "clip_sim_target": "clip_sim_1"}
OURS = tuple(name for name in pair_features() if name not in ("original_image", "edit_prompt", "edited_image"))
JSON_NAMES = ("models", "settings", "scores")


@dataclass(frozen=True)
class Extras:
    """texts: keyword of `make_pair` -> column; scores, settings: our name -> column; source: column or None.

    is_ours: the rows have our own schema, whose columns are carried over as they are.
    """

    texts: dict[str, str]
    scores: dict[str, str]
    settings: dict[str, str]
    source: str | None = None
    is_ours: bool = False

    @property
    def columns(self) -> set[str]:
        if self.is_ours:
            return set(OURS)
        named = {*self.texts.values(), *self.scores.values(), *self.settings.values()}
        return named | ({self.source} if self.source else set())

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `make_pair`, None where the row has nothing. Raises `BadRow`."""
        if self.is_ours:
            return _our_own(row)
        texts = {name: row[column] or None for name, column in self.texts.items()}
        scores = numbers_of({name: row[column] for name, column in self.scores.items()})
        settings = {name: row[column] for name, column in self.settings.items() if row[column] not in (None, "")}
        source = None if self.source is None or row[self.source] is None else str(row[self.source])
        return texts | {"scores": scores or None, "settings": settings or None, "source": source}


def find_extras(features: datasets.Features, columns: Columns) -> Extras:
    """The columns of captions, scores, task and ids of a dataset; null-typed ones and those of the pair are none."""
    pair = {columns.original, columns.prompt, columns.edited}
    free = {name: feature for name, feature in features.items() if name not in pair and not _is_null(feature)}
    if columns == Columns("original_image", "edit_prompt", "edited_image") and set(OURS) <= set(free):
        return Extras({}, {}, {}, is_ours=True)
    texts = {}
    for name, candidates in TEXT_NAMES.items():
        column = next((column for column in candidates if column in free and is_prompt_feature(free[column])), None)
        if column is not None and isinstance(free[column], datasets.Value):
            texts[name] = column
    scores = {OUR_SCORES.get(name, name): name for name in free if SCORE.fullmatch(name) and _is_plain(free[name])}
    settings = {name: name for name in SETTING_NAMES if name in free and _is_plain(free[name])}
    source = next((name for name in SOURCE_NAMES if name in free and _is_plain(free[name])), None)
    return Extras(texts, scores, settings, source)


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are finite numbers, or text of one (as in a CSV)."""
    found = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            found[name] = number
    return found


def _our_own(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: row[name] for name in OURS}
    for name in JSON_NAMES:
        try:
            values[name] = None if values[name] is None else json.loads(values[name])
        except (ValueError, TypeError):
            raise BadRow(f"{name} is not JSON") from None
    return values


def _is_null(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype == "null"


def _is_plain(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and not is_image_feature(feature)
