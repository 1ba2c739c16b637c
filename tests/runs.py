"""Training scripts as processes, as users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
BIN = Path(sys.executable).parent
ACCELERATE = (str(BIN / "accelerate"), "launch", "--cpu")
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2")
WEIGHTS, ADAPTER = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def training_flags(base: Path, pairs: Path, output_dir: Path, *flags: str) -> list[str]:
    """Flags of a short run on tiny data; later flags override earlier ones."""
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
    """Start a script of the repository directly, or with `ACCELERATE` or `TORCHRUN` as its launcher."""
    output = log.open("wb") if log else subprocess.PIPE
    command = [*(launcher or [sys.executable]), script, *flags]
    return subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)


def run(script: str, flags: list[str], launcher: tuple[str, ...] = ()) -> str:
    """Run a script and return its output. Fails unless the exit code is 0."""
    process = start(script, flags, launcher)
    printed = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, printed
    return printed


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in the folder of a model or an adapter (the order of a file's metadata may change)."""
    file = next(folder / name for name in (WEIGHTS, ADAPTER) if (folder / name).exists())
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in load_file(file).items() if value.ndim}


def losses_of(output_dir: Path) -> list[tuple]:
    """(step, loss, gradient norm, learning rate, held-out loss) of each log entry, which resuming must not change."""
    entries = [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]
    return [
        tuple(entry.get(name) for name in ("step", "loss", "grad_norm", "lr", "held_out_loss")) for entry in entries
    ]
