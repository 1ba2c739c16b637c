"""The record of an edit inside its picture: what made it, so that it can be repeated and need not be made twice.

A record is JSON: model, adapter, instruction, seed, input, settings, machine and batch (`edit_runs` fills it).
Of the user's machine it holds the file names of model and input, no folders. PNG keeps it as text, JPEG, WebP and TIFF
in EXIF's description, BMP not at all.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.errors import InputError

KEY = "instruct_pix2pix"
FORMAT = 1
IMAGE_DESCRIPTION = 0x010E
EXIF_FORMATS = (".jpg", ".jpeg", ".webp", ".tif", ".tiff")
CIRCUMSTANCES = ("machine", "batch")  # of a record: they decide the last bits, and not what the edit is


def make_record(
    origin: dict, *, name: str, content: bytes, instruction: str, seed: int, settings: dict[str, Any]
) -> dict:
    """The record of an edit.

    origin: what is known of model, adapter and machine, with the settings of the whole run; name, content: of the
    input; settings: those of the edit, every choice made.
    """
    interval = settings["guidance_interval"] and list(settings["guidance_interval"])  # as JSON gives it back
    return origin | {
        "format": FORMAT,
        "instruction": instruction,
        "seed": seed,
        "input": {"name": name, "digest": digest(content)},
        "settings": settings | {"guidance_interval": interval} | origin.get("settings", {}),
    }


def as_text(record: dict) -> str:
    """The record as it stands in a picture: ASCII alone, other letters are escaped."""
    return json.dumps(record, sort_keys=True)


def record_settings(path: Path, record: dict) -> dict[str, Any]:
    """What Pillow's `save` must be given so that the picture at `path` carries the record."""
    text = as_text(record)
    if path.suffix.lower() == ".png":
        info = PngInfo()
        info.add_text(KEY, text)
        return {"pnginfo": info}
    if path.suffix.lower() in EXIF_FORMATS:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = f"{KEY}:{text}"
        return {"exif": exif}
    return {}


def read_record(path: Path) -> dict | None:
    """The record in a picture; None where there is none, or no picture."""
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
            if text is None and path.suffix.lower() in EXIF_FORMATS:
                described = image.getexif().get(IMAGE_DESCRIPTION, "")
                text = described.removeprefix(f"{KEY}:") if str(described).startswith(f"{KEY}:") else None
        record = json.loads(text) if text else None
    except Exception:  # Pillow raises anything on damaged files, and a damaged picture has no record
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def find_differences(old: dict, new: dict) -> list[str]:
    """What an edit's record says otherwise than another, as "steps 20, not 4"; empty for the same edit."""
    found = []
    for key in sorted((old.keys() | new.keys()) - set(CIRCUMSTANCES)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [problem if key == "settings" else f"{key} {problem}" for problem in _compare(before, after)]
        elif before != after:
            found.append(f"{key} {_show(before)}, not {_show(after)}")
    return found


def _compare(old: dict, new: dict) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [
        f"{name} {_show(old.get(name))}, not {_show(new.get(name))}" for name in names if old.get(name) != new.get(name)
    ]


def _show(value: object) -> str:
    return "none" if value is None else str(value)


def require_record(picture: Path) -> dict:
    """The record of the picture of `--repeat`. Raises InputError where there is none."""
    if not picture.is_file():
        raise InputError(f"--repeat {picture} does not exist: give a picture that infer.py made")
    record = read_record(picture)
    needed = {"model": dict, "instruction": str, "seed": int, "input": dict, "settings": dict}
    if record is None or not all(isinstance(record.get(key), kind) for key, kind in needed.items()):
        raise InputError(
            f"--repeat {picture} holds no record of an edit: give a picture as infer.py made it (what edits or sends "
            "pictures often drops such records)"
        )
    return record
