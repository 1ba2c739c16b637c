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
from utils.models.unet_names import original_names, shorten_list
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
_SUFFIXES = (  # what a stored name ends in -> the part of the layer
    (r"[._]lora_A(\.\w+)?\.weight", "down"),
    (r"[._]lora_B(\.\w+)?\.weight", "up"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?", "peft_magnitude"),
    (r"\.lora_B(\.\w+)?\.bias", "bias"),
)
_SUFFIX = [(re.compile(rf"(.+?){pattern}\Z"), part) for pattern, part in _SUFFIXES]
_EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\.|(?:emb_params|string_to_param)\b")
# The prefixes of a component in stored names; the first that fits decides.
_PREFIXES = {
    "unet": ("unet.base_model.model.", "unet.", "model.diffusion_model.", "diffusion_model.", "lora_unet_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
}


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
        magnitude = self.magnitude.float().flatten()
        is_per_input = self.magnitude.ndim > 1 and self.magnitude.shape[0] == 1 and self.magnitude.shape[1] > 1
        axis = 1 if is_per_input else 0
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
    known = {part: _known_names(part, parameters, layers_per_block) for part, parameters in components.items()}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    replaced: dict[str, dict[str, torch.Tensor]] = {}
    unknown, embeddings, skipped = [], set(), []
    for name in files.shapes:
        if match := _EMBEDDING.match(name):
            embeddings.add(match[1] or "one without a name")
            continue
        layer, part = _split(name)
        component, found = _find_layer(layer if part else name.removesuffix(".weight"), known)
        if component is None:
            skipped.append(name)
        elif found is None:
            unknown.append(name)
        elif part is None:
            replaced.setdefault(component, {})[f"{found}.weight"] = files.read(name)
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


def _split(name: str) -> tuple[str, str | None]:
    """(layer, part) of a stored name; (name, None) for a whole weight."""
    for pattern, part in _SUFFIX:
        if match := pattern.match(name):
            return match[1], part
    return name, None


def _known_names(component: str, parameters: Iterable[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """The names that files use for a layer, without a component's prefix -> the layer."""
    layers = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    names = {layer: layer for layer in layers}
    if component == "unet":
        names |= {original: layer for layer, original in original_names(layers, layers_per_block).items()}
    else:
        names |= {f"text_model.{layer}": layer for layer in layers}
        names |= {layer.removeprefix("text_model."): layer for layer in layers}
    names |= {name.replace(".", "_"): layer for name, layer in names.items()}
    return names


def _find_layer(stored: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str | None]:
    """(component, layer) of a stored layer name; (None, None) for a component that is not asked for."""
    for component, prefixes in _PREFIXES.items():
        if prefix := next((prefix for prefix in prefixes if stored.startswith(prefix)), None):
            if component not in known:
                return None, None
            return component, _match(stored.removeprefix(prefix), known[component])
    return "unet", _match(stored, known["unet"])


def _match(stored: str, names: Mapping[str, str]) -> str | None:
    stored = stored.removeprefix("base_model.model.").removesuffix(".base_layer")
    stored = re.sub(r"\.modules_to_save(\.\w+)?$", "", stored)
    if stored in names:
        return names[stored]
    # diffusers before 0.17: attn1.processor.to_q_lora, and to_out_lora for to_out.0; self_attn.to_q_lora for q_proj
    old = stored.replace(".processor", "")
    for before, after in (
        ("to_out", "to_out.0"),
        *((f"to_{x}", f"{x}_proj") for x in ("q", "k", "v")),
        ("to_out", "out_proj"),
    ):
        candidate = re.sub(rf"{before}(_lora)?$", after, old)
        if candidate in names:
            return names[candidate]
    return names.get(old.removesuffix("_lora"))


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
