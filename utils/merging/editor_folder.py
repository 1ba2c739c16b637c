"""An editor on disk: what its small files say, and its parts linked into another editor's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline

from utils.atomic_files import UNFINISHED, remove_whole
from utils.editing.loading import load_editor
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import snapshot_revision
from utils.models.single_file import is_single_file
from utils.models.stable_diffusion import Configs, require_editor

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".ckpt", ".onnx", ".pt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class EditorFolder:
    """An editor in diffusers' format. revision: its commit on the Hub; None for a local one."""

    name: str
    folder: Path
    revision: str | None
    variant: str | None
    index: dict
    unet_config: dict
    scheduler_config: dict

    @property
    def is_sdxl(self) -> bool:
        return Configs(self.unet_config, {}, {}).is_sdxl

    @property
    def layers_per_block(self) -> int | list[int]:
        return self.unet_config.get("layers_per_block", 2)


@contextmanager
def unpacking(name: str, config: str | None, cache_dir: str | None, workplace: Path) -> Iterator[Path | None]:
    """A model in one file as a folder inside `workplace`, for as long as it is needed; of others nothing.

    It is loaded whole, in float32: memory is that of the model, and the folder's size too. config: of what pipeline the
    file is (utils/models/single_file.py). Raises `InputError`.
    """
    if not is_single_file(name):
        yield None
        return
    with TemporaryDirectory(prefix=UNFINISHED, dir=workplace) as folder:
        load_editor(name, single_file_config=config, cache_dir=cache_dir).save_pretrained(folder)
        yield Path(folder)


def find_editor(
    name: str, revision: str | None, variant: str | None, cache_dir: str | None, unpacked: Path | None = None
) -> EditorFolder:
    """The editor in a folder, or downloaded from the Hub. Raises `InputError` for what is none.

    unpacked: where a single file was made a folder.
    """
    folder = unpacked or Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
            raise InputError(
                f"--model {name} is no folder: give that of a whole editor in diffusers' format, one .safetensors "
                "file, or an id on the Hub"
            )
        with explaining_load_errors(f"--model {name}"):
            folder = Path(DiffusionPipeline.download(name, revision=revision, variant=variant, cache_dir=cache_dir))
    index, unet, scheduler = (_read(folder, place, name) for place in (INDEX, "unet/config.json", ""))
    editor = EditorFolder(name, folder, snapshot_revision(folder), variant, index, unet, scheduler)
    require_editor(Configs(unet, {}, scheduler), name)
    parts = [part for part, source in index.items() if isinstance(source, list) and source[0] is not None]
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise InputError(f"--model {name} is not whole: it lacks {', '.join(missing)}")
    return editor


def _read(folder: Path, place: str, name: str) -> dict:
    place = place or "scheduler/scheduler_config.json"
    try:
        return json.loads((folder / place).read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"--model {name} is no whole editor in diffusers' format: it lacks {place}. A model in one .safetensors "
            "file is given by the file's own name"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: {place} cannot be read ({error}): copy it again") from error


def link_parts(editor: EditorFolder, target: Path, leave_out: Iterable[str]) -> None:
    """Put the editor's parts into `target`: hard links where the disk allows, else copies.

    Of each weight file that comes in several forms one is taken: safetensors, in the editor's variant, under the plain
    name, so that the result loads without naming a variant.
    """
    for part, source in editor.index.items():
        if not isinstance(source, list) or source[0] is None or part in leave_out:
            continue
        for path, plain in choose_files(editor.folder / part, editor.variant).items():
            _link(path, target / part / plain)
    for path in editor.folder.glob("LICEN[CS]E*"):
        _link(path, target / path.name)


def choose_files(folder: Path, variant: str | None) -> dict[Path, str]:
    """The files of a part that are needed, with the names they get."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in files if path.suffix in WEIGHTS or ".index." in path.name]
    chosen = {path: path.relative_to(folder).as_posix() for path in files if path not in weights}
    candidates = [path for path in weights if ".safetensors" in path.name] or weights
    infixes = {infix for path in candidates if (infix := _infix(path))}
    wanted = variant if variant in infixes else None
    if wanted is None and infixes and all(map(_infix, candidates)):
        wanted = sorted(infixes)[0]  # there is nothing else
    for path in candidates:
        if _infix(path) == wanted:
            name = path.relative_to(folder).as_posix()
            # The index names its shards, so these keep their names.
            chosen[path] = name if _SHARD.search(name) or not wanted else name.replace(f".{wanted}", "", 1)
    return chosen


def _infix(path: Path) -> str | None:
    """The variant in a weight file's name: "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"."""
    name = _SHARD.sub("", path.name).replace(".index", "").removesuffix(".json")
    parts = [part for part in name.split(".")[1:] if part not in ("safetensors", "bin", "pt", "msgpack", "ckpt")]
    return parts[0] if parts else None


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)  # the Hub's cache holds symbolic links
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)


def require_output_dir(output_dir: Path, inputs: Iterable[str]) -> bool:
    """Whether an adapted editor stands there already, which will be replaced.

    Raises `InputError` for the folder of an input, a file, and a folder of anything else, which is never written over.
    """
    if any(place.is_file() for place in (output_dir, *output_dir.parents)):
        raise InputError(f"--output_dir {output_dir} is a file, or lies below one: name a folder")
    for name in inputs:
        if output_dir.exists() and Path(name).exists() and Path(name).resolve().is_relative_to(output_dir.resolve()):
            raise InputError(f"--output_dir {output_dir} holds {name}, which is read: name another folder")
    standing = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    standing = [name for name in standing if not name.startswith(".")]
    if standing and "adapted.json" not in standing:
        raise InputError(
            f"--output_dir {output_dir} holds something else ({', '.join(sorted(standing)[:3])}), and only a former "
            "result of adapt_distill.py is replaced: name another folder"
        )
    return bool(standing)


def move_into(unfinished: Path, output_dir: Path) -> None:
    """Bring a finished editor to its place: `adapted.json` first, which says whose folder it is, the index last.

    Until the index stands nothing takes the folder for an editor. What a former result has besides goes.
    """
    for name in _former_files(output_dir):
        remove_whole(output_dir / name)
    order = {"adapted.json": 0, INDEX: 2}
    for path in sorted(unfinished.iterdir(), key=lambda path: (order.get(path.name, 1), path.name)):
        remove_whole(output_dir / path.name)
        path.rename(output_dir / path.name)
    unfinished.rmdir()


def _former_files(output_dir: Path) -> list[str]:
    """The files and parts of an editor that stands there, its index first."""
    parts = list(_read(output_dir, INDEX, str(output_dir))) if (output_dir / INDEX).is_file() else []
    calibration = [path.name for path in output_dir.glob("calibration*") if path.is_file()]
    return [INDEX, *calibration, *(part for part in parts if (output_dir / part).is_dir())]
