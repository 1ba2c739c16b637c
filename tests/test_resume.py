"""Runs that are killed or stopped and then resumed are bit-identical to runs that are not interrupted."""

import importlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.pairs import save_pairs
from tests.runs import ACCELERATE, TORCHRUN, losses_of, run, start, training_flags, weights_of
from utils import atomic_files
from utils.errors import InputError
from utils.runtime import available_memory
from utils.training.checkpoint_writer import CheckpointWriter
from utils.training.checkpoints import Progress, find_damage, list_checkpoints, save_checkpoint, save_trained

SCRIPT = "train_instruct_pix2pix.py"
SDXL = "train_instruct_pix2pix_sdxl.py"
ADAPTER = ("--lora_rank=4", "--lora_dropout=0.2", "--use_dora", "--lora_target=all", "--quantize_base=nf4")
SMALL_MEMORY = (
    "--weights_dtype=bf16",
    "--mixed_precision=bf16",
    "--fused_backward",
    "--max_grad_norm=0",
    "--optimizer=adamw8bit",
    "--ema_device=cpu",
)
STEPS, CHECKPOINTING = 12, 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 pairs: not a multiple of the batch size or the accumulation."""
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 11)


def flags_for(base: Path, pairs: Path, output_dir: Path, workers: int, accumulation: int) -> list[str]:
    return training_flags(
        base,
        pairs,
        output_dir,
        f"--max_train_steps={STEPS}",
        f"--checkpointing_steps={CHECKPOINTING}",
        "--use_ema",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        f"--dataloader_num_workers={workers}",
        "--random_flip",
        f"--gradient_accumulation_steps={accumulation}",
        "--logging_steps=2",
        "--validation_split=0.1",
        "--validation_steps=4",
        "--save_best",
        "--resume_from_checkpoint=latest",
    )


@pytest.fixture(scope="module")
def references() -> dict[tuple, Path]:
    """Output folders of uninterrupted runs, by their settings."""
    return {}


def uninterrupted(references: dict, script: str, base: Path, pairs: Path, accumulation: int, more: tuple = ()) -> Path:
    """The output folder of a run in this process, which the tests share."""
    key = (script, accumulation, more)
    if key not in references:
        references[key] = Path(tempfile.mkdtemp(dir=pairs.parent)) / "reference"
        main = importlib.import_module(script.removesuffix(".py")).main
        assert main([*flags_for(base, pairs, references[key], 0, accumulation), *more]) == 0
    return references[key]


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], timeout: float = 600) -> bool:
    """kill -9 as soon as `condition()` is true. Returns False if the run ended before."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        if process.poll() is not None:
            assert process.returncode == 0
            return False
        time.sleep(0.0005)
    process.kill()
    process.wait()
    return True


def assert_same_run(output_dir: Path, reference: Path) -> None:
    for name in ("unet", "unet_ema"):
        place = Path(f"checkpoint-{STEPS}") / name
        assert weights_of(output_dir / place) == weights_of(reference / place), name
    published = "unet" if (reference / "unet").exists() else "."
    assert weights_of(output_dir / published) == weights_of(reference / published)
    assert losses_of(output_dir) == losses_of(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "workers", "accumulation", "more"),
    [
        (SCRIPT, "tiny_base", 0, 1, ()),
        (SCRIPT, "tiny_base", 2, 1, ()),
        (SCRIPT, "tiny_base", 0, 3, ()),
        (SCRIPT, "tiny_base", 2, 3, ()),
        (SDXL, "tiny_sdxl", 2, 3, ()),
        (SDXL, "tiny_sdxl", 0, 1, ADAPTER),
        (SCRIPT, "tiny_base", 0, 1, SMALL_MEMORY),
    ],
    ids=["SD 0 1", "SD 2 1", "SD 0 3", "SD 2 3", "SDXL 2 3", "SDXL adapter", "SD small memory"],
)
def test_a_killed_and_resumed_run_is_bit_identical(
    request, references, pairs, tmp_path, script, model, workers, accumulation, more
):
    output_dir, base = tmp_path / "killed", request.getfixturevalue(model)
    reference = uninterrupted(references, script, base, pairs, accumulation, more)
    flags = [*flags_for(base, pairs, output_dir, workers, accumulation), *more]
    random_moment = random.Random(f"{workers} {accumulation} {more}").uniform(0.0, 1.0)
    first = start(script, flags, log=tmp_path / "first.log")
    assert kill_when(first, lambda: bool(list_checkpoints(output_dir)))
    second = start(script, flags, log=tmp_path / "second.log")
    begun = []  # when the run resumed; the random moment is counted from here

    def is_past_the_moment() -> bool:
        log = output_dir / "training_log.jsonl"
        if not begun and log.exists() and "resuming from" in (tmp_path / "second.log").read_text():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] >= random_moment

    kill_when(second, is_past_the_moment)  # a fast machine may have finished: then the third run only publishes
    run(script, flags)
    assert_same_run(output_dir, reference)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tiny_base, references, pairs, tmp_path):
    output_dir, reference = tmp_path / "killed", uninterrupted(references, SCRIPT, tiny_base, pairs, 1)
    flags = flags_for(tiny_base, pairs, output_dir, 0, 1)
    unfinished = output_dir / f"{atomic_files.UNFINISHED}checkpoint-{2 * CHECKPOINTING}"
    for _ in range(5):  # writing takes milliseconds, which a busy machine may miss
        shutil.rmtree(output_dir, ignore_errors=True)
        if kill_when(start(SCRIPT, flags, log=tmp_path / "log"), unfinished.exists) and unfinished.exists():
            break
    assert unfinished.exists(), "no checkpoint was being written at the kill"
    existing = list_checkpoints(output_dir)
    assert existing and all(find_damage(checkpoint) is None for checkpoint in existing)
    run(SCRIPT, flags)
    assert not list(output_dir.glob(f"{atomic_files.UNFINISHED}*"))
    assert_same_run(output_dir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number, launcher", [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ACCELERATE)])
def test_a_signal_writes_a_checkpoint(tiny_base, pairs, tmp_path, number, launcher):
    flags = training_flags(
        tiny_base,
        pairs,
        tmp_path / "out",
        "--max_train_steps=100000",
        "--checkpointing_steps=100000",
        "--logging_steps=1",
    )
    process = start(SCRIPT, flags, launcher, log=tmp_path / "log")
    log = tmp_path / "out/training_log.jsonl"
    end = time.monotonic() + 600
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    exit_code = process.wait(timeout=600)
    if not launcher:  # the launcher's exit code is not ours
        assert exit_code == 128 + number
    while not list_checkpoints(tmp_path / "out"):
        assert time.monotonic() < end + 60, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert find_damage(list_checkpoints(tmp_path / "out")[-1]) is None


def test_there_is_a_complete_checkpoint_at_every_moment(tiny_base, tmp_path, monkeypatch):
    """With a limit of one checkpoint: checked before and after every change of the folder."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    seen = []

    def checking(change):
        def wrapper(*arguments, **settings):
            seen.append(has_complete_checkpoint())
            result = change(*arguments, **settings)
            seen.append(has_complete_checkpoint())
            return result

        return wrapper

    def has_complete_checkpoint() -> bool:
        return any(find_damage(checkpoint) is None for checkpoint in list_checkpoints(tmp_path))

    def save(step: int) -> None:
        models = {"unet": lambda folder: save_trained(folder, unet)}
        save_checkpoint(tmp_path, Progress(global_step=step), models, {"optimizer": torch.zeros(3)}, limit=1)

    save(1)
    monkeypatch.setattr(Path, "rename", checking(Path.rename))
    monkeypatch.setattr(atomic_files.shutil, "rmtree", checking(atomic_files.shutil.rmtree))
    for step in (2, 3):
        save(step)
    assert len(seen) >= 12 and all(seen)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "more"),
    [(SCRIPT, "tiny_base", ()), (SDXL, "tiny_sdxl", ()), (SDXL, "tiny_sdxl", ADAPTER[:1])],
    ids=["SD", "SDXL", "SDXL adapter"],
)
def test_two_processes_equal_one_with_accumulation_two(request, pairs, tmp_path, script, model, more):
    """The same samples and, up to rounding, the same weights, with `torchrun`."""
    one, two, base = tmp_path / "one", tmp_path / "two", request.getfixturevalue(model)
    shared = (
        "--max_train_steps=6",
        "--use_ema",
        "--random_flip",
        "--validation_split=0.2",
        "--validation_steps=3",
        "--logging_steps=1",
        "--checkpointing_steps=3",
        "--learning_rate=1e-3",
        "--save_best",
        *more,
    )
    flags = [*shared, "--merge_adapter"] if more else shared
    main = importlib.import_module(script.removesuffix(".py")).main
    assert main(training_flags(base, pairs, one, *flags, "--gradient_accumulation_steps=2")) == 0
    run(script, training_flags(base, pairs, two, *flags), launcher=TORCHRUN)
    expected = UNet2DConditionModel.from_pretrained(one / "unet").state_dict()
    actual = UNet2DConditionModel.from_pretrained(two / "unet").state_dict()
    start_weights = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    names = [name for name in expected if "conv_in" not in name]
    moved, difference = (
        sum((expected[name] - other[name]).square().sum() for name in names).sqrt() for other in (start_weights, actual)
    )
    # Not the largest difference: Adam turns the rounding error of a gradient near zero into a full step.
    assert difference < 2e-3 * moved, (difference, moved)
    for first, second in zip(losses_of(one), losses_of(two), strict=True):
        assert [value or 0 for value in first] == pytest.approx([value or 0 for value in second], rel=1e-4)


def test_a_script_ends_with_its_launcher(tmp_path):
    """It receives SIGTERM when the launcher dies."""
    child = "import time, utils.training.launcher as l; l.follow_launcher(); print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    process = subprocess.Popen(["python3", "-c", parent], env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    assert process.stdout.read() == b""  # returns only when the child, which holds the pipe, has died


def test_a_checkpoint_in_the_background_is_of_its_own_step(monkeypatch):
    """Training changes the weights meanwhile; the error of a checkpoint is raised at the next one, or at the end."""
    weights, seen, may_write = {"unet": {"weight": torch.zeros(3)}}, [], threading.Event()

    def write(progress: Progress, content: dict) -> None:
        may_write.wait()
        seen.append((progress.global_step, content["unet"]["weight"].tolist()))
        if progress.global_step == 2:
            raise InputError("a full disk")

    writer, progress = CheckpointWriter(), Progress(global_step=1)
    writer.submit(write, progress, weights, in_background=True)
    weights["unet"]["weight"] += 1
    progress.global_step = 2
    assert seen == []
    may_write.set()
    writer.submit(write, progress, weights, in_background=True)
    with pytest.raises(InputError, match="a full disk"):
        writer.wait()
    assert seen == [(1, [0, 0, 0]), (2, [1, 1, 1])]
    monkeypatch.setattr("utils.training.checkpoint_writer.available_memory", lambda: 0)
    progress.global_step = 3
    writer.submit(write, progress, weights, in_background=True)  # no memory for a copy: written at once
    assert seen[2:] == [(3, [1, 1, 1])]


@pytest.mark.parametrize(
    "line, folder, limit, used, reclaimable",
    [
        ("0::/slurm/job_7", "sys/fs/cgroup/slurm/job_7", "memory.max", "memory.current", "inactive_file"),
        ("0::/deep/inside", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            *("5:cpu,memory:/docker/x", "sys/fs/cgroup/memory/docker/x"),
            *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["v2", "v2 in a container", "v1"],
)
def test_the_memory_of_a_container_counts(tmp_path, line, folder, limit, used, reclaimable):
    """Not that of the machine: a copy of the training state must not have the run killed."""
    assert available_memory(tmp_path) > 10_000  # no groups: of the machine
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/x\n{line}\n")
    group = tmp_path / folder
    group.mkdir(parents=True)
    for name, content in ((limit, "9000"), (used, "8000"), ("memory.stat", f"anon 5\n{reclaimable} 300\n")):
        (group / name).write_text(content)
    assert available_memory(tmp_path) == 1300
    (group / limit).write_text("max")
    assert available_memory(tmp_path) > 10_000
