"""The shards of an export: planned at once, so that each can be written alone, by any process, in any order."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.exporting.reading import Pairs, embedded
from data_preparation.exporting.scrubbing import scrub_json, scrub_text
from data_preparation.exporting.splitting import SPLITS
from data_preparation.generation.pair_rows import IMAGES
from data_preparation.generation.processes import leave_with_parent
from utils.errors import InputError

ROWS_PER_GROUP = 100  # what a reader holds at once, also of the Hub's viewer
BYTES_PER_GROUP = 200_000_000
PLAN = b"plan"  # key of the file's metadata: digest of what decides its rows
PATHS = ("source", "source_dataset", "source_license")
JSON = ("models", "settings", "scores")


@dataclass(frozen=True)
class Shard:
    """One file to be. rows: int64, numbers of rows in the input, ascending."""

    name: str
    rows: np.ndarray
    plan: str


def plan_shards(pairs: Pairs, splits: np.ndarray, max_bytes: int, plan: str) -> list[Shard]:
    """Cut each split into files of about equal size, none much above `max_bytes`."""
    sizes = np.repeat(pairs.bytes_of, pairs.rows_of)
    shards = []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(splits == number)
        if not len(rows):
            continue
        total = np.cumsum(sizes[rows])
        count = min(len(rows), max(1, int(np.ceil(total[-1] / max_bytes))))
        ends = np.searchsorted(total, total[-1] * np.arange(1, count) / count)
        parts = [part for part in np.split(rows, ends) if len(part)]
        names = [f"{split}-{index:05d}-of-{len(parts):05d}.parquet" for index in range(len(parts))]
        shards += [Shard(name, part, plan) for name, part in zip(names, parts, strict=True)]
    return shards


def is_written(shard: Shard, folder: Path) -> bool:
    """Whether the file is there, whole, and of this plan."""
    try:
        footer = pq.read_metadata(folder / shard.name)
    except (OSError, pa.ArrowException):
        return False
    return footer.num_rows == len(shard.rows) and footer.metadata.get(PLAN) == shard.plan.encode()


def write_shards(pairs: Pairs, shards: Sequence[Shard], folder: Path, num_workers: int) -> Iterator[Shard]:
    """Write the shards, each as soon as a process is free; yields those that are ready."""
    if not num_workers or len(shards) < 2:
        for shard in shards:
            write_shard(pairs, shard, folder)
            yield shard
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(shards)), context, leave_with_parent) as pool:
        jobs = {pool.submit(write_shard, pairs, shard, folder): shard for shard in shards}
        try:
            for job in as_completed(jobs):
                job.result()
                yield jobs[job]
        except BrokenProcessPool:
            raise InputError(
                "a worker was killed, perhaps for want of memory: run the same command again, it goes on; "
                "fewer --num_workers need less memory"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_shard(pairs: Pairs, shard: Shard, folder: Path) -> None:
    """Write one file beside its place, flush it to the disk, and rename it."""
    schema = pairs.features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, PLAN: shard.plan.encode()})
    unfinished = folder / f".{shard.name}.{os.getpid()}"
    try:
        with unfinished.open("wb") as file:
            # Pages cut by content: of a later version of the dataset, the Hub stores only what is new.
            with pq.ParquetWriter(file, schema, use_dictionary=False, use_content_defined_chunking=True) as writer:
                for table in _groups(pairs, shard.rows, schema):
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / shard.name)
    finally:
        unfinished.unlink(missing_ok=True)


def _groups(pairs: Pairs, rows: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows as tables of about a row group each; a chunk of the input is read once, and let go."""
    held: list[pa.Table] = []
    for table in _tables(pairs, rows, schema):
        held.append(table)
        while sum(part.num_rows for part in held) >= ROWS_PER_GROUP:
            whole = pa.concat_tables(held)
            yield whole.slice(0, ROWS_PER_GROUP)
            rest = whole.slice(ROWS_PER_GROUP)
            held = [rest] if rest.num_rows else []
        if sum(part.nbytes for part in held) >= BYTES_PER_GROUP:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _tables(pairs: Pairs, rows: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    starts = np.concatenate([[0], np.cumsum(pairs.rows_of)])
    chunks = np.searchsorted(starts, rows, side="right") - 1
    for chunk in np.unique(chunks):
        table = pairs.read(int(chunk), schema.names).take(pa.array(rows[chunks == chunk] - starts[chunk]))
        yield pa.table([_published(table, name, schema) for name in schema.names], schema=schema)


def _published(table: pa.Table, name: str, schema: pa.Schema) -> pa.Array:
    """A column as it goes out: images without paths, texts without folders and tokens."""
    column = table[name]
    if name in IMAGES:
        return embedded(column)
    if name in PATHS:
        return pa.array([text and scrub_text(text) for text in column.to_pylist()], pa.string())
    if name in JSON:
        return pa.array([scrub_json(text) for text in column.to_pylist()], pa.string())
    return column.combine_chunks().cast(schema.field(name).type)


def sizes_of(folder: Path) -> dict[str, dict[str, int]]:
    """Of each split: rows, bytes when read, bytes of the files; from the footers."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.parquet")):
        footer = pq.read_metadata(path)
        sizes = found.setdefault(path.name.split("-")[0], {"rows": 0, "bytes": 0, "file_bytes": 0, "files": 0})
        sizes["rows"] += footer.num_rows
        sizes["bytes"] += sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
        sizes["file_bytes"] += path.stat().st_size
        sizes["files"] += 1
    return {split: found[split] for split in SPLITS if split in found}


def plan_digest(values: dict) -> str:
    """Hex digest of what decides the rows and their files."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
