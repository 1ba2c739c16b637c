"""Failures during a run: damaged checkpoints, a full disk, a loss that is not finite. Existing results stay complete.

Every case calls the training script's `main`.
"""

import errno
import json
import math
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.mistakes import copy_of, cut, fails_early, fails_late, finishes, of_model, output_dir_of
from tests.runs import WEIGHTS, training_flags
from utils.training.checkpoints import choose_checkpoint

# ---- checkpoints of an earlier run ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def earlier_run(tiny_base: Path, four_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder after two steps, with a checkpoint after each."""
    output_dir = tmp_path_factory.mktemp("earlier") / "out"
    extra = ("--max_train_steps=2", "--checkpointing_steps=1", "--report_to=none")
    finishes(training_flags(tiny_base, four_pairs, output_dir, *extra))
    return output_dir


@pytest.fixture
def resumed(earlier_run: Path, tiny_base: Path, four_pairs: Path, tmp_path: Path) -> list[str]:
    """Flags that resume a copy of the earlier run for a third step."""
    output_dir = copy_of(earlier_run, tmp_path / "earlier")
    extra = ("--max_train_steps=3", "--checkpointing_steps=1", "--report_to=none", "--resume_from_checkpoint=latest")
    return training_flags(tiny_base, four_pairs, output_dir, *extra)


def test_checkpoints_of_an_earlier_run(resumed: list[str]) -> None:
    fails_early(resumed[:-1], "--output_dir", "--resume_from_checkpoint latest", "another folder")


def test_resume_from_a_missing_checkpoint(resumed: list[str]) -> None:
    fails_early([*resumed, "--resume_from_checkpoint=checkpoint-7"], "checkpoint-7", "checkpoint-1, checkpoint-2")


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--max_train_samples=3", ("dataset",)),
        ("--seed=4", ("seed", "has 3", "this command 4")),
        ("--train_batch_size=4", ("train_batch_size", "has 2", "this command 4")),
        ("--gradient_accumulation_steps=2", ("gradient_accumulation_steps", "has 2", "this command 4")),
        ("--learning_rate=1e-3", ("learning_rate", "has 0.0001", "this command 0.001")),
        ("--resolution=48", ("resolution", "has 32", "this command 48")),
        ("--use_ema", ("use_ema", "has False", "this command True")),
    ],
)
def test_resume_with_other_settings(resumed: list[str], extra: str, words: tuple[str, ...]) -> None:
    fails_early([*resumed, extra], "other settings", "Use the same values, or another --output_dir", *words)


def test_resume_with_another_base(resumed: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    weights = load_file(base / "unet" / WEIGHTS)
    save_file({name: value for name, value in weights.items() if "mid_block" not in name}, base / "unet" / WEIGHTS)
    config = json.loads((base / "unet/config.json").read_text())
    (base / "unet/config.json").write_text(json.dumps(config | {"mid_block_type": None}))
    fails_late(of_model(resumed, base), "checkpoint-2", "does not fit")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "UNet cut off": lambda path: cut(path / "unet" / WEIGHTS),
    "flipped byte in the UNet": lambda path: flip_byte(path / "unet" / WEIGHTS),
    "flipped byte in the optimizer": lambda path: flip_byte(path / "training_state.pt"),
    "no training_state.pt": lambda path: (path / "training_state.pt").unlink(),
    "no progress.json": lambda path: (path / "progress.json").unlink(),
    "progress.json cut off": lambda path: cut(path / "progress.json"),
    "another step in progress.json": lambda path: replace(path / "progress.json", '"draws": 4', '"draws": 5'),
    "empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_not_used(earlier_run: Path, tmp_path: Path, damage: Callable, caplog) -> None:
    output_dir = copy_of(earlier_run, tmp_path / "earlier")
    damage(output_dir / "checkpoint-2")
    assert choose_checkpoint(output_dir, "latest") == output_dir / "checkpoint-1"
    assert "checkpoint-2 is incomplete: " in caplog.text and "resuming from checkpoint-1 instead" in caplog.text


def test_a_checkpoint_of_before_with_other_digests(earlier_run: Path, tmp_path: Path) -> None:
    """CRC-32 in place of XXH3: intact files are accepted, damaged ones are not."""
    checkpoint = copy_of(earlier_run, tmp_path / "earlier") / "checkpoint-2"
    content = json.loads((checkpoint / "progress.json").read_text())
    del content["checksum"]
    for name in content["files"]:
        stored = (checkpoint / name).read_bytes()
        content["files"][name] = [len(stored), zlib.crc32(stored)]
    checksum = zlib.crc32(json.dumps(content).encode())
    (checkpoint / "progress.json").write_text(json.dumps(content | {"checksum": checksum}))
    assert choose_checkpoint(checkpoint.parent, "latest") == checkpoint
    flip_byte(checkpoint / "training_state.pt")
    assert choose_checkpoint(checkpoint.parent, "latest").name == "checkpoint-1"


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(resumed: list[str]) -> None:
    cut(output_dir_of(resumed) / "checkpoint-2" / "unet" / WEIGHTS)
    finishes(resumed, "checkpoint-2 is incomplete", "resuming from checkpoint-1 instead")


def test_no_complete_checkpoint(resumed: list[str]) -> None:
    for number in (1, 2):
        cut(output_dir_of(resumed) / f"checkpoint-{number}" / "unet" / WEIGHTS)
    fails_early(resumed, "no complete checkpoint", "checkpoint-1", "checkpoint-2", "damaged", "drop the flag")


# ---- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.parametrize("size", [1_500_000, 500_000, 0], ids=["for the optimizer", "for the UNet", "for anything"])
def test_no_space_for_a_checkpoint(resumed: list[str], size: int) -> None:
    with no_file_above(size):
        fails_late([*resumed, "--checkpoints_total_limit=1"], "Make room") if size else fails_early(
            resumed, "--output_dir"
        )
    if size:
        assert not (output_dir_of(resumed) / "checkpoint-3").exists()
    finishes(resumed)


def test_no_space_for_the_best_weights(flags: list[str]) -> None:
    with no_file_above(500_000):
        fails_late([*flags, "--validation_split=0.5", "--save_best"], "could not be written", "Make room")


def test_no_space_for_the_editor(flags: list[str]) -> None:
    with no_file_above(500_000):
        fails_late(flags, "pipeline could not be written", "Make room")


def test_no_space_left_during_training(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.training.loop.append_log", lambda folder, _: full_disk(folder / "training_log.jsonl"))
    fails_late(flags, "training_log.jsonl could not be written: No space left", "Make room")


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


# ---- a loss that is not finite --------------------------------------------------------------------------------------


def test_base_that_holds_nan(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    weights = load_file(base / "unet" / WEIGHTS)
    weights["conv_out.weight"][0, 0, 0, 0] = math.nan
    save_file(weights, base / "unet" / WEIGHTS, metadata={"format": "pt"})
    fails_late(of_model(flags, base), "at step 1 the loss is nan", "train[", "--learning_rate")


def test_learning_rate_that_explodes(flags: list[str]) -> None:
    fails_late([*flags, "--learning_rate=1e30"], "at step 2 the loss is", "train[", "--learning_rate")
