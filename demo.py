"""`make demo`: the whole way on the toy model, with the scripts that full-size models take.

Photographs -> pairs with exact results -> training -> edits of photographs that were kept out -> scores and a picture.
Everything lies in demo-output/: pairs/, editor/ (the pipeline), edits/, grid.png, training_curve.png, scores.json.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
PHOTOS, BASE = REPOSITORY / "assets/photos", REPOSITORY / "assets/toy-sd"
SIDE, SEED, CELL = 64, 0, 112
HELDOUT_PHRASINGS = 3
KINDS = {"train": "phrasings trained on", "heldout": "phrasings kept out"}
TRAINING = {
    "--resolution": SIDE,
    "--train_batch_size": 16,
    "--learning_rate": 1.5e-3,
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 100,
    "--ema_decay": 0.995,
    "--seed": SEED,
    "--logging_steps": 50,
    "--validation_split": 0.02,
    "--validation_steps": 1000,
    "--checkpointing_steps": 1000,
    "--checkpoints_total_limit": 1,
}
EDITING = {
    "--resolution": SIDE,
    "--steps": 10,
    "--cfg-text": 2.0,
    "--cfg-image": 1.3,
    "--seed": SEED,
    "--batch_size": 8,
}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output", help="folder of the results")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    args = parser.parse_args(argv)
    started = time.monotonic()
    output = args.output.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    sys.path.insert(0, str(REPOSITORY))
    make_pairs(output / "pairs", args.pairs)
    train(output, args.steps)
    heldout = cut_heldout(output / "heldout")
    edit(output, heldout)
    scores = score(output, heldout)
    scores |= {"steps": args.steps, "pairs": args.pairs, "minutes": round((time.monotonic() - started) / 60, 1)}
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    draw_grid(output, heldout)
    show(scores, output)
    return 0


def run(*command: object) -> None:
    """Run one of the scripts as its users do; a failure has said why already."""
    words = [str(word) for word in command]
    print("\n$", " ".join(words).replace(f"{REPOSITORY}/", ""), flush=True)
    if code := subprocess.run(words, cwd=REPOSITORY).returncode:
        raise SystemExit(code)


def words_of(flags: dict) -> list[object]:
    return [word for flag, value in flags.items() for word in (flag, value)]


def make_pairs(folder: Path, count: int) -> None:
    """Anew: pairs of a former version may lie there."""
    shutil.rmtree(folder, ignore_errors=True)
    run(
        sys.executable,
        "data_preparation/generate_dataset.py",
        "--dataset_id",
        PHOTOS,
        "--split",
        "train",
        "--task",
        "toy",
        "--data_root",
        folder,
        "--max_num_samples",
        count,
        "--resolution",
        SIDE,
        "--seed",
        SEED,
        "--crop",
        "random",
        "--heldout_phrasings",
        HELDOUT_PHRASINGS,
    )


def train(output: Path, steps: int) -> None:
    """Train from the start: what a former demo left is removed first."""
    shutil.rmtree(output / "editor", ignore_errors=True)
    accelerate = Path(sys.executable).with_name("accelerate")
    run(
        accelerate,
        "launch",
        "--quiet",
        "--mixed_precision",
        "no",
        "--num_processes",
        1,
        "--num_machines",
        1,
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        os.environ["OMP_NUM_THREADS"],
        "train_instruct_pix2pix.py",
        "--pretrained_model_name_or_path",
        BASE,
        "--dataset_name",
        output / "pairs",
        "--output_dir",
        output / "editor",
        "--max_train_steps",
        steps,
        "--use_ema",
        "--cache_latents",
        "--center_crop",
        *words_of(TRAINING),
    )
    shutil.copyfile(output / "editor/training_curve.png", output / "training_curve.png")


def cut_heldout(folder: Path) -> Path:
    """The middle squares of the photographs kept out of training, as PNG files of the model's size."""
    from PIL import Image

    from data_preparation.photographs import centre_square, list_photographs, read_photograph

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in list_photographs(PHOTOS, "heldout"):
        Image.fromarray(centre_square(read_photograph(path), SIDE)).save(folder / f"{path.stem}.png")
    return folder


def phrasing_of(task: str, kind: str, index: int) -> str:
    """One of the ways to ask for `task`, by turns."""
    from data_preparation.instructions import read_phrasings

    phrasings = read_phrasings(f"toy/{task}", HELDOUT_PHRASINGS)[list(KINDS).index(kind)]
    return phrasings[index % len(phrasings)]


def edit(output: Path, heldout: Path) -> None:
    """Edit every held-out photograph by every instruction with infer.py; one process, so that imports are paid once."""
    from data_preparation.toy_edits import EDITS

    shutil.rmtree(output / "edits", ignore_errors=True)
    for kind in KINDS:
        for index, task in enumerate(EDITS):
            flags = {"--model": output / "editor", "--input": heldout, "--output": output / "edits" / kind / task}
            flags |= {"--edit": phrasing_of(task, kind, index)} | EDITING
            words = [str(word) for word in words_of(flags)]
            print("\n$ python infer.py", " ".join(words).replace(f"{REPOSITORY}/", ""), flush=True)
            sys.argv = ["infer.py", *words]
            try:
                runpy.run_path(str(REPOSITORY / "infer.py"), run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise


def score(output: Path, heldout: Path) -> dict:
    """Compare each edit with the exact results (evaluation/exact_edits.py)."""
    from data_preparation.toy_edits import EDITS, exact_results
    from evaluation.exact_edits import judge, mean_scores, read_rgb

    scores = {}
    for kind in KINDS:
        rows = {task: [] for task in EDITS}
        for path in sorted(heldout.glob("*.png")):
            original = read_rgb(path)
            results = exact_results(original)
            for task in EDITS:
                edited = read_rgb(output / "edits" / kind / task / path.name)
                rows[task].append(judge(edited, original, results, task))
        tasks = {task: mean_scores(values) for task, values in rows.items()}
        scores[kind] = mean_scores([row for values in rows.values() for row in values]) | {"tasks": tasks}
    return scores


def draw_grid(output: Path, heldout: Path) -> None:
    """grid.png: a row for each photograph, the input and then its edits, under the instructions."""
    import textwrap

    from PIL import Image, ImageDraw

    from data_preparation.toy_edits import EDITS

    paths, head = sorted(heldout.glob("*.png")), 64
    sheet = Image.new("RGB", ((len(EDITS) + 1) * CELL, head + len(paths) * CELL), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ["input", *(f"“{phrasing_of(task, 'train', index)}”" for index, task in enumerate(EDITS))]
    for column, title in enumerate(titles):
        pen.text((column * CELL + 3, 3), textwrap.fill(title, 18), fill="black", font_size=11)
    for row, path in enumerate(paths):
        pictures = [path, *(output / "edits/train" / task / path.name for task in EDITS)]
        for column, picture in enumerate(pictures):
            large = Image.open(picture).resize((CELL - 4, CELL - 4), Image.Resampling.BICUBIC)
            sheet.paste(large, (column * CELL, head + row * CELL))
    sheet.save(output / "grid.png")


def show(scores: dict, output: Path) -> None:
    """Print the table, and where to look."""
    print(f"\n{'photographs never trained on':32}{'accuracy':>10}{'PSNR':>10}{'no edit':>10}")
    for kind, meaning in KINDS.items():
        for name, values in {meaning: scores[kind], **scores[kind]["tasks"]}.items():
            label = name if name == meaning else f"  {name}"
            numbers = f"{values['psnr']:>7.1f} dB{values['no_edit_psnr']:>7.1f} dB"
            print(f"{label:32}{values['accuracy']:>10.2f}{numbers}")
    print(f"\n{scores['minutes']} minutes. Look at {output / 'grid.png'} and {output / 'training_curve.png'}")


if __name__ == "__main__":
    sys.exit(main())
