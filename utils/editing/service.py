"""Many edits in one run: finished ones are skipped, the others batched, and none stops the rest.

Jobs of equal settings (but for the guidance scales) and sizes form the batches, of which each halves where the memory
is too small. Every output carries the record of what made it (utils/editing/records.py).
"""

from __future__ import annotations

import dataclasses
import gc
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from utils.editing.edit_images import Editor, OutOfMemory, edit_images, fit_to_model, save_image
from utils.editing.encodings import Encodings
from utils.editing.guidance import branch_coefficients
from utils.editing.jobs import Job, Recommended, Settings, resolve_settings
from utils.editing.random_edits import draw_instruction, draw_scales
from utils.editing.records import find_differences, make_record, read_record, record_settings
from utils.editing.sampling import fresh_scheduler
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

SCALES = ("guidance_scale", "image_guidance_scale")
MAX_WAITING = 64  # images that wait for others of their settings and size


class Task(NamedTuple):
    """A job whose every choice is made.

    image: as the model takes it; size: the input's own (width, height); former: what is wrong with the output that
    stands and is replaced, if one does.
    """

    job: Job
    instruction: str
    seed: int
    settings: dict[str, Any]
    record: dict
    image: Image.Image
    size: tuple[int, int]
    former: str = ""


@dataclass
class Outcome:
    """seed: the run's; finished: jobs that were done before; problems: one line for each job that failed."""

    seed: int
    edited: int = 0
    finished: int = 0
    problems: list[str] = field(default_factory=list)


class EditRun:
    """One editor and what all edits of a run share.

    origin: what a record says of the model, the adapter and the machine; defaults: of the settings, over those of
    `Recommended`; say: takes a line for the user; on_step(done, total) and on_edits(count) report progress.
    """

    def __init__(
        self,
        pipeline: Editor,
        origin: dict,
        *,
        defaults: dict | None = None,
        batch_size: int = 1,
        say: Callable[[str], None] = print,
        on_step: Callable[[int, int], None] | None = None,
        on_edits: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.pipeline, self.origin, self.batch_size = pipeline, origin, batch_size
        self.defaults = dataclasses.asdict(Recommended()) | (defaults or {})
        self.say, self.on_step, self.on_edits = say, on_step, on_edits
        self.encodings = Encodings(pipeline)
        self._scheduler = cache(lambda name, spacing: choose_scheduler(pipeline.scheduler, name, spacing))
        self._last_input: tuple[Any, bytes, Image.Image | None] = (None, b"", None)

    def edit(self, jobs: list[Job], seed: int | None = None) -> Outcome:
        """Edit and save every job that is not finished. Without a seed it is that of the finished ones, or drawn.

        Raises InputError where nothing at all can be edited with these settings, or an output cannot be saved.
        """
        for settings in dict.fromkeys(job.settings for job in jobs):
            self._check_steps(settings)
        outcome = Outcome(self._find_seed(jobs) if seed is None else seed)
        waiting: OrderedDict[tuple, list[Task]] = OrderedDict()
        for job in jobs:
            try:
                task = self._prepare(job, outcome)
            except (BadRow, InputError) as error:
                outcome.problems.append(f"{job.name}: {error}")
                task = None
            if task is None:
                self.on_edits(1)
                continue
            key = _batch_key(task)
            waiting.setdefault(key, []).append(task)
            if len(waiting[key]) >= self.batch_size:
                self._make(waiting.pop(key), outcome)
            elif sum(map(len, waiting.values())) >= MAX_WAITING:
                self._make(waiting.popitem(last=False)[1], outcome)
        for tasks in waiting.values():
            self._make(tasks, outcome)
        return outcome

    def _check_steps(self, settings: Settings) -> None:
        """Raise InputError for what the scheduler cannot do, before the first edit."""
        resolved = self._resolve(settings, 0)
        fresh_scheduler(self._scheduler(settings.scheduler, settings.timestep_spacing), resolved["steps"], "cpu")

    def _resolve(self, settings: Settings, seed: int) -> dict[str, Any]:
        """The settings of one edit, with scales that are drawn by its seed."""
        if settings.randomize_cfg:
            drawn = draw_scales(seed, tuple(self.defaults[name] for name in SCALES))
            settings = dataclasses.replace(settings, **dict(zip(SCALES, drawn, strict=True)))
        return resolve_settings(settings, self.defaults, type(self.pipeline.scheduler).__name__)

    def _describe(self, job: Job, run_seed: int, content: bytes) -> tuple[str, int, dict, dict]:
        """(instruction, seed, settings, record) of a job."""
        seed = (run_seed if job.seed is None else job.seed) + job.offset
        settings = self._resolve(job.settings, seed)
        instruction = draw_instruction(seed, job.name) if job.instruction is None else job.instruction
        record = make_record(
            self.origin, name=job.name, content=content, instruction=instruction, seed=seed, settings=settings
        )
        return instruction, seed, settings, record

    def _find_seed(self, jobs: list[Job]) -> int:
        """The seed of a former run of these jobs that left an output, so that it is gone on with; else a fresh one."""
        for job in jobs:
            former = read_record(job.output) if job.seed is None and job.output.is_file() else None
            seed = former.get("seed") if former else None
            if not isinstance(seed, int) or seed < job.offset:
                continue
            try:
                record = self._describe(job, seed - job.offset, self._read(job)[0])[3]
            except (BadRow, InputError):
                continue
            if not find_differences(former, record):
                return seed - job.offset
        return secrets.randbelow(100_000)

    def _read(self, job: Job, decoded: bool = False) -> tuple[bytes, Image.Image | None]:
        """The bytes of a job's input and its picture; those of the last input are kept, as its edits come in a row."""
        key, content, picture = self._last_input
        if key is not job.read:
            content, picture = job.read(), None
        if decoded and picture is None:
            picture = decode_image(content)
        self._last_input = (job.read, content, picture)
        return content, picture

    def _prepare(self, job: Job, outcome: Outcome) -> Task | None:
        """The task of a job, or None where it is finished. Raises BadRow or InputError for a bad image."""
        content, _ = self._read(job)
        instruction, seed, settings, record = self._describe(job, outcome.seed, content)
        former = ""
        if job.output.exists():
            standing = read_record(job.output)
            differences = find_differences(standing, record) if standing else ["no record of an edit in it"]
            if not differences:
                outcome.finished += 1
                return None
            former = "; ".join(differences)
        picture = self._read(job, decoded=True)[1]
        image = fit_to_model(picture, self.pipeline, settings["resolution"], crop=not settings["keep_size"])
        return Task(job, instruction, seed, settings, record, image, picture.size, former)

    def _make(self, tasks: list[Task], outcome: Outcome) -> None:
        """Edit and save a batch; where it does not fit into the memory, its halves."""
        if len(tasks) > self.batch_size:
            size = self.batch_size  # which may be halved meanwhile
            for start in range(0, len(tasks), size):
                self._make(tasks[start : start + size], outcome)
            return
        try:
            edits, places = self._edit(tasks)
        except OutOfMemory as error:
            problem = str(error)
        else:
            self._save(tasks, edits, places, outcome)
            return
        gc.collect()  # out of the handler, whose traceback would hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(tasks) == 1 and tasks[0].job.batch not in (None, (0, 1)):
            self.say("out of memory with the batch of then: the edit is made alone, and may differ in its last bits")
            alone = tasks[0]._replace(job=dataclasses.replace(tasks[0].job, batch=None))
            self._make([alone], outcome)
        elif len(tasks) == 1:
            outcome.problems.append(f"{tasks[0].job.name}: {problem}")
            self.on_edits(1)
        else:
            self.batch_size = len(tasks) // 2
            self.say(f"out of memory with {len(tasks)} images at once: going on with {self.batch_size}")
            self._make(tasks, outcome)

    def _edit(self, tasks: list[Task]) -> tuple[list[Image.Image], list[tuple[int, int]]]:
        """The edits of one batch, and for each its (row, rows) in it."""
        settings = tasks[0].settings
        places = [(row, len(tasks)) for row in range(len(tasks))]
        rows = list(range(len(tasks)))
        if tasks[0].job.batch:  # repeated in the place it had: how a sum is split depends on the number of rows
            places = [tasks[0].job.batch] * len(tasks)
            tasks, rows = [tasks[0]] * places[0][1], [places[0][0]] * len(tasks)
        edits = edit_images(
            self.pipeline,
            [task.image for task in tasks],
            [task.instruction for task in tasks],
            seeds=[task.seed for task in tasks],
            num_inference_steps=settings["steps"],
            eta=settings["eta"],
            **{name: [task.settings[name] for task in tasks] for name in SCALES},
            guidance_interval=settings["guidance_interval"],
            encodings=self.encodings,
            on_step=self.on_step,
            scheduler=self._scheduler(tasks[0].job.settings.scheduler, settings["timestep_spacing"]),
        )
        return [edits[row] for row in rows], places

    def _save(
        self, tasks: list[Task], edits: list[Image.Image], places: list[tuple[int, int]], outcome: Outcome
    ) -> None:
        for task, edit, place in zip(tasks, edits, places, strict=True):
            output, is_flagged = task.job.output, edit.info["flagged"]
            if task.settings["keep_size"]:
                edit = edit.resize(task.size, Image.Resampling.LANCZOS)
            save_edit(edit, output, task.record, place)
            outcome.edited += 1
            if task.former:
                self.say(f"{output} was replaced: the one that stood there had {task.former}")
            if is_flagged:
                self.say(f"{output} is black: the model's safety checker objected")
            elif task.job.instruction is None or task.job.settings.randomize_cfg:
                scales = f"{task.settings['guidance_scale']}, {task.settings['image_guidance_scale']}"
                self.say(f"{output}: {task.instruction} (seed {task.seed}, scales {scales})")
        self.on_edits(len(tasks))


def save_edit(edit: Image.Image, output: Path, record: dict, place: tuple[int, int] = (0, 1)) -> None:
    """Save an edit with its record. place: (row, rows) in the batch in which it was made. Raises InputError."""
    save_image(edit, output, **record_settings(output, record | {"batch": list(place)}))


def _batch_key(task: Task) -> tuple:
    """Equal for what can be edited at once: scales may differ where the same branches of guidance count."""
    shared = sorted((name, value) for name, value in task.settings.items() if name not in SCALES and value is not None)
    branches = tuple(branch_coefficients(*(task.settings[name] for name in SCALES)))
    return (*shared, branches, task.image.size, task.job.batch)
