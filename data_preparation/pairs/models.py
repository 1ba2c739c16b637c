"""The models of generate_pairs.py: a text-to-image pipeline, CLIP, and a safety checker."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionSafetyChecker

from data_preparation.pairs.filters import ClipScorer, ImageCheck, load_image_check, make_safety_check
from utils.editing.loading import fuse_adapter
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import digest_files, find_revision, is_hub_id, public_name, snapshot_revision
from utils.models.adapter_sources import inspect_adapter
from utils.models.image_text_encoder import ImageTextEncoder
from utils.models.single_file import is_single_file, load_single_file
from utils.models.vae_file import load_vae_file

SAFETY_ADVICE = "give CompVis/stable-diffusion-safety-checker, its folder, or the folder of a pipeline that has one"


@dataclass(frozen=True)
class ModelChoice:
    """The fields are flags, except the revisions of all but the model, which `resolve_models` fills."""

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


def resolve_models(choice: ModelChoice) -> tuple[ModelChoice, list[dict[str, str]]]:
    """The choice with commits as revisions, and {"id", "revision"} of each model for the rows.

    All workers load the commits found here, even if a branch moves. The revision of a local model is a digest of its
    files. Raises InputError for a model that does not exist.
    """
    models, commits = [], {}
    for flag, field, *files in (
        ("model", "revision", "model_index.json"),
        ("vae", "vae_revision", "config.json", "model_index.json"),
        ("clip_model", "clip_revision", "config.json", "model_index.json"),
        ("safety_checker", "safety_revision", "config.json", "model_index.json"),
    ):
        if name := getattr(choice, flag):
            with explaining_load_errors(f"--{flag} {name}"):
                commits[field] = find_revision(name, getattr(choice, field), *files)
            models.append({"id": public_name(name), "revision": commits[field]})
    if choice.lora:
        file = inspect_adapter(choice.lora).file
        models.append({"id": public_name(choice.lora), "revision": snapshot_revision(file) or digest_files(file)})
    return replace(choice, **commits), models


def load_pipeline(choice: ModelChoice, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The text-to-image pipeline with the chosen autoencoder and the fused adapter. Raises InputError."""
    with explaining_load_errors(f"--model {choice.model}"):
        if is_single_file(choice.model):
            pipeline = _load_single_file_pipeline(choice).to(dtype)
        else:
            pipeline = _load_pipeline_folder(choice, dtype)
    if choice.vae:
        _replace_vae(pipeline, choice, dtype)
    pipeline.to(device)
    if choice.lora:
        fuse_adapter(pipeline, inspect_adapter(choice.lora), choice.lora_scale)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).eval().requires_grad_(False)
    return pipeline


def _load_single_file_pipeline(choice: ModelChoice) -> Any:
    parts = load_single_file(choice.model, choice.single_file_config, None)
    parts.pop("is_cosxl_edit", None)
    _require_text_to_image(choice.model, dict(parts["unet"].config))
    if parts.get("text_encoder_2") is not None:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _load_pipeline_folder(choice: ModelChoice, dtype: torch.dtype) -> Any:
    name, location = choice.model, _location(choice.model, choice.revision)
    _require_text_to_image(name, UNet2DConditionModel.load_config(name, subfolder="unet", **location))
    settings = dict(dtype=dtype, variant=choice.variant, **location)
    if "text_encoder_2" in DiffusionPipeline.load_config(name, **location):
        # CLIP and the editor must see the image itself, without a watermark.
        return StableDiffusionXLPipeline.from_pretrained(name, **settings, add_watermarker=False)
    if choice.no_safety_checker:
        settings |= dict(safety_checker=None, requires_safety_checker=False)
    return StableDiffusionPipeline.from_pretrained(name, **settings)


def _location(name: str, revision: str | None) -> dict[str, str | None]:
    """Arguments of `from_pretrained`; the revision of a local path is a digest, not a commit."""
    return dict(revision=revision if is_hub_id(name) else None)


def _require_text_to_image(name: str, unet_config: dict) -> None:
    kind, channels = unet_config.get("_class_name", "UNet2DConditionModel"), unet_config.get("in_channels", 4)
    if kind != "UNet2DConditionModel" or channels != 4:
        problem = f"its UNet is a {kind} with {channels} input channels"
        raise InputError(f"--model {name}: {problem}; give a text-to-image model of Stable Diffusion 1.x/2.x or SDXL")


def _replace_vae(pipeline: Any, choice: ModelChoice, dtype: torch.dtype) -> None:
    """Use the autoencoder of a file, of a repository or folder, or of a whole pipeline."""
    location = _location(choice.vae, choice.vae_revision)
    with explaining_load_errors(f"--vae {choice.vae}"):
        if is_single_file(choice.vae):
            vae = load_vae_file(choice.vae, dict(pipeline.vae.config), f"--vae {choice.vae}").to(dtype)
        else:
            try:
                AutoencoderKL.load_config(choice.vae, **location)
            except OSError:  # no autoencoder at the top level: it is a pipeline
                location["subfolder"] = "vae"
            vae = AutoencoderKL.from_pretrained(choice.vae, torch_dtype=dtype, **location)
    factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    needed_factor, needed_channels = pipeline.vae_scale_factor, pipeline.unet.config.in_channels
    if (factor, channels) != (needed_factor, needed_channels):
        needed = f"{choice.model} needs {needed_channels} channels and 1/{needed_factor} of the image size"
        raise InputError(f"--vae {choice.vae}: its latents have {channels} channels and 1/{factor}; {needed}")
    pipeline.register_modules(vae=vae)


def load_clip(choice: ModelChoice, device: str | torch.device) -> ClipScorer:
    """CLIP in float32, because scores close to a bound decide. Raises InputError."""
    from transformers import AutoTokenizer, CLIPModel

    name, location = choice.clip_model, _location(choice.clip_model, choice.clip_revision)
    with explaining_load_errors(f"--clip_model {name}", "give a CLIPModel of transformers: a folder or its Hub id"):
        model = CLIPModel.from_pretrained(name, dtype=torch.float32, **location).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, **location)
        return ClipScorer(ImageTextEncoder(model, tokenizer, load_image_processor(name, **location)))


def load_checks(choice: ModelChoice, image_check: str | None, pipeline: Any) -> dict[str, ImageCheck]:
    """The checks of generated images, by the reason of their rejections.

    The safety checker is --safety_checker, by default that of the pipeline if it has one.
    """
    checks: dict[str, ImageCheck] = {}
    checker, processor = getattr(pipeline, "safety_checker", None), getattr(pipeline, "feature_extractor", None)
    if name := choice.safety_checker:
        location = _location(name, choice.safety_revision)
        is_pipeline = (Path(name) / "model_index.json").is_file()
        folders = ("safety_checker", "feature_extractor") if is_pipeline else ("", "")
        with explaining_load_errors(f"--safety_checker {name}", SAFETY_ADVICE):
            checker = StableDiffusionSafetyChecker.from_pretrained(name, subfolder=folders[0], **location)
            processor = load_image_processor(name, subfolder=folders[1], **location)
        checker.eval().to(pipeline.unet.device)
    if checker is not None and not choice.no_safety_checker:
        checks["flagged by the safety checker"] = make_safety_check(checker, processor)
    if image_check:
        checks["flagged by --image_check"] = load_image_check(image_check)
    return checks


def load_image_processor(name: str, **location: Any) -> Any:
    """CLIP's image processor in its Pillow version: that of torchvision, if installed, differs in the last bits."""
    try:
        from transformers import CLIPImageProcessorPil as CLIPImageProcessor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor
    return CLIPImageProcessor.from_pretrained(name, **location)
