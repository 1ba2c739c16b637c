"""The folder of an editor: found, checked, its components linked into a new folder, and the new folder moved in."""

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

from utils.atomic_files import UNFINISHED, remove_path
from utils.editing.loading import load_editor
from utils.editing.settings import ADAPTED
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path, snapshot_revision
from utils.merging.weight_sources import WeightSource
from utils.models.single_file import is_single_file
from utils.models.stable_diffusion import Configs, require_editor

INDEX = "model_index.json"
WEIGHT_FORMATS = (".safetensors", ".bin", ".msgpack", ".ckpt", ".onnx", ".pt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class EditorFolder:
    """An editor in diffusers' format. revision: its commit on the Hub; None for a local folder."""

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

    @property
    def components(self) -> list[str]:
        return [name for name, value in self.index.items() if isinstance(value, list) and value[0] is not None]


@contextmanager
def unpacked_editor(name: str, config: str | None, cache_dir: str | None, parent: Path) -> Iterator[Path | None]:
    """Convert an editor in one file to a temporary folder inside `parent`; yields None for other names.

    The model is loaded into memory in float32. config: see `read_single_file`. Raises `InputError`.
    """
    if not is_single_file(name):
        yield None
        return
    with TemporaryDirectory(prefix=UNFINISHED, dir=parent) as folder:
        load_editor(name, single_file_config=config, cache_dir=cache_dir).save_pretrained(folder)
        yield Path(folder)


def find_editor(model: WeightSource, cache_dir: str | None, unpacked: Path | None = None) -> EditorFolder:
    """The editor in a folder, or downloaded from the Hub. Raises `InputError` if it is not a complete editor.

    unpacked: the folder to use instead of a single file.
    """
    name, folder = model.name, unpacked or Path(model.name)
    if not folder.is_dir():
        if looks_like_path(name):
            raise InputError(
                f"--model {name} is not a folder: give the folder of an editor in diffusers' format, a .safetensors "
                "file, or a Hub id"
            )
        with explaining_load_errors(f"--model {name}"):
            place = dict(revision=model.revision, variant=model.variant, cache_dir=cache_dir)
            folder = Path(DiffusionPipeline.download(name, **place))
    files = (INDEX, "unet/config.json", "scheduler/scheduler_config.json")
    configs = [_read_json(folder, file, name) for file in files]
    editor = EditorFolder(name, folder, snapshot_revision(folder), model.variant, *configs)
    require_editor(Configs(editor.unet_config, {}, editor.scheduler_config), name)
    if missing := [part for part in editor.components if not (folder / part).is_dir()]:
        raise InputError(f"--model {name} is incomplete: missing {', '.join(missing)}")
    return editor


def _read_json(folder: Path, file: str, name: str) -> dict:
    try:
        return json.loads((folder / file).read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"--model {name} is not a complete editor in diffusers' format: missing {file}. For a model in one "
            ".safetensors file, give the path of the file"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: {file} cannot be read ({error}): copy it again") from error


def link_components(editor: EditorFolder, target: Path, leave_out: Iterable[str]) -> None:
    """Put the editor's components into `target`: hard links if the disk allows them, else copies.

    Of weights in several formats only one is used: safetensors in the editor's variant, renamed so that the result
    loads without a variant.
    """
    for part in editor.components:
        if part not in leave_out:
            for path, name in _choose_files(editor.folder / part, editor.variant).items():
                _link(path, target / part / name)
    for path in editor.folder.glob("LICEN[CS]E*"):
        _link(path, target / path.name)


def _choose_files(folder: Path, variant: str | None) -> dict[Path, str]:
    """The necessary files of a component -> their names without the variant."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in files if path.suffix in WEIGHT_FORMATS or ".index." in path.name]
    chosen = {path: path.relative_to(folder).as_posix() for path in files if path not in weights}
    candidates = [path for path in weights if ".safetensors" in path.name] or weights
    variants = {found for path in candidates if (found := _variant_of(path))}
    wanted = variant if variant in variants else None
    if wanted is None and variants and all(map(_variant_of, candidates)):
        wanted = sorted(variants)[0]  # there are no others
    for path in candidates:
        if _variant_of(path) == wanted:
            name = path.relative_to(folder).as_posix()
            # Shards keep their names, which are in the index.
            chosen[path] = name if _SHARD.search(name) or not wanted else name.replace(f".{wanted}", "", 1)
    return chosen


def _variant_of(path: Path) -> str | None:
    """The variant of a weight file: "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors" -> "fp16"."""
    name = _SHARD.sub("", path.name).replace(".index", "").removesuffix(".json")
    parts = [part for part in name.split(".")[1:] if part not in ("safetensors", "bin", "pt", "msgpack", "ckpt")]
    return parts[0] if parts else None


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)  # the files of the Hub's cache are symbolic links
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(path, target)


def require_output_dir(output_dir: Path, inputs: Iterable[str]) -> bool:
    """Whether the folder contains an adapted editor, which will be replaced.

    Raises `InputError` for a file, a folder that contains an input, and a folder with other files.
    """
    if any(path.is_file() for path in (output_dir, *output_dir.parents)):
        raise InputError(f"--output_dir {output_dir} is a file or inside one: give a folder")
    for name in inputs:
        if output_dir.exists() and Path(name).exists() and Path(name).resolve().is_relative_to(output_dir.resolve()):
            raise InputError(f"--output_dir {output_dir} contains the input {name}: give another folder")
    existing = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    existing = [name for name in existing if not name.startswith(".")]
    if existing and ADAPTED not in existing:
        raise InputError(
            f"--output_dir {output_dir} contains other files ({', '.join(sorted(existing)[:3])}), and only an earlier "
            "result of adapt_distill.py is replaced: give another folder"
        )
    return bool(existing)


def move_into(unfinished: Path, output_dir: Path) -> None:
    """Move a finished editor into `output_dir` and remove the earlier editor there.

    `adapted.json` comes first: it allows the next run to replace the folder. The index comes last: without it the
    folder does not load, so an interruption leaves no mixture of two editors.
    """
    components = list(_read_json(output_dir, INDEX, str(output_dir))) if (output_dir / INDEX).is_file() else []
    calibration = [path.name for path in output_dir.glob("calibration*") if path.is_file()]
    for name in [INDEX, *calibration, *(part for part in components if (output_dir / part).is_dir())]:
        remove_path(output_dir / name)
    order = {ADAPTED: 0, INDEX: 2}
    for path in sorted(unfinished.iterdir(), key=lambda path: (order.get(path.name, 1), path.name)):
        remove_path(output_dir / path.name)
        path.rename(output_dir / path.name)
    unfinished.rmdir()
