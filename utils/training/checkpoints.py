"""Checkpoints: written beside their place and renamed into it, so that a whole one stands at every moment.

checkpoint-N/
  unet/, unet_ema/      diffusers folders: `UNet2DConditionModel.from_pretrained("checkpoint-500/unet_ema")` loads them;
                        of an adapter, `pipeline.load_lora_weights("checkpoint-500/unet_ema")`
  training_state.pt     optimizer, learning-rate schedule, gradient scaler
  progress.json         where the run stands, what it runs on, and the size and checksum of every file above
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from utils.atomic_files import flush_to_disk, remove_whole, written_beside
from utils.errors import InputError

logger = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """Where a run stands.

    identity: what must be the same when the run goes on (dataset, seed, batch geometry, ...), flag -> value.
    """

    global_step: int = 0
    draws: int = 0  # samples consumed, of all processes together; the stream goes on from here
    seed: int = 0
    identity: dict = field(default_factory=dict)
    validated_step: int = 0
    best_loss: float | None = None
    bad_rows: list[list[str]] = field(default_factory=list)


def save_checkpoint(
    output_dir: Path,
    progress: Progress,
    models: dict[str, Callable[[Path], None]],
    training_state: dict,
    limit: int | None,
) -> Path:
    """Write `checkpoint-<global_step>` and then remove the oldest ones over `limit`.

    models: folder name -> what writes a model into that folder. training_state: what `torch.save` keeps.
    Raises `InputError` when it cannot be written (a full disk); what stood before stands still.
    """
    place = output_dir / f"checkpoint-{progress.global_step}"
    standing = [path.name for path in list_checkpoints(output_dir)]
    advice = f"go on from {standing[-1]} with --resume_from_checkpoint latest" if standing else "start again"
    with written_beside(place, advice) as unfinished:
        for name, save in models.items():
            save(unfinished / name)
        torch.save(training_state, unfinished / "training_state.pt")
        files = {str(path.relative_to(unfinished)): _fingerprint(path) for path in _files_below(unfinished)}
        content = asdict(progress) | {"files": files}
        (unfinished / "progress.json").write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=1))
        for path in [*_files_below(unfinished), unfinished]:
            flush_to_disk(path)
        remove_whole(place)
        unfinished.rename(place)
        flush_to_disk(output_dir)
    if limit:
        for old in list_checkpoints(output_dir)[:-limit]:
            remove_whole(old)
    return place


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was written."""
    try:
        content = json.loads((checkpoint / "progress.json").read_text())
        is_as_written = content.pop("checksum") == _checksum(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "progress.json is missing or unreadable"
    if not is_as_written:
        return "progress.json is damaged"
    for name, fingerprint in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != fingerprint:
            return f"{name} is damaged"
    return None


def choose_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from: 'latest' (None when there is none yet), a name in `output_dir`, or any path.

    A damaged one is passed over for the newest whole one before it, and a warning says so. Raises `InputError` when
    the named one does not exist, or when checkpoints exist and none is whole.
    """
    standing = list_checkpoints(output_dir)
    if wanted == "latest":
        candidates = standing[::-1]
        if not candidates:
            return None
    else:
        named = next((path for path in (output_dir / wanted, Path(wanted)) if path.is_dir()), None)
        if named is None:
            names = ", ".join(path.name for path in standing) or "none"
            raise InputError(f"--resume_from_checkpoint {wanted} does not exist; checkpoints in {output_dir}: {names}")
        older = [path for path in list_checkpoints(named.parent) if _step(path) < _step(named)]
        candidates = [named, *older[::-1]]
    reports = []
    for candidate in candidates:
        damage = find_damage(candidate)
        if damage is None:
            for report in reports:
                logger.warning("%s; going on from %s instead", report, candidate.name)
            return candidate
        reports.append(f"{candidate} is not whole: {damage}")
    raise InputError("no whole checkpoint to go on from: " + "; ".join(reports) + ". Start again without the flag")


def read_progress(checkpoint: Path) -> Progress:
    """The progress of a whole checkpoint."""
    stored = json.loads((checkpoint / "progress.json").read_text())
    stored = {name: value for name, value in stored.items() if name not in ("files", "checksum")}
    return Progress(**stored)


def check_same_run(stored: Progress, identity: dict) -> None:
    """Refuse to go on with other data, another seed or another batch geometry: each difference by name."""
    differences = [
        f"{name}: the checkpoint has {stored.identity.get(name)!r}, this command {value!r}"
        for name, value in identity.items()
        if stored.identity.get(name, value) != value  # what an older version did not record is not held against it
    ]
    if differences:
        raise InputError(
            "the checkpoint belongs to another run, so going on would not be the same training. "
            + "; ".join(differences)
            + ". Give the former values, or another --output_dir"
        )


def load_training_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` was given as `training_state`; tensors on the CPU."""
    return torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 1 << 62


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32: enough against a cut or flipped file, and quick on ten gigabytes."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return [size, checksum]


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())
