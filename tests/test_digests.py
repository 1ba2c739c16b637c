"""Fingerprints that are taken while a checkpoint's files are written, and what is read from those files."""

import torch

from utils.digests import CHUNK, DigestedFile, fingerprint_files
from utils.training.checkpoints import (
    TRAINING_STATE,
    Progress,
    find_damage,
    load_training_state,
    save_checkpoint,
    save_state,
)
from utils.weight_files import TensorFiles, write_safetensors


def test_a_fingerprint_taken_while_writing_is_that_of_the_file(tmp_path):
    with DigestedFile(tmp_path / "bytes") as file:
        file.write(b"start")
        file.write(memoryview(torch.arange(CHUNK).numpy()))  # several chunks, of a wider type
        file.write(b"")
    tensors = {"wide": torch.rand(3, 5), "half": torch.rand(7).half(), "scalar": torch.tensor(2.0)}
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    taken = {
        "bytes": file.fingerprint(),
        "state.pt": save_state({"tensors": tensors}, tmp_path / "state.pt"),
        "w.safetensors": write_safetensors(tmp_path / "w.safetensors", shapes, tensors.items()),
    }
    assert taken == fingerprint_files(tmp_path, taken)
    stored = TensorFiles([tmp_path / "w.safetensors"], "weights")
    assert all(torch.equal(stored.read(name), value) for name, value in tensors.items())


def test_changing_a_loaded_state_leaves_the_checkpoint_as_it_was(tmp_path):
    state = {"optimizer": {"state": {0: {"exp_avg": torch.rand(1000)}}}}
    checkpoint = save_checkpoint(tmp_path, Progress(global_step=1), {}, state, None)
    loaded = load_training_state(checkpoint)["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(loaded, state["optimizer"]["state"][0]["exp_avg"])
    loaded.zero_()
    assert find_damage(checkpoint) is None
    with (checkpoint / TRAINING_STATE).open("r+b") as file:
        file.seek(2000)
        file.write(b"xxxx")
    assert find_damage(checkpoint) == f"{TRAINING_STATE} is damaged"
