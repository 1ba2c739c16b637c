"""Rows of a dataset: of the Hub, in a folder or saved, with what is known of the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from data_preparation.importing.pairs import Found, Reader
from data_preparation.importing.provenance import Extras, find_extras
from utils.data.columns import Columns, describe_features, is_image_feature, is_prompt_feature
from utils.data.rows import open_rows
from utils.data.sources import open_source, sources_digest
from utils.errors import InputError
from utils.pixels import BadRow

SECOND_INPUT = "visual_input"  # of Bin1117/AnyEdit: edits that cannot be made from one picture and a sentence
CARTOONS = "cartoonized_image"  # of instruction-tuning-sd/cartoonization
INVERSE = "inverse_edit"  # of UCSC-VLAA/HQ-Edit


@dataclass(frozen=True)
class PublishedRows:
    """inverse: column of the instruction that leads back, for a second, swapped pair of each row; None for none."""

    name: str
    config: str | None
    split: str
    is_streaming: bool
    columns: Columns
    extras: Extras
    num_items: int
    digest: str
    second_input: str | None = None
    inverse: str | None = None

    def open(self) -> Reader:
        rows = open_rows(self.name, False, self.config, self.split, self.is_streaming, None)
        wanted = {self.columns.original, self.columns.prompt, self.columns.edited, *self.extras.columns}
        wanted |= {name for name in (self.second_input, self.inverse) if name}
        rows = rows.select_columns([name for name in rows.features if name in wanted])
        for name, feature in rows.features.items():
            if is_image_feature(feature):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        row_at = _Stream(rows).row if self.is_streaming else rows.__getitem__

        def read(items: Sequence[int]) -> Iterator[tuple[int, Found | BadRow]]:
            for item in items:
                row = row_at(item)
                if row is not None:
                    yield from ((item, found) for found in self._pairs_of(row, item))

        return read

    def identity(self) -> dict[str, Any]:
        columns = [self.columns.original, self.columns.prompt, self.columns.edited, self.inverse]
        return {
            "format": "dataset",
            "rows": self.digest,
            "split": self.split,
            "config": self.config,
            "columns": columns,
        }

    def _pairs_of(self, row: Mapping[str, Any], item: int) -> Iterator[Found | BadRow]:
        if self.second_input and _holds_image(row[self.second_input]):
            yield BadRow("needs a second picture (visual_input)")
            return
        try:
            provenance = self.extras.read(row)
        except BadRow as error:
            yield error
            return
        original, edited = row[self.columns.original], row[self.columns.edited]
        provenance["source"] = provenance.get("source") or self._source_of(original, item)
        is_cartoonized = self.columns.edited == CARTOONS
        yield Found(original, edited, _as_list(row[self.columns.prompt]), provenance, is_cartoonized)
        if self.inverse:
            yield Found(edited, original, _as_list(row[self.inverse]), inverted(provenance))

    def _source_of(self, original: Mapping[str, Any] | None, item: int) -> str:
        """The photograph's file, where the rows name files of the folder; else the row."""
        path = (original or {}).get("path")
        folder = Path(self.name).expanduser().resolve()
        if path and Path(path).is_absolute() and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return f"{self.split}[{item}]"


def find_rows(
    name: str,
    config: str | None,
    split: str,
    is_streaming: bool,
    max_rows: int | None,
    given: Columns,
    is_inverse: bool,
) -> PublishedRows:
    """Look at a dataset: its columns, and what they are known to need. given: the columns that flags name, else None.

    Raises InputError.
    """
    flags = dict(
        original_image_column=given.original, edit_prompt_column=given.prompt, edited_image_column=given.edited
    )
    source = open_source(name, config, None, split, is_streaming, **flags)
    rows = open_rows(name, False, config, split, is_streaming, None)
    features = rows.features
    if is_inverse and not (INVERSE in features and is_prompt_feature(features[INVERSE])):
        raise InputError(
            f"--inverse needs a column {INVERSE} with the instruction that leads back, which {name} has not; its "
            f"columns: {describe_features(features)}"
        )
    return PublishedRows(
        name,
        config,
        split,
        is_streaming,
        source.columns,
        find_extras(features, source.columns),
        num_items=_num_streamed(rows, split, max_rows, name) if is_streaming else len(rows),
        digest=sources_digest([source]),
        second_input=SECOND_INPUT if _may_hold_image(features.get(SECOND_INPUT)) else None,
        inverse=INVERSE if is_inverse else None,
    )


def inverted(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of the swapped pair: captions change places, and so do the scores of each picture with its caption."""
    scores = dict(provenance.get("scores") or {})
    before, after = scores.pop("clip_sim_0", None), scores.pop("clip_sim_1", None)
    scores |= {name: value for name, value in (("clip_sim_0", after), ("clip_sim_1", before)) if value is not None}
    return dict(provenance) | {
        "original_prompt": provenance.get("edited_prompt"),
        "edited_prompt": provenance.get("original_prompt"),
        "scores": scores or None,
        "settings": {**(provenance.get("settings") or {}), "inverse": True},
    }


class _Stream:
    """Rows of a stream by number; those behind the last one read are reached by starting anew."""

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows, self._iterator, self._next = rows, iter(rows), 0

    def row(self, number: int) -> dict | None:
        """None behind the end."""
        if number != self._next:
            self._iterator = iter(self._rows.skip(number))
        self._next = number + 1
        return next(self._iterator, None)


def _num_streamed(rows: datasets.IterableDataset, split: str, max_rows: int | None, name: str) -> int:
    known = (getattr(rows.info, "splits", None) or {}).get(split)
    if known is not None and known.num_examples:
        return known.num_examples
    if max_rows is None:
        raise InputError(f"--streaming: {name} does not say how many rows it has; give --max_num_samples")
    return max_rows


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _may_hold_image(feature: Any) -> bool:
    return feature is not None and not (isinstance(feature, datasets.Value) and feature.dtype == "null")


def _holds_image(value: Any) -> bool:
    return bool(value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else bool(value)
