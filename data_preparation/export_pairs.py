"""Write a dataset of pairs in the layout of another trainer.

    python data_preparation/export_pairs.py --dataset_name pairs --layout control_target --output_dir for-ai-toolkit
    python data_preparation/export_pairs.py --dataset_name osunlp/MagicBrush --streaming --max_num_samples 1000 \\
        --layout webdataset --output_dir magicbrush-tars

The dataset is anything that the training scripts accept. Image files are copied unchanged if they are upright JPEG, PNG
or WebP files in sRGB without alpha. The folder appears when it is complete; skipped rows are counted and named.
docs/exporting.md describes the layouts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.exporting.pair_layouts import LAYOUTS  # noqa: E402
from data_preparation.generation.generation_flags import IMAGE_FORMATS  # noqa: E402
from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_argument
    add("--dataset_name", required=True, metavar="DATASET", help="Hub id or folder of a dataset")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, if it has several")
    add("--dataset_split", default="train", metavar="SPLIT", help="split to export (default: train)")
    add("--streaming", action="store_true", help="stream a dataset from the Hub instead of downloading it")
    add("--max_num_samples", type=int, metavar="N", help="export N random rows (of a stream, the first)")
    add("--original_image_column", metavar="NAME", help="column of the original images (default: found as in training)")
    add("--edit_prompt_column", metavar="NAME", help="column of the instructions")
    add("--edited_image_column", metavar="NAME", help="column of the edited images")
    add("--cache_dir", metavar="FOLDER", help="cache folder of downloaded datasets")
    add = parser.add_argument_group("output").add_argument
    add("--layout", required=True, choices=tuple(LAYOUTS), help="layout of the folder")
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    add("--all_prompts", action="store_true", help="one pair per instruction of a row (default: one is drawn)")
    add(
        "--image_format", choices=tuple(IMAGE_FORMATS), default="png", help="of images that must be encoded again (png)"
    )
    add("--seed", type=int, default=0, help="seed of --max_num_samples and of drawn instructions (default: 0)")
    add_config_flag(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with all problems of the flags."""
    problems, dataset, place = [], Path(args.dataset_name), args.output_dir
    if args.max_num_samples is not None and args.max_num_samples < 1:
        problems.append(f"--max_num_samples {args.max_num_samples}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        problems.append(f"--output_dir {place}: exists already; give another folder, or remove it first")
    if dataset.is_dir() and place.resolve().is_relative_to(dataset.resolve()):
        problems.append(f"--output_dir {place}: is inside the dataset, whose readers would see every pair twice")
    if problems:
        raise InputError.from_problems(problems)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        check_flags(args)
        quiet_libraries()
        from data_preparation.exporting.pair_folders import PairExport, export_pairs

        try:
            print(export_pairs(pick(args, PairExport)))
        except KeyboardInterrupt:
            print(f"\ninterrupted: run the same command again; {args.output_dir} was not written", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
