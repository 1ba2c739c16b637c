"""Models in one file (.safetensors, or .ckpt without running its code), loaded as whole pipelines.

The header tells what the file contains. What no header tells (attention heads, layers per block, the tokenizers) comes
from a pipeline of the same family in diffusers' format. diffusers converts the weights.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from safetensors.torch import save_file

from utils.errors import InputError, explaining_load_errors, is_hub_out_of_reach
from utils.models.latents import EDITOR_CHANNELS
from utils.models.model_folders import find_damage
from utils.weight_files import TensorFiles

COMPONENTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")  # of every pipeline
SDXL_COMPONENTS = (*COMPONENTS, "tokenizer_2", "text_encoder_2")
MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
OLD_TEXT_ENCODER = re.compile(r"(cond_stage_model\.transformer\.)((?:embeddings|encoder|final_layer_norm)\..*)")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
VAE_PREFIXES = ("first_stage_model.", "vae.")
SIGMA_MIN, SIGMA_MAX = "edm_vpred.sigma_min", "edm_vpred.sigma_max"  # ComfyUI recognises CosXL by these
COSXL_SIGMA_MIN = 0.002
ADVICE = "--single_file_config must be a pipeline of the same family; download a damaged file again"


@dataclass(frozen=True)
class Header:
    """Tensor shapes of a file; sigmas: smallest and largest noise level of CosXL, else None."""

    shapes: dict[str, tuple[int, ...]]
    sigmas: tuple[float, float] | None

    @property
    def is_sdxl(self) -> bool:
        return any(key.startswith("conditioner.embedders.1.") for key in self.shapes)

    @property
    def in_channels(self) -> int:
        return self.shapes[CONV_IN][1]


def is_single_file(name: str) -> bool:
    """Whether a model name is a file name (the file may be missing), and not a folder or a Hub id."""
    return Path(name).is_file() or (Path(name).suffix.lower() in MODEL_SUFFIXES and not Path(name).is_dir())


def read_single_file(name: str, config: str | None, cache_dir: str | None) -> tuple[dict, dict, dict]:
    """(UNet, VAE, scheduler) configurations of a file, without reading its weights.

    config: folder or Hub id of a pipeline of the same family; None: the pipeline that diffusers recognises.
    Raises `InputError` if the file is not a complete Stable Diffusion 1.x/2.x or SDXL, or `config` is missing.
    """
    header = _read_header(name)
    return _read_configs(header, _find_config(name, header, config, cache_dir))


def load_single_file(
    name: str, config: str | None, cache_dir: str | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The components in `dtype` under diffusers' names, and SDXL's two settings. Arguments: see `read_single_file`."""
    header = _read_header(name)
    folder = _find_config(name, header, config, cache_dir)
    scheduler_config = _read_configs(header, folder)[2]
    # Not `in_channels`, which would also change the VAE. EMA weights, if the file has them, are those that the
    # original InstructPix2Pix edits with.
    settings = dict(num_in_channels=header.in_channels, extract_ema=True, torch_dtype=dtype)
    if header.is_sdxl:
        pipeline_class, names = StableDiffusionXLInstructPix2PixPipeline, SDXL_COMPONENTS
        settings |= dict(add_watermarker=False)
    else:
        pipeline_class, names = StableDiffusionInstructPix2PixPipeline, COMPONENTS
        settings |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with explaining_load_errors(f"the model {name}", ADVICE), as_current_file(name) as file:
        pipeline = pipeline_class.from_single_file(str(file), config=str(folder), local_files_only=True, **settings)
        components = {part: getattr(pipeline, part) for part in names}
        _refuse_mismatch(name, header, components)
        scheduler_class = EDMEulerScheduler if header.sigmas else type(pipeline.scheduler)
        components["scheduler"] = scheduler_class.from_config(scheduler_config)
    if header.is_sdxl:
        components["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
        components["is_cosxl_edit"] = header.sigmas is not None and header.in_channels == EDITOR_CHANNELS
    return components


@contextmanager
def as_current_file(name: str) -> Iterator[Path]:
    """The file itself, or a temporary .safetensors copy of a pickle or of a file with older names.

    No code of a pickle runs (`utils.weight_files`).
    """
    path, files = Path(name), TensorFiles([Path(name)], f"the model {name}")
    names = {key: current_name(key) for key in files.shapes}
    if path.suffix.lower() == ".safetensors" and all(key == current for key, current in names.items()):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="converted-") as folder:
        copy = Path(folder) / "model.safetensors"
        tensors = {current: files.read(key).contiguous().clone() for key, current in names.items()}
        save_file(tensors, copy)
        del tensors
        yield copy


def current_name(key: str) -> str:
    """The name that diffusers expects today: older files have no "text_model", or a prefix of data parallelism."""
    key = key.removeprefix("module.")
    if match := OLD_TEXT_ENCODER.match(key):
        return f"{match[1]}text_model.{match[2]}"
    return key


def _read_header(name: str) -> Header:
    """Raises `InputError` unless the file is a complete Stable Diffusion."""
    path = Path(name)
    if not path.is_file():
        raise InputError(f"the model {name} does not exist")
    if path.suffix.lower() not in MODEL_SUFFIXES[:-1]:
        raise InputError(f"{name} is not a {', '.join(MODEL_SUFFIXES[:-1])} file: give one, or a diffusers folder")
    if problem := find_damage(path):
        raise InputError(f"{name} {problem}")
    file = TensorFiles([path], "the model")
    shapes = {current_name(key): shape for key, shape in file.shapes.items()}
    if problem := _find_problem(shapes):
        raise InputError(f"{name} {problem}: give a complete Stable Diffusion 1.x/2.x or SDXL in one file")
    sigmas = {key: file.read(key).item() for key in (SIGMA_MIN, SIGMA_MAX) if key in file.shapes}
    is_cosxl = SIGMA_MAX in sigmas
    return Header(shapes, (sigmas.get(SIGMA_MIN, COSXL_SIGMA_MIN), sigmas[SIGMA_MAX]) if is_cosxl else None)


def _find_problem(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Why a file is not a complete Stable Diffusion 1.x/2.x or SDXL, or None."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in shapes)

    if any("lora_" in key or ".lokr_" in key or "hada_" in key for key in shapes):
        return "is an adapter, not a model (it belongs to --lora)"
    if has("control_model.", "controlnet_", "input_hint_block."):
        return "is a ControlNet"
    if has("double_blocks.", "model.diffusion_model.double_blocks.", "model.diffusion_model.joint_blocks."):
        return "is a transformer (FLUX or Stable Diffusion 3)"
    if has("down_blocks.") and has("conv_in."):
        return "contains one part of a diffusers pipeline"
    if has("conditioner.embedders.0.model."):
        return "is an SDXL refiner"
    if CONV_IN not in shapes:
        if has(*VAE_PREFIXES, "encoder.down", "decoder.up"):
            return "contains an autoencoder (VAE) without a UNet"
        return "is a model of another or an unknown family"
    if not has("conditioner.embedders.1.", "cond_stage_model."):
        return "contains a UNet without its text encoder"
    return None if has(*VAE_PREFIXES) else "contains no autoencoder (VAE)"


def _find_config(name: str, header: Header, config: str | None, cache_dir: str | None) -> Path:
    """The folder of a pipeline with the file's architecture. Raises `InputError` if there is none."""
    if config is None:  # diffusers recognises it by names and shapes, which meta tensors have
        shapes = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
        config = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    folder = Path(config)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(config, cache_dir=cache_dir, allow_patterns=["*.json", "*.txt"]))
        except (OSError, ValueError) as error:
            is_offline = is_hub_out_of_reach(error)
            reason = "is not cached, and the Hub cannot be reached" if is_offline else f"was not found ({error})"
            raise InputError(
                f"{name} needs the configuration of {config}, which {reason}: give --single_file_config FOLDER, a "
                "pipeline of the same family in diffusers' format (without weights is enough)"
            ) from error
    components = SDXL_COMPONENTS if header.is_sdxl else COMPONENTS
    if missing := [part for part in components if not (folder / part).is_dir()]:
        raise InputError(f"--single_file_config {config} does not match {name}: it has no {', '.join(missing)}")
    return folder


def _read_configs(header: Header, folder: Path) -> tuple[dict, dict, dict]:
    """(UNet, VAE, scheduler) configurations: those of the folder, with what the file's header says."""
    with explaining_load_errors(f"--single_file_config {folder}"):
        unet = UNet2DConditionModel.load_config(folder, subfolder="unet") | {"in_channels": header.in_channels}
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        scheduler = DDPMScheduler.load_config(folder, subfolder="scheduler")
    if (unet.get("addition_embed_type") == "text_time") != header.is_sdxl:
        family = "SDXL" if header.is_sdxl else "Stable Diffusion 1.x/2.x"
        raise InputError(f"--single_file_config {folder} is of another family: the file is {family}")
    if header.sigmas:
        sigma_min, sigma_max = header.sigmas
        edm = dict(sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential")
        cosxl = EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max, **edm)
        scheduler = dict(cosxl.config) | {"_class_name": "EDMEulerScheduler"}
    elif "v_pred" in header.shapes:
        scheduler = scheduler | {"prediction_type": "v_prediction"}
        if "ztsnr" in header.shapes:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return unet, vae, scheduler


def _refuse_mismatch(name: str, header: Header, components: dict[str, Any]) -> None:
    """Raises `InputError` if weights are missing or unused, which diffusers would ignore."""
    for part, model in components.items():
        weights = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
        if missing := [key for key, value in weights if value.is_meta]:
            names = f"its {part} has no {missing[0]} and {len(missing) - 1} more"
            raise InputError(f"{name} does not match its configuration: {names} ({ADVICE})")
    stored = sum(prod(shape) for key, shape in header.shapes.items() if key.startswith("model.diffusion_model."))
    expected = sum(value.numel() for value in components["unet"].parameters())
    if stored != expected:
        counts = f"its UNet has {stored:,} weights, expected {expected:,}"
        raise InputError(f"{name} does not match its configuration: {counts} ({ADVICE})")
