"""`--repeat`: the job that a picture's record tells of. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path

from utils.editing.jobs import WRITABLE, Job, Settings, check_writable, fill, find_setting_problems
from utils.editing.records import digest
from utils.errors import InputError
from utils.pictures import read_source


def plan_repeat(picture: Path, record: dict, source: str | None, output: str | None) -> Job:
    """The one job of `--repeat`: same input, settings, seed and place in the batch.

    source: where the input is, a file, a folder that holds it, or an address (default: beside the picture). output:
    default PICTURE-repeated.png beside it. Raises InputError where the input is not found or is another.
    """
    name = str(record["input"].get("name"))
    path = _find_input(picture, Path(name).name, source)
    content = read_source(path, "--input")
    if digest(content) != record["input"].get("digest"):
        raise InputError(f"--input {path} is not what {picture} was made of: give the {name} of then")
    target = Path(output) if output else picture.with_name(f"{picture.stem}-repeated{picture.suffix}")
    if target.is_dir() or (output or "").endswith("/"):
        target = target / picture.name
    if target.suffix.lower() not in WRITABLE or target.resolve() in (picture.resolve(), Path(path).resolve()):
        raise InputError(f"--output {target} must be another picture than the two, ending in {', '.join(WRITABLE)}")
    settings = fill(Settings(), record["settings"])
    values = {name: getattr(settings, name) for name in Settings.__dataclass_fields__} | {"seed": record["seed"]}
    if problems := find_setting_problems(values, prefix=""):
        raise InputError(f"--repeat {picture} is damaged: {problems[0]}")
    check_writable(target.parent)
    batch = record.get("batch")
    is_place = isinstance(batch, list) and len(batch) == 2 and all(isinstance(number, int) for number in batch)
    place = tuple(batch) if is_place and 0 <= batch[0] < batch[1] <= 1024 else None
    return Job(
        name, lambda: content, target, record["instruction"], settings, seed=record["seed"], batch=place, base=target
    )


def _find_input(picture: Path, name: str, source: str | None) -> str:
    if source and ("://" in source or not Path(source).is_dir()):
        return source
    path = Path(source or picture.parent) / name
    if not path.is_file():
        raise InputError(f"the input {name} of {picture} is not in {path.parent}: give it by --input")
    return str(path)


def find_model(record: dict, picture: Path, key: str = "model") -> str:
    """The model (or the adapter, by `key`) of a record: where it lies here, or its id on the Hub. Raises InputError."""
    name = str(record[key].get("name"))
    if record[key].get("is_local", True):
        for folder in (Path(), picture.parent):
            if (folder / name).exists():
                return str(folder / name)
        flag = "--model" if key == "model" else "--lora"
        raise InputError(f"the {key} {name} of {picture} lies somewhere on this machine: give it by {flag}")
    return name
