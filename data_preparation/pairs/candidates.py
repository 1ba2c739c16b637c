"""The candidates of a caption: their random values, their batches, which of them are kept, and what they cost."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from data_preparation.generation.inputs import Captions, OpenCaptions
from data_preparation.pairs.filters import CaptionFeatures
from data_preparation.pairs.prompt_to_prompt import count_shared_steps
from data_preparation.pairs.sampling import PairDraw
from data_preparation.pairs.settings import PairSettings
from utils.errors import InputError

CAPTION_REASON = "caption: "  # prefix of reasons to reject a whole caption, not one candidate
TOO_MANY = "more than --max_out_samples"
IMAGE_NAME_COLUMNS = ("file_name", "image", "photograph", "image_file", "source")


class Candidate(NamedTuple):
    """A sampled pair. index: number of the candidate of its caption; original, edited: uint8 (R, R, 3)."""

    index: int
    draw: PairDraw
    scores: dict[str, float]
    original: np.ndarray
    edited: np.ndarray


@dataclass
class CaptionJob:
    """A caption and the state of its sampling. output: the edited caption; passed: candidates that may be kept."""

    item: int
    caption: str
    edit: str
    output: str
    source: str
    features: CaptionFeatures
    license: str | None = None  # of the photograph, or of the captions
    photograph: np.ndarray | None = None  # uint8 (R, R, 3)
    latents: torch.Tensor | None = None  # of the photograph, (1, 4, h, w)
    passed: list[Candidate] = field(default_factory=list)
    num_candidates: int = 0
    unet_rows: int = 0
    is_done: bool = False


def open_prompts(prompts: Captions) -> OpenCaptions:
    """The captions. Raises InputError if the columns edit and output are missing."""
    opened = prompts.open()
    columns = opened.row(0)
    missing = [name for name in ("edit", "output") if name not in columns]
    if missing:
        given = f"no text column {' and '.join(missing)}, only {', '.join(columns)}"
        raise InputError(f"--prompts {prompts.dataset_id}: {given}; generate_captions.py adds them to captions")
    return opened


def read_text(row: dict, column: str) -> str:
    """The text without surrounding whitespace, "" if there is none."""
    return (row.get(column) or "").strip()


def find_image_name(row: dict, column: str | None) -> str:
    """The name of a caption's photograph: in `column`, by default in the first of `IMAGE_NAME_COLUMNS` with a text."""
    columns = (column,) if column else IMAGE_NAME_COLUMNS
    return next((text for name in columns if (text := read_text(row, name))), "")


def draw_candidate(seed: int, item: int, index: int, settings: PairSettings, num_steps: int) -> PairDraw:
    """The random values of a candidate, from (seed, caption, index) alone. num_steps: steps that run."""
    # The highest word of the counter is the index, so that the random numbers of two candidates cannot overlap.
    rng = np.random.Generator(np.random.Philox(key=[seed, item], counter=[0, 0, 0, index]))
    # 32 bits, because torch's CPU generator ignores further bits of a seed.
    noise_seed, guidance = int(rng.integers(2**32)), float(rng.uniform(*settings.guidance_range))
    if settings.share_steps is None and settings.share_range is not None:
        threshold = float(rng.uniform(*settings.share_range))
        return PairDraw(noise_seed, count_shared_steps(threshold, num_steps), guidance, threshold)
    low, high = settings.share_steps or (1, num_steps - 1)
    return PairDraw(noise_seed, int(rng.integers(low, high + 1)), guidance)


def plan_batches(jobs: list[CaptionJob], num_samples: int, batch_size: int) -> Iterator[list[tuple[CaptionJob, int]]]:
    """Batches of (caption, candidate index): the first candidate of all captions, then the second, and so on.

    Captions that are done by then are skipped: the more captions there are, the less an early stop wastes.
    """
    batch = []
    for index in range(num_samples):
        for job in jobs:
            if not job.is_done:
                batch.append((job, index))
            if len(batch) == batch_size:
                yield batch
                batch = []
    batch = [(job, index) for job, index in batch if not job.is_done]
    if batch:
        yield batch


def best_first(candidate: Candidate) -> tuple[float, int]:
    """Sort key: by directional similarity, as in the code of InstructPix2Pix."""
    return -candidate.scores["clip_sim_dir"], candidate.index


def trim_passed(job: CaptionJob, settings: PairSettings, rejected: Counter) -> None:
    """Keep `max_out_samples` candidates: the first that passed with an early stop, else the best.

    The kept pairs do not depend on the batch size.
    """
    limit = settings.max_out_samples
    if not settings.early_stop:
        job.passed.sort(key=best_first)
    job.is_done = settings.early_stop and len(job.passed) >= limit
    if len(job.passed) > limit:
        rejected[TOO_MANY] += len(job.passed) - limit
        del job.passed[limit:]


def count_candidates(rows: int, rejected: Mapping[str, int]) -> int:
    """The number of sampled candidates: each is a row or counted under the reason of its rejection."""
    return rows + sum(count for reason, count in rejected.items() if not reason.startswith(CAPTION_REASON))


def describe_cost(data_root: Path, rows: int, rejected: Mapping[str, int]) -> str:
    """One line: candidates and UNet rows of a dataset with at least one row, in total and per kept pair."""
    first = next(iter(sorted((data_root / "data").glob("*.parquet"))))
    batch = next(pq.ParquetFile(first).iter_batches(1, columns=["settings"]))
    settings = json.loads(batch["settings"][0].as_py())
    per_candidate, candidates = settings["unet_rows"] // settings["candidates"], count_candidates(rows, rejected)
    total = candidates * per_candidate
    return (
        f"{candidates:,} candidates, {per_candidate:,} UNet rows each: {total:,}, or {total / rows:,.0f} per kept pair"
    )
