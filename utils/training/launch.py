"""What `accelerate launch` leaves undone, put right before anything heavy is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from utils.errors import InputError
from utils.quiet import quiet_libraries


def prepare_process(argv: list[str] | None) -> None:
    """Call first in a training script, once the flags are known to be good. `argv` is None in a process of its own."""
    follow_the_launcher()
    start_cpu_processes(argv)
    quiet_libraries()


def follow_the_launcher() -> None:
    """Ask Linux to send this process SIGTERM when `accelerate launch` dies.

    The launcher passes no signal on: killed alone, it would leave the training running unseen. This way its end
    reaches us as a SIGTERM, and a checkpoint is written.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def start_cpu_processes(argv: list[str] | None) -> None:
    """Become the several CPU processes that `accelerate launch --cpu --num_processes N` was asked for.

    Without MPI, accelerate 1.15 sets their rendezvous address and starts a single process. That one becomes torchrun
    here, which starts the N. Does nothing when they have been started, or when there is to be one only.
    Raises `InputError` where N stands in a configuration file, from which it cannot be told here.
    """
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    has_ranks = any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if argv is not None or not is_cpu or has_ranks or "MASTER_ADDR" not in os.environ:
        return
    count = _num_processes_of(_command_line_of(os.getppid()))
    if count is None:
        raise InputError(
            "accelerate was asked for several processes without a GPU, and starts one: give their number as "
            "`accelerate launch --cpu --num_processes N`, or start with `torchrun --nproc_per_node N`"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *sys.argv]
    os.execv(sys.executable, command)


def _command_line_of(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:  # not Linux
        return []


def _num_processes_of(command: list[str]) -> int | None:
    """The value of --num_processes in a command line."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, _, value = word.replace("-", "_").partition("=")
        if flag == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return None
