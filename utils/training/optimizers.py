"""Optimizers and learning-rate schedules."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.optimization import get_scheduler

from utils.training.ema import local_part
from utils.training.memory_saving import FusedBackward, stochastic_adamw

CHANGEABLE = ("initial_lr", "betas", "weight_decay", "eps")  # of a parameter group


@dataclass(frozen=True)
class OptimizationOptions:
    """The fields are flags.

    use_8bit_adam: same as `optimizer="adamw8bit"`. Adafactor ignores adam_beta1, adam_beta2 and adam_epsilon.
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
        """One of the choices of --optimizer."""
        return "adamw8bit" if self.use_8bit_adam and self.optimizer == "adamw" else self.optimizer

    @property
    def optimizer_flag(self) -> str:
        """The flag that chose the optimizer, for messages."""
        return "--use_8bit_adam" if self.optimizer_name != self.optimizer else f"--optimizer {self.optimizer}"

    @property
    def has_averaged_weights(self) -> bool:
        """Whether the optimizer averages the weights itself; see `averaged_weights`."""
        return self.optimizer_name == "schedulefree_adamw"


# ---- the optimizer --------------------------------------------------------------------------------------------------


def make_optimizer(
    parameters: list[torch.nn.Parameter], options: OptimizationOptions, samples_per_step: int
) -> torch.optim.Optimizer:
    """The optimizer for any list of parameters.

    samples_per_step: accumulation x batch size x processes, the factor of `scale_lr`.
    """
    lr = options.learning_rate * (samples_per_step if options.scale_lr else 1)
    make = partial(_make_unfused, options=options, lr=lr)
    return FusedBackward(parameters, make) if options.fused_backward else make(parameters)


def _make_unfused(
    parameters: list[torch.nn.Parameter], options: OptimizationOptions, lr: float
) -> torch.optim.Optimizer:
    name, weight_decay = options.optimizer_name, options.adam_weight_decay
    adam = dict(
        lr=lr, betas=(options.adam_beta1, options.adam_beta2), weight_decay=weight_decay, eps=options.adam_epsilon
    )
    if options.weights_dtype == "bf16":
        return stochastic_adamw(is_8bit=name == "adamw8bit")(parameters, **adam)
    if name == "adamw":
        has_fused_kernel = parameters[0].device.type in ("cuda", "cpu")
        return torch.optim.AdamW(parameters, fused=has_fused_kernel, **adam)
    if name in ("adamw8bit", "paged_adamw8bit"):
        import bitsandbytes

        # Paged: the state moves to CPU memory when the GPU's is full.
        is_paged = name == "paged_adamw8bit"
        return (bitsandbytes.optim.PagedAdamW8bit if is_paged else bitsandbytes.optim.AdamW8bit)(parameters, **adam)
    if name == "adafactor":  # of transformers: PyTorch's always scales the updates by the size of the weights
        from transformers.optimization import Adafactor

        scaled = options.adafactor_scale_parameter
        adafactor = dict(relative_step=False, warmup_init=False, scale_parameter=scaled)
        return Adafactor(parameters, lr=lr, weight_decay=weight_decay, **adafactor)
    if name == "prodigy":
        return _make_prodigy(parameters, options, adam)
    from schedulefree import AdamWScheduleFree

    warmup = options.lr_warmup_steps if options.lr_scheduler == "constant_with_warmup" else 0
    optimizer = AdamWScheduleFree(parameters, warmup_steps=warmup, **adam)
    optimizer.train()
    return optimizer


def _make_prodigy(
    parameters: list[torch.nn.Parameter], options: OptimizationOptions, adam: dict
) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints a line about weight decay
        return Prodigy(
            parameters,
            beta3=options.prodigy_beta3,
            d_coef=options.prodigy_d_coef,
            use_bias_correction=options.prodigy_use_bias_correction,
            safeguard_warmup=options.prodigy_safeguard_warmup,
            **adam,
        )


def restore_paging(optimizer: torch.optim.Optimizer) -> None:
    """Move the loaded state of a paged optimizer to paged memory again: bitsandbytes loads it into the GPU's."""
    for single in optimizer.inner if isinstance(optimizer, FusedBackward) else [optimizer]:
        for parameter, values in single.state.items() if getattr(single, "is_paged", False) else ():
            for name in ("state1", "state2"):
                stored = values.get(name)
                if stored is not None and not getattr(stored, "is_paged", False):
                    values[name] = single.get_state_buffer(parameter, dtype=stored.dtype)
                    values[name].copy_(stored)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context the parameters are the averaged ones, if the optimizer averages them (schedulefree).

    The training weights are copied (once their memory), because computing them back from the averaged ones would not
    give the same bits. optimizer: may be wrapped by accelerate.
    """
    groups = optimizer.param_groups
    if not groups[0].get("train_mode", False):
        yield
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    training_weights = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, training_weights, strict=True):
                parameter.copy_(value)


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of the optimizer's state, including the nested tensors of 8-bit optimizers."""
    return _count_bytes(optimizer.state_dict()["state"])


def _count_bytes(value: object) -> int:
    if isinstance(value, dict):
        return sum(_count_bytes(inner) for inner in value.values())
    if not torch.is_tensor(value):
        return 0
    value = local_part(value)
    if hasattr(value, "__tensor_flatten__"):  # torchao's tensor subclasses
        return sum(_count_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def apply_changed_settings(
    optimizer: torch.optim.Optimizer, fresh: list[dict], lr_schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """Give a loaded optimizer and schedule this command's settings (`--allow_changed`); their state stays.

    fresh: the parameter groups before the checkpoint was loaded.
    """
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: value for name, value in new.items() if name in CHANGEABLE and name in group})
    lr_schedule.base_lrs = [group["initial_lr"] for group in fresh]
    rates = [
        base * factor(lr_schedule.last_epoch)
        for base, factor in zip(lr_schedule.base_lrs, lr_schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_schedule._last_lr = rates


# ---- the learning rate ----------------------------------------------------------------------------------------------


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizationOptions, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over optimizer steps.

    Unlike diffusers, the schedule is not given to accelerate: it is stepped once per optimizer step, so that its length
    does not depend on accumulation and the number of processes.
    """
    # schedulefree has its own warm-up, which its average depends on.
    name = "constant" if options.has_averaged_weights else options.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=max_train_steps)
