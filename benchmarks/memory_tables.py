"""The memory of the configurations as tables, for a terminal or in Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.memory_configurations import CACHED, CARDS, MARGIN, Configuration, Memory
from benchmarks.memory_count import UPDATE_COPIES, StepCount

TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
YES_NO = {True: "yes", False: "no"}
NOTES = f"""GB are 10^9 bytes. Every tensor that PyTorch allocates in a training step is counted: weights, gradients,
optimizer, EMA, VAE and text encoders if they stay on the GPU, what autograd saves, autocast's copies of weights,
temporaries; on the real modules and shapes, under bf16 autocast, with attention without an (L, L) matrix. The nf4 base
has the activations of the bf16 base. Assumed, not counted: {MARGIN:.1f} GB for the CUDA context (about 0.5), the
workspaces of cuDNN and cuBLAS, and fragmentation; {UPDATE_COPIES} float32 copies of one tensor during its update. Not
included: validation images, several GPUs (DDP's buckets are one more set of gradients), text encoders of runs whose
prompts are not known in advance."""


@dataclass(frozen=True)
class Row:
    """One configuration of one model at one resolution. measured: bytes, None without a GPU."""

    model: str
    configuration: Configuration
    is_checkpointed: bool
    beside: str
    resolution: int
    memory: Memory
    measured: int | None = None


def format_table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Columns of equal width; numbers are aligned to the right."""
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
    """Two decimals below 10, one above."""
    return f"{size / 1e9:.2f}" if size < 9.995e9 else f"{size / 1e9:.1f}"


def counts_table(counts: dict[tuple[str, bool, int], StepCount], markdown: bool) -> str:
    """The memory of a step beyond the weights. counts: by (kind, is checkpointed, resolution)."""
    resolutions = list(dict.fromkeys(resolution for _, _, resolution in counts))
    header = ["trained", "checkpointed", "gradients", *(f"saved at {resolution}" for resolution in resolutions)]
    header += [f"peak at {resolution} (fused)" for resolution in resolutions]
    rows = []
    for kind, is_checkpointed in dict.fromkeys((kind, is_checkpointed) for kind, is_checkpointed, _ in counts):
        found = [counts[kind, is_checkpointed, resolution] for resolution in resolutions]
        rows.append(
            [kind, YES_NO[is_checkpointed], in_gb(found[0].gradients), *(in_gb(count.saved) for count in found)]
        )
        rows[-1] += [f"{in_gb(count.peak)} ({in_gb(count.fused_peak)})" for count in found]
    return format_table(header, rows, markdown)


def totals_table(rows: list[Row], markdown: bool) -> str:
    """The totals of one model: a line for each configuration, the counted and measured peak at each resolution."""
    resolutions = list(dict.fromkeys(row.resolution for row in rows))
    is_measured = any(row.measured is not None for row in rows)
    header = ["configuration", "checkpointed", "also on the GPU", "weights", "optimizer", "EMA", "frozen"]
    for resolution in resolutions:
        header += [f"{resolution} counted"] + [f"{resolution} measured"] * is_measured
    lines = []
    for same in _grouped(rows):
        memory = same[resolutions[0]].memory
        first = same[resolutions[0]]
        line = [first.configuration.name, YES_NO[first.is_checkpointed], first.beside]
        line += [in_gb(size) for size in (memory.weights, memory.optimizer, memory.ema, memory.frozen)]
        for resolution in resolutions:
            line.append(in_gb(same[resolution].memory.total))
            if is_measured:
                measured = same[resolution].measured
                line.append("-" if measured is None else in_gb(measured))
        lines.append(line)
    return format_table(header, lines, markdown)


def _grouped(rows: Iterable[Row]) -> list[dict[int, Row]]:
    """Group rows that only differ in the resolution."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.configuration, row.is_checkpointed, row.beside), {})[row.resolution] = row
    return list(groups.values())


def largest_fit(rows: list[Row], card: int) -> str:
    """The largest resolution that fits: "512", "768 r" if only with gradient checkpointing, "-" for none.

    At the same resolution without checkpointing, which is faster.
    """
    fitting = [(row.resolution, not row.is_checkpointed) for row in rows if row.memory.fits(card)]
    if not fitting:
        return "-"
    resolution, is_fast = max(fitting)
    return str(resolution) if is_fast else f"{resolution} r"


def fits_table(rows: list[Row], markdown: bool) -> str:
    """The largest resolution for each configuration and card."""
    models = list(dict.fromkeys(row.model for row in rows))
    leanest = [row for row in rows if row.configuration.is_peer or row.beside == CACHED]
    lines = []
    for model in models:
        for configuration in dict.fromkeys(row.configuration for row in leanest):
            own = [row for row in leanest if (row.model, row.configuration) == (model, configuration)]
            lines.append([TITLES.get(model, model), configuration.name, *(largest_fit(own, card) for card in CARDS)])
    return format_table(["model", "configuration", *(f"{card} GB" for card in CARDS)], lines, markdown)


def blocks_table(saved: dict[str, int], markdown: bool) -> str:
    """Saved bytes with one block checkpointed at a time. saved: by name, including "none" and "all"."""
    whole = saved["none"]
    rows = [[name, f"{size / 1e9:.3f}", f"{(whole - size) / 1e9:.3f}"] for name, size in saved.items()]
    return format_table(["checkpointed", "saved", "less"], rows, markdown)
