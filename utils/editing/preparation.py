"""From jobs to what the model needs: inputs read once and decoded, settings resolved, finished edits recognized."""

import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from utils.editing.edit_images import Editor, fit_to_model
from utils.editing.guidance import branch_coefficients
from utils.editing.jobs import Job
from utils.editing.metadata import kept_metadata
from utils.editing.records import find_differences, make_record, read_record
from utils.editing.settings import SCALES, EditSettings, draw_instruction, resolve_settings
from utils.errors import InputError
from utils.pixels import Animation, BadRow, decode, decode_animation, num_frames

ANIMATED = (".gif", ".webp", ".png", ".apng", ".tif", ".tiff")
WITHOUT_ALPHA = (".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class FittedInput:
    """An input as the model sees it: the decoded image, which may have hundreds of megabytes, is not kept.

    frames: (image, alpha) of each, the alpha of the size of the saved edit; size: (width, height) of the input;
    animation: its durations and, of the size of the saved edit, alphas, but no frames.
    """

    frames: tuple[tuple[Image.Image, Image.Image | None], ...]
    size: tuple[int, int]
    animation: Animation
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PreparedJob:
    """A job with every choice made. image: as the model sees it; size: (width, height) of the input;
    alpha: of the size of the saved edit.

    frames: of an animation, (image, alpha) each; source: the input's alphas, durations and loop, without its frames.
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


class JobPreparer:
    """Prepares jobs for one editor. recommended: the editor's settings; keep_metadata: of the inputs (metadata.py)."""

    def __init__(self, pipeline: Editor, origin: dict, recommended: dict[str, Any], keep_metadata: bool) -> None:
        self.pipeline, self.origin, self.recommended = pipeline, origin, recommended
        self.keep_metadata = keep_metadata
        self._forget_input()

    def _forget_input(self) -> None:
        self._last_input: tuple[Any, bytes, dict[tuple, FittedInput]] = (None, b"", {})

    def prepare_ahead(
        self, jobs: list[Job], seed: int, num_ahead: int
    ) -> Iterator[tuple[Job, PreparedJob | BadRow | InputError | None]]:
        """Each job with what `_prepare` returns or raises; a thread reads and decodes while the model edits others."""

        def prepare(job: Job) -> PreparedJob | BadRow | InputError | None:
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
                    if len(ahead) > num_ahead:
                        first, future = ahead.popleft()
                        yield first, future.result()
                while ahead:
                    first, future = ahead.popleft()
                    yield first, future.result()
            finally:
                thread.shutdown(cancel_futures=True)
                self._forget_input()  # a server may wait long for the next one

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

    def resolve(self, settings: EditSettings, seed: int) -> dict[str, Any]:
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
            settings=self.resolve(job.settings, seed),
        )

    def _read(self, job: Job) -> bytes:
        """The bytes of a job's input; those of the last input are kept, because its jobs follow each other."""
        if self._last_input[0] is not job.read:
            self._last_input = (job.read, job.read(), {})
        return self._last_input[1]

    def _fit_input(self, job: Job, resolution: int | None) -> FittedInput:
        """The job's input for the model; that of the last input with the same settings is kept."""
        _, content, fitted = self._last_input
        settings = job.settings
        key = (
            settings.background,
            settings.first_frame,
            settings.keep_size,
            resolution,
            job.output and job.output.suffix,
        )
        if key not in fitted:
            fitted[key] = self._decode_and_fit(job, content, resolution)
        return fitted[key]

    def _decode_and_fit(self, job: Job, content: bytes, resolution: int | None) -> FittedInput:
        settings = job.settings
        source = _decode_input(content, settings.background, settings.first_frame)
        notes = _find_notes(job, source, content)

        def fit(image: Image.Image | None) -> Image.Image | None:
            size = dict(resolution=resolution, crop=not settings.keep_size)
            return None if image is None else fit_to_model(image, self.pipeline, **size)

        alphas = source.alphas if settings.background is None else [None] * len(source.alphas)
        alphas = alphas if settings.keep_size else map(fit, alphas)
        frames = tuple(zip(map(fit, source.frames), alphas, strict=True))
        animation = replace(source, frames=[], alphas=[alpha for _, alpha in frames])
        return FittedInput(frames, source.frames[0].size, animation, notes)

    def _prepare(self, job: Job, run_seed: int) -> PreparedJob | None:
        """None if the job's output already has this edit. Raises BadRow or InputError for a bad image."""
        record, replaced = self._describe(job, run_seed), ""
        if job.output and job.output.exists():
            former = read_record(job.output)
            differences = find_differences(former, record) if former else ["no record of an edit"]
            if not differences:
                return None
            replaced = "; ".join(differences)
        settings = self.resolve(job.settings, record["seed"])
        fitted = self._fit_input(job, settings["resolution"])
        image, alpha = fitted.frames[0]
        notes, metadata = fitted.notes, kept_metadata(self._read(job)) if self.keep_metadata else None
        if self.keep_metadata and metadata is None:
            notes += (f"{job.name} has no date or place to keep",)
        notes += _find_ineffective(settings)
        frames = fitted.frames if len(fitted.frames) > 1 else ()
        shared = (settings, image, fitted.size, replaced, alpha, frames, fitted.animation, notes, metadata)
        return PreparedJob(job, record, *shared)


def _decode_input(content: bytes, background: str | None, first_frame: bool) -> Animation:
    if first_frame or num_frames(content) == 1:
        decoded = decode(content, background=background or "white")
        return Animation([decoded.rgb], [decoded.alpha], [0], None)
    return decode_animation(content, background=background or "white")


def _find_notes(job: Job, source: Animation, content: bytes) -> tuple[str, ...]:
    """What the user may not expect of the input. Raises BadRow where the output cannot hold its frames."""
    suffix, notes = job.output.suffix.lower() if job.output else "", ()
    if len(source.frames) > 1 and job.output and suffix not in ANIMATED:
        raise BadRow(
            f"{job.output.name} cannot hold its {len(source.frames)} frames: name it {', '.join(ANIMATED)}, or "
            "edit the first with --first_frame"
        )
    if source.alphas[0] is not None and job.settings.background is None:
        kept = (
            f"{job.output.suffix} has none, so it is white"
            if suffix in WITHOUT_ALPHA
            else "kept (--background fills it)"
        )
        notes = (f"{job.name} is partly transparent: {kept}",)
    if job.settings.first_frame and (count := num_frames(content)) > 1:
        notes += (f"{job.name} has {count} frames or pages: only the first is edited",)
    return notes


def _find_ineffective(settings: dict[str, Any]) -> tuple[str, ...]:
    """A line about settings that do nothing because the guidance scales leave only the text branch."""
    if list(branch_coefficients(*(settings[name] for name in SCALES))) != ["text"]:
        return ()
    names = [f"--{name}" for name in ("negative_prompt", "guidance_rescale") if settings.get(name)]
    return (f"{' and '.join(names)} had no effect: with guidance scales 1 and 1 there is no guidance",) if names else ()
