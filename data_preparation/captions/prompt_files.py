"""Triples as lines of JSON, as the original has them and as its readers want them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_preparation.generation.dataset_folder import DATA, write_atomically

PROMPTS = "prompts.jsonl"


def write_prompts(data_root: Path) -> Path:
    """`prompts.jsonl` beside the rows, whole or not at all.

    The caption stands there twice: the original's generator writes it as `caption`, and its released file and the
    readers of that have `input`.
    """
    lines = [json.dumps({"input": row["caption"], **row}, ensure_ascii=False) for row in _rows(data_root)]
    path = data_root / PROMPTS
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def _rows(data_root: Path) -> Iterator[dict]:
    import pyarrow.parquet as pq

    for path in sorted((data_root / DATA).glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["caption", "edit", "output", "url"]):
            yield from batch.to_pylist()
