"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from utils.training.fused_backward import make_fused


@dataclass(frozen=True)
class OptimizationOptions:
    """The fields are flags.

    use_8bit_adam: the former name of `optimizer="adamw8bit"`. adafactor knows no adam_beta1, adam_beta2 and
    adam_epsilon; the others know all four adam_ flags.
    """

    learning_rate: float = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    adafactor_scale_parameter: bool = False
    prodigy_d_coef: float = 1.0
    prodigy_beta3: float | None = None
    prodigy_use_bias_correction: bool = True
    prodigy_safeguard_warmup: bool = True
    weights_dtype: str = "fp32"
    fused_backward: bool = False

    @property
    def optimizer_name(self) -> str:
        """One of `MAKERS`."""
        return "adamw8bit" if self.use_8bit_adam and self.optimizer == "adamw" else self.optimizer

    @property
    def optimizer_flag(self) -> str:
        """How the user asked for the optimizer."""
        return "--use_8bit_adam" if self.optimizer_name != self.optimizer else f"--optimizer {self.optimizer}"

    @property
    def has_averaged_weights(self) -> bool:
        """Whether the optimizer averages the weights itself; see `averaged_weights`."""
        return self.optimizer_name == "schedulefree_adamw"


# ---- the optimizer --------------------------------------------------------------------------------------------------


def make_optimizer(
    parameters: list[torch.nn.Parameter], options: OptimizationOptions, samples_per_step: int
) -> torch.optim.Optimizer:
    """The optimizer that `options` name, over any list of parameters.

    samples_per_step: accumulation x batch size x processes, by which `scale_lr` multiplies the learning rate.
    """
    settings = dict(
        lr=options.learning_rate * (samples_per_step if options.scale_lr else 1),
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )
    make: Callable = MAKERS[options.optimizer_name]
    if options.weights_dtype == "bf16":
        make = _make_stochastic
    if options.fused_backward:
        return make_fused(parameters, lambda one: make(one, options, settings))
    return make(parameters, options, settings)


def _make_adamw(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    """Fused where PyTorch has it for the device."""
    return torch.optim.AdamW(parameters, fused=parameters[0].device.type in ("cuda", "cpu"), **settings)


def _make_stochastic(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    from utils.training.stochastic_rounding import StochasticAdamW, StochasticAdamW8bit

    kinds = {"adamw": StochasticAdamW, "adamw8bit": StochasticAdamW8bit}
    return kinds[options.optimizer_name](parameters, **settings)


def _make_adamw_8bit(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    """Paged: the state moves to the machine's memory where the GPU's is full."""
    import bitsandbytes

    # Its first step undoes channels_last; undone before, the first step of a resumed run has the same kernels.
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    is_paged = options.optimizer_name == "paged_adamw8bit"
    kind = bitsandbytes.optim.PagedAdamW8bit if is_paged else bitsandbytes.optim.AdamW8bit
    return kind(parameters, **settings)


def _make_adafactor(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    """That of transformers: PyTorch's always scales the rate by the size of the weights, kohya's recipe does not."""
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        relative_step=False,
        warmup_init=False,
        scale_parameter=options.adafactor_scale_parameter,
    )


def _make_prodigy(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints a line about weight decay
        return Prodigy(
            parameters,
            beta3=options.prodigy_beta3,
            d_coef=options.prodigy_d_coef,
            use_bias_correction=options.prodigy_use_bias_correction,
            safeguard_warmup=options.prodigy_safeguard_warmup,
            **settings,
        )


def _make_schedulefree(parameters: list, options: OptimizationOptions, settings: dict) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    warmup = options.lr_warmup_steps if options.lr_scheduler == "constant_with_warmup" else 0
    optimizer = AdamWScheduleFree(parameters, warmup_steps=warmup, **settings)
    optimizer.train()
    return optimizer


MAKERS = {
    "adamw": _make_adamw,
    "adamw8bit": _make_adamw_8bit,
    "paged_adamw8bit": _make_adamw_8bit,
    "adafactor": _make_adafactor,
    "prodigy": _make_prodigy,
    "schedulefree_adamw": _make_schedulefree,
}


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters are the averaged ones within, where the optimizer averages them (schedulefree); else nothing.

    optimizer: as made here, also wrapped by accelerate. The weights of training are put by (once their memory), since
    computing them back from the averaged ones would not give the same bits.
    """
    groups = optimizer.param_groups
    if not groups[0].get("train_mode", False):
        yield
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The memory of the optimizer's state; counts what 8-bit optimizers nest and wrap."""
    return sum(_count_bytes(values) for values in optimizer.state_dict()["state"].values())


def _count_bytes(value: object) -> int:
    if isinstance(value, dict):
        return sum(_count_bytes(inner) for inner in value.values())
    if not torch.is_tensor(value):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # torchao's: a tensor of tensors
        return sum(_count_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


# ---- the learning rate ----------------------------------------------------------------------------------------------


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizationOptions, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over optimizer steps.

    Unlike diffusers, the schedule is stepped once per optimizer step by us and is not given to accelerate, so that its
    length means the same for any accumulation and any number of processes.
    """
    # schedulefree warms up by itself: its average must know how far the warm-up has come.
    name = "constant" if options.has_averaged_weights else options.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=max_train_steps)
