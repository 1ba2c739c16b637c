"""Training scripts as processes, the way their users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
WEIGHTS, ADAPTER = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def training_flags(base: Path, pairs: Path, output_dir: Path, *flags: str) -> list[str]:
    """Flags of a short run on tiny data; later flags win over earlier ones."""
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--dataset_name={pairs}",
        f"--output_dir={output_dir}",
        "--resolution=32",
        "--train_batch_size=2",
        "--max_train_steps=4",
        "--seed=3",
        "--max_bad_rows=0.5",
        *flags,
    ]


def start(script: str, flags: list[str], launcher: tuple[str, ...] = (), log: Path | None = None) -> subprocess.Popen:
    """Start a script of the repository, by itself or through `accelerate launch` with the words of `launcher`."""
    accelerate = (
        [str(Path(sys.executable).with_name("accelerate")), "launch", *launcher] if launcher else [sys.executable]
    )
    output = log.open("wb") if log else subprocess.PIPE
    return subprocess.Popen(
        [*accelerate, script, *flags], cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
    )


def run(script: str, flags: list[str], launcher: tuple[str, ...] = ()) -> str:
    """Run a script to its end and return what it printed. Fails unless it exits with 0."""
    process = start(script, flags, launcher)
    printed = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, printed
    return printed


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in the folder of a model or of an adapter (metadata in a file's head has no order)."""
    file = next(folder / name for name in (WEIGHTS, ADAPTER) if (folder / name).exists())
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in load_file(file).items() if value.ndim}


def losses_of(output_dir: Path) -> list[tuple]:
    """(step, loss, gradient norm, held-out loss) of each log entry: what must not depend on interruptions."""
    entries = [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]
    return [
        tuple(entry.get(name) for name in ("step", "loss", "grad_norm", "lr", "held_out_loss")) for entry in entries
    ]
