"""The settings of an edit: limits, defaults, and what the seed can choose. Nothing heavy is imported here."""

import random
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# The smallest and largest value of every number that infer.py, a file of jobs or the page accepts.
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 1000),
    "guidance_scale": (0, 1000),
    "image_guidance_scale": (0, 1000),
    "eta": (0, 1),
    "guidance_rescale": (0, 1),
    "resolution": (8, 4096),
    "seed": (0, 2**63 - 1),
    "num_images": (1, 10_000),
    "batch_size": (1, 1024),
    "lora_scale": (-10, 10),
}
# Used for what neither the user nor the editor's `adapted.json` sets. eta None: the scheduler's own default; resolution
# None: that of the model.
DEFAULT_SETTINGS: dict[str, Any] = {
    "steps": 20,
    "guidance_scale": 7.5,
    "image_guidance_scale": 1.5,
    "eta": None,
    "guidance_rescale": 0.0,
    "resolution": None,
}
SCALES = ("guidance_scale", "image_guidance_scale")
WHOLE_NUMBERS = ("steps", "resolution")
ADAPTED = "adapted.json"  # adapt_distill.py writes recommended settings, keys of `DEFAULT_SETTINGS`, into this file
INSTRUCTIONS = tuple(Path(__file__).with_name("random_instructions.txt").read_text("utf-8").splitlines())
EASY_INSTRUCTIONS = INSTRUCTIONS[:8]  # the toy editor was trained on these
# Newer than the records of many edits
RECORDED_IF_SET = ("first_frame", "background", "negative_prompt", "guidance_rescale", "karras_sigmas")
MAX_PROMPT = 2000  # characters of a negative prompt; CLIP reads about 300 of them
SPREAD = 0.2  # as edit_app.py, which draws 6 to 9 around 7.5 and 1.2 to 1.8 around 1.5


@dataclass(frozen=True)
class EditSettings:
    """What decides an edit besides the image, the instruction and the seed; None is the model's default.

    negative_prompt: what the edit should not show, in place of the empty prompt; guidance_rescale: `guidance.rescale`;
    guidance_interval: (start, stop) as fractions of the steps; scheduler: a key of `schedulers.SCHEDULERS`;
    karras_sigmas: the noise levels of Karras et al. (2206.00364, equation 5) in place of the model's timesteps;
    first_frame: of an animation, edit only this; background: a colour for transparent pixels, None keeps them.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    negative_prompt: str | None = None
    guidance_rescale: float | None = None
    eta: float | None = None
    guidance_interval: tuple[float, float] | None = None
    scheduler: str | None = None
    timestep_spacing: str | None = None
    karras_sigmas: bool = False
    resolution: int | None = None
    keep_size: bool = False
    first_frame: bool = False
    background: str | None = None
    randomize_cfg: bool = False


def fill_settings(settings: EditSettings, given: dict[str, Any]) -> EditSettings:
    """`settings` with the values of `given` that are fields of it."""
    names = {field.name for field in fields(EditSettings)}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names}
    return replace(settings, **known)


def resolve_settings(
    settings: EditSettings, recommended: dict[str, Any], own_scheduler: str, seed: int
) -> dict[str, Any]:
    """All settings of one edit as its record stores them.

    A setting that is None becomes the recommended value, then the default. `randomize_cfg` draws the two guidance
    scales from `seed`. own_scheduler: the class name of the editor's scheduler; with another one the recommended eta,
    which was found for that scheduler, is ignored.
    """
    defaults = DEFAULT_SETTINGS | recommended
    if settings.randomize_cfg:
        drawn = draw_scales(seed, tuple(defaults[name] for name in SCALES))
        settings = replace(settings, **dict(zip(SCALES, drawn, strict=True)))
    if settings.scheduler is not None:
        del defaults["eta"]
    values = asdict(settings)
    values |= {name: value for name, value in defaults.items() if values[name] is None}
    del values["randomize_cfg"]
    for name in RECORDED_IF_SET:
        if values[name] in (None, False, 0.0):  # an empty negative prompt is one: SDXL's null prompt may be zeros
            del values[name]
    return values | {"scheduler": settings.scheduler or own_scheduler}


def find_setting_problems(values: dict[str, Any], prefix: str = "--") -> list[str]:
    """One line for every invalid value, with `prefix` before its name; missing values and None are valid."""
    problems = []
    for name, (smallest, largest) in LIMITS.items():
        value = values.get(name)
        if value is not None and not (_is_number(value) and smallest <= value <= largest):  # also refuses NaN
            problems.append(f"{prefix}{name} {value}: must be from {smallest} to {largest}")
    interval = values.get("guidance_interval")
    if interval is not None and not _is_interval(interval):
        given = " ".join(map(str, interval)) if isinstance(interval, (list, tuple)) else interval
        problems.append(f"{prefix}guidance_interval {given}: must be two fractions with 0 <= START < STOP <= 1")
    negative = values.get("negative_prompt")
    if negative is not None and not (isinstance(negative, str) and len(negative) <= MAX_PROMPT):
        problems.append(f"{prefix}negative_prompt {negative!s:.40}: must be text of at most {MAX_PROMPT} characters")
    background = values.get("background")
    if background is not None and not _is_colour(background):
        problems.append(f"{prefix}background {background}: must be a colour such as white, #1e90ff or rgb(30,144,255)")
    if values.get("randomize_cfg") and any(values.get(name) is not None for name in SCALES):
        problems.append(f"{prefix}randomize_cfg draws both guidance scales: remove it, or remove the scales")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_colour(value: object) -> bool:
    from PIL import ImageColor

    try:
        return isinstance(value, str) and len(ImageColor.getrgb(value)) == 3
    except ValueError:
        return False


def _is_interval(value: object) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    return is_pair and 0 <= value[0] < value[1] <= 1


def draw_instruction(seed: int, name: str) -> str:
    """One of `INSTRUCTIONS`; the input's file name is part of the key, so the images of a folder get different ones."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # names that are not UTF-8
    return random.Random(f"instruction {seed} {name}").choice(INSTRUCTIONS)


def draw_scales(seed: int | None, scales: tuple[float, float]) -> tuple[float, float]:
    """(text, image) guidance scales within 20 % of `scales`, rounded to two digits; seed None is not repeatable."""
    draw = random.Random(None if seed is None else f"scales {seed}")
    return tuple(round(scale * draw.uniform(1 - SPREAD, 1 + SPREAD), 2) for scale in scales)
