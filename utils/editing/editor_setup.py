"""An editor opened for a run: its recommended settings, what a record says of it, and how it is set up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from utils.editing.edit_images import Editor
from utils.editing.flags import EditorOptions
from utils.editing.jobs import Recommended, find_setting_problems
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.runtime import choose_device

ADAPTED = "adapted.json"  # written by adapt_distill.py
RECOMMENDED = tuple(field.name for field in fields(Recommended))
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SAMPLE = 64  # values of each tensor that a digest looks at


def read_recommended(
    name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> dict[str, float]:
    """Settings that the maker of a few-step editor recommends: what `adapted.json` has of `RECOMMENDED`, else nothing.

    The scheduler that it names too stands in the folder's own configuration. Raises InputError for a damaged file.
    """
    file = Path(name) / ADAPTED
    if not Path(name).exists():
        try:
            file = Path(hf_hub_download(str(name), ADAPTED, revision=revision, cache_dir=cache_dir))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
            return {}  # most models have none, and why a model cannot be had is told where it is loaded
    if not file.is_file():
        return {}
    try:
        recommended = json.loads(file.read_text(encoding="utf-8"))["recommended"]
        found = {key: recommended[key] for key in RECOMMENDED if recommended.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error}): make the editor again") from error
    if problems := find_setting_problems(found, prefix=f"{file}: "):
        raise InputError.from_problems(problems)
    return found


def digest_weights(pipeline: Any) -> str:
    """A digest of the editor's weights, by some values of each tensor: training and adapters change nearly all."""
    seen = hashlib.blake2b(digest_size=16)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for name, value in module.named_parameters() if module is not None else ():
            seen.update(f"{part}.{name} {tuple(value.shape)}".encode())
            seen.update(value.detach().flatten()[:SAMPLE].float().cpu().numpy().tobytes())
    return seen.hexdigest()


@dataclass(frozen=True)
class OpenedEditor:
    """origin: what the record of an edit says of model, adapter and machine; messages: for the user, one line each."""

    pipeline: Editor
    origin: dict[str, dict]
    recommended: dict[str, float]
    messages: list[str]


def open_editor(options: EditorOptions, record: dict | None = None, picture: Path | None = None) -> OpenedEditor:
    """The editor that the flags name, on its device and set up.

    record: of a `picture` that is to be repeated, whose model it must be. Raises InputError.
    """
    device, dtype = choose_device(options.device, options.dtype)
    scale = 1.0 if options.lora_scale is None else options.lora_scale
    pipeline = load_editor(
        options.model,
        dtype=dtype,
        device=device,
        revision=options.revision,
        variant=options.variant,
        lora=options.lora,
        lora_scale=scale,
        single_file_config=options.single_file_config,
        safety_checker=not options.no_safety_checker,
    )
    weights = digest_weights(pipeline)
    if record and record["model"].get("weights") != weights:
        raise InputError(f"{options.model} is not the model that made {picture}: its weights are others")
    own = {"revision": options.revision, "variant": options.variant, "weights": weights}
    origin = {"model": _name(options.model) | {key: value for key, value in own.items() if value is not None}}
    if options.lora:
        origin["adapter"] = _name(options.lora) | {"scale": scale}
    lacking = set_up(
        pipeline, compile_unet=options.compile, vae_slicing=options.vae_slicing, vae_tiling=options.vae_tiling
    )
    other = match_machine(pipeline, record.get("machine", {})) if record else ""
    switches = {name: getattr(options, name) for name in ("vae_slicing", "vae_tiling", "no_safety_checker")}
    compiled = {"compile": options.compile and not lacking}
    origin |= {"machine": describe_machine(device), "settings": switches | compiled | {"dtype": DTYPES[dtype]}}
    recommended = {} if record else read_recommended(options.model, options.revision)
    return OpenedEditor(pipeline, origin, recommended, [line for line in (lacking, other) if line])


def describe_machine(device: str) -> dict[str, Any]:
    """What decides the last bits of an edit beside its settings."""
    kind = torch.device(device).type
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": kind}
    return versions | ({"threads": torch.get_num_threads()} if kind == "cpu" else {})


def _name(source: str) -> dict[str, Any]:
    is_local = Path(source).exists()
    return {"name": Path(os.path.abspath(source)).name if is_local else source, "is_local": is_local}


def match_machine(pipeline: Any, machine: dict) -> str:
    """Set what decides the last bits as it was; returns what is otherwise here, for the user, or nothing."""
    threads = machine.get("threads")
    if isinstance(threads, int) and 0 < threads <= 4 * (os.cpu_count() or 1) and pipeline.unet.device.type == "cpu":
        torch.set_num_threads(threads)
    here = describe_machine(pipeline.unet.device.type)
    other = [f"{name} {here[name]} instead of {machine.get(name)}" for name in here if here[name] != machine.get(name)]
    return f"the repeated edit may differ in its last bits: {', '.join(other)}" if other else ""


def set_up(pipeline: Any, *, compile_unet: bool = False, vae_slicing: bool = False, vae_tiling: bool = False) -> str:
    """Compile and save memory as asked for; returns what could not be done, for the user, or nothing.

    vae_slicing: images are decoded one by one. vae_tiling: in tiles that overlap, for images beyond the memory.
    """
    if vae_slicing:
        pipeline.vae.enable_slicing()
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if not compile_unet:
        return ""
    if lacking := _find_lacking_compiler(pipeline.unet.device.type):
        return f"--compile is left out: it needs {lacking}, which is not here"
    pipeline.unet.compile()
    return ""


def _find_lacking_compiler(device: str) -> str | None:
    """What torch.compile would need on this machine and does not find."""
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the package triton"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"] if device == "cpu" else ["gcc", "cc", "clang"]
    return None if any(shutil.which(name) for name in compilers if name) else "a C++ compiler such as g++"
