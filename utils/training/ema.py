"""The moving average of the trained weights: beside them on their device, or on the CPU by a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

CHUNK_BYTES = 64 << 20  # 16-bit weights are widened this many bytes at a time, not all at once


class MovingAverage:
    """Exponential moving average, in float32, of the parameters of a model that require gradients.

    A run that trains an adapter averages the adapter alone. (A UNet has no buffers.)

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its start.

    device: None keeps the average on the model's device. "cpu" keeps it in the machine's memory: an update puts copies
    into a staging area, in order with the device's other work, and a thread averages them while training goes on.
    """

    def __init__(self, model: torch.nn.Module, decay: float, device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"device is {device!r}, and it must be None (that of the model) or 'cpu'")
        self.decay = decay
        live = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        self._weights = {
            name: value.to(device=device or value.device, dtype=torch.float32, copy=True)
            for name, value in live.items()
        }
        self._worker = _Worker(list(live.values())) if device == "cpu" else None

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model's weights after optimizer step `step`, from 1 on: ema += (1 - decay) (w - ema).

        On the CPU it returns as soon as the copies are under way; it waits only for the update before.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        live, averages = list(self._live(model).values()), list(self._weights.values())
        if self._worker:
            self._worker.start(averages, live, weight)
        else:
            _move_towards(averages, live, weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the names of the parameters."""
        self._wait()
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over averaged weights, name by name. Raises KeyError for a name that is missing."""
        self._wait()
        for average, value in zip(self._weights.values(), [state[name] for name in self._weights], strict=True):
            average.copy_(value)

    @contextmanager
    def swapped_into(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context the model's weights are the averaged ones; afterwards its own, to the bit.

        Its own wait beside the average: one that lives on the CPU costs the GPU nothing here either.
        """
        self._wait()
        live = self._live(model)
        kept = {name: value.to(device=self._weights[name].device, copy=True) for name, value in live.items()}
        try:
            _overwrite(live, self._weights)
            yield
        finally:
            _overwrite(live, kept)

    def close(self) -> None:
        """Wait for the thread and end it; the average can still be read."""
        if self._worker:
            self._worker.close()

    def _live(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self._weights}

    def _wait(self) -> None:
        if self._worker:
            self._worker.wait()


class _Worker:
    """A thread that averages, and the host memory through which it gets the weights."""

    def __init__(self, live: list[torch.Tensor]) -> None:
        # Pinned, so that the GPU's copy engine writes it without the host; in the dtype of the live weights.
        self._staging = [torch.empty_like(value, device="cpu", pin_memory=value.is_cuda) for value in live]
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="moving-average")
        self._pending: Future | None = None

    def start(self, averages: list[torch.Tensor], live: list[torch.Tensor], weight: float) -> None:
        """Copy the weights as they are now, and average them later. Waits for the former update: it reads the copies.

        The copies run on the current stream, so the optimizer's next step, which comes after on it, cannot be seen.
        """
        self.wait()
        for staged, value in zip(self._staging, live, strict=True):
            staged.copy_(value, non_blocking=True)
        copied = [_record_event(device) for device in {value.device for value in live if value.is_cuda}]
        self._pending = self._executor.submit(self._average, copied, averages, weight)

    def _average(self, copied: list[torch.cuda.Event], averages: list[torch.Tensor], weight: float) -> None:
        for event in copied:
            event.synchronize()
        with torch.no_grad():  # it is a setting of each thread
            _move_towards(averages, self._staging, weight)

    def wait(self) -> None:
        """Until the average is whole. Raises what the thread raised, at every call: such an average is of no use."""
        if self._pending:
            self._pending.result()

    def close(self) -> None:
        """End the thread and let go of the staging area."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._staging.clear()


def _record_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # a spinning thread would take a core
    event.record(torch.cuda.current_stream(device))
    return event


def _move_towards(averages: list[torch.Tensor], live: list[torch.Tensor], weight: float) -> None:
    """averages += weight (live - averages), in float32."""
    for start, stop in _chunks(live):
        values = [value.float() for value in live[start:stop]]  # float32 ones are taken as they are
        torch._foreach_lerp_(averages[start:stop], values, weight)


def _chunks(live: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors (start, stop): one for all where nothing must be widened, else `CHUNK_BYTES` or one tensor."""
    start, size = 0, 0
    for index, value in enumerate(live):
        added = 0 if value.dtype == torch.float32 else 4 * value.numel()
        if size and size + added > CHUNK_BYTES:
            yield start, index
            start, size = index, 0
        size += added
    yield start, len(live)


@torch.no_grad()
def _overwrite(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
