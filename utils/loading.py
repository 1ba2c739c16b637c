"""An editor and the device that runs it, from what the user names on the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionInstructPix2PixPipeline as Editor

from utils.errors import InputError
from utils.load_errors import explaining_load_errors
from utils.models import require_editor


def choose_device(device: str = "auto", dtype: str | None = None) -> tuple[str, torch.dtype]:
    """The device ("auto": cuda, mps, cpu, the first there is) and dtype (fp32, fp16, bf16; None: fp16 on cuda only).

    Raises InputError for what this machine does not have or cannot do.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device == "auto":
        device = next(name for name, count in there.items() if count)
    kind, _, index = device.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= there.get(kind, 0):
        raise InputError(
            f"--device {device} is not there; this machine has {', '.join(k for k, n in there.items() if n)}"
        )
    dtype = dtype or ("fp16" if kind == "cuda" else "fp32")
    if kind == "cpu" and dtype == "fp16":
        raise InputError("--dtype fp16 does not work on the CPU: use fp32 or bf16")
    return device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def load_editor(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
) -> Editor:
    """An SD 1.x/2.x editor from a folder or the Hub, on `device` in `dtype`.

    What the model is gets checked by its two small JSON files, before the weights are read or downloaded.
    Raises InputError where the folder is missing, the Hub out of reach, a file damaged, or the model no editor.
    """
    name = str(path_or_id)
    _check_path(name)
    place = {"revision": revision, "cache_dir": cache_dir}
    with explaining_load_errors(f"the model {name}"):
        index = DiffusionPipeline.load_config(name, **place)
        missing = [part for part, source in index.items() if _is_missing(name, part, source)]
        if missing:
            raise InputError(f"the model {name} is not whole: it lacks {', '.join(missing)}")
        if "XL" in index.get("_class_name", ""):
            raise InputError(f"{name} is a {index['_class_name']}: SDXL editors are not supported yet")
        require_editor(UNet2DConditionModel.load_config(name, subfolder="unet", **place), name)
        # Always a dtype: left open, diffusers and transformers would each choose their own.
        pipeline = Editor.from_pretrained(name, dtype=dtype, variant=variant, **place)
    return pipeline.to(device)


def _check_path(name: str) -> None:
    """Name what is wrong with a path before it is taken for an id on the Hub."""
    if Path(name).is_file():
        raise InputError(
            f"{name} is a file, and the folder of a diffusers pipeline is needed; convert a checkpoint once: "
            "StableDiffusionInstructPix2PixPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    looks_local = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
    if not Path(name).is_dir() and looks_local:
        raise InputError(f"the model folder {name} does not exist")


def _is_missing(name: str, part: str, source: object) -> bool:
    """Whether a local pipeline lacks a component that its index (`"unet": ["diffusers", "UNet…"]`) promises."""
    is_component = isinstance(source, list) and source[0] is not None
    return is_component and Path(name).is_dir() and not (Path(name) / part).is_dir()
