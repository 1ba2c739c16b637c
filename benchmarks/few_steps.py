"""Does the delta of a few-step student make the demo's editor edit in four steps? The toy world answers.

    make demo && python assets/distill_toy_sd.py --output demo-output/toy-lcm && python benchmarks/few_steps.py

adapt_distill.py adds w (student - base) to the demo editor for some weights w. Every editor edits the photographs that
no training has seen by the ten instructions, in few steps and in many; each edit is compared with its exact result.
Prints a table in Markdown, good or bad, and draws few-steps.png: a row for each way, the first photograph.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.toy_editing import adapt, edit_photographs, read_photographs, save_sheet  # noqa: E402

WEIGHTS, FEW = (0.5, 1.0), (1, 2, 4)
GUIDANCE = {"plain": (2.0, 1.3), "one branch": (1.0, 1.0)}


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
        folder = adapt(editor, args.student, weight, args.output / f"weight-{weight}")
        ways += [(f"w = {weight}", folder, "LCM", steps) for steps in FEW]
    rows, pictures, photographs = [], [], read_photographs(args.demo)
    for name, folder, scheduler, steps in ways:
        for guidance in GUIDANCE:
            score, edits = measure(photographs, folder, scheduler, steps, GUIDANCE[guidance])
            rows.append((name, scheduler, steps, guidance, score))
            pictures.append((f"{name}, {scheduler} {steps}, {guidance}", edits))
            print_row(*rows[-1])
    save_sheet([edits for _, edits in pictures], [name for name, _ in pictures], args.output / "few-steps.png")


def measure(photographs: list, folder: Path, scheduler: str, steps: int, scales: tuple[float, float]) -> tuple:
    """(mean scores, the edits of the first photograph) of one editor in one way of sampling."""
    import diffusers
    import numpy as np

    from data_preparation.toy_edits import exact_results
    from evaluation.exact_edits import mean_scores, score_edit
    from utils.editing.loading import load_editor

    pipeline = load_editor(folder)
    scheduler_class = getattr(diffusers, f"{scheduler}Scheduler")
    pipeline.scheduler = scheduler_class.from_config(dict(pipeline.scheduler.config), timestep_spacing="trailing")
    originals = [np.asarray(photograph) for photograph in photographs]
    results = [exact_results(original) for original in originals]
    edits = edit_photographs(pipeline, photographs, steps, scales)
    scores = [
        score_edit(np.asarray(edit), original, exact, task)
        for task, edited in edits.items()
        for edit, original, exact in zip(edited, originals, results, strict=True)
    ]
    return mean_scores(scores), [photographs[0], *(edited[0] for edited in edits.values())]


def print_row(name: str, scheduler: str, steps: int, guidance: str, score: dict) -> None:
    scales = "s_T = {}, s_I = {}".format(*GUIDANCE[guidance])
    print(
        f"| {name} | {scheduler} | {steps} | {scales} | {score['accuracy']:.2f} | {score['psnr']:.1f} dB |", flush=True
    )


if __name__ == "__main__":
    main()
