"""From captions to rows of a pair set: candidates are drawn, sampled in batches, judged, and the best are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from data_preparation.generation.inputs import BadRow, Captions, Photographs
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.runner import GeneratedRows
from data_preparation.pairs.candidates import (
    CAPTION_REASON,
    CaptionJob,
    Kept,
    by_direction,
    draw_candidate,
    plan_batches,
    trim,
)
from data_preparation.pairs.clip_filter import find_fault, similarity_of
from data_preparation.pairs.image_checks import load_checks
from data_preparation.pairs.models import ModelChoice, load_clip, load_pipeline
from data_preparation.pairs.photograph_start import PhotographStart, encode_photographs
from data_preparation.pairs.presets import PairSettings, effective_steps
from data_preparation.pairs.prompts import find_image_name, read_text
from data_preparation.pairs.sampling import decode, sample_pairs
from data_preparation.photographs import centre_square
from utils.editing.edit_images import native_resolution, size_multiple
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.models.conditioning import make_prompt_encoder
from utils.runtime import choose_device

NOT_FINITE = "values that are no finite numbers"


@dataclass(frozen=True)
class PairRecipe:
    """What one run makes: all of it plain values. An item is a caption; `models` goes into the rows."""

    num_items: int
    prompts: Captions
    settings: PairSettings
    choice: ModelChoice
    models: list[dict[str, str]]
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    dtype: str | None = None
    image_format: str = "jpeg100"
    photographs: Photographs | None = None
    init_image_column: str | None = None
    image_check: str | None = None

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> PairMaker:
        return PairMaker(self, rank)


class PairMaker:
    """The maker of a worker: the models stay loaded from one batch of captions to the next."""

    def __init__(self, recipe: PairRecipe, rank: int) -> None:
        self.recipe, self.settings = recipe, recipe.settings
        device, dtype = choose_device(_place(recipe.device, rank), recipe.dtype)
        if device == "cpu":
            torch.set_num_threads(1)  # the number of threads would decide the last bits
        self.prompts = recipe.prompts.open()
        self.photographs = recipe.photographs.open() if recipe.photographs else None
        self.places = self._find_photographs() if recipe.photographs else {}
        self.pipeline = load_pipeline(recipe.choice, dtype, device)
        self.encoder = make_prompt_encoder(self.pipeline)
        self.scheduler = choose_scheduler(
            self.pipeline.scheduler, self.settings.scheduler, self.settings.timestep_spacing
        )
        require_usable(self.scheduler, self.settings.original)
        self.clip = load_clip(recipe.choice, device)
        self.checks = load_checks(recipe.choice, recipe.image_check, self.pipeline)
        self.has_made_numbers = False
        self.resolution = self.settings.resolution or native_resolution(self.pipeline)
        if self.resolution % size_multiple(self.pipeline):
            raise InputError(
                f"--resolution {self.resolution}: must be a multiple of {size_multiple(self.pipeline)} for this model"
            )

    def __call__(self, items: range) -> GeneratedRows:
        rejected: Counter = Counter()
        jobs = [job for job in (self._begin(item, rejected) for item in items) if job]
        for batch in plan_batches(jobs, self.settings.num_samples, self.recipe.batch_size):
            self._try(batch, rejected)
        without = sum(not job.passed for job in jobs)
        rejected |= {f"{CAPTION_REASON}no candidate passed": without} if without else {}
        rows = [self._make_row(job, kept) for job in jobs for kept in sorted(job.passed, key=by_direction)]
        return GeneratedRows(rows, dict(rejected))

    def _begin(self, item: int, rejected: Counter) -> CaptionJob | None:
        """The caption of an item; None, and the reason counted, where no pair can come of it."""
        row = self.prompts.row(item)
        caption, edit, output = (read_text(row, name) for name in (self.prompts.column, "edit", "output"))
        if not (caption and edit and output):
            return _reject(rejected, "no caption, edit or output")
        if caption.casefold() == output.casefold():
            return _reject(rejected, "the edited caption is the caption")
        features = self.clip.encode_captions(caption, output)
        limit = self.settings.max_clip_text
        if limit is not None and similarity_of(features) > limit:
            return _reject(rejected, f"captions more alike than {limit}")
        source = read_text(row, "url") or read_text(row, "source") or self.prompts.name(item)
        job = CaptionJob(item, caption, edit, output, source, features)
        return self._add_photograph(job, row, rejected) if self.photographs else job

    def _add_photograph(self, job: CaptionJob, row: dict, rejected: Counter) -> CaptionJob | None:
        place = (
            job.item if self.places is None else self.places.get(find_image_name(row, self.recipe.init_image_column))
        )
        if place is None or place >= len(self.photographs):
            return _reject(rejected, "its photograph is not in --init_images")
        try:
            job.photograph = centre_square(self.photographs.read(place), self.resolution)
        except BadRow as error:
            return _reject(rejected, f"its photograph is unusable: {error.reason}")
        job.source = self.photographs.name(place)
        job.latents = encode_photographs(self.pipeline, [job.photograph])
        return job

    def _find_photographs(self) -> dict[str, int] | None:
        """Number of each photograph by its name; None where prompts and photographs are rows of one dataset."""
        if self.recipe.photographs.dataset_id == self.recipe.prompts.dataset_id:
            return None
        names = ((self.photographs.name(place), place) for place in range(len(self.photographs)))
        return {key: place for name, place in names for key in (name, name.rpartition("/")[2])}

    def _try(self, batch: list[tuple[CaptionJob, int]], rejected: Counter) -> None:
        """Sample and judge candidates, each given by its caption and the number of its sample."""
        jobs = [job for job, _ in batch]
        drawn = [
            draw_candidate(self.recipe.seed, job.item, sample, self.settings, self._steps) for job, sample in batch
        ]
        texts = self.encoder([text for job in jobs for text in (job.caption, job.output)])
        with explaining_out_of_memory():
            sampled = sample_pairs(
                self.pipeline,
                self.scheduler,
                self.settings.num_inference_steps,
                texts,
                self.encoder.null_embeds,
                [each.pair for each in drawn],
                (self.resolution, self.resolution),
                self._start(jobs),
            )
            originals, edited, finite = self._decode(sampled.latents, jobs)
        scores = self.clip.score(originals, edited, [job.features for job in jobs])
        for index, (job, sample) in enumerate(batch):
            kept = Kept(sample, drawn[index], scores[index], originals[index], edited[index])
            job.num_candidates += 1
            job.unet_rows += sampled.unet_rows // len(batch)
            fault = find_fault(kept.scores, self.settings) if finite[index] else NOT_FINITE
            if fault := fault or self._find_flag(kept):
                rejected[fault] += 1
            else:
                job.passed.append(kept)
        for job in {id(job): job for job in jobs}.values():
            trim(job, self.settings, rejected)

    def _start(self, jobs: list[CaptionJob]) -> PhotographStart | None:
        if not self.photographs:
            return None
        latents = torch.cat([job.latents for job in jobs])
        return PhotographStart(latents, self.settings.strength, keeps_photograph=self.settings.original == "real")

    def _decode(self, latents: torch.Tensor, jobs: list[CaptionJob]) -> tuple[list, list, list[bool]]:
        """Originals and edited pictures, uint8 (R, R, 3), and whether all values of each pair were finite numbers.

        Where the original is to be real, it is the photograph.
        """
        if self.settings.original == "real":
            pictures, finite = decode(self.pipeline, latents[1::2])
            decoded = [job.photograph for job in jobs], list(pictures), finite
        else:
            pictures, finite = decode(self.pipeline, latents)
            pairs = zip(finite[::2], finite[1::2], strict=True)
            decoded = list(pictures[::2]), list(pictures[1::2]), [first and second for first, second in pairs]
        self.has_made_numbers |= any(decoded[2])
        if not self.has_made_numbers:  # no accident of one candidate
            raise InputError(
                f"{NOT_FINITE} in every picture: give --dtype fp32 or bf16, for SDXL in fp16 --vae "
                "madebyollin/sdxl-vae-fp16-fix, and look whether the weights are whole"
            )
        return decoded

    def _find_flag(self, kept: Kept) -> str | None:
        """Asked only of what CLIP has passed, which is far less."""
        pictures = [kept.original, kept.edited]
        return next((reason for reason, check in self.checks.items() if any(check(pictures))), None)

    @property
    def _steps(self) -> int:
        return effective_steps(self.settings) if self.photographs else self.settings.num_inference_steps

    def _make_row(self, job: CaptionJob, kept: Kept) -> dict:
        recipe, inputs = self.recipe, self.photographs or self.prompts
        pair, threshold = kept.drawn
        drawn = {"sample": kept.sample, "steps": self._steps, "share_steps": pair.share_steps}
        drawn |= {"p2p_threshold": threshold, "guidance": pair.guidance}
        cost = {"candidates": job.num_candidates, "unet_rows": job.unet_rows}
        start = {"strength": self.settings.strength, "original": self.settings.original} if self.photographs else {}
        return make_pair(
            kept.original,
            job.edit,
            kept.edited,
            image_format=recipe.image_format,
            original_prompt=job.caption,
            edited_prompt=job.output,
            source=job.source,
            source_dataset=inputs.dataset,
            source_license=inputs.license,
            models=recipe.models,
            seed=pair.seed,
            settings=drawn | cost | start,
            scores=kept.scores,
        )


def require_usable(scheduler: Any, original: str) -> None:
    """Refuse a model's own scheduler where shared steps or a real original would not be what they are called."""
    name = type(scheduler).__name__
    if scheduler.order != 1:
        raise InputError(f"{name}, the scheduler of the model, asks the UNet twice in a step: give another --scheduler")
    if original == "real" and name.startswith("EDM"):
        raise InputError(f"--original real is not possible with the noise levels of {name}: give --original generated")


@contextmanager
def explaining_out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and what the CPU and mps raise in its stead
        if not any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise
        raise InputError("out of memory: give a smaller --batch_size or --resolution, or --dtype fp16") from error


def _reject(rejected: Counter, reason: str) -> None:
    rejected[CAPTION_REASON + reason] += 1


def _place(device: str, rank: int) -> str:
    """Workers of one machine share its GPUs by their rank, unless one is named."""
    if device in ("auto", "cuda") and (count := torch.cuda.device_count()):
        return f"cuda:{rank % count}"
    return device
