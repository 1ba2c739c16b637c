"""How fast are training pairs made: every task here, beside albumentations, and what generated pairs cost in UNet rows.

    python benchmarks/data.py
    python benchmarks/data.py --albumentations /path/of/a/venv/bin/python     # an interpreter that has albumentations

One thread. Pairs per second of computing (the process's own time, so that other programs on the machine disturb less),
of the photograph in memory to the picture in memory. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402

PHOTOGRAPHS = [REPOSITORY / "assets" / "photos" / name for name in ("astronaut.jpg", "raccoon.jpg", "coffee.jpg")]
# task -> (albumentations' nearest transform, its arguments, how it differs)
NEAREST = {
    "derain": ("RandomRain", {}, "streaks of one size and slant, encoded light, no depth"),
    "denoise": ("ShotNoise", {}, "no read noise"),
    "deblur": ("MotionBlur", {"blur_limit": (7, 31)}, "straight lines, encoded light"),
    "dehaze": ("RandomFog", {}, "discs of fog, no depth"),
    "raindrop": ("Spatter", {"mode": "rain"}, "tinted blots, no refraction"),
    "sharpen": ("GaussianBlur", {"sigma_limit": (0.8, 2.5), "blur_limit": 0}, "encoded light"),
    "colorize": ("ToGray", {}, "the same"),
    "super_resolve": ("Downscale", {"scale_range": (0.25, 0.5)}, "one resize, no noise, no JPEG"),
    "jpeg": ("ImageCompression", {"quality_range": (5, 40)}, "the same"),
}
# Samples for one caption, steps, rows of the UNet in a step, pairs kept of a caption at most (notes of the presets).
PRESETS = {"ip2p, the reference's": (100, 100, 4, 4), "fast": (16, 4, 2, 4)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="of the pictures, pixels")
    parser.add_argument("--pairs", type=int, default=24, help="pairs measured of each task and side (default 24)")
    parser.add_argument("--albumentations", type=Path, help="Python interpreter of an environment with albumentations")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only_albumentations", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    problems = [f"--sides {side}: must be from 64 to 2048" for side in args.sides if not 64 <= side <= 2048]
    if args.pairs < 1:
        problems.append(f"--pairs {args.pairs}: must be at least 1")
    if args.albumentations and not args.albumentations.exists():
        problems.append(f"--albumentations {args.albumentations}: no such file; give a Python interpreter")
    if problems:
        raise InputError.from_problems(problems)
    return args


def rate(make: Callable[[int], object], pairs: int) -> float:
    """Calls of `make` with 0, 1, ... per second of computing, after some that warm up."""
    for number in range(3):
        make(number)
    started = time.process_time()
    for number in range(pairs):
        make(number)
    return pairs / max(time.process_time() - started, 1e-9)


def load_photographs(side: int) -> list:
    """uint8 RGB (side, side, 3) each; with nothing but OpenCV, because the other interpreter has no more."""
    import cv2

    cv2.setNumThreads(1)
    squares = []
    for path in PHOTOGRAPHS:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        small = min(image.shape[:2])
        squares.append(cv2.resize(image[:small, :small], (side, side), interpolation=cv2.INTER_AREA))
    return squares


def measure_ours(side: int, pairs: int) -> dict[str, float]:
    """Pairs per second by task, and of writing both pictures of a pair."""
    import cv2

    from data_preparation.photographs import seeded_rng
    from data_preparation.tasks.cartoon import draw_cartoon
    from data_preparation.tasks.degradations import DEGRADATIONS

    photographs = load_photographs(side)
    figures = {"cartoonize": rate(lambda number: draw_cartoon(photographs[number % len(photographs)]), pairs)}
    for task, degrade in DEGRADATIONS.items():
        if task != "identity":
            figures[task] = rate(
                lambda number, degrade=degrade: degrade(
                    photographs[number % len(photographs)], seeded_rng(0, number)
                ),
                pairs,
            )
    for suffix in ("png", "jpg"):
        figures[f"writing both as {suffix}"] = rate(
            lambda number, suffix=suffix: [cv2.imencode(f".{suffix}", photographs[number % 3]) for _ in range(2)], pairs
        )
    return figures


def measure_albumentations(side: int, pairs: int) -> dict[str, float]:
    import albumentations

    photographs = load_photographs(side)
    figures = {}
    for task, (name, arguments, _) in NEAREST.items():
        transform = albumentations.Compose([getattr(albumentations, name)(p=1.0, **arguments)], seed=0)
        figures[task] = rate(
            lambda number, transform=transform: transform(image=photographs[number % len(photographs)]), pairs
        )
    return {"version": albumentations.__version__, "figures": figures}


def ask_albumentations(interpreter: Path, sides: list[int], pairs: int) -> dict | None:
    """The same by another interpreter: {side: {"version", "figures"}}, or None where that lacks albumentations."""
    command = [str(interpreter), __file__, "--only_albumentations", "--pairs", str(pairs), "--sides", *map(str, sides)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"albumentations was left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def show_rates(ours: dict, theirs: dict | None) -> str:
    sides = list(ours)
    version = theirs[sides[0]]["version"] if theirs else ""
    heads = ["Task", *(f"{side} px" for side in sides)]
    if theirs:
        heads += [*(f"albumentations {version}, {side} px" for side in sides), "its transform", "how that differs"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for task in ours[sides[0]]:
        cells = [task, *(f"{ours[side][task]:.0f}" for side in sides)]
        if theirs:
            found = task in NEAREST
            cells += [f"{theirs[side]['figures'][task]:.0f}" if found else "-" for side in sides]
            cells += [NEAREST[task][0], NEAREST[task][2]] if found else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_unet_rows() -> str:
    """The cost of a generated pair: samples x steps x rows for one caption, and for each of the pairs kept of it."""
    lines = [
        "| Preset | Samples | Steps | Rows a step | UNet rows a caption | Kept at most | UNet rows a kept pair |",
        "|---" * 7 + "|",
    ]
    for name, (samples, steps, rows, kept) in PRESETS.items():
        total = samples * steps * rows
        lines.append(f"| {name} | {samples} | {steps} | {rows} | {total:,} | {kept} | {total // kept:,} |")
    per_caption = [samples * steps * rows for samples, steps, rows, _ in PRESETS.values()]
    return "\n".join(lines) + f"\n\n{per_caption[0] / per_caption[1]:g} times fewer, before the early stop saves more."


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
    if args.only_albumentations:
        print(json.dumps({side: measure_albumentations(side, args.pairs) for side in args.sides}))
        return
    ours = {str(side): measure_ours(side, args.pairs) for side in args.sides}
    theirs = ask_albumentations(args.albumentations, args.sides, args.pairs) if args.albumentations else None
    print("Pairs per second of one core\n")
    print(show_rates(ours, theirs))
    print("\nUNet rows of a generated pair, by arithmetic\n")
    print(show_unet_rows())
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "albumentations": theirs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
