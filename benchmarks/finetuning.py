"""One new instruction for the demo's editor: full fine-tuning, LoRA, LoRA on a 4-bit base, and replay of old pairs.

    make demo && .venv/bin/python benchmarks/finetuning.py

The editor of demo-output/ has been trained on ten instructions. finetune_instruct_pix2pix.py teaches it an eleventh, a
night-vision camera, with each method. It then edits held-out photographs with the new instruction (also in held-out
phrasings) and with the ten old ones, which it may have forgotten. With replay, half of each batch are the pairs of the
ten old instructions, and training takes twice the steps. Prints a Markdown table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from utils.cli import FlagParser  # noqa: E402

SIDE, SEED, TASK = 64, 0, "night vision"
PHRASINGS = [
    "Make it look like a night vision camera",
    "Turn on night vision",
    "Show it through night vision goggles",
    "Give it a night vision look",
    "Make it a night vision image",
    "Apply a night vision filter",
    "As seen through night vision",
    "Convert it to night vision",
    "Put it in night vision",
    "Make this a shot from a night vision device",
    "View it with night vision",
]
NUM_HELDOUT = 3
ADAPTER = {"--lora_rank": 16, "--learning_rate": 3e-3, "--lora_target": "all"}
METHODS = {
    "full": {"--learning_rate": 3e-4},
    "LoRA, rank 16, attention": ADAPTER | {"--lora_target": "attention"},
    "LoRA, rank 16, all layers": ADAPTER,
    "LoRA, rank 16, all layers, nf4 base": ADAPTER | {"--quantize_base": "nf4"},
    "full, with replay": {"--learning_rate": 3e-4},
    "LoRA, rank 16, all layers, with replay": ADAPTER,
}
TRAINING = {
    "--resolution": SIDE,
    "--train_batch_size": 16,
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 20,
    "--seed": SEED,
    "--report_to": "none",
}
EDITING = {
    "--resolution": SIDE,
    "--steps": 10,
    "--cfg-text": 2.0,
    "--cfg-image": 1.3,
    "--seed": SEED,
    "--batch_size": 8,
}


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / "demo-output", help="output folder of `make demo`")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "demo-output/finetuning")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each method")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of the new instruction")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    make_pairs(args.output / "pairs", args.pairs)
    rows = {"before": {"trained": 0, "stored_mb": 0.0, "minutes": 0.0} | score(args, {})}
    for number, (name, flags) in enumerate(METHODS.items()):
        if name in args.methods:
            folder = args.output / f"method-{number}"
            rows[name] = train(args, folder, flags, has_replay="replay" in name) | score(args, flags, folder)
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


def night_vision(image):
    """uint8 RGB (H, W, 3) -> the green image of an image intensifier, brighter than the scene and without grain."""
    import numpy as np

    gray = (image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255) ** 0.6
    colours = np.array([0.15, 1.0, 0.25], np.float32) * gray[..., None] + np.array([0.0, 0.12, 0.02], np.float32)
    return (np.clip(colours, 0, 1) * 255 + 0.5).astype(np.uint8)


def make_pairs(folder: Path, count: int) -> None:
    """Write an image folder with a metadata.jsonl that names two images per row."""
    from PIL import Image

    from data_preparation.photographs import list_photographs, random_square, read_photograph, seeded_rng

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photographs = [read_photograph(path) for path in list_photographs(REPOSITORY / "assets/photos", "train")]
    lines = []
    for row in range(count):
        rng = seeded_rng(SEED, row)
        original = random_square(photographs[rng.integers(len(photographs))], SIDE, rng)
        names = {"original_image": f"{row}-original.png", "edited_image": f"{row}-edited.png"}
        for name, pixels in zip(names.values(), (original, night_vision(original)), strict=True):
            Image.fromarray(pixels).save(folder / name)
        prompt = PHRASINGS[rng.integers(len(PHRASINGS) - NUM_HELDOUT)]
        lines.append(json.dumps({f"{key}_file_name": name for key, name in names.items()} | {"edit_prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_mix(args: argparse.Namespace) -> Path:
    """A mix of the new pairs and those of the demo, in equal shares."""
    mix = args.output / "mix.yaml"
    sources = "".join(f"  - {{name: {folder}, weight: 1}}\n" for folder in (args.output / "pairs", args.demo / "pairs"))
    mix.write_text(f"datasets:\n{sources}")
    return mix


def train(args: argparse.Namespace, folder: Path, flags: dict, has_replay: bool) -> dict:
    """Fine-tune with one method: number of trained parameters, size of the published weights in MB, minutes."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    data = {"--train_mix": write_mix(args)} if has_replay else {"--train_data_dir": args.output / "pairs"}
    run(
        "finetune_instruct_pix2pix.py",
        "--pretrained_model_name_or_path",
        args.demo / "editor",
        "--output_dir",
        folder,
        "--max_train_steps",
        args.steps * (2 if has_replay else 1),
        "--center_crop",
        *([] if has_replay else ["--cache_latents"]),
        *to_words(data | TRAINING | flags),
    )
    minutes = (time.monotonic() - started) / 60
    adapter = folder / "pytorch_lora_weights.safetensors"
    file = adapter if adapter.exists() else folder / "unet/diffusion_pytorch_model.safetensors"
    return {"trained": count_trained(file), "stored_mb": file.stat().st_size / 1e6, "minutes": minutes}


def count_trained(file: Path) -> int:
    """Number of trained values in the file, without the frozen matrix of an adapter's conv_in."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as stored:
        sizes = {name: stored.get_tensor(name).size for name in stored.keys()}  # noqa: SIM118
    return sum(size for name, size in sizes.items() if name != "unet.conv_in.lora_A.weight")


def score(args: argparse.Namespace, flags: dict, folder: Path | None = None) -> dict:
    """Scores on the new instruction, in a trained and a held-out phrasing, and on the ten old instructions."""
    from data_preparation.instructions import read_phrasings
    from data_preparation.toy_edits import EDITS, exact_results
    from evaluation.exact_edits import mean_scores, read_rgb, score_edit

    prompts = {task: read_phrasings(f"toy/{task}")[0][0] for task in EDITS}
    new = {"new": PHRASINGS[0], "new, held out": PHRASINGS[-1]}
    scores = {name: [] for name in ("old", *new)}
    for name, prompt in (prompts | new).items():
        edits = edit(args, flags, folder, name, prompt)
        for path in sorted((args.demo / "heldout").glob("*.png")):
            original = read_rgb(path)
            results = exact_results(original) | {TASK: night_vision(original)}
            task = TASK if name in new else name
            scores[name if name in new else "old"].append(
                score_edit(read_rgb(edits / path.name), original, results, task)
            )
    return {name: mean_scores(values) for name, values in scores.items()}


def edit(args: argparse.Namespace, flags: dict, folder: Path | None, name: str, prompt: str) -> Path:
    """Edit every held-out photograph with infer.py."""
    target = args.output / "edits" / (folder.name if folder else "before") / name.replace(" ", "-").replace(",", "")
    model = ["--model", folder if folder and "--lora_rank" not in flags else args.demo / "editor"]
    adapter = ["--lora", folder] if "--lora_rank" in flags else []
    shutil.rmtree(target, ignore_errors=True)
    run(
        "infer.py",
        *model,
        *adapter,
        "--input",
        args.demo / "heldout",
        "--output",
        target,
        "--edit",
        prompt,
        *to_words(EDITING),
    )
    return target


def run(*command: object) -> None:
    """Run a script; exit with its code if it fails."""
    words = [sys.executable, *map(str, command)]
    if code := subprocess.run(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)


def to_words(flags: dict) -> list[object]:
    return [word for flag, value in flags.items() for word in (flag, value)]


def print_table(rows: dict[str, dict]) -> None:
    print(
        "| method | trained parameters | stored | minutes | new instruction: accuracy, PSNR | in a held-out phrasing | "
        "ten old instructions: accuracy |\n|---|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        new, held_out = (f"{row[key]['accuracy']:.2f}, {row[key]['psnr']:.1f} dB" for key in ("new", "new, held out"))
        cost = f"{row['trained']:,} | {row['stored_mb']:.1f} MB | {row['minutes']:.1f}"
        print(f"| {name} | {cost} | {new} | {held_out} | {row['old']['accuracy']:.2f} |")


if __name__ == "__main__":
    main()
