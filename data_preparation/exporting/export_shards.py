"""The parquet files of an export: which split each row goes to, and files that any process can write in any order."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.exporting.reading import ExportInput, embed_images, scrub_json, scrub_text
from data_preparation.generation.pair_rows import IMAGES, JSON_COLUMNS
from data_preparation.generation.processes import run_in_processes
from utils.errors import InputError

SPLITS = ("train", "validation", "test")
DROPPED = -1  # in place of a split
HELD_OUT = "heldout"  # value of the column `phrasing`
ROWS_PER_GROUP = 100  # a reader holds one row group in memory, also the Hub's dataset viewer
BYTES_PER_GROUP = 200_000_000
PLAN = b"plan"  # key in the footer of a file: digest of everything that determines its rows
PATH_COLUMNS = ("source", "source_dataset", "source_license")


class RowKeys(NamedTuple):
    """What determines the splits. sources: 16 bytes per row that identify its source image.

    is_held_out: bool (rows,), instructions that training must not see. digest: of all texts, and of the images read.
    origins: rows of each (source_dataset, source_license); models: rows of each value of the column `models`.
    """

    sources: list[bytes]
    is_held_out: np.ndarray
    digest: str
    origins: Counter
    models: Counter


def read_keys(rows: ExportInput) -> RowKeys:
    """Read the text columns once, and original images only for rows without a source."""
    names = [name for name in rows.features if name not in IMAGES]
    digest, sources, held_out, origins, models = hashlib.sha256(), [], [], Counter(), Counter()
    digest.update(repr((rows.rows_of.tolist(), rows.bytes_of.tolist(), str(rows.features))).encode())
    for chunk, count in enumerate(rows.rows_of):
        columns = rows.read(chunk, names).to_pydict()
        digest.update(repr(columns).encode())
        absent = [None] * count
        datasets_of = columns.get("source_dataset") or absent
        keys = [
            _digest(f"{dataset}\0{name}".encode()) if name else None
            for dataset, name in zip(datasets_of, columns.get("source") or absent, strict=True)
        ]
        if None in keys:
            originals = rows.read(chunk, ["original_image"])["original_image"].to_pylist()
            contents = [(image or {}).get("bytes") or b"" for image in originals]
            keys = [key or _digest(content) for key, content in zip(keys, contents, strict=True)]
        digest.update(b"".join(keys))
        sources += keys
        held_out += [phrasing == HELD_OUT for phrasing in columns.get("phrasing") or absent]
        origins.update(zip(datasets_of, columns.get("source_license") or absent, strict=True))
        models.update(text for text in columns.get("models") or absent if text)
    return RowKeys(sources, np.array(held_out, dtype=bool), digest.hexdigest()[:32], origins, models)


def assign_splits(keys: RowKeys, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each row: int8 (rows,), an index into SPLITS, or DROPPED.

    All rows of a source go to one split. Sources are sorted by a hash keyed with the seed, those with held-out
    phrasings first. Test takes sources from the front until it has its share of the rows, then validation; train gets
    the rest. So each split has its share to within one source, and sources that are added later move few others. A
    held-out phrasing whose source is in train is dropped: train would learn the phrasing, test would know the image.
    """
    rows_of = Counter(keys.sources)
    held_out = {key for key, is_held_out in zip(keys.sources, keys.is_held_out, strict=True) if is_held_out}
    order = sorted(rows_of, key=lambda key: (key not in held_out, _digest(seed.to_bytes(8, "little") + key)))
    num_splits = sum(share > 0 for share in shares)
    if len(order) < num_splits:
        raise InputError(
            f"--split {','.join(f'{100 * share:g}' for share in shares)}: needs at least {num_splits} source images, "
            f"one for each split, but the dataset has {len(order)}: use --split 100,0,0"
        )
    split_of = _assign_sources(order, rows_of, shares)
    splits = np.array([split_of[key] for key in keys.sources], dtype=np.int8)
    splits[keys.is_held_out & (splits == SPLITS.index("train"))] = DROPPED
    if shares[0] and not (splits == SPLITS.index("train")).any():
        raise InputError("--split leaves no row to train on: all rows of the train sources are held-out phrasings")
    return splits


def _assign_sources(order: list[bytes], rows_of: Counter, shares: Sequence[float]) -> dict[bytes, int]:
    """The split of each source: at least one source for each split with a share."""
    total, split_of, start = rows_of.total(), {}, 0
    for split in (2, 1):
        reserved = sum(share > 0 for share in shares[:split])  # sources kept for the splits that follow
        taken = 0
        while shares[split] and start < len(order) - reserved:
            size = rows_of[order[start]]
            # Stop if the split is nearer to its share without this source.
            if taken and taken + size / 2 > shares[split] * total:
                break
            split_of[order[start]], taken, start = split, taken + size, start + 1
    rest = 0 if shares[0] else 1 if shares[1] else 2
    return {**dict.fromkeys(order, rest), **split_of}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class ExportShard:
    """A file to write. rows: int64, numbers of its rows in the input, ascending."""

    name: str
    rows: np.ndarray
    plan: str


def plan_shards(rows: ExportInput, splits: np.ndarray, max_bytes: int, plan: str) -> list[ExportShard]:
    """Divide each split into files of about equal size, none much above `max_bytes`."""
    sizes = np.repeat(rows.bytes_of, rows.rows_of)
    shards = []
    for number, split in enumerate(SPLITS):
        chosen = np.flatnonzero(splits == number)
        if not len(chosen):
            continue
        total = np.cumsum(sizes[chosen])
        count = min(len(chosen), max(1, int(np.ceil(total[-1] / max_bytes))))
        ends = np.searchsorted(total, total[-1] * np.arange(1, count) / count)
        parts = [part for part in np.split(chosen, ends) if len(part)]
        names = [f"{split}-{index:05d}-of-{len(parts):05d}.parquet" for index in range(len(parts))]
        shards += [ExportShard(name, part, plan) for name, part in zip(names, parts, strict=True)]
    return shards


def is_written(shard: ExportShard, folder: Path) -> bool:
    """Whether the file exists, is complete, and was written for the same plan."""
    try:
        footer = pq.read_metadata(folder / shard.name)
    except (OSError, pa.ArrowException):
        return False
    return footer.num_rows == len(shard.rows) and footer.metadata.get(PLAN) == shard.plan.encode()


def write_shards(
    rows: ExportInput, shards: Sequence[ExportShard], folder: Path, num_workers: int
) -> Iterator[ExportShard]:
    """Write the files, and yield each shard when its file is complete. num_workers: 0 for this process."""
    jobs, num_workers = dict(enumerate(shards)), num_workers if len(shards) > 1 else 0
    for number, _ in run_in_processes(partial(_open_writer, rows, folder), jobs, num_workers):
        yield shards[number]


def _open_writer(rows: ExportInput, folder: Path, rank: int) -> Callable[[ExportShard], None]:
    return partial(write_shard, rows, folder)


def write_shard(rows: ExportInput, folder: Path, shard: ExportShard) -> None:
    """Write one file under a temporary name, flush it to disk, and rename it."""
    schema = rows.features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, PLAN: shard.plan.encode()})
    unfinished = folder / f".{shard.name}.{os.getpid()}"
    try:
        with unfinished.open("wb") as file:
            # Content-defined pages let the Hub store only what is new in a later version of the dataset.
            with pq.ParquetWriter(file, schema, use_dictionary=False, use_content_defined_chunking=True) as writer:
                for table in _row_groups(rows, shard.rows, schema):
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / shard.name)
    finally:
        unfinished.unlink(missing_ok=True)


def _row_groups(rows: ExportInput, numbers: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows as tables of about one row group each."""
    held = schema.empty_table()
    for table in _tables(rows, numbers, schema):
        held = pa.concat_tables([held, table])
        while held.num_rows >= ROWS_PER_GROUP or held.nbytes >= BYTES_PER_GROUP:
            yield held.slice(0, ROWS_PER_GROUP)
            held = held.slice(ROWS_PER_GROUP)
    if held.num_rows:
        yield held


def _tables(rows: ExportInput, numbers: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of each chunk of the input, which is read once."""
    starts = np.concatenate([[0], np.cumsum(rows.rows_of)])
    chunks = np.searchsorted(starts, numbers, side="right") - 1
    for chunk in np.unique(chunks):
        table = rows.read(int(chunk), schema.names).take(pa.array(numbers[chunks == chunk] - starts[chunk]))
        yield pa.table([_published_column(table[name], schema.field(name)) for name in schema.names], schema=schema)


def _published_column(column: pa.ChunkedArray, field: pa.Field) -> pa.Array:
    """A column without file paths and tokens."""
    if field.name in IMAGES:
        return embed_images(column)
    if field.name in PATH_COLUMNS:
        return pa.array([text and scrub_text(text) for text in column.to_pylist()], pa.string())
    if field.name in JSON_COLUMNS:
        return pa.array([scrub_json(text) for text in column.to_pylist()], pa.string())
    return column.combine_chunks().cast(field.type)


def measure_splits(folder: Path) -> dict[str, dict[str, int]]:
    """Rows, bytes in memory, bytes of the files and number of files of each split, from the footers."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.parquet")):
        footer = pq.read_metadata(path)
        sizes = found.setdefault(path.name.split("-")[0], {"rows": 0, "bytes": 0, "file_bytes": 0, "files": 0})
        sizes["rows"] += footer.num_rows
        sizes["bytes"] += sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
        sizes["file_bytes"] += path.stat().st_size
        sizes["files"] += 1
    return {split: found[split] for split in SPLITS if split in found}
