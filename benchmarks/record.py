"""The files benchmarks/results/*.json: what was measured, where and when."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def add_results(path: Path, cell: str, rows: list[dict]) -> None:
    """Replace the rows of `cell`, measured on a machine of this kind, in the file."""
    machine = describe_machine()
    more = {"machine": machine, "versions": {name: version(name) for name in PACKAGES}, "date": str(date.today())}
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in kept if (row["cell"], row["machine"]) != (cell, machine)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + [{"cell": cell} | row | more for row in rows], indent=1) + "\n")


def describe_machine() -> str:
    """The GPU's name, or the number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {platform.machine()} cores"
