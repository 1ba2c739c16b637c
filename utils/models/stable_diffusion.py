"""Loading the components of Stable Diffusion 1.x/2.x and SDXL, and widening the UNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from utils.errors import InputError, explaining_load_errors
from utils.models.latents import EDITOR_CHANNELS, LATENT_CHANNELS
from utils.models.model_folders import (
    choose_variant,
    load_tokenizer,
    require_model_folder,
    require_variant,
    require_whole_files,
)
from utils.models.single_file import COMPONENTS, SDXL_COMPONENTS, is_single_file, load_single_file, read_single_file
from utils.models.vae_file import load_vae_file


@dataclass(frozen=True)
class ModelOptions:
    """The fields are flags."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    non_ema_revision: str | None = None
    pretrained_vae_model_name_or_path: str | None = None
    vae_revision: str | None = None
    vae_variant: str | None = None
    single_file_config: str | None = None
    cache_dir: str | None = None

    @property
    def name(self) -> str:
        return self.pretrained_model_name_or_path

    @property
    def location(self) -> dict:
        """Keyword arguments of `from_pretrained`."""
        return dict(revision=self.revision, cache_dir=self.cache_dir)


@dataclass(frozen=True)
class Configs:
    """The configuration files of a model."""

    unet: dict
    vae: dict
    scheduler: dict

    @property
    def is_sdxl(self) -> bool:
        return self.unet.get("addition_embed_type") == "text_time"


@dataclass
class StableDiffusion:
    """The components of a Stable Diffusion, named as in its pipelines; SDXL has two text encoders.

    force_zeros_for_empty_prompt: SDXL's null prompt is zeros, and not the encoded "".
    is_cosxl_edit: the image condition is scaled like the latents (CosXL only).
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    force_zeros_for_empty_prompt: bool = False
    is_cosxl_edit: bool = False

    @property
    def is_sdxl(self) -> bool:
        return self.text_encoder_2 is not None

    @property
    def text_encoders(self) -> list[CLIPTextModel]:
        return [model for model in (self.text_encoder, self.text_encoder_2) if model is not None]

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def read_configs(options: ModelOptions) -> Configs:
    """Read the configurations of UNet, VAE and scheduler, without weights. Raises `InputError`."""
    if is_single_file(options.name):
        return Configs(*read_single_file(options.name, options.single_file_config, options.cache_dir))
    name, location = options.name, options.location
    require_model_folder(name, f"--pretrained_model_name_or_path {name}")
    with explaining_load_errors(f"--pretrained_model_name_or_path {name}"):
        _refuse_missing_components(name, COMPONENTS)
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **location)
        vae = AutoencoderKL.load_config(name, subfolder="vae", **location)
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **location)
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise InputError(f"{name} is not a Stable Diffusion 1.x/2.x or SDXL: its UNet is a {unet['_class_name']}")
    configs = Configs(unet, vae, scheduler)
    if configs.is_sdxl:
        _refuse_missing_components(name, SDXL_COMPONENTS)
    return configs


def _refuse_missing_components(name: str, components: Sequence[str]) -> None:
    if missing := [part for part in components if Path(name).is_dir() and not (Path(name) / part).is_dir()]:
        raise InputError(
            f"--pretrained_model_name_or_path {name} is not a complete diffusers pipeline: missing {', '.join(missing)}"
        )


def load_stable_diffusion(options: ModelOptions, unet: UNet2DConditionModel | None = None) -> StableDiffusion:
    """Load the components in float32, except the UNet if one is given. Raises `InputError`."""
    with explaining_load_errors(f"--pretrained_model_name_or_path {options.name}"):
        if is_single_file(options.name):
            components = load_single_file(options.name, options.single_file_config, options.cache_dir)
            parts = StableDiffusion(**components | ({"unet": unet} if unet else {}))
        else:
            parts = _load_pipeline_components(options, unet)
    if options.pretrained_vae_model_name_or_path:
        name = options.pretrained_vae_model_name_or_path
        place = (options.vae_revision, options.vae_variant, options.cache_dir)
        parts.vae = load_vae(name, dict(parts.vae.config), f"--pretrained_vae_model_name_or_path {name}", *place)
    for model in (parts.vae, *parts.text_encoders):
        model.eval()
    return parts


def _load_pipeline_components(options: ModelOptions, unet: UNet2DConditionModel | None) -> StableDiffusion:
    name, location = options.name, options.location
    used = [part for part in SDXL_COMPONENTS if unet is None or part != "unet"]
    require_whole_files(name, f"--pretrained_model_name_or_path {name}", used)
    require_variant(name, used, options.variant, f"--pretrained_model_name_or_path {name}", **location)

    def weights(part: str) -> dict:
        variant = choose_variant(name, part, options.variant, **location)
        return location | dict(subfolder=part, variant=variant, torch_dtype=torch.float32)

    if unet is None:
        unet_weights = weights("unet") | {"revision": options.non_ema_revision or options.revision}
        unet = UNet2DConditionModel.from_pretrained(name, **unet_weights)
    text_encoder = CLIPTextModel.from_pretrained(name, **weights("text_encoder"))
    parts = StableDiffusion(
        tokenizer=load_tokenizer(name, "tokenizer", location, text_encoder.config.hidden_size),
        text_encoder=text_encoder,
        vae=AutoencoderKL.from_pretrained(name, **weights("vae")),
        unet=unet,
        scheduler=_load_scheduler(name, location),
    )
    if unet.config.addition_embed_type == "text_time":
        index = DiffusionPipeline.load_config(name, **location)
        parts.force_zeros_for_empty_prompt = index.get("force_zeros_for_empty_prompt", True)
        parts.is_cosxl_edit = bool(index.get("is_cosxl_edit", False))
        parts.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(name, **weights("text_encoder_2"))
        width = parts.text_encoder_2.config.hidden_size
        parts.tokenizer_2 = load_tokenizer(name, "tokenizer_2", location, width)
    return parts


def load_vae(
    name: str,
    own: dict,
    what: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> AutoencoderKL:
    """The autoencoder in a file, in a VAE's folder or repository, or in a pipeline's; in float32.

    own: configuration of the model's own VAE, which a file without one needs. what: the start of messages.
    """
    location = dict(revision=revision, cache_dir=cache_dir)
    is_pipeline = (Path(name) / "vae").is_dir()
    with explaining_load_errors(what):
        if is_single_file(name):
            return load_vae_file(name, own, what)
        if not Path(name).is_dir():
            try:
                AutoencoderKL.load_config(name, **location)
            except OSError:  # no config.json at the top of the repository
                is_pipeline = True
        subfolder = "vae" if is_pipeline else ""
        variant = choose_variant(name, subfolder, variant, **location)
        settings = location | dict(variant=variant, torch_dtype=torch.float32)
        return AutoencoderKL.from_pretrained(name, subfolder="vae" if is_pipeline else None, **settings)


def _load_scheduler(name: str, location: dict) -> SchedulerMixin:
    """The scheduler, in the class that its configuration names."""
    config = DDPMScheduler.load_config(name, subfolder="scheduler", **location)
    scheduler_class = getattr(diffusers, config.get("_class_name", ""), None)
    if scheduler_class is None:
        raise InputError(f"{name}: diffusers has no scheduler {config.get('_class_name')!r}")
    return scheduler_class.from_config(config)


def require_text_to_image(configs: Configs, name: str, is_sdxl: bool) -> None:
    """Raises `InputError` unless the model is a text-to-image model of the script's family; names the right script."""
    channels = configs.unet.get("in_channels", LATENT_CHANNELS)
    if channels == EDITOR_CHANNELS:
        raise InputError(
            f"{name} is an InstructPix2Pix editor (its UNet has 8 input channels): "
            "train it further with finetune_instruct_pix2pix.py"
        )
    if channels != LATENT_CHANNELS:
        raise InputError(f"{name}: its UNet has {channels} channels; give a text-to-image model, which has 4 channels")
    if configs.is_sdxl != is_sdxl:
        family = "an SDXL model" if configs.is_sdxl else "a Stable Diffusion 1.x/2.x model, not SDXL"
        raise InputError(f"{name} is {family}: train it with {_training_script(configs)}")


def require_editor(configs: Configs, name: str) -> None:
    """Raises `InputError` unless the model is an InstructPix2Pix editor; names the right script."""
    channels = configs.unet.get("in_channels", LATENT_CHANNELS)
    if channels == LATENT_CHANNELS:
        raise InputError(
            f"{name} is a text-to-image model (its UNet has 4 channels, an editor's has 8): "
            f"train an editor from it with {_training_script(configs)}"
        )
    if channels != EDITOR_CHANNELS:
        raise InputError(f"{name}: its UNet has {channels} channels; give an InstructPix2Pix editor, which has 8")


def _training_script(configs: Configs) -> str:
    return "train_instruct_pix2pix_sdxl.py" if configs.is_sdxl else "train_instruct_pix2pix.py"


def widen_conv_in(unet: UNet2DConditionModel) -> None:
    """Widen the UNet's first convolution to 8 input channels; the weights of the new channels are zero.

    So the widened UNet equals the base for any image latents.
    Unlike diffusers: the bias is copied. There it stays randomly initialised, and training starts from a damaged base.
    """
    old = unet.conv_in
    new = torch.nn.Conv2d(EDITOR_CHANNELS, old.out_channels, old.kernel_size, old.stride, old.padding)
    new = new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=EDITOR_CHANNELS)


def editor_class(is_sdxl: bool) -> type[DiffusionPipeline]:
    """diffusers' InstructPix2Pix pipeline of the family."""
    return StableDiffusionXLInstructPix2PixPipeline if is_sdxl else StableDiffusionInstructPix2PixPipeline


def make_editor(parts: StableDiffusion, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The InstructPix2Pix pipeline of these components, without a safety checker or a watermark."""
    names = SDXL_COMPONENTS if parts.is_sdxl else COMPONENTS
    components = {name: getattr(parts, name) for name in names} | {"scheduler": scheduler}
    if not parts.is_sdxl:
        unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionInstructPix2PixPipeline(**components, **unused)
    settings = {name: getattr(parts, name) for name in ("force_zeros_for_empty_prompt", "is_cosxl_edit")}
    pipeline = StableDiffusionXLInstructPix2PixPipeline(**components, **settings, add_watermarker=False)
    if parts.is_cosxl_edit:  # diffusers does not save it by itself, and the reloaded pipeline would edit wrongly
        pipeline.register_to_config(is_cosxl_edit=True)
    return pipeline
