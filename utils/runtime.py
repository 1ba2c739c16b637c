"""What a run needs from the machine: device, dtype, trackers, signals. Checked before any model is loaded."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, parse_flag_from_env

from utils.errors import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# How long processes wait for each other while one downloads a model, encodes prompts or writes a checkpoint: PyTorch's
# own ten minutes would end the run.
WAITING = timedelta(hours=4)
AMPERE = (8, 0)  # compute capability from which GPUs have TF32
UNSUPPORTED = ("Megatron_LM", "Parallelism_Config")
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml", "trackio": "trackio"}


def choose_device(device: str = "auto", dtype: str | None = None, rank: int | None = None) -> tuple[str, torch.dtype]:
    """The device ("auto": the first available of cuda, mps, cpu) and dtype (fp32, fp16, bf16; None: fp16 on cuda only).

    rank: of one of several workers on this machine, which share its GPUs in turn if `device` is "cuda" or "auto".
    Raises InputError for a device that this machine does not have or a dtype that the device does not support.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    available = [kind for kind, count in counts.items() if count]
    if device == "auto":
        device = available[0]
    kind, _, index = device.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= counts.get(kind, 0):
        raise InputError(f"--device {device} is not available; this machine has {', '.join(available)}")
    dtype = dtype or ("fp16" if kind == "cuda" else "fp32")
    if kind == "cpu" and dtype == "fp16":
        raise InputError("--dtype fp16 does not work on the CPU: use fp32 or bf16")
    if device == "cuda" and rank is not None:
        device = f"cuda:{rank % counts['cuda']}"
    return device, DTYPES[dtype]


@dataclass(frozen=True)
class MachineOptions:
    """Flags about the machine and the trackers."""

    mixed_precision: str | None = None
    allow_tf32: bool = False
    no_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    report_to: str = "tensorboard"
    output_dir: str = "instruct-pix2pix-model"
    logging_dir: str = "logs"


def start_accelerator(options: MachineOptions, needs_cpu_group: bool = False) -> Accelerator:
    """The accelerator of the run. Raises InputError with all flags that this machine does not support.

    needs_cpu_group: the processes exchange tensors in CPU memory, too, not only on their GPUs.
    """
    problems = _find_sharding() + _find_machine_problems(options) + _find_tracker_problems(options.report_to)
    if problems:
        raise InputError.from_problems(problems)
    output_dir = Path(options.output_dir)
    # Started by torchrun without a GPU, accelerate would otherwise make N runs of one process each.
    is_cpu_group = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    backend = "cuda:nccl,cpu:gloo" if needs_cpu_group and torch.cuda.is_available() else None
    accelerator = Accelerator(
        cpu=is_cpu_group,
        mixed_precision=options.mixed_precision,
        log_with=_choose_trackers(options.report_to),
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / options.logging_dir)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(backend=backend, timeout=WAITING),
        ],
    )
    accelerator.gradient_accumulation_steps = 1  # accelerate's own setting would divide the loss once more
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= AMPERE and not options.no_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def _find_sharding() -> list[str]:
    """A line for each way of sharding that `accelerate launch` was configured for and that is not supported.

    Read from its environment, because on the CPU accelerate would ignore them, and train without saying so.
    """
    given = [name for name in UNSUPPORTED if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")]
    return [
        f"accelerate is set to {name.replace('_', ' ')}, which this script does not support: give --config_file "
        "configs/multi_gpu.yaml or configs/fsdp2.yaml"
        for name in given
    ]


def _find_machine_problems(options: MachineOptions) -> list[str]:
    """Flags that this machine does not support; one sentence each, which says what to change."""
    problems, has_gpu = [], torch.cuda.is_available()
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        problems.append(f"accelerate is set to {precision}; this script supports no (float32), fp16 and bf16")
    if precision == "fp16" and not has_gpu:
        problems.append(
            "--mixed_precision fp16, of this script or of accelerate, needs a GPU, and this machine has no GPU: "
            "use --mixed_precision=no in both places, or bf16 if the processor supports it"
        )
    if precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported():
        problems.append("--mixed_precision bf16 is not supported by this GPU: use --mixed_precision=fp16")
    if options.enable_xformers_memory_efficient_attention and (reason := _xformers_problem(has_gpu)):
        problems.append(
            f"--enable_xformers_memory_efficient_attention: {reason}: drop the flag to use PyTorch's own "
            "memory-efficient attention"
        )
    if options.allow_tf32 and not has_gpu:
        problems.append("--allow_tf32 needs a GPU, and this machine has no GPU: drop the flag")
    if options.allow_tf32 and options.no_tf32:
        problems.append("--allow_tf32, which is the default, and --no_tf32 exclude each other: drop one of them")
    return problems


def _xformers_problem(has_gpu: bool) -> str | None:
    """Why xformers' attention cannot be used here; None if it can."""
    if not has_gpu:
        return "this machine has no GPU"
    if not _is_installed("xformers"):
        return "xformers is not installed (pip install -r requirements.txt)"
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns about extensions that attention does not need
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 40, device="cuda", dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        name = type(error).__name__
        return f"this build of xformers has no attention for this GPU and PyTorch {torch.__version__} ({name})"
    return None


def _find_tracker_problems(report_to: str) -> list[str]:
    """Whether the tracker's package is missing, or its account neither logged in nor in offline mode."""
    if report_to in ("all", "none"):
        return []
    if not _is_installed(TRACKER_PACKAGES[report_to]):
        return [f"--report_to {report_to} needs its package: pip install {TRACKER_PACKAGES[report_to]}"]
    if report_to == "wandb" and (reason := _wandb_problem()):
        return [f"--report_to wandb: {reason}: run `wandb login` or set WANDB_MODE=offline"]
    if report_to == "comet_ml" and not (os.environ.get("COMET_API_KEY") or (Path.home() / ".comet.config").exists()):
        return ["--report_to comet_ml: there is no API key: set COMET_API_KEY or run `comet login`"]
    return []


def _wandb_problem() -> str | None:
    """Why wandb cannot log, checked with its server without a prompt; None if it can, is offline or is disabled."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return None
    try:
        return None if wandb.login(prompt=False) else "you are not logged in"
    except wandb.errors.Error as error:
        return str(error).rstrip(".")


def _choose_trackers(report_to: str) -> list[str] | None:
    """accelerate's `log_with`; for "all", the trackers that are installed and need no login."""
    if report_to == "none":
        return None
    if report_to != "all":
        return [report_to]
    return [name for name in TRACKER_PACKAGES if not _find_tracker_problems(name)]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peak_process_memory() -> int:
    """The largest memory of this process so far in bytes; 0 on systems that do not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of the container or Slurm job that it is in.

    root: of the file system, for tests.
    """
    import psutil

    available = psutil.virtual_memory().available
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return available  # not Linux
    for controllers, group in groups:
        if controllers == "":  # cgroup v2; in a container the group's own folder may be the mounted one
            names, base = ("memory.max", "memory.current", "inactive_file"), root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = base / group.strip("/")
        available = min(available, *(_left_in_group(folder, *names) for folder in (own, *own.parents, base)))
    return max(0, available)


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> float:
    """Bytes up to the limit of a group; infinite where it has none."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        values = [int((folder / name).read_text()) for name in (limit, used)]
    except (OSError, ValueError):  # "max", or no such group
        return float("inf")
    return values[0] - values[1] + int(stat.get(reclaimable, 0))


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen models (VAE, text encoder): 16 bits in mixed precision, as they need no gradients."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def vae_dtype(precision: str | None, is_sdxl: bool, default: torch.dtype) -> torch.dtype:
    """The dtype of the VAE: that of --vae_precision; else float32 for SDXL, whose own VAE overflows in fp16."""
    return DTYPES.get(precision, torch.float32 if is_sdxl else default)


@dataclass
class StopSignal:
    """Records SIGTERM or SIGINT, so that training can finish the current step; a second signal stops at once."""

    received: signal.Signals | None = None
    _previous: dict = field(default_factory=dict)

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame: object = None) -> None:
        """Record a signal that this process or, in a distributed run, another process received."""
        self.received = signal.Signals(number)
        message = f"{self.received.name} received: finishing this step, then saving a checkpoint"
        print(message, file=sys.stderr, flush=True)
        self.__exit__()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells do: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + int(self.received or 0)
