"""Adapters: stock diffusers loads what was trained, and only the adapter is trained."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import nn

from tests.pairs import make_noise
from tests.tiny import make_components, make_sdxl_components
from utils.errors import InputError
from utils.models.adapters import AdapterOptions, add_adapter, cast_frozen, has_adapter, merge_adapter, read_adapter
from utils.models.adapters import save_adapter as save
from utils.models.quantization import quantize_linears
from utils.models.stable_diffusion import widen_conv_in

TOY = Path(__file__).parent.parent / "assets" / "toy-sd"
FOLDERS = {("sd", 4): "tiny_base", ("sd", 8): "tiny_editor", ("sdxl", 4): "tiny_sdxl", ("sdxl", 8): "tiny_sdxl_editor"}
# Alpha differs from the rank, and dropout is on: both must be right after loading.
OPTIONS = AdapterOptions(lora_rank=4, lora_alpha=6.0, lora_dropout=0.1)


@pytest.fixture
def folder_of(request: pytest.FixtureRequest):
    """(family, channels) -> the folder of that tiny pipeline."""
    return lambda family, channels: request.getfixturevalue(FOLDERS[family, channels])


def load_unet(folder: Path, quantize: str | None = None) -> UNet2DConditionModel:
    """The UNet of a pipeline's folder, widened to 8 channels and optionally quantised."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    if unet.config.in_channels == 4:
        widen_conv_in(unet)
    if quantize:
        quantize_linears(unet, quantize, "cpu", torch.float32)
    return unet


def predict(unet: nn.Module, config=None) -> torch.Tensor:
    """The UNet's output (2, 4, 16, 16) for a fixed batch."""
    config = config or unet.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 16, 16, generator=generator)
    states = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    conditions = {}
    if config.addition_embed_type == "text_time":
        embeds = torch.randn(2, 48, generator=generator)
        conditions["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": torch.full((2, 6), 32.0)}
    return unet(latents, torch.tensor([3, 700]), states, **conditions).sample


@torch.no_grad()
def evaluate(unet: UNet2DConditionModel) -> torch.Tensor:
    """`predict` without gradients, in the current mode of the UNet."""
    return predict(unet)


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}


def train(unet: UNet2DConditionModel, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Fit one batch; returns the losses, and sets the UNet to evaluation mode."""
    optimizer = optimizer or torch.optim.AdamW(trained_parameters(unet).values(), lr=1e-2)
    target = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    losses = []
    unet.train()
    for _ in range(steps):
        loss = (predict(unet) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    unet.eval()
    return losses


def make_trained(
    folder: Path, options: AdapterOptions, train_conv_in: bool, quantize: str | None = None
) -> UNet2DConditionModel:
    unet = load_unet(folder, quantize)
    torch.manual_seed(0)
    add_adapter(unet, options, train_conv_in=train_conv_in)
    train(unet)
    return unet


@torch.no_grad()
def perturb(unet: UNet2DConditionModel) -> None:
    """Change every trained weight."""
    generator = torch.Generator().manual_seed(3)
    for value in trained_parameters(unet).values():
        value.add_(0.05 * torch.randn(value.shape, generator=generator))


def make_pipeline(folder: Path, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """Stock diffusers' editing pipeline of a folder, with this UNet."""
    is_sdxl = unet.config.addition_embed_type == "text_time"
    pipeline_class = StableDiffusionXLInstructPix2PixPipeline if is_sdxl else StableDiffusionInstructPix2PixPipeline
    pipeline = pipeline_class.from_pretrained(folder, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("family", "channels", "use_dora", "target", "quantize"),
    product(["sd", "sdxl"], [4, 8], [False, True], ["attention", "all"], [None, "nf4", "int8"]),
)
def test_stock_diffusers_loads_what_was_trained(family, channels, use_dora, target, quantize, folder_of, tmp_path):
    folder = folder_of(family, channels)
    options = replace(OPTIONS, use_dora=use_dora, lora_target=target)
    trained = make_trained(folder, options, train_conv_in=channels == 4, quantize=quantize)
    save(tmp_path, trained)

    base = load_unet(folder, quantize)
    assert (evaluate(base) - evaluate(trained)).abs().max() > 0.05
    pipeline = make_pipeline(folder, base)
    pipeline.load_lora_weights(tmp_path)
    assert (evaluate(pipeline.unet) - evaluate(trained)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_stock_pipeline_edits_like_the_trained_unet(family, folder_of, tmp_path):
    def edit(pipeline: DiffusionPipeline) -> np.ndarray:
        image = make_noise((32, 32))
        generator = torch.Generator().manual_seed(0)
        settings = dict(num_inference_steps=2, generator=generator, output_type="np")
        return pipeline("as a drawing", image=image, **settings).images[0]

    folder = folder_of(family, 4)
    trained = make_trained(folder, replace(OPTIONS, use_dora=True, lora_target="all"), train_conv_in=True)
    save(tmp_path, trained)
    pipeline = make_pipeline(folder, load_unet(folder))
    before = edit(pipeline)
    pipeline.load_lora_weights(tmp_path)
    after, expected = edit(pipeline), edit(make_pipeline(folder, trained))
    assert np.abs(after - before).max() > 1e-2
    assert np.abs(after - expected).max() < 1e-4


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("target", ["attention", "all"])
def test_new_adapter_changes_nothing_and_the_base_is_not_trained(use_dora, target, tiny_base):
    unet = load_unet(tiny_base)
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    before = evaluate(unet)
    add_adapter(unet, replace(OPTIONS, use_dora=use_dora, lora_target=target), train_conv_in=True)
    assert torch.equal(evaluate(unet), before)
    train(unet)
    after = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert {value.dtype for value in trained_parameters(unet).values()} == {torch.float32}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("model", ["sd", "sdxl", "toy"])
def test_target_all_trains_every_linear_and_convolution(model, use_dora, folder_of):
    folder = TOY if model == "toy" else folder_of(model, 4)
    unet, base = load_unet(folder), load_unet(folder)
    add_adapter(unet, replace(OPTIONS, use_dora=use_dora, lora_target="all"), train_conv_in=False)
    perturb(unet)
    merge_adapter(unet)
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert not torch.equal(unet.get_submodule(name).weight, module.weight), name


@pytest.mark.parametrize(("train_conv_in", "target"), [(True, "attention"), (False, "attention"), (False, "all")])
def test_conv_in_is_trained_in_full_or_not_at_all(train_conv_in, target, tiny_base):
    unet, base = load_unet(tiny_base), load_unet(tiny_base)
    add_adapter(unet, replace(OPTIONS, lora_target=target), train_conv_in=train_conv_in)
    perturb(unet)
    merge_adapter(unet)
    change = (unet.conv_in.weight - base.conv_in.weight).flatten(1)  # (16, 72)
    assert torch.linalg.matrix_rank(change) == (16 if train_conv_in or target == "all" else 0)
    assert torch.equal(unet.conv_in.bias, base.conv_in.bias)


def test_dropout_of_attention_but_not_of_latents(tiny_base):
    unet = load_unet(tiny_base)
    add_adapter(unet, replace(OPTIONS, lora_dropout=0.5), train_conv_in=True)
    perturb(unet)
    unet.train()
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(unet.conv_in(latents), unet.conv_in(latents))
    assert not torch.equal(evaluate(unet), evaluate(unet))
    unet.eval()
    assert torch.equal(evaluate(unet), evaluate(unet))


def test_new_adapter_has_the_mode_of_the_unet(tiny_base):
    unet = load_unet(tiny_base)
    add_adapter(unet, replace(OPTIONS, lora_dropout=0.5), train_conv_in=True)
    perturb(unet)
    assert torch.equal(evaluate(unet), evaluate(unet))


def test_seed_decides_the_adapter_and_the_generator_is_restored(tiny_base):
    adapters = []
    for seed in (0, 0, 1):
        unet = load_unet(tiny_base)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        add_adapter(unet, OPTIONS, train_conv_in=True)
        assert torch.equal(torch.get_rng_state(), state)
        adapters.append(torch.cat([value.detach().flatten() for value in trained_parameters(unet).values()]))
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


@pytest.mark.parametrize("use_dora", [False, True])
def test_ema_weights_are_saved_instead_of_the_current_ones(use_dora, tiny_base, tmp_path):
    options = replace(OPTIONS, use_dora=use_dora)
    unet = make_trained(tiny_base, options, train_conv_in=True)
    own = {name: value.detach().clone() for name, value in trained_parameters(unet).items()}
    averaged = {name: value * 0.5 for name, value in own.items()}
    read = read_adapter(save(tmp_path / "ema", unet, averaged), unet)
    assert all(torch.equal(read[name], value) for name, value in averaged.items())
    read = read_adapter(save(tmp_path / "own", unet), unet)
    assert all(torch.equal(read[name], value) for name, value in own.items())

    pipeline = make_pipeline(tiny_base, load_unet(tiny_base))
    pipeline.load_lora_weights(tmp_path / "ema")
    with torch.no_grad():
        for name, value in trained_parameters(unet).items():
            value.copy_(averaged[name])
    assert (evaluate(pipeline.unet) - evaluate(unet)).abs().max() < 1e-4


def test_unknown_weights_are_not_saved(tiny_base, tmp_path):
    unet = load_unet(tiny_base)
    add_adapter(unet, OPTIONS, train_conv_in=True)
    with pytest.raises(ValueError, match="conv_out"):
        save(tmp_path, unet, {"conv_out.weight": torch.zeros(1)})


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_resumed_training_is_bit_identical(use_dora, quantize, tiny_base, tmp_path):
    def make(seed: int) -> tuple[UNet2DConditionModel, torch.optim.Optimizer]:
        unet = load_unet(tiny_base, quantize)
        torch.manual_seed(seed)
        add_adapter(unet, replace(OPTIONS, lora_dropout=0.0, use_dora=use_dora), train_conv_in=True)
        return unet, torch.optim.AdamW(trained_parameters(unet).values(), lr=1e-2)

    straight, optimizer = make(seed=0)
    losses = train(straight, 2, optimizer) + train(straight, 2, optimizer)

    stopped, optimizer = make(seed=0)
    resumed_losses = train(stopped, 2, optimizer)
    save(tmp_path, stopped)
    state = optimizer.state_dict()
    resumed, optimizer = make(seed=1)
    parameters = dict(resumed.named_parameters())
    with torch.no_grad():
        for name, value in read_adapter(tmp_path, resumed).items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(state)
    resumed_losses += train(resumed, 2, optimizer)

    assert resumed_losses == losses
    assert torch.equal(evaluate(resumed), evaluate(straight))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("target", ["attention", "all"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_merged_adapter_is_an_ordinary_unet(family, target, use_dora, folder_of, tmp_path):
    folder = folder_of(family, 4)
    options = replace(OPTIONS, use_dora=use_dora, lora_target=target)
    unet = make_trained(folder, options, train_conv_in=True)
    trained = evaluate(unet)
    merge_adapter(unet)
    assert not has_adapter(unet)
    assert unet.state_dict().keys() == load_unet(folder).state_dict().keys()
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert (evaluate(loaded) - trained).abs().max() < 1e-4


def test_merging_into_16_bits_gives_float32(tiny_base):
    unet = make_trained(tiny_base, OPTIONS, train_conv_in=True)
    cast_frozen(unet, torch.bfloat16)
    merge_adapter(unet)
    assert {value.dtype for value in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_base_is_not_merged_and_a_float_base_is(quantize, tiny_base, tmp_path):
    unet = make_trained(tiny_base, OPTIONS, train_conv_in=True, quantize=quantize)
    with pytest.raises(ValueError, match="quantised"):
        merge_adapter(unet)
    save(tmp_path, unet)
    fresh = load_unet(tiny_base)
    add_adapter(fresh, OPTIONS, train_conv_in=True)
    parameters = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, value in read_adapter(tmp_path, fresh).items():
            parameters[name].copy_(value)
    merge_adapter(fresh)
    moved = evaluate(fresh) - evaluate(load_unet(tiny_base))
    assert (evaluate(fresh) - evaluate(unet)).norm() < 0.5 * moved.norm()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(lora_rank=2), "shape"),
        (dict(lora_target="all"), "misses"),
        (dict(use_dora=True), "misses"),
        (dict(lora_alpha=4.0), "alpha is 6.0"),
    ],
)
def test_adapter_of_another_run_is_refused(other, message, tiny_base, tmp_path):
    unet = load_unet(tiny_base)
    add_adapter(unet, OPTIONS, train_conv_in=True)
    save(tmp_path, unet)
    different = load_unet(tiny_base)
    add_adapter(different, replace(OPTIONS, **other), train_conv_in=True)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path, different)


def test_adapter_of_another_model_is_refused(tiny_base, tiny_sdxl, tmp_path):
    unet, other = load_unet(tiny_base), load_unet(tiny_sdxl)
    for model in (unet, other):
        add_adapter(model, OPTIONS, train_conv_in=True)
    save(tmp_path, unet)
    with pytest.raises(InputError, match="does not match this run"):
        read_adapter(tmp_path, other)


@pytest.mark.parametrize("damage", ["missing", "cut", "not a file of tensors"])
def test_damaged_adapter_is_refused(damage, tiny_base, tmp_path):
    unet = load_unet(tiny_base)
    add_adapter(unet, OPTIONS, train_conv_in=True)
    file = save(tmp_path, unet)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_text("weights")
    with pytest.raises(InputError, match="the adapter: .* cannot be read"):
        read_adapter(tmp_path, unet)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_one_batch_can_be_overfitted(use_dora, quantize, tiny_base):
    unet = load_unet(tiny_base, quantize)
    torch.manual_seed(0)
    options = AdapterOptions(lora_rank=8, use_dora=use_dora, lora_target="all")
    add_adapter(unet, options, train_conv_in=True)
    losses = train(unet, steps=20)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [make_components, make_sdxl_components])
def test_16_bit_base_trains_under_autocast(make, use_dora, quantize, tmp_path):
    unet = make(tmp_path, in_channels=8)["unet"]
    if quantize:
        quantize_linears(unet, quantize, "cpu", torch.bfloat16)
    add_adapter(unet, AdapterOptions(lora_rank=4, use_dora=use_dora, lora_target="all"), train_conv_in=False)
    perturb(unet)
    expected = evaluate(unet)
    cast_frozen(unet, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = predict(unet)
    assert (output - expected).norm() < 0.05 * expected.norm()
    output.float().square().mean().backward()
    for name, value in trained_parameters(unet).items():
        assert value.dtype == torch.float32
        assert value.grad.isfinite().all(), name
    weights = {name: value for name, value in unet.named_parameters() if name.endswith("weight")}
    in_full = {name for name, value in weights.items() if value.dtype == torch.float32}
    assert in_full == {name for name in weights if any(part in name for part in ("conv_in.", "norm", "lora_"))}


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_dora, quantize, tiny_sdxl):
    unet = load_unet(tiny_sdxl, quantize)
    add_adapter(unet, replace(OPTIONS, lora_dropout=0.0, use_dora=use_dora), train_conv_in=False)
    perturb(unet)
    unet.train()
    gradients = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        unet.zero_grad()
        predict(unet).square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in trained_parameters(unet).items()})
    assert all(torch.equal(gradients[1][name], value) and value.any() for name, value in gradients[0].items())
