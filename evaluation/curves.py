"""The points of guidance_curves.py: measured, written and drawn."""

import json
from dataclasses import dataclass
from pathlib import Path

from evaluation.editing import SampleEditor
from evaluation.samples import Sample
from evaluation.scoring import Scorer
from evaluation.statistics import area_under_front, summarize
from utils.atomic_files import write_atomically
from utils.editing.settings import EditSettings

X, Y = "clip_direction", "clip_image"
NO_EDIT = "no edit"


@dataclass(frozen=True)
class CurvePoint:
    """The mean scores of an editor with one choice of scales. intervals: of each score, (low, high)."""

    label: str
    settings: dict[str, float]
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def measure_point(
    editor: SampleEditor, samples: list[Sample], settings: EditSettings, folder: Path, label: str, scorer: Scorer | None
) -> CurvePoint | None:
    """Edit all samples and score them, the latter in the main process alone; None in the others."""
    what = f"{label}, text {settings.guidance_scale:g}, image {settings.image_guidance_scale:g}"
    paths = editor.edit(samples, settings, folder, what)
    if not scorer:
        return None
    means = summarize(scorer.score(samples, paths)[0])
    used = {"guidance_scale": settings.guidance_scale, "image_guidance_scale": settings.image_guidance_scale}
    return CurvePoint(
        label,
        used | ({"steps": settings.steps} if settings.steps else {}),
        {name: mean["mean"] for name, mean in means.items()},
        {name: (mean["low"], mean["high"]) for name, mean in means.items()},
    )


def write_table(points: list[CurvePoint], samples: list[Sample], scorer: Scorer, folder: Path, flags: dict) -> None:
    """curves.jsonl, a line for each point, and results.json with the areas and the scores of copying the input."""
    lines = [
        json.dumps({"model": p.label, **p.settings, **p.scores, "intervals": p.intervals, "num_samples": len(samples)})
        for p in points
    ]
    write_atomically(folder / "curves.jsonl", ("\n".join(lines) + "\n").encode())
    no_edit = summarize(scorer.score(samples, [sample.original for sample in samples])[0])
    results = {
        "num_samples": len(samples),
        "no_edit": no_edit,
        "area_under_front": {label: area_of(points, label) for label in dict.fromkeys(p.label for p in points)},
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
        "points": [{"model": p.label, **p.settings, "scores": p.scores, "intervals": p.intervals} for p in points],
    }
    write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def area_of(points: list[CurvePoint], label: str) -> float | None:
    """The area under the front of an editor's points and of copying the input, (0, 1); None without captions."""
    known = [(point.scores[X], point.scores[Y]) for point in points if point.label == label and X in point.scores]
    return round(area_under_front([*known, (0.0, 1.0)]), 5) if known else None


def draw_curves(points: list[CurvePoint], folder: Path) -> None:
    """curves.png and curves.pdf: a curve for each editor and text scale, labelled with the image scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = choose_axes(points)
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for label, text in dict.fromkeys((point.label, point.settings["guidance_scale"]) for point in points):
        own = [p for p in points if (p.label, p.settings["guidance_scale"]) == (label, text)]
        area = area_of(points, label)
        name = f"{label}, text {text:g}" + (f" (area {area:.3f})" if area is not None else "")
        values = [[p.scores[axis] for p in own] for axis in (x, y)]
        xerr, yerr = (
            [[abs(p.intervals[axis][side] - p.scores[axis]) for p in own] for side in (0, 1)] for axis in (x, y)
        )
        style = dict(marker="o", markersize=4, linewidth=1, elinewidth=0.5)
        axes.errorbar(*values, xerr=xerr, yerr=yerr, label=name, **style)
        for point in own:
            scale = f"{point.settings['image_guidance_scale']:g}"
            axes.annotate(scale, (point.scores[x], point.scores[y]), (4, 4), textcoords="offset points", fontsize=7)
    if (x, y) == (X, Y):
        axes.plot(0, 1, "k*", markersize=10, label=NO_EDIT)
    axes.set(xlabel=AXES[x], ylabel=AXES[y])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"curves.{suffix}", dpi=150)
    pyplot.close(figure)


def choose_axes(points: list[CurvePoint]) -> tuple[str, str]:
    """The two scores to draw: those of the paper, or without captions the change of the input and the best other."""
    names = set.intersection(*(set(point.scores) for point in points))
    return (
        (X, Y) if {X, Y} <= names else ("source_l1", next(name for name in ("psnr", Y, "source_l1") if name in names))
    )


AXES = {
    X: "CLIP directional similarity (follows the instruction)",
    Y: "CLIP image similarity (stays close to the input)",
    "source_l1": "mean absolute difference to the input",
    "psnr": "PSNR to the target image (dB)",
}
