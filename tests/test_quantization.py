"""Quantised frozen base: which layers are quantised, and that adapters train on it, on a CPU and distributed."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from tests.test_adapters import OPTIONS, evaluate, load_unet, perturb, predict, train, trained_parameters
from utils.models.adapters import add_adapter
from utils.models.quantization import quantize_linears

KINDS = ["nf4", "int8"]
both_kinds = pytest.mark.parametrize("kind", KINDS)
both_adapters = pytest.mark.parametrize("use_dora", [False, True])


@both_kinds
@pytest.mark.parametrize("family", ["tiny_base", "tiny_sdxl"])
def test_only_linear_layers_are_quantised(kind, family, request):
    base = load_unet(request.getfixturevalue(family))
    unet = load_unet(request.getfixturevalue(family), quantize=kind)
    assert (unet.is_loaded_in_4bit, unet.is_loaded_in_8bit) == (kind == "nf4", kind == "int8")
    assert not hasattr(base, "is_loaded_in_4bit") and not hasattr(base, "is_loaded_in_8bit")
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            weight = unet.get_submodule(name).weight
            assert weight.dtype == {"nf4": torch.uint8, "int8": torch.int8}[kind]
            assert weight.numel() == module.weight.numel() // (2 if kind == "nf4" else 1)
        else:
            for part, value in module.named_parameters(recurse=False):
                assert torch.equal(unet.get_submodule(name).get_parameter(part), value), name
    assert not trained_parameters(unet)


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 0.15), ("int8", 0.01)])
def test_quantised_unet_is_close_to_the_base(kind, tolerance, tiny_sdxl):
    expected = evaluate(load_unet(tiny_sdxl))
    unet = load_unet(tiny_sdxl, quantize=kind)
    for is_training in (True, False):
        unet.train(is_training)
        assert (evaluate(unet) - expected).norm() < tolerance * expected.norm()


@both_kinds
def test_quantisation_is_deterministic(kind, tiny_sdxl):
    assert torch.equal(evaluate(load_unet(tiny_sdxl, kind)), evaluate(load_unet(tiny_sdxl, kind)))


@both_kinds
def test_float_weights_are_freed(kind, tiny_base):
    unet = load_unet(tiny_base)
    weights = [weakref.ref(module) for module in unet.modules() if isinstance(module, nn.Linear)]
    quantize_linears(unet, kind, "cpu", torch.float32)
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


@both_kinds
@both_adapters
def test_quantised_unet_can_be_moved_cast_and_copied(kind, use_dora, tiny_base):
    unet = load_unet(tiny_base, kind)
    before = evaluate(unet)
    assert torch.equal(evaluate(unet.to("cpu")), before)
    assert torch.equal(evaluate(copy.deepcopy(unet)), before)
    assert torch.equal(evaluate(unet.to(torch.float32)), before)
    add_adapter(unet, replace(OPTIONS, use_dora=use_dora), train_conv_in=True)
    assert torch.equal(evaluate(unet), before)
    assert torch.equal(evaluate(unet.to("cpu")), before)


@both_kinds
@both_adapters
def test_evaluation_does_not_change_later_gradients(kind, use_dora, tiny_sdxl):
    """On CPUs with AVX512-BF16, bitsandbytes' 4-bit layers would repack their weights for inference only."""
    unet = load_unet(tiny_sdxl, kind)
    add_adapter(unet, replace(OPTIONS, lora_dropout=0.0, use_dora=use_dora, lora_target="all"), train_conv_in=True)
    perturb(unet)
    gradients = []
    for _ in range(2):
        unet.train()
        unet.zero_grad()
        predict(unet).square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in trained_parameters(unet).items()})
        unet.eval()
        evaluate(unet)
    assert all(torch.equal(gradients[1][name], value) and value.any() for name, value in gradients[0].items())


@both_kinds
@both_adapters
def test_accelerate_accepts_a_quantised_base(kind, use_dora, tiny_base):
    unet = load_unet(tiny_base, kind)
    add_adapter(unet, replace(OPTIONS, use_dora=use_dora), train_conv_in=True)
    optimizer = torch.optim.AdamW(trained_parameters(unet).values(), lr=1e-2)
    unet, optimizer = Accelerator(cpu=True).prepare(unet, optimizer)
    losses = train(unet, 10, optimizer)
    assert losses[-1] < losses[0]


@both_kinds
@both_adapters
def test_quantised_base_in_distributed_training(kind, use_dora, tiny_base):
    """One process with DistributedDataParallel, which also wraps, broadcasts and reduces."""
    unet = load_unet(tiny_base, kind)
    add_adapter(unet, replace(OPTIONS, lora_dropout=0.0, use_dora=use_dora, lora_target="all"), train_conv_in=True)
    before = evaluate(unet)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(unet, gradient_as_bucket_view=True)
        assert torch.equal(predict(wrapped, unet.config), before)
        predict(wrapped, unet.config).square().mean().backward()
        assert all(value.grad is not None for value in trained_parameters(unet).values())
    finally:
        dist.destroy_process_group()


def test_unknown_kind_is_refused(tiny_base):
    with pytest.raises(ValueError, match="--quantize_base fp4: must be one of nf4, int8"):
        load_unet(tiny_base, "fp4")
