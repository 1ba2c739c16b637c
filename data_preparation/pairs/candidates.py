"""The candidates of a caption: what is drawn for each, which are tried together, which are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from data_preparation.pairs.clip_filter import CaptionFeatures
from data_preparation.pairs.presets import PairSettings
from data_preparation.pairs.prompt_to_prompt import count_shared_steps
from data_preparation.pairs.sampling import PairDraw

CAPTION_REASON = "caption: "  # how reasons begin that a whole caption is rejected for, and not a candidate
TOO_MANY = "more than --max_out_samples"


class Drawn(NamedTuple):
    """threshold: the reference's, where the number of shared steps comes from one."""

    pair: PairDraw
    threshold: float | None


class Kept(NamedTuple):
    """A candidate that has passed; pictures are uint8 (R, R, 3)."""

    sample: int
    drawn: Drawn
    scores: dict[str, float]
    original: np.ndarray
    edited: np.ndarray


@dataclass
class CaptionJob:
    """One caption on its way: what is wanted of it, and what has come out so far."""

    item: int
    caption: str
    edit: str
    output: str
    source: str
    features: CaptionFeatures
    photograph: np.ndarray | None = None  # uint8 (R, R, 3)
    latents: torch.Tensor | None = None  # of the photograph, (1, 4, h, w)
    passed: list[Kept] = field(default_factory=list)
    num_candidates: int = 0
    unet_rows: int = 0
    is_done: bool = False


def draw_candidate(seed: int, item: int, sample: int, settings: PairSettings, num_steps: int) -> Drawn:
    """What is random about a candidate, from (seed, caption, sample) alone.

    num_steps: those that are really taken. The noise comes from the pair's seed, of 32 bits as torch's CPU generator
    looks at no more.
    """
    # The counter's highest word numbers the sample, so that no two samples of a caption can overlap.
    rng = np.random.Generator(np.random.Philox(key=[seed, item], counter=[0, 0, 0, sample]))
    noise_seed, guidance = int(rng.integers(2**32)), float(rng.uniform(*settings.guidance_range))
    if settings.share_steps is None and settings.share_range is not None:
        threshold = float(rng.uniform(*settings.share_range))
        return Drawn(PairDraw(noise_seed, count_shared_steps(threshold, num_steps), guidance), threshold)
    least, most = settings.share_steps or (1, num_steps - 1)
    return Drawn(PairDraw(noise_seed, int(rng.integers(least, most + 1)), guidance), None)


def plan_batches(jobs: list[CaptionJob], num_samples: int, batch_size: int) -> Iterator[list[tuple[CaptionJob, int]]]:
    """Batches of (caption, number of the sample): the first sample of all captions, then the second ...

    A caption that is done by the time gets no more: with few captions at once an early stop wastes more.
    """
    batch = []
    for sample in range(num_samples):
        for job in jobs:
            if not job.is_done:
                batch.append((job, sample))
            if len(batch) == batch_size:
                yield batch
                batch = []
    batch = [(job, sample) for job, sample in batch if not job.is_done]
    if batch:
        yield batch


def by_direction(kept: Kept) -> tuple[float, int]:
    """The order of the reference: by directional similarity, the best first."""
    return -kept.scores["clip_sim_dir"], kept.sample


def trim(job: CaptionJob, settings: PairSettings, rejected: Counter) -> None:
    """Hold no more than are kept: the first that pass with an early stop, else the best by direction.

    So the pairs that are kept do not depend on the size of the batches.
    """
    most = settings.max_out_samples
    if not settings.early_stop:
        job.passed.sort(key=by_direction)
    job.is_done = settings.early_stop and len(job.passed) >= most
    if len(job.passed) > most:
        rejected[TOO_MANY] += len(job.passed) - most
        del job.passed[most:]
