"""The processes that make batches: what reaches them, and what does not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.errors import InputError


class BatchLoader(DataLoader):
    """A DataLoader over whole batches whose data may answer with an `InputError`, which is raised here as it is.

    Raised inside a worker, it would reach the user wrapped in a traceback.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler | None, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else starting a loader would draw from torch's global generator
            worker_init_fn=_outlive_stop_signals,
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _identity(batch: dict) -> dict:
    return batch


def _outlive_stop_signals(_worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM reach the whole process group, but the step in hand still needs its workers.

    Only a SIGTERM that the training process itself sends, at its exit, ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_told, args=(os.getppid(),), daemon=True).start()


def _exit_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
