"""Which edits to make and where to save them: for one image, a folder of images, or a file of jobs."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from utils.atomic_files import make_writable
from utils.editing.inputs import WRITABLE, InputImage, SourceReader, animated_suffix, find_inputs, limit_name
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.editing.settings import WHOLE_NUMBERS, EditSettings, fill_settings, find_setting_problems
from utils.errors import InputError
from utils.json_lines import parse_json_object
from utils.pixels import BadRow, decode_image, num_frames

SLUG_LENGTH = 40
MAX_PROBLEMS = 10  # of a file of jobs
OTHER_KEYS = ("image", "edit", "output", "seed", "num_images")
KEYS = (*OTHER_KEYS, *(field.name for field in fields(EditSettings)))
COUNTS = (*WHOLE_NUMBERS, "seed", "num_images")
SWITCHES = ("keep_size", "randomize_cfg", "first_frame", "karras_sigmas")
TEXTS = ("background", "negative_prompt")
CHOICES = {"scheduler": tuple(SCHEDULERS), "timestep_spacing": SPACINGS}


@dataclass(frozen=True)
class Job:
    """One edit to make.

    name: file name of the input; read: returns the input's bytes, or raises InputError or BadRow, and is the same
    object for all jobs of one input; instruction: None draws one from the seed; seed: None is the seed of the run;
    offset is added to either; output: None leaves saving to the caller; base: the path from which the outputs of one
    input are named; batch_place: (row, size) of the batch to edit in, which decides the last bits, None for any.
    """

    name: str
    read: Callable[[], bytes]
    instruction: str | None
    settings: EditSettings = EditSettings()
    seed: int | None = None
    offset: int = 0
    output: Path | None = None
    base: Path | None = None
    batch_place: tuple[int, int] | None = None


def plan_input(
    sources: str | list[str],
    output: str | None,
    edits: list[str | None],
    settings: EditSettings,
    num_images: int = 1,
    recursive: bool = False,
    say: Callable[[str], None] = print,
) -> list[Job]:
    """The jobs of `--input`: every image with every edit, `num_images` times.

    sources: paths, folders, patterns or URLs. One image is saved as `output`, those of a folder or of several sources
    in the folder `output`. Creates the output folder and reads a single image at once. say: called with a line for
    everything that is skipped. Raises InputError.
    """
    sources = [sources] if isinstance(sources, str) else sources
    images = find_inputs(sources, recursive, say)
    path = Path(sources[0]).expanduser()
    if len(sources) == 1 and len(images) == 1 and (images[0].path is None or images[0].path == path):
        return _plan_single(sources[0], images[0], output, edits, settings, num_images)
    is_folder = len(sources) == 1 and path.is_dir()
    target = Path(output or (f"{path.resolve()}-edited" if is_folder else "edited")).expanduser()
    if target.exists() and not target.is_dir():
        what = f"--input {sources[0]} is a folder" if is_folder else f"--input names {len(images)} images"
        raise InputError(f"--output {target} is a file, and {what}: give a folder")
    if is_folder and target.resolve() == path.resolve():
        raise InputError(f"--output {target} is the input folder itself: choose another one")
    make_writable(target, "--output")
    jobs = []
    for image in images:
        base = target / image.target.with_suffix(animated_suffix(image))
        if image.path is not None and base.resolve() == image.path.resolve():
            raise InputError(f"--output {target} would overwrite {image.path}: choose another folder")
        base.parent.mkdir(parents=True, exist_ok=True)
        jobs += _plan_image(image.name, image.read, base, edits, settings, num_images)
    _require_distinct_outputs(jobs)
    return jobs


def _plan_single(
    source: str, image: InputImage, output: str | None, edits: list[str | None], settings: EditSettings, num_images: int
) -> list[Job]:
    content = image.read()
    try:
        suffix = ".png" if num_frames(content) == 1 or settings.first_frame else animated_suffix(image)
        decode_image(content)
    except BadRow as error:
        raise InputError(f"--input {source} cannot be used: {error.reason}") from error
    stem = Path(image.name).stem or "image"
    target = limit_name(Path(output).expanduser() if output else Path(f"{stem}-edited{suffix}"))
    if target.is_dir() or (output or "").endswith("/"):
        target = target / f"{stem}{suffix}"
    if target.suffix.lower() not in WRITABLE:
        raise InputError(f"--output {target}: the name must end in one of {', '.join(WRITABLE)}")
    if image.path is not None and target.resolve() == image.path.resolve():
        raise InputError(f"--output {target} is the input itself: choose another name")
    make_writable(target.parent, "--output")
    return list(_plan_image(image.name, lambda: content, target, edits, settings, num_images))


def plan_job_file(
    file: Path, output: str | None, edits: list[str | None], settings: EditSettings, num_images: int = 1
) -> list[Job]:
    """The jobs of `--jobs`, one JSON object per line; the flags fill in what a line does not set.

    Image paths are relative to the file. Outputs go to the folder `output` (default: FILE-edited beside the file) under
    the line's "output" or the image's name; the line number is added where several lines have the same image name.
    Raises InputError with the first mistakes of all lines.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--jobs {file} cannot be read: {error}") from error
    target = Path(output) if output else file.with_name(f"{file.stem}-edited")
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file, and --jobs needs a folder")
    rows, problems = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"--jobs {file}, line {number}"
            try:
                rows[number] = parse_json_object(line, where)
                problems += [f"{where}: {problem}" for problem in _find_row_problems(rows[number], settings, edits)]
            except InputError as error:
                problems.append(str(error))
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"--jobs {file}: and {len(problems) - MAX_PROBLEMS} more"]
    if problems or not rows:
        raise InputError.from_problems(problems or [f"--jobs {file} is empty: write one JSON object per line"])
    make_writable(target, "--output")
    jobs = list(_plan_rows(rows, file.parent, target, edits, settings, num_images))
    _require_distinct_outputs(jobs)
    return jobs


def _plan_rows(
    rows: dict[int, dict], folder: Path, target: Path, edits: list[str | None], settings: EditSettings, num_images: int
) -> Iterator[Job]:
    inputs = {number: _input_name(row["image"]) for number, row in rows.items()}
    names = {number: row.get("output") or f"{Path(inputs[number]).stem or 'image'}.png" for number, row in rows.items()}
    reader = SourceReader()
    for number, row in rows.items():
        source = row["image"] if "://" in row["image"] else str(folder / row["image"])
        output = target / names[number]
        if "output" not in row and list(names.values()).count(names[number]) > 1:
            output = add_suffix(output, f"-{number}")
        if "://" not in source and output.resolve() == Path(source).resolve():
            raise InputError(f"--jobs line {number} would overwrite its own image {source}: choose another --output")
        own_edits = [row["edit"]] if isinstance(row.get("edit"), str) else row.get("edit", edits)
        read = reader(source, f"line {number}:")
        count = row.get("num_images", num_images)
        yield from _plan_image(
            inputs[number], read, output, own_edits, fill_settings(settings, row), count, row.get("seed")
        )


def _input_name(image: str) -> str:
    return Path(unquote(urlsplit(image).path) if "://" in image else image).name


def _plan_image(
    name: str,
    read: Callable[[], bytes],
    base: Path,
    edits: list[str | None],
    settings: EditSettings,
    num_images: int,
    seed: int | None = None,
) -> Iterator[Job]:
    """The jobs of one input image."""
    for suffix, edit, offset in list_variants(edits, num_images):
        output = limit_name(add_suffix(base, suffix))
        yield Job(name, read, edit, settings, seed, offset, output, limit_name(base))


def _find_row_problems(row: dict[str, Any], settings: EditSettings, edits: list[str | None]) -> Iterator[str]:
    """What is wrong with one line of a file of jobs, given the settings and edits of the flags."""
    for key in row.keys() - set(KEYS):
        similar = difflib.get_close_matches(key, KEYS, n=1)
        yield f"unknown key {key!r}: {f'did you mean {similar[0]!r}?' if similar else ', '.join(KEYS)}"
    if not isinstance(row.get("image"), str) or not row["image"].strip():
        yield '"image" is missing: give a path or an http(s) address'
    own = row.get("edit", edits)
    own = [own] if isinstance(own, str) else own
    if not (own and isinstance(own, list) and all(edit is None or _is_text(edit) for edit in own)):
        yield '"edit" is missing or empty: give an instruction, or a list of them'
    output = row.get("output", "edited.png")
    if not isinstance(output, str) or Path(output).suffix.lower() not in WRITABLE or Path(output).name != output:
        yield f'"output" {output!r} must be a file name that ends in one of {", ".join(WRITABLE)}'
    problems = [f"{key} {row[key]}: must be a whole number" for key in COUNTS if isinstance(row.get(key), float)]
    problems += [
        f"{key} {row[key]!r}: must be true or false" for key in SWITCHES if not isinstance(row.get(key, False), bool)
    ]
    problems += [f"{key} {row[key]!r}: must be text" for key in TEXTS if not isinstance(row.get(key, ""), str)]
    for key, known in CHOICES.items():
        if row.get(key) is not None and row[key] not in known:
            problems.append(f"{key} {row[key]!r}: choose one of {', '.join(known)}")
    yield from problems + find_setting_problems(row if problems else asdict(settings) | row, prefix="")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def list_variants(edits: list[str | None], num_images: int) -> Iterator[tuple[str, str | None, int]]:
    """(suffix of the output's name, instruction, offset of the seed) of every edit of one image."""
    slugs = [make_slug(edit or "") for edit in edits]
    for index, (edit, slug) in enumerate(zip(edits, slugs, strict=True)):
        name = slug if slug and slugs.count(slug) == 1 else f"{slug}-{index + 1}".lstrip("-")
        for offset in range(num_images):
            named = f"-{name}" if len(edits) > 1 else ""
            yield f"{named}-{offset + 1}" if num_images > 1 else named, edit, offset


def make_slug(text: str) -> str:
    """An instruction as a part of a file name: its letters and digits, joined by hyphens."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)[:SLUG_LENGTH].rstrip("-")


def add_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _require_distinct_outputs(jobs: list[Job]) -> None:
    seen: set[Path] = set()
    for job in jobs:
        if job.output in seen:
            raise InputError(
                f"two edits would be saved as {job.output}: rename an input, or set names in a --jobs file"
            )
        seen.add(job.output)
