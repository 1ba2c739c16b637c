"""A step does not wait for the device: no operation of it returns a value to Python. On a GPU, each would stall it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from benchmarks.timed_script import count_operations
from tests.pairs import save_pairs
from tests.runs import training_flags, weights_of
from utils.training import loop
from utils.training.ema import MovingAverage


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_ema", "--snr_gamma=5", "--noise_offset=0.1", "--gradient_checkpointing"),
        ("--cache_latents", "--center_crop", "--gradient_accumulation_steps=2"),
        ("--lora_rank=2", "--lora_dropout=0.1", "--max_grad_norm=0"),
        ("--weights_dtype=bf16", "--mixed_precision=bf16", "--fused_backward", "--max_grad_norm=0"),
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.parametrize("kind", ["tiny_base", "tiny_sdxl"])
def test_steps_return_no_value_to_python(kind, flags, pairs, tmp_path, monkeypatch, request):
    """But the first, which checks the VAE once."""
    counted, step, update = Counter(), loop.train_step, MovingAverage.update

    def counting(function, *inputs):
        with count_operations() as counter:
            result = function(*inputs)
        counted[function.__name__] += 1
        if counted["train_step"] > 1:
            counted["syncs"] += counter.syncs
        counted["operations"] += counter.operations
        return result

    monkeypatch.setattr(loop, "train_step", lambda *inputs: counting(step, *inputs))
    monkeypatch.setattr(MovingAverage, "update", lambda *inputs: counting(update, *inputs))
    script = train_instruct_pix2pix_sdxl if "sdxl" in kind else train_instruct_pix2pix
    base = request.getfixturevalue(kind)
    assert script.main(training_flags(base, pairs, tmp_path / "out", *flags, "--max_train_steps=3")) == 0
    assert counted["train_step"] == 3 and counted["operations"] > 300
    assert counted["syncs"] == 0


def test_a_profile_is_written_and_changes_nothing(tiny_base, pairs, tmp_path):
    flags = ("--max_train_steps=14", "--use_ema")
    for name, more in (("plain", ()), ("profiled", (f"--profile={tmp_path / 'trace'}",))):
        assert train_instruct_pix2pix.main(training_flags(tiny_base, pairs, tmp_path / name, *flags, *more)) == 0
    assert weights_of(tmp_path / "plain/unet") == weights_of(tmp_path / "profiled/unet")
    names = [event.get("name") for event in json.loads((tmp_path / "trace/trace.json").read_text())["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 3
    assert "aten::" in (tmp_path / "trace/operations.txt").read_text()


def test_the_counter_sees_a_wait():
    with count_operations() as counter:
        torch.ones(3).sum().item()
    assert counter.syncs == 1 and counter.operations >= 3
