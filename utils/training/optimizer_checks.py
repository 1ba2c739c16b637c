"""Which optimizers, precisions, schedules and ways of updating go together."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

from utils.errors import InputError
from utils.training.optimizers import OptimizationOptions

PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "paged_adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree_adamw": "schedulefree",
}
LOWEST_PRODIGY_RATE = 0.1


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


def find_optimizer_problems(
    options: OptimizationOptions,
    *,
    max_grad_norm: float,
    gradient_accumulation_steps: int,
    use_ema: bool,
    has_adapter: bool,
    mixed_precision: str | None,
    num_processes: int,
    has_gpu: bool,
) -> list[str]:
    """Every combination that cannot work: one sentence each, saying what was given, what is allowed and what to do.

    max_grad_norm: 0 means no clipping. has_adapter: whether an adapter is trained instead of the UNet.
    mixed_precision: "fp16", "bf16", "no" or None, as resolved between the flag and accelerate's own setting.
    """
    problems = _find_package_problems(options)
    if options.use_8bit_adam and options.optimizer not in ("adamw", "adamw8bit"):
        problems.append(
            f"--use_8bit_adam stands for --optimizer adamw8bit, and --optimizer {options.optimizer} was given too: "
            "drop one of the two"
        )
    if options.optimizer_name == "paged_adamw8bit" and not has_gpu:
        problems.append(
            "--optimizer paged_adamw8bit moves its state between the GPU's memory and the machine's, and this machine "
            "has no GPU: use --optimizer adamw8bit"
        )
    problems += _find_rate_problems(options, use_ema)
    if options.weights_dtype == "bf16":
        problems += _find_bf16_problems(options, has_adapter, mixed_precision)
    if options.fused_backward:
        problems += _find_fused_problems(
            options, max_grad_norm, gradient_accumulation_steps, mixed_precision, num_processes
        )
    return problems


def _find_package_problems(options: OptimizationOptions) -> list[str]:
    """What is not installed, and flags of an optimizer that was not chosen."""
    name, problems = options.optimizer_name, []
    needs = {options.optimizer_flag: PACKAGES.get(name)}
    if options.weights_dtype == "bf16":
        needs = {"--weights_dtype bf16": "torchao"}  # which has an 8-bit AdamW of its own
    for flag, package in needs.items():
        if package and importlib.util.find_spec(package) is None:
            problems.append(f"{flag} needs {package}: pip install {package}, or drop the flag")
    for field in fields(options):
        owner = field.name.split("_")[0]
        if owner in ("prodigy", "adafactor") and owner != name and getattr(options, field.name) != field.default:
            problems.append(
                f"--{field.name} is a setting of --optimizer {owner}, and the optimizer is {name}: drop the flag, or "
                f"use --optimizer {owner}"
            )
    return problems


def _find_rate_problems(options: OptimizationOptions, use_ema: bool) -> list[str]:
    """Of the optimizers that find their learning rate, or replace its schedule, by themselves."""
    problems = []
    if options.optimizer_name == "prodigy":
        if options.learning_rate < LOWEST_PRODIGY_RATE:
            problems.append(
                f"--optimizer prodigy finds the learning rate itself and multiplies it by --learning_rate, which is "
                f"{options.learning_rate:g} and must be at least {LOWEST_PRODIGY_RATE:g}: give --learning_rate 1"
            )
        if options.scale_lr:
            problems.append("--optimizer prodigy finds the learning rate itself: drop --scale_lr")
    if options.has_averaged_weights:
        if options.lr_scheduler not in ("constant", "constant_with_warmup"):
            problems.append(
                f"--optimizer schedulefree_adamw needs no schedule, and --lr_scheduler is {options.lr_scheduler}: it "
                "must be constant or constant_with_warmup"
            )
        if use_ema:
            problems.append("--optimizer schedulefree_adamw averages the weights itself: drop --use_ema")
        if options.adam_beta1 == 0:
            problems.append(
                "--optimizer schedulefree_adamw computes the averaged weights with --adam_beta1, which is 0 and must "
                "be above: 0.9 is usual"
            )
    return problems


def _find_bf16_problems(options: OptimizationOptions, has_adapter: bool, mixed_precision: str | None) -> list[str]:
    """Of weights in 16 bits."""
    problems = []
    if options.optimizer_name not in ("adamw", "adamw8bit"):
        problems.append(
            f"--weights_dtype bf16 needs an optimizer that rounds stochastically, and {options.optimizer_flag} does "
            "not: use --optimizer adamw or adamw8bit, or --weights_dtype fp32"
        )
    if has_adapter:
        problems.append(
            "--weights_dtype bf16 concerns the training of the whole UNet, and an adapter is trained: drop the flag, "
            "the adapter's few weights stay in float32"
        )
    if mixed_precision != "bf16":
        problems.append(
            f"--weights_dtype bf16 needs --mixed_precision bf16, and the precision is {mixed_precision or 'no'}: give "
            "both flags, or neither"
        )
    return problems


def _find_fused_problems(
    options: OptimizationOptions,
    max_grad_norm: float,
    gradient_accumulation_steps: int,
    mixed_precision: str | None,
    num_processes: int,
) -> list[str]:
    """Of what needs more than one gradient at a time."""
    reason = "--fused_backward has one gradient at a time"
    problems = []
    if gradient_accumulation_steps > 1:
        problems.append(
            f"{reason} and cannot add up those of several batches, and --gradient_accumulation_steps is "
            f"{gradient_accumulation_steps}: it must be 1, or drop --fused_backward"
        )
    if max_grad_norm:
        problems.append(
            f"{reason}, and clipping needs the norm of all of them; --max_grad_norm is {max_grad_norm:g}: give "
            "--max_grad_norm 0, which means no clipping, or drop --fused_backward"
        )
    if options.optimizer_name == "prodigy":
        problems.append(
            f"{reason}, and --optimizer prodigy computes its step size from all of them: use another optimizer, or "
            "drop --fused_backward"
        )
    if mixed_precision == "fp16":
        problems.append(
            f"{reason}, and the loss scaling of fp16 looks at all of them before the update: use --mixed_precision "
            "bf16 or no, or drop --fused_backward"
        )
    if num_processes > 1:
        problems.append(
            f"{reason}, which is used before the processes have exchanged theirs, and there are {num_processes} "
            "processes: start one, or drop --fused_backward"
        )
    return problems
