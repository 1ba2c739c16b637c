"""A shard: the rows of some consecutive items as the bytes of one parquet file, with counts of what was rejected."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.generation.recipe import Maker, Recipe

REJECTED = b"rejected"  # key of the file's metadata
ROWS_PER_GROUP = 100  # that a reader must hold at once


class Counts(NamedTuple):
    """Rows of a shard, and how many of its items gave none, by reason."""

    rows: int
    rejected: Counter


def shard_items(recipe: Recipe, items_per_shard: int, index: int) -> range:
    """The items of shard `index`."""
    return range(index * items_per_shard, min((index + 1) * items_per_shard, recipe.num_items))


def make_shard(make: Maker, features: datasets.Features, items: range) -> bytes:
    """Run the maker; returns a whole parquet file."""
    rows, rejected = make(items)
    columns = {name: [row[name] for row in rows] for name in features}
    table = pa.table(columns, schema=features.arrow_schema)
    return _as_bytes(table, rejected)


def first_rows(content: bytes, count: int) -> bytes:
    """The shard without what comes after its first `count` rows."""
    table = pq.read_table(io.BytesIO(content))
    return _as_bytes(table.slice(0, count), read_counts(io.BytesIO(content)).rejected)


def read_counts(file: Path | io.BytesIO) -> Counts | None:
    """What the footer of a shard says; None for a file that is no whole shard."""
    try:
        footer = pq.read_metadata(file)
        return Counts(footer.num_rows, Counter(json.loads(footer.metadata[REJECTED])))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _as_bytes(table: pa.Table, rejected: dict[str, int]) -> bytes:
    metadata = {**(table.schema.metadata or {}), REJECTED: json.dumps(rejected, sort_keys=True).encode()}
    content = io.BytesIO()
    # Images are compressed already, and dictionaries of them would hold every byte twice while writing.
    pq.write_table(
        table.replace_schema_metadata(metadata), content, row_group_size=ROWS_PER_GROUP, use_dictionary=False
    )
    return content.getvalue()
