"""The one implementation of edit runs: finished edits are skipped, the others are batched, and no failure stops them.

infer.py saves what it yields, the page shows it, and demo.py runs it in its own process. Jobs of the same settings
(except guidance scales) and size are one batch; a batch that does not fit into the memory is halved.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from utils.editing.edit_images import OutOfMemory, SamplingSettings, edit_images
from utils.editing.editor_setup import OpenedEditor
from utils.editing.encodings import Encodings
from utils.editing.jobs import Job
from utils.editing.preparation import WITHOUT_ALPHA, JobPreparer, PreparedJob
from utils.editing.records import save_image
from utils.editing.sampling import fresh_scheduler, takes_eta
from utils.editing.schedulers import choose_scheduler
from utils.editing.settings import SCALES, EditSettings
from utils.errors import InputError
from utils.pixels import Animation

SCHEDULER_CHOICE = ("scheduler", "timestep_spacing", "karras_sigmas")  # the arguments of `choose_scheduler`
DEFAULT_DURATION = 100  # milliseconds, where a format has frames without a duration
MAX_WAITING = 64  # decoded images that wait for others of their settings and size
OVERFLOW = "the model overflows in this precision, its edit has NaN values: give --dtype bf16 or fp32"


@dataclass(frozen=True)
class EditResult:
    """What became of a job.

    image: the edit; None if `problem` says why it failed, or if the job's output already has the same edit.
    record: with the batch place; original: the input as the model saw it; replaced: how the record of the output that
    existed before differs, "" if there was none; animation: all frames of an edited animation; notes: what the user may
    not expect; metadata: to store in the file.
    """

    job: Job
    image: Image.Image | None = None
    problem: str = ""
    record: dict | None = None
    original: Image.Image | None = None
    replaced: str = ""
    is_flagged: bool = False
    animation: Animation | None = None
    notes: tuple[str, ...] = ()
    metadata: Image.Exif | None = None

    def save(self, path: Path) -> None:
        """Save the edit with its record. Raises InputError if it cannot be written."""
        if self.animation is not None:
            options = animation_options(self.animation, path)
            save_image(self.animation.frames[0], path, self.record, self.metadata, **options)
        else:
            is_opaque = path.suffix.lower() in WITHOUT_ALPHA
            image = self.image.convert("RGB") if is_opaque else self.image
            save_image(image, path, self.record, self.metadata)


class EditService:
    """Edits images with one editor.

    batch_size: images at once, halved when they do not fit into the memory; say: called with messages for the user;
    keep_metadata: edits keep date and place of their inputs (metadata.py).
    """

    def __init__(
        self, editor: OpenedEditor, batch_size: int = 1, say: Callable[[str], None] = print, keep_metadata: bool = False
    ) -> None:
        self.pipeline, self.batch_size, self.say = editor.pipeline, batch_size, say
        self._preparer = JobPreparer(editor.pipeline, editor.origin, editor.recommended, keep_metadata)
        self.choose_seed = self._preparer.choose_seed
        self._scheduler = cache(lambda *choice: choose_scheduler(self.pipeline.scheduler, *choice))

    def edit(
        self, jobs: list[Job], seed: int = 0, on_step: Callable[[int, int, int], None] | None = None
    ) -> Iterator[EditResult]:
        """Edit all jobs; yields one result for each, in the order of the batches.

        seed: of jobs without one; on_step(step, steps, images in the batch): an exception that it raises ends the run.
        Raises InputError before the first edit if the scheduler does not support some settings.
        """
        for settings, is_repeated in dict.fromkeys((job.settings, job.batch_place is not None) for job in jobs):
            self._check_scheduler(settings, is_repeated)
        encodings = Encodings(self.pipeline)
        waiting: OrderedDict[tuple, list[PreparedJob]] = OrderedDict()
        for job, prepared in self._preparer.prepare_ahead(jobs, seed, self.batch_size):
            if not isinstance(prepared, PreparedJob):
                yield EditResult(job, problem="" if prepared is None else str(prepared))
                continue
            if prepared.frames:
                yield self._edit_animation(prepared, encodings, on_step)
                continue
            key = prepared.batch_key
            waiting.setdefault(key, []).append(prepared)
            if len(waiting[key]) >= self.batch_size:
                yield from self._edit_batches(waiting.pop(key), encodings, on_step)
            elif sum(map(len, waiting.values())) >= MAX_WAITING:
                yield from self._edit_batches(waiting.popitem(last=False)[1], encodings, on_step)
        for batch in waiting.values():
            yield from self._edit_batches(batch, encodings, on_step)

    def _edit_animation(
        self, prepared: PreparedJob, encodings: Encodings, on_step: Callable[[int, int, int], None] | None
    ) -> EditResult:
        """Edit every frame with the same seed."""
        frames = [replace(prepared, image=image, alpha=alpha, frames=()) for image, alpha in prepared.frames]
        edits = []
        for result in self._edit_batches(frames, encodings, on_step):
            if result.problem:
                return result
            edits.append(result)
        source = prepared.source
        images = [edit.image for edit in edits]
        animation = Animation(images, source.alphas, source.durations, source.loop)
        is_flagged = any(edit.is_flagged for edit in edits)
        return replace(edits[0], animation=animation, is_flagged=is_flagged)

    def _check_scheduler(self, settings: EditSettings, is_repeated: bool) -> None:
        """Raise InputError for a scheduler or its settings that are not possible or without effect."""
        steps = self._preparer.resolve(settings, 0)["steps"]
        scheduler = self._scheduler(settings.scheduler, settings.timestep_spacing, settings.karras_sigmas)
        fresh_scheduler(scheduler, steps, "cpu")
        # A repeated edit has the settings that its record has, with or without effect.
        if settings.eta is not None and not is_repeated and not takes_eta(scheduler):
            raise InputError(
                f"--eta {settings.eta:g} has no effect on {type(scheduler).__name__}: remove it, or choose --scheduler "
                "ddim or tcd"
            )

    def _edit_batches(
        self, prepared: list[PreparedJob], encodings: Encodings, on_step: Callable[[int, int, int], None] | None
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
        self, batch: list[PreparedJob], encodings: Encodings, on_step: Callable[[int, int, int], None] | None
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
                negative_prompt=settings.get("negative_prompt"),
                eta=settings["eta"],
                guidance_rescale=settings.get("guidance_rescale", 0.0),
                guidance_interval=settings["guidance_interval"],
                scheduler=self._scheduler(*(getattr(batch[0].job.settings, name) for name in SCHEDULER_CHOICE)),
                **scales,
            ),
            encodings=encodings,
            on_step=on_step and (lambda step, steps: on_step(step, steps, len(batch))),
        )
        places = [(row, len(rows)) for row in range(len(rows))] if place is None else [place] * len(batch)
        return [_finish(job, edits[row], (row, size)) for job, (row, size) in zip(batch, places, strict=True)]


def _finish(prepared: PreparedJob, edit: Image.Image, place: tuple[int, int]) -> EditResult:
    if edit.info["overflowed"]:
        return EditResult(prepared.job, problem=OVERFLOW)
    is_flagged, record = edit.info["flagged"], prepared.record | {"batch": list(place)}
    if prepared.settings["keep_size"]:
        edit = edit.resize(prepared.size, Image.Resampling.LANCZOS)
    if prepared.alpha is not None and not is_flagged:
        edit.putalpha(prepared.alpha)
    shown = (prepared.image, prepared.replaced, is_flagged, None, prepared.notes, prepared.metadata)
    return EditResult(prepared.job, edit, "", record, *shown)


def animation_options(animation: Animation, path: Path) -> dict[str, Any]:
    """The arguments with which Pillow's `save` writes the frames after the first, with their durations and loop."""
    options: dict[str, Any] = {"save_all": True, "append_images": animation.frames[1:]}
    if path.suffix.lower() not in (".tif", ".tiff"):
        options["duration"] = [duration or DEFAULT_DURATION for duration in animation.durations]
        if animation.loop is not None:
            options["loop"] = animation.loop
    if path.suffix.lower() == ".gif":
        options["disposal"] = 2  # transparent pixels of a frame do not show the frame before
    return options
