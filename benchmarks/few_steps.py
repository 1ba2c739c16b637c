"""Whether the delta of a few-step student makes the demo's editor edit in four steps.

    make demo && python assets/distill_toy_sd.py --output demo-output/toy-lcm && python benchmarks/few_steps.py

adapt_distill.py adds w (student - base) to the demo's editor for some weights w. Every editor edits the held-out
photographs with the ten instructions, in few and in many steps; each edit is compared with its exact result. Prints a
Markdown table and draws few-steps.png: the first photograph, one row per configuration.
"""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.toy_editing import adapt, edit_photographs, read_photographs, save_sheet  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

WEIGHTS, FEW = (0.5, 1.0), (1, 2, 4)
GUIDANCE = {"plain": (2.0, 1.3), "one branch": (1.0, 1.0)}  # (text, image) guidance scales


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / "demo-output", help="output folder of `make demo`")
    parser.add_argument("--student", type=Path, default=REPOSITORY / "demo-output/toy-lcm")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output/few-steps")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    editor = args.demo / "editor"
    configurations = [("the editor", editor, "DDIM", 20), ("the editor", editor, "DDIM", 4)]
    configurations += [("the editor", editor, "LCM", steps) for steps in FEW]
    for weight in WEIGHTS:
        folder = adapt(editor, args.student, weight, args.output / f"weight-{weight}")
        configurations += [(f"w = {weight}", folder, "LCM", steps) for steps in FEW]
    sheet, labels, photographs = [], [], read_photographs(args.demo)
    for name, folder, scheduler, steps in configurations:
        for guidance in GUIDANCE:
            score, edits = measure(photographs, folder, scheduler, steps, GUIDANCE[guidance])
            print_row(name, scheduler, steps, guidance, score)
            sheet.append(edits)
            labels.append(f"{name}, {scheduler} {steps}, {guidance}")
    save_sheet(sheet, labels, args.output / "few-steps.png")


def measure(photographs: list, folder: Path, scheduler: str, steps: int, scales: tuple[float, float]) -> tuple:
    """(mean scores, the edits of the first photograph) of one editor, scheduler and number of steps."""
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
