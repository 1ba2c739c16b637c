"""An editor and the device that runs it, from what the user names on the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from utils.editing.adapter_fusing import Adapter, merge_into, read_adapter_file, require_fitting
from utils.editing.edit_images import Editor
from utils.errors import InputError, explaining_load_errors
from utils.models.single_file import is_single_file, load_single_file, read_single_file
from utils.models.stable_diffusion import Configs, StableDiffusion, editor_class, make_editor, require_editor

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
NEEDED = "an InstructPix2Pix editor of Stable Diffusion 1.x/2.x or SDXL is needed"


def load_editor(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    single_file_config: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    safety_checker: bool = True,
) -> Editor:
    """An SD 1.x/2.x or SDXL editor on `device` in `dtype`: a folder, an id on the Hub, or one .safetensors file.

    lora: an adapter in diffusers' format (a folder, its file, or an id on the Hub), merged into the weights at
    `lora_scale`. On a text-to-image model it makes the editor, which it can if it was trained as one: then it holds
    conv_in for 8 channels. single_file_config: of what pipeline a single file is (`read_single_file`). Without
    `safety_checker` the one of the pipeline is dropped.

    What model and adapter are gets checked by small files and headers, before the weights are read or downloaded.
    Raises InputError where one is missing, the Hub out of reach, a file damaged, or what comes out is no editor.
    """
    name, place = str(path_or_id), {"revision": revision, "cache_dir": cache_dir}
    is_file = is_single_file(name)
    configs = Configs(*read_single_file(name, single_file_config, cache_dir)) if is_file else _read_configs(name, place)
    adapter = read_adapter_file(str(lora), cache_dir) if lora else None
    _require_editor(configs, name, adapter)
    with explaining_load_errors(f"the model {name}"):
        if is_file:
            parts = StableDiffusion(**load_single_file(name, single_file_config, cache_dir))
            pipeline = make_editor(parts, parts.scheduler).to(dtype)
        else:
            # Always a dtype: left open, diffusers and transformers would each choose their own.
            settings = dict(dtype=dtype, variant=variant)
            pipeline = editor_class(configs.is_sdxl).from_pretrained(name, **settings, **place)
    if getattr(pipeline, "is_cosxl_edit", False):
        pipeline.register_to_config(is_cosxl_edit=True)  # or stock diffusers forgets it when the editor is saved again
    if not safety_checker and getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    pipeline.to(device)
    if adapter:
        merge_into(pipeline, adapter, lora_scale)
    return pipeline


def _require_editor(configs: Configs, name: str, adapter: Adapter | None) -> None:
    """Refuse what will be no editor, and an adapter that is none of this model."""
    if not adapter or configs.unet.get("in_channels", 4) != 4:
        require_editor(configs, name)
    if adapter:
        require_fitting(adapter, configs.unet, name)


def _read_configs(name: str, place: dict) -> Configs:
    """What the small files of a pipeline say. Raises `InputError` for what is not there or no Stable Diffusion."""
    looks_local = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
    if not Path(name).is_dir() and looks_local:
        raise InputError(f"the model folder {name} does not exist")
    with explaining_load_errors(f"the model {name}"):
        index = DiffusionPipeline.load_config(name, **place)
        if missing := [part for part, source in index.items() if _is_missing(name, part, source)]:
            raise InputError(f"the model {name} is not whole: it lacks {', '.join(missing)}")
        lacking = [part for part in PARTS if index.get(part, [None])[0] is None]
        if lacking:
            kind = index.get("_class_name", "pipeline of no class")
            raise InputError(f"{name} is a {kind} without {', '.join(lacking)}: {NEEDED}")
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **place)
    configs = Configs(unet=unet, vae={}, scheduler={})
    if configs.is_sdxl != ("text_encoder_2" in index) or unet.get("_class_name") != "UNet2DConditionModel":
        raise InputError(f"{name} is a {index['_class_name']} with a {unet.get('_class_name')}: {NEEDED}")
    return configs


def _is_missing(name: str, part: str, source: object) -> bool:
    """Whether a local pipeline lacks a component that its index (`"unet": ["diffusers", "UNet…"]`) promises."""
    is_component = isinstance(source, list) and source[0] is not None
    return is_component and Path(name).is_dir() and not (Path(name) / part).is_dir()
