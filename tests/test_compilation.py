"""--compile of training: the same weights as without, resumed and validated; and what cannot be compiled."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_instruct_pix2pix
from tests.pairs import save_pairs
from tests.runs import WEIGHTS, training_flags
from utils import compilation
from utils.training import assembly

TRAIN = train_instruct_pix2pix.main


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


def test_compiled_training_equals_plain_training(tiny_base, pairs, tmp_path, monkeypatch):
    """With checkpointed blocks, a resumed run and held-out rows; only residual blocks, since compiling takes long."""
    monkeypatch.setattr(compilation, "BLOCKS", (compilation.ResnetBlock2D,))
    plain = ("--validation_split=0.2", "--gradient_checkpointing", "--use_ema", "--max_train_steps=2")
    compiled = (*plain, "--compile", "--checkpointing_steps=1")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "plain", *plain)) == 0
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "compiled", *compiled)) == 0
    resumed = (*compiled, "--resume_from_checkpoint=checkpoint-1")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "compiled", *resumed)) == 0
    expected, found = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("plain", "compiled"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)


def test_without_a_compiler_training_goes_on(tiny_base, pairs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(assembly, "find_missing_compiler", lambda device: "a C++ compiler such as g++")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--compile", "--max_train_steps=1")) == 0
    assert "--compile is ignored: it needs a C++ compiler such as g++" in caplog.text


def test_blocks_that_do_not_compile_run_as_written(monkeypatch):
    """An error of the compiler costs speed, not the run."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    torch.compiler.reset()
    block = compilation.ResnetBlock2D(in_channels=32, temb_channels=None)
    pixels = torch.randn(1, 32, 8, 8)
    expected = block(pixels, None)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    assert compilation.compile_blocks(block) == 1
    assert torch.equal(block(pixels, None), expected)


def test_many_shapes_are_refused(tiny_base, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--compile", "--resize_mode=bucket"))
    assert "--resize_mode bucket has many" in capsys.readouterr().err
