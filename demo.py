"""`make demo`: everything on the toy model, with the scripts that full-size models use.

Photographs -> pairs with exact results -> training -> edits of photographs that were not trained on -> scores.
All files are in demo-output/: pairs/, editor/ (the pipeline), edits/, grid.png, training_curve.png, scores.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from utils.cli import FlagParser
from utils.errors import InputError, exit_on_input_error

REPOSITORY = Path(__file__).resolve().parent
PHOTOS, BASE = REPOSITORY / "assets/photos", REPOSITORY / "assets/toy-sd"
SIDE, SEED, CELL, HEADER = 64, 0, 112, 64
HELDOUT_PHRASINGS = 3
KINDS = {"train": "phrasings trained on", "heldout": "phrasings not trained on"}
PAIRS = dict(dataset_id=PHOTOS, split="train", task="toy", resolution=SIDE, seed=SEED, crop="random")
LAUNCH = dict(mixed_precision="no", num_processes=1, num_machines=1, dynamo_backend="no")
TRAINING = {
    "resolution": SIDE,
    "train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "ema_decay": 0.995,
    "seed": SEED,
    "logging_steps": 50,
    "validation_split": 0.02,
    "validation_steps": 1000,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 1,
}
EDITING = dict(resolution=SIDE, steps=10, guidance_scale=2.0, image_guidance_scale=1.3)
BATCH_SIZE = 8
MARKER = ".made-by-demo"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output", help="folder of the results")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    args = parser.parse_args(argv)
    started = time.monotonic()
    output = args.output.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with exit_on_input_error():
        claim_folder(output, args)
    make_pairs(output / "pairs", args.pairs)
    train(output, args.steps)
    heldout = crop_heldout(output / "heldout")
    with exit_on_input_error():
        edit(output, heldout)
    scores = score(output, heldout)
    scores |= {"steps": args.steps, "pairs": args.pairs, "minutes": round((time.monotonic() - started) / 60, 1)}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    recommend(output / "editor", scores["train"]["psnr"], len(list(heldout.glob("*.png"))))
    draw_grid(output, heldout)
    print_scores(scores, output)
    return 0


def claim_folder(output: Path, args: argparse.Namespace) -> None:
    """Mark the folder as the demo's, which replaces its contents. Raises InputError for a folder with other files."""
    problems = [
        f"--{name} {getattr(args, name)}: must be at least 1" for name in ("pairs", "steps") if vars(args)[name] < 1
    ]
    found = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if output.is_file():
        problems.append(f"--output {output} is a file: name a folder")
    elif found and MARKER not in found:
        problems.append(
            f"--output {output} has files that are not known to be the demo's ({', '.join(found[:3])}), and it would "
            "replace some: name a new or empty folder, or remove it"
        )
    if problems:
        raise InputError.from_problems(problems)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}; name another folder") from None


def run(*command: object) -> None:
    """Run one of the scripts as a user does; it explains its own failure."""
    words = [str(word) for word in command]
    print("\n$", " ".join(words).replace(f"{REPOSITORY}/", ""), flush=True)
    if code := subprocess.run(words, cwd=REPOSITORY).returncode:
        raise SystemExit(code)


def as_flags(values: dict[str, object]) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def make_pairs(folder: Path, count: int) -> None:
    """Generate the pairs again, because an older version may have left others."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = PAIRS | dict(data_root=folder, max_num_samples=count, heldout_phrasings=HELDOUT_PHRASINGS)
    run(sys.executable, "data_preparation/generate_dataset.py", *as_flags(flags))


def train(output: Path, steps: int) -> None:
    """Train from the start: the editor of an earlier demo is removed."""
    shutil.rmtree(output / "editor", ignore_errors=True)
    launch = LAUNCH | {"num_cpu_threads_per_process": os.environ["OMP_NUM_THREADS"]}
    accelerate = [Path(sys.executable).with_name("accelerate"), "launch", "--quiet", *as_flags(launch)]
    flags = dict(pretrained_model_name_or_path=BASE, dataset_name=output / "pairs", output_dir=output / "editor")
    switches = ["--use_ema", "--cache_latents", "--center_crop"]
    flags |= {"max_train_steps": steps} | TRAINING
    run(*accelerate, "train_instruct_pix2pix.py", *as_flags(flags), *switches)
    shutil.copyfile(output / "editor/training_curve.png", output / "training_curve.png")


def crop_heldout(folder: Path) -> Path:
    """Save the centre squares of the photographs not trained on, as PNG files of the model's size."""
    from PIL import Image

    from data_preparation.photographs import centre_square, list_photographs, read_photograph

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in list_photographs(PHOTOS, "heldout"):
        Image.fromarray(centre_square(read_photograph(path), SIDE)).save(folder / f"{path.stem}.png")
    return folder


def choose_phrasing(task: str, kind: str, index: int) -> str:
    """An instruction for `task`, of the phrasings of this kind."""
    from data_preparation.instructions import read_phrasings

    phrasings = read_phrasings(f"toy/{task}", HELDOUT_PHRASINGS)[list(KINDS).index(kind)]
    return phrasings[index % len(phrasings)]


def edit(output: Path, heldout: Path) -> None:
    """Edit every held-out photograph with every instruction, as `infer.py --input heldout/` does."""
    from utils.quiet import hide_progress_bars, quiet_libraries

    quiet_libraries()
    from data_preparation.toy_edits import EDITS
    from utils.editing.editor_setup import open_editor
    from utils.editing.flags import EditorOptions
    from utils.editing.jobs import plan_input
    from utils.editing.service import EditService
    from utils.editing.settings import EditSettings

    hide_progress_bars()
    shutil.rmtree(output / "edits", ignore_errors=True)
    service, settings = (
        EditService(open_editor(EditorOptions(str(output / "editor"))), BATCH_SIZE),
        EditSettings(**EDITING),
    )
    for kind in KINDS:
        for index, task in enumerate(EDITS):
            folder, instruction = output / "edits" / kind / task, choose_phrasing(task, kind, index)
            for result in service.edit(plan_input(str(heldout), str(folder), [instruction], settings), SEED):
                if result.problem:
                    raise InputError(f"{result.job.name}: {result.problem}")
                result.save(result.job.output)
            print(f"“{instruction}”: {folder}".replace(f"{REPOSITORY}/", ""), flush=True)


def score(output: Path, heldout: Path) -> dict:
    """Compare each edit with the exact results (evaluation/exact_edits.py)."""
    from data_preparation.toy_edits import EDITS, exact_results
    from evaluation.exact_edits import mean_scores, read_rgb, score_edit

    scores = {}
    for kind in KINDS:
        rows = {task: [] for task in EDITS}
        for path in sorted(heldout.glob("*.png")):
            original = read_rgb(path)
            results = exact_results(original)
            for task in EDITS:
                edited = read_rgb(output / "edits" / kind / task / path.name)
                rows[task].append(score_edit(edited, original, results, task))
        tasks = {task: mean_scores(values) for task, values in rows.items()}
        scores[kind] = mean_scores([row for values in rows.values() for row in values]) | {"tasks": tasks}
    return scores


def recommend(editor: Path, psnr: float, num_photographs: int) -> None:
    """Store the settings of these edits in the editor, for infer.py, app.py and its card."""
    from data_preparation.toy_edits import EDITS
    from utils.editing.recommended import Recommendation, store_recommendation

    values = {name: value for name, value in EDITING.items() if name != "resolution"}
    store_recommendation(editor, Recommendation(values, "psnr", psnr, num_photographs * len(EDITS), "toy photographs"))


def draw_grid(output: Path, heldout: Path) -> None:
    """Save grid.png: one row per photograph with its edits, under the instructions."""
    from PIL import Image, ImageDraw

    from data_preparation.toy_edits import EDITS
    from utils.pixels import decode_image

    paths = sorted(heldout.glob("*.png"))
    sheet = Image.new("RGB", ((len(EDITS) + 1) * CELL, HEADER + len(paths) * CELL), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ["input", *(f"“{choose_phrasing(task, 'train', index)}”" for index, task in enumerate(EDITS))]
    for column, title in enumerate(titles):
        pen.text((column * CELL + 3, 3), textwrap.fill(title, 18), fill="black", font_size=11)
    for row, path in enumerate(paths):
        files = [path, *(output / "edits/train" / task / path.name for task in EDITS)]
        for column, file in enumerate(files):
            large = decode_image(file).resize((CELL - 4, CELL - 4), Image.Resampling.BICUBIC)
            sheet.paste(large, (column * CELL, HEADER + row * CELL))
    sheet.save(output / "grid.png")


def print_scores(scores: dict, output: Path) -> None:
    """Print the table, and where the results are."""
    print(f"\n{'photographs not trained on':32}{'accuracy':>10}{'PSNR':>10}{'no edit':>10}")
    for kind, meaning in KINDS.items():
        for name, values in {meaning: scores[kind], **scores[kind]["tasks"]}.items():
            label = name if name == meaning else f"  {name}"
            numbers = f"{values['psnr']:>7.1f} dB{values['no_edit_psnr']:>7.1f} dB"
            print(f"{label:32}{values['accuracy']:>10.2f}{numbers}")
    print(f"\n{scores['minutes']} minutes. See {output / 'grid.png'} and {output / 'training_curve.png'}")


if __name__ == "__main__":
    sys.exit(main())
