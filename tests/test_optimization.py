"""Optimizers: training, bit-identical resuming, the fused backward pass, bf16 weights, refused combinations."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.tiny import make_components
from utils.training.flags import OPTIMIZERS
from utils.training.memory_saving import FusedBackward
from utils.training.metrics import DataWait
from utils.training.optimizer_checks import find_optimizer_problems
from utils.training.optimizers import (
    OptimizationOptions,
    averaged_weights,
    count_state_bytes,
    make_lr_schedule,
    make_optimizer,
)

KINDS = {
    "adamw": OptimizationOptions(learning_rate=3e-3),
    "adamw8bit": OptimizationOptions(learning_rate=3e-3, optimizer="adamw8bit"),
    "use_8bit_adam": OptimizationOptions(learning_rate=3e-3, use_8bit_adam=True),
    "adafactor": OptimizationOptions(learning_rate=3e-3, optimizer="adafactor"),
    "scaled adafactor": OptimizationOptions(learning_rate=3e-2, optimizer="adafactor", adafactor_scale_parameter=True),
    "prodigy": OptimizationOptions(learning_rate=1.0, optimizer="prodigy", prodigy_d_coef=2.0),
    "schedulefree": OptimizationOptions(learning_rate=3e-3, optimizer="schedulefree_adamw"),
    "bf16 adamw": OptimizationOptions(learning_rate=3e-3, weights_dtype="bf16"),
    "bf16 adamw8bit": OptimizationOptions(learning_rate=3e-3, optimizer="adamw8bit", weights_dtype="bf16"),
}
FUSED = {f"fused {name}": replace(options, fused_backward=True) for name, options in KINDS.items() if name != "prodigy"}
STEPS = 6


def make_network(options: OptimizationOptions, seed: int = 0) -> nn.Module:
    """Its larger weights have 4096 elements, the minimum for which 8-bit optimizers use 8 bits."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 64, 1), nn.Flatten(), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    )
    return network.to(torch.bfloat16 if options.weights_dtype == "bf16" else torch.float32)


class Training:
    """A network that learns to square numbers, driven as in the training loop."""

    def __init__(self, options: OptimizationOptions, max_train_steps: int = STEPS) -> None:
        self.network = make_network(options)
        self.dtype = next(self.network.parameters()).dtype
        optimizer = make_optimizer(list(self.network.parameters()), options, samples_per_step=1)
        self.schedule = make_lr_schedule(optimizer, options, max_train_steps)
        self.optimizer = Accelerator(cpu=True).prepare(optimizer)

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 1, 1, 1, generator=generator)
        return (self.network(x.to(self.dtype)).float() - x.flatten(1).square()).square().mean()

    def take_steps(self, first: int, last: int) -> Training:
        for step in range(first, last):
            torch.manual_seed(1000 + step)  # stochastic rounding
            self.loss(step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return self

    def save(self, path: Path) -> None:
        parts = (self.network, self.optimizer, self.schedule)
        torch.save([part.state_dict() for part in parts], path)

    def load(self, path: Path) -> Training:
        parts = (self.network, self.optimizer, self.schedule)
        for part, state in zip(parts, torch.load(path, map_location="cpu", weights_only=True), strict=True):
            part.load_state_dict(state)
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([value.detach().flatten() for value in self.network.parameters()])


@pytest.mark.parametrize("options", (KINDS | FUSED).values(), ids=(KINDS | FUSED).keys())
def test_every_optimizer_lowers_the_loss(options: OptimizationOptions, capsys: pytest.CaptureFixture) -> None:
    training = Training(options)
    before = sum(training.loss(step).item() for step in range(900, 920))
    training.take_steps(0, 150)
    with averaged_weights(training.optimizer):
        after = sum(training.loss(step).item() for step in range(900, 920))
    assert after < 0.5 * before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", (KINDS | FUSED).values(), ids=(KINDS | FUSED).keys())
def test_resumed_training_is_bit_identical(options: OptimizationOptions, tmp_path: Path) -> None:
    schedule = "constant_with_warmup" if options.has_averaged_weights else "cosine"
    options = replace(options, lr_scheduler=schedule, lr_warmup_steps=2)
    whole = Training(options).take_steps(0, STEPS)
    Training(options).take_steps(0, 3).save(tmp_path / "state.pt")
    resumed = Training(options).load(tmp_path / "state.pt").take_steps(3, STEPS)
    assert torch.equal(whole.weights(), resumed.weights())
    whole.save(tmp_path / "whole.pt"), resumed.save(tmp_path / "resumed.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt"))


def assert_same(left: object, right: object) -> None:
    """Compare two nested states."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    elif hasattr(left, "dequantize") and type(left) is not torch.Tensor:  # torchao's
        assert torch.equal(left.codes, right.codes) and torch.equal(left.scale, right.scale)
    elif torch.is_tensor(left):
        assert left.dtype == right.dtype and torch.equal(left, right)
    else:
        assert left == right


def test_the_default_is_torch_adamw() -> None:
    training, twin = Training(OptimizationOptions()), Training(OptimizationOptions())
    optimizer = torch.optim.AdamW(twin.network.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    training.take_steps(0, STEPS)
    for step in range(STEPS):
        twin.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(training.weights(), twin.weights())


def test_use_8bit_adam_means_adamw8bit() -> None:
    old, new = (Training(KINDS[name]).take_steps(0, STEPS) for name in ("use_8bit_adam", "adamw8bit"))
    assert torch.equal(old.weights(), new.weights())


def test_the_state_of_8_bit_optimizers_is_small() -> None:
    sizes = {name: count_state_bytes(Training(options).take_steps(0, 1).optimizer) for name, options in KINDS.items()}
    weights = sum(value.numel() for value in make_network(KINDS["adamw"]).parameters())
    assert sizes["adamw"] == pytest.approx(8 * weights, rel=0.01)
    assert sizes["bf16 adamw"] == pytest.approx(6 * weights, rel=0.01)
    assert sizes["adafactor"] < 0.3 * weights * 4
    # For the 4096 large weights: two moments of a byte each, their 16 scales, and a table from bytes to numbers each.
    for name, small in (("adamw8bit", 8), ("bf16 adamw8bit", 6)):
        assert sizes[name] == pytest.approx(2 * (4096 + 16 * 4 + 256 * 4) + small * (weights - 4096), rel=0.01)
    assert sizes["adamw8bit"] == count_state_bytes(Training(FUSED["fused adamw8bit"]).take_steps(0, 1).optimizer)


@pytest.mark.parametrize("options", (KINDS | FUSED).values(), ids=(KINDS | FUSED).keys())
def test_learning_rates_are_json_numbers(options: OptimizationOptions) -> None:
    training = Training(options).take_steps(0, 1)
    assert json.dumps(training.schedule.get_last_lr()[0]) == json.dumps(options.learning_rate)
    assert training.optimizer.param_groups[-1]["lr"] == options.learning_rate


# ---- optimizers with their own learning rate or averages ------------------------------------------------------------


def test_prodigy_finds_its_learning_rate() -> None:
    """It starts at 1e-6."""
    training = Training(KINDS["prodigy"]).take_steps(0, 50)
    group = training.optimizer.param_groups[0]
    assert group["d"] > 100 * group["d0"]


@pytest.mark.parametrize("name", ["schedulefree", "fused schedulefree"])
def test_averaged_weights_do_not_change_training(name: str) -> None:
    options = (KINDS | FUSED)[name]
    undisturbed, training = Training(options).take_steps(0, STEPS), Training(options)
    with averaged_weights(training.optimizer):  # before the first step
        pass
    training.take_steps(0, 3)
    before = training.weights()
    with pytest.raises(ZeroDivisionError), averaged_weights(training.optimizer):
        assert not torch.equal(training.weights(), before)
        with averaged_weights(training.optimizer):
            averaged = training.weights()
        assert torch.equal(training.weights(), averaged)
        raise ZeroDivisionError
    assert torch.equal(training.weights(), before)
    assert torch.equal(training.take_steps(3, STEPS).weights(), undisturbed.weights())


def test_averaged_weights_equal_schedulefree_eval() -> None:
    training = Training(KINDS["schedulefree"]).take_steps(0, 3)
    with averaged_weights(training.optimizer):
        averaged = training.weights()
    training.optimizer.eval()
    assert torch.equal(averaged, training.weights())


def test_other_optimizers_have_no_averaged_weights() -> None:
    for options in (KINDS["adamw"], KINDS["prodigy"], FUSED["fused adamw"]):
        training = Training(options).take_steps(0, 3)
        before = training.weights()
        with averaged_weights(training.optimizer):
            assert torch.equal(training.weights(), before)


def test_schedulefree_warms_up_once() -> None:
    """With its own warm-up, not the schedule: its average depends on it."""
    options = replace(KINDS["schedulefree"], lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    training, rates = Training(options), []
    for step in range(STEPS):
        training.take_steps(step, step + 1)
        rates.append(training.optimizer.param_groups[0]["scheduled_lr"])
    assert rates == pytest.approx([3e-3 * factor for factor in (0.25, 0.5, 0.75, 1, 1, 1)])
    constant = Training(KINDS["schedulefree"]).take_steps(0, 1)
    assert constant.optimizer.param_groups[0]["scheduled_lr"] == pytest.approx(3e-3)


# ---- weights in bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_stochastic_rounding_keeps_small_steps(name: str) -> None:
    """Steps of 1e-4 on a weight of 1; the next smaller bfloat16 is 1 - 1/256."""
    options = OptimizationOptions(learning_rate=1e-4, optimizer=name, weights_dtype="bf16", adam_weight_decay=0.0)
    weight = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
    nearest = nn.Parameter(weight.detach().clone())
    optimizers = [make_optimizer([weight], options, 1), torch.optim.AdamW([nearest], lr=1e-4, weight_decay=0.0)]
    for step in range(20):
        torch.manual_seed(step)
        for parameter, optimizer in zip((weight, nearest), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)  # then Adam's step is the learning rate
            optimizer.step()
    assert torch.equal(nearest, torch.ones_like(nearest))
    # The mean of 65,536 roundings, each with a standard deviation below 1/256.
    assert 1 - weight.float().mean().item() == pytest.approx(20e-4, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_rounding_uses_torchs_generator(name: str) -> None:
    first, second = (Training(KINDS[f"bf16 {name}"]).take_steps(0, STEPS).weights() for _ in range(2))
    assert torch.equal(first, second)
    other = Training(KINDS[f"bf16 {name}"])
    other.loss(0).backward()
    torch.manual_seed(77)
    other.optimizer.step()
    assert not torch.equal(Training(KINDS[f"bf16 {name}"]).take_steps(0, 1).weights(), other.weights())


@pytest.mark.parametrize("shape", [(64, 64), (64, 4)], ids=["large", "small"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_bf16_training_follows_shrinking_gradients(name: str, shape: tuple[int, int]) -> None:
    """The second moment shrinks by 0.2 % a step, less than bfloat16 can resolve: in it, the steps would stay small."""

    def train(options: OptimizationOptions, dtype: torch.dtype) -> float:
        weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = make_optimizer([weight], options, 1)
        for step in range(800):
            torch.manual_seed(step)
            weight.grad = torch.ones_like(weight) * (1.0 if step < 5 else 0.01)
            optimizer.step()
        return weight.float().mean().item()

    options = OptimizationOptions(learning_rate=1e-3, adam_beta2=0.998, adam_weight_decay=0.0)
    expected = train(options, torch.float32)
    moved = train(replace(options, optimizer=name, weights_dtype="bf16"), torch.bfloat16)
    assert moved == pytest.approx(expected, rel=0.05)


# ---- the update within the backward pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FUSED if "bf16" not in name])
def test_fused_training_is_bit_identical(name: str) -> None:
    """Except for bf16, which draws its random numbers in the order of the backward pass."""
    scheduler = "constant_with_warmup" if FUSED[name].has_averaged_weights else "cosine"
    options = replace(FUSED[name], lr_scheduler=scheduler, lr_warmup_steps=2)
    fused = Training(options).take_steps(0, STEPS)
    ordinary = Training(replace(options, fused_backward=False)).take_steps(0, STEPS)
    assert torch.equal(fused.weights(), ordinary.weights())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_one_gradient_exists_at_a_time(tmp_path: Path, is_checkpointed: bool) -> None:
    """In a UNet, with and without gradient checkpointing."""
    options, twin = OptimizationOptions(fused_backward=True), make_components(tmp_path / "a", in_channels=8)["unet"]
    unet = make_components(tmp_path / "b", in_channels=8)["unet"].train()
    parameters, counts = list(unet.parameters()), []

    def count(_: torch.Tensor) -> None:
        counts.append(sum(parameter.grad is not None for parameter in parameters))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    fused, ordinary = (
        make_optimizer(list(unet.parameters()), options, 1),
        make_optimizer(list(twin.train().parameters()), OptimizationOptions(), 1),
    )
    if is_checkpointed:
        unet.enable_gradient_checkpointing()
    for step in range(2):
        for model, optimizer in ((unet, fused), (twin, ordinary)):
            torch.manual_seed(step)
            latents, text, timestep = torch.randn(2, 8, 16, 16), torch.randn(2, 5, 32), torch.tensor([3, 700])
            model(latents, timestep, text).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any(parameter.grad is not None for parameter in parameters)
    assert counts == [1] * (2 * len(parameters))
    for left, right in zip(unet.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_shared_weight_is_updated_once_with_the_summed_gradient() -> None:
    def train(make: Callable) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        optimizer = make(list(layer.parameters()))
        for _ in range(3):
            layer(layer(torch.ones(1, 4)).tanh()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach()

    def make_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    assert torch.equal(train(make_sgd), train(lambda parameters: FusedBackward(parameters, make_sgd)))


def test_fused_backward_reports_the_gradient_norm() -> None:
    fused, ordinary = Training(FUSED["fused schedulefree"]), Training(KINDS["schedulefree"])
    for step in range(3):
        for training in (fused, ordinary):
            training.loss(step).backward()
        expected = nn.utils.get_total_norm([value.grad for value in ordinary.network.parameters()])
        assert fused.optimizer.optimizer.grad_norm().item() == pytest.approx(expected.item(), rel=1e-6)
        for training in (fused, ordinary):
            training.optimizer.step()
            training.optimizer.zero_grad()


def test_the_gradient_norm_is_that_of_the_last_backward_pass() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([first, second], FUSED["fused adamw"], 1)
    for loss, norm in ((3 * first + 4 * second, 5.0), (2 * first, 2.0)):
        loss.sum().backward()
        assert optimizer.grad_norm().item() == pytest.approx(norm)
        optimizer.step()
        optimizer.zero_grad()


def test_frozen_parameters_do_not_change() -> None:
    options = FUSED["fused adamw"]
    network = make_network(options)
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    optimizer = make_optimizer(list(network.parameters()), options, 1)
    network(torch.ones(1, 1, 1, 1)).sum().backward()
    optimizer.step()
    assert torch.equal(network[0].weight, before)
    optimizer.load_state_dict(optimizer.state_dict())


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.ones(2))], FUSED["fused adamw"], 1)
    with pytest.raises(ValueError, match="state has 6 parameters, but the optimizer has 1"):
        optimizer.load_state_dict(Training(FUSED["fused adamw"]).optimizer.state_dict())


# ---- refused combinations -------------------------------------------------------------------------------------------

MACHINE = dict(
    max_grad_norm=1.0,
    gradient_accumulation_steps=1,
    use_ema=False,
    has_adapter=False,
    mixed_precision="no",
    num_processes=1,
    has_gpu=False,
)
FUSED_MACHINE = MACHINE | dict(max_grad_norm=0.0)
PRODIGY = dict(optimizer="prodigy", learning_rate=1.0)
BF16 = dict(weights_dtype="bf16")
BF16_MACHINE = MACHINE | dict(mixed_precision="bf16")


@pytest.mark.parametrize(
    ("flags", "machine"),
    [
        ({}, MACHINE),
        ({}, MACHINE | dict(mixed_precision=None, num_processes=8, gradient_accumulation_steps=4, use_ema=True)),
        (dict(use_8bit_adam=True), MACHINE),
        (dict(use_8bit_adam=True, optimizer="adamw8bit"), MACHINE),
        (dict(optimizer="paged_adamw8bit"), MACHINE | dict(has_gpu=True)),
        (dict(optimizer="adafactor", adafactor_scale_parameter=True), MACHINE | dict(has_adapter=True)),
        (PRODIGY | dict(prodigy_d_coef=2.0, prodigy_beta3=0.99), MACHINE | dict(use_ema=True)),
        (dict(optimizer="schedulefree_adamw", lr_scheduler="constant_with_warmup"), MACHINE),
        (BF16, BF16_MACHINE | dict(gradient_accumulation_steps=2, num_processes=2)),
        (BF16 | dict(use_8bit_adam=True, fused_backward=True), BF16_MACHINE | dict(max_grad_norm=0)),
        (dict(optimizer="schedulefree_adamw", fused_backward=True), FUSED_MACHINE),
    ],
)
def test_valid_combinations_are_accepted(flags: dict, machine: dict) -> None:
    assert find_optimizer_problems(OptimizationOptions(**flags), **machine) == []


@pytest.mark.parametrize(
    ("flags", "machine", "words"),
    [
        (dict(use_8bit_adam=True, optimizer="adafactor"), {}, "--use_8bit_adam .*--optimizer adafactor .*drop one"),
        (dict(optimizer="paged_adamw8bit"), {}, "--optimizer paged_adamw8bit needs a GPU; use --optimizer adamw8bit"),
        (dict(optimizer="prodigy"), {}, "--learning_rate is 0.0001; .*at least 0.1: give --learning_rate 1"),
        (PRODIGY | dict(scale_lr=True), {}, "prodigy .*drop --scale_lr"),
        (dict(prodigy_d_coef=2.0), {}, "--prodigy_d_coef .*--optimizer prodigy, but the optimizer is adamw; drop"),
        (dict(optimizer="schedulefree_adamw", lr_scheduler="cosine"), {}, "--lr_scheduler is cosine; .*must be const"),
        (dict(optimizer="schedulefree_adamw"), dict(use_ema=True), "schedulefree_adamw averages .*drop --use_ema"),
        (dict(optimizer="schedulefree_adamw", adam_beta1=0.0), {}, "--adam_beta1 is 0; .*above 0"),
        (BF16, dict(mixed_precision=None), "--weights_dtype bf16 needs --mixed_precision bf16, but it is no"),
        (BF16, dict(mixed_precision="fp16"), "--weights_dtype bf16 needs --mixed_precision bf16, but it is fp16"),
        (BF16, BF16_MACHINE | dict(has_adapter=True), "--weights_dtype bf16 does not work with --lora_rank.* drop"),
        (
            BF16 | dict(optimizer="adafactor"),
            BF16_MACHINE,
            "--optimizer adafactor does not have; use --optimizer adamw",
        ),
        (dict(fused_backward=True), {}, "--fused_backward .*--max_grad_norm is 1; give --max_grad_norm 0"),
        (dict(fused_backward=True), FUSED_MACHINE | dict(gradient_accumulation_steps=4), "accumulation_steps is 4"),
        (dict(fused_backward=True), FUSED_MACHINE | dict(mixed_precision="fp16"), "--fused_backward .*fp16 .*bf16 or"),
        (dict(fused_backward=True), FUSED_MACHINE | dict(num_processes=2), "2 processes .*start one"),
        (PRODIGY | dict(fused_backward=True), FUSED_MACHINE, "--fused_backward .*--optimizer prodigy .*use another"),
    ],
)
def test_invalid_combinations_are_refused(flags: dict, machine: dict, words: str) -> None:
    (problem,) = find_optimizer_problems(OptimizationOptions(**flags), **(MACHINE | machine))
    assert re.search(words, problem), problem


def test_all_problems_are_reported_together() -> None:
    options = OptimizationOptions(optimizer="prodigy", weights_dtype="bf16", fused_backward=True)
    machine = MACHINE | dict(gradient_accumulation_steps=2, num_processes=2, mixed_precision="fp16")
    assert len(find_optimizer_problems(options, **machine)) == 8


@pytest.mark.parametrize(
    ("flags", "package", "flag"),
    [
        (dict(optimizer="adamw8bit"), "bitsandbytes", "--optimizer adamw8bit"),
        (dict(use_8bit_adam=True), "bitsandbytes", "--use_8bit_adam"),
        (PRODIGY, "prodigyopt", "--optimizer prodigy"),
        (dict(optimizer="schedulefree_adamw"), "schedulefree", "--optimizer schedulefree_adamw"),
        (BF16 | dict(use_8bit_adam=True), "torchao", "--weights_dtype bf16"),
    ],
)
def test_a_missing_package_is_named(flags: dict, package: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    machine = BF16_MACHINE if "weights_dtype" in flags else MACHINE
    expected = f"{flag} needs {package}: pip install {package}, or drop the flag"
    assert find_optimizer_problems(OptimizationOptions(**flags), **machine) == [expected]


def test_flags_of_another_optimizer_are_refused() -> None:
    """Also for flags that will be added."""
    changed = {bool: lambda value: not value, float: lambda value: value + 1, type(None): lambda value: 0.5}
    for field in fields(OptimizationOptions):
        owner = field.name.split("_")[0]
        if owner in ("prodigy", "adafactor"):
            value = changed[type(field.default)](field.default)
            (problem,) = find_optimizer_problems(OptimizationOptions(**{field.name: value}), **MACHINE)
            assert f"--{field.name} " in problem and f"--optimizer {owner}" in problem


def test_every_choice_of_the_command_line_has_its_optimizer() -> None:
    classes = {}
    for name in OPTIMIZERS:
        optimizer = make_optimizer([nn.Parameter(torch.ones(2))], OptimizationOptions(optimizer=name), 1)
        classes[name] = type(optimizer).__name__
    assert classes == {
        "adamw": "AdamW",
        "adamw8bit": "AdamW8bit",
        "paged_adamw8bit": "PagedAdamW8bit",
        "adafactor": "Adafactor",
        "prodigy": "Prodigy",
        "schedulefree_adamw": "AdamWScheduleFree",
    }


def test_waiting_for_data_is_reported_once(caplog):
    """Not for the first log entry, in which the loader's processes start, and only after a minute."""
    wait = DataWait()
    wait.add(50, 60)
    for _ in range(5):
        wait.add(4, 20)
    assert caplog.text.count("20 % of the time passes waiting for data: raise --dataloader_num_workers") == 1
    quick = DataWait()
    for _ in range(9):
        quick.add(1, 20)
    assert caplog.text.count("waiting for data") == 1
