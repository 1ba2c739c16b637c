"""A LoRA in a file, as the change of weights that it makes: diffusers', peft's and kohya's keys.

What each layer adds is scale * B A, with scale = alpha / rank (`--weight` comes on top). For a convolution A has the
kernel and B is 1x1, and the product is the same: (outputs, rank) @ (rank, inputs * height * width).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from utils.errors import InputError
from utils.merging.unet_names import flat_names, modules_of
from utils.merging.unet_weights import CONV_IN, NOISE_CHANNELS, Shape
from utils.merging.weight_sources import Located
from utils.weight_files import ALL, TensorFiles

_PARTS = (
    (re.compile(r"(.+)\.(?:lora_down|lora\.down|lora_A(?:\.default)?)\.weight"), "down"),
    (re.compile(r"(.+)\.(?:lora_up|lora\.up|lora_B(?:\.default)?)\.weight"), "up"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)
_OLD_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_TEXT = re.compile(r"(lora_te\d?_|text_encoder(_2)?\.)")
_DORA = ("dora_scale", "lora_magnitude_vector")
_OTHER_KINDS = ("hada_w", "lokr_", "lora_mid", "oft_", "diff_b", ".diff", "glora", "ia3")


@dataclass
class _Layer:
    """The stored names of a layer's tensors."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


class LoraDelta:
    """The change that a LoRA makes at its own scale (`Delta`); skipped are its layers in the text encoders."""

    def __init__(self, located: Located, shapes: Mapping[str, Shape], layers_per_block: int | list[int]) -> None:
        """shapes: of the editor's parameters. Raises `InputError` that names unknown layers and wrong shapes."""
        self._what = located.source.what
        self._files = TensorFiles(located.files, self._what)
        self._refuse_other_kinds()
        self.skipped: dict[str, str] = {}
        layers = self._group(flat_names(shapes, layers_per_block), set(modules_of(shapes)))
        self._layers = {f"{module}.weight": layer for module, layer in layers.items()}
        self.shapes = {name: self._shape(name, shapes) for name in self._layers}
        self._settings = _read_settings(self._files.metadata)
        self._scales = {name: self._scale(name) for name in self._layers}
        self._products: tuple[str, torch.Tensor, torch.Tensor] | None = None

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Some rows of the change of a weight, float32: scale * B A."""
        if self._products is None or self._products[0] != name:
            layer = self._layers[name]
            down = self._files.read(layer.down).float().flatten(1) * self._scales[name]
            self._products = (name, down, self._files.read(layer.up).float().flatten(1))
        _, down, up = self._products
        change = up[rows] @ down
        return change.view(len(change), *self.shapes[name][1:])

    def _refuse_other_kinds(self) -> None:
        keys = list(self._files.shapes)
        if dora := [key for key in keys if any(mark in key for mark in _DORA)]:
            raise InputError(
                f"{self._what} is a DoRA ({dora[0]}): its change depends on the weights that it was trained on and "
                "cannot be added to others. Give a plain LoRA"
            )
        if others := [key for key in keys if any(mark in key for mark in _OTHER_KINDS)]:
            raise InputError(f"{self._what} is an adapter of another kind than LoRA ({others[0]}): give a plain LoRA")
        if not any(pattern.fullmatch(key) for key in keys for pattern in (*[p for p, _ in _PARTS], _OLD_PROCESSOR)):
            raise InputError(
                f"{self._what} is no LoRA: it has no lora_A, lora_down or lora.down. A whole UNet is "
                "given by --distilled with --base, a difference of weights by --delta"
            )

    def _group(self, flat: dict[str, str], modules: set[str]) -> dict[str, _Layer]:
        """The tensors by the layer that they change."""
        layers, unknown = {}, []
        for key in self._files.shapes:
            if _TEXT.match(key):
                self.skipped[key] = "of a text encoder, which is not changed"
                continue
            named, part = _split(key)
            module = _find_module(named, flat, modules) if named else None
            if module is None:
                unknown.append(key)
            else:
                setattr(layers.setdefault(module, _Layer()), part, key)
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise InputError(
                f"{self._what} does not fit the editor: {', '.join(unknown[:5])}{more} belong to no layer of its UNet"
            )
        if half := [module for module, layer in layers.items() if layer.down is None or layer.up is None]:
            raise InputError(f"{self._what} is not whole: of {', '.join(half[:5])} one of the two matrices is missing")
        return layers

    def _shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        """The shape of the change; conv_in's has 4 inputs where the adapter's has."""
        layer, expected = self._layers[name], shapes[name]
        down, up = self._files.shapes[layer.down], self._files.shapes[layer.up]
        if name == CONV_IN and len(down) == 4 and down[1] == NOISE_CHANNELS:
            expected = (expected[0], NOISE_CHANNELS, *expected[2:])
        fits = len(down) >= 2 and up[0] == expected[0] and prod(up) == up[0] * down[0]
        if not fits or prod(down[1:]) != prod(expected[1:]) or down[1] != expected[1]:
            raise InputError(
                f"{self._what} does not fit the editor: {layer.down} {down} and {layer.up} {up} make no change of "
                f"{name} {expected}"
            )
        return expected

    def _scale(self, name: str) -> float:
        layer, module = self._layers[name], name.removesuffix(".weight")
        rank = self._files.shapes[layer.down][0]
        if layer.alpha:
            return float(self._files.read(layer.alpha)) / rank
        alpha = _find_pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", rank))
        return alpha / (sqrt(rank) if self._settings.get("use_rslora") else rank)


def _split(key: str) -> tuple[str | None, str]:
    """(layer as the key names it, "down" / "up" / "alpha")."""
    if match := _OLD_PROCESSOR.fullmatch(key):
        return f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}", match[3]
    for pattern, part in _PARTS:
        if match := pattern.fullmatch(key):
            return match[1], part
    return None, ""


def _find_module(named: str, flat: dict[str, str], modules: set[str]) -> str | None:
    for prefix in ("unet.", "base_model.model.", "lora_unet_", ""):
        name = named.removeprefix(prefix)
        if name in modules:
            return name
        if name in flat:
            return flat[name]
    return None


def _read_settings(metadata: dict[str, str]) -> dict[str, Any]:
    """What peft's configuration in the file's head says of the UNet's adapter."""
    stored = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {key.removeprefix("unet."): value for key, value in stored.items() if not key.startswith("text_encoder")}


def _find_pattern(patterns: dict[str, float] | None, module: str, otherwise: float) -> float:
    """peft's rule: the first pattern that matches the end of the layer's name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
