"""Look at every row of a dataset, in processes where asked for: small records and findings come back, no pictures."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from data_preparation.generation.processes import leave_with_parent
from utils.checks import image_measures as measures
from utils.checks.findings import Findings
from utils.checks.pair_inspection import WORKING_SIDE, Inspection, inspect_row
from utils.data.rows import open_rows
from utils.data.sources import Source, open_source
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

CHUNK = 32  # rows that a worker is given at once
PICTURE = [
    ("height", "i4"),
    ("width", "i4"),
    ("bytes", "i8"),
    ("hash", "u8"),
    ("pixels", "u8"),
    ("brightness", "f4"),
    ("colourfulness", "f4"),
]
RECORD = np.dtype([("original", PICTURE), ("edited", PICTURE), ("tokens", "i4"), ("prompt", "u8")])  # 92 bytes a row
TASK_COLUMNS = ("task", "edit_type")


@dataclass(frozen=True)
class PairSet:
    """Where pairs are, as the training scripts are told; plain values, so that every worker can open it."""

    dataset: str
    config: str | None = None
    split: str = "train"
    original_image_column: str | None = None
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    max_rows: int | None = None  # that many, drawn at random by the seed 0
    cache_dir: str | None = None

    def open(self) -> Source:
        """The three columns, found as in training. Raises `InputError`."""
        return open_source(
            self.dataset,
            self.config,
            None,
            self.split,
            False,
            self.max_rows,
            self.cache_dir,
            self.original_image_column,
            self.edit_prompt_column,
            self.edited_image_column,
        )

    def open_others(self, source: Source, names: tuple[str, ...]) -> Any:
        """Of the other columns those named that exist, with the rows of `source`; None where there is none."""
        rows = open_rows(self.dataset, False, self.config, self.split, False, self.cache_dir)
        names = tuple(name for name in names if name in rows.column_names and name not in vars(source.columns).values())
        if not names:
            return None
        rows = rows.select_columns(list(names))
        return rows if source.row_numbers is None else rows.select(source.row_numbers)


@dataclass
class Scan:
    """What all rows gave. records: `RECORD` (rows,), zeros for what could not be read."""

    records: np.ndarray
    findings: Findings = field(default_factory=Findings)
    tasks: Counter = field(default_factory=Counter)


class _Chunk(NamedTuple):
    records: np.ndarray
    findings: list[tuple[str, int, str]]
    tasks: Counter


def scan_pairs(pairs: PairSet, num_rows: int, num_workers: int, tokenizer: str | None = None) -> Scan:
    """Inspect all rows. Memory: 92 bytes a row, and some chunks of rows in each worker. Raises `InputError`."""
    scan = Scan(np.zeros(num_rows, RECORD))
    for rows, chunk in run_chunks(partial(open_inspector, pairs, tokenizer), num_rows, num_workers, "Checking"):
        scan.records[rows.start : rows.stop] = chunk.records
        scan.tasks += chunk.tasks
        for finding in chunk.findings:
            scan.findings.add(*finding)
    return scan


def open_inspector(pairs: PairSet, tokenizer: str | None) -> Callable[[range], _Chunk]:
    """What a worker does with a chunk of rows."""
    source = pairs.open()
    others = pairs.open_others(source, TASK_COLUMNS)
    count_tokens = load_token_counter(tokenizer) if tokenizer else None
    columns = source.columns

    def inspect(rows: range) -> _Chunk:
        chunk = _Chunk(np.zeros(len(rows), RECORD), [], Counter())
        for place, row in enumerate(rows):
            values = source.rows[row]
            told = next(filter(None, others[row].values()), None) if others is not None else None
            told = str(told) if told is not None else None
            found = inspect_row(
                values[columns.original], values[columns.edited], values[columns.prompt], told, count_tokens
            )
            chunk.records[place] = _record(found)
            chunk.findings.extend((kind, row, detail) for kind, detail in found.findings)
            chunk.tasks[told or ""] += 1
        return chunk

    return inspect


def load_token_counter(folder: str) -> Callable[[str], int]:
    """Counts the tokens of a prompt, start and end included, by the tokenizer in a folder. Raises `InputError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {folder} cannot be opened: {str(error).splitlines()[0]}") from error
    return lambda prompt: len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def scan_hashes(pairs: PairSet, num_rows: int, num_workers: int) -> np.ndarray:
    """Hashes of every picture of a dataset, upright and mirrored: uint64 (rows, original and edited, 2)."""
    hashes = np.zeros((num_rows, 2, 2), np.uint64)
    label = f"Hashing {pairs.dataset}"
    for rows, chunk in run_chunks(partial(open_hasher, pairs), num_rows, num_workers, label):
        hashes[rows.start : rows.stop] = chunk
    return hashes


def open_hasher(pairs: PairSet) -> Callable[[range], np.ndarray]:
    source = pairs.open()
    names = (source.columns.original, source.columns.edited)

    def hash_rows(rows: range) -> np.ndarray:
        images = [source.rows[row] for row in rows]
        return np.array([[_hash_both_ways(row[name]) for name in names] for row in images], np.uint64)

    return hash_rows


def _hash_both_ways(value: object) -> tuple[int, int]:
    try:
        gray = measures.to_gray(np.asarray(decode_image(value, shorter_side=WORKING_SIDE // 2)))
    except BadRow:
        return 0, 0
    return measures.perceptual_hash(gray), measures.perceptual_hash(np.ascontiguousarray(gray[:, ::-1]))


def _record(found: Inspection) -> tuple:
    pictures = [
        (*p.size, p.num_bytes, p.hash, p.pixels, p.brightness, p.colourfulness) if p else (0,) * len(PICTURE)
        for p in (found.original, found.edited)
    ]
    return (*pictures, found.num_tokens, found.prompt_digest)


def run_chunks(open_worker: Callable, num_rows: int, num_workers: int, label: str) -> Iterator[tuple[range, Any]]:
    """(rows, result) of all chunks in order. open_worker() -> function of a range; picklable for processes."""
    chunks = [range(first, min(first + CHUNK, num_rows)) for first in range(0, num_rows, CHUNK)]
    with tqdm(total=num_rows, desc=label, unit=" rows") as progress:
        results = (
            _in_this_process(open_worker, chunks)
            if num_workers == 0
            else _in_processes(open_worker, chunks, num_workers)
        )
        for rows, result in zip(chunks, results, strict=True):
            yield rows, result
            progress.update(len(rows))


def _in_this_process(open_worker: Callable, chunks: list[range]) -> Iterator[Any]:
    cv2.setNumThreads(1)
    yield from map(open_worker(), chunks)


def _in_processes(open_worker: Callable, chunks: list[range], num_workers: int) -> Iterator[Any]:
    """No more chunks are under way than the workers need, so that results do not pile up."""
    waiting: deque = deque()
    # Not by forking: this process has threads of Arrow's and OpenCV's, which a fork would leave holding locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (open_worker,)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_run_chunk, chunk))
                if len(waiting) >= 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was ended from outside, most often for memory: give a lower --num_workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_work: Callable[[range], Any] | None = None  # of this worker process


def _start_worker(open_worker: Callable) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process says so
    leave_with_parent()
    cv2.setNumThreads(1)
    _work = open_worker()


def _run_chunk(chunk: range) -> Any:
    return _work(chunk)
