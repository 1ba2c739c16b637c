"""AdamW for weights in bfloat16, on torchao's low-bit optimizers: the update rounds up or down at random.

A bfloat16 has 8 significant bits, so a usual update (1e-4 of the weight, say) is lost when it is rounded to the
nearest. Rounded up with a probability equal to the part that would be lost, it arrives in expectation.

torchao is imported here alone, and this module only where `--weights_dtype bf16` asks for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import chain

import torch
from torchao.optim import AdamW8bit, _AdamW

logger = logging.getLogger(__name__)


class StochasticRounding(torch.optim.Optimizer):
    """What torchao's optimizers lack for our loop. The draws come from torch's global generator of the device."""

    def __init__(self, params: list[torch.nn.Parameter], **settings: object) -> None:
        super().__init__(params, bf16_stochastic_round=True, **settings)

    def add_param_group(self, param_group: dict) -> None:
        """torchao makes a float32 tensor of the learning rate; schedules, logs and checkpoints want the number."""
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; the learning rates are tensors for its duration, as torchao demands."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with _compiled_or_not(self.param_groups[0]["params"][0].device.type):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """Keeps the second moment in float32 where torchao would take bfloat16.

        It shrinks by (1 - beta2) = 0.1 % a step, which is less than half the last bit of a bfloat16: it could only
        grow. The 8-bit state does not have the fault, since each of its blocks has a scale in float32.
        """
        buffer = super()._new_buffer(p, signed)
        return buffer.float() if not signed and type(buffer) is torch.Tensor else buffer

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch does, but without bringing the second moment to the dtype of the weights."""
        super().load_state_dict(state_dict)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, index in zip(parameters, indices, strict=True):
            moment = state_dict["state"].get(index, {}).get("exp_avg_sq")
            if type(moment) is torch.Tensor:
                self.state[parameter]["exp_avg_sq"] = moment.to(parameter.device, copy=True)


class StochasticAdamW(StochasticRounding, _AdamW):
    """10 bytes a weight: 2 each for weight, gradient and first moment, 4 for the second."""


class StochasticAdamW8bit(StochasticRounding, AdamW8bit):
    """6 bytes a weight: both moments have 8 bits, in blocks of 256; tensors below 4096 elements as above."""


def _compiled_or_not(device: str) -> AbstractContextManager:
    """torchao compiles the update for each shape of weight; a CPU would take minutes for what it saves in seconds."""
    return nullcontext() if device == "cuda" and _can_compile() else torch.compiler.set_stance("force_eager")


@cache
def _can_compile() -> bool:
    """Whether Triton and the C compiler that it calls are here; says so once where they are not."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if importlib.util.find_spec("triton") and any(name and shutil.which(name) for name in compilers):
        # torch warns that compiled code for torchao's 8-bit tensors is kept under a less stable name.
        warnings.filterwarnings("ignore", message="OptimState8bit does not implement")
        return True
    logger.warning(
        "no Triton or no C compiler was found, so the update of the bf16 weights is not compiled: the results are as "
        "good, the steps slower (install gcc)"
    )
    return False
