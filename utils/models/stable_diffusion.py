"""Loading the components of Stable Diffusion 1.x/2.x and SDXL, and widening the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from utils.models.single_file import is_single_file, load_single_file, read_single_file

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
SDXL_PARTS = ("tokenizer_2", "text_encoder_2")
EDITOR_CHANNELS = 8  # 4 of the noisy latents, 4 of the original image (paper, section 3.2)


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
    def place(self) -> dict:
        """Where the libraries look for the model."""
        return dict(revision=self.revision, cache_dir=self.cache_dir)

    @property
    def vae_place(self) -> dict:
        """Where they look for an autoencoder of its own: it has another repository's revisions."""
        return dict(revision=self.vae_revision, cache_dir=self.cache_dir)


@dataclass(frozen=True)
class Configs:
    """What the small files of a model say of it."""

    unet: dict
    vae: dict
    scheduler: dict

    @property
    def is_sdxl(self) -> bool:
        return self.unet.get("addition_embed_type") == "text_time"


@dataclass
class StableDiffusion:
    """The parts of a Stable Diffusion, under the names that its pipelines give them; SDXL has two text encoders.

    force_zeros_for_empty_prompt: SDXL's null prompt is zeros, and not the encoded "".
    is_cosxl_edit: the image condition is scaled like the latents, which no other editor does.
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
        """Pixels per latent, on a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def read_configs(options: ModelOptions) -> Configs:
    """The configurations of UNet, VAE and scheduler, without weights. Raises `InputError` when they are missing."""
    if is_single_file(options.name):
        return Configs(*read_single_file(options.name, options.single_file_config, options.cache_dir))
    name, place = options.name, options.place
    with explaining_load_errors(f"--pretrained_model_name_or_path {name}"):
        _refuse_missing_parts(name, PARTS)
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **place)
        vae = AutoencoderKL.load_config(name, subfolder="vae", **place)
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **place)
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise InputError(f"{name} is not a Stable Diffusion 1.x/2.x or SDXL: its UNet is a {unet['_class_name']}")
    configs = Configs(unet, vae, scheduler)
    if configs.is_sdxl:
        _refuse_missing_parts(name, SDXL_PARTS)
    return configs


def _refuse_missing_parts(name: str, parts: Sequence[str]) -> None:
    missing = [part for part in parts if Path(name).is_dir() and not (Path(name) / part).is_dir()]
    if missing:
        raise InputError(
            f"--pretrained_model_name_or_path {name} is not the folder of a whole diffusers pipeline: "
            f"it lacks {', '.join(missing)}"
        )


def load_stable_diffusion(options: ModelOptions, unet: UNet2DConditionModel | None = None) -> StableDiffusion:
    """Load every component in float32, or all but the UNet when one is given. Raises `InputError`."""
    with explaining_load_errors(f"--pretrained_model_name_or_path {options.name}"):
        if is_single_file(options.name):
            components = load_single_file(options.name, options.single_file_config, options.cache_dir)
            parts = StableDiffusion(**components | ({"unet": unet} if unet else {}))
        else:
            parts = _load_pipeline_folder(options, unet)
    if options.pretrained_vae_model_name_or_path:
        parts.vae = _load_external_vae(options)
    for model in (parts.vae, *parts.text_encoders):
        model.eval()
    return parts


def _load_pipeline_folder(options: ModelOptions, unet: UNet2DConditionModel | None) -> StableDiffusion:
    name, place = options.name, options.place
    weights = dict(variant=options.variant, torch_dtype=torch.float32)
    unet_place = place | {"revision": options.non_ema_revision or options.revision}
    unet = unet or UNet2DConditionModel.from_pretrained(name, subfolder="unet", **unet_place, **weights)
    parts = StableDiffusion(
        tokenizer=_load_tokenizer(name, "tokenizer", place),
        text_encoder=CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **place, **weights),
        vae=AutoencoderKL.from_pretrained(name, subfolder="vae", **place, **weights),
        unet=unet,
        scheduler=_load_scheduler(name, place),
    )
    if unet.config.addition_embed_type == "text_time":
        index = DiffusionPipeline.load_config(name, **place)
        parts.force_zeros_for_empty_prompt = index.get("force_zeros_for_empty_prompt", True)
        parts.is_cosxl_edit = bool(index.get("is_cosxl_edit", False))
        parts.tokenizer_2 = _load_tokenizer(name, "tokenizer_2", place)
        parts.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(
            name, subfolder="text_encoder_2", **place, **weights
        )
    return parts


def _load_external_vae(options: ModelOptions) -> AutoencoderKL:
    """An autoencoder of its own repository or folder, or that of a whole pipeline."""
    name = options.pretrained_vae_model_name_or_path
    settings = options.vae_place | dict(variant=options.vae_variant, torch_dtype=torch.float32)
    with explaining_load_errors(f"--pretrained_vae_model_name_or_path {name}"):
        if (Path(name) / "vae").is_dir():
            return AutoencoderKL.from_pretrained(name, subfolder="vae", **settings)
        if not Path(name).is_dir():
            try:
                AutoencoderKL.load_config(name, **options.vae_place)
            except OSError:  # no autoencoder at the top of the repository: a pipeline's
                return AutoencoderKL.from_pretrained(name, subfolder="vae", **settings)
        return AutoencoderKL.from_pretrained(name, **settings)


def _load_tokenizer(name: str, subfolder: str, place: dict) -> CLIPTokenizer:
    """The tokenizer. Where its files are missing, transformers makes one that knows no text at all."""
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder, **place)
    if len(tokenizer) < 256:  # a byte-level one has a token for each byte at least
        raise InputError(
            f"the {subfolder} of {name} is not whole (it lacks vocab.json or tokenizer.json): copy it again"
        )
    return tokenizer


def _load_scheduler(name: str, place: dict) -> SchedulerMixin:
    """The scheduler in the class that its configuration names, as the pipelines load it."""
    import diffusers

    config = DDPMScheduler.load_config(name, subfolder="scheduler", **place)
    scheduler_class = getattr(diffusers, config.get("_class_name", ""), None)
    if scheduler_class is None:
        raise InputError(f"{name} names the scheduler {config.get('_class_name')!r}, which diffusers does not have")
    return scheduler_class.from_config(config)


def require_text_to_image(configs: Configs, name: str, is_sdxl: bool) -> None:
    """Refuse a base that is no text-to-image model of the script's family, naming the script that fits."""
    channels = configs.unet.get("in_channels", 4)
    if channels == EDITOR_CHANNELS:
        raise InputError(
            f"{name} is an InstructPix2Pix editor already (its UNet takes 8 channels): "
            "continue from it with finetune_instruct_pix2pix.py"
        )
    if channels != 4:
        raise InputError(
            f"the UNet of {name} takes {channels} channels, and a text-to-image base takes 4: choose another"
        )
    if configs.is_sdxl != is_sdxl:
        family, script = (
            ("an SDXL", "train_instruct_pix2pix_sdxl.py")
            if configs.is_sdxl
            else ("a Stable Diffusion 1.x/2.x, no SDXL,", "train_instruct_pix2pix.py")
        )
        raise InputError(f"{name} is {family} model: train it with {script}")


def require_editor(configs: Configs, name: str) -> None:
    """Refuse a model that is no InstructPix2Pix editor, naming the script that fits."""
    channels = configs.unet.get("in_channels", 4)
    if channels == 4:
        script = "train_instruct_pix2pix_sdxl.py" if configs.is_sdxl else "train_instruct_pix2pix.py"
        raise InputError(
            f"{name} is a text-to-image model (its UNet takes 4 channels, an editor's takes 8): "
            f"make an editor of it with {script}"
        )
    if channels != EDITOR_CHANNELS:
        raise InputError(f"the UNet of {name} takes {channels} channels, and an InstructPix2Pix editor takes 8")


def widen_conv_in(unet: UNet2DConditionModel, in_channels: int = EDITOR_CHANNELS) -> None:
    """Give the UNet's first convolution `in_channels` inputs: its own first, zeros for the new ones, the bias copied.

    With zero weights for the image channels the widened UNet equals the base for any image latents.
    Unlike diffusers: there the bias stays at its random initialisation, so training starts from a damaged base.
    """
    old = unet.conv_in
    new = torch.nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    new = new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=in_channels)


def editor_class(is_sdxl: bool) -> type[DiffusionPipeline]:
    """The pipeline of diffusers that edits with such a model."""
    return StableDiffusionXLInstructPix2PixPipeline if is_sdxl else StableDiffusionInstructPix2PixPipeline


def make_editor(parts: StableDiffusion, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The pipeline that runs these components, without a safety checker or a watermark."""
    shared = dict(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet, scheduler=scheduler
    )
    if not parts.is_sdxl:
        return editor_class(is_sdxl=False)(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline = editor_class(is_sdxl=True)(
        **shared,
        tokenizer_2=parts.tokenizer_2,
        text_encoder_2=parts.text_encoder_2,
        add_watermarker=False,
        force_zeros_for_empty_prompt=parts.force_zeros_for_empty_prompt,
        is_cosxl_edit=parts.is_cosxl_edit,
    )
    if parts.is_cosxl_edit:  # stock diffusers forgets it when it saves, and edits wrongly after loading
        pipeline.register_to_config(is_cosxl_edit=True)
    return pipeline
