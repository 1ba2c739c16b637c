"""Loading an editor, and fusing an adapter (LoRA, DoRA) in diffusers' format into it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, UNet2DConditionModel

from utils.editing.edit_images import Editor
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path
from utils.models.adapter_sources import ADAPTER_ADVICE, Adapter, inspect_adapter
from utils.models.latents import LATENT_CHANNELS
from utils.models.model_folders import (
    OPTIONAL_PARTS,
    choose_variant,
    load_tokenizer,
    require_model_folder,
    require_variant,
    require_whole_files,
)
from utils.models.single_file import COMPONENTS, SDXL_COMPONENTS, is_single_file, load_single_file, read_single_file
from utils.models.stable_diffusion import (
    EDITOR_CHANNELS,
    Configs,
    StableDiffusion,
    editor_class,
    load_vae,
    make_editor,
    require_editor,
    widen_conv_in,
)

logger = logging.getLogger(__name__)

NEEDED = "give an InstructPix2Pix editor of Stable Diffusion 1.x/2.x or SDXL"


def load_editor(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    single_file_config: str | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_scale: float | Sequence[float] = 1.0,
    vae: str | Path | None = None,
    safety_checker: bool = True,
) -> Editor:
    """Load an SD 1.x/2.x or SDXL editor from a folder, a Hub id or one .safetensors file.

    lora: one or more adapters (folder, file or Hub id) to fuse into the weights, each with its `lora_scale`. An adapter
    that was trained on a text-to-image model turns that model into an editor. vae: a file, folder or Hub id instead of
    the model's own; single_file_config: of `read_single_file`.

    Model and adapter are checked by their small files and headers before any weights are read or downloaded.
    Raises InputError where one is missing, damaged, out of reach, or not an editor.
    """
    name, place = str(path_or_id), {"revision": revision, "cache_dir": cache_dir}
    is_file = is_single_file(name)
    configs = Configs(*read_single_file(name, single_file_config, cache_dir)) if is_file else _read_configs(name, place)
    names = [lora] if isinstance(lora, (str, Path)) else list(lora or ())
    scales = [lora_scale] * len(names) if isinstance(lora_scale, (int, float)) else list(lora_scale)
    adapters = [inspect_adapter(str(adapter), cache_dir) for adapter in names]
    if not adapters or configs.unet.get("in_channels", 4) != 4:
        require_editor(configs, name)
    if adapters:
        _require_matching(adapters, configs.unet, name)
    with explaining_load_errors(f"the model {name}"):
        if is_file:
            parts = StableDiffusion(**load_single_file(name, single_file_config, cache_dir, dtype))
            pipeline = make_editor(parts, parts.scheduler).to(dtype)
        else:
            # Always a dtype: without it, diffusers and transformers would choose different ones.
            settings = dict(dtype=dtype, variant=_common_variant(name, variant, place), **place)
            settings |= _load_incomplete_parts(name, configs.is_sdxl, safety_checker, place)
            pipeline = editor_class(configs.is_sdxl).from_pretrained(name, **settings)
    if getattr(pipeline, "is_cosxl_edit", False):
        pipeline.register_to_config(is_cosxl_edit=True)  # stock diffusers would not save it
    if vae:
        loaded = load_vae(str(vae), dict(pipeline.vae.config), f"the VAE {vae}", cache_dir=cache_dir)
        pipeline.register_modules(vae=loaded.to(dtype).eval())
    pipeline.to(device)
    if adapters and pipeline.unet.config.in_channels != EDITOR_CHANNELS:
        widen_conv_in(pipeline.unet)
    for adapter, scale in zip(adapters, scales, strict=True):
        fuse_adapter(pipeline, adapter, scale)
    return pipeline


def _read_configs(name: str, place: dict) -> Configs:
    """The UNet's configuration of a pipeline. Raises `InputError` for anything but Stable Diffusion."""
    if not Path(name).is_dir() and looks_like_path(name):
        raise InputError(f"the model folder {name} does not exist")
    require_model_folder(name, f"the model {name}")
    with explaining_load_errors(f"the model {name}"):
        index = DiffusionPipeline.load_config(name, **place)
        if missing := [part for part, source in index.items() if _is_missing(name, part, source)]:
            raise InputError(f"the model {name} is incomplete: missing {', '.join(missing)}")
        kind = index.get("_class_name", "pipeline without a class")
        if missing := [part for part in COMPONENTS if index.get(part, [None])[0] is None]:
            raise InputError(f"the model {name} is a {kind} without {', '.join(missing)}: {NEEDED}")
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **place)
    configs = Configs(unet=unet, vae={}, scheduler={})
    if configs.is_sdxl != ("text_encoder_2" in index) or unet.get("_class_name") != "UNet2DConditionModel":
        raise InputError(f"the model {name} is a {kind} with a {unet.get('_class_name')}: {NEEDED}")
    return configs


def _is_missing(name: str, part: str, source: object) -> bool:
    """Whether a local pipeline has no folder for a component of its index (`"unet": ["diffusers", "UNet…"]`)."""
    is_component = isinstance(source, list) and source[0] is not None and part not in OPTIONAL_PARTS
    return is_component and Path(name).is_dir() and not (Path(name) / part).is_dir()


def _common_variant(name: str, variant: str | None, place: dict) -> str | None:
    """The variant for diffusers, which uses it for the parts that have it, and the default files for the others."""
    require_variant(name, SDXL_COMPONENTS, variant, f"the model {name}", **place)
    chosen = {choose_variant(name, part, variant, **place) for part in SDXL_COMPONENTS} - {None}
    if len(chosen) > 1:
        raise InputError(f"the model {name} has parts of different variants: {', '.join(sorted(chosen))}. Rename one")
    return chosen.pop() if chosen else None


def _load_incomplete_parts(name: str, is_sdxl: bool, safety_checker: bool, place: dict) -> dict[str, Any]:
    """Components that diffusers should not load itself: optional ones that are absent, and incomplete tokenizers."""
    folder, parts = Path(name), {}
    if not is_sdxl and not safety_checker:  # neither loaded nor downloaded
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if not folder.is_dir():
        return parts
    require_whole_files(name, f"the model {name}", list(SDXL_COMPONENTS))
    index = DiffusionPipeline.load_config(name, **place)
    listed = [part for part in OPTIONAL_PARTS if isinstance(index.get(part), list) and index[part][0]]
    absent = [part for part in listed if not (folder / part).is_dir() and part not in parts]
    if absent:
        logger.warning("the model %s lists %s, which it does not have: editing without", name, ", ".join(absent))
        parts |= dict.fromkeys(absent)
        if "safety_checker" in absent:
            parts["requires_safety_checker"] = False
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        is_whole = all((folder / tokenizer / f"{file}.json").is_file() for file in ("tokenizer_config", "tokenizer"))
        if (folder / tokenizer).is_dir() and not is_whole:
            width = json.loads((folder / encoder / "config.json").read_text("utf-8"))["hidden_size"]
            parts[tokenizer] = load_tokenizer(name, tokenizer, place, width)
    return parts


def _require_matching(adapters: list[Adapter], unet_config: dict, model: str) -> None:
    """Compare the adapters with the UNet, without loading its weights. Raises `InputError` for another model."""
    channels = [adapter.in_channels for adapter in adapters]
    if unet_config.get("in_channels", 4) != EDITOR_CHANNELS and EDITOR_CHANNELS not in channels:
        raise InputError(
            f"the adapter {adapters[0].name} cannot turn the text-to-image model {model} into an editor: it has no "
            f"conv_in for {EDITOR_CHANNELS} channels. If it was trained on an editor, give that editor as the model"
        )
    for adapter, count in zip(adapters, channels, strict=True):
        if count not in (None, LATENT_CHANNELS, EDITOR_CHANNELS):
            raise InputError(
                f"the adapter {adapter.name} is for a UNet with {count} input channels: an editor has {EDITOR_CHANNELS}"
            )
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config({**unet_config, "in_channels": EDITOR_CHANNELS})
    for adapter in adapters:
        adapter.read({"unet": unet}, model)


@torch.no_grad()
def fuse_adapter(pipeline: DiffusionPipeline, adapter: Adapter, scale: float = 1.0) -> None:
    """Add the adapter to the weights of a pipeline, so that it costs no time per step. Raises `InputError`.

    pipeline: any of Stable Diffusion or SDXL whose shapes match; scale: factor of the adapter's change of the weights.
    """
    parts = ("unet", "text_encoder", "text_encoder_2")
    components = {part: module for part in parts if (module := getattr(pipeline, part, None)) is not None}
    with explaining_load_errors(f"the adapter {adapter.name}", ADAPTER_ADVICE):
        content = adapter.read(components, f"the {type(pipeline).__name__}")
    if not content.num_layers:
        raise InputError(f"the adapter {adapter.name} changes nothing in a {type(pipeline).__name__}")
    for message in content.messages:
        logger.warning(message)
    for part, module in components.items():
        parameters = dict(module.named_parameters())
        for name, layer in content.layers.get(part, {}).items():
            value = parameters[name]
            _assign(value, layer.to(value.device).apply(value, scale), adapter.name)
        for name, whole in content.replaced.get(part, {}).items():
            value = parameters[name]
            _assign(value, torch.lerp(value.float(), whole.to(value.device).float(), scale), adapter.name)


def _assign(parameter: torch.Tensor, value: torch.Tensor, adapter: str) -> None:
    if not value.isfinite().all():
        raise InputError(f"the adapter {adapter} cannot be loaded: its weights contain NaN or infinite values")
    parameter.copy_(value.to(parameter.dtype))
