"""Measures the generation of training pairs: the speed of each task, beside albumentations, and UNet rows by preset.

    python benchmarks/data.py
    python benchmarks/data.py --albumentations /path/of/a/venv/bin/python     # an interpreter with albumentations

Uses one thread, and counts the CPU time of the process, so that other programs matter less. A pair starts as a
photograph in memory and ends as an image in memory. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from data_preparation.pairs.settings import PRESETS  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402

PHOTOGRAPHS = [REPOSITORY / "assets" / "photos" / name for name in ("astronaut.jpg", "raccoon.jpg", "coffee.jpg")]
# task: (most similar transform of albumentations, its arguments, how it differs)
TRANSFORMS = {
    "derain": ("RandomRain", {}, "streaks of one size and slant, encoded values, no depth"),
    "denoise": ("ShotNoise", {}, "no read noise"),
    "deblur": ("MotionBlur", {"blur_limit": (15, 31)}, "straight lines, encoded values"),
    "dehaze": ("RandomFog", {}, "discs of fog, no depth"),
    "raindrop": ("Spatter", {"mode": "rain"}, "tinted blots, no refraction"),
    "sharpen": ("GaussianBlur", {"sigma_limit": (0.75, 2.2), "blur_limit": 0}, "encoded values"),
    "colorize": ("ToGray", {}, "the same"),
    "super_resolve": ("Downscale", {"scale_range": (0.2, 0.33)}, "one resize, no noise, no JPEG"),
    "jpeg": ("ImageCompression", {"quality_range": (5, 40)}, "the same"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="sides of the images in pixels")
    parser.add_argument("--pairs", type=int, default=24, help="pairs per task and side (default 24)")
    parser.add_argument("--albumentations", type=Path, help="Python interpreter of an environment with albumentations")
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--only_albumentations", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    problems = [f"--sides {side}: must be from 64 to 2048" for side in args.sides if not 64 <= side <= 2048]
    if args.pairs < 1:
        problems.append(f"--pairs {args.pairs}: must be at least 1")
    if args.albumentations and not args.albumentations.exists():
        problems.append(f"--albumentations {args.albumentations}: does not exist; give a Python interpreter")
    if problems:
        raise InputError.from_problems(problems)
    return args


def measure_rate(function: Callable[[int], object], count: int) -> float:
    """Calls of function(0), function(1), ... per second of CPU time, after three calls for warm-up."""
    for number in range(3):
        function(number)
    started = time.process_time()
    for number in range(count):
        function(number)
    return count / max(time.process_time() - started, 1e-9)


def load_photographs(side: int) -> list:
    """uint8 RGB (side, side, 3) each; uses only OpenCV, because the other interpreter may have nothing else."""
    import cv2

    cv2.setNumThreads(1)
    squares = []
    for path in PHOTOGRAPHS:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        small = min(image.shape[:2])
        squares.append(cv2.resize(image[:small, :small], (side, side), interpolation=cv2.INTER_AREA))
    return squares


def measure_ours(side: int, pairs: int) -> dict[str, float]:
    """Pairs per second of each task, and of encoding both images of a pair."""
    import cv2

    from data_preparation.photographs import seeded_rng
    from data_preparation.tasks.cartoon import draw_cartoon
    from data_preparation.tasks.degradations import DEGRADATIONS

    photographs = load_photographs(side)

    def degrade(task: str, number: int) -> object:
        return DEGRADATIONS[task](photographs[number % 3], seeded_rng(0, number))

    def encode(suffix: str, number: int) -> object:
        return [cv2.imencode(f".{suffix}", photographs[number % 3]) for _ in range(2)]

    rates = {"cartoonize": measure_rate(lambda number: draw_cartoon(photographs[number % 3]), pairs)}
    rates |= {task: measure_rate(partial(degrade, task), pairs) for task in DEGRADATIONS if task != "identity"}
    return rates | {
        f"encoding both as {suffix}": measure_rate(partial(encode, suffix), pairs) for suffix in ("png", "jpg")
    }


def measure_albumentations(side: int, pairs: int) -> dict:
    import albumentations

    photographs, rates = load_photographs(side), {}
    for task, (name, arguments, _) in TRANSFORMS.items():
        transform = albumentations.Compose([getattr(albumentations, name)(p=1.0, **arguments)], seed=0)
        rates[task] = measure_rate(lambda number, run=transform: run(image=photographs[number % 3]), pairs)
    return {"version": albumentations.__version__, "rates": rates}


def run_albumentations(interpreter: Path, sides: list[int], pairs: int) -> dict | None:
    """{side: {"version", "rates"}} from another interpreter, or None if it does not have albumentations."""
    command = [str(interpreter), __file__, "--only_albumentations", "--pairs", str(pairs), "--sides", *map(str, sides)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"skipped albumentations: {''.join(done.stderr.strip().splitlines()[-1:])}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def format_rates(ours: dict, theirs: dict | None) -> str:
    sides = list(ours)
    columns = ["Task", *(f"{side} px" for side in sides)]
    if theirs:
        version = theirs[sides[0]]["version"]
        columns += [*(f"albumentations {version}, {side} px" for side in sides), "its transform", "difference"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for task in ours[sides[0]]:
        cells = [task, *(f"{rate:.0f}" if (rate := ours[side][task]) >= 10 else f"{rate:.1f}" for side in sides)]
        if theirs and task in TRANSFORMS:
            name, _, difference = TRANSFORMS[task]
            cells += [*(f"{theirs[side]['rates'][task]:.0f}" for side in sides), name, difference]
        elif theirs:
            cells += ["-"] * (len(sides) + 2)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_unet_rows() -> str:
    """UNet rows of the presets by arithmetic: candidates x steps x rows per step, per caption and per kept pair."""
    columns = ("Preset", "Candidates", "Steps", "Rows per step", "UNet rows per caption", "Kept", "UNet rows per pair")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    totals = {}
    for name, preset in PRESETS.items():
        settings = preset.settings
        rows = 4 if settings.guidance_range[1] > 1 else 2  # two images, with or without the unconditional branch
        totals[name] = total = settings.num_samples * settings.num_inference_steps * rows
        cells = [name, settings.num_samples, settings.num_inference_steps, rows, f"{total:,}"]
        cells += [settings.max_out_samples, f"{total // settings.max_out_samples:,}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    ratio = totals["ip2p"] / totals["fast"]
    return "\n".join(lines) + f"\n\nfast needs {ratio:g} times fewer UNet rows, and its early stop saves more."


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
    if args.only_albumentations:
        print(json.dumps({side: measure_albumentations(side, args.pairs) for side in args.sides}))
        return
    ours = {str(side): measure_ours(side, args.pairs) for side in args.sides}
    theirs = run_albumentations(args.albumentations, args.sides, args.pairs) if args.albumentations else None
    print("Pairs per second of one core\n")
    print(format_rates(ours, theirs))
    print("\nUNet rows of a generated pair, by arithmetic\n")
    print(format_unet_rows())
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "albumentations": theirs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
