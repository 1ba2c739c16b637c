"""Does the delta of a few-step student make the demo's editor edit in four steps? The toy world answers.

    make demo && python assets/distill_toy_sd.py --output demo-output/toy-lcm && python benchmarks/few_steps.py

adapt_distill.py adds w (student - base) to the demo editor for some weights w. Every editor edits the photographs that
no training has seen by the ten instructions, in few steps and in many; each edit is compared with its exact result.
Prints a table in Markdown, good or bad, and draws few-steps.png: a row for each way, the first photograph.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

WEIGHTS, FEW = (0.5, 1.0), (1, 2, 4)
GUIDANCE = {"plain": (2.0, 1.3), "one branch": (1.0, 1.0)}
SCALE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / "demo-output", help="what `make demo` has left")
    parser.add_argument("--student", type=Path, default=REPOSITORY / "demo-output/toy-lcm")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output/few-steps")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    editor = args.demo / "editor"
    ways = [("the editor", editor, "DDIM", 20), ("the editor", editor, "DDIM", 4)]
    ways += [("the editor", editor, "LCM", steps) for steps in FEW]
    for weight in WEIGHTS:
        folder = args.output / f"weight-{weight}"
        adapt(editor, args.student, weight, folder)
        ways += [(f"w = {weight}", folder, "LCM", steps) for steps in FEW]
    rows, pictures = [], []
    for name, folder, scheduler, steps in ways:
        for guidance in GUIDANCE:
            score, edits = measure(args.demo / "heldout", folder, scheduler, steps, GUIDANCE[guidance])
            rows.append((name, scheduler, steps, guidance, score))
            pictures.append((f"{name}, {scheduler} {steps}, {guidance}", edits))
            print_row(*rows[-1])
    draw(pictures, args.output / "few-steps.png")


def adapt(editor: Path, student: Path, weight: float, folder: Path) -> None:
    """Run adapt_distill.py as its users do."""
    if (folder / "model_index.json").exists():
        return
    command = [sys.executable, "adapt_distill.py", "--model", editor, "--distilled", student, "--base",
               REPOSITORY / "assets/toy-sd", "--weight", weight, "--output_dir", folder]  # fmt: skip
    if code := subprocess.run([str(word) for word in command], cwd=REPOSITORY).returncode:
        raise SystemExit(code)


def measure(heldout: Path, folder: Path, scheduler: str, steps: int, guidance: tuple[float, float]) -> tuple:
    """(mean scores, the edits of the first photograph) of one editor in one way of sampling."""
    import diffusers
    import numpy as np
    from PIL import Image

    from data_preparation.edits import EDITS, exact_results
    from data_preparation.instructions import read_phrasings
    from evaluation.exact_edits import judge, mean_scores
    from utils.edit.editing import edit_images
    from utils.network.loading import load_editor

    pipeline = load_editor(folder)
    scheduler_class = getattr(diffusers, f"{scheduler}Scheduler")
    pipeline.scheduler = scheduler_class.from_config(dict(pipeline.scheduler.config), timestep_spacing="trailing")
    photographs = [Image.open(path).convert("RGB") for path in sorted(heldout.glob("*.png"))]
    scores, first = [], [photographs[0]]
    for task in EDITS:
        edits = edit_images(
            pipeline, photographs, [read_phrasings(f"toy/{task}")[0][0]] * len(photographs),
            seeds=[0] * len(photographs),
            num_inference_steps=steps, guidance_scale=guidance[0], image_guidance_scale=guidance[1],
        )  # fmt: skip
        first.append(edits[0])
        for photograph, edit in zip(photographs, edits, strict=True):
            original = np.asarray(photograph)
            scores.append(judge(np.asarray(edit), original, exact_results(original), task))
    return mean_scores(scores), first


def print_row(name: str, scheduler: str, steps: int, guidance: str, score: dict) -> None:
    scales = "s_T = {}, s_I = {}".format(*GUIDANCE[guidance])
    print(
        f"| {name} | {scheduler} | {steps} | {scales} | {score['accuracy']:.2f} | {score['psnr']:.1f} dB |", flush=True
    )


def draw(rows: list[tuple[str, list]], path: Path) -> None:
    """One labelled row of pictures for each way."""
    from PIL import Image, ImageDraw

    side, label = rows[0][1][0].width * SCALE, 200
    sheet = Image.new("RGB", (label + side * len(rows[0][1]), side * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows):
        pen.text((4, row * side + side // 2 - 8), name, fill="black", font_size=12)
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (label + column * side, row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
