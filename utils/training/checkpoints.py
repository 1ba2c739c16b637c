"""Checkpoints, each either complete or absent.

checkpoint-N/
  unet/, unet_ema/      diffusers folders: `UNet2DConditionModel.from_pretrained("checkpoint-500/unet_ema")`, or for an
                        adapter `pipeline.load_lora_weights("checkpoint-500/unet_ema")`
  training_state.pt     optimizer, learning-rate schedule, gradient scaler
  shards/               of a sharded run: UNet, EMA and optimizer state, in place of the above (`sharding.py`)
  progress.json         `Progress`, and the size and checksum of every file above
"""

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.serialization import config as serialization_config

from utils.atomic_files import atomic_folder, flush_to_disk, remove_path
from utils.digests import DigestedFile, Fingerprint, fingerprint_files
from utils.errors import InputError
from utils.models.adapters import has_adapter, read_adapter, save_adapter
from utils.weight_files import load_weights, save_weights

logger = logging.getLogger(__name__)
TRAINING_STATE = "training_state.pt"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
Weights = dict[str, torch.Tensor]  # by the names of the UNet's parameters


@dataclass
class Progress:
    """How far a run has come.

    identity: settings that must not change when the run is resumed (dataset, seed, batch size, ...), by flag.
    """

    global_step: int = 0
    draws: int = 0  # samples used by all processes together; the stream of samples continues here
    seed: int = 0
    identity: dict = field(default_factory=dict)
    validated_step: int = 0
    best_loss: float | None = None
    evaluated_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)  # by the metric of --save_best
    bad_rows: list[list[str]] = field(default_factory=list)
    changes: list[list] = field(default_factory=list)  # of --allow_changed: step, setting, before, after


# ---- the trained weights of a UNet: all parameters, or those of its adapter -----------------------------------------


def trained_weights(unet: UNet2DConditionModel) -> Weights:
    """The parameters that training changes; not copies."""
    return {name: value.detach() for name, value in unet.named_parameters() if value.requires_grad}


def save_trained(folder: Path, unet: UNet2DConditionModel, weights: Weights | None = None) -> dict[str, Fingerprint]:
    """Write what stock diffusers loads: a UNet folder, or an adapter in LoRA format.

    weights: values to write instead of the UNet's own, such as the EMA. Returns the fingerprints of the large files.
    """
    if has_adapter(unet):
        save_adapter(folder, unet, weights)
        return {}
    return save_weights(folder, unet, unet.state_dict() | (weights or {}))


def read_trained(folder: Path, unet: UNet2DConditionModel) -> Weights:
    """Read what `save_trained` wrote, bit-identical. Raises `InputError` for the weights of another model."""
    if has_adapter(unet):
        return read_adapter(folder, unet)
    stored, expected = load_weights(folder), unet.state_dict()
    if {name: value.shape for name, value in stored.items()} != {n: v.shape for n, v in expected.items()}:
        raise InputError(
            f"{folder} does not fit the model of this command; give the --pretrained_model_name_or_path that the run "
            "was started with"
        )
    return stored


@torch.no_grad()
def put_weights(unet: UNet2DConditionModel, weights: Weights) -> None:
    """Copy values into the UNet's parameters of the same names, whose devices and dtypes stay the same."""
    parameters = dict(unet.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


# ---- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: Path,
    progress: Progress,
    models: dict[str, Callable[[Path], dict[str, Fingerprint]]],
    training_state: dict,
    limit: int | None,
) -> Path:
    """Write `checkpoint-<global_step>` as `new_checkpoint` does.

    models: folder name -> function that writes the model into the folder, and returns the fingerprints of files whose
    digest it knows. training_state: passed to `torch.save`.
    """
    known: dict[str, Fingerprint] = {}
    with new_checkpoint(output_dir, progress, limit, known) as folder:
        for name, save in models.items():
            known |= {f"{name}/{file}": value for file, value in save(folder / name).items()}
        known[TRAINING_STATE] = save_state(training_state, folder / TRAINING_STATE)
    return output_dir / f"checkpoint-{progress.global_step}"


@contextmanager
def new_checkpoint(
    output_dir: Path, progress: Progress, limit: int | None, known: dict[str, Fingerprint] | None = None
) -> Iterator[Path]:
    """An empty folder that becomes `checkpoint-<global_step>` at the end; then the oldest ones above `limit` go.

    known: filled by the caller with fingerprints that were taken while writing; other files are read again. Raises
    `InputError` when it cannot be written (full disk); existing checkpoints stay complete.
    """
    path = output_dir / f"checkpoint-{progress.global_step}"
    existing = list_checkpoints(output_dir)
    advice = f"resume from {existing[-1].name} with --resume_from_checkpoint latest" if existing else "start again"
    with atomic_folder(path, advice) as unfinished:
        yield unfinished
        names, known = [str(file.relative_to(unfinished)) for file in _files_in(unfinished)], known or {}
        files = known | fingerprint_files(unfinished, [name for name in names if name not in known])
        content = asdict(progress) | {"files": files}
        (unfinished / "progress.json").write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=1))
        for file in [*_files_in(unfinished), unfinished]:
            flush_to_disk(file)
        remove_path(path)
        unfinished.rename(path)
        flush_to_disk(output_dir)
    if limit:
        for old in list_checkpoints(output_dir)[:-limit]:
            remove_path(old)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def save_state(state: dict, path: Path) -> Fingerprint:
    """torch.save without the CRC-32 of its archive, which takes as long as writing; returns the file's fingerprint."""
    before = serialization_config.save.compute_crc32
    serialization_config.save.compute_crc32 = False
    try:
        with DigestedFile(path) as file:
            torch.save(state, file)
    finally:
        serialization_config.save.compute_crc32 = before
    return file.fingerprint()


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


# Settings that --allow_changed lets differ: they change how the weights go on, not what a step or a row is.
CHANGEABLE = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "adam_weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "conditioning_dropout_prob", "snr_gamma", "noise_offset"),
    *("ema_decay", "lora_dropout", "random_flip"),
)


# ---- resuming -------------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else 1 << 62


def find_damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or damaged; None if the checkpoint is complete."""
    try:
        content = json.loads((checkpoint / "progress.json").read_text())
        is_intact = content.pop("checksum") == _checksum(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "progress.json is missing or unreadable"
    if not is_intact:
        return "progress.json is damaged"
    if missing := [name for name in content["files"] if not (checkpoint / name).is_file()]:
        return f"{missing[0]} is missing"
    is_old = any(isinstance(checksum, int) for _, checksum in content["files"].values())  # with CRC-32
    found = fingerprint_files(checkpoint, content["files"], is_old)
    return next((f"{name} is damaged" for name, stored in content["files"].items() if found[name] != stored), None)


def describe_checkpoint(checkpoint: Path) -> str:
    """A digest of a checkpoint's content, "" where there is none: `progress.json` has the checksum of every file."""
    try:
        return hashlib.sha256((checkpoint / "progress.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def choose_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint to resume from. name: 'latest' (None if there is none yet), a name in `output_dir`, or a path.

    A damaged checkpoint is replaced by the newest complete one before it, with a warning. Raises `InputError` when the
    named one does not exist, or when checkpoints exist but none is complete.
    """
    existing = list_checkpoints(output_dir)
    if name == "latest":
        candidates = existing[::-1]
        if not candidates:
            return None
    else:
        named = next((path for path in (output_dir / name, Path(name)) if path.is_dir()), None)
        if named is None:
            names = ", ".join(path.name for path in existing) or "none"
            raise InputError(f"--resume_from_checkpoint {name} does not exist; checkpoints in {output_dir}: {names}")
        older = [path for path in list_checkpoints(named.parent) if _step(path) < _step(named)]
        candidates = [named, *older[::-1]]
    reports = []
    for candidate in candidates:
        damage = find_damage(candidate)
        if damage is None:
            for report in reports:
                logger.warning("%s; resuming from %s instead", report, candidate.name)
            return candidate
        reports.append(f"{candidate} is incomplete: {damage}")
    reasons = "; ".join(reports)
    raise InputError(f"--resume_from_checkpoint {name}: there is no complete checkpoint ({reasons}); drop the flag")


def read_progress(checkpoint: Path) -> Progress:
    """The progress of a complete checkpoint."""
    stored = json.loads((checkpoint / "progress.json").read_text())
    return Progress(**{name: value for name, value in stored.items() if name not in ("files", "checksum")})


def check_same_run(stored: Progress, identity: dict, allowed: Collection[str] = ()) -> dict[str, tuple]:
    """Refuse to resume with other settings, except `allowed` ones. Raises `InputError` with every difference.

    Returns the allowed differences: name -> (value of the checkpoint, value of this command).
    """
    if never := [name for name in allowed if name not in CHANGEABLE]:
        raise InputError(
            f"--allow_changed {' '.join(never)}: not a setting that may change during a run; these may: "
            f"{', '.join(CHANGEABLE)}"
        )
    different = {
        name: (stored.identity[name], value)
        for name, value in identity.items()
        if stored.identity.get(name, value) != value  # older versions did not record every setting
    }
    refused = {name: values for name, values in different.items() if name not in allowed}
    if refused:
        described = [
            f"{name}: the checkpoint has {old!r}, this command {new!r}" for name, (old, new) in refused.items()
        ]
        allowable = [name for name in refused if name in CHANGEABLE]
        advice = f"Use the same values, or another --output_dir{', or' if allowable else ''}"
        if allowable:
            advice += f" --allow_changed {' '.join(allowable)} to continue with the new ones"
        raise InputError(
            f"--resume_from_checkpoint: the checkpoint belongs to a run with other settings. {'; '.join(described)}. "
            f"{advice}"
        )
    return different


def load_training_state(checkpoint: Path) -> dict:
    """The `training_state` that `save_checkpoint` wrote; tensors on the CPU, read from the file when they are used.

    The file is mapped copy-on-write: what changes the tensors does not change the checkpoint.
    """
    return torch.load(checkpoint / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)
