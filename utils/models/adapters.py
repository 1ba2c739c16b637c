"""LoRA and DoRA adapters of a frozen UNet, in diffusers' file format.

conv_in is trained in full, as a LoRA of full rank: the rank is its number of inputs times the size of its kernel, A is
a frozen identity and the scale is 1, so B is the change of the weight. Stock diffusers loads it like any other LoRA.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from torch import nn

from utils.errors import InputError
from utils.models.adapter_files import AdapterContent
from utils.weight_files import TensorFiles

CONV_IN = "conv_in.weight"
ADAPTER = "default"  # the default adapter name of diffusers and peft
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class AdapterOptions:
    """The fields are flags. Without `lora_rank` and `init_adapter` the whole UNet is trained.

    lora_alpha: None means the rank (scale 1). init_adapter: the adapter to go on with, which has its own rank, alpha,
    kind and layers.
    """

    init_adapter: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False
    lora_target: str = "attention"
    quantize_base: str | None = None
    merge_adapter: bool = False

    @property
    def is_used(self) -> bool:
        return self.lora_rank is not None or self.init_adapter is not None


def add_adapter(
    unet: UNet2DConditionModel, options: AdapterOptions, *, train_conv_in: bool, initial: AdapterContent | None = None
) -> None:
    """Freeze the UNet and add an adapter in float32, which changes the output only as `initial` does.

    train_conv_in: for a base widened from 4 channels; with `lora_target` "all" conv_in is always trained. initial: of
    `init_adapter`; layers of one kind, LoRA or DoRA.
    Call it while the base is in float32 (or quantised): DoRA's magnitudes start as the norms of the base's weights.
    The weights are drawn from torch's global generator, whose state is restored afterwards.
    """
    unet.requires_grad_(False)
    train_conv_in = train_conv_in or options.lora_target == "all" or (initial is not None and _changes_conv_in(initial))
    if initial is None:
        config = _make_config(unet, options, train_conv_in)
    else:
        config = _make_initial_config(unet, initial, options.lora_dropout, train_conv_in)
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(config, adapter_name=ADAPTER)
    for parameter in _adapter_parameters(unet).values():
        # Contiguous: DDP warns about the strides of DoRA's magnitudes of convolutions.
        parameter.data = parameter.data.float().clone(memory_format=torch.contiguous_format)
    if "conv_in" in config.rank_pattern:
        _make_full_rank(unet.conv_in)
    if initial is not None:
        _copy_values(unet, initial)
    unet.train(unet.training)  # the mode of the new layers, which have dropout


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


def _changes_conv_in(initial: AdapterContent) -> bool:
    return CONV_IN in initial.layers.get("unet", {}) or CONV_IN in initial.replaced.get("unet", {})


def _make_initial_config(
    unet: UNet2DConditionModel, initial: AdapterContent, dropout: float, train_conv_in: bool
) -> LoraConfig:
    """The ranks and scales of an adapter's layers; conv_in has full rank, whatever it was."""
    layers = {name.removesuffix(".weight"): layer for name, layer in initial.layers["unet"].items()}
    ranks = {name: len(layer.down) for name, layer in layers.items() if name != "conv_in"}
    alphas = {name: layers[name].scale * rank for name, rank in ranks.items()}
    if train_conv_in:
        ranks["conv_in"] = alphas["conv_in"] = unet.conv_in.weight[0].numel()
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in ranks if name != "conv_in").most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        target_modules=sorted(ranks),
        rank_pattern={name: value for name, value in ranks.items() if value != rank or name == "conv_in"},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha or name == "conv_in"},
    )


@torch.no_grad()
def _copy_values(unet: UNet2DConditionModel, initial: AdapterContent) -> None:
    """Give the adapter of a UNet the values of `initial`."""
    for name, layer in initial.layers["unet"].items():
        module = unet.get_submodule(name.removesuffix(".weight"))
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        if name == CONV_IN:  # A is the identity
            delta = layer.delta()  # of an adapter of a text-to-image model (outputs, 4, ...)
            wide = torch.zeros(len(delta), *down.shape[1:])
            wide[:, : delta.shape[1]] = delta
            up.copy_(wide.view_as(up))
        else:
            down.copy_(layer.down.view_as(down))
            up.copy_(layer.up.view_as(up))
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector[ADAPTER].weight
            magnitude.copy_(layer.magnitude.view_as(magnitude))
    if (whole := initial.replaced.get("unet", {}).get(CONV_IN)) is not None:
        up, base = unet.conv_in.lora_B[ADAPTER].weight, unet.conv_in.get_base_layer().weight
        up.copy_((whole.float() - base.float().cpu()).view_as(up))


@torch.no_grad()
def _make_full_rank(conv_in: nn.Module) -> None:
    """Make B of conv_in's LoRA the change of its weight: A is a frozen identity, and latents are not dropped."""
    identity = conv_in.lora_A[ADAPTER].weight  # (inputs * kernel, inputs, height, width)
    identity.copy_(torch.eye(len(identity)).view_as(identity))
    identity.requires_grad_(False)
    conv_in.lora_dropout[ADAPTER] = nn.Identity()


def has_adapter(unet: nn.Module) -> bool:
    """Whether the UNet has an adapter that is not merged."""
    return bool(getattr(unet, "peft_config", None))


def cast_frozen(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Cast the base's Linear and Conv2d layers to `dtype`; the UNet then needs autocast.

    conv_in, the norms and the adapter stay in float32; quantised layers do not change.
    """
    for name, module in unet.named_modules():
        path = name.split(".")
        if path[0] == "conv_in" or any(part.startswith("lora_") for part in path):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.is_floating_point():
            module.to(dtype)


def save_adapter(folder: Path, unet: UNet2DConditionModel, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the file that `pipeline.load_lora_weights(folder)` loads, and return its path.

    weights: parameter name -> value to save instead of the current one (EMA). Raises ValueError for other names.
    """
    values = _adapter_parameters(unet)
    if weights and (unknown := weights.keys() - values.keys()):
        raise ValueError(f"not parameters of the adapter: {', '.join(sorted(unknown))}")
    tensors = {_stored_name(name): value for name, value in (values | (weights or {})).items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers={name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        unet_lora_adapter_metadata=_make_metadata(unet),
    )
    return Path(folder) / LORA_WEIGHT_NAME_SAFE


def _make_metadata(unet: UNet2DConditionModel) -> dict:
    """The LoraConfig for the file's metadata, without dropout: `load_lora_weights` adds layers in training mode."""
    config = unet.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
    # Sets have no order, and the same adapter must give the same file.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def read_adapter(path: Path, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Parameter name -> value, from the file of `save_adapter` or its folder.

    Raises `InputError` for a damaged file, and for an adapter of another UNet, rank, target or alpha.
    """
    file = path / LORA_WEIGHT_NAME_SAFE if Path(path).is_dir() else Path(path)
    stored = TensorFiles([file], "the adapter")
    tensors = {name: stored.read(name) for name in stored.shapes}
    metadata = json.loads(stored.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    names = {f"unet.{_stored_name(name)}": name for name in _adapter_parameters(unet)}
    if problem := _find_mismatch(tensors, metadata, unet, names):
        raise InputError(
            f"{file} does not match this run: {problem}. Use the model, --lora_rank, --lora_alpha, --use_dora and "
            "--lora_target that the adapter was trained with"
        )
    return {names[stored_name]: value for stored_name, value in tensors.items()}


def _find_mismatch(tensors: dict, metadata: dict, unet: UNet2DConditionModel, names: dict[str, str]) -> str | None:
    """Why stored tensors do not match the UNet's adapter, or None. names: stored name -> parameter name."""
    if missing := sorted(names.keys() - tensors.keys()):
        return f"it misses {missing[0]} and {len(missing) - 1} more tensors"
    if extra := sorted(tensors.keys() - names.keys()):
        return f"it has {extra[0]} and {len(extra) - 1} more tensors that this run does not train"
    for stored_name, value in tensors.items():
        expected = tuple(unet.get_parameter(names[stored_name]).shape)
        if tuple(value.shape) != expected:
            return f"{stored_name} has shape {tuple(value.shape)}, expected {expected}"
    alpha = unet.peft_config[ADAPTER].lora_alpha
    if metadata.get("unet.lora_alpha", alpha) != alpha:
        return f"its alpha is {metadata['unet.lora_alpha']}, expected {alpha}"
    return None


def merge_adapter(unet: UNet2DConditionModel) -> None:
    """Merge the adapter into the base's weights, in float32; an ordinary UNet remains.

    Raises ValueError for a quantised base: load the base in float32 and the adapter into that, then merge.
    """
    if any(not value.is_floating_point() for value in unet.parameters()):
        raise ValueError("the adapter cannot be merged into a quantised base without loss: load the base in float32")
    unet.float()
    unet.fuse_lora()
    unet.unload_lora()


def _adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, including the frozen ones."""
    return {name: value for name, value in unet.named_parameters() if f".{ADAPTER}." in name and ".lora_" in name}


def _stored_name(parameter: str) -> str:
    """The parameter name without the adapter name: "mid.to_q.lora_A.default.weight" -> "mid.to_q.lora_A.weight".

    The file adds the prefix "unet.". DoRA's magnitudes are stored without ".weight".
    """
    layer, _, tensor = parameter.rpartition(f".{ADAPTER}.")
    return layer if layer.endswith("lora_magnitude_vector") else f"{layer}.{tensor}"
