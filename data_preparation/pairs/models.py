"""The models of phase two: a text-to-image pipeline of Stable Diffusion 1.x/2.x or SDXL, and CLIP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from data_preparation.pairs.clip_filter import ClipScorer
from utils.editing.adapter_fusing import read_adapter_file
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import digest_files, find_revision, public_name, snapshot_revision
from utils.models.single_file import is_single_file, load_single_file


@dataclass(frozen=True)
class ModelChoice:
    """The fields are flags; revisions are those of `resolve`."""

    model: str
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    clip_model: str = "openai/clip-vit-large-patch14"
    clip_revision: str | None = None
    safety_checker: str | None = None
    safety_revision: str | None = None
    no_safety_checker: bool = False


def resolve(choice: ModelChoice) -> tuple[ModelChoice, list[dict[str, str]]]:
    """The choice with every revision a commit, and {"id", "revision"} of all models for the rows.

    A branch may move while workers start: all of them load the commit that is found here. The revision of what lies on
    this machine is a digest of its files. Raises InputError for a model that is not there.
    """
    with explaining_load_errors(f"--model {choice.model}"):
        commit = find_revision(choice.model, choice.revision, "model_index.json")
    models = [{"id": public_name(choice.model), "revision": commit}]
    found = {"revision": commit}
    others = (("vae", "vae_revision"), ("clip_model", "clip_revision"), ("safety_checker", "safety_revision"))
    for flag, revision in others:
        if name := getattr(choice, flag):
            with explaining_load_errors(f"--{flag} {name}"):
                commit = find_revision(name, getattr(choice, revision), "config.json", "model_index.json")
            models.append({"id": public_name(name), "revision": commit})
            found[revision] = commit
    if choice.lora:
        file = read_adapter_file(choice.lora).file
        models.append({"id": public_name(choice.lora), "revision": snapshot_revision(file) or digest_files(file)})
    return replace(choice, **found), models


def load_pipeline(choice: ModelChoice, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The text-to-image pipeline, its own autoencoder replaced and the adapter merged. Raises InputError."""
    with explaining_load_errors(f"--model {choice.model}"):
        if is_single_file(choice.model):
            parts = load_single_file(choice.model, choice.single_file_config, None)
            parts.pop("is_cosxl_edit", None)
            _require_text_to_image(choice.model, dict(parts["unet"].config))
            pipeline = _assemble(parts).to(dtype)
        else:
            pipeline = _load_folder(choice, dtype)
    if choice.vae:
        _replace_vae(pipeline, choice, dtype)
    pipeline.to(device)
    if choice.lora:
        _merge_adapter(pipeline, choice)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).eval().requires_grad_(False)
    return pipeline


def _load_folder(choice: ModelChoice, dtype: torch.dtype) -> Any:
    name, revision = choice.model, None if Path(choice.model).exists() else choice.revision
    config = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision)
    _require_text_to_image(name, config)
    index = DiffusionPipeline.load_config(name, revision=revision)
    is_sdxl = "text_encoder_2" in index
    settings = dict(dtype=dtype, variant=choice.variant, revision=revision)
    if choice.no_safety_checker and not is_sdxl:
        settings |= dict(safety_checker=None, requires_safety_checker=False)
    if is_sdxl:
        settings |= dict(add_watermarker=False)  # CLIP and the editor are to see the picture itself
    pipeline_class = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    return pipeline_class.from_pretrained(name, **settings)


def _assemble(parts: dict[str, Any]) -> Any:
    if parts.get("text_encoder_2") is not None:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _require_text_to_image(name: str, unet_config: dict) -> None:
    kind, channels = unet_config.get("_class_name", "UNet2DConditionModel"), unet_config.get("in_channels", 4)
    if kind != "UNet2DConditionModel" or channels != 4:
        raise InputError(
            f"--model {name}: its UNet is a {kind} of {channels} channels; a text-to-image model of Stable Diffusion "
            "1.x/2.x or SDXL is needed, whose UNet takes 4"
        )


def _replace_vae(pipeline: Any, choice: ModelChoice, dtype: torch.dtype) -> None:
    """By that of a repository or folder of its own, or of a whole pipeline."""
    place = dict(revision=None if Path(choice.vae).exists() else choice.vae_revision)
    with explaining_load_errors(f"--vae {choice.vae}"):
        try:
            AutoencoderKL.load_config(choice.vae, **place)
        except OSError:  # no autoencoder at the top: that of a pipeline
            place |= dict(subfolder="vae")
        vae = AutoencoderKL.from_pretrained(choice.vae, torch_dtype=dtype, **place)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if (factor, vae.config.latent_channels) != (pipeline.vae_scale_factor, pipeline.unet.config.in_channels):
        raise InputError(
            f"--vae {choice.vae}: makes {vae.config.latent_channels} channels of 1/{factor} of the size, and "
            f"{choice.model} takes {pipeline.unet.config.in_channels} of 1/{pipeline.vae_scale_factor}"
        )
    pipeline.register_modules(vae=vae)


def _merge_adapter(pipeline: Any, choice: ModelChoice) -> None:
    """Add the adapter (LCM-LoRA and such) to the weights: it costs nothing per step then."""
    file = read_adapter_file(choice.lora).file
    with explaining_load_errors(f"--lora {choice.lora}"):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        if not any(pipeline.get_list_adapters().values()):
            raise InputError(f"--lora {choice.lora}: changes nothing in a {type(pipeline).__name__}")
        pipeline.fuse_lora(lora_scale=choice.lora_scale, safe_fusing=True)
        pipeline.unload_lora_weights()


def load_clip(choice: ModelChoice, device: str | torch.device) -> ClipScorer:
    """CLIP in float32, as scores near a bound decide. Raises InputError."""
    from transformers import AutoTokenizer, CLIPModel

    name, revision = choice.clip_model, None if Path(choice.clip_model).exists() else choice.clip_revision
    with explaining_load_errors(f"--clip_model {name}", "give a CLIPModel of transformers: a folder or its Hub id"):
        model = CLIPModel.from_pretrained(name, revision=revision, dtype=torch.float32).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return ClipScorer(model, tokenizer, load_image_processor(name, revision=revision))


def load_image_processor(name: str, **place: Any) -> Any:
    """CLIP's preprocessing by Pillow: torchvision's, where that is installed, differs in the last bits."""
    try:
        from transformers import CLIPImageProcessorPil as CLIPImageProcessor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor
    return CLIPImageProcessor.from_pretrained(name, **place)
