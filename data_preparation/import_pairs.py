"""Take pairs over from what you have: two folders, a published dataset, the original InstructPix2Pix's files, a table.

    python data_preparation/import_pairs.py --source photos --edited_dir cartoons --edit_prompt "Make it a cartoon." \\
        "Turn this into a cartoon." --data_root pairs
    python data_preparation/import_pairs.py --source restoration/ --task denoise --data_root pairs     # lq/ and gt/
    python data_preparation/import_pairs.py --source clip-filtered-dataset/ --data_root pairs          # seeds.json
    python data_preparation/import_pairs.py --source osunlp/MagicBrush --data_root pairs               # of the Hub
    python data_preparation/import_pairs.py --source TIGER-Lab/OmniEdit-Filtered-1.2M --streaming \\
        --max_num_samples 5000 --data_root pairs
    python data_preparation/import_pairs.py --source pairs.csv --data_root pairs                       # paths or URLs

What the source is, is found out by looking, or said by --format. Pictures stay the files that they are (JPEG, PNG or
WebP that decode and stand upright). Pairs that cannot be trained on are counted with the reason. docs/data.md has more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from data_preparation.instructions import available_tasks, read_phrasings  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402

if TYPE_CHECKING:
    from data_preparation.importing.pairs import Source

FORMATS = ("folders", "seeds", "dataset", "table")
# Which formats a flag speaks of; given for another, it is refused.
OF_FORMAT = {
    "edited_dir": ("folders",),
    "edit_prompt": ("folders",),
    "prompts": ("folders",),
    "task": ("folders",),
    "samples_per_prompt": ("seeds",),
    "dataset_split": ("dataset",),
    "dataset_config_name": ("dataset",),
    "streaming": ("dataset",),
    "inverse": ("dataset",),
    "image_root": ("table",),
    "original_image_column": ("dataset", "table"),
    "edit_prompt_column": ("dataset", "table"),
    "edited_image_column": ("dataset", "table"),
}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("source").add_argument
    add("--source", required=True, help="a folder, a table's file, or the Hub id of a dataset")
    add("--format", choices=FORMATS, help="what it is (default: found out by looking)")
    add("--max_num_samples", type=int, metavar="N", help="take so many, drawn by the seed (of a stream the first)")
    add(
        "--all_prompts",
        action="store_true",
        help="of several ways to ask for an edit, make a row of each (default: one is drawn)",
    )
    add("--source_license", metavar="NAME", help="licence to note in each row (default: what the source's card says)")
    add = parser.add_argument_group("two folders").add_argument
    add("--edited_dir", type=Path, metavar="FOLDER", help="folder of the edited pictures, with the originals' names")
    add("--edit_prompt", nargs="+", metavar="TEXT", help="instruction of every pair; of several, one is drawn for each")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".txt (a name, a tab and the instruction in each line), .csv or "
        ".jsonl with a name and an instruction (default: prompts.txt, .csv or .jsonl in --source)",
    )
    add("--task", help=f"draw the instructions of this task, or lines of a .txt file: {', '.join(available_tasks())}")
    add(
        "--heldout_phrasings",
        type=int,
        default=10,
        metavar="N",
        help="of which so many last ones stay out of training (default 10)",
    )
    add = parser.add_argument_group("the original InstructPix2Pix's files").add_argument
    add("--samples_per_prompt", type=int, metavar="N", help="pairs of each prompt, best direction first (default: all)")
    add = parser.add_argument_group("dataset and table").add_argument
    add("--dataset_split", metavar="SPLIT", help="split to take (default train)")
    add("--dataset_config_name", metavar="NAME", help="configuration, where there are several")
    add("--streaming", action="store_true", help="read it as a stream, without storing it")
    add(
        "--inverse",
        action="store_true",
        help="also the swapped pair, with the instruction of column inverse_edit (UCSC-VLAA/HQ-Edit)",
    )
    for role, what in (
        ("original_image", "image before the edit"),
        ("edit_prompt", "instruction"),
        ("edited_image", "image after the edit"),
    ):
        add(f"--{role}_column", metavar="NAME", help=f"column of the {what} (default: known for published datasets)")
    add = parser.add_argument_group("table").add_argument
    add(
        "--image_root",
        metavar="FOLDER",
        help="folder or address that paths are relative to (default: the table's folder)",
    )
    add("--download_mb", type=float, default=50, metavar="MB", help="largest picture that is fetched (default 50)")
    add("--download_timeout", type=float, default=30, metavar="SECONDS", help="longest that one may take (default 30)")
    add("--download_retries", type=int, default=2, metavar="N", help="further attempts after a failure (default 2)")
    add("--download_threads", type=int, default=16, metavar="N", help="pictures fetched at a time (default 16)")
    add_generation_flags(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    problems = generation_flag_problems(args)
    ranges = {
        "max_num_samples": 1,
        "samples_per_prompt": 1,
        "download_mb": 0.001,
        "download_timeout": 0.1,
        "download_retries": 0,
        "download_threads": 1,
        "heldout_phrasings": 0,
    }
    for flag, least in ranges.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= 2**31:
            problems.append(f"--{flag} {value}: must be at least {least}")
    ways = [f"--{flag}" for flag in ("edit_prompt", "prompts", "task") if getattr(args, flag)]
    if len(ways) > 1:
        problems.append(f"{' and '.join(ways)}: the instructions come from one of them")
    if args.edit_prompt and not all(prompt.strip() for prompt in args.edit_prompt):
        problems.append("--edit_prompt: an instruction is empty")
    if args.task is not None:
        try:
            read_phrasings(args.task, args.heldout_phrasings)
        except InputError as error:
            problems.append(f"--task {args.task}, --heldout_phrasings {args.heldout_phrasings}: {error}")
    for flag in ("edited_dir", "prompts"):
        path = getattr(args, flag)
        if path is not None and not (path.is_dir() if flag == "edited_dir" else path.is_file()):
            problems.append(f"--{flag} {path}: there is no such {'folder' if flag == 'edited_dir' else 'file'}")
    root = args.image_root
    if root is not None and not root.startswith(("http://", "https://")) and not Path(root).is_dir():
        problems.append(f"--image_root {root}: there is no such folder (or give an http(s) address)")
    if args.format:
        problems += format_problems(args, args.format)
    if problems:
        raise InputError.from_problems(problems)


def format_problems(args: argparse.Namespace, format_name: str) -> list[str]:
    """Flags that speak of another kind of source."""
    given = [flag for flag, formats in OF_FORMAT.items() if format_name not in formats and getattr(args, flag)]
    return [
        f"--{flag}: is for --format {' or '.join(OF_FORMAT[flag])}, and --source is {format_name}" for flag in given
    ]


def open_source(args: argparse.Namespace, format_name: str, place: Path | str) -> Source:
    """The source of a format, looked at."""
    from utils.data.columns import Columns

    columns = Columns(args.original_image_column, args.edit_prompt_column, args.edited_image_column)
    if format_name == "folders":
        from data_preparation.importing.folders import find_folders, find_pairs

        folders = find_folders(place, args.edited_dir)
        if folders is None:
            raise InputError(f"--source {place} has no two subfolders such as original/ and edited/: give --edited_dir")
        common = read_phrasings(args.task, args.heldout_phrasings)[0] if args.task else args.edit_prompt or []
        return find_pairs(place, *folders, common, args.prompts)
    if format_name == "seeds":
        from data_preparation.importing.seeds import find_seeds

        return find_seeds(place, args.samples_per_prompt)
    if format_name == "table":
        from data_preparation.importing.detect import table_in
        from data_preparation.importing.tables import Downloads, find_table

        limits = Downloads(args.download_mb, args.download_timeout, args.download_retries, args.download_threads)
        return find_table(table_in(place) if place.is_dir() else place, columns, args.image_root, limits)
    from data_preparation.importing.published import find_rows

    split = args.dataset_split or "train"
    rows = (args.streaming, args.max_num_samples, columns, args.inverse)
    return find_rows(str(place), args.dataset_config_name, split, *rows)


def provenance_of(args: argparse.Namespace, place: Path | str) -> dict[str, Any]:
    """What every row says of where it comes from: never a path of this machine."""
    from utils.hub_names import public_name
    from utils.licences import find_dataset_license

    name, license_name = public_name(str(place)), args.source_license or find_dataset_license(str(place))
    if license_name is None:
        print(f"warning: the licence of {name} is not known; --source_license notes it", file=sys.stderr)
    found = {"source_dataset": name, "source_license": license_name}
    return found | ({"task": Path(args.task).stem, "phrasing": "train"} if args.task else {})


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    from data_preparation.generation.runner import run_generation
    from data_preparation.importing.detect import find_format
    from data_preparation.importing.pairs import PairRecipe
    from utils.quiet import quiet_libraries

    quiet_libraries()
    format_name, place = find_format(args.source, args.edited_dir, args.format)
    if problems := format_problems(args, format_name):
        raise InputError.from_problems(problems)
    source, provenance = open_source(args, format_name, place), provenance_of(args, place)
    limit = args.max_num_samples
    is_shuffled = limit is not None and limit < source.num_items and not args.streaming
    recipe = PairRecipe(source, args.seed, args.image_format, args.all_prompts, is_shuffled, provenance)
    drawn = {"seed": args.seed, "image_format": args.image_format, "all_prompts": args.all_prompts}
    settings = source.identity() | provenance | drawn
    workers = choose_workers(args)
    summary = run_generation(recipe, args.data_root, settings, max_rows=limit, workers=workers, overwrite=args.overwrite)
    print(summary.describe(args.data_root))


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()
