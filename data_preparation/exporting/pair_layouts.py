"""The folders of pairs that other trainers read, written one pair at a time.

Each `open_*` returns (add, finish): add(name, pair) writes a pair under a name that sorts as the rows do, finish()
writes what lists them. All are read back by utils/data.
"""

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
SAMPLES_PER_TAR = 1000


class ExportedPair(NamedTuple):
    """original, edited: the bytes of image files. captions: of both images, "" if unknown."""

    original: bytes
    prompt: str
    edited: bytes
    captions: tuple[str, str] = ("", "")


class LayoutWriter(NamedTuple):
    add: Callable[[str, ExportedPair], None]
    finish: Callable[[], None]


def image_name(name: str, content: bytes) -> str:
    """The file name of an image, with the suffix of its format."""
    from utils.pixels import open_image

    return f"{name}.{SUFFIXES[open_image(content).format]}"


def open_caption_files(folder: Path, place: Path, *, names: tuple[str, str]) -> LayoutWriter:
    """Two folders of images with the same names, and a .txt file beside each edited image."""
    originals, edited = _make_folders(folder, names)

    def add(name: str, pair: ExportedPair) -> None:
        (originals / image_name(name, pair.original)).write_bytes(pair.original)
        (edited / image_name(name, pair.edited)).write_bytes(pair.edited)
        (edited / f"{name}.txt").write_text(one_line(pair.prompt) + "\n", encoding="utf-8")

    return LayoutWriter(add, lambda: None)


def open_metadata(
    folder: Path, place: Path, *, names: tuple[str, str], columns: tuple[str, str, str], is_absolute: bool = False
) -> LayoutWriter:
    """Two folders of images, and metadata.jsonl with the columns (original, instruction, edited)."""
    folders, lines = _make_folders(folder, names), []

    def add(name: str, pair: ExportedPair) -> None:
        paths = []
        for directory, content in zip(folders, (pair.original, pair.edited), strict=True):
            file = directory / image_name(name, content)
            file.write_bytes(content)
            relative = file.relative_to(folder)
            paths.append(str(place / relative) if is_absolute else relative.as_posix())
        row = dict(zip(columns, (paths[0], pair.prompt, paths[1]), strict=True))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")

    def finish() -> None:
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    return LayoutWriter(add, finish)


def open_seed_folders(folder: Path, place: Path) -> LayoutWriter:
    """The layout of utils/data/seed_folders.py. The original opens only files named .jpg, of whatever format."""
    seeds: list[tuple[str, list[str]]] = []

    def add(name: str, pair: ExportedPair) -> None:
        directory = folder / name
        directory.mkdir()
        values = {"input": pair.captions[0], "edit": pair.prompt, "output": pair.captions[1]}
        (directory / "prompt.json").write_text(json.dumps(values), encoding="utf-8")
        for side, content in enumerate((pair.original, pair.edited)):
            (directory / f"0_{side}.jpg").write_bytes(content)
        seeds.append((name, ["0"]))

    return LayoutWriter(add, lambda: (folder / "seeds.json").write_text(json.dumps(seeds)))


def open_tars(folder: Path, place: Path) -> LayoutWriter:
    """WebDataset: train-000000.tar and so on, with 0000000.original.png, 0000000.edited.png and 0000000.txt."""
    opened: list[tarfile.TarFile] = []
    count = 0

    def add(name: str, pair: ExportedPair) -> None:
        nonlocal count
        if count % SAMPLES_PER_TAR == 0:
            finish()
            path = folder / f"train-{count // SAMPLES_PER_TAR:06d}.tar"
            opened.append(tarfile.open(path, "w"))  # noqa: SIM115
        count += 1
        members = {image_name(f"{name}.original", pair.original): pair.original}
        members |= {image_name(f"{name}.edited", pair.edited): pair.edited, f"{name}.txt": pair.prompt.encode()}
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            opened[-1].addfile(info, io.BytesIO(content))

    def finish() -> None:
        if opened:
            opened.pop().close()

    return LayoutWriter(add, finish)


def one_line(prompt: str) -> str:
    """The instruction in one line: some trainers take the lines of a caption file for several captions."""
    return " ".join(prompt.split())


def _make_folders(folder: Path, names: tuple[str, str]) -> tuple[Path, Path]:
    for name in names:
        (folder / name).mkdir()
    return folder / names[0], folder / names[1]


_SD_SCRIPTS = ("control_path", "caption", "image_path")
_DIFFSYNTH = ("edit_image", "prompt", "image")
_IMAGEFOLDER = ("original_image_file_name", "edit_prompt", "edited_image_file_name")
# By name: a function from (folder to write, its later place).
LAYOUTS: dict[str, Callable[[Path, Path], LayoutWriter]] = {
    "control_target": partial(open_caption_files, names=("control", "target")),
    "source_target": partial(open_caption_files, names=("source", "target")),
    "sd_scripts": partial(open_metadata, names=("control", "images"), columns=_SD_SCRIPTS, is_absolute=True),
    "diffsynth": partial(open_metadata, names=("edit_image", "image"), columns=_DIFFSYNTH),
    "imagefolder": partial(open_metadata, names=("original_image", "edited_image"), columns=_IMAGEFOLDER),
    "seeds": open_seed_folders,
    "webdataset": open_tars,
}
