"""The memory of the configurations as a chart: a bar for each configuration, a line for each card."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.memory_configurations import CACHED, CARDS, MARGIN  # noqa: E402
from benchmarks.memory_tables import TITLES, Row, in_gb  # noqa: E402

PARTS = {
    "weights": ("weights", "#3b6ea5"),
    "optimizer": ("optimizer", "#7fa7d1"),
    "ema": ("moving average", "#b9cfe6"),
    "frozen": ("VAE, text encoders", "#9a8fb5"),
    "gradients": ("gradients", "#d98b3a"),
    "activations": ("activations, temporaries", "#e9c46a"),
}
MARGIN_COLOUR, DRAWN_RESOLUTION = "#e4e4e4", {"sd15": 512, "sdxl": 768}


def choose_rows(rows: list[Row], model: str) -> list[Row]:
    """The bars of one model at one resolution: diffusers' example as it is, ours with cached latents."""
    own = [row for row in rows if row.model == model]
    wanted = DRAWN_RESOLUTION.get(model)
    sides = {row.resolution for row in own}
    side = wanted if wanted in sides else max(sides)
    return [
        row
        for row in own
        if row.resolution == side and (row.beside == CACHED or (row.configuration.is_peer and row.is_checkpointed))
    ]


def plot_memory(rows: list[Row], path: Path, batch_size: int) -> None:
    """Save the chart as a PNG."""
    models = list(dict.fromkeys(row.model for row in rows))
    chosen = {model: choose_rows(rows, model) for model in models}
    heights = [len(bars) for bars in chosen.values()]
    figure, axes = pyplot.subplots(
        len(models),
        1,
        figsize=(11, 1.6 + 0.36 * sum(heights) + 0.7 * len(models)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, (model, bars) in zip(axes[:, 0], chosen.items(), strict=True):
        draw_bars(axis, bars)
        title = f"{TITLES.get(model, model)} at {bars[0].resolution} pixels, batch {batch_size}"
        axis.set_title(title, loc="left", pad=20, fontsize=11, fontweight="bold")
    axes[-1, 0].set_xlabel("GB (10⁹ bytes) at the peak of a training step, counted; dashed lines: cards")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_bars(axis: Axes, bars: list[Row]) -> None:
    """Draw the stacked parts, the margin in grey, the total at the end, and the cards as lines."""
    starts = [0.0] * len(bars)
    for name, (label, colour) in PARTS.items():
        widths = [row.memory.parts[name] / 1e9 for row in bars]
        axis.barh(range(len(bars)), widths, left=starts, color=colour, label=label, height=0.72, zorder=2)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.barh(
        range(len(bars)),
        MARGIN,
        left=starts,
        color=MARGIN_COLOUR,
        height=0.72,
        zorder=2,
        label=f"margin assumed ({MARGIN:.0f} GB)",
    )
    right = max(starts) + MARGIN
    limit = next((card for card in CARDS if card >= right), right) * 1.06
    for place, (row, end) in enumerate(zip(bars, starts, strict=True)):
        axis.text(
            end + MARGIN + limit * 0.006,
            place,
            in_gb(row.memory.total),
            va="center",
            fontsize=9,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    cards = [card for card in CARDS if card <= limit]
    for card in cards:
        name = f"{card} GB" if card == cards[-1] else str(card)
        axis.axvline(card, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axis.text(card, -0.62, name, ha="center", va="bottom", fontsize=9, color="#333333")
    suffixes = {True: ", checkpointed", False: ""}
    axis.set_yticks(
        range(len(bars)), [f"{row.configuration.name}{suffixes[row.is_checkpointed]}" for row in bars], fontsize=9
    )
    axis.set(xlim=(0, limit), ylim=(len(bars) - 0.5, -0.6))
    axis.spines[["top", "right"]].set_visible(False)
