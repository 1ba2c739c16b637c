"""A request for edits from the page or its API: its values and limits, its link, and running it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from utils.editing.jobs import Job
from utils.editing.schedulers import SCHEDULERS
from utils.editing.service import EditResult
from utils.editing.settings import DEFAULT_SETTINGS, LIMITS, MAX_PROMPT, EditSettings
from utils.errors import InputError
from utils.web.model_cache import ModelCache
from utils.web.request_queue import QueueSlot, RequestProgress, RequestQueue
from utils.web.uploads import Upload, check_upload


def _narrow(name: str, largest: float) -> tuple[float, float]:
    return LIMITS[name][0], min(LIMITS[name][1], largest)


# infer.py's limits, made smaller: a server is shared, and a slider needs a range that can be hit.
PAGE_LIMITS = {
    "steps": _narrow("steps", 200),
    "seed": _narrow("seed", 2**53 - 1),  # larger numbers are not exact in JavaScript
    "images": _narrow("num_images", 16),
    "cfg_text": _narrow("guidance_scale", 20),
    "cfg_image": _narrow("image_guidance_scale", 5),
    "guidance_rescale": _narrow("guidance_rescale", 1),
    "resolution": (0, 2048),  # 0: the model's own
}
WHOLE_NUMBERS = ("steps", "seed", "images", "resolution")
SWITCHES = ("keep_size", "karras_sigmas")


@dataclass(frozen=True)
class EditRequest:
    """One press of the button. The fields are the names in a link and in the API."""

    instruction: str = ""
    model: str = ""
    compare: str = ""  # a second model for the same edits; "" for none
    steps: int = DEFAULT_SETTINGS["steps"]
    seed: int = 0  # of the first image; each further image adds 1
    images: int = 1
    cfg_text: float = DEFAULT_SETTINGS["guidance_scale"]
    cfg_image: float = DEFAULT_SETTINGS["image_guidance_scale"]
    scheduler: str = ""  # "" for the model's own
    keep_size: bool = False
    negative_prompt: str = ""
    guidance_rescale: float = DEFAULT_SETTINGS["guidance_rescale"]
    karras_sigmas: bool = False
    resolution: int = 0  # longer side of an edit, approximately; 0 for the model's own

    @property
    def models(self) -> list[str]:
        return [self.model, self.compare] if self.compare and self.compare != self.model else [self.model]

    @property
    def num_edits(self) -> int:
        return self.images * len(self.models)


def check_request(request: EditRequest, models: list[str]) -> EditRequest:
    """The request with numbers of the right type. Raises one InputError with everything that is invalid."""
    problems, numbers = [], {}
    if not request.instruction.strip():
        problems.append('The instruction is empty: describe what to change, such as "make it snowy".')
    if len(request.instruction) > MAX_PROMPT:
        problems.append(f"The instruction has {len(request.instruction)} characters: at most {MAX_PROMPT} allowed.")
    if len(request.negative_prompt) > MAX_PROMPT:
        problems.append(f"The negative prompt is too long: at most {MAX_PROMPT} characters are allowed.")
    problems += [
        f"The model {name!r} is unknown: choose one of {', '.join(models)}."
        for name in request.models
        if name not in models
    ]
    if request.scheduler and request.scheduler not in SCHEDULERS:
        problems.append(f"The scheduler {request.scheduler!r} is unknown: choose one of {', '.join(SCHEDULERS)}.")
    for name in SWITCHES:
        if not isinstance(getattr(request, name), bool):
            problems.append(f"{name} {getattr(request, name)}: must be true or false.")
    for name, (smallest, largest) in PAGE_LIMITS.items():
        value, is_whole = getattr(request, name), name in WHOLE_NUMBERS
        if not _is_finite(value) or not smallest <= value <= largest or (is_whole and value != int(value)):
            kind = "a whole number " if is_whole else ""
            problems.append(f"{name} {value}: must be {kind}from {smallest} to {largest}.")
        else:
            numbers[name] = int(value) if is_whole else float(value)
    if problems:
        raise InputError.from_problems(problems)
    return replace(request, instruction=request.instruction.strip(), **numbers)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def to_query(request: EditRequest) -> str:
    """The part of a link after "?", with all settings, so that changed defaults do not change the link."""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return urlencode({name: value for name, value in values.items() if value != "" and value is not False})


def from_query(query: Mapping[str, str], default: EditRequest, models: list[str]) -> tuple[EditRequest, list[str]]:
    """`default` with the values of a link, and a sentence for each value that is invalid and was ignored."""
    request, ignored = default, []
    for name in (field.name for field in fields(default)):
        if (text := query.get(name)) is None:
            continue
        kind = type(getattr(default, name))
        try:
            value = {"true": True, "false": False}.get(text.lower(), text) if kind is bool else kind(text)
            candidate = replace(request, **{name: value})
            # A link may have settings without an instruction.
            check_request(replace(candidate, instruction=candidate.instruction or "-"), models)
            request = candidate
        except ValueError as error:
            reason = str(error) if isinstance(error, InputError) else f"{name} {text[:40]!r} is not a number."
            ignored.append(f"Ignored in the link: {reason}")
    return request, ignored


@dataclass(frozen=True)
class PageEdit:
    """One edit of a request. original: what to compare it with."""

    model: str
    result: EditResult
    original: Image.Image


class RequestRunner:
    """Runs requests: the models, the queue, and the limits of uploads.

    resolution: of edits that do not set one, instead of the one that the model recommends.
    """

    def __init__(
        self, models: ModelCache, requests: RequestQueue, *, resolution: int | None, max_pixels: int, max_bytes: int
    ) -> None:
        self.models, self.requests = models, requests
        self.resolution, self._max_pixels, self._max_bytes = resolution, max_pixels, max_bytes

    def check_upload(self, path: str | None) -> tuple[int, int]:
        """The upright size (h, w) of an upload. Raises InputError if it is missing, no image or too large."""
        return check_upload(path, max_pixels=self._max_pixels, max_bytes=self._max_bytes)

    def run(
        self, path: str | None, request: EditRequest, on_slot: Callable[[QueueSlot], None]
    ) -> Iterator[RequestProgress | PageEdit]:
        """Progress and edits until the request is done. on_slot: called with its place in the queue.

        Raises InputError and `Stopped`. Closing the iterator stops the request.
        """
        request = check_request(request, self.models.names)
        self.check_upload(path)
        slot = self.requests.join()
        on_slot(slot)
        return self.requests.run(slot, lambda report: self._edit(request, Path(path), slot, report))

    def settings_for(self, request: EditRequest, model: str) -> EditSettings:
        """The settings of one model of a request.

        The sliders are for the first model. In a comparison the second model uses them as well, unless one of the two
        recommends its own settings: four steps without guidance would show nothing of an ordinary editor.
        """
        shared = dict(keep_size=request.keep_size, negative_prompt=request.negative_prompt or None)
        if model != request.model and any(map(self.models.has_recommended, request.models)):
            settings = self.models.settings(model) | ({"resolution": self.resolution} if self.resolution else {})
            return EditSettings(**settings, **shared)
        scales = dict(guidance_scale=request.cfg_text, image_guidance_scale=request.cfg_image)
        return EditSettings(
            steps=request.steps,
            scheduler=request.scheduler or None,
            guidance_rescale=request.guidance_rescale,
            karras_sigmas=request.karras_sigmas,
            resolution=request.resolution or self.resolution,
            **scales,
            **shared,
        )

    def _edit(
        self, request: EditRequest, path: Path, slot: QueueSlot, report: Callable[[RequestProgress | PageEdit], None]
    ) -> None:
        """Make all edits of a request; runs in a thread. Nothing of the image was kept while the request waited."""
        done, upload = 0, Upload(path)

        def show_step(step: int, steps: int, images: int) -> None:
            first = done % request.images + 1
            which = f" · image {first}" if images == 1 else f" · images {first} to {first + images - 1}"
            text = f"{which} of {request.images}" if request.images > 1 else ""
            text += f" · {model}" if len(request.models) > 1 else ""
            fraction = (done + images * step / steps) / request.num_edits
            report(RequestProgress(f"Step {step} of {steps}{text}", fraction))
            slot.check()

        for model in request.models:
            slot.check()
            if not self.models.is_loaded(model):
                report(RequestProgress(f"Loading {model}", done / request.num_edits))
            with slot.not_counting():
                service = self.models.get(model)
            settings = self.settings_for(request, model)
            seeds = range(request.seed, request.seed + request.images)
            # The page compares single images: infer.py edits whole animations.
            settings = replace(settings, first_frame=upload.is_animated)
            template = Job(path.name, upload.read, request.instruction, settings)
            for result in service.edit([replace(template, seed=seed) for seed in seeds], on_step=show_step):
                if result.image is None:
                    raise InputError(f"The image cannot be edited: {result.problem}.")
                report(PageEdit(model, result, upload.image if request.keep_size else result.original))
                done += 1
