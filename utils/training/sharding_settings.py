"""What accelerate's configuration says about sharding: FSDP2, or DeepSpeed's ZeRO-2 and ZeRO-3, which mean the same.

ZeRO-3 keeps a part of every weight in each process, like FSDP2. ZeRO-2 keeps whole weights from the forward to the
backward pass, like FSDP2 with `reshard_after_forward: false`. So both kinds of configuration run on PyTorch's FSDP2
(docs/decisions/0009-sharding.md).
"""

import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import str_to_bool

from utils.errors import InputError
from utils.training.settings import Settings

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # gathered one at a time
LAUNCH_PLAIN = "give --config_file configs/multi_gpu.yaml"


@dataclass(frozen=True)
class Sharding:
    """How the UNet is divided between the processes.

    reshard_after_forward: free the gathered weights of a block after its forward pass, and gather them again for its
    backward pass. offload: keep weights, gradients and optimizer state in CPU memory. blocks: class names of the
    modules that are gathered at a time. checkpoint_activations: same as --gradient_checkpointing.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    blocks: tuple[str, ...] = BLOCKS
    checkpoint_activations: bool = False


def take_sharding(environment: MutableMapping[str, str], settings: Settings) -> Sharding | None:
    """The sharding that `accelerate launch` was configured for, or None.

    Removes the variables that would make accelerate do it itself: it ignores them on the CPU, needs the package
    deepspeed, and its checkpoints are not atomic. Raises `InputError` for what is not supported, every item named.
    """
    kinds = {"FSDP": _read_fsdp, "DEEPSPEED": _read_deepspeed}
    chosen = [kind for kind in kinds if _is_true(environment.pop(f"ACCELERATE_USE_{kind}", ""))]
    if not chosen:
        return None
    problems: list[str] = []
    sharding = kinds[chosen[0]](environment, problems)
    precision = settings.machine.mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    problems += _find_flag_problems(settings, precision)
    if problems:
        raise InputError.from_problems(problems)
    return sharding


def _read_fsdp(environment: MutableMapping[str, str], problems: list[str]) -> Sharding:
    def value(name: str) -> str:
        return environment.get(f"FSDP_{name}", "").lower()

    if value("VERSION") not in ("", "2"):
        problems.append("accelerate is set to fsdp_version 1, which PyTorch has replaced: set fsdp_version: 2")
    blocks, policy = BLOCKS, value("AUTO_WRAP_POLICY")
    if policy == "no_wrap":
        blocks = ()
    elif policy == "size_based_wrap":
        problems.append("fsdp_auto_wrap_policy SIZE_BASED_WRAP is not supported: set TRANSFORMER_BASED_WRAP")
    elif names := environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        blocks = tuple(name.strip() for name in names.split(","))
    if value("STATE_DICT_TYPE") not in ("", "sharded_state_dict"):
        problems.append("fsdp_state_dict_type must be SHARDED_STATE_DICT; the published pipeline is always whole")
    if _is_true(value("ACTIVATION_CHECKPOINTING_OFFLOAD")):
        problems.append("fsdp_activation_checkpointing_offload is not supported: set it to false")
    return Sharding(
        reshard_after_forward=value("RESHARD_AFTER_FORWARD") not in ("false", "shard_grad_op", "no_reshard"),
        offload=_is_true(value("OFFLOAD_PARAMS")),
        blocks=blocks,
        checkpoint_activations=_is_true(value("ACTIVATION_CHECKPOINTING")),
    )


def _read_deepspeed(environment: MutableMapping[str, str], problems: list[str]) -> Sharding:
    prefix = "ACCELERATE_DEEPSPEED_"
    stage = environment.get(f"{prefix}ZERO_STAGE", "2")
    devices = {environment.get(f"{prefix}OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")}
    if path := environment.get(f"{prefix}CONFIG_FILE"):
        stage, devices = _read_deepspeed_file(Path(path), problems)
    clipping = environment.pop("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        problems.append(f"DeepSpeed's gradient_clipping is {clipping}: remove it, and use --max_grad_norm")
    if stage not in ("2", "3"):
        problems.append(f"DeepSpeed's zero_stage is {stage}; this script supports 2 and 3, or {LAUNCH_PLAIN}")
    if unknown := devices - {"none", "cpu"}:
        problems.append(f"DeepSpeed's offload device {', '.join(sorted(unknown))} is not supported: set cpu or none")
    return Sharding(reshard_after_forward=stage == "3", offload="cpu" in devices)


def _read_deepspeed_file(path: Path, problems: list[str]) -> tuple[str, set[str]]:
    """(stage, devices of the offloaded parts) of DeepSpeed's own JSON file."""
    try:
        content = json.loads(path.read_text())
        zero = content.pop("zero_optimization", {})
        offloads = {zero.get(f"offload_{what}", {}).get("device", "none") for what in ("param", "optimizer")}
        owned = [name for name, value in content.items() if not _leaves_open(value)]
        stage = str(zero.get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"DeepSpeed's deepspeed_config_file {path} cannot be read: {error}")
        return "2", {"none"}
    if owned:
        problems.append(
            f"{path} sets {', '.join(owned)}, for which this script has flags (--train_batch_size, --mixed_precision, "
            '--max_grad_norm, --optimizer, --lr_scheduler ...): remove them there, or set "auto"'
        )
    return stage, {device or "none" for device in offloads}


def _leaves_open(value: object) -> bool:
    """Whether a setting of DeepSpeed's leaves the choice to the script, or only concerns its log."""
    if isinstance(value, dict):
        return all(inner in ("auto", False) for inner in value.values())
    return value in ("auto", False, None)


def _find_flag_problems(settings: Settings, precision: str) -> list[str]:
    """Flags that need whole weights in every process; one sentence each."""
    optimizer = settings.optimization
    refused = {
        "--lora_rank and --init_adapter": settings.adapter.is_used and "an adapter is small: every process keeps it",
        f"{optimizer.optimizer_flag}": optimizer.optimizer_name != "adamw" and "only adamw is sharded",
        "--weights_dtype bf16": optimizer.weights_dtype != "fp32" and "sharded weights have 32 bits",
        "--fused_backward": optimizer.fused_backward and "gradients are divided between the processes",
        "--ema_device": settings.run.ema_device and "the average is divided like the weights",
        "--mixed_precision fp16": precision == "fp16" and "use bf16",
    }
    return [
        f"{flag} does not work with sharding (FSDP2, DeepSpeed): {reason}. Drop it, or {LAUNCH_PLAIN}"
        for flag, reason in refused.items()
        if reason
    ]


def _is_true(text: str) -> bool:
    try:
        return bool(text) and bool(str_to_bool(text))
    except ValueError:
        return False
