"""Inspect every row of a dataset, optionally in worker processes. Small records and findings come back, no images."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data_preparation.generation.processes import run_in_processes
from utils.checks.findings import Findings
from utils.checks.near_copies import hash_both_ways
from utils.checks.pair_inspection import Inspection, inspect_row
from utils.data.rows import open_rows
from utils.data.sources import Source, open_source
from utils.errors import InputError

ROWS_PER_JOB = 32
IMAGE_FIELDS = ["height", "width", "bytes", "hash", "pixels", "brightness", "colourfulness"]
IMAGE_RECORD = np.dtype({"names": IMAGE_FIELDS, "formats": ["i4", "i4", "i8", "u8", "u8", "f4", "f4"]})
ROW_RECORD = np.dtype([("original", IMAGE_RECORD), ("edited", IMAGE_RECORD), ("tokens", "i4"), ("prompt", "u8")])
TASK_COLUMNS = ("task", "edit_type")


@dataclass(frozen=True)
class DatasetToCheck:
    """Arguments of `open_source`; picklable, so that every worker opens the dataset for itself."""

    dataset_name: str
    dataset_config_name: str | None = None
    split: str = "train"
    original_image_column: str | None = None
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    max_train_samples: int | None = None  # a random subset, the same in every run
    cache_dir: str | None = None

    def open(self) -> Source:
        """The three columns, found as in training. Raises InputError."""
        return open_source(**vars(self))

    def open_other_columns(self, source: Source, names: tuple[str, ...]) -> Any:
        """Those of the columns `names` that exist, for the rows of `source`; None if there are none."""
        rows = open_rows(self.dataset_name, False, self.dataset_config_name, self.split, False, self.cache_dir)
        names = [name for name in names if name in rows.column_names and name not in vars(source.columns).values()]
        if not names:
            return None
        rows = rows.select_columns(names)
        return rows if source.row_numbers is None else rows.select(source.row_numbers)


def scan_rows(
    dataset: DatasetToCheck, num_rows: int, num_workers: int, tokenizer: str | None
) -> tuple[np.ndarray, Findings, Counter]:
    """Inspect each row by itself. Returns `ROW_RECORD` (rows,), findings, and the number of rows of each task.

    Images that cannot be read have records of zeros. Raises InputError.
    """
    records, findings, tasks = np.zeros(num_rows, ROW_RECORD), Findings(), Counter()
    open_worker = partial(open_inspector, dataset, tokenizer)
    for rows, inspected in run_jobs(open_worker, num_rows, num_workers, "Checking"):
        for row, (record, row_findings, task) in zip(rows, inspected, strict=True):
            records[row] = record
            tasks[task] += 1
            for kind, detail in row_findings:
                findings.add(kind, row, detail)
    return records, findings, tasks


def open_inspector(dataset: DatasetToCheck, tokenizer: str | None, rank: int) -> Callable[[range], list[tuple]]:
    """The function of a worker: range of rows -> (record, findings, task) of each row."""
    cv2.setNumThreads(1)
    source = dataset.open()
    others = dataset.open_other_columns(source, TASK_COLUMNS)
    count_tokens = load_token_counter(tokenizer) if tokenizer else None
    columns = source.columns

    def inspect(rows: range) -> list[tuple]:
        inspected = []
        for row in rows:
            values = source.rows[row]
            task = next(filter(None, others[row].values()), None) if others is not None else None
            task = None if task is None else str(task)
            inspection = inspect_row(
                values[columns.original], values[columns.edited], values[columns.prompt], task, count_tokens
            )
            inspected.append((summarize_inspection(inspection), inspection.findings, task or ""))
        return inspected

    return inspect


def load_token_counter(folder: str) -> Callable[[str], int]:
    """A function that counts the tokens of a prompt, including start and end tokens. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return lambda prompt: len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def summarize_inspection(inspection: Inspection) -> tuple:
    """A row of `ROW_RECORD`."""
    images = [
        (*image.size, image.num_bytes, image.hash, image.pixels, image.brightness, image.colourfulness)
        if image
        else (0,) * len(IMAGE_FIELDS)
        for image in (inspection.original, inspection.edited)
    ]
    return (*images, inspection.num_tokens, inspection.prompt_digest)


def scan_hashes(dataset: DatasetToCheck, num_rows: int, num_workers: int) -> np.ndarray:
    """Perceptual hashes of every image: uint64 (rows, original and edited, as stored and mirrored)."""
    label = f"Hashing {dataset.dataset_name}"
    results = [result for _, result in run_jobs(partial(open_hasher, dataset), num_rows, num_workers, label)]
    return np.concatenate(results) if results else np.zeros((0, 2, 2), np.uint64)


def open_hasher(dataset: DatasetToCheck, rank: int) -> Callable[[range], np.ndarray]:
    """The function of a worker: range of rows -> their hashes."""
    cv2.setNumThreads(1)
    source = dataset.open()
    columns = (source.columns.original, source.columns.edited)

    def hash_rows(rows: range) -> np.ndarray:
        images = [source.rows[row] for row in rows]
        return np.array([[hash_both_ways(row[name]) for name in columns] for row in images], np.uint64)

    return hash_rows


def run_jobs(
    open_worker: Callable[[int], Callable[[range], Any]], num_rows: int, num_workers: int, label: str
) -> Iterator[tuple[range, Any]]:
    """(rows, result) of every job, in the order of the rows. num_workers: 0 for this process."""
    starts = range(0, num_rows, ROWS_PER_JOB)
    jobs = {number: range(start, min(start + ROWS_PER_JOB, num_rows)) for number, start in enumerate(starts)}
    early, following = {}, 0  # workers finish in any order
    with tqdm(total=num_rows, desc=label, unit=" rows") as progress:
        for number, result in run_in_processes(open_worker, jobs, num_workers):
            early[number] = result
            progress.update(len(jobs[number]))
            while following in early:
                yield jobs[following], early.pop(following)
                following += 1
