"""The one reader of adapters (LoRA, DoRA) in the formats that people have: for editing, merging and training.

| Written by | Layer | Matrices |
|---|---|---|
| diffusers, this suite | unet.down_blocks.0... | lora_A.weight, lora.down.weight |
| diffusers before 0.17 | unet....attn1.processor.to_q_lora | down.weight |
| peft (adapter_config.json) | base_model.model.down_blocks... | lora_A[.default].weight |
| kohya, A1111, ComfyUI, OneTrainer | lora_unet_input_blocks_1_1_... or lora_unet_down_blocks_... | lora_down.weight |

A layer's delta is scale * up @ down with scale = alpha / rank (arXiv 2106.09685, section 4.1). DoRA also stores the
norms that the changed weights have (arXiv 2402.09353, equation 5). Other kinds are refused by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from utils.errors import InputError
from utils.models.adapter_names import EMBEDDING, find_layer, known_names, split_name
from utils.models.unet_names import shorten_list
from utils.weight_files import TensorFiles

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_KINDS = {  # mark in a name -> the kind
    "hada_w": "a LoHa",
    "hada_t": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT or BOFT",
    "boft": "an OFT or BOFT",
    "ia3": "an (IA)3",
    "on_input": "an (IA)3",
    "glora": "a GLoRA",
    "vera_": "a VeRA",
    "w_norm": "trained norms",
    "b_norm": "trained norms",
    "bone": "a Bone",
}
CONVERT = "merge it into its model with the tool that made it, or give a LoRA or DoRA"


@dataclass(frozen=True)
class AdapterLayer:
    """The change of one weight. down (rank, inputs, ...), up (outputs, rank, ...), mid (rank, rank, ...) or None.

    magnitude: the norms of DoRA, (outputs) or in some LyCORIS files (1, inputs, ...); None for a LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    mid: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """scale * up @ down in float32, (outputs, inputs, ...)."""
        down, up = self.down.float(), self.up.float()
        if self.mid is not None:  # Tucker decomposition, as LyCORIS's LoCon
            return self.scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), self.mid.float(), down.flatten(1))
        return (up.flatten(1) @ (self.scale * down.flatten(1))).view(len(up), *down.shape[1:])

    @property
    def has_norms_per_input(self) -> bool:
        """Whether the norms are of columns, as older LyCORIS files store them, and not of rows."""
        norms = self.magnitude
        return norms is not None and norms.ndim > 1 and norms.shape[0] == 1 and norms.shape[1] > 1

    @property
    def num_inputs(self) -> int:
        return self.down.shape[1]

    def to(self, device: torch.device) -> AdapterLayer:
        """The layer on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)

    def apply(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The changed weight in float32. strength: factor of the delta; the norms of DoRA stay (as peft)."""
        if self.num_inputs < weight.shape[1]:  # conv_in of a 4-channel model, in an editor of 8
            changed = self.apply(weight[:, : self.num_inputs], strength)
            return torch.cat([changed, weight[:, self.num_inputs :].float()], dim=1)
        changed = weight.float() + (strength * self.delta()).view_as(weight)
        if self.magnitude is None:
            return changed
        magnitude, axis = self.magnitude.float().flatten(), 1 if self.has_norms_per_input else 0
        others = [dimension for dimension in range(changed.ndim) if dimension != axis]
        norm = changed.square().sum(dim=others, keepdim=True).sqrt()
        return changed * (magnitude.view([-1 if d == axis else 1 for d in range(changed.ndim)]) / norm)


@dataclass(frozen=True)
class AdapterContent:
    """An adapter's layers by component ("unet", "text_encoder", "text_encoder_2") and parameter name.

    replaced: whole weights that peft's modules_to_save stores, likewise; messages: what is not used, one line each;
    skipped: the stored names of components that were not asked for.
    """

    layers: dict[str, dict[str, AdapterLayer]]
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    messages: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.layers.values())) + sum(map(len, self.replaced.values()))


def refuse_other_kinds(names: Iterable[str], what: str) -> None:
    """Raise InputError for adapters that are neither LoRA nor DoRA. what: the start of the message."""
    for name in names:
        is_difference = name.endswith((".diff", ".diff_b"))  # not the "model.diffusion_model." of other names
        kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in name), None)
        kind = "a full difference of weights" if is_difference else kind
        if kind:
            raise InputError(f"{what} is {kind} ({name}), which is not supported: {CONVERT}")


def read_adapter_content(
    files: TensorFiles,
    what: str,
    components: Mapping[str, Mapping[str, Sequence[int]]],
    layers_per_block: int | list[int],
    peft_config: dict[str, Any] | None = None,
    model: str = "the model",
) -> AdapterContent:
    """Read all layers of an adapter in any format of the table above.

    components: component -> parameter name -> shape, of the model. layers_per_block: of the UNet. peft_config: from
    adapter_config.json. model: its name in messages. Raises InputError, beginning with `what`, for other kinds and for
    layers that do not match.
    """
    refuse_other_kinds(files.shapes, what)
    known = {part: known_names(part, parameters, layers_per_block) for part, parameters in components.items()}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    replaced: dict[str, dict[str, torch.Tensor]] = {}
    unknown, embeddings, skipped = [], set(), []
    for name in files.shapes:
        if match := EMBEDDING.match(name):
            embeddings.add(match[1] or "one without a name")
            continue
        layer, part = split_name(name)
        kind = "bias" if part is None and name.endswith(".bias") else "weight"
        component, found = find_layer(layer if part else name.removesuffix(f".{kind}"), known)
        if component is None:
            skipped.append(name)
        elif found is None or f"{found}.{kind}" not in components[component]:
            unknown.append(name)
        elif part is None:
            expected = tuple(components[component][f"{found}.{kind}"])
            if files.shapes[name] != expected:
                stored = f"{found}.{kind} has shape {expected}, that of the adapter {files.shapes[name]}"
                raise InputError(f"{what} does not match {model}: {stored}")
            replaced.setdefault(component, {})[f"{found}.{kind}"] = files.read(name)
        else:
            parts.setdefault((component, f"{found}.weight"), {})[part] = files.read(name)
    if unknown:
        raise InputError(f"{what} does not match {model}: its UNet has no layers {shorten_list(sorted(unknown))}")
    config = peft_config or _read_config(files.metadata)
    layers: dict[str, dict[str, AdapterLayer]] = {}
    for (component, name), tensors in parts.items():
        own_config = config if component == "unet" else {}  # peft's metadata describe the UNet's layers
        layer = _make_layer(f"{what} does not match {model}", name, tensors, own_config, components[component][name])
        layers.setdefault(component, {})[name] = layer
    messages = [f"{len(skipped)} tensors of text encoders are not used"] if skipped else []
    if embeddings:
        messages.append(f"its embeddings are not used: {', '.join(sorted(embeddings))}")
    return AdapterContent(layers, replaced, tuple(f"{what}: {message}" for message in messages), tuple(skipped))


def read_peft_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json beside an adapter's weights; None without one. Raises InputError."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    kind = config.get("peft_type", "LORA") if isinstance(config, dict) else "no configuration"
    initial = str(config.get("init_lora_weights", True)).lower() if isinstance(config, dict) else ""
    if initial.startswith(("pissa", "olora", "corda", "loftq")):
        kind = f"{initial.partition('_')[0]} (it also changed the base weights)"
    if kind != "LORA":
        raise InputError(f"{path} describes a {kind} adapter, which is not supported: {CONVERT}")
    return config


def _make_layer(
    what: str, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], expected: Sequence[int]
) -> AdapterLayer:
    """Raises InputError for incomplete layers and for shapes that do not match."""
    if not {"down", "up"} <= tensors.keys():
        raise InputError(f"{what}: it is incomplete, missing one of two matrices of {name}")
    if "bias" in tensors and tensors["bias"].any():
        raise InputError(f"{what}: it changes the bias of {name}, which is not supported: {CONVERT}")
    if "peft_magnitude" in tensors:  # of a convolution (1, outputs, 1, 1)
        tensors["magnitude"] = tensors["peft_magnitude"].flatten()
    down, up, rank = tensors["down"], tensors["up"], len(tensors["down"])
    layer = AdapterLayer(
        down, up, _find_scale(name, rank, tensors, config), tensors.get("mid"), tensors.get("magnitude")
    )
    expected = tuple(expected)
    inputs = (expected[1], down.shape[1]) if name == "conv_in.weight" and down.shape[1:2] == (4,) else (expected[1],)
    kernel = expected[2:] if layer.mid is None else tuple(layer.mid.shape[2:])
    is_right = down.ndim >= 2 and up.shape[0] == expected[0] and up.numel() == up.shape[0] * _rank_of(layer)
    stored_kernel = tuple(down.shape[2:]) if layer.mid is None else kernel
    is_kernel = (
        stored_kernel == tuple(expected[2:])
        or (not expected[2:] and set(stored_kernel) <= {1})
        or (set(expected[2:]) <= {1} and not stored_kernel)
    )
    if layer.magnitude is not None and layer.magnitude.numel() != expected[1 if layer.has_norms_per_input else 0]:
        shapes = f"{name} has shape {expected}, the norms of DoRA {tuple(layer.magnitude.shape)}"
        raise InputError(f"{what}: {shapes}")
    if not (is_right and is_kernel and down.shape[1] in inputs):
        shapes = f"{name} has shape {expected}, the matrices {tuple(down.shape)} and {tuple(up.shape)}"
        raise InputError(f"{what}: {shapes}")
    return layer


def _rank_of(layer: AdapterLayer) -> int:
    return len(layer.down) if layer.mid is None else layer.mid.shape[0]


def _find_scale(name: str, rank: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> float:
    if "alpha" in tensors:
        return float(tensors["alpha"]) / rank
    alpha = _find_pattern(config.get("alpha_pattern"), name.removesuffix(".weight"), config.get("lora_alpha", rank))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(metadata: dict[str, str]) -> dict[str, Any]:
    """peft's LoraConfig of the UNet, from the file's metadata."""
    stored = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {key.removeprefix("unet."): value for key, value in stored.items() if not key.startswith("text_encoder")}


def _find_pattern(patterns: dict[str, float] | None, layer: str, default: float) -> float:
    """peft's rule: the value of the first pattern that matches the end of the layer's name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
