"""Opening an editor for a run: its recommended settings, what its records say of it, and memory and speed options."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from utils.compilation import find_missing_compiler
from utils.editing.edit_images import Editor, explaining_out_of_memory
from utils.editing.flags import EditorOptions, find_offload_problems
from utils.editing.loading import load_editor
from utils.editing.recommended import RECOMMENDED
from utils.editing.settings import ADAPTED, DEFAULT_SETTINGS, find_setting_problems
from utils.errors import InputError
from utils.hub_names import is_hub_id, split_hub_file
from utils.runtime import DTYPES, choose_device

LOADING_ADVICE = "give --dtype fp16, on a GPU --offload model, or a smaller model"
SAMPLED_VALUES = 64  # of each tensor, for the digest


def read_recommended(
    name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> dict[str, float]:
    """The settings that an editor recommends, keys of `DEFAULT_SETTINGS`; {} where it has no such file.

    `recommended.json` has measured ones (evaluation/guidance_curves.py --recommend), and takes precedence over
    `adapted.json` of a few-step editor, whose scheduler is already the scheduler of the pipeline. Raises InputError for
    a damaged file.
    """
    adapted = _read_recommended_file(name, ADAPTED, revision, cache_dir)
    return adapted | _read_recommended_file(name, RECOMMENDED, revision, cache_dir)


def _read_recommended_file(
    name: str | Path, file_name: str, revision: str | None, cache_dir: str | Path | None
) -> dict[str, float]:
    file = Path(name) / file_name
    if is_hub_id(str(name)):
        try:
            file = Path(hf_hub_download(str(name), file_name, revision=revision, cache_dir=cache_dir))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
            return {}  # most models have none; loading the model explains why the Hub fails
    if not file.is_file():
        return {}
    try:
        recommended = json.loads(file.read_text(encoding="utf-8"))["recommended"]
        found = {key: recommended[key] for key in DEFAULT_SETTINGS if recommended.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error}): create the editor again") from error
    if problems := find_setting_problems(found, prefix=f"{file}: "):
        raise InputError.from_problems(problems)
    return found


@dataclass(frozen=True)
class OpenedEditor:
    """origin: what records say of model, adapter and machine; messages: for the user, one line each."""

    pipeline: Editor
    origin: dict[str, dict]
    recommended: dict[str, float]
    messages: list[str]


def open_editor(options: EditorOptions, record: dict | None = None, image: Path | None = None) -> OpenedEditor:
    """Load the editor and apply its options.

    record: of the `image` that is to be repeated, which the same model must have made. Raises InputError.
    """
    device, dtype = choose_device(options.device, options.dtype)
    adapters = list(options.lora or ())
    scales = list(options.lora_scale or [1.0])
    scales = scales * len(adapters) if len(scales) == 1 else scales
    source = {name: getattr(options, name) for name in ("revision", "variant", "vae", "single_file_config")}
    if problems := find_offload_problems(options.offload, device):
        raise InputError.from_problems(problems)
    machine = dict(dtype=dtype, safety_checker=not options.no_safety_checker)
    with explaining_out_of_memory(f"loading {options.model} needs more memory than there is: {LOADING_ADVICE}"):
        place = "cpu" if options.offload else device
        pipeline = load_editor(options.model, lora=adapters, lora_scale=scales, device=place, **source, **machine)
    weights = _digest_weights(pipeline)
    if record and record["model"].get("weights") != weights:
        raise InputError(f"--model {options.model} is not the model that made {image}: its weights differ")
    own = {"revision": options.revision, "variant": options.variant, "weights": weights}
    origin = {
        "model": _describe_source(options.model) | {key: value for key, value in own.items() if value is not None}
    }
    described = [_describe_source(name) | {"scale": scale} for name, scale in zip(adapters, scales, strict=True)]
    if described:
        origin |= {"adapter": described[0]} if len(described) == 1 else {"adapters": described}
    messages = _apply_options(pipeline, options, device)
    is_compiled = options.compile and not messages
    if record:
        messages += _match_machine(device, record.get("machine", {}))
    switches = {name: getattr(options, name) for name in ("vae_slicing", "vae_tiling", "no_safety_checker")}
    dtype_name = next(name for name, value in DTYPES.items() if value == dtype)
    origin["machine"] = _describe_machine(device)
    origin["settings"] = switches | {"compile": is_compiled, "dtype": dtype_name}
    return OpenedEditor(pipeline, origin, {} if record else read_recommended(options.model, options.revision), messages)


def _digest_weights(pipeline: Any) -> str:
    """A digest of the first values of each tensor: training and adapters change nearly all tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for name, value in module.named_parameters() if module is not None else ():
            digest.update(f"{part}.{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:SAMPLED_VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _describe_source(name: str) -> dict[str, Any]:
    """A model or adapter in a record: a Hub id, or the last part of a path."""
    is_local = not is_hub_id(name) and split_hub_file(name) is None
    return {"name": Path(os.path.abspath(name)).name if is_local else name, "is_local": is_local}


def _describe_machine(device: str) -> dict[str, Any]:
    """What decides the last bits of an edit besides its settings."""
    kind = torch.device(device).type
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": kind}
    return versions | ({"threads": torch.get_num_threads()} if kind == "cpu" else {})


def _match_machine(device: str, machine: dict) -> list[str]:
    """Use as many threads as the record says; a line for the user if anything else differs."""
    threads = machine.get("threads")
    here = _describe_machine(device)
    if isinstance(threads, int) and 0 < threads <= 4 * (os.cpu_count() or 1) and here["device"] == "cpu":
        torch.set_num_threads(threads)
        here = _describe_machine(device)
    other = [f"{name} {here[name]} instead of {machine.get(name)}" for name in here if here[name] != machine.get(name)]
    return [f"the repeated edit may differ in its last bits: {', '.join(other)}"] if other else []


def _apply_options(pipeline: Any, options: EditorOptions, device: str) -> list[str]:
    """Offloading, slicing, tiling and compilation; a line for the user if --compile is not possible."""
    offload_editor(pipeline, options.offload, device)
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    if options.compile:
        if missing := find_missing_compiler(torch.device(device).type):
            return [f"--compile is ignored: it needs {missing}, which is not installed"]
        pipeline.unet.compile()
    return []


def offload_editor(pipeline: Any, kind: str | None, device: str) -> None:
    """Keep the weights in main memory. kind: of `OFFLOADS`, None changes nothing; device: where they are used."""
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        # Layer by layer, a VAE can no longer be converted when it overflows: float32 from the start.
        pipeline.vae.to(torch.float32)
        pipeline.enable_sequential_cpu_offload(device=device)
