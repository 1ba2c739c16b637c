"""Quantise the frozen base of an adapter to 4 or 8 bits with bitsandbytes' layers.

Not with diffusers' loader: it needs a GPU, and the layers work on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from diffusers import UNet2DConditionModel
from torch import nn

QUANTIZATIONS = ("nf4", "int8")


def quantize_linears(
    unet: UNet2DConditionModel, kind: str, device: torch.device | str, compute_dtype: torch.dtype
) -> None:
    """Freeze the UNet, quantise its Linear layers to `kind` on `device`, and move the rest there.

    Call it before `add_adapter`. Layer by layer, so that peak memory is the model and one layer.
    Convolutions (bitsandbytes has none), including conv_in, and norms are not quantised.
    compute_dtype: dtype of the computation of nf4 layers and of all biases; int8 layers compute in their input's.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"--quantize_base {kind}: must be one of {', '.join(QUANTIZATIONS)}")
    quantize = _to_nf4 if kind == "nf4" else _to_int8
    unet.requires_grad_(False)
    for name in [name for name, module in unet.named_modules() if type(module) is nn.Linear]:
        unet.set_submodule(name, quantize(unet.get_submodule(name), device, compute_dtype))
    # peft reads these two. diffusers' own attributes (is_quantized, hf_device_map, ...) are not set: diffusers and
    # accelerate would then expect a quantization configuration and a device map.
    unet.is_loaded_in_4bit, unet.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    unet.to(device)


def _to_nf4(linear: nn.Linear, device: torch.device | str, compute_dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        1, 1, linear.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", device="meta"
    )
    # In evaluation mode, CPUs with AVX512-BF16 repack the weight for a kernel without a gradient, which would break
    # training after the first validation.
    layer.support_avx512bf16_for_cpu = False
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    return _finish(layer, linear, device, compute_dtype)


def _to_int8(linear: nn.Linear, device: torch.device | str, compute_dtype: torch.dtype) -> bnb.nn.Linear8bitLt:
    layer = _Int8Linear(1, 1, linear.bias is not None, has_fp16_weights=False, device="meta")
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return _finish(layer, linear, device, compute_dtype)


def _finish(layer: nn.Linear, linear: nn.Linear, device: torch.device | str, bias_dtype: torch.dtype) -> nn.Linear:
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    if linear.bias is not None:
        # The layers cast their bias permanently, to the dtype of their first input. Cast now, it is always the same.
        layer.bias = nn.Parameter(linear.bias.data.to(bias_dtype), requires_grad=False)
    return layer.train(linear.training).to(device)  # `to` quantises the weight on that device


class _Int8Linear(bnb.nn.Linear8bitLt):
    """A Linear8bitLt that keeps its weight and scales (SCB) when the model moves and when peft's DoRA reads it.

    To read the weight on a CPU, peft replaces it by a copy without scales and puts it back.
    """

    def init_8bit_state(self) -> None:
        """Move the scales from the weight to the state. Unlike bitsandbytes: a weight without scales keeps the old."""
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
        self.state.CB = self.weight.data
        self.weight.CB = self.weight.SCB = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register the weight directly: `load_lora_weights` has a context that moves new parameters to "meta"."""
        if name == "weight" and param is not None and param.dtype == torch.int8:
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Int8Linear:
        """Move the scales too. Unlike bitsandbytes: there they move with `layer.to`, but not with `model.to`."""
        super()._apply(fn, recurse)
        if self.weight.dtype == torch.int8:
            self.init_8bit_state()
            self.state.SCB = self.state.SCB.to(self.weight.device)
        return self
