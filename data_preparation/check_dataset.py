"""Look for what is wrong with a dataset of pairs, before it is trained on: every row, and the rows together.

    python data_preparation/check_dataset.py my-pairs
    python data_preparation/check_dataset.py my-pairs --report_dir report --against my-test-pairs --num_workers 8
    python data_preparation/check_dataset.py my-pairs --fix my-clean-pairs --fix_swapped --fix_shifts

Takes what the training scripts take: a Hub id, a folder of data files, a saved dataset, a folder of images with a
metadata file. Exit code: 0 nothing wrong (warnings do not count), 1 rows with errors, 2 it cannot be checked.
docs/checking.md says what each finding means.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

if TYPE_CHECKING:
    from data_preparation.checking.doctor import Diagnosis


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("dataset", metavar="DATASET", help="Hub id or folder of a dataset")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_split", default="train", metavar="SPLIT", help="split to check (default train)")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, where it has several")
    add("--original_image_column", metavar="NAME", help="column of the images before (default: found, as in training)")
    add("--edit_prompt_column", metavar="NAME", help="column of the instructions")
    add("--edited_image_column", metavar="NAME", help="column of the images after")
    add("--max_rows", type=int, metavar="N", help="check only so many rows, drawn at random, the same each time")
    add("--cache_dir", metavar="FOLDER", help="where downloaded datasets are kept")
    add = parser.add_argument_group("checks").add_argument
    add(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="Hub id or folder of a dataset, such as the one to test on, of which no image may occur; may repeat",
    )
    add("--against_split", default="train", metavar="SPLIT", help="its split (default train)")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="count tokens by this tokenizer, such as the tokenizer folder of the "
        "model to train (default: an estimate)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--report_dir", type=Path, metavar="FOLDER", help="write report.html, with pictures, and report.json there")
    add(
        "--fix",
        type=Path,
        metavar="FOLDER",
        help="write a copy without the rows that have errors or are there twice, as parquet files in FOLDER/data",
    )
    add("--fix_swapped", action="store_true", help="with --fix: exchange the images of swapped pairs, and keep them")
    add("--fix_shifts", action="store_true", help="with --fix: cut shifted pairs to what both images show")
    add("--overwrite", action="store_true", help="replace another dataset in the folder of --fix")
    parser.add_argument(
        "--num_workers", type=int, default=0, metavar="N", help="processes that check rows (default 0: this one)"
    )
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    problems = []
    if args.max_rows is not None and args.max_rows < 1:
        problems.append(f"--max_rows {args.max_rows}: must be at least 1")
    if not 0 <= args.num_workers <= 1024:
        problems.append(f"--num_workers {args.num_workers}: must be from 0 to 1024")
    if not args.fix and (args.fix_swapped or args.fix_shifts or args.overwrite):
        problems.append("--fix_swapped, --fix_shifts and --overwrite concern the cleaned copy: give --fix FOLDER too")
    for flag in ("report_dir", "fix"):
        folder = getattr(args, flag)
        if folder and any(place.is_file() for place in (folder, *folder.parents)):
            problems.append(f"--{flag} {folder}: is a file, or lies below one; give a folder")
        if folder and Path(args.dataset).is_dir() and folder.resolve().is_relative_to(Path(args.dataset).resolve()):
            problems.append(f"--{flag} {folder}: lies in the dataset itself; give another folder")
    if args.tokenizer and not Path(args.tokenizer).is_dir():
        problems.append(f"--tokenizer {args.tokenizer}: no such folder; give the tokenizer folder of a model")
    if problems:
        raise InputError.from_problems(problems)


def write_reports(diagnosis: Diagnosis, folder: Path) -> None:
    """report.html and report.json."""
    from data_preparation.checking.numbers import make_json
    from data_preparation.checking.page import make_page

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(make_page(diagnosis), encoding="utf-8")
    report = json.dumps(make_json(diagnosis), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(f"{report}\n", encoding="utf-8")
    print(f"the report with pictures: {folder / 'report.html'} (for machines: {folder / 'report.json'})")


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    quiet_libraries()
    from data_preparation.checking.doctor import examine
    from data_preparation.checking.scan import PairSet
    from data_preparation.checking.terminal import describe

    columns = (args.original_image_column, args.edit_prompt_column, args.edited_image_column)
    pairs = PairSet(args.dataset, args.dataset_config_name, args.dataset_split, *columns, args.max_rows, args.cache_dir)
    against = [PairSet(name, split=args.against_split, cache_dir=args.cache_dir) for name in args.against]
    diagnosis = examine(pairs, against, args.num_workers, args.tokenizer)
    print(describe(diagnosis), flush=True)
    if args.report_dir:
        write_reports(diagnosis, args.report_dir)
    if args.fix:
        from data_preparation.checking.cleaning import clean

        summary = clean(
            diagnosis,
            args.fix,
            fix_swapped=args.fix_swapped,
            fix_shifts=args.fix_shifts,
            num_workers=args.num_workers,
            overwrite=args.overwrite,
        )
        print(summary.describe(args.fix))
    return int(any(diagnosis.findings.kinds("error")))


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        try:
            return run(parse_flags(argv))
        except KeyboardInterrupt:
            print("\nstopped: nothing was reported", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
