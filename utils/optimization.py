"""The optimizer and the course of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from utils.errors import InputError


@dataclass(frozen=True)
class OptimizationOptions:
    """The fields are flags."""

    learning_rate: float = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8


def check_lr_schedule(options: OptimizationOptions, max_train_steps: int) -> None:
    """Refuse a schedule that never comes to its peak, or that cannot be computed. Raises `InputError`."""
    if options.lr_scheduler != "constant" and options.lr_warmup_steps >= max_train_steps:
        raise InputError(
            f"--lr_warmup_steps is {options.lr_warmup_steps}, and it must be below the {max_train_steps} steps of "
            "the run (--max_train_steps, or the epochs): the learning rate would never be reached"
        )
    end = 1e-7  # where diffusers' polynomial schedule ends
    if options.lr_scheduler == "polynomial" and options.learning_rate <= end:
        raise InputError(
            f"--lr_scheduler polynomial falls to {end}: --learning_rate {options.learning_rate} must be above"
        )


def make_optimizer(
    parameters: list[torch.nn.Parameter], options: OptimizationOptions, samples_per_step: int
) -> torch.optim.Optimizer:
    """AdamW, fused where PyTorch has it for the device, or in 8 bits.

    samples_per_step: accumulation x batch size x processes, by which `scale_lr` multiplies the learning rate.
    """
    settings = dict(
        lr=options.learning_rate * (samples_per_step if options.scale_lr else 1),
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )
    if options.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=parameters[0].device.type in ("cuda", "cpu"), **settings)


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizationOptions, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over optimizer steps.

    Unlike diffusers, the schedule is stepped once per optimizer step by us and is not given to accelerate, so that its
    length means the same for any accumulation and any number of processes.
    """
    return get_scheduler(
        options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=max_train_steps
    )
