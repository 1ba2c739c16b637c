"""The machine that a run finds: precision, libraries, trackers, signals. Checked before anything large is loaded."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration

from utils.errors import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml", "trackio": "trackio"}


@dataclass(frozen=True)
class MachineOptions:
    """What a run asks of the machine; the fields are flags."""

    mixed_precision: str | None = None
    allow_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    report_to: str = "tensorboard"
    output_dir: str = "instruct-pix2pix-model"
    logging_dir: str = "logs"


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def find_machine_problems(options: MachineOptions) -> list[str]:
    """What this machine cannot do of what was asked; one sentence each, saying what to change."""
    problems = []
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        problems.append(f"accelerate is set to {precision}, and this script trains in no (float32), fp16 or bf16")
    has_gpu = torch.cuda.is_available()
    if precision == "fp16" and not has_gpu:
        problems.append(
            "fp16 was asked for (--mixed_precision of the script or of accelerate), and this machine has no GPU: "
            "use --mixed_precision=no in both places, or bf16 where the processor has it"
        )
    if precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported():
        problems.append("bf16 was asked for, and this GPU does not have it: use --mixed_precision=fp16")
    if options.enable_xformers_memory_efficient_attention and not (has_gpu and is_installed("xformers")):
        reason = (
            "this machine has no GPU" if not has_gpu else "xformers is not installed (see requirements-optional.txt)"
        )
        problems.append(
            f"--enable_xformers_memory_efficient_attention was given, and {reason}: drop the flag, "
            "PyTorch's own memory-efficient attention is used then"
        )
    if options.allow_tf32 and not has_gpu:
        problems.append("--allow_tf32 concerns GPUs, and this machine has none: drop the flag")
    return problems + find_tracker_problems(options.report_to)


def find_tracker_problems(report_to: str) -> list[str]:
    """Whether the tracker is installed and, for those with an account, logged in or offline."""
    if report_to in ("all", "none"):
        return []
    if not is_installed(TRACKER_PACKAGES[report_to]):
        return [f"--report_to {report_to} needs its package: pip install {TRACKER_PACKAGES[report_to]}"]
    if report_to == "wandb" and (reason := _why_wandb_refuses()):
        return [f"--report_to wandb: {reason}: run `wandb login`, or set WANDB_MODE=offline"]
    if report_to == "comet_ml" and not (os.environ.get("COMET_API_KEY") or (Path.home() / ".comet.config").exists()):
        return ["--report_to comet_ml: no key found: set COMET_API_KEY, or run `comet login`"]
    return []


def _why_wandb_refuses() -> str | None:
    """Asks the server without asking the user; None where wandb is logged in, offline or switched off."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return None
    try:
        return None if wandb.login(prompt=False) else "you are not logged in"
    except wandb.errors.Error as error:
        return str(error).rstrip(".")


def start_accelerator(options: MachineOptions) -> Accelerator:
    """The accelerator of the run. Raises `InputError` with every problem of this machine, before anything is loaded."""
    problems = find_machine_problems(options)
    if problems:
        raise InputError.from_problems(problems)
    output_dir = Path(options.output_dir)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=choose_trackers(options.report_to),
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / options.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}, which this script does not support yet: "
            "run `accelerate config` and choose multi-GPU without FSDP and DeepSpeed"
        )
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def choose_trackers(report_to: str) -> list[str] | None:
    """Names for accelerate's `log_with`; "all" stands for those installed that log in without a question."""
    if report_to == "none":
        return None
    if report_to != "all":
        return [report_to]
    return [
        name for name, package in TRACKER_PACKAGES.items() if is_installed(package) and not find_tracker_problems(name)
    ]


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen models (VAE, text encoder): 16 bits under mixed precision, they need no gradients."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


@dataclass
class StopSignal:
    """SIGTERM or SIGINT, noted so that the step in hand can be finished; a second one acts at once."""

    received: signal.Signals | None = None
    _former: dict = field(default_factory=dict)

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number)
        print(f"{self.received.name} received: finishing this step, then a checkpoint", file=sys.stderr, flush=True)
        self.__exit__()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + int(self.received or 0)


def choose_device(device: str = "auto", dtype: str | None = None, rank: int | None = None) -> tuple[str, torch.dtype]:
    """The device ("auto": the first available of cuda, mps, cpu) and dtype (fp32, fp16, bf16; None: fp16 on cuda only).

    rank: of one of several workers on this machine, which share its GPUs in turn unless `device` names one.

    Raises InputError for what this machine does not have or cannot do.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device == "auto":
        device = next(name for name, count in there.items() if count)
    kind, _, index = device.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= there.get(kind, 0):
        raise InputError(
            f"--device {device} is not available; this machine has {', '.join(k for k, n in there.items() if n)}"
        )
    dtype = dtype or ("fp16" if kind == "cuda" else "fp32")
    if kind == "cpu" and dtype == "fp16":
        raise InputError("--dtype fp16 does not work on the CPU: use fp32 or bf16")
    if device == "cuda" and rank is not None:
        device = f"cuda:{rank % there['cuda']}"
    return device, DTYPES[dtype]
