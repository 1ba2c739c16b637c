"""What a set of pairs has cost, in rows that the UNet evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from data_preparation.pairs.candidates import CAPTION_REASON


def count_candidates(rows: int, rejected: Mapping[str, int]) -> int:
    """All that were sampled: every one is kept, or counted under the reason that it was rejected for."""
    return rows + sum(count for reason, count in rejected.items() if not reason.startswith(CAPTION_REASON))


def read_rows_per_candidate(data_root: Path) -> int:
    """UNet rows of one candidate, as counted while sampling: what the first row of the set says."""
    first = next(iter(sorted((data_root / "data").glob("*.parquet"))))
    batch = next(pq.ParquetFile(first).iter_batches(1, columns=["settings"]))
    counted = json.loads(batch["settings"][0].as_py())
    return counted["unet_rows"] // counted["candidates"]


def describe_cost(data_root: Path, rows: int, rejected: Mapping[str, int]) -> str:
    """One line: candidates and UNet rows, in all and for each pair that was kept. The set has a row at least."""
    candidates, each = count_candidates(rows, rejected), read_rows_per_candidate(data_root)
    total = candidates * each
    return f"{candidates:,} candidates of {each:,} UNet rows: {total:,} in all, {total / rows:,.0f} for each pair kept"
