"""The delta of a LoRA file, in any format that utils/models/adapter_files.py reads.

Each layer adds scale * B A, with scale = alpha / rank; `--weight` multiplies it. For a convolution, A has the kernel
and B is 1x1, and the product is the same: (outputs, rank) @ (rank, inputs * height * width).
"""

from collections.abc import Mapping

import torch

from utils.errors import InputError
from utils.merging.deltas import CONV_IN, Shape
from utils.merging.weight_sources import SourceFiles
from utils.models.adapter_files import AdapterLayer, read_adapter_content, read_peft_config, refuse_other_kinds
from utils.models.latents import LATENT_CHANNELS
from utils.models.unet_names import shorten_list
from utils.weight_files import ALL, TensorFiles


class LoraDelta:
    """The delta of a LoRA at its own scale (`deltas.Delta`). Its text encoder weights are skipped."""

    def __init__(self, source: SourceFiles, shapes: Mapping[str, Shape], layers_per_block: int | list[int]) -> None:
        """shapes: of the editor's parameters. Raises `InputError` for unknown layers, other shapes and other kinds."""
        flag = source.source.flag_and_name
        files = TensorFiles(source.files, flag)
        refuse_other_kinds(files.shapes, flag)
        if not any("lora" in key for key in files.shapes):
            raise InputError(
                f"{flag} is not a LoRA (it has no weights named lora): use --distilled with --base for a whole UNet, "
                "--delta for a difference of weights"
            )
        if dora := [key for key in files.shapes if "dora_scale" in key or "lora_magnitude_vector" in key]:
            reason = "its delta depends on the weights it was trained on"
            raise InputError(f"{flag} is a DoRA ({dora[0]}): {reason}. Give a plain LoRA")
        config = read_peft_config(source.files[0].parent)
        content = read_adapter_content(files, flag, {"unet": shapes}, layers_per_block, config, "the editor")
        self.skipped = dict.fromkeys(content.skipped, "text encoders are not changed")
        self._layers = content.layers.get("unet", {})
        if content.replaced.get("unet"):
            names = shorten_list(sorted(content.replaced["unet"]))
            raise InputError(f"{flag} replaces whole weights ({names}), which have no delta: give a plain LoRA")
        self.shapes = {name: _find_shape(layer, name, shapes[name]) for name, layer in self._layers.items()}
        self._cached: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Rows of a parameter's delta, float32: scale * B A."""
        layer = self._layers[name]
        if layer.mid is not None:
            if self._cached is None or self._cached[0] != name:
                self._cached = (name, layer.delta())
            return self._cached[1][rows]
        if self._cached is None or self._cached[0] != name:
            self._cached = (name, layer.down.float().flatten(1) * layer.scale)
        delta = layer.up.float().flatten(1)[rows] @ self._cached[1]
        return delta.view(len(delta), *self.shapes[name][1:])


def _find_shape(layer: AdapterLayer, name: str, expected: Shape) -> Shape:
    """The shape of the delta; that of conv_in may have 4 inputs only."""
    if name == CONV_IN and layer.num_inputs == LATENT_CHANNELS:
        return (expected[0], LATENT_CHANNELS, *expected[2:])
    return tuple(expected)
