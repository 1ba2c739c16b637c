"""What to edit and where to save it: from one image, a folder, or a file of jobs. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from utils.errors import InputError
from utils.pictures import read_source
from utils.pixels import BadRow, decode_image

WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READABLE = (*WRITABLE, ".gif", ".jfif", ".ppm", ".avif")  # what counts as an image in a folder
LIMITS = {"steps": (1, 1000), "guidance_scale": (0, 1000), "image_guidance_scale": (0, 1000), "eta": (0, 1)}
LIMITS |= {"resolution": (8, 4096), "seed": (0, 2**63 - 1), "num_images": (1, 10_000)}
LIMITS |= {"batch_size": (1, 1024), "lora_scale": (-10, 10)}
SLUG_LENGTH = 40


@dataclass(frozen=True)
class Recommended:
    """The settings with which an editor edits best; what its maker does not say is what every editor takes here.

    eta: None leaves a scheduler its own default.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    eta: float | None = None


@dataclass(frozen=True)
class Settings:
    """What decides an edit beside the image, the instruction and the seed; None is the default of the model."""

    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    eta: float | None = None
    guidance_interval: tuple[float, float] | None = None
    scheduler: str | None = None
    timestep_spacing: str | None = None
    resolution: int | None = None
    keep_size: bool = False
    randomize_cfg: bool = False


def resolve_settings(settings: Settings, defaults: dict[str, Any], own_scheduler: str) -> dict[str, Any]:
    """Every setting of one edit, the drawn scales among them: as given, else the default; the scheduler by its name.

    own_scheduler: the class of the editor's.
    """
    known = dict(defaults)
    if settings.scheduler is not None:  # what is recommended for one scheduler says nothing of another
        known.pop("eta", None)
    values = dataclasses.asdict(settings)
    values |= {name: value for name, value in known.items() if values.get(name) is None}
    del values["randomize_cfg"]
    return values | {"scheduler": settings.scheduler or own_scheduler}


@dataclass(frozen=True)
class Job:
    """One edit to be made.

    name: of the input, its file name; read: gives the input's bytes, or raises InputError or BadRow; instruction: None
    is drawn by the seed; seed: None is the run's, to which `offset` is added; batch: (row, rows) of the batch in which
    the edit is to be made, which decides its last bits, None for any; base: what is made of all edits of one input is
    named after, as its animation.
    """

    name: str
    read: Callable[[], bytes]
    output: Path
    instruction: str | None
    settings: Settings = Settings()
    seed: int | None = None
    offset: int = 0
    batch: tuple[int, int] | None = None
    base: Path = Path("edited.png")


def find_setting_problems(values: dict, prefix: str = "--") -> list[str]:
    """What cannot be in settings, number of images and seed, one line each, with `prefix` before the name."""
    problems = []
    for name, (least, most) in LIMITS.items():
        value = values.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value <= most):  # not a number is out of every range
            problems.append(f"{prefix}{name} {value}: must be from {least} to {most}")
    interval = values.get("guidance_interval")
    if interval is not None and not (_are_numbers(interval, 2) and 0 <= interval[0] < interval[1] <= 1):
        given = " ".join(map(str, interval)) if isinstance(interval, (list, tuple)) else interval
        problems.append(f"{prefix}guidance_interval {given}: must be two shares of the steps, 0 <= START < STOP <= 1")
    if values.get("randomize_cfg") and {"guidance_scale", "image_guidance_scale"} & {
        name for name, value in values.items() if value is not None
    }:
        problems.append(f"{prefix}randomize_cfg draws the two guidance scales: leave them out, or leave it out")
    return problems


def _are_numbers(values: object, count: int) -> bool:
    is_list = isinstance(values, (list, tuple)) and len(values) == count
    return is_list and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def plan_jobs(
    source: str, output: str | None, edits: list[str | None], settings: Settings, num_images: int = 1
) -> list[Job]:
    """The jobs of `--input`: every image by every edit, `num_images` times.

    The output's folder is made and tried; a single image is read at once. Raises InputError.
    """
    path = Path(unquote(urlsplit(source).path)) if "://" in source else Path(source)
    if "://" not in source and path.is_dir():
        return plan_folder(path, Path(output or f"{path.resolve()}-edited"), edits, settings, num_images)
    target = Path(output or f"{path.stem or 'image'}-edited.png")
    if target.is_dir() or (output or "").endswith("/"):
        target = target / f"{path.stem or 'image'}.png"
    if target.suffix.lower() not in WRITABLE:
        raise InputError(f"--output {target}: its name must end in one of {', '.join(WRITABLE)}")
    if target.resolve() == path.resolve():
        raise InputError(f"--output {target} is the input itself: choose another name")
    content = read_source(source, "--input")
    try:
        decode_image(content)
    except BadRow as error:
        raise InputError(f"--input {source} is not a picture that can be used: {error.reason}") from error
    check_writable(target.parent)
    return make_jobs(path.name, lambda: content, target, edits, settings, num_images)


def make_jobs(
    name: str,
    read: Callable[[], bytes],
    base: Path,
    edits: list[str | None],
    settings: Settings,
    num_images: int,
    seed: int | None = None,
) -> list[Job]:
    """The jobs of one input."""
    return [
        Job(name, read, add_suffix(base, suffix), edit, settings, seed=seed, offset=offset, base=base)
        for suffix, edit, offset in list_variants(edits, num_images)
    ]


def plan_folder(
    folder: Path, target: Path, edits: list[str | None], settings: Settings, num_images: int = 1
) -> list[Job]:
    """The jobs of a folder of images: the outputs are PNG files of the same names in `target`."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file, and --input {folder} is a folder: give a folder")
    if target.resolve() == folder.resolve():
        raise InputError("--output is the input folder itself: choose another, so that nothing is overwritten")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in READABLE and not p.name.startswith("."))
    if not images:
        raise InputError(f"--input {folder} holds no images ({', '.join(READABLE)})")
    check_writable(target)
    stems = [image.stem for image in images]
    names = [p.stem if stems.count(p.stem) == 1 else p.name.replace(".", "_") for p in images]  # a.jpg beside a.png
    jobs = []
    for image, name in zip(images, names, strict=True):
        read = partial(read_source, str(image), "--input")
        jobs += make_jobs(image.name, read, target / f"{name}.png", edits, settings, num_images)
    require_distinct([job.output for job in jobs])
    return jobs


def list_variants(edits: list[str | None], num_images: int) -> Iterator[tuple[str, str | None, int]]:
    """(what is added to the name of the output, instruction, what is added to the seed) of every edit of one image."""
    slugs = [make_slug(edit or "") for edit in edits]
    for index, (edit, slug) in enumerate(zip(edits, slugs, strict=True)):
        name = slug if slug and slugs.count(slug) == 1 else f"{slug}-{index + 1}".lstrip("-")
        for offset in range(num_images):
            named = f"-{name}" if len(edits) > 1 else ""
            yield f"{named}-{offset + 1}" if num_images > 1 else named, edit, offset


def make_slug(text: str) -> str:
    """An instruction as a part of a file's name: its letters and digits, joined by hyphens."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)[:SLUG_LENGTH].rstrip("-")


def add_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def require_distinct(outputs: list[Path]) -> None:
    seen: set[Path] = set()
    for output in outputs:
        if output in seen:
            raise InputError(f"two edits would be saved as {output}: rename an input, or give names in a --jobs file")
        seen.add(output)


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output cannot be written in {folder}: {error.strerror}") from error


def fill(settings: Settings, given: dict) -> Settings:
    """The settings with those values of `given` that are one of its fields."""
    names = {field.name for field in dataclasses.fields(Settings)}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names}
    return dataclasses.replace(settings, **known)
