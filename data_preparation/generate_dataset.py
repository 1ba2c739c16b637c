"""Make pairs for training an editor: photographs, an instruction each, and its exact result.

    python data_preparation/generate_dataset.py --dataset_id assets/photos --split train \\
        --task cartoonize sepia night --data_root pairs --max_num_samples 2000 --resolution 64 --seed 0

Writes parquet files that `datasets.load_dataset(data_root)` reads, with the columns original_image, edit_prompt,
edited_image, task, source (the photograph's file) and phrasing (train, or heldout for a way of asking that training
never shows). Rows of the heldout split draw from both kinds of phrasing, all others from the training kind only. The
same seed gives the same rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.instructions import available_tasks, read_phrasings  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402

ROWS_PER_FILE = 5000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_id", type=Path, required=True, help="folder of photographs, searched with its subfolders"
    )
    parser.add_argument(
        "--task", nargs="+", required=True, help=f"edits to make: {', '.join(available_tasks())}, or all"
    )
    parser.add_argument("--data_root", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--overwrite", action="store_true", help="replace --data_root, once the new pairs are complete")
    parser.add_argument("--max_num_samples", type=int, default=1000, help="pairs to make")
    parser.add_argument("--resolution", type=int, default=256, help="side of the pictures in pixels, a multiple of 8")
    parser.add_argument(
        "--split",
        choices=["train", "heldout", "all"],
        default="all",
        help="which photographs, by the split named in the folder's metadata.jsonl; without that file, all",
    )
    parser.add_argument(
        "--heldout_phrasings", type=int, default=3, help="of each task, so many last phrasings stay out of training"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot work, all problems at once; returns the tasks, with `all` spelled out."""
    known, problems = available_tasks(), []
    unknown = [task for task in args.task if task not in (*known, "all")]
    if unknown:
        problems.append(f"--task {' '.join(unknown)}: unknown; allowed are {', '.join(known)}, or all")
    if not args.dataset_id.is_dir():
        problems.append(f"--dataset_id {args.dataset_id}: no such folder; give a folder of photographs")
    if args.resolution < 16 or args.resolution > 4096 or args.resolution % 8:
        problems.append(f"--resolution {args.resolution}: must be a multiple of 8 from 16 to 4096")
    if args.max_num_samples < 1:
        problems.append(f"--max_num_samples {args.max_num_samples}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    tasks = known if "all" in args.task else list(dict.fromkeys(args.task))
    shortest = min((len(read_phrasings(task, 0)[0]) for task in tasks if task in known), default=0)
    if not unknown and not 0 <= args.heldout_phrasings < shortest:
        problems.append(
            f"--heldout_phrasings {args.heldout_phrasings}: must be from 0 to {shortest - 1}: some must be left"
        )
    problems += data_root_problems(args.data_root, args.overwrite)
    if problems:
        raise InputError.from_problems(problems)
    return tasks


def data_root_problems(data_root: Path, overwrite: bool) -> list[str]:
    """What speaks against writing there; with `overwrite` only what this script has written may be replaced."""
    if data_root.exists() and not data_root.is_dir():
        return [f"--data_root {data_root}: is a file; give a folder"]
    found = sorted(path.name for path in data_root.iterdir()) if data_root.is_dir() else []
    if found and not overwrite:
        return [f"--data_root {data_root}: is not empty; give another folder, or --overwrite to replace it"]
    foreign = [name for name in found if name != "data"]
    if foreign:
        return [f"--data_root {data_root}: holds {foreign[0]}, which is no pair set; --overwrite does not replace it"]
    return []


def readable_photographs(folder: Path, split: str) -> list[Path]:
    """Photographs that decode; the others are named on stderr and counted."""
    from data_preparation.photographs import list_photographs, read_photograph

    try:
        paths = list_photographs(folder, split)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'metadata.jsonl'}: a line is not a JSON object with file_name ({error})") from None
    if not paths:
        raise InputError(
            f"--dataset_id {folder}: holds no image of split '{split}'; jpg, png, webp, bmp and tif files are read"
        )
    bad = [path for path in paths if read_photograph(path) is None]
    for path in bad[:5]:
        print(f"skipped {path}: not a readable image", file=sys.stderr)
    if bad:
        print(f"skipped {len(bad)} of {len(paths)} images", file=sys.stderr)
    if len(bad) == len(paths):
        raise InputError(f"--dataset_id {folder}: none of its {len(paths)} images can be read")
    return [path for path in paths if path not in set(bad)]


def make_row(
    photographs: list[Path], phrasings: dict[str, tuple], resolution: int, seed: int, row: int, heldout: bool, read
) -> dict:
    """Row number `row`: pictures as uint8 RGB (resolution, resolution, 3), the rest as text."""
    from data_preparation.edits import EDITS
    from data_preparation.photographs import random_square, row_generator

    rng = row_generator(seed, row)
    path = photographs[rng.integers(len(photographs))]
    task = list(phrasings)[rng.integers(len(phrasings))]
    original = random_square(read(path), resolution, rng)
    kind = 1 if heldout and phrasings[task][1] and rng.random() < 0.5 else 0
    prompts = phrasings[task][kind]
    return {
        "original_image": original,
        "edit_prompt": prompts[rng.integers(len(prompts))],
        "edited_image": EDITS[task](original),
        "task": task,
        "source": path.name,
        "phrasing": ("train", "heldout")[kind],
    }


def write_files(rows, count: int, folder: Path) -> None:
    """Write rows (an iterator of dicts) as parquet files with embedded PNG images, at most ROWS_PER_FILE in each."""
    import cv2
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    text = ("edit_prompt", "task", "source", "phrasing")
    features = Features(
        {
            "original_image": Image(),
            "edit_prompt": Value("string"),
            "edited_image": Image(),
            **{name: Value("string") for name in text[1:]},
        }
    )
    num_files = -(-count // ROWS_PER_FILE)
    for index in range(num_files):
        columns = {name: [] for name in features}
        for row in (next(rows) for _ in range(min(ROWS_PER_FILE, count - index * ROWS_PER_FILE))):
            for name, value in row.items():
                is_text = name in text
                columns[name].append(
                    value if is_text else {"bytes": cv2.imencode(".png", value[..., ::-1])[1].tobytes(), "path": None}
                )
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"train-{index:05d}-of-{num_files:05d}.parquet", row_group_size=100)


def replace_folder(partial: Path, final: Path) -> None:
    """Put the complete folder in place; an older one goes only when the newer one is there to follow it."""
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def generate(args: argparse.Namespace, tasks: list[str], photographs: list[Path]) -> None:
    """Write the pairs beside --data_root and put them in place."""
    from tqdm import tqdm

    from data_preparation.photographs import read_photograph

    read = lru_cache(maxsize=64)(read_photograph)
    phrasings = {task: read_phrasings(task, args.heldout_phrasings) for task in tasks}
    rows = (
        make_row(photographs, phrasings, args.resolution, args.seed, row, args.split == "heldout", read)
        for row in tqdm(range(args.max_num_samples), desc="pairs", unit="pair")
    )
    partial = args.data_root.with_name(f"{args.data_root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    write_files(rows, args.max_num_samples, partial / "data")
    replace_folder(partial, args.data_root)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.data_root = args.data_root.absolute()
    with exit_on_input_error():
        tasks = check_args(args)
        photographs = readable_photographs(args.dataset_id, args.split)
        try:
            generate(args, tasks, photographs)
        except OSError as error:
            raise InputError(f"--data_root {args.data_root}: cannot be written ({error})") from None
    print(f"wrote {args.max_num_samples} pairs of {len(photographs)} photographs to {args.data_root}")


if __name__ == "__main__":
    main()
