"""Three ways to train with less memory: checkpoint chosen blocks, update during the backward pass, weights in bf16."""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import chain

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from utils.errors import InputError

logger = logging.getLogger(__name__)
ALL_BLOCKS = "all"


# ---- gradient checkpointing of chosen blocks ------------------------------------------------------------------------


def list_blocks(unet_config: dict) -> list[str]:
    """The names of a UNet's blocks in the order of the forward pass, from its configuration alone."""
    down, up = (len(unet_config.get(f"{side}_block_types") or ("",) * 4) for side in ("down", "up"))  # 4 by default
    middle = ["mid_block"] if unet_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") else []
    return [*(f"down_blocks.{n}" for n in range(down)), *middle, *(f"up_blocks.{n}" for n in range(up))]


def find_block_problems(blocks: list[str], unet_config: dict) -> list[str]:
    """Names in --gradient_checkpointing_blocks that the UNet does not have; one sentence each."""
    names = list_blocks(unet_config)
    return [
        f"--gradient_checkpointing_blocks: this UNet has no block {name!r}; its blocks are {', '.join(names)}, and "
        f"{ALL_BLOCKS!r} means all of them"
        for name in dict.fromkeys(blocks)
        if name not in (*names, ALL_BLOCKS)
    ]


def checkpoint_blocks(unet: UNet2DConditionModel, blocks: list[str] | None) -> None:
    """Enable gradient checkpointing in these blocks; None and "all" mean every block.

    Losses and gradients stay the same. Raises `InputError` for a name that the UNet does not have.
    """
    if blocks is not None and (problems := find_block_problems(blocks, unet.config)):
        raise InputError.from_problems(problems)
    # Only an adapter's dropout draws random numbers, whose state CUDA graphs cannot save and restore.
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in unet.modules())
    recompute = partial(torch_checkpoint, use_reentrant=False, preserve_rng_state=has_dropout)
    unet.enable_gradient_checkpointing(recompute)  # in all blocks; disable it in the others
    chosen = list_blocks(unet.config) if blocks is None or ALL_BLOCKS in blocks else blocks
    for name in set(list_blocks(unet.config)) - set(chosen):
        for module in unet.get_submodule(name).modules():  # the block and the transformers inside have a switch each
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


# ---- the update during the backward pass ----------------------------------------------------------------------------


class FusedBackward(torch.optim.Optimizer):
    """One inner optimizer per parameter, which steps as soon as its gradient is complete and frees it.

    `param_groups` are those of the inner optimizers, so that a learning-rate schedule changes all of them. A parameter
    that is used several times has one hook, which autograd calls after summing its gradients.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        make_inner: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.inner = [make_inner([parameter]) for parameter in parameters]
        self._norms: dict[int, torch.Tensor] = {}  # index of the parameter -> norm of its gradient, on the device
        self._is_step_complete = False
        super().__init__([{"params": [parameter]} for parameter in parameters], dict(self.inner[0].defaults))
        self._share_groups()
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._make_hook(index))

    def _share_groups(self) -> None:
        self.param_groups = [optimizer.param_groups[0] for optimizer in self.inner]

    def _make_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def update(parameter: torch.Tensor) -> None:
            if self._is_step_complete:
                self._norms, self._is_step_complete = {}, False
            # Before the step: some optimizers overwrite the gradient.
            self._norms[index] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self.inner[index].step()
            parameter.grad = None

        return update

    def grad_norm(self) -> torch.Tensor:
        """The norm of all gradients of the last backward pass: a float32 scalar on the device. No host sync."""
        return torch.linalg.vector_norm(torch.stack([norm for _, norm in sorted(self._norms.items())]))

    def step(self, closure: None = None) -> None:
        """Only marks the end of the step: the weights are already updated."""
        self._is_step_complete = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: each gradient is freed after its use."""

    def train(self) -> None:
        """Switch optimizers that average the weights to the training weights."""
        for optimizer in self.inner:
            optimizer.train()

    def eval(self) -> None:
        """Switch optimizers that average the weights to the averaged weights."""
        for optimizer in self.inner:
            optimizer.eval()

    def state_dict(self) -> dict:
        """The state of an optimizer with one group per parameter."""
        content = {"state": {}, "param_groups": []}
        for index, optimizer in enumerate(self.inner):
            inner = optimizer.state_dict()
            content["param_groups"].append(inner["param_groups"][0] | {"params": [index]})
            if 0 in inner["state"]:
                content["state"][index] = inner["state"][0]
        return content

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises `ValueError` when the state has another number of parameters."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        if len(groups) != len(self.inner):
            raise ValueError(f"the state has {len(groups)} parameters, but the optimizer has {len(self.inner)}")
        for index, (optimizer, group) in enumerate(zip(self.inner, groups, strict=True)):
            inner_state = {0: state[index]} if index in state else {}
            optimizer.load_state_dict({"state": inner_state, "param_groups": [group | {"params": [0]}]})
        self._share_groups()


# ---- weights in bfloat16 --------------------------------------------------------------------------------------------


class StochasticRounding(torch.optim.Optimizer):
    """What our loop needs beyond torchao's low-bit AdamW, whose updates of bfloat16 weights are rounded stochastically.

    A bfloat16 has 8 significant bits: rounding to the nearest loses a typical update (1e-4 of the weight). Rounded up
    with a probability equal to the lost part, it is right on average. Draws come from torch's generator of the device.
    """

    def __init__(self, params: list[torch.nn.Parameter], **settings: object) -> None:
        super().__init__(params, bf16_stochastic_round=True, **settings)

    def add_param_group(self, param_group: dict) -> None:
        """Keep the learning rate a number for schedules, logs and checkpoints; torchao makes it a tensor."""
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update, during which the learning rates are tensors, as torchao requires."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with _compile_stance(self.param_groups[0]["params"][0].device.type):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """Keep an unquantized second moment in float32, where torchao would use bfloat16.

        It shrinks by (1 - beta2) = 0.1 % a step, less than half the last bit of a bfloat16, so there it could only
        grow. The 8-bit state has a float32 scale per block and is not affected.
        """
        buffer = super()._new_buffer(p, signed)
        return buffer.float() if not signed and type(buffer) is torch.Tensor else buffer

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but without casting the second moment to the dtype of the weights."""
        super().load_state_dict(state_dict)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, index in zip(parameters, indices, strict=True):
            moment = state_dict["state"].get(index, {}).get("exp_avg_sq")
            if type(moment) is torch.Tensor:
                self.state[parameter]["exp_avg_sq"] = moment.to(parameter.device, copy=True)


@cache
def stochastic_adamw(is_8bit: bool) -> type[StochasticRounding]:
    """AdamW for bfloat16 weights. Imports torchao, which only `--weights_dtype bf16` needs.

    Memory per weight with its gradient: 10 bytes (the first moment has 2, the second 4), or 6 bytes with 8-bit moments
    (in blocks of 256; tensors below 4096 elements are not quantized).
    """
    from torchao.optim import AdamW8bit, _AdamW

    return type("StochasticAdamW", (StochasticRounding, AdamW8bit if is_8bit else _AdamW), {})


def _compile_stance(device: str) -> AbstractContextManager:
    """torchao compiles the update for each weight shape; on a CPU that takes minutes and saves seconds."""
    return nullcontext() if device == "cuda" and _can_compile() else torch.compiler.set_stance("force_eager")


@cache
def _can_compile() -> bool:
    """Whether Triton and a C compiler are installed; warns once if not."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if importlib.util.find_spec("triton") and any(name and shutil.which(name) for name in compilers):
        # torch warns that compiled code for torchao's 8-bit tensors is cached under a less stable name.
        warnings.filterwarnings("ignore", message="OptimState8bit does not implement")
        return True
    logger.warning(
        "Triton or a C compiler is missing, so the update of bf16 weights is not compiled: the steps are slower, the "
        "results the same (install gcc)"
    )
    return False
