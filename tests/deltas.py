"""Inputs of the tests of adapt_distill.py: LoRAs in several formats, merges as plain tensors."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.merging.merge import MergeOptions, MergeReport
from utils.merging.recipe import MergeRecipe, open_recipe
from utils.merging.weight_sources import WeightSource

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
# The layers of LCM-LoRA: attention, projections, feed-forward, and the convolutions of the residual blocks.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The UNet weights of a tiny model."""
    return load_file(folder / UNET)


def load_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def merge(
    editor: Path,
    options: MergeOptions,
    report: MergeReport | None = None,
    scale: float | None = None,
    **sources: Path | WeightSource,
) -> dict[str, torch.Tensor]:
    """The merged UNet in float32, as adapt_distill.py computes it. sources: role -> folder or file."""
    named = {
        role: source if isinstance(source, WeightSource) else WeightSource(f"--{role}", str(source))
        for role, source in sources.items()
    }
    recipe = MergeRecipe(WeightSource("--model", str(editor)), Path("unused"), named, options, lcm_guidance=scale)
    merged: dict[str, list[torch.Tensor]] = {}
    for name, _, value in open_recipe(recipe).merge(options, report if report is not None else MergeReport()):
        merged.setdefault(name, []).append(value)
    return {name: torch.cat(values) if values[0].ndim else values[0] for name, values in merged.items()}


def add_random_lora(
    unet: UNet2DConditionModel, targets: Iterable[str] = TARGETS, rank: int = 4, alpha: float = 6.0
) -> None:
    """Add a LoRA of random weights to a UNet."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


def save_peft_lora(folder: Path, unet: UNet2DConditionModel) -> Path:
    """The format of diffusers' training scripts: peft's names, alpha in the metadata."""
    config = unet.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config
    )
    return folder / LORA


def lora_layers(unet: UNet2DConditionModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (down, up)."""
    state = get_peft_model_state_dict(unet)
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    return {
        layer: tuple(state[f"{layer}.lora_{part}.weight"].contiguous() for part in "AB") for layer in sorted(layers)
    }


def save_kohya_lora(
    path: Path, layers: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, names: dict[str, str] | None = None
) -> Path:
    """The format of kohya's scripts and of LCM-LoRA: flat names, an alpha per layer. names: layer -> other name."""
    tensors = {}
    for layer, (down, up) in layers.items():
        flat = f"lora_unet_{(names or {}).get(layer, layer).replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def lora_delta(down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """What a LoRA adds to a weight."""
    if down.ndim == 2:
        return scale * up @ down
    return scale * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
