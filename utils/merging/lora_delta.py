"""The delta of a LoRA file, in any format that diffusers loads (peft, kohya, old diffusers).

Each layer adds scale * B A, with scale = alpha / rank; `--weight` multiplies it. For a convolution, A has the kernel
and B is 1x1, and the product is the same: (outputs, rank) @ (rank, inputs * height * width).
"""

import json
import re
from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

from utils.errors import InputError, explaining_load_errors
from utils.merging.deltas import CONV_IN, Shape
from utils.merging.unet_names import layers_of, original_names, shorten_list
from utils.merging.weight_sources import SourceFiles
from utils.models.latents import LATENT_CHANNELS
from utils.weight_files import ALL, TensorFiles

_TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoder(_2)?\.)")
_DORA = ("dora_scale", "lora_magnitude_vector")
_OTHER_KINDS = ("hada_w", "lokr_", "lora_mid", "oft_", "diff_b", ".diff", "glora", "ia3")  # LyCORIS and others


class LoraDelta:
    """The delta of a LoRA at its own scale (`deltas.Delta`). Its text encoder weights are skipped."""

    def __init__(self, source: SourceFiles, shapes: Mapping[str, Shape], layers_per_block: int | list[int]) -> None:
        """shapes: of the editor's parameters. Raises `InputError` for unknown layers, other shapes and other kinds."""
        self._flag = source.source.flag_and_name
        files = TensorFiles(source.files, self._flag)
        self._refuse_other_kinds(list(files.shapes))
        text_keys = [key for key in files.shapes if _TEXT_ENCODER.match(key)]
        self.skipped = dict.fromkeys(text_keys, "text encoders are not changed")
        kohya_names = _kohya_names(layers_of(shapes), layers_per_block)
        tensors = {}
        for key in files.shapes:
            layer, dot, rest = key.partition(".")
            if key not in self.skipped:
                tensors[kohya_names.get(layer, layer) + dot + rest] = files.read(key)
        with explaining_load_errors(self._flag, "give a LoRA that diffusers can load"):
            state_dict, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors)
        alphas = (alphas or {}) | {key: float(value) for key, value in state_dict.items() if key.endswith(".alpha")}
        self._alphas = {_layer_of(key): alpha for key, alpha in convert_unet_state_dict_to_peft(alphas).items()}
        self._matrices = self._group(convert_unet_state_dict_to_peft(state_dict), shapes)
        self.shapes = {name: self._find_shape(name, shapes[name]) for name in self._matrices}
        self._config = _read_config(files.metadata)
        self._cached: tuple[str, torch.Tensor, torch.Tensor] | None = None

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Rows of a parameter's delta, float32: scale * B A."""
        if self._cached is None or self._cached[0] != name:
            down, up = (self._matrices[name][part].float().flatten(1) for part in "AB")
            self._cached = (name, down * self._find_scale(name), up)
        _, down, up = self._cached
        delta = up[rows] @ down
        return delta.view(len(delta), *self.shapes[name][1:])

    def _refuse_other_kinds(self, keys: list[str]) -> None:
        if dora := [key for key in keys if any(mark in key for mark in _DORA)]:
            reason = "its delta depends on the weights it was trained on"
            raise InputError(f"{self._flag} is a DoRA ({dora[0]}): {reason}. Give a plain LoRA")
        if others := [key for key in keys if any(mark in key for mark in _OTHER_KINDS)]:
            raise InputError(f"{self._flag} is an adapter of another kind than LoRA ({others[0]}): give a plain LoRA")
        if not any("lora" in key for key in keys):
            raise InputError(
                f"{self._flag} is not a LoRA (it has no weights named lora): use --distilled with --base for a whole "
                "UNet, --delta for a difference of weights"
            )

    def _group(self, tensors: dict[str, torch.Tensor], shapes: Mapping[str, Shape]) -> dict[str, dict]:
        """Parameter of the editor -> its matrices "A" (down) and "B" (up). tensors: peft's names."""
        matrices: dict[str, dict[str, torch.Tensor]] = {}
        unknown = []
        for key, value in tensors.items():
            layer, part = f"{_layer_of(key)}.weight", key[-len("A.weight")]
            if layer not in shapes:
                unknown.append(key)
            elif not key.endswith(".alpha"):
                matrices.setdefault(layer, {})[part] = value
        if unknown:
            layers = shorten_list(sorted(unknown))
            raise InputError(f"{self._flag} does not match the editor: its UNet has no layers {layers}")
        if incomplete := sorted(layer for layer, parts in matrices.items() if parts.keys() != {"A", "B"}):
            raise InputError(f"{self._flag} is incomplete: missing one of two matrices of {shorten_list(incomplete)}")
        return matrices

    def _find_shape(self, name: str, expected: Shape) -> Shape:
        """The shape of the delta; that of conv_in may have 4 inputs only."""
        down, up = (tuple(self._matrices[name][part].shape) for part in "AB")
        if name == CONV_IN and len(down) == 4 and down[1] == LATENT_CHANNELS:
            expected = (expected[0], LATENT_CHANNELS, *expected[2:])
        fits = len(down) >= 2 and up[0] == expected[0] and prod(up) == up[0] * down[0]
        if not fits or prod(down[1:]) != prod(expected[1:]) or down[1] != expected[1]:
            shapes = f"{name} has shape {expected}, the matrices {down} and {up}"
            raise InputError(f"{self._flag} does not match the editor: {shapes}")
        return expected

    def _find_scale(self, name: str) -> float:
        layer, rank = name.removesuffix(".weight"), len(self._matrices[name]["A"])
        if layer in self._alphas:
            return self._alphas[layer] / rank
        alpha = _find_pattern(self._config.get("alpha_pattern"), layer, self._config.get("lora_alpha", rank))
        return alpha / (sqrt(rank) if self._config.get("use_rslora") else rank)


def _kohya_names(layers: list[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """kohya's layer names that diffusers converts only for one family -> the names that it always converts."""
    names = {}
    for layer, original in original_names(layers, layers_per_block).items():
        converted, other = (f"lora_unet_{name.replace('.', '_')}" for name in (layer, original))
        if layer.startswith("add_embedding"):
            converted, other = other, converted
        names[other] = converted
    return names


def _layer_of(key: str) -> str:
    """The layer of one of peft's names or of an alpha: "unet.conv_in.lora_A.weight" -> "conv_in"."""
    key = key.removeprefix("unet.").removeprefix("base_model.model.").removesuffix(".alpha")
    return re.sub(r"\.lora_[AB](\.default)?\.weight$", "", key)


def _read_config(metadata: dict[str, str]) -> dict[str, Any]:
    """peft's LoraConfig of the UNet, from the file's metadata."""
    stored = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {key.removeprefix("unet."): value for key, value in stored.items() if not key.startswith("text_encoder")}


def _find_pattern(patterns: dict[str, float] | None, layer: str, default: float) -> float:
    """peft's rule: the value of the first pattern that matches the end of the layer's name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
