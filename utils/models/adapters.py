"""Adapters: few trained weights beside a frozen UNet (LoRA, DoRA), in diffusers' file format.

conv_in is trained in full, and is an ordinary part of the adapter all the same. A LoRA adds scale * B A to a weight;
here A (the rank is the number of conv_in's inputs times its kernel's size) is a frozen identity and the scale is 1, so
that B is the change of the weight, whatever the change. Stock diffusers loads it like any other LoRA.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from utils.errors import InputError

ADAPTER = "default"  # the name that diffusers and peft give to an adapter without one
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class AdapterOptions:
    """The fields are flags.

    lora_rank: None trains the whole UNet. lora_alpha: None stands for the rank; the adapter is scaled by alpha / rank.
    """

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False
    lora_target: str = "attention"
    quantize_base: str | None = None
    merge_adapter: bool = False


def add_adapter(unet: UNet2DConditionModel, options: AdapterOptions, *, train_conv_in: bool) -> None:
    """Freeze the UNet and put an adapter beside it that changes nothing yet; its float32 weights require gradients.

    train_conv_in: the base was widened from 4 channels; with `lora_target` "all" conv_in is trained in any case.
    The weights are drawn from torch's generator, which stands afterwards where it stood before. Call it while the base
    is in float32 (or quantised): DoRA's magnitudes begin as the norms of the base's weights.
    """
    unet.requires_grad_(False)
    config = _make_config(unet, options, train_conv_in or options.lora_target == "all")
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(config, adapter_name=ADAPTER)
    for parameter in _adapter_parameters(unet).values():
        # Contiguous too: DoRA makes magnitudes of convolutions with strides that DDP warns about.
        parameter.data = parameter.data.float().clone(memory_format=torch.contiguous_format)
    if "conv_in" in config.rank_pattern:
        _make_full_rank(unet.conv_in)
    unet.train(unet.training)  # the new layers too: in training mode they drop out


def _make_config(unet: UNet2DConditionModel, options: AdapterOptions, train_conv_in: bool) -> LoraConfig:
    full_rank = {}
    if train_conv_in:
        full_rank["conv_in"] = unet.conv_in.weight[0].numel()  # inputs times kernel: 8 * 3 * 3 = 72
    if options.lora_target == "all":
        targets = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    else:
        targets = [*ATTENTION, *full_rank]
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        target_modules=targets,
        rank_pattern=full_rank,
        alpha_pattern=full_rank,
    )


@torch.no_grad()
def _make_full_rank(conv_in: nn.Module) -> None:
    """Make the LoRA of conv_in its change itself: A the identity and frozen, and no dropout of latents."""
    identity = conv_in.lora_A[ADAPTER].weight  # (inputs * kernel, inputs, height, width)
    identity.copy_(torch.eye(len(identity)).view_as(identity))
    identity.requires_grad_(False)
    conv_in.lora_dropout[ADAPTER] = nn.Identity()


def has_adapter(unet: nn.Module) -> bool:
    """Whether `add_adapter` has been here, and `merge_adapter` has not."""
    return bool(getattr(unet, "peft_config", None))


def cast_frozen(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Hold the base's Linear and Conv2d weights in `dtype`; the UNet then runs under autocast alone.

    conv_in, the norms and the adapter stay in float32, and quantised layers as they are.
    """
    for name, module in unet.named_modules():
        path = name.split(".")
        if path[0] == "conv_in" or any(step.startswith("lora_") for step in path):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.is_floating_point():
            module.to(dtype)


def save_adapter(folder: Path, unet: UNet2DConditionModel, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the file that `pipeline.load_lora_weights(folder)` loads, and return its path.

    weights: values by the name of the parameter, in place of the model's own (the averaged ones).
    Raises ValueError when one of them is not of the adapter.
    """
    values = _adapter_parameters(unet)
    if weights and (foreign := weights.keys() - values.keys()):
        raise ValueError(f"no weights of the adapter: {', '.join(sorted(foreign))}")
    tensors = {_stored_name(name): value for name, value in (values | (weights or {})).items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers={name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        unet_lora_adapter_metadata=_make_metadata(unet),
    )
    return Path(folder) / LORA_WEIGHT_NAME_SAFE


def _make_metadata(unet: UNet2DConditionModel) -> dict:
    """The configuration as peft's loader reads it.

    Without dropout: it concerns training alone, and layers that `load_lora_weights` adds are in training mode.
    """
    config = unet.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
    # Sets have no order, and the same adapter is to be the same file.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def read_adapter(path: Path, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights in a file of `save_adapter`, or in its folder, by the name of the UNet's parameter.

    Raises `InputError` when the file is not whole or is not an adapter of this UNet, with this rank, target and alpha.
    """
    file = path / LORA_WEIGHT_NAME_SAFE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = json.loads((stored.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{file} is not the whole file of an adapter: {error}") from error
    names = {f"unet.{_stored_name(name)}": name for name in _adapter_parameters(unet)}
    if problem := _find_misfit(tensors, metadata, unet, names):
        raise InputError(
            f"the adapter in {file} does not fit: {problem}. Give the model, --lora_rank, --lora_alpha, --use_dora and "
            "--lora_target that it was trained with"
        )
    return {names[stored_name]: value for stored_name, value in tensors.items()}


def _find_misfit(tensors: dict, metadata: dict, unet: UNet2DConditionModel, names: dict[str, str]) -> str | None:
    """Why stored weights are not of the UNet's adapter, or None. names: stored name -> parameter."""
    parameters = _adapter_parameters(unet)
    if missing := sorted(names.keys() - tensors.keys()):
        return f"it lacks {missing[0]} and {len(missing) - 1} more"
    if extra := sorted(tensors.keys() - names.keys()):
        return f"it has {extra[0]} and {len(extra) - 1} more, which this adapter has not"
    for stored_name, value in tensors.items():
        shape = tuple(parameters[names[stored_name]].shape)
        if tuple(value.shape) != shape:
            return f"{stored_name} has the shape {tuple(value.shape)}, and here it is {shape}"
    alpha = unet.peft_config[ADAPTER].lora_alpha
    if metadata.get("unet.lora_alpha", alpha) != alpha:
        return f"its alpha is {metadata['unet.lora_alpha']}, and here it is {alpha}"
    return None


def merge_adapter(unet: UNet2DConditionModel) -> None:
    """Add the adapter to the base's weights, in float32, and leave an ordinary UNet.

    Raises ValueError for a quantised base: load the base in float32, add the adapter to that one, and merge it there.
    """
    if any(not value.is_floating_point() for value in unet.parameters()):
        raise ValueError("the base is quantised, so the adapter cannot be merged into it without loss")
    unet.float()
    unet.fuse_lora()
    unet.unload_lora()


def _adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, those that are not trained included."""
    return {name: value for name, value in unet.named_parameters() if f".{ADAPTER}." in name and ".lora_" in name}


def _stored_name(parameter: str) -> str:
    """The name of a parameter without the adapter's: "mid.to_q.lora_A.default.weight" -> "mid.to_q.lora_A.weight".

    In the file "unet." stands before it. DoRA's magnitudes are stored as bare tensors.
    """
    layer, _, tensor = parameter.rpartition(f".{ADAPTER}.")
    return layer if layer.endswith("lora_magnitude_vector") else f"{layer}.{tensor}"
