"""CUDA graphs of the UNet's forward and backward pass: recorded once for a shape, then started with one call each.

A step of SD 1.5 starts about 5,000 kernels. At small resolutions the host needs longer to start them than the GPU to
run them. A replay runs the same kernels in the same order, so the results are the same.
"""

import logging

import torch
from torch.autograd.function import once_differentiable

from utils.errors import is_out_of_memory

logger = logging.getLogger(__name__)
WARMUP_CALLS = 3  # libraries choose their kernels and allocate their workspaces, which a recording must not do
MAX_SHAPES = 32  # of one run, such as its aspect-ratio buckets; further shapes run as written


def find_obstacle(num_processes: int, is_update_fused: bool) -> str | None:
    """Why a run cannot use CUDA graphs, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if num_processes > 1:
        return "several processes share the gradients during the backward pass"
    return "--fused_backward updates the weights during the backward pass" if is_update_fused else None


class GraphedUNet(torch.nn.Module):
    """Calls a UNet; while it is trained, by CUDA graphs.

    The graphs share one memory pool: only one of them runs at a time. A shape that cannot be recorded, for example for
    want of memory, runs as written, with a warning. Gradients are put into `.grad` without autograd's hooks, so it is
    for one process, and not for updates during the backward pass.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self._trained = [value for value in unet.parameters() if value.requires_grad]
        self._anchor = torch.zeros((), device=self._trained[0].device, requires_grad=True)
        self._recordings: dict[tuple, _Recording | None] = {}
        self._are_gradients_kept = False
        self._pool = torch.cuda.graph_pool_handle()

    def forward(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """The prediction (B, C, h, w) as a tuple of one; arguments as of diffusers' UNet2DConditionModel."""
        inputs = {"sample": sample, "timestep": timesteps, "encoder_hidden_states": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        recording = self._find(inputs) if self.unet.training and torch.is_grad_enabled() else None
        if recording is None:
            return _call(self.unet, inputs)
        self._keep_gradients()
        for name, value in inputs.items():
            recording.inputs[name].copy_(value)
        return (_Replay.apply(self._anchor, recording, self._trained),)

    def _find(self, inputs: dict[str, torch.Tensor]) -> "_Recording | None":
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs) if len(self._recordings) < MAX_SHAPES else None
        return self._recordings[key]

    def _record(self, inputs: dict[str, torch.Tensor]) -> "_Recording | None":
        try:
            with torch.random.fork_rng([torch.cuda.current_device()]):  # the dropout of an adapter draws from it
                return _Recording(self.unet, inputs, self._trained, self._pool)
        except RuntimeError as error:
            reason = "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
        torch.cuda.empty_cache()
        logger.warning("CUDA graphs are not used for batches of %s: %s", tuple(inputs["sample"].shape), reason)
        return None

    def _keep_gradients(self) -> None:
        """Move the gradients of an earlier micro-batch out of the memory that a replay overwrites."""
        have_gradients = any(value.grad is not None for value in self._trained)
        if have_gradients and not self._are_gradients_kept:
            for value in self._trained:
                value.grad = None if value.grad is None else value.grad.clone()
        self._are_gradients_kept = have_gradients


class _Recording:
    """The graphs of one shape, and the tensors at fixed addresses that they read and write."""

    def __init__(
        self, unet: torch.nn.Module, inputs: dict[str, torch.Tensor], trained: list[torch.Tensor], pool: tuple
    ) -> None:
        self.inputs = {name: value.detach().clone() for name, value in inputs.items()}
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_CALLS):
                output = _call(unet, self.inputs)[0]
                torch.autograd.grad(output, trained, torch.ones_like(output), allow_unused=True)
                del output
        main.wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Loader threads may pin memory meanwhile.
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"):
            output = _call(unet, self.inputs)[0]
        self.output_gradient = torch.empty_like(output)
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
            self.gradients = torch.autograd.grad(output, trained, self.output_gradient, allow_unused=True)
        self.output = output.detach()


class _Replay(torch.autograd.Function):
    """anchor: a scalar that requires a gradient, so that autograd calls `backward`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        anchor: torch.Tensor,
        recording: _Recording,
        trained: list[torch.Tensor],
    ) -> torch.Tensor:
        ctx.recording, ctx.trained = recording, trained
        recording.forward.replay()
        return recording.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, output_gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.recording.output_gradient.copy_(output_gradient)
        ctx.recording.backward.replay()
        pairs = [
            (value, new) for value, new in zip(ctx.trained, ctx.recording.gradients, strict=True) if new is not None
        ]
        if earlier := [(value.grad, new) for value, new in pairs if value.grad is not None]:
            torch._foreach_add_(*map(list, zip(*earlier, strict=True)))
        for value, new in pairs:
            if value.grad is None:
                value.grad = new
        return None, None, None


def _call(unet: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
    added = {name: value for name, value in inputs.items() if name in ("text_embeds", "time_ids")}
    return unet(
        inputs["sample"],
        inputs["timestep"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        added_cond_kwargs=added or None,
        return_dict=False,
    )
