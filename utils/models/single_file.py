"""Models in one file, as Stability AI and the community publish them: read and loaded as whole pipelines.

What the file holds is told from its header alone. Sizes that no header tells (heads, layers per block) and the
tokenizers come from a pipeline in diffusers' format of the same family. The weights are converted by diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMEulerScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from utils.errors import InputError, explaining_load_errors, is_hub_out_of_reach

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
VAE_PREFIXES = ("first_stage_model.", "vae.")
LEAST_SIGMA, GREATEST_SIGMA = "edm_vpred.sigma_min", "edm_vpred.sigma_max"  # what ComfyUI recognises CosXL by
COSXL_LEAST_SIGMA = 0.002
EDITOR_CHANNELS = 8
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
SDXL_PARTS = (*PARTS, "tokenizer_2", "text_encoder_2")
ADVICE = "is it the whole file, and is --single_file_config of the same family? Download a damaged file again"


@dataclass(frozen=True)
class Header:
    """What a file says of itself; sigmas are the least and the greatest of CosXL."""

    shapes: dict[str, list[int]]
    sigmas: tuple[float, float] | None

    @property
    def is_sdxl(self) -> bool:
        return any(key.startswith("conditioner.embedders.1.") for key in self.shapes)

    @property
    def in_channels(self) -> int:
        return self.shapes[CONV_IN][1]

    @property
    def is_cosxl_edit(self) -> bool:
        return self.sigmas is not None and self.in_channels == EDITOR_CHANNELS


def is_single_file(name: str) -> bool:
    """Whether a model's name is that of a file, be it there or not, and not a folder or an id on the Hub."""
    return Path(name).is_file() or (Path(name).suffix.lower() in SUFFIXES and not Path(name).is_dir())


def read_single_file(name: str, config: str | None, cache_dir: str | None) -> tuple[dict, dict, dict]:
    """(UNet, VAE, scheduler) configurations of a file, without reading its weights.

    config: folder or Hub id of a pipeline of the same family; None: the one that diffusers takes the file for.
    Raises `InputError` where the file is not a whole Stable Diffusion 1.x/2.x or SDXL, or the configuration not there.
    """
    header = _read_header(name)
    return _read_configs(header, _find_config(name, header, config, cache_dir))


def load_single_file(name: str, config: str | None, cache_dir: str | None) -> dict[str, Any]:
    """The components in float32, under the names that the pipelines give them, with SDXL's two switches.

    config: as for `read_single_file`. Raises `InputError`.
    """
    header = _read_header(name)
    folder = _find_config(name, header, config, cache_dir)
    scheduler_config = _read_configs(header, folder)[2]
    pipeline_class = (
        StableDiffusionXLInstructPix2PixPipeline if header.is_sdxl else StableDiffusionInstructPix2PixPipeline
    )
    # Not `in_channels`, which the VAE would take as well. The averaged weights (EMA), where there are any, are those
    # that the original InstructPix2Pix edits with.
    settings = dict(num_in_channels=header.in_channels, extract_ema=True)
    settings |= dict(torch_dtype=torch.float32, local_files_only=True)
    without = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    unused = dict(add_watermarker=False) if header.is_sdxl else without
    with explaining_load_errors(f"the model {name}", ADVICE):
        pipeline = pipeline_class.from_single_file(name, config=str(folder), **settings, **unused)
        components = {part: getattr(pipeline, part) for part in (SDXL_PARTS if header.is_sdxl else PARTS)}
        _refuse_misfit(name, header, components)
        scheduler_class = EDMEulerScheduler if header.sigmas else type(pipeline.scheduler)
        components["scheduler"] = scheduler_class.from_config(scheduler_config)
    if header.is_sdxl:
        components["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
        components["is_cosxl_edit"] = header.is_cosxl_edit
    return components


def _read_header(name: str) -> Header:
    """What the file holds. Raises `InputError` for what is no whole Stable Diffusion."""
    path = Path(name)
    if not path.is_file():
        raise InputError(f"the model {name} does not exist")
    if path.suffix.lower() != ".safetensors":
        raise InputError(
            f"{name} is no .safetensors file, and other formats can carry programs: convert it to safetensors first, "
            "or give the folder of a diffusers pipeline"
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            found = {key: file.get_tensor(key).item() for key in (LEAST_SIGMA, GREATEST_SIGMA) if key in shapes}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{name} is not a whole safetensors file ({error}): download it again") from error
    if problem := _find_problem(shapes):
        raise InputError(f"{name} {problem}; a whole Stable Diffusion 1.x/2.x or SDXL in one file is needed")
    is_cosxl = GREATEST_SIGMA in found
    return Header(shapes, (found.get(LEAST_SIGMA, COSXL_LEAST_SIGMA), found[GREATEST_SIGMA]) if is_cosxl else None)


def _find_problem(shapes: dict[str, list[int]]) -> str | None:
    """Why a file is no whole Stable Diffusion 1.x/2.x or SDXL, or None."""

    def holds(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in shapes)

    if any("lora_" in key or ".lokr_" in key for key in shapes):
        return "is an adapter (LoRA), no model"
    if holds("conditioner.embedders.0.model."):
        return "is an SDXL refiner"
    if CONV_IN not in shapes:
        if holds(*VAE_PREFIXES) or holds("encoder.down", "decoder.up"):
            return "holds an autoencoder (VAE) without a UNet"
        return "is of another family, or of no model that is known here"
    if not holds("conditioner.embedders.1.", "cond_stage_model."):
        return "holds a UNet without its text encoder"
    if not holds(*VAE_PREFIXES):
        return "holds no autoencoder (VAE)"
    return None


def _find_config(name: str, header: Header, config: str | None, cache_dir: str | None) -> Path:
    """The folder of a pipeline that is built as the file's. Raises `InputError` where there is none."""
    source = config or _guess_config(header)
    if not Path(source).is_dir():
        try:
            source = snapshot_download(source, cache_dir=cache_dir, allow_patterns=["*.json", "*.txt"])
        except (OSError, ValueError) as error:
            reason = "cannot be reached, and is not cached" if is_hub_out_of_reach(error) else f"is not there ({error})"
            raise InputError(
                f"{name} is built like {source}, which {reason}: give --single_file_config FOLDER, a pipeline of the "
                "same family in diffusers' format (its weights are not needed)"
            ) from error
    folder = Path(source)
    parts = SDXL_PARTS if header.is_sdxl else PARTS
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise InputError(f"--single_file_config {source} does not fit {name}: it lacks {', '.join(missing)}")
    return folder


def _guess_config(header: Header) -> str:
    """The pipeline on the Hub whose configuration diffusers takes for the file."""
    # It decides by names and shapes, which a tensor without values has.
    shapes = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def _read_configs(header: Header, folder: Path) -> tuple[dict, dict, dict]:
    """(UNet, VAE, scheduler) configurations: the folder's, corrected by what the file says."""
    with explaining_load_errors(f"--single_file_config {folder}"):
        unet = UNet2DConditionModel.load_config(folder, subfolder="unet") | {"in_channels": header.in_channels}
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        scheduler = DDPMScheduler.load_config(folder, subfolder="scheduler")
    if (unet.get("addition_embed_type") == "text_time") != header.is_sdxl:
        family = "an SDXL" if header.is_sdxl else "a Stable Diffusion 1.x/2.x"
        raise InputError(f"--single_file_config {folder} is of another family: the file is {family}")
    if header.sigmas:
        scheduler = dict(_cosxl_scheduler(*header.sigmas).config) | {"_class_name": "EDMEulerScheduler"}
    elif "v_pred" in header.shapes:
        scheduler = scheduler | {"prediction_type": "v_prediction"}
        if "ztsnr" in header.shapes:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return unet, vae, scheduler


def _cosxl_scheduler(sigma_min: float, sigma_max: float) -> EDMEulerScheduler:
    return EDMEulerScheduler(
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )


def _refuse_misfit(name: str, header: Header, components: dict[str, Any]) -> None:
    """Refuse a file that is not the configuration's: diffusers goes on with weights missing, or with some left over."""
    for part, model in components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        if missing := [key for key, value in model.named_parameters() if value.is_meta]:
            raise InputError(
                f"{name} does not fit: its {part} lacks {missing[0]} and {len(missing) - 1} more ({ADVICE})"
            )
    stored = sum(prod(shape) for key, shape in header.shapes.items() if key.startswith("model.diffusion_model."))
    placed = sum(value.numel() for value in components["unet"].parameters())
    if stored != placed:
        raise InputError(
            f"{name} does not fit: its UNet has {stored:,} weights, the configuration's {placed:,} ({ADVICE})"
        )
