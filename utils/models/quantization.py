"""A frozen base in 4 or 8 bits under an adapter: bitsandbytes' layers, put in without diffusers' loader.

That loader refuses a machine without a GPU, while the layers compute on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from diffusers import UNet2DConditionModel
from torch import nn

KINDS = ("nf4", "int8")


def quantize_linears(
    unet: UNet2DConditionModel, kind: str, device: torch.device | str, compute_dtype: torch.dtype
) -> None:
    """Freeze the UNet, hold the weights of its Linear layers in `kind` on `device`, and move the rest there.

    Call it before `add_adapter`. The layers go one after the other, so that memory peaks at the model and one layer.
    Convolutions (bitsandbytes has none), conv_in among them, and norms stay as they are.
    compute_dtype: what the layers compute in; of int8 ones it is their input's, and only the biases get this one.
    """
    if kind not in KINDS:
        raise ValueError(f"--quantize_base is {kind!r}, and it must be one of {', '.join(KINDS)}")
    quantize = _to_nf4 if kind == "nf4" else _to_int8
    unet.requires_grad_(False)
    for name in [name for name, module in unet.named_modules() if type(module) is nn.Linear]:
        unet.set_submodule(name, quantize(unet.get_submodule(name), device, compute_dtype))
    # peft looks for these two. diffusers' own marks (is_quantized, hf_device_map, ...) are for what its loader loaded;
    # with them diffusers and accelerate would ask after a configuration and devices that there are none of.
    unet.is_loaded_in_4bit, unet.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    unet.to(device)


def _to_nf4(linear: nn.Linear, device: torch.device | str, compute_dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        1, 1, linear.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", device="meta"
    )
    # In evaluation on a processor with AVX512-BF16 the layer would repack its weight for a kernel without a gradient:
    # after the first validation, training would go on with a backward pass that is cut there.
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
        # The layers cast their bias for good, to whatever they meet first. Cast now, it is the same in every run.
        layer.bias = nn.Parameter(linear.bias.data.to(bias_dtype), requires_grad=False)
    return layer.train(linear.training).to(device)  # which quantises the weight, on that device


class _Int8Linear(bnb.nn.Linear8bitLt):
    """A Linear8bitLt that keeps its weight and scales (SCB) when the model is moved, and when peft's DoRA reads it.

    To read the weight on a CPU, peft wraps it anew, without the scales, and puts it back.
    """

    def init_8bit_state(self) -> None:
        """Take the scales over from the weight, unless they have been taken already.

        Unlike bitsandbytes: there a weight without scales replaces them by None.
        """
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
        self.state.CB = self.weight.data
        self.weight.CB = self.weight.SCB = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Put the weight back by hand: `load_lora_weights` has a context that sends every new parameter to "meta"."""
        if name == "weight" and param is not None and param.dtype == torch.int8:
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Int8Linear:
        """Unlike bitsandbytes: there the scales move with `layer.to`, and not with `model.to`, which calls this."""
        super()._apply(fn, recurse)
        if self.weight.dtype == torch.int8:
            self.init_8bit_state()
            self.state.SCB = self.state.SCB.to(self.weight.device)
        return self
