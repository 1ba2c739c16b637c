"""`training_log.jsonl`, and the training curve drawn from it."""

import json
from pathlib import Path

import numpy as np

from utils.atomic_files import UNFINISHED

CURVE = "training_curve.png"


def append_log(output_dir: Path, entry: dict) -> None:
    """Add a line to `training_log.jsonl`."""
    with (output_dir / "training_log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(output_dir: Path) -> list[dict]:
    """The entries of `training_log.jsonl`; a line that a kill cut off is ignored."""
    path = output_dir / "training_log.jsonl"
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def cut_log(output_dir: Path, last_step: int) -> None:
    """Remove the entries after the checkpoint from which a run is resumed."""
    kept = [entry for entry in read_log(output_dir) if entry["step"] <= last_step]
    unfinished = output_dir / f"{UNFINISHED}training_log.jsonl"
    unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    unfinished.rename(output_dir / "training_log.jsonl")


def draw_curve(output_dir: Path) -> Path | None:
    """Draw losses and learning rate into `training_curve.png`; None if nothing is logged yet."""
    entries = read_log(output_dir)
    training = [entry for entry in entries if "loss" in entry]
    if not training:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.add_subplot()
    steps = [entry["step"] for entry in training]
    losses = np.array([entry["loss"] for entry in training])
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    loss_axis.plot(steps, _smooth(losses), color="tab:blue", label="training loss (smoothed)")
    held_out = [(entry["step"], entry["held_out_loss"]) for entry in entries if "held_out_loss" in entry]
    if held_out:
        loss_axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=3, label="held-out loss")
    if losses.min() > 0:
        loss_axis.set_yscale("log")
    loss_axis.set(xlabel="optimizer step", ylabel="loss")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [entry["lr"] for entry in training], color="tab:gray", linestyle=":", label="learning rate")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_ylim(bottom=0)
    handles = [handle for axis in (loss_axis, rate_axis) for handle in axis.get_legend_handles_labels()[0]]
    loss_axis.legend(handles=handles, loc="upper right")
    path = output_dir / CURVE
    figure.savefig(path, dpi=110)
    return path


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over about a tenth of the values, less at the ends."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low, high = np.maximum(ends - width, 0), np.minimum(ends + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
