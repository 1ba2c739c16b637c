"""What a training process does with the launcher that started it (`accelerate launch`, `torchrun`)."""

import os
import signal

from utils.errors import InputError
from utils.parent_process import signal_when_parent_dies
from utils.quiet import quiet_libraries


def prepare_process() -> None:
    """Call once the flags are checked. Raises `InputError` for a launch that starts too few processes."""
    follow_launcher()
    check_num_processes()
    quiet_libraries()


def follow_launcher() -> None:
    """Ask Linux to send this process SIGTERM when its launcher (`accelerate launch`, `torchrun`) dies.

    `accelerate launch` forwards no signals: if it alone is killed, the training would continue unseen. With SIGTERM
    it writes a checkpoint and stops.
    """
    is_launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if is_launched:
        signal_when_parent_dies(signal.SIGTERM)


def check_num_processes() -> None:
    """Refuse `accelerate launch --cpu --num_processes N`, which without MPI (accelerate 1.15) starts a single process.

    In that case accelerate sets a rendezvous address, but no world size.
    """
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    world_sizes = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    if is_cpu and "MASTER_ADDR" in os.environ and not world_sizes & os.environ.keys():
        raise InputError(
            "accelerate launch --cpu --num_processes N starts one process instead of N when MPI is not installed; use "
            "`torchrun --nproc_per_node N SCRIPT ...`"
        )
