"""The one implementation of edit runs: finished edits are skipped, the others are batched, and no failure stops them.

infer.py saves what it yields, the page shows it, and demo.py runs it in its own process. Jobs of the same settings
(except guidance scales) and size are one batch; a batch that does not fit into the memory is halved.
"""

import gc
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from utils.editing.edit_images import OutOfMemory, SamplingSettings, edit_images, fit_to_model
from utils.editing.editor_setup import OpenedEditor
from utils.editing.encodings import Encodings
from utils.editing.guidance import branch_coefficients
from utils.editing.jobs import Job
from utils.editing.records import find_differences, make_record, read_record, save_image
from utils.editing.sampling import fresh_scheduler
from utils.editing.schedulers import choose_scheduler
from utils.editing.settings import SCALES, EditSettings, draw_instruction, resolve_settings
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

MAX_WAITING = 64  # decoded images that wait for others of their settings and size


@dataclass(frozen=True)
class EditResult:
    """What became of a job.

    image: the edit; None if `problem` says why it failed, or if the job's output already has the same edit.
    record: with the batch place; original: the input as the model saw it; replaced: how the record of the output that
    existed before differs, "" if there was none.
    """

    job: Job
    image: Image.Image | None = None
    problem: str = ""
    record: dict | None = None
    original: Image.Image | None = None
    replaced: str = ""
    is_flagged: bool = False

    def save(self, path: Path) -> None:
        """Save the edit with its record. Raises InputError if it cannot be written."""
        save_image(self.image, path, self.record)


@dataclass(frozen=True)
class _PreparedJob:
    """A job with every choice made. image: as the model sees it; size: (width, height) of the input."""

    job: Job
    record: dict
    settings: dict[str, Any]
    image: Image.Image
    size: tuple[int, int]
    replaced: str

    @property
    def batch_key(self) -> tuple:
        """Equal for jobs that can be in one batch: scales may differ if they need the same guidance branches."""
        shared = sorted(
            (name, value) for name, value in self.settings.items() if name not in SCALES and value is not None
        )
        branches = tuple(branch_coefficients(*(self.settings[name] for name in SCALES)))
        return (*shared, branches, self.image.size, self.job.batch_place)


class EditService:
    """Edits images with one editor.

    batch_size: images at once, halved when they do not fit into the memory; say: called with messages for the user.
    """

    def __init__(self, editor: OpenedEditor, batch_size: int = 1, say: Callable[[str], None] = print) -> None:
        self.pipeline, self.origin, self.recommended = editor.pipeline, editor.origin, editor.recommended
        self.batch_size, self.say = batch_size, say
        self._scheduler = cache(lambda name, spacing: choose_scheduler(self.pipeline.scheduler, name, spacing))
        self._last_input: tuple[Any, bytes, Image.Image | None] = (None, b"", None)

    def edit(
        self, jobs: list[Job], seed: int = 0, on_step: Callable[[int, int, int], None] | None = None
    ) -> Iterator[EditResult]:
        """Edit all jobs; yields one result for each, in the order of the batches.

        seed: of jobs without one; on_step(step, steps, images in the batch): an exception that it raises ends the run.
        Raises InputError before the first edit if the scheduler does not support some settings.
        """
        for settings in dict.fromkeys(job.settings for job in jobs):
            self._check_scheduler(settings)
        encodings = Encodings(self.pipeline)
        waiting: OrderedDict[tuple, list[_PreparedJob]] = OrderedDict()
        for job in jobs:
            try:
                prepared = self._prepare(job, seed)
            except (BadRow, InputError) as error:
                yield EditResult(job, problem=str(error))
                continue
            if prepared is None:
                yield EditResult(job)
                continue
            key = prepared.batch_key
            waiting.setdefault(key, []).append(prepared)
            if len(waiting[key]) >= self.batch_size:
                yield from self._edit_batches(waiting.pop(key), encodings, on_step)
            elif sum(map(len, waiting.values())) >= MAX_WAITING:
                yield from self._edit_batches(waiting.popitem(last=False)[1], encodings, on_step)
        for batch in waiting.values():
            yield from self._edit_batches(batch, encodings, on_step)

    def choose_seed(self, jobs: list[Job]) -> int:
        """The seed of a former run of these jobs, found in one of its outputs, so that it is resumed; else random."""
        for job in jobs:
            former = read_record(job.output) if job.seed is None and job.output and job.output.is_file() else None
            seed = former.get("seed") if former else None
            if not isinstance(seed, int) or seed < job.offset:
                continue
            try:
                record = self._describe(job, seed - job.offset)
            except (BadRow, InputError):
                continue
            if not find_differences(former, record):
                return seed - job.offset
        return secrets.randbelow(100_000)

    def _check_scheduler(self, settings: EditSettings) -> None:
        """Raise InputError for a scheduler, spacing or number of steps that is not possible."""
        steps = self._resolve(settings, 0)["steps"]
        fresh_scheduler(self._scheduler(settings.scheduler, settings.timestep_spacing), steps, "cpu")

    def _resolve(self, settings: EditSettings, seed: int) -> dict[str, Any]:
        return resolve_settings(settings, self.recommended, type(self.pipeline.scheduler).__name__, seed)

    def _describe(self, job: Job, run_seed: int) -> dict:
        """The record of a job without its batch place."""
        seed = (run_seed if job.seed is None else job.seed) + job.offset
        return make_record(
            self.origin,
            name=job.name,
            content=self._read(job),
            instruction=draw_instruction(seed, job.name) if job.instruction is None else job.instruction,
            seed=seed,
            settings=self._resolve(job.settings, seed),
        )

    def _read(self, job: Job) -> bytes:
        """The bytes of a job's input; those of the last input are kept, because its jobs follow each other."""
        if self._last_input[0] is not job.read:
            self._last_input = (job.read, job.read(), None)
        return self._last_input[1]

    def _decode(self, job: Job) -> Image.Image:
        """The input as an RGB image."""
        read, content, image = self._last_input
        self._last_input = (read, content, image or decode_image(content))
        return self._last_input[2]

    def _prepare(self, job: Job, run_seed: int) -> _PreparedJob | None:
        """None if the job's output already has this edit. Raises BadRow or InputError for a bad image."""
        record, replaced = self._describe(job, run_seed), ""
        if job.output and job.output.exists():
            former = read_record(job.output)
            differences = find_differences(former, record) if former else ["no record of an edit"]
            if not differences:
                return None
            replaced = "; ".join(differences)
        settings, source = self._resolve(job.settings, record["seed"]), self._decode(job)
        image = fit_to_model(source, self.pipeline, settings["resolution"], crop=not settings["keep_size"])
        return _PreparedJob(job, record, settings, image, source.size, replaced)

    def _edit_batches(
        self, prepared: list[_PreparedJob], encodings: Encodings, on_step: Callable[[int, int, int], None] | None
    ) -> Iterator[EditResult]:
        """Edit in batches of `batch_size`, which is halved whenever the memory is too small."""
        while prepared:
            batch = prepared[: self.batch_size]
            try:
                results = self._edit_batch(batch, encodings, on_step)
            except OutOfMemory as error:
                problem = str(error)
            else:
                yield from results
                prepared = prepared[len(batch) :]
                continue
            gc.collect()  # after the except block, whose traceback refers to the tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) > 1:
                self.batch_size = len(batch) // 2
                self.say(f"out of memory with {len(batch)} images at once: continuing with {self.batch_size}")
            elif batch[0].job.batch_place not in (None, (0, 1)):
                self.say("out of memory with the recorded batch: editing the image alone, its last bits may differ")
                prepared[0] = replace(batch[0], job=replace(batch[0].job, batch_place=None))
            else:
                yield EditResult(batch[0].job, problem=problem)
                prepared = prepared[1:]

    def _edit_batch(
        self, batch: list[_PreparedJob], encodings: Encodings, on_step: Callable[[int, int, int], None] | None
    ) -> list[EditResult]:
        """Edit one batch. A job with a batch place is repeated in every row: the last bits depend on their number."""
        settings, place = batch[0].settings, batch[0].job.batch_place
        rows = batch if place is None else [batch[0]] * place[1]
        scales = {name: [row.settings[name] for row in rows] for name in SCALES}
        edits = edit_images(
            self.pipeline,
            [row.image for row in rows],
            [row.record["instruction"] for row in rows],
            [row.record["seed"] for row in rows],
            SamplingSettings(
                num_inference_steps=settings["steps"],
                eta=settings["eta"],
                guidance_interval=settings["guidance_interval"],
                scheduler=self._scheduler(batch[0].job.settings.scheduler, settings["timestep_spacing"]),
                **scales,
            ),
            encodings=encodings,
            on_step=on_step and (lambda step, steps: on_step(step, steps, len(batch))),
        )
        places = [(row, len(rows)) for row in range(len(rows))] if place is None else [place] * len(batch)
        return [_finish(job, edits[row], (row, size)) for job, (row, size) in zip(batch, places, strict=True)]


def _finish(prepared: _PreparedJob, edit: Image.Image, place: tuple[int, int]) -> EditResult:
    is_flagged, record = edit.info["flagged"], prepared.record | {"batch": list(place)}
    if prepared.settings["keep_size"]:
        edit = edit.resize(prepared.size, Image.Resampling.LANCZOS)
    return EditResult(prepared.job, edit, "", record, prepared.image, prepared.replaced, is_flagged)
