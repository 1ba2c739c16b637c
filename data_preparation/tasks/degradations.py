"""All degradations by task, with their parameter ranges; prints the table of the ranges or draws a contact sheet.

    python -m data_preparation.tasks.degradations                                      # the table, as Markdown
    python -m data_preparation.tasks.degradations --contact_sheet docs/pictures/tasks.jpg
    python -m data_preparation.tasks.degradations --contact_sheet pairs.jpg --tasks denoise --photos one.jpg

For a restoration task, the clean photograph is the edited image and its degraded version the original image. A
degradation maps (clean image, generator) to (degraded uint8 RGB image of the same size, the drawn parameters). It does
not change its input, and the same generator gives the same result. Images may have 64 to 2048 pixels per side. Sizes
and strengths hold at 512 pixels and scale with the shorter side, from 256 pixels on (derain: 128), so that a photograph
looks equally degraded at every resolution.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_preparation.photographs import centre_square, read_photograph, seeded_rng
from data_preparation.tasks import camera, weather
from data_preparation.tasks.cartoon import draw_cartoon
from data_preparation.tasks.primitives import Ranges
from utils.cli import FlagParser
from utils.contact_sheets import draw_grid

CARTOONIZE = "cartoonize"
COLUMNS = 6  # of the contact sheet
PHOTOS = Path(__file__).resolve().parents[2] / "assets" / "photos"
DEGRADATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, dict]]] = {
    "derain": weather.derain,
    "denoise": camera.denoise,
    "deblur": camera.deblur,
    "dehaze": weather.dehaze,
    "low_light": camera.low_light,
    "raindrop": weather.raindrop,
    "sharpen": camera.sharpen,
    "colorize": camera.colorize,
    "super_resolve": camera.super_resolve,
    "jpeg": camera.jpeg,
    "identity": camera.identity,
}
RANGES: dict[str, Ranges] = {
    "derain": weather.DERAIN,
    "dehaze": weather.DEHAZE,
    "raindrop": weather.RAINDROP,
    "denoise": camera.DENOISE,
    "deblur": camera.DEBLUR,
    "low_light": camera.LOW_LIGHT,
    "sharpen": camera.SHARPEN,
    "super_resolve": camera.SUPER_RESOLVE,
    "jpeg": camera.JPEG,
}


def describe_ranges() -> str:
    """A Markdown table of the parameters of all degradations."""
    lines = ["| Task | Parameter | Drawn from | What it is |", "|---|---|---|---|"]
    for task in DEGRADATIONS:
        ranges = RANGES.get(task, {})
        lines += [f"| {task} | {name} | {entry.describe()} | {entry.meaning} |" for name, entry in ranges.items()]
    return "\n".join(lines)


def draw_sheet(paths: list[Path], side: int) -> Image.Image:
    """A block of rows per photograph: its clean, degraded and cartoonized squares of `side` pixels."""
    rows, labels = [], []
    for block, path in enumerate(paths):
        clean = centre_square(read_photograph(path), side)
        images = {"clean": clean}
        for index, name in enumerate((name for name in DEGRADATIONS if name != "identity"), start=1):
            images[name] = DEGRADATIONS[name](clean, seeded_rng(block, index))[0]
        images[CARTOONIZE] = draw_cartoon(clean)
        names = list(images)
        for start in range(0, len(names), COLUMNS):
            labels.append(names[start : start + COLUMNS])
            rows.append([Image.fromarray(images[name]) for name in labels[-1]])
    return draw_grid(rows, labels)


def draw_pairs(tasks: list[str], paths: list[Path], side: int) -> Image.Image:
    """A column for each task and its photograph: the original image above, the edited image below."""
    columns = []
    for index, (task, path) in enumerate(zip(tasks, paths, strict=True)):
        photograph = centre_square(read_photograph(path), side)
        if task == CARTOONIZE:
            columns.append((photograph, draw_cartoon(photograph)))
        else:
            columns.append((DEGRADATIONS[task](photograph, seeded_rng(0, index))[0], photograph))
    rows = [[Image.fromarray(image) for image in row] for row in zip(*columns, strict=True)]
    return draw_grid(rows, [[f"{task} (original)" for task in tasks], ["edited"] * len(tasks)])


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    photos = [PHOTOS / name for name in ("astronaut.jpg", "raccoon.jpg", "garden_1.jpg")]
    tasks = [*DEGRADATIONS, CARTOONIZE]
    add("--contact_sheet", type=Path, metavar="FILE", help="draw this image instead of printing the table")
    add("--photos", nargs="+", type=Path, default=photos, metavar="FILE", help="photographs of the contact sheet")
    add("--side", type=int, default=256, help="side of its squares in pixels (default 256)")
    task_help = (
        "draw one pair for each of these tasks, with as many photographs (default: all tasks on each photograph)"
    )
    add("--tasks", nargs="+", choices=tasks, metavar="TASK", help=task_help)
    args = parser.parse_args(argv)
    if args.contact_sheet is None:
        print(describe_ranges())
        return
    if args.tasks and len(args.tasks) != len(args.photos):
        parser.error(f"--tasks: {len(args.tasks)} tasks need as many --photos, not {len(args.photos)}")
    sheet = draw_pairs(args.tasks, args.photos, args.side) if args.tasks else draw_sheet(args.photos, args.side)
    sheet.save(args.contact_sheet, quality=82)
    print(f"saved {args.contact_sheet}")


if __name__ == "__main__":
    main()
