"""Check a dataset of image pairs before training: every row by itself, and the rows against each other.

    python data_preparation/check_dataset.py my-pairs
    python data_preparation/check_dataset.py my-pairs --report_dir report --against my-test-pairs --num_workers 8
    python data_preparation/check_dataset.py my-pairs --fix my-clean-pairs --fix_swapped --fix_shifts

The dataset is anything that the training scripts accept: a Hub id, a folder of data files, a saved dataset, or a folder
of images with a metadata file. Exit code: 0 for no errors (there may be warnings), 1 for rows with errors, 2 if the
dataset cannot be checked. docs/checking.md explains each finding.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", metavar="DATASET", help="Hub id or folder of a dataset")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_split", dest="split", default="train", help="split to check (default: train)")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, if it has several")
    add("--original_image_column", metavar="NAME", help="column of the original images (default: found as in training)")
    add("--edit_prompt_column", metavar="NAME", help="column of the instructions")
    add("--edited_image_column", metavar="NAME", help="column of the edited images")
    add("--max_rows", dest="max_train_samples", type=int, metavar="N", help="check N random rows, always the same")
    add("--cache_dir", metavar="FOLDER", help="cache folder of downloaded datasets")
    add = parser.add_argument_group("checks").add_argument
    add("--against", action="append", default=[], metavar="DATASET", help="report images of this dataset; may repeat")
    add("--against_split", default="train", metavar="SPLIT", help="split of --against (default: train)")
    add("--tokenizer", metavar="FOLDER", help="tokenizer that counts tokens (default: the number is estimated)")
    add = parser.add_argument_group("output").add_argument
    add("--report_dir", type=Path, metavar="FOLDER", help="write report.html (with images) and report.json")
    add("--fix", type=Path, metavar="FOLDER", help="write a copy without duplicates and rows with errors")
    add("--fix_swapped", action="store_true", help="with --fix: exchange the images of swapped pairs, do not drop them")
    add("--fix_shifts", action="store_true", help="with --fix: crop shifted pairs to the area that both images show")
    add("--overwrite", action="store_true", help="with --fix: replace another dataset in its folder")
    add("--num_workers", type=int, default=0, metavar="N", help="worker processes (default: 0, check in this process)")
    add_config_flag(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with all problems of the flags."""
    problems, dataset = [], Path(args.dataset_name)
    if args.max_train_samples is not None and args.max_train_samples < 1:
        problems.append(f"--max_rows {args.max_train_samples}: must be at least 1")
    if not 0 <= args.num_workers <= 1024:
        problems.append(f"--num_workers {args.num_workers}: must be from 0 to 1024")
    if not args.fix and (args.fix_swapped or args.fix_shifts or args.overwrite):
        problems.append("--fix_swapped, --fix_shifts and --overwrite change the cleaned copy: add --fix FOLDER")
    for flag in ("report_dir", "fix"):
        folder = getattr(args, flag)
        if folder and any(path.is_file() for path in (folder, *folder.parents)):
            problems.append(f"--{flag} {folder}: is a file or is inside a file; give a folder")
        if folder and dataset.is_dir() and folder.resolve().is_relative_to(dataset.resolve()):
            problems.append(f"--{flag} {folder}: is inside the dataset; give another folder")
    if args.tokenizer and not Path(args.tokenizer).is_dir():
        problems.append(f"--tokenizer {args.tokenizer}: is not a folder; give the tokenizer folder of a model")
    if problems:
        raise InputError.from_problems(problems)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    check_flags(args)
    quiet_libraries()
    from data_preparation.checking.diagnosis import diagnose
    from data_preparation.checking.report import describe, write_reports
    from data_preparation.checking.scan import DatasetToCheck

    against = [DatasetToCheck(name, split=args.against_split, cache_dir=args.cache_dir) for name in args.against]
    diagnosis = diagnose(pick(args, DatasetToCheck), against, args.num_workers, args.tokenizer)
    print(describe(diagnosis), flush=True)
    if args.report_dir:
        write_reports(diagnosis, args.report_dir)
        print(f"wrote {args.report_dir / 'report.html'} and {args.report_dir / 'report.json'}")
    if args.fix:
        from data_preparation.checking.cleaning import write_cleaned_copy

        summary = write_cleaned_copy(
            diagnosis, args.fix, args.fix_swapped, args.fix_shifts, args.num_workers, args.overwrite
        )
        print(summary.describe(args.fix))
    return int(any(diagnosis.findings.kinds("error")))


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        try:
            return run(parse_flags(argv))
        except KeyboardInterrupt:
            print("\ninterrupted: no report was written", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
