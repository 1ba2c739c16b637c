"""Counting the memory of a training step: real modules and shapes, tensors without data, every allocation followed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What CUDA's autocast computes in float32 and the CPU's does not, among the functions that a UNet calls.
FLOAT32_ON_CUDA = (F.group_norm, F.layer_norm)
FLOAT32_BYTES = 4
UPDATE_COPIES = 3  # assumed: float32 temporaries of one parameter while an optimizer works on it


@dataclass(frozen=True)
class StepCount:
    """Bytes beyond the weights.

    saved: what the graph holds between forward and backward pass. gradients: of all trained parameters.
    peak: the most alive at a time, gradients among it: peak_gradients of them. bare_peak: the most alive beside the
    gradients that are whole. fused_peak: the same when each parameter is updated as soon as its gradient is whole.
    """

    saved: int
    gradients: int
    peak: int
    peak_gradients: int
    bare_peak: int
    fused_peak: int


@contextmanager
def like_cuda() -> Iterator[None]:
    """Let the CPU's kernels and autocast keep what CUDA's do: norms in float32, attention without an (L, L) matrix.

    By replacing the functions: a mode of torch is off while the backward pass computes checkpointed blocks again.
    """
    replaced = {function.__name__: _in_float32(function) for function in FLOAT32_ON_CUDA}
    with ExitStack() as stack:
        for name, function in (replaced | {"scaled_dot_product_attention": _flash_attention}).items():
            stack.enter_context(patch.object(F, name, function))
        yield


def _in_float32(function: Callable) -> Callable:
    """As CUDA's autocast calls a function: with float32 copies of its tensors."""

    def call(*values: object, **named: object) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            values = tuple(_widen(value) for value in values)
            named = {name: _widen(value) for name, value in named.items()}
        return function(*values, **named)

    return call


def _widen(value: object) -> object:
    return value.float() if torch.is_tensor(value) else value


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    """Keeps query, key, value, output and one number a row, as CUDA's do. (B, heads, L, D); UNets use no masks here."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


class AllocationTracker(TorchDispatchMode):
    """Follows each storage that an operation makes, from its birth to its end."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_gradients = self.bare_peak = self.update_peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
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
        """To be called when the gradient of a parameter is whole."""
        update = FLOAT32_BYTES * UPDATE_COPIES * parameter.numel()
        self.update_peak = max(self.update_peak, self.live - self.gradients + update)
        self.gradients += parameter.grad.untyped_storage().nbytes()


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters excluded."""

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._sizes: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []  # so that no address is used again while counting

    @property
    def total(self) -> int:
        return sum(self._sizes.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what the operations inside save."""
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
    """Bytes saved by one forward pass. `forward` must return the loss; nothing is computed backwards."""
    saved = SavedBytes([*model.parameters(), *model.buffers()])
    with saved.counting():
        loss = forward()
    assert loss.requires_grad
    return saved.total


def count_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> StepCount:
    """Count a forward and a backward pass. Works on fake tensors, and on real ones of the CPU too."""
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
    """The most bytes alive at a time, beyond the weights, during a call without gradients."""
    tracker = AllocationTracker([*model.parameters(), *model.buffers()])
    with torch.no_grad(), tracker:
        call()
    return tracker.peak
