"""Whether the delta of a style fine-tune gives the demo's editor the style, and whether it still edits.

    make demo && python assets/style_toy_sd.py --output demo-output/toy-woodcut && python benchmarks/styles.py

adapt_distill.py adds w (woodcut - base) to the demo's editor. Every editor edits the held-out photographs with the ten
instructions; each edit is compared with its exact result, plain and in the style. Prints a Markdown table and draws
styles.png: two photographs, one row per weight.
"""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.toy_editing import adapt, edit_photographs, read_photographs, save_sheet  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

WEIGHTS = (0.0, 0.5, 1.0, 1.5)
STEPS, SCALES = 10, (2.0, 1.3)  # the settings of the demo
PREVIEWED = (0, 5)  # coffee, raccoon


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / "demo-output", help="output folder of `make demo`")
    parser.add_argument("--styled", type=Path, default=REPOSITORY / "demo-output/toy-woodcut")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output/styles")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    from PIL import Image

    from assets.style_toy_sd import woodcut
    from utils.editing.loading import load_editor

    photographs = read_photographs(args.demo)
    rows, labels, first = [], [], None
    print(
        "| editor | accuracy | PSNR to the exact edit | PSNR to the styled edit | fraction of the style |\n|"
        + "---|" * 5
    )
    for weight in WEIGHTS:
        folder = adapt(args.demo / "editor", args.styled, weight, args.output / f"weight-{weight}")
        edits = edit_photographs(load_editor(folder), photographs, STEPS, SCALES)
        first = first or edits
        print_row(f"w = {weight}", score(edits, photographs))
        for index in PREVIEWED:
            rows.append([photographs[index], *(edited[index] for edited in edits.values())])
            labels.append(f"w = {weight}")
    afterwards = {
        task: [Image.fromarray(woodcut(np.asarray(edit))) for edit in edited] for task, edited in first.items()
    }
    print_row("w = 0, style applied to the edits", score(afterwards, photographs))
    for index in PREVIEWED:
        rows.append([photographs[index], *(edited[index] for edited in afterwards.values())])
        labels.append("w = 0, style applied to the edits")
    save_sheet(rows, labels, args.output / "styles.png")


def score(edits: dict[str, list], photographs: list) -> dict[str, float]:
    """Mean scores of all edits against the exact results, plain and in the style (evaluation/exact_edits.py).

    accuracy: an edit is correct if its own exact result, plain or styled, is the nearest. styled_psnr: to the styled
    result. style_share: position of the edit between the two results by least squares, 0: plain, 1: styled.
    """
    import numpy as np

    from assets.style_toy_sd import woodcut
    from data_preparation.toy_edits import exact_results
    from evaluation.exact_edits import mean_scores, score_edit

    scores = []
    for index, photograph in enumerate(photographs):
        original = np.asarray(photograph)
        exact = {"no edit": original, **exact_results(original)}
        targets = exact | {f"{name}, styled": woodcut(result) for name, result in exact.items()}
        for task, edited in edits.items():
            plain, styled = targets[task].astype(float), targets[f"{task}, styled"].astype(float)
            edit = np.asarray(edited[index])
            row, other = (score_edit(edit, original, targets, name) for name in (task, f"{task}, styled"))
            share = np.vdot(edit - plain, styled - plain) / np.vdot(styled - plain, styled - plain)
            row["accuracy"] += other["accuracy"]
            scores.append(row | {"styled_psnr": other["psnr"], "style_share": float(share)})
    return mean_scores(scores)


def print_row(name: str, scores: dict[str, float]) -> None:
    psnr = f"{scores['psnr']:.1f} dB | {scores['styled_psnr']:.1f} dB"
    print(f"| {name} | {scores['accuracy']:.2f} | {psnr} | {scores['style_share']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
