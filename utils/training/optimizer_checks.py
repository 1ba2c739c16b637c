"""Checks which optimizers, precisions, schedules and memory savings work together."""

import importlib.util
from collections.abc import Iterator
from dataclasses import fields

from utils.errors import InputError
from utils.training.optimizers import OptimizationOptions

PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "paged_adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree_adamw": "schedulefree",
}
MIN_PRODIGY_RATE = 0.1
POLYNOMIAL_END = 1e-7  # the last learning rate of diffusers' polynomial schedule


def check_lr_schedule(options: OptimizationOptions, max_train_steps: int) -> None:
    """Refuse a schedule that never reaches its peak or cannot be computed. Raises `InputError`."""
    if options.lr_scheduler != "constant" and options.lr_warmup_steps >= max_train_steps:
        raise InputError(
            f"--lr_warmup_steps is {options.lr_warmup_steps}; it must be below the {max_train_steps} steps of the run "
            "(--max_train_steps, or the epochs), otherwise the learning rate is never reached"
        )
    if options.lr_scheduler == "polynomial" and options.learning_rate <= POLYNOMIAL_END:
        raise InputError(
            f"--learning_rate is {options.learning_rate}; with --lr_scheduler polynomial it must be above "
            f"{POLYNOMIAL_END}, where the schedule ends"
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
    """Combinations that cannot work; one sentence each.

    max_grad_norm: 0 means no clipping. has_adapter: an adapter is trained, not the UNet.
    mixed_precision: the flag's or accelerate's: "fp16", "bf16", "no" or None.
    """
    problems = [*_optimizer_problems(options, use_ema, has_gpu)]
    if options.weights_dtype == "bf16":
        problems += _bf16_problems(options, has_adapter, mixed_precision)
    if options.fused_backward:
        problems += _fused_problems(options, max_grad_norm, gradient_accumulation_steps, mixed_precision, num_processes)
    return problems


def _optimizer_problems(options: OptimizationOptions, use_ema: bool, has_gpu: bool) -> Iterator[str]:
    name, flag = options.optimizer_name, options.optimizer_flag
    package = PACKAGES.get(name)
    if options.weights_dtype == "bf16":
        flag, package = "--weights_dtype bf16", "torchao"  # which has its own 8-bit AdamW
    if package and importlib.util.find_spec(package) is None:
        yield f"{flag} needs {package}: pip install {package}, or drop the flag"
    for field in fields(options):
        owner = field.name.split("_")[0]
        if owner in ("prodigy", "adafactor") and owner != name and getattr(options, field.name) != field.default:
            yield (
                f"--{field.name} only works with --optimizer {owner}, but the optimizer is {name}; drop the flag, or "
                f"use --optimizer {owner}"
            )
    if options.use_8bit_adam and options.optimizer not in ("adamw", "adamw8bit"):
        yield f"--use_8bit_adam means --optimizer adamw8bit, but --optimizer {name} is given too; drop one of them"
    if name == "paged_adamw8bit" and not has_gpu:
        yield "--optimizer paged_adamw8bit needs a GPU; use --optimizer adamw8bit"
    if name == "prodigy" and options.learning_rate < MIN_PRODIGY_RATE:
        yield (
            f"--learning_rate is {options.learning_rate:g}; --optimizer prodigy multiplies its own step size by it, so "
            f"it must be at least {MIN_PRODIGY_RATE:g}: give --learning_rate 1"
        )
    if name == "prodigy" and options.scale_lr:
        yield "--optimizer prodigy finds the learning rate itself; drop --scale_lr"
    if options.has_averaged_weights:
        if options.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield f"--lr_scheduler is {options.lr_scheduler}; with {flag} it must be constant or constant_with_warmup"
        if use_ema:
            yield f"{flag} averages the weights itself; drop --use_ema"
        if options.adam_beta1 == 0:
            yield f"--adam_beta1 is 0; with {flag} it must be above 0, such as 0.9"


def _bf16_problems(options: OptimizationOptions, has_adapter: bool, mixed_precision: str | None) -> Iterator[str]:
    flag = "--weights_dtype bf16"
    if options.optimizer_name not in ("adamw", "adamw8bit"):
        yield (
            f"{flag} needs stochastic rounding, which {options.optimizer_flag} does not have; use --optimizer adamw or "
            "adamw8bit, or --weights_dtype fp32"
        )
    if has_adapter:
        yield f"{flag} does not work with --lora_rank: adapters are trained in fp32; drop it"
    if mixed_precision != "bf16":
        yield f"{flag} needs --mixed_precision bf16, but it is {mixed_precision or 'no'}; give both or neither"


def _fused_problems(
    options: OptimizationOptions,
    max_grad_norm: float,
    gradient_accumulation_steps: int,
    mixed_precision: str | None,
    num_processes: int,
) -> Iterator[str]:
    """Whatever needs more than one gradient at a time."""
    flag = "--fused_backward frees each gradient at once"
    if gradient_accumulation_steps > 1:
        yield (
            f"{flag} and cannot accumulate them, but --gradient_accumulation_steps is {gradient_accumulation_steps}; "
            "give 1, or drop --fused_backward"
        )
    if max_grad_norm:
        yield (
            f"{flag}, but clipping needs the norm of all of them and --max_grad_norm is {max_grad_norm:g}; give "
            "--max_grad_norm 0 (no clipping), or drop --fused_backward"
        )
    if options.optimizer_name == "prodigy":
        yield f"{flag}, but --optimizer prodigy needs all of them; use another, or drop --fused_backward"
    if mixed_precision == "fp16":
        yield f"{flag}, but fp16 loss scaling needs all of them; use --mixed_precision bf16 or no"
    if num_processes > 1:
        yield f"{flag}, but {num_processes} processes average them; start one, or drop --fused_backward"
