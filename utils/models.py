"""Loading the components of Stable Diffusion, widening its UNet, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from utils.errors import InputError
from utils.load_errors import explaining_load_errors

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
EDITOR_CHANNELS = 8  # 4 of the noisy latents, 4 of the original image (paper, section 3.2)


@dataclass(frozen=True)
class ModelOptions:
    """The fields are flags."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    non_ema_revision: str | None = None
    cache_dir: str | None = None


@dataclass
class StableDiffusion:
    """The parts of a Stable Diffusion 1.x/2.x."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, on a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def read_configs(options: ModelOptions) -> tuple[dict, dict, dict]:
    """The configurations of UNet, VAE and scheduler, without weights. Raises `InputError` when they are missing."""
    where = dict(revision=options.revision, cache_dir=options.cache_dir)
    name = options.pretrained_model_name_or_path
    missing = [part for part in PARTS if Path(name).is_dir() and not (Path(name) / part).is_dir()]
    if missing:
        raise InputError(
            f"--pretrained_model_name_or_path {name} is not the folder of a whole diffusers pipeline: "
            f"it lacks {', '.join(missing)}"
        )
    with explaining_load_errors(f"--pretrained_model_name_or_path {name}"):
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **where)
        vae = AutoencoderKL.load_config(name, subfolder="vae", **where)
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **where)
    if (
        unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel"
        or unet.get("addition_embed_type") == "text_time"
    ):
        raise InputError(
            f"{name} is not a Stable Diffusion 1.x/2.x: this script trains those (for SDXL see the README)"
        )
    return unet, vae, scheduler


def load_stable_diffusion(options: ModelOptions, unet: UNet2DConditionModel | None = None) -> StableDiffusion:
    """Load every component in float32, or all but the UNet when one is given. Raises `InputError`."""
    where = dict(revision=options.revision, cache_dir=options.cache_dir)
    weights = dict(variant=options.variant, torch_dtype=torch.float32)
    name = options.pretrained_model_name_or_path
    unet_revision = options.non_ema_revision or options.revision
    with explaining_load_errors(f"--pretrained_model_name_or_path {name}"):
        return StableDiffusion(
            tokenizer=_load_tokenizer(name, where),
            text_encoder=CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **where, **weights).eval(),
            vae=AutoencoderKL.from_pretrained(name, subfolder="vae", **where, **weights).eval(),
            unet=unet
            or UNet2DConditionModel.from_pretrained(
                name, subfolder="unet", cache_dir=options.cache_dir, revision=unet_revision, **weights
            ),
            scheduler=_load_scheduler(name, where),
        )


def _load_tokenizer(name: str, where: dict) -> CLIPTokenizer:
    """The tokenizer. Where its files are missing, transformers makes one that knows no text at all."""
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **where)
    if len(tokenizer) < 256:  # a byte-level one has a token for each byte at least
        raise InputError(f"the tokenizer of {name} is not whole (it lacks vocab.json or tokenizer.json): copy it again")
    return tokenizer


def _load_scheduler(name: str, where: dict) -> SchedulerMixin:
    """The scheduler in the class that its configuration names, as the pipelines load it."""
    import diffusers

    config = DDPMScheduler.load_config(name, subfolder="scheduler", **where)
    scheduler_class = getattr(diffusers, config.get("_class_name", ""), None)
    if scheduler_class is None:
        raise InputError(f"{name} names the scheduler {config.get('_class_name')!r}, which diffusers does not have")
    return scheduler_class.from_config(config)


def require_text_to_image(unet_config: dict, name: str) -> None:
    """Refuse a UNet that is not a text-to-image one, naming the script that fits."""
    channels = unet_config.get("in_channels", 4)
    if channels == EDITOR_CHANNELS:
        raise InputError(
            f"{name} is an InstructPix2Pix editor already (its UNet takes 8 channels): "
            "continue from it with finetune_instruct_pix2pix.py"
        )
    if channels != 4:
        raise InputError(
            f"the UNet of {name} takes {channels} channels, and a text-to-image base takes 4: choose another"
        )


def require_editor(unet_config: dict, name: str) -> None:
    """Refuse a UNet that is not an InstructPix2Pix one, naming the script that fits."""
    channels = unet_config.get("in_channels", 4)
    if channels == 4:
        raise InputError(
            f"{name} is a text-to-image model (its UNet takes 4 channels, an editor's takes 8): "
            "make an editor of it with train_instruct_pix2pix.py"
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


def make_editor(parts: StableDiffusion, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The pipeline that runs these components, without a safety checker."""
    return StableDiffusionInstructPix2PixPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class MovingAverage:
    """Exponential moving average of a model's weights, in float32 on the model's device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its start.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model's weights after optimizer step `step`, from 1 on: ema += (1 - decay) (w - ema)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [value.detach() for value in model.state_dict().values()]
        torch._foreach_lerp_(list(self._weights.values()), live, 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the model's own names."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over averaged weights, name by name. Raises KeyError for a name that is missing."""
        for name, value in self._weights.items():
            value.copy_(state[name])

    @contextmanager
    def swapped_into(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context the model's weights are the averaged ones; afterwards its own, to the bit."""
        live = {name: value.detach().clone() for name, value in model.state_dict().items()}
        try:
            model.load_state_dict(self._weights)
            yield
        finally:
            model.load_state_dict(live)
