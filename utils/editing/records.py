"""The record inside an edited image: what it was made from and with, so that `--repeat` can make it again.

A record is JSON: model, adapter, instruction, seed, input, settings, machine and batch place (`service` fills it). It
has the file names of model and input but no folders. PNG stores it as text, JPEG, WebP and TIFF in the description of
EXIF, GIF as a comment; BMP cannot store it.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.atomic_files import make_writable
from utils.editing.inputs import WRITABLE
from utils.editing.jobs import Job
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.editing.settings import LIMITS, WHOLE_NUMBERS, EditSettings, fill_settings, find_setting_problems
from utils.errors import InputError
from utils.hub_names import is_hub_id, split_hub_file
from utils.image_sources import read_image_source
from utils.pixels import open_image

KEY = "instruct_pix2pix"
FORMAT = 1
IMAGE_DESCRIPTION = 0x010E
PNG_FORMATS = (".png", ".apng")
EXIF_FORMATS = (".jpg", ".jpeg", ".webp", ".tif", ".tiff")
SWITCHES = ("keep_size", "first_frame", "karras_sigmas")
RECORDED_CHOICES = {
    "scheduler": {*SCHEDULERS, *(class_name for class_name, _ in SCHEDULERS.values())},
    "timestep_spacing": set(SPACINGS),
    "dtype": {"fp32", "fp16", "bf16"},
}
MAX_ADAPTERS = 64
NOT_COMPARED = ("machine", "batch", "best_of")  # the first two decide the last bits alone
ADVICE = "give an image that infer.py or the page saved (editing or sending an image often removes its record)"


def make_record(
    origin: dict, *, name: str, content: bytes, instruction: str, seed: int, settings: dict[str, Any]
) -> dict:
    """The record of an edit without its batch place.

    origin: model, adapter and machine, with the settings of the whole run; name, content: of the input; settings: from
    `resolve_settings`.
    """
    interval = settings["guidance_interval"] and list(settings["guidance_interval"])  # as JSON reads it back
    return origin | {
        "format": FORMAT,
        "instruction": instruction,
        "seed": seed,
        "input": {"name": name, "digest": _digest(content)},
        "settings": settings | {"guidance_interval": interval} | origin.get("settings", {}),
    }


def as_text(record: dict) -> str:
    """The record as it is stored in an image: JSON in ASCII."""
    return json.dumps(record, sort_keys=True)


def record_for_pillow(path: Path, record: dict) -> dict[str, Any]:
    """The arguments with which Pillow's `save` stores the record in the image at `path`."""
    text = as_text(record)
    if path.suffix.lower() in PNG_FORMATS:
        info = PngInfo()
        info.add_text(KEY, text)
        return {"pnginfo": info}
    if path.suffix.lower() in EXIF_FORMATS:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = f"{KEY}:{text}"
        return {"exif": exif}
    if path.suffix.lower() == ".gif":
        return {"comment": f"{KEY}:{text}".encode()}
    return {}


def save_image(
    image: Image.Image, path: Path, record: dict | None = None, metadata: Image.Exif | None = None, **settings: Any
) -> None:
    """Save atomically, with the record of the edit and metadata (`metadata.kept_metadata`).

    settings: for Pillow. Raises InputError, as on a full disk.
    """
    unfinished = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")  # any name of 255 bytes fits
    stored = record_for_pillow(path, record) if record else {}
    if metadata is not None and path.suffix.lower() in (*PNG_FORMATS, *EXIF_FORMATS):
        if "exif" in stored:
            metadata[IMAGE_DESCRIPTION] = stored["exif"][IMAGE_DESCRIPTION]
        stored["exif"] = metadata
    file_format = {"format": "PNG"} if path.suffix.lower() == ".apng" else {}
    try:
        image.save(unfinished, **{"quality": 95} | settings | stored | file_format)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_record(path: Path) -> dict | None:
    """The record in an image; None where there is none."""
    try:
        with open_image(path) as image:
            text = image.info.get(KEY)
            if text is None and path.suffix.lower() in EXIF_FORMATS:
                described = image.getexif().get(IMAGE_DESCRIPTION, "")
                text = described.removeprefix(f"{KEY}:") if str(described).startswith(f"{KEY}:") else None
            if text is None and path.suffix.lower() == ".gif":
                comment = bytes(image.info.get("comment", b"")).decode(errors="replace")
                text = comment.removeprefix(f"{KEY}:") if comment.startswith(f"{KEY}:") else None
        record = json.loads(text) if text else None
    except Exception:  # Pillow raises anything on damaged files
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def find_differences(old: dict, new: dict) -> list[str]:
    """What differs between two records, as "steps 20, not 4"; empty for the same edit."""
    found = []
    for key in sorted((old.keys() | new.keys()) - set(NOT_COMPARED)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            prefix = "" if key == "settings" else f"{key} "
            names = sorted(before.keys() | after.keys())
            found += _compare({prefix + name: (before.get(name), after.get(name)) for name in names})
        else:
            found += _compare({key: (before, after)})
    return found


def _compare(values: dict[str, tuple[Any, Any]]) -> list[str]:
    shown = {name: ["none" if value is None else value for value in pair] for name, pair in values.items()}
    return [f"{name} {old}, not {new}" for name, (old, new) in shown.items() if values[name][0] != values[name][1]]


def require_record(image: Path) -> dict:
    """The record of the image of `--repeat`, every value checked. Raises InputError where there is none."""
    if not image.is_file():
        raise InputError(f"--repeat {image} does not exist: {ADVICE}")
    record = read_record(image)
    needed = {"model": dict, "instruction": str, "seed": int, "input": dict, "settings": dict}
    if record is None or not all(isinstance(record.get(key), kind) for key, kind in needed.items()):
        raise InputError(f"--repeat {image} has no record of an edit: {ADVICE}")
    if problems := find_record_problems(record):
        raise InputError(f"--repeat {image} has a damaged or forged record ({problems[0]}): {ADVICE}")
    return record


def find_record_problems(record: dict) -> list[str]:
    """What is wrong with the values of a record that has the needed keys: anyone can write one into an image."""
    problems = []
    several = record.get("adapters", [])
    if not isinstance(several, list) or len(several) > MAX_ADAPTERS:
        return [f"adapters {several!r:.80}"]
    sources = [("model", record["model"]), ("adapter", record.get("adapter", {"name": ""}))]
    for part, values in [*sources, *(("adapter", values) for values in several)]:
        if not isinstance(values, dict) or not isinstance(values.get("name"), (str, type(None))):
            problems.append(f"{part} {values!r:.80}")
            continue
        texts = {key: values.get(key) for key in ("revision", "variant", "weights")}
        problems += [f"{part} {key} {value!r:.80}" for key, value in texts.items() if not _is_optional(value, str)]
        problems += find_setting_problems({"lora_scale": values.get("scale")}, prefix=f"{part} ")
    settings = record["settings"]
    for key in (*SWITCHES, "compile", "vae_slicing", "vae_tiling", "no_safety_checker"):
        if not _is_optional(settings.get(key), bool):
            problems.append(f"{key} {settings[key]!r:.80}")
    for key, known in RECORDED_CHOICES.items():
        value = settings.get(key)
        if value is not None and not (isinstance(value, str) and value in known):
            problems.append(f"{key} {settings[key]!r:.80}")
    for key in WHOLE_NUMBERS:
        if not _is_optional(settings.get(key), int):
            problems.append(f"{key} {settings[key]!r:.80}")
    problems += find_setting_problems(settings | {"seed": record["seed"]}, prefix="")
    if not isinstance(record["input"].get("name", ""), str):
        problems.append(f"input {record['input']['name']!r:.80}")
    return problems + ([] if isinstance(record.get("machine", {}), dict) else ["machine"])


def recorded_adapters(record: dict) -> list[dict]:
    """The adapters of a record, each as {"adapter": its description}; records of several have a list."""
    several = record.get("adapters", [record["adapter"]] if "adapter" in record else [])
    return [{"adapter": one} for one in several]


def _is_optional(value: Any, kind: type) -> bool:
    return value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))


def plan_repeat(image: Path, record: dict, source: str | None, output: str | None) -> Job:
    """The job of `--repeat`: the same input, settings, seed and place in the batch.

    source: the input file, a folder that has it, or its address (default: the folder of the image). output: default
    IMAGE-repeated beside it. Raises InputError where the input is missing or is another one.
    """
    name = str(record["input"].get("name"))
    path = _find_input(image, Path(name).name, source)
    content = read_image_source(path, "--input")
    if _digest(content) != record["input"].get("digest"):
        raise InputError(f"--input {path} is not the file that {image} was made from: give the original {name}")
    target = Path(output) if output else image.with_name(f"{image.stem}-repeated{image.suffix}")
    if target.is_dir() or (output or "").endswith("/"):
        target = target / image.name
    if target.suffix.lower() not in WRITABLE or target.resolve() in (image.resolve(), Path(path).resolve()):
        raise InputError(f"--output {target} must be a new file whose name ends in one of {', '.join(WRITABLE)}")
    settings = fill_settings(EditSettings(), record["settings"])
    make_writable(target.parent, "--output")
    batch = record.get("batch")
    is_place = isinstance(batch, list) and len(batch) == 2 and all(type(number) is int for number in batch)
    place = tuple(batch) if is_place and 0 <= batch[0] < batch[1] <= LIMITS["batch_size"][1] else None
    return Job(name, lambda: content, record["instruction"], settings, record["seed"], 0, target, target, place)


def _find_input(image: Path, name: str, source: str | None) -> str:
    if source and ("://" in source or not Path(source).is_dir()):
        return source
    path = Path(source or image.parent) / name
    if not path.is_file():
        raise InputError(f"--repeat {image}: its input {name} is not in {path.parent}. Give it with --input")
    return str(path)


def find_model(record: dict, image: Path, is_trusted: bool, key: str = "model") -> str:
    """The model of a record, or with key="adapter" its adapter: a local path or a Hub id.

    Raises InputError where it is missing, and if `is_trusted` is False: whoever made the image chose the name.
    """
    name, flag = str(record[key].get("name")), "--model" if key == "model" else "--lora"
    if not is_trusted:
        raise InputError(
            f"--repeat {image}: its record names the {key} {name!r:.200}. Give {flag} with the one to load, or "
            "--trust_record to load what the record names"
        )
    if record[key].get("is_local", True) is not False:
        for folder in (Path(), image.parent):
            if name and Path(name).name == name and (folder / name).exists():
                return str(folder / name)
        raise InputError(f"--repeat {image}: its {key} {name} is not in this folder. Give its path with {flag}")
    if not is_hub_id(name) and (key == "model" or split_hub_file(name) is None):
        raise InputError(f"--repeat {image}: its {key} {name!r:.200} is not a Hub id. Give it with {flag}")
    return name
