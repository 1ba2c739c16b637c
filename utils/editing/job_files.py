"""A file of jobs: one JSON object a line, with an image, an edit and settings of its own."""

from __future__ import annotations

import dataclasses
import difflib
import json
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.editing.jobs import (
    WRITABLE,
    Job,
    Settings,
    add_suffix,
    check_writable,
    fill,
    find_setting_problems,
    make_jobs,
    require_distinct,
)
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.errors import InputError
from utils.pictures import read_source

OWN_KEYS = ("image", "edit", "output", "seed", "num_images")
KEYS = (*OWN_KEYS, *(field.name for field in dataclasses.fields(Settings)))
MAX_PROBLEMS = 10
WHOLE = ("steps", "resolution", "seed", "num_images")  # whole numbers
SWITCHES = ("keep_size", "randomize_cfg")


def plan_lines(
    file: Path, output: str | None, edits: list[str | None], settings: Settings, num_images: int = 1
) -> list[Job]:
    """The jobs of `--jobs`; what a line does not say is taken from the flags.

    Images are found from where the file lies; outputs go into the folder `output` (default: FILE-edited beside it)
    under the line's "output", or the image's name, with the number of the line where several lines have it.
    Raises InputError with the first mistakes of all lines.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--jobs {file} cannot be read: {error}") from error
    lines = {number: line for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    target = Path(output) if output else file.with_name(f"{file.stem}-edited")
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file, and --jobs needs a folder")
    rows, problems = {}, []
    for number, line in lines.items():
        rows[number], wrong = _read_line(line, settings, edits)
        problems += [f"line {number}: {problem}" for problem in wrong]
    if problems or not lines:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise InputError.from_problems([f"--jobs {file}: {p}" for p in problems[:MAX_PROBLEMS] + more or ["is empty"]])
    check_writable(target)
    jobs = _make_jobs(rows, file.parent, target, edits, settings, num_images)
    require_distinct([job.output for job in jobs])
    return jobs


def _make_jobs(
    rows: dict[int, dict], folder: Path, target: Path, edits: list[str | None], settings: Settings, num_images: int
) -> list[Job]:
    names = {number: _output_of(row) for number, row in rows.items()}
    counts = list(names.values())
    jobs = []
    for number, row in rows.items():
        source = row["image"] if "://" in row["image"] else str(folder / row["image"])
        output = target / names[number]
        if "output" not in row and counts.count(names[number]) > 1:
            output = add_suffix(output, f"-{number}")
        if "://" not in source and output.resolve() == Path(source).resolve():
            raise InputError(f"line {number} would overwrite its own image {source}: choose another --output")
        own_edits = [row["edit"]] if isinstance(row.get("edit"), str) else row.get("edit", edits)
        own = fill(settings, row)
        read = partial(read_source, source, f"line {number}:")
        jobs += make_jobs(
            _name_of(row["image"]), read, output, own_edits, own, row.get("num_images", num_images), row.get("seed")
        )
    return jobs


def _name_of(image: str) -> str:
    return Path(unquote(urlsplit(image).path) if "://" in image else image).name


def _output_of(row: dict) -> str:
    return row.get("output") or f"{Path(_name_of(row['image'])).stem or 'image'}.png"


def _read_line(line: str, settings: Settings, edits: list[str | None]) -> tuple[dict, list[str]]:
    """What a line says, and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, [f"is no JSON ({error.msg} at column {error.colno})"]
    if not isinstance(row, dict):
        return {}, ['is no JSON object such as {"image": "a.jpg", "edit": "make it winter"}']
    problems = []
    for key in row.keys() - set(KEYS):
        similar = difflib.get_close_matches(key, KEYS, n=1)
        problems.append(f"{key!r} is not known: {f'did you mean {similar[0]!r}?' if similar else ', '.join(KEYS)}")
    if not isinstance(row.get("image"), str) or not row["image"].strip():
        problems.append('"image" is missing: a path or an http(s) address')
    own = row.get("edit", edits)
    own = [own] if isinstance(own, str) else own
    is_right = isinstance(own, list) and all(edit is None or isinstance(edit, str) and edit.strip() for edit in own)
    if not own or not is_right:
        problems.append('"edit" is missing or empty: an instruction, or a list of them')
    return row, problems + _find_output_problems(row) + _find_value_problems(row, settings)


def _find_output_problems(row: dict) -> list[str]:
    if "output" not in row:
        return []
    name = row["output"]
    if not isinstance(name, str) or Path(name).suffix.lower() not in WRITABLE or Path(name).name != name:
        return [f'"output" {name!r} must be a file name that ends in one of {", ".join(WRITABLE)}']
    return []


def _find_value_problems(row: dict, settings: Settings) -> list[str]:
    problems = []
    for key in WHOLE:
        if isinstance(row.get(key), float):
            problems.append(f"{key} {row[key]}: must be a whole number")
    for key in SWITCHES:
        if not isinstance(row.get(key, False), bool):
            problems.append(f"{key} {row[key]!r}: must be true or false")
    for key, known in (("scheduler", SCHEDULERS), ("timestep_spacing", SPACINGS)):
        if row.get(key) is not None and row[key] not in tuple(known):
            problems.append(f"{key} {row[key]!r}: choose one of {', '.join(known)}")
    merged = dataclasses.asdict(settings) | row
    return problems + find_setting_problems(row if problems else merged, prefix="")
