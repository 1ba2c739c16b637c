"""One message for training that does not fit into the memory: the next step of the ladder in docs/memory.md."""

from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import InputError, is_out_of_memory
from utils.training.settings import Settings

WORKER_KILLED = "dataloader worker"


@contextmanager
def explaining_out_of_memory(settings: Settings) -> Iterator[None]:
    """Replace an out-of-memory error by an InputError with advice for this run."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error).lower()
        if WORKER_KILLED in message and "killed" in message:
            given = settings.data.dataloader_num_workers
            workers = "one for each core, at most 8" if given is None else given
            raise InputError(
                "a data loading process was killed, probably for want of memory: give a lower "
                f"--dataloader_num_workers (now {workers}) or --train_batch_size. Earlier checkpoints are kept"
            ) from error
        if not is_out_of_memory(error):
            raise
        advice = next_step(settings)
        raise InputError(f"out of memory: {advice} (docs/memory.md). Earlier checkpoints are kept") from error


def next_step(settings: Settings) -> str:
    """The first way to save memory that this run does not use yet, from the cheapest to the most costly."""
    data, run, adapter = settings.data, settings.run, settings.adapter
    if settings.machine.mixed_precision in (None, "no"):
        return "give --mixed_precision bf16 (or fp16 on older GPUs)"
    if not (run.gradient_checkpointing or run.gradient_checkpointing_blocks):
        return "give --gradient_checkpointing"
    if data.train_batch_size > 1:
        half, steps = data.train_batch_size // 2, 2 * settings.loop.gradient_accumulation_steps
        return f"give --train_batch_size {half} --gradient_accumulation_steps {steps}, the same samples per step"
    if run.use_ema and run.ema_device is None:
        return "give --ema_device cpu"
    if not adapter.is_used and "8bit" not in settings.optimization.optimizer_name:
        return "give --optimizer adamw8bit"
    if not adapter.is_used:
        return "train an adapter with --lora_rank 16"
    if not adapter.quantize_base:
        return "give --quantize_base nf4"
    return f"give a --resolution below {settings.geometry.resolution}"
