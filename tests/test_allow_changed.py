"""Resuming with other settings when asked, and publishing in 16 bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pairs import save_pairs
from tests.runs import WEIGHTS, training_flags
from train_instruct_pix2pix import main as train


def test_a_resumed_run_may_have_another_learning_rate(tiny_base: Path, tmp_path: Path, capsys) -> None:
    pairs, out = save_pairs(tmp_path / "pairs", 7), tmp_path / "out"
    first = ("--max_train_steps=2", "--checkpointing_steps=2", "--logging_steps=1", "--learning_rate=1e-4")
    assert train(training_flags(tiny_base, pairs, out, *first)) == 0
    second = ("--max_train_steps=4", "--logging_steps=1", "--resume_from_checkpoint=latest", "--publish_dtype=fp16")
    second += ("--learning_rate=5e-5", "--adam_weight_decay=0.2", "--checkpointing_steps=4")
    with pytest.raises(SystemExit):
        train(training_flags(tiny_base, pairs, out, *second))
    error = capsys.readouterr().err
    assert "learning_rate: the checkpoint has 0.0001, this command 5e-05" in error
    assert "--allow_changed learning_rate adam_weight_decay to continue" in error
    with pytest.raises(SystemExit):
        train(training_flags(tiny_base, pairs, out, *second, "--allow_changed", "seed"))
    assert "--allow_changed seed: not a setting that may change" in capsys.readouterr().err
    allowed = ("--allow_changed", "learning_rate", "adam_weight_decay")
    assert train(training_flags(tiny_base, pairs, out, *second, *allowed)) == 0
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [entry["lr"] for entry in log if "lr" in entry] == [1e-4, 1e-4, 5e-5, 5e-5]
    state = torch.load(out / "checkpoint-4/training_state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
    changes = json.loads((out / "checkpoint-4/progress.json").read_text())["changes"]
    assert [2, "learning_rate", 1e-4, 5e-5] in changes
    assert "learning_rate from step 2" in (out / "README.md").read_text()
    assert {value.dtype for value in load_file(out / "unet" / WEIGHTS).values()} == {torch.float16}
