"""The rows of generate_pairs.py: candidates of each caption are sampled in batches and scored; the best are kept."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from data_preparation.generation.inputs import Captions, Photographs
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.runner import GeneratedRows, GenerateRows
from data_preparation.pairs import candidates
from data_preparation.pairs.candidates import CAPTION_REASON, Candidate, CaptionJob, best_first, read_text
from data_preparation.pairs.filters import find_violated_bound
from data_preparation.pairs.models import ModelChoice, load_checks, load_clip, load_pipeline
from data_preparation.pairs.sampling import PhotographStart, decode, encode_photograph, sample_pairs
from data_preparation.pairs.settings import PairSettings, num_used_steps
from data_preparation.photographs import centre_square
from utils.editing.edit_images import explaining_out_of_memory, native_resolution, size_multiple
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.models.conditioning import make_prompt_encoder
from utils.pixels import BadRow
from utils.runtime import choose_device

NOT_FINITE = "values that are not finite"
OVERFLOW_ADVICE = "give --dtype fp32 or bf16, or for SDXL in fp16 --vae madebyollin/sdxl-vae-fp16-fix"


@dataclass(frozen=True)
class CaptionPairGenerator:
    """A `RowGenerator`; an item is a caption. The fields are flags, except `models`, the "models" column."""

    num_items: int
    prompts: Captions
    settings: PairSettings
    choice: ModelChoice
    models: list[dict[str, str]]
    photographs: Photographs | None
    seed: int
    batch_size: int
    device: str
    dtype: str | None
    image_format: str
    init_image_column: str | None
    image_check: str | None

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> GenerateRows:
        return _CaptionPairWorker(self, rank).generate


class _CaptionPairWorker:
    def __init__(self, generator: CaptionPairGenerator, rank: int) -> None:
        self.generator, self.settings = generator, generator.settings
        device, dtype = choose_device(generator.device, generator.dtype, rank=rank)
        if device == "cpu":
            torch.set_num_threads(1)  # the number of threads would change the last bits
        self.prompts = generator.prompts.open()
        self.photographs = generator.photographs.open() if generator.photographs else None
        self.photograph_indices = self._index_photographs()
        self.num_steps = num_used_steps(self.settings, has_photographs=self.photographs is not None)
        self.pipeline = load_pipeline(generator.choice, dtype, device)
        self.encoder = make_prompt_encoder(self.pipeline)
        spacing = self.settings.timestep_spacing
        self.scheduler = choose_scheduler(self.pipeline.scheduler, self.settings.scheduler, spacing)
        require_supported(self.scheduler, self.settings.original)
        self.clip = load_clip(generator.choice, device)
        self.checks = load_checks(generator.choice, generator.image_check, self.pipeline)
        self.has_finite_images = False
        self.resolution = self.settings.resolution or native_resolution(self.pipeline)
        multiple = size_multiple(self.pipeline)
        if self.resolution % multiple:
            raise InputError(f"--resolution {self.resolution}: must be a multiple of {multiple} for this model")

    def _index_photographs(self) -> dict[str, int] | None:
        """Indices of the photographs by name; None if prompts and photographs are columns of the same dataset."""
        if not self.photographs or self.generator.photographs.dataset_id == self.generator.prompts.dataset_id:
            return None
        names = ((self.photographs.name(index), index) for index in range(len(self.photographs)))
        return {key: index for name, index in names for key in (name, name.rpartition("/")[2])}

    def generate(self, items: range) -> GeneratedRows:
        rejected: Counter = Counter()
        jobs = [job for item in items if (job := self._start_job(item, rejected))]
        for batch in candidates.plan_batches(jobs, self.settings.num_samples, self.generator.batch_size):
            self._sample_batch(batch, rejected)
        if num_empty := sum(not job.passed for job in jobs):
            rejected[f"{CAPTION_REASON}no candidate passed"] = num_empty
        rows = [self._make_row(job, kept) for job in jobs for kept in sorted(job.passed, key=best_first)]
        return GeneratedRows(rows, dict(rejected))

    def _start_job(self, item: int, rejected: Counter) -> CaptionJob | None:
        """The job of a caption; None, and the reason counted, if it cannot have pairs."""
        row = self.prompts.row(item)
        caption, edit, output = (read_text(row, name) for name in (self.prompts.column, "edit", "output"))
        reason, limit = None, self.settings.max_clip_text
        if not (caption and edit and output):
            reason = "no caption, edit or output"
        elif caption.casefold() == output.casefold():
            reason = "the edited caption is the caption"
        else:
            source = read_text(row, "url") or read_text(row, "source") or self.prompts.name(item)
            features = self.clip.encode_captions(caption, output)
            job = CaptionJob(item, caption, edit, output, source, features, self.prompts.license)
            if limit is not None and job.features.similarity > limit:
                reason = f"similarity of the captions above {limit}"
            elif self.photographs:
                reason = self._add_photograph(job, row)
        if reason:
            rejected[CAPTION_REASON + reason] += 1
            return None
        return job

    def _add_photograph(self, job: CaptionJob, row: dict) -> str | None:
        """Read the photograph of a caption; returns why it cannot be used, or None."""
        index = job.item
        if self.photograph_indices is not None:
            index = self.photograph_indices.get(candidates.find_image_name(row, self.generator.init_image_column))
        if index is None or index >= len(self.photographs):
            return "its photograph is not in --init_images"
        try:
            job.photograph = centre_square(self.photographs.read(index, self.resolution), self.resolution)
        except BadRow as error:
            return f"its photograph is unusable: {error.reason}"
        job.source, job.license = self.photographs.name(index), self.photographs.license_of(index)
        job.latents = encode_photograph(self.pipeline, job.photograph)
        return None

    def _sample_batch(self, batch: list[tuple[CaptionJob, int]], rejected: Counter) -> None:
        """Sample and filter candidates, each given as (caption, candidate index)."""
        settings, jobs = self.settings, [job for job, _ in batch]
        seed = self.generator.seed
        draws = [candidates.draw_candidate(seed, job.item, index, settings, self.num_steps) for job, index in batch]
        texts = self.encoder([text for job in jobs for text in (job.caption, job.output)])
        start = None
        if self.photographs:
            latents = torch.cat([job.latents for job in jobs])
            start = PhotographStart(latents, self.num_steps, keeps_photograph=settings.original == "real")
        with explaining_out_of_memory():
            steps, null = settings.num_inference_steps, self.encoder.null_embeds
            sampled = sample_pairs(self.pipeline, self.scheduler, steps, texts, null, draws, self.resolution, start)
            originals, edited, finite = self._decode(sampled.latents, jobs)
        scores = self.clip.score(originals, edited, [job.features for job in jobs])
        for number, (job, index) in enumerate(batch):
            candidate = Candidate(index, draws[number], scores[number], originals[number], edited[number])
            job.num_candidates += 1
            job.unet_rows += sampled.unet_rows // len(batch)
            reason = find_violated_bound(candidate.scores, settings) if finite[number] else NOT_FINITE
            images = [candidate.original, candidate.edited]
            reason = reason or next((flag for flag, check in self.checks.items() if any(check(images))), None)
            if reason:
                rejected[reason] += 1
            else:
                job.passed.append(candidate)
        for job in {id(job): job for job in jobs}.values():
            candidates.trim_passed(job, settings, rejected)

    def _decode(self, latents: torch.Tensor, jobs: list[CaptionJob]) -> tuple[list, list, list[bool]]:
        """Original and edited images, uint8 (R, R, 3), and whether all values of each pair were finite."""
        if self.settings.original == "real":
            images, finite = decode(self.pipeline, latents[1::2])
            originals, edited = [job.photograph for job in jobs], list(images)
        else:
            images, finite = decode(self.pipeline, latents)
            originals, edited = list(images[::2]), list(images[1::2])
            finite = [first and second for first, second in zip(finite[::2], finite[1::2], strict=True)]
        self.has_finite_images |= any(finite)
        if not self.has_finite_images:  # not a problem of single candidates
            raise InputError(f"{NOT_FINITE} in all images: {OVERFLOW_ADVICE}")
        return originals, edited, finite

    def _make_row(self, job: CaptionJob, kept: Candidate) -> dict:
        inputs, draw = self.photographs or self.prompts, kept.draw
        settings = {
            "sample": kept.index,
            "steps": self.num_steps,
            "share_steps": draw.share_steps,
            "p2p_threshold": draw.threshold,
            "guidance": draw.guidance,
            "candidates": job.num_candidates,
            "unet_rows": job.unet_rows,
        }
        if self.photographs:
            settings |= {"strength": self.settings.strength, "original": self.settings.original}
        return make_pair(
            kept.original,
            job.edit,
            kept.edited,
            self.generator.image_format,
            original_prompt=job.caption,
            edited_prompt=job.output,
            source=job.source,
            source_dataset=inputs.dataset,
            source_license=job.license,
            models=self.generator.models,
            seed=draw.seed,
            settings=settings,
            scores=kept.scores,
        )


def require_supported(scheduler: Any, original: str) -> None:
    """Refuse a scheduler of the model for which shared steps or a real original would not work as documented."""
    name = type(scheduler).__name__
    if scheduler.order != 1:
        raise InputError(f"{name}, the scheduler of the model, runs the UNet twice per step: give another --scheduler")
    if original == "real" and name.startswith("EDM"):
        raise InputError(f"--original real does not support the noise levels of {name}: give --original generated")
