"""Inspect every row of a dataset by the runner of the generators. Small records and findings come back, no images."""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import pyarrow.parquet as pq

from data_preparation.generation.dataset_folder import FolderInUse
from data_preparation.generation.runner import GeneratedRows, RowGenerator, WorkerSettings, run_generation
from utils.checks.findings import Findings
from utils.checks.near_copies import hash_both_ways
from utils.checks.pair_inspection import Inspection, inspect_row
from utils.data.rows import open_rows
from utils.data.sources import Source, open_source, sources_digest
from utils.errors import InputError

ROWS_PER_JOB = 128
SCAN_VERSION = 3  # raise it when a check changes, so that no half of a scan is from another version
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
    dataset: DatasetToCheck, source: Source, num_workers: int, tokenizer: str | None
) -> tuple[np.ndarray, Findings, Counter]:
    """Inspect each row by itself. Returns `ROW_RECORD` (rows,), findings, and the number of rows of each task.

    source: the opened dataset. Images that cannot be read have records of zeros. Raises InputError.
    """
    records, findings, tasks = np.zeros(len(source.rows), ROW_RECORD), Findings(), Counter()
    generator = RowInspections(dataset, len(source.rows), tokenizer)
    settings = {"tokenizer": tokenizer}
    for row, values in enumerate(_scan(generator, source, dataset.cache_dir, settings, num_workers)):
        records[row] = np.frombuffer(values["record"], ROW_RECORD)[0]
        tasks[values["task"]] += 1
        for kind, detail in json.loads(values["findings"]):
            findings.add(kind, row, detail)
    return records, findings, tasks


def scan_hashes(dataset: DatasetToCheck, source: Source, num_workers: int) -> np.ndarray:
    """Perceptual hashes of every image: uint64 (rows, original and edited, as stored and mirrored)."""
    hashes = np.zeros((len(source.rows), 2, 2), np.uint64)
    generator = RowHashes(dataset, len(source.rows))
    for row, values in enumerate(_scan(generator, source, dataset.cache_dir, {"hashes": True}, num_workers)):
        hashes[row] = np.frombuffer(values["record"], np.uint64).reshape(2, 2)
    return hashes


def _scan(
    generator: RowGenerator, source: Source, cache_dir: str | None, settings: dict[str, Any], num_workers: int
) -> Iterator[dict]:
    """The rows of a generator, one for each row of the dataset, in order.

    They are kept in the cache of datasets until the scan is complete: the same command goes on after a kill. A second
    check of the same data at the same time keeps its own, and so does one whose cache cannot be written.
    """
    if not generator.num_items:
        return
    settings = {"version": SCAN_VERSION, "data": sources_digest([source]), **settings}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checks" / digest
    run = partial(
        run_generation,
        generator,
        settings=settings,
        items_per_shard=ROWS_PER_JOB,
        workers=WorkerSettings(num_workers),
        unit="row",
    )
    own = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run(data_root=folder)
        # Another check of the same data may have finished in the same folder: only one of them can take it.
        own = Path(tempfile.mkdtemp(prefix=f"{digest}-", dir=folder.parent))
        folder.rename(own / "scan")
    except (FolderInUse, OSError):
        own = own or Path(tempfile.mkdtemp(prefix="check-"))
        run(data_root=own / "scan")
    for path in sorted((own / "scan/data").glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()
    shutil.rmtree(own, ignore_errors=True)


@dataclass(frozen=True)
class RowInspections:
    """A `RowGenerator`: each row of a dataset -> its record, its task and its findings."""

    dataset: DatasetToCheck
    num_items: int
    tokenizer: str | None = None

    def features(self) -> datasets.Features:
        text = datasets.Value("string")
        return datasets.Features({"record": datasets.Value("binary"), "task": text, "findings": text})

    def open(self, rank: int) -> Callable[[range], GeneratedRows]:
        cv2.setNumThreads(1)
        source = self.dataset.open()
        others = self.dataset.open_other_columns(source, TASK_COLUMNS)
        count_tokens = load_token_counter(self.tokenizer) if self.tokenizer else None
        columns = source.columns

        def inspect(row: int) -> dict[str, Any]:
            values = source.rows[row]
            task = next(filter(None, others[row].values()), None) if others is not None else None
            inspection = inspect_row(
                values[columns.original],
                values[columns.edited],
                values[columns.prompt],
                None if task is None else str(task),
                count_tokens,
            )
            record = np.array([summarize_inspection(inspection)], ROW_RECORD).tobytes()
            return {"record": record, "task": str(task or ""), "findings": json.dumps(inspection.findings)}

        return lambda rows: GeneratedRows([inspect(row) for row in rows])


@dataclass(frozen=True)
class RowHashes:
    """A `RowGenerator`: each row of a dataset -> the hashes of its images."""

    dataset: DatasetToCheck
    num_items: int

    def features(self) -> datasets.Features:
        return datasets.Features({"record": datasets.Value("binary")})

    def open(self, rank: int) -> Callable[[range], GeneratedRows]:
        cv2.setNumThreads(1)
        source = self.dataset.open()
        columns = (source.columns.original, source.columns.edited)

        def hash_row(row: int) -> dict[str, bytes]:
            values = source.rows[row]
            return {"record": np.array([hash_both_ways(values[name]) for name in columns], np.uint64).tobytes()}

        return lambda rows: GeneratedRows([hash_row(row) for row in rows])


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
