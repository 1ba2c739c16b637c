"""The EMA: its formula, on the device of the weights and in a thread, and swapped into the model."""

import threading

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from utils.training.ema import MovingAverage

DEVICES = pytest.mark.parametrize("device", [None, "cpu"], ids=["in the step", "in a thread"])


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Conv2d(3, 4, 3)).to(dtype)


@torch.no_grad()
def move(model: torch.nn.Module, step: int) -> None:
    """Change every weight with random numbers of the step."""
    numbers = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=numbers).to(parameter.dtype))


def follow(average: MovingAverage, model: torch.nn.Module, num_steps: int = 30) -> dict[str, torch.Tensor]:
    for step in range(1, num_steps + 1):
        move(model, step)
        average.update(model, step)
    return {name: value.clone() for name, value in average.state_dict().items()}


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay, interval", [(0.9999, 1), (0.9999, 7), (0.5, 1), (0.0, 1)])
def test_the_formula(decay: float, interval: int, dtype: torch.dtype, device: str | None) -> None:
    model = make_model(dtype)
    average = MovingAverage(model, decay, device, interval)
    expected = {name: value.detach().double() for name, value in model.named_parameters()}
    for step in range(1, 61):
        move(model, step)
        average.update(model, step)
        if step % interval:
            continue
        kept = min(decay, (1 + step) / (10 + step)) ** interval
        for name, value in model.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * value.detach().double()
    state = average.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_thread_is_bit_identical(dtype: torch.dtype) -> None:
    states = [follow(MovingAverage(make_model(dtype), 0.9, device), make_model(dtype)) for device in (None, "cpu")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_chunks_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = follow(MovingAverage(make_model(torch.bfloat16), 0.9), make_model(torch.bfloat16))
    monkeypatch.setattr("utils.training.ema.CHUNK_BYTES", 1)
    single = follow(MovingAverage(make_model(torch.bfloat16), 0.9), make_model(torch.bfloat16))
    assert all(torch.equal(whole[name], single[name]) for name in whole)


@DEVICES
def test_only_trained_parameters_are_averaged(device: str | None) -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), make_model())
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    average = MovingAverage(model, 0.9, device)
    assert set(follow(average, model)) == trained and 0 < len(trained) < len(list(model.parameters()))
    frozen = {name: value.clone() for name, value in model.named_parameters() if name not in trained}
    with average.swapped_into(model):
        assert all(torch.equal(value, frozen.get(name, value)) for name, value in model.named_parameters())


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_is_bit_identical(dtype: torch.dtype, device: str | None) -> None:
    model = make_model(dtype)
    average = MovingAverage(model, 0.9, device)
    state = follow(average, model)
    live = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), average.swapped_into(model):
        assert all(torch.equal(value, state[name].to(dtype)) for name, value in model.named_parameters())
        raise ZeroDivisionError
    assert all(torch.equal(value, live[name]) for name, value in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in average.state_dict().items())


@DEVICES
def test_a_state_is_loaded_completely_or_not_at_all(device: str | None) -> None:
    model = make_model()
    average = MovingAverage(model, 0.9, device)
    state = follow(average, model)
    other = MovingAverage(make_model(), 0.9, device)
    other.load_state_dict(state | {"of another model": torch.ones(1)})
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(KeyError, match="1.bias"):
        other.load_state_dict({name: torch.zeros_like(v) for name, v in state.items() if name != "1.bias"})
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


# ---- the thread -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Averaging waits until the event is set."""
    event, lerp = threading.Event(), torch._foreach_lerp_

    def wait_and_lerp(*values: object) -> None:
        assert event.wait(timeout=600)
        lerp(*values)

    monkeypatch.setattr(torch, "_foreach_lerp_", wait_and_lerp)
    return event


def test_an_update_uses_the_weights_at_its_call(gate: threading.Event) -> None:
    """The thread averages only after the weights have changed, so `update` has returned without waiting."""
    model = make_model()
    average = MovingAverage(model, 0.5, "cpu")
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    move(model, 1)
    moved = {name: value.detach().clone() for name, value in model.named_parameters()}
    average.update(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    gate.set()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(start[name], moved[name], 1 - 2 / 11))


def test_an_update_waits_for_the_previous_one(gate: threading.Event) -> None:
    """Otherwise it would overwrite the copies that the previous one reads."""
    expected = MovingAverage(make_model(), 0.9)
    model = make_model()
    average = MovingAverage(model, 0.9, "cpu")
    threading.Timer(0.2, gate.set).start()
    state = follow(average, model, num_steps=2)
    expected = follow(expected, make_model(), num_steps=2)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_exception_in_the_thread_is_raised_by_the_next_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    model = make_model()
    average = MovingAverage(model, 0.9, "cpu")
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *_: 1 / 0)
    average.update(model, 1)
    for call in (average.state_dict, lambda: average.update(model, 2), average.close):
        with pytest.raises(ZeroDivisionError):
            call()
    assert set(threading.enumerate()) <= before


@DEVICES
def test_a_closed_average_can_be_read(device: str | None) -> None:
    before = set(threading.enumerate())
    model = make_model()
    average = MovingAverage(model, 0.9, device)
    state = follow(average, model)
    average.close()
    assert all(torch.equal(value, state[name]) for name, value in average.state_dict().items())
    assert set(threading.enumerate()) <= before


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda'; it must be None"):
        MovingAverage(make_model(), 0.9, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_copies_are_ordered_and_swapping_takes_no_memory() -> None:
    model = make_model().cuda()
    average, expected = MovingAverage(model, 0.9, "cpu"), MovingAverage(make_model(), 0.9)
    reference = make_model()
    for step in range(1, 11):
        for one, ema in ((model, average), (reference, expected)):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.add_(step)
            ema.update(one, step)
    for name, value in average.state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, expected.state_dict()[name])
    live = [parameter.detach().clone() for parameter in model.parameters()]
    before = torch.cuda.memory_allocated()
    with average.swapped_into(model):
        assert torch.cuda.memory_allocated() == before
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), live, strict=True))


def test_an_update_follows_weights_that_were_replaced_in_place_and_another_model():
    """Parameters are looked up once: their tensors may still be replaced, as `Module.to` does."""
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    average = MovingAverage(models[0], decay=0.0)
    average.update(models[0], 1)
    models[0].weight.data = torch.full((2, 2), 3.0)
    for model in models:
        average.update(model, 2)
        torch.testing.assert_close(average.state_dict()["weight"], model.weight.detach())
