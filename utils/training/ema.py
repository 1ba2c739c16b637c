"""The exponential moving average (EMA) of the trained weights, on their device or on the CPU in a thread."""

import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

CHUNK_BYTES = 64 << 20  # 16-bit weights are converted to float32 in chunks of this size


class MovingAverage:
    """Float32 moving average of the parameters that require gradients: all of them, or those of an adapter.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that a short run does not average its start. With an
    interval of N steps, it is updated after every N-th one, with that decay to the power of N.

    device: None keeps the average on the model's device. "cpu" saves GPU memory: an update copies the weights to the
    CPU, in order with the GPU's other work, and a thread averages the copies while training continues.
    """

    def __init__(self, model: torch.nn.Module, decay: float, device: str | None = None, interval: int = 1) -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"device is {device!r}; it must be None (the model's device) or 'cpu'")
        self.decay, self.interval = decay, interval
        live = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        self._weights = {
            name: value.to(device=device or value.device, dtype=torch.float32, copy=True)
            for name, value in live.items()
        }
        self._worker = _AveragingThread(list(live.values())) if device == "cpu" else None
        self._model, self._parameters = None, []  # of the last update: walking a UNet's modules takes milliseconds

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """ema += (1 - decay) (weights - ema), after optimizer step `step`, from 1 on, if it is due.

        On the CPU it returns while the copies are still under way; it waits only for the previous update.
        """
        if step % self.interval:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step)) ** self.interval
        live, averages = self._kept_live(model), list(self._weights.values())
        if self._worker:
            self._worker.start(averages, live, weight)
        else:
            _lerp(averages, live, weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        self._wait()
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy averaged weights by name. Raises KeyError for a missing name, and then changes nothing."""
        self._wait()
        for average, value in zip(self._weights.values(), [state[name] for name in self._weights], strict=True):
            average.copy_(value)

    @contextmanager
    def swapped_into(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights; afterwards its own, bit-identical.

        Its own weights are kept on the device of the average, so an average on the CPU takes no GPU memory here.
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
        """End the thread; the average can still be read."""
        self._parameters.clear()
        if self._worker:
            self._worker.close()

    def _kept_live(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """The weights in the order of the average, from parameters that are looked up once for each model."""
        if not self._parameters or self._model() is not model:
            parameters = dict(model.named_parameters())
            found = [parameters[name] for name in self._weights]
            if any(hasattr(value, "to_local") for value in found):  # a divided model may replace its parameters
                return [value.detach() for value in found]
            self._model, self._parameters = weakref.ref(model), found
        return [value.detach() for value in self._parameters]

    def _live(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self._weights}

    def _wait(self) -> None:
        if self._worker:
            self._worker.wait()


class _AveragingThread:
    """Averages in a thread, from copies of the weights in CPU memory."""

    def __init__(self, live: list[torch.Tensor]) -> None:
        # Pinned, so that the GPU copies asynchronously.
        self._copies = [torch.empty_like(value, device="cpu", pin_memory=value.is_cuda) for value in live]
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="moving-average")
        self._pending: Future | None = None

    def start(self, averages: list[torch.Tensor], live: list[torch.Tensor], weight: float) -> None:
        """Copy the current weights and average them later. Waits for the previous update, which reads the copies.

        The copies run on the current stream, before the optimizer's next step.
        """
        self.wait()
        for copy, value in zip(self._copies, live, strict=True):
            copy.copy_(value, non_blocking=True)
        events = [_record_event(device) for device in {value.device for value in live if value.is_cuda}]
        self._pending = self._executor.submit(self._average, events, averages, weight)

    def _average(self, events: list[torch.cuda.Event], averages: list[torch.Tensor], weight: float) -> None:
        for event in events:
            event.synchronize()
        with torch.no_grad():  # a setting of each thread
            _lerp(averages, self._copies, weight)

    def wait(self) -> None:
        """Wait for the running update. Raises its exception at every call: the average is incomplete then."""
        if self._pending:
            self._pending.result()

    def close(self) -> None:
        """End the thread and free the copies."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._copies.clear()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is divided between processes (a DTensor); other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _record_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # busy waiting would use a CPU core
    event.record(torch.cuda.current_stream(device))
    return event


def _lerp(averages: list[torch.Tensor], live: list[torch.Tensor], weight: float) -> None:
    """averages += weight (live - averages), in float32."""
    for start, stop in _chunks(live):
        values = [local_part(value).float() for value in live[start:stop]]  # does not copy float32
        torch._foreach_lerp_([local_part(average) for average in averages[start:stop]], values, weight)


def _chunks(live: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Index ranges (start, stop) with at most `CHUNK_BYTES` of float32 copies, or one tensor; one range for float32."""
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
