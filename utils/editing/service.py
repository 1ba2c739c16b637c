"""The one implementation of edit runs: finished edits are skipped, the others are batched, and no failure stops them.

infer.py saves what it yields, the page shows it, and demo.py runs it in its own process. Jobs of the same settings
(except guidance scales) and size are one batch; a batch that does not fit into the memory is halved.
"""

import gc
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from utils.editing.metadata import kept_metadata
from utils.editing.records import find_differences, make_record, read_record, save_image
from utils.editing.sampling import fresh_scheduler
from utils.editing.schedulers import choose_scheduler
from utils.editing.settings import SCALES, EditSettings, draw_instruction, resolve_settings
from utils.errors import InputError
from utils.pixels import Animation, BadRow, decode, decode_animation, num_frames

ANIMATED = (".gif", ".webp", ".png", ".apng", ".tif", ".tiff")
WITHOUT_ALPHA = (".jpg", ".jpeg", ".bmp")
DEFAULT_DURATION = 100  # milliseconds, where a format has frames without a duration
MAX_WAITING = 64  # decoded images that wait for others of their settings and size


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


@dataclass(frozen=True)
class _PreparedJob:
    """A job with every choice made. image: as the model sees it; size: (width, height) of the input;
    alpha: of the size of the saved edit.

    frames: of an animation, (image, alpha) each; source: the decoded input.
    """

    job: Job
    record: dict
    settings: dict[str, Any]
    image: Image.Image
    size: tuple[int, int]
    replaced: str
    alpha: Image.Image | None = None
    frames: tuple[tuple[Image.Image, Image.Image | None], ...] = ()
    source: Animation | None = None
    notes: tuple[str, ...] = ()
    metadata: Image.Exif | None = None

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

    batch_size: images at once, halved when they do not fit into the memory; say: called with messages for the user;
    keep_metadata: edits keep date and place of their inputs (metadata.py).
    """

    def __init__(
        self, editor: OpenedEditor, batch_size: int = 1, say: Callable[[str], None] = print, keep_metadata: bool = False
    ) -> None:
        self.pipeline, self.origin, self.recommended = editor.pipeline, editor.origin, editor.recommended
        self.batch_size, self.say, self.keep_metadata = batch_size, say, keep_metadata
        self._scheduler = cache(lambda name, spacing: choose_scheduler(self.pipeline.scheduler, name, spacing))
        self._last_input: tuple[Any, bytes, dict[tuple, Animation]] = (None, b"", {})

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
        for job, prepared in self._prepare_ahead(jobs, seed):
            if not isinstance(prepared, _PreparedJob):
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

    def _prepare_ahead(
        self, jobs: list[Job], seed: int
    ) -> Iterator[tuple[Job, _PreparedJob | BadRow | InputError | None]]:
        """Each job with what `_prepare` returns or raises; a thread reads and decodes while the model edits others."""

        def prepare(job: Job) -> _PreparedJob | BadRow | InputError | None:
            try:
                return self._prepare(job, seed)
            except (BadRow, InputError) as error:
                return error
            except OSError as error:  # removed or unreadable since the run began
                return InputError(f"{job.name} cannot be read: {error.strerror or error}")

        ahead: deque[tuple[Job, Future]] = deque()
        with ThreadPoolExecutor(1) as thread:  # one: the jobs of one input share what was read
            try:
                for job in jobs:
                    ahead.append((job, thread.submit(prepare, job)))
                    if len(ahead) > self.batch_size:
                        first, future = ahead.popleft()
                        yield first, future.result()
                while ahead:
                    first, future = ahead.popleft()
                    yield first, future.result()
            finally:
                thread.shutdown(cancel_futures=True)

    def _edit_animation(
        self, prepared: _PreparedJob, encodings: Encodings, on_step: Callable[[int, int, int], None] | None
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
            self._last_input = (job.read, job.read(), {})
        return self._last_input[1]

    def _decode(self, job: Job) -> tuple[Animation, tuple[str, ...]]:
        """(the input, of one frame if it is not an animation; what the user may not expect)."""
        _, content, decoded = self._last_input
        background = job.settings.background
        if (key := (background, job.settings.first_frame)) not in decoded:
            decoded[key] = _decode_input(content, background, job.settings.first_frame)
        source, notes = decoded[key], ()
        if len(source.frames) > 1 and job.output and job.output.suffix.lower() not in ANIMATED:
            raise BadRow(
                f"{job.output.name} cannot hold its {len(source.frames)} frames: name it {', '.join(ANIMATED)}, or "
                "edit the first with --first_frame"
            )
        if source.alphas[0] is not None and background is None:
            is_opaque = job.output is not None and job.output.suffix.lower() in WITHOUT_ALPHA
            kept = f"{job.output.suffix} has none, so it is white" if is_opaque else "kept (--background fills it)"
            notes = (f"{job.name} is partly transparent: {kept}",)
        if job.settings.first_frame and (count := num_frames(content)) > 1:
            notes += (f"{job.name} has {count} frames or pages: only the first is edited",)
        return source, notes

    def _prepare(self, job: Job, run_seed: int) -> _PreparedJob | None:
        """None if the job's output already has this edit. Raises BadRow or InputError for a bad image."""
        record, replaced = self._describe(job, run_seed), ""
        if job.output and job.output.exists():
            former = read_record(job.output)
            differences = find_differences(former, record) if former else ["no record of an edit"]
            if not differences:
                return None
            replaced = "; ".join(differences)
        settings = self._resolve(job.settings, record["seed"])
        source, notes = self._decode(job)

        def fit(image: Image.Image | None) -> Image.Image | None:
            size = dict(resolution=settings["resolution"], crop=not settings["keep_size"])
            return None if image is None else fit_to_model(image, self.pipeline, **size)

        is_kept = job.settings.background is None
        alphas = source.alphas if is_kept else [None] * len(source.alphas)
        alphas = alphas if settings["keep_size"] else map(fit, alphas)
        frames = tuple(zip(map(fit, source.frames), alphas, strict=True))
        image, alpha = frames[0]
        metadata = kept_metadata(self._read(job)) if self.keep_metadata else None
        if self.keep_metadata and metadata is None:
            notes += (f"{job.name} has no date or place to keep",)
        several = frames if len(frames) > 1 else ()
        shared = (record, settings, image, source.frames[0].size, replaced, alpha, several, source, notes, metadata)
        return _PreparedJob(job, *shared)

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
    if prepared.alpha is not None and not is_flagged:
        edit.putalpha(prepared.alpha)
    shown = (prepared.image, prepared.replaced, is_flagged, None, prepared.notes, prepared.metadata)
    return EditResult(prepared.job, edit, "", record, *shown)


def _decode_input(content: bytes, background: str | None, first_frame: bool) -> Animation:
    if first_frame or num_frames(content) == 1:
        decoded = decode(content, background=background or "white")
        return Animation([decoded.rgb], [decoded.alpha], [0], None)
    return decode_animation(content, background=background or "white")


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
