"""What an edit is asked for in the browser, and the same as a link that asks for it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import urlencode

from utils.editing.jobs import Recommended
from utils.errors import InputError

LIMITS = {
    "steps": (1, 200),
    "seed": (0, 2**53 - 1),  # what a browser's numbers hold exactly
    "images": (1, 16),
    "cfg_text": (0, 20),
    "cfg_image": (0, 5),
}
MAX_INSTRUCTION = 2000  # characters; CLIP reads about 300 of them


@dataclass(frozen=True)
class Wish:
    """One press of the button. The fields are the names in a link and in the API."""

    instruction: str = ""
    model: str = ""
    compare: str = ""  # a second model that edits the same; "" for none
    steps: int = Recommended.steps
    seed: int = 0  # of the first image; each further image takes the next one
    images: int = 1
    cfg_text: float = Recommended.guidance_scale
    cfg_image: float = Recommended.image_guidance_scale

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.images))

    @property
    def models(self) -> list[str]:
        return [self.model, self.compare] if self.compare and self.compare != self.model else [self.model]


def check_wish(wish: Wish, models: list[str]) -> Wish:
    """The wish with whole numbers where they belong. Raises one InputError with everything that cannot be."""
    problems, numbers = [], {}
    if not wish.instruction.strip():
        problems.append('The instruction is empty: say what to change, such as "make it snowy".')
    if len(wish.instruction) > MAX_INSTRUCTION:
        problems.append(f"The instruction has {len(wish.instruction)} characters, at most {MAX_INSTRUCTION} are taken.")
    problems += [f"There is no model {name!r} here: {', '.join(models)}." for name in wish.models if name not in models]
    for name, (least, most) in LIMITS.items():
        value = getattr(wish, name)
        if not _is_number(value) or not least <= value <= most or (_is_whole(name) and value != int(value)):
            problems.append(
                f"{name} {value}: must be {'a whole number ' if _is_whole(name) else ''}from {least} to {most}."
            )
        else:
            numbers[name] = int(value) if _is_whole(name) else float(value)
    if problems:
        raise InputError.from_problems(problems)
    return replace(wish, instruction=wish.instruction.strip(), **numbers)


def to_query(wish: Wish) -> str:
    """The part of a link behind "?": all settings, so that a default changed later changes no link."""
    values = {field.name: getattr(wish, field.name) for field in fields(wish)}
    return urlencode({name: value for name, value in values.items() if value != ""})


def from_query(query: Mapping[str, str], default: Wish, models: list[str]) -> tuple[Wish, list[str]]:
    """The settings that a link holds, on top of `default`, and a sentence for each that cannot be used."""
    wish, ignored = default, []
    for field in fields(default):
        if (text := query.get(field.name)) is None:
            continue
        try:
            value = type(getattr(default, field.name))(text)
            candidate = replace(wish, **{field.name: value})
            # An empty instruction is no mistake here: a link may hold the settings alone.
            check_wish(replace(candidate, instruction=candidate.instruction or "-"), models)
            wish = candidate
        except ValueError as error:
            reason = str(error) if isinstance(error, InputError) else f"{field.name} {text[:40]!r} is no number."
            ignored.append(f"Left out of the link: {reason}")
    return wish, ignored


def _is_whole(name: str) -> bool:
    return name in ("steps", "seed", "images")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
