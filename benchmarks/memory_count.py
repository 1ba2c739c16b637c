"""Counts the memory of a training step: real modules and shapes, fake tensors, every allocation is tracked."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# The functions of a UNet that autocast computes in float32 on CUDA, but not on the CPU.
FLOAT32_ON_CUDA = (F.group_norm, F.layer_norm)
FLOAT32_BYTES = 4
UPDATE_COPIES = 3  # assumed: float32 temporaries of one parameter during its update


@dataclass(frozen=True)
class StepCount:
    """Bytes beyond the weights.

    saved: tensors that autograd keeps for the backward pass. gradients: of all trained parameters. peak: the maximum,
    of which peak_gradients are gradients. bare_peak: the maximum without complete gradients. fused_peak: the same if
    each parameter is updated as soon as its gradient is complete.
    """

    saved: int
    gradients: int
    peak: int
    peak_gradients: int
    bare_peak: int
    fused_peak: int


@contextmanager
def like_cuda() -> Iterator[None]:
    """Make the CPU's kernels and autocast save what CUDA's do: norms in float32, attention without an (L, L) matrix.

    It replaces functions, because dispatch modes are disabled while the backward pass recomputes checkpointed blocks.
    """
    replaced = {function.__name__: _in_float32(function) for function in FLOAT32_ON_CUDA}
    with ExitStack() as stack:
        for name, function in (replaced | {"scaled_dot_product_attention": _flash_attention}).items():
            stack.enter_context(patch.object(F, name, function))
        yield


def _in_float32(function: Callable) -> Callable:
    """Call a function with float32 copies of its tensors, as autocast does on CUDA."""

    def call(*values: object, **named: object) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            values = tuple(_widen(value) for value in values)
            named = {name: _widen(value) for name, value in named.items()}
        return function(*values, **named)

    return call


def _widen(value: object) -> object:
    return value.float() if torch.is_tensor(value) else value


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    """Saves query, key, value, output and one number per row, as on CUDA. (B, heads, L, D), without masks."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


class AllocationTracker(TorchDispatchMode):
    """Tracks every storage that an operation allocates until it is freed."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_gradients = self.bare_peak = self.update_peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._track(value.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def forget(_: weakref.ref) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_gradients = self.live, self.gradients
        self.bare_peak = max(self.bare_peak, self.live - self.gradients)

    def note_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Call this when the gradient of a parameter is complete."""
        update = FLOAT32_BYTES * UPDATE_COPIES * parameter.numel()
        self.update_peak = max(self.update_peak, self.live - self.gradients + update)
        self.gradients += parameter.grad.untyped_storage().nbytes()


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters excluded."""

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._sizes: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []  # keeps their addresses from being reused while counting

    @property
    def total(self) -> int:
        return sum(self._sizes.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the operations inside the context save."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self._held.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded and storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._held.append(storage)
        return tensor


def count_saved(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes saved by one forward pass. `forward` must return the loss; there is no backward pass."""
    saved = SavedBytes([*model.parameters(), *model.buffers()])
    with saved.counting():
        loss = forward()
    assert loss.requires_grad
    return saved.total


def count_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> StepCount:
    """Count a forward and a backward pass, with fake tensors or real ones on the CPU."""
    fixed = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved, tracker = SavedBytes(fixed), AllocationTracker(fixed)
    with ExitStack() as stack:
        for parameter in trained:
            stack.callback(parameter.register_post_accumulate_grad_hook(tracker.note_gradient).remove)
        stack.enter_context(tracker)
        with saved.counting():
            loss = forward()
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return StepCount(
        saved.total,
        tracker.gradients,
        tracker.peak,
        tracker.peak_gradients,
        tracker.bare_peak,
        max(tracker.bare_peak, tracker.update_peak),
    )


def count_peak(model: torch.nn.Module, call: Callable[[], torch.Tensor]) -> int:
    """Peak bytes, without the weights, during a call without gradients."""
    tracker = AllocationTracker([*model.parameters(), *model.buffers()])
    with torch.no_grad(), tracker:
        call()
    return tracker.peak
