"""Writes checkpoints in a thread, from a copy of the training state in CPU memory, while training continues."""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from utils.runtime import available_memory

logger = logging.getLogger(__name__)
FREE_SHARE = 0.8  # of the available memory that a copy may take


class CheckpointWriter:
    """One checkpoint at a time; an error of the last one is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future | None = None

    def submit(self, write: Callable[..., Any], *content: Any, in_background: bool) -> None:
        """write(*content), of a copy of the content in the background, if the memory suffices for the copy.

        content: nested dictionaries, lists and tuples of tensors and values. Raises what the checkpoint before raised.
        """
        self.wait()
        size = _count_bytes(content)
        if not in_background or size is None or size > FREE_SHARE * available_memory():
            write(*content)
            return
        self._running = self._thread.submit(write, *_copy(content))

    def wait(self) -> None:
        """Return when the checkpoint is on the disk. Raises the error of its writing, such as `InputError`."""
        if self._running:
            running, self._running = self._running, None
            running.result()


def _count_bytes(value: Any) -> int | None:
    """The size of all tensors; None if one has a type of its own, which may not be copied with its meaning."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if type(value) in (torch.Tensor, torch.nn.Parameter) else None
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    sizes = [_count_bytes(inner) for inner in values]
    return None if None in sizes else sum(sizes)


@torch.no_grad()
def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(inner) for inner in value)
    return copy.deepcopy(value)
