"""Runs of several processes: what they decide together, and how they are stopped."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from tests.mistakes import finishes
from tests.pairs import save_pairs
from tests.runs import BIN, ENVIRONMENT, REPOSITORY, TORCHRUN, start, training_flags
from train_instruct_pix2pix import main as train
from utils.data import latent_cache, latent_encoding
from utils.data.geometry import Geometry
from utils.data.sources import open_source
from utils.errors import InputError
from utils.training.checkpoints import Progress, list_checkpoints
from utils.training.loop import MAX_SKIPPED, LoopOptions, TrainingState, train_step
from utils.training.metrics import RunningMetrics

SCRIPT, PATIENCE = "train_instruct_pix2pix.py", 600
PARTS = ("--report_to=none", "--checkpointing_steps=2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


def start_nodes(flags: list[list[str]], folder: Path) -> list[tuple[subprocess.Popen, Path]]:
    """One process on each of two "machines" with flags of their own; (launcher, its log) each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, own in enumerate(flags):
        launcher = ("--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1")
        command = [str(BIN / "torchrun"), *launcher, f"--master_port={port}", SCRIPT, *own]
        log = folder / f"node-{rank}.log"
        output = log.open("wb")
        process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        started.append((process, log))
    return started


@pytest.mark.parametrize("seed", [["--seed=3"], []], ids=["seed", "no seed"])
def test_machines_without_a_common_folder_refuse_to_resume(seed, tiny_base, pairs, tmp_path):
    """Each with one message that names the folder; otherwise they would train different models, or wait for ever."""
    shared = [flag for flag in training_flags(tiny_base, pairs, tmp_path / "0", *PARTS) if "seed" not in flag]
    assert train([*shared, "--max_train_steps=2", *seed]) == 0
    resume = [*shared, "--max_train_steps=4", "--resume_from_checkpoint=latest", "--train_batch_size=1", *seed]
    nodes = start_nodes([resume, [*resume, f"--output_dir={tmp_path / '1'}"]], tmp_path)
    for process, log in nodes:
        assert process.wait(timeout=PATIENCE) != 0
        text = log.read_text()
        assert text.count("error: ") == 1 and "all machines must share the folder --output_dir" in text, text
    assert [path.name for path in list_checkpoints(tmp_path / "0")] == ["checkpoint-2"]


def test_a_mistake_of_one_machine_ends_all_of_them(tiny_base, pairs, tmp_path):
    """Here the second one has no dataset; the first would wait for it."""
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *PARTS)
    for process, log in start_nodes([flags, [*flags, f"--dataset_name={tmp_path / 'nothing'}"]], tmp_path):
        assert process.wait(timeout=PATIENCE) != 0
        assert f"the folder {tmp_path / 'nothing'} does not exist" in log.read_text()


def test_different_data_are_noticed(tiny_base, pairs, tmp_path):
    other = save_pairs(tmp_path / "other", 5)
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *PARTS)
    for process, log in start_nodes([flags, [*flags, f"--dataset_name={other}"]], tmp_path):
        assert process.wait(timeout=PATIENCE) != 0
        assert "do not have the same data and settings (dataset: " in log.read_text()


def test_sigterm_saves_a_checkpoint_between_log_entries(tiny_base, pairs, tmp_path):
    """Two processes that log and save after a hundred thousand steps stop at the next one, with a checkpoint."""
    far = ("--max_train_steps=200000", "--logging_steps=100000", "--checkpointing_steps=100000", "--report_to=none")
    log = tmp_path / "log"
    process = start(SCRIPT, training_flags(tiny_base, pairs, tmp_path / "out", *far), TORCHRUN, log)
    deadline = time.monotonic() + PATIENCE
    while not re.search(r"training: .*? [1-9]\d*/200000", log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) != 0
    assert "SIGTERM received: finishing this step, then saving a checkpoint" in log.read_text()
    checkpoints = list_checkpoints(tmp_path / "out")
    assert len(checkpoints) == 1, log.read_text()
    step = int(checkpoints[0].name.removeprefix("checkpoint-"))
    accumulation = "--gradient_accumulation_steps=2"  # one process with as many samples per step
    more = (*far, f"--max_train_steps={step + 2}", "--resume_from_checkpoint=latest", accumulation)
    finishes(training_flags(tiny_base, pairs, tmp_path / "out", *more), f"at step {step}")


class Rank:
    """A process of a group of threads."""

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self.is_main_process = index, barrier.parties, index == 0
        self.wait_for_everyone = barrier.wait


def test_no_shard_of_the_latent_cache_is_lost(tiny_editor, pairs, tmp_path, monkeypatch):
    """The second process lists the folder when the first has written its shards."""
    from utils.editing.loading import load_editor

    for module in (latent_cache, latent_encoding):
        monkeypatch.setattr(module, "ROWS_PER_SHARD", 1)
    source, vae, barrier = open_source(str(pairs)), load_editor(tiny_editor).vae, threading.Barrier(2)
    geometry, folder, problems = Geometry(resolution=32, center_crop=True), tmp_path / "latent-cache", []

    def build(rank: int) -> None:
        while rank and len(list(folder.glob("*/rows-*"))) < 4:
            time.sleep(0.01)
        try:
            encoder = latent_encoding.Encoder(geometry, vae)
            cache = latent_encoding.make_latent_cache(Rank(rank, barrier), folder, [source], encoder)
            for row in range(7):
                if row != 3:  # a bad row of `save_pairs`, or not: reading it must not miss a file
                    cache.read(0, row, False)
        except (Exception, threading.BrokenBarrierError) as error:
            problems.append(error)
            barrier.abort()

    threads = [threading.Thread(target=build, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and len(list(folder.glob("*/rows-*"))) == 7


def test_skipped_updates_of_fp16_do_not_count(monkeypatch):
    """PyTorch's gradient scaler skips updates with infinite gradients: the learning rate waits for the next one."""
    Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    inner = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1 + step))
    accelerator = SimpleNamespace(
        process_index=0,
        backward=lambda loss: scaler.scale(loss).backward(),
        clip_grad_norm_=lambda parameters, norm: torch.nn.utils.clip_grad_norm_(parameters, norm),
    )
    state = TrainingState(accelerator, model, model, None, optimizer, schedule, Progress())
    factors = iter([1.0, float("inf"), float("inf"), 1.0, *[float("inf")] * MAX_SKIPPED])

    def objective(unet: torch.nn.Module, batch: dict) -> torch.Tensor:
        return unet(torch.ones(1, 2)).flatten() * next(factors)

    rates, options, metrics = [], LoopOptions(10, max_grad_norm=0), RunningMetrics()
    for _ in range(4):
        train_step(state, objective, iter([{"rows": ["r"]}]), options, metrics, lambda batch: None)
        rates.append(schedule.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.5, 1 / 3] and metrics.num_skipped == 2
    with pytest.raises(InputError, match=f"last {MAX_SKIPPED} steps overflow in fp16.*--mixed_precision bf16"):
        for _ in range(MAX_SKIPPED):
            train_step(state, objective, iter([{"rows": ["r"]}]), options, metrics, lambda batch: None)


def test_settings_that_change_the_model_are_part_of_a_run(tiny_base, tiny_editor, pairs, tmp_path, capsys):
    """Another VAE or precision would continue a run with other latents."""
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *PARTS)
    assert train([*flags, "--max_train_steps=2"]) == 0
    resume = [*flags, "--resume_from_checkpoint=latest", f"--pretrained_vae_model_name_or_path={tiny_editor}"]
    with pytest.raises(SystemExit):
        train(resume)
    assert "vae: the checkpoint has None, this command" in capsys.readouterr().err


def test_snr_gamma_with_zero_terminal_snr_warns(tiny_base, pairs, tmp_path):
    flags = ("--snr_gamma=5", "--rescale_betas_zero_snr", "--prediction_type=v_prediction", "--dry_run", *PARTS)
    finished = training_flags(tiny_base, pairs, tmp_path / "out", *flags)
    from tests.mistakes import run_here

    assert "--snr_gamma gives the last timestep" in run_here(finished, train)[1]
