"""The output folder and the checkpoint of a run, which all its processes must see."""

import socket
from pathlib import Path

from accelerate import Accelerator

from utils.atomic_files import make_writable, remove_unfinished
from utils.errors import InputError
from utils.training.agreement import run_everywhere, run_on_main
from utils.training.checkpoints import choose_checkpoint, describe_checkpoint, list_checkpoints
from utils.training.settings import Settings


def prepare_output_dir(settings: Settings) -> None:
    """Create the folder, check that it is writable, and remove what a killed run left unfinished."""
    make_writable(settings.output_dir, "--output_dir")
    if settings.machine.report_to in ("tensorboard", "all"):
        make_writable(settings.output_dir / settings.machine.logging_dir, "--logging_dir")
    if settings.data.latent_cache_dir:
        make_writable(Path(settings.data.latent_cache_dir), "--latent_cache_dir")
    if settings.run.profile:
        make_writable(Path(settings.run.profile), "--profile")
    remove_unfinished(settings.output_dir)


def agree_on_checkpoint(accelerator: Accelerator, settings: Settings) -> Path | None:
    """The checkpoint that every process resumes from. Raises `InputError` where one does not have the same.

    The main process chooses and verifies it. Otherwise, machines without a common folder would start at different
    steps, and average the gradients of different models.
    """

    def choose() -> tuple[str, str] | None:
        checkpoint = find_checkpoint(settings)
        if checkpoint is None:
            return None
        is_own = checkpoint.parent.resolve() == settings.output_dir.resolve()
        return checkpoint.name if is_own else str(checkpoint.absolute()), describe_checkpoint(checkpoint)

    def verify() -> Path:
        checkpoint = settings.output_dir / chosen[0]  # an absolute path stays as it is
        if describe_checkpoint(checkpoint) != chosen[1]:
            raise InputError(
                f"--resume_from_checkpoint: {socket.gethostname()} does not have {checkpoint} as the first machine has "
                f"it: all machines must share the folder --output_dir {settings.output_dir}"
            )
        return checkpoint

    chosen = run_on_main(accelerator, choose)
    return None if chosen is None else run_everywhere(accelerator, verify)


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint to resume from. Raises `InputError` if a new run would mix its checkpoints with existing ones."""
    if settings.run.resume_from_checkpoint:
        return choose_checkpoint(settings.output_dir, settings.run.resume_from_checkpoint)
    if list_checkpoints(settings.output_dir) and not settings.run.dry_run:
        raise InputError(
            f"--output_dir {settings.output_dir} contains checkpoints of an earlier run; resume it with "
            "--resume_from_checkpoint latest, or name another folder"
        )
    return None
