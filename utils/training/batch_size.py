"""--auto_batch_size: the largest micro-batch that fits into the memory, with the same samples in every step."""

import logging
from contextlib import closing
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from utils.errors import InputError, is_out_of_memory
from utils.training.loop import TrainingState
from utils.training.session import TrainingSession
from utils.training.settings import Settings

logger = logging.getLogger(__name__)
STATE_BYTES = {"adamw": 8, "schedulefree_adamw": 8, "prodigy": 16, "adafactor": 1}  # of each trained weight; others: 2


def fit_batch_size(session: TrainingSession) -> TrainingSession:
    """The session with --train_batch_size divided so that a step fits, and as many more micro-batches a step.

    Tries a forward and backward pass of real samples, and changes no weight. All processes get the size that fits
    into each of them. Raises `InputError` where not even one sample fits.
    """
    settings = session.settings
    size = settings.data.train_batch_size
    fitting = next((part for part in range(size, 0, -1) if size % part == 0 and _fits_everywhere(session, part)), None)
    if fitting is None:
        raise InputError(
            "--auto_batch_size: not even one sample fits into the memory of the device; see docs/memory.md"
        )
    steps = size // fitting * settings.loop.gradient_accumulation_steps
    if session.accelerator.is_main_process:
        logger.warning("--auto_batch_size: --train_batch_size %d --gradient_accumulation_steps %d", fitting, steps)
    return replace(session, settings=_with_batch(settings, fitting, steps))


def _with_batch(settings: Settings, size: int, steps: int) -> Settings:
    data, loop = settings.data, settings.loop
    return replace(
        settings, data=replace(data, train_batch_size=size), loop=replace(loop, gradient_accumulation_steps=steps)
    )


def _fits_everywhere(session: TrainingSession, size: int) -> bool:
    return all(gather_object([_fits(session, size)]))


def _fits(session: TrainingSession, size: int) -> bool:
    """Whether a micro-batch of this size fits, beside the optimizer's state, which a first step has not made yet."""
    state, settings, is_fitting = session.state, _with_batch(session.settings, size, 1), False
    settings = replace(settings, data=replace(settings.data, dataloader_num_workers=0))
    with closing(replace(session, settings=settings).training_batches()) as batches:
        batch = next(batches)
    try:
        reserved = _reserve_state(state, settings)
        with session.accelerator.no_sync(state.unet):
            session.accelerator.backward(session.objective(state.unet, batch).mean())
        del reserved
        is_fitting = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    state.optimizer.zero_grad(set_to_none=True)
    if session.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return is_fitting


def _reserve_state(state: TrainingState, settings: Settings) -> torch.Tensor | None:
    """Memory of the size of the optimizer's state, unless it has one."""
    trained = [value for value in state.model.parameters() if value.requires_grad]
    if state.optimizer.state or not trained:
        return None
    size = STATE_BYTES.get(settings.optimization.optimizer_name, 2) * sum(value.numel() for value in trained)
    return torch.empty(size, dtype=torch.uint8, device=trained[0].device)
