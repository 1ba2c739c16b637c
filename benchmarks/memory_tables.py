"""The memory ladder as text, for a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.memory_count import UPDATE_COPIES, StepCount
from benchmarks.memory_ladder import CACHED, CARDS, MARGIN, Configuration, Memory

TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
YES_NO = {True: "yes", False: "no"}
NOTES = f"""GB are 10^9 bytes. Counted is every tensor that PyTorch allocates in a training step: weights, gradients,
optimizer, moving average, VAE and text encoders where they stay, what autograd saves, autocast's copies of weights,
temporaries; on the real modules and shapes, under bf16 autocast, with attention that keeps no (L, L) matrix. For the
activations of the nf4 base those of the bf16 base are taken. Assumed, not counted: {MARGIN:.1f} GB for the CUDA
context (about 0.5), the workspaces of cuDNN and cuBLAS, and fragmentation; {UPDATE_COPIES} float32 copies of one
tensor while an optimizer works. Not in the figures: validation pictures, several GPUs (DDP's buckets are one more set
of gradients), text encoders of runs whose prompts are not known beforehand."""


@dataclass(frozen=True)
class Row:
    """One configuration of one model at one resolution. measured: bytes, None where there is no GPU."""

    model: str
    configuration: Configuration
    is_recomputed: bool
    beside: str
    resolution: int
    memory: Memory
    measured: int | None = None


def format_table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Columns of equal width; the first is aligned to the left, the others too where they are not numbers."""
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    is_number = [all(row[index][:1].isdigit() for row in rows) for index in range(len(header))]
    lines = []
    for cells in (header, *rows):
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def in_gb(size: int) -> str:
    """Two digits after the point below 10, one above."""
    return f"{size / 1e9:.2f}" if size < 9.995e9 else f"{size / 1e9:.1f}"


def counts_table(counts: dict[tuple[str, bool, int], StepCount], markdown: bool) -> str:
    """What a step takes beyond the weights. counts: by (kind, is recomputed, resolution)."""
    resolutions = list(dict.fromkeys(resolution for _, _, resolution in counts))
    header = ["trained", "recomputed", "gradients", *(f"saved at {resolution}" for resolution in resolutions)]
    header += [f"peak at {resolution} (fused)" for resolution in resolutions]
    rows = []
    for kind, is_recomputed in dict.fromkeys((kind, is_recomputed) for kind, is_recomputed, _ in counts):
        found = [counts[kind, is_recomputed, resolution] for resolution in resolutions]
        rows.append([kind, YES_NO[is_recomputed], in_gb(found[0].gradients), *(in_gb(count.saved) for count in found)])
        rows[-1] += [f"{in_gb(count.peak)} ({in_gb(count.fused_peak)})" for count in found]
    return format_table(header, rows, markdown)


def totals_table(rows: list[Row], markdown: bool) -> str:
    """The sums of one model, one line for a configuration, the counted peak of each resolution; then the measured."""
    resolutions = list(dict.fromkeys(row.resolution for row in rows))
    is_measured = any(row.measured is not None for row in rows)
    header = ["configuration", "recomputed", "on the GPU too", "weights", "optimizer", "EMA", "frozen"]
    for resolution in resolutions:
        header += [f"{resolution} counted"] + [f"{resolution} measured"] * is_measured
    lines = []
    for same in _grouped(rows):
        memory = same[resolutions[0]].memory
        first = same[resolutions[0]]
        line = [first.configuration.name, YES_NO[first.is_recomputed], first.beside]
        line += [in_gb(size) for size in (memory.weights, memory.optimizer, memory.ema, memory.frozen)]
        for resolution in resolutions:
            line.append(in_gb(same[resolution].memory.total))
            if is_measured:
                measured = same[resolution].measured
                line.append("-" if measured is None else in_gb(measured))
        lines.append(line)
    return format_table(header, lines, markdown)


def _grouped(rows: Iterable[Row]) -> list[dict[int, Row]]:
    """Rows that differ in the resolution alone, by resolution."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.configuration, row.is_recomputed, row.beside), {})[row.resolution] = row
    return list(groups.values())


def largest_fit(rows: list[Row], card: int) -> str:
    """The largest resolution that fits: "512", "768 r" when only with recomputation, and "-" for none.

    Of the two, the larger one; at the same resolution the faster, which recomputes nothing.
    """
    fitting = [(row.resolution, not row.is_recomputed) for row in rows if row.memory.fits(card)]
    if not fitting:
        return "-"
    resolution, is_fast = max(fitting)
    return str(resolution) if is_fast else f"{resolution} r"


def fits_table(rows: list[Row], markdown: bool) -> str:
    """The largest resolution for each configuration and card, every model a line of its own."""
    models = list(dict.fromkeys(row.model for row in rows))
    leanest = [row for row in rows if row.configuration.is_peer or row.beside == CACHED]
    lines = []
    for model in models:
        for configuration in dict.fromkeys(row.configuration for row in leanest):
            own = [row for row in leanest if (row.model, row.configuration) == (model, configuration)]
            lines.append([TITLES.get(model, model), configuration.name, *(largest_fit(own, card) for card in CARDS)])
    return format_table(["model", "what is trained, and how", *(f"{card} GB" for card in CARDS)], lines, markdown)


def blocks_table(saved: dict[str, int], markdown: bool) -> str:
    """Saved bytes with one block recomputed at a time. saved: by name, "none" and "all" among them."""
    whole = saved["none"]
    rows = [[name, f"{size / 1e9:.3f}", f"{(whole - size) / 1e9:.3f}"] for name, size in saved.items()]
    return format_table(["recomputed", "saved", "less"], rows, markdown)
