"""Import existing pairs: two folders, a published dataset, the original InstructPix2Pix's files, or a table.

    python data_preparation/import_pairs.py --source photos --edited_dir cartoons --edit_prompt "Make it a cartoon." \\
        "Turn this into a cartoon." --data_root pairs
    python data_preparation/import_pairs.py --source restoration/ --task denoise --data_root pairs     # lq/ and gt/
    python data_preparation/import_pairs.py --source clip-filtered-dataset/ --data_root pairs          # seeds.json
    python data_preparation/import_pairs.py --source osunlp/MagicBrush --data_root pairs               # on the Hub
    python data_preparation/import_pairs.py --source TIGER-Lab/OmniEdit-Filtered-1.2M --streaming \\
        --max_num_samples 5000 --data_root pairs
    python data_preparation/import_pairs.py --source pairs.csv --data_root pairs                       # paths or URLs

The format of the source is detected, or given by --format. Image files are stored unchanged if they are upright JPEG,
PNG or WebP files without alpha. Pairs that cannot be trained on are counted by reason. More in docs/importing.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from data_preparation.instructions import available_tasks, promises_outlines, read_phrasings  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.hub_names import looks_like_path, public_name  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402

if TYPE_CHECKING:
    from data_preparation.importing.source_pairs import PairSource

COLUMN_FLAGS = ("original_image_column", "edit_prompt_column", "edited_image_column")
FLAGS_OF_FORMAT = {  # a flag is refused for the other formats
    "folders": ("edited_dir", "edit_prompt", "prompts", "task"),
    "seeds": ("samples_per_prompt",),
    "dataset": ("dataset_split", "dataset_config_name", "streaming", "inverse", *COLUMN_FLAGS),
    "table": ("image_root", *COLUMN_FLAGS),
}
MINIMA = dict.fromkeys(("max_num_samples", "samples_per_prompt", "download_threads"), 1)
MINIMA |= {"download_mb": 0.001, "download_timeout": 0.1, "download_retries": 0, "heldout_phrasings": 0}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("source").add_argument
    add("--source", required=True, help="a folder, the file of a table, or the Hub id of a dataset")
    add("--format", choices=tuple(FLAGS_OF_FORMAT), help="format of the source (default: detected)")
    add("--max_num_samples", type=int, metavar="N", help="number of rows, a random sample (of a stream, the first)")
    add("--all_prompts", action="store_true", help="one row per instruction of a pair (default: one is drawn)")
    add("--source_license", metavar="NAME", help="licence noted in each row (default: from the source's card)")
    add = parser.add_argument_group("two folders").add_argument
    add("--edited_dir", type=Path, metavar="FOLDER", help="folder of the edited images, named like the originals")
    add("--edit_prompt", nargs="+", metavar="TEXT", help="instructions for all pairs; one is drawn for each pair")
    prompts_help = "instructions by file name: .txt (name, tab, instruction), .csv or .jsonl (default: prompts.*)"
    add("--prompts", type=Path, metavar="FILE", help=prompts_help)
    add("--task", help=f"draw the instructions of this task or .txt file; tasks: {', '.join(available_tasks())}")
    heldout_help = "N instructions of --task are not used, of other patterns than the rest (default 10)"
    add("--heldout_phrasings", type=int, default=10, metavar="N", help=heldout_help)
    add = parser.add_argument_group("original InstructPix2Pix's files").add_argument
    add(
        "--samples_per_prompt", type=int, metavar="N", help="pairs per prompt, best CLIP direction first (default: all)"
    )
    add = parser.add_argument_group("dataset and table").add_argument
    add("--dataset_split", metavar="SPLIT", help="split of the dataset (default train)")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset")
    add("--streaming", action="store_true", help="stream the dataset instead of downloading it")
    inverse_help = "also add the swapped pair, with the instruction in column inverse_edit (UCSC-VLAA/HQ-Edit)"
    add("--inverse", action="store_true", help=inverse_help)
    for flag, what in zip(COLUMN_FLAGS, ("original image", "instruction", "edited image"), strict=True):
        add(f"--{flag}", metavar="NAME", help=f"column of the {what} (default: known for published datasets)")
    add = parser.add_argument_group("table").add_argument
    add("--image_root", metavar="FOLDER", help="folder or URL of relative paths (default: the table's folder)")
    add("--download_mb", type=float, default=50, metavar="MB", help="maximum size of an image (default 50)")
    add("--download_timeout", type=float, default=30, metavar="SECONDS", help="maximum time per image (default 30)")
    add("--download_retries", type=int, default=2, metavar="N", help="retries after a temporary failure (default 2)")
    add("--download_threads", type=int, default=16, metavar="N", help="parallel downloads (default 16)")
    add_generation_flags(parser)
    add_config_flag(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with all problems of the flags."""
    problems = generation_flag_problems(args)
    for flag, minimum in MINIMA.items():
        value = getattr(args, flag)
        if value is not None and not minimum <= value <= 2**31:
            problems.append(f"--{flag} {value}: must be at least {minimum}")
    given = [f"--{flag}" for flag in ("edit_prompt", "prompts", "task") if getattr(args, flag)]
    if len(given) > 1:
        problems.append(f"{' and '.join(given)}: give only one of them")
    if args.edit_prompt and not all(prompt.strip() for prompt in args.edit_prompt):
        problems.append("--edit_prompt: an instruction is empty")
    if args.task is not None:
        try:
            read_phrasings(args.task, args.heldout_phrasings)
        except InputError as error:
            problems.append(f"--task {args.task}, --heldout_phrasings {args.heldout_phrasings}: {error}")
    if args.edited_dir is not None and not args.edited_dir.is_dir():
        problems.append(f"--edited_dir {args.edited_dir}: is not a folder")
    if args.prompts is not None and not args.prompts.is_file():
        problems.append(f"--prompts {args.prompts}: is not a file")
    root = args.image_root
    if root is not None and not root.startswith(("http://", "https://")) and not Path(root).is_dir():
        problems.append(f"--image_root {root}: is not a folder or an http(s) URL")
    if args.format:
        problems += format_problems(args, args.format)
    if problems:
        raise InputError.from_problems(problems)


def format_problems(args: argparse.Namespace, format_name: str) -> list[str]:
    """One line for each flag of other formats."""
    problems = []
    for flag in dict.fromkeys(flag for flags in FLAGS_OF_FORMAT.values() for flag in flags):
        formats = [name for name, flags in FLAGS_OF_FORMAT.items() if flag in flags]
        if format_name not in formats and getattr(args, flag):
            problems.append(f"--{flag}: only for --format {' or '.join(formats)}, but --source is of {format_name}")
    return problems


def detect_format(source: str, edited_dir: Path | None, given: str | None) -> tuple[str, Path | str]:
    """(a key of FLAGS_OF_FORMAT, the absolute path or Hub id of the source). given: by --format. Raises InputError."""
    from utils.data.tables import TABLE_SUFFIXES

    path = Path(source).expanduser().absolute()  # a Ray worker has another working directory
    if given == "dataset":
        return given, path if path.exists() else source
    if given is not None or edited_dir is not None:
        if not path.exists() or (path.is_file() and given != "table"):
            raise InputError(f"--source {source}: is not a folder" + (" or file" if given == "table" else ""))
        return given or "folders", path
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table", path
        raise InputError(f"--source {source}: must be a table ({', '.join(TABLE_SUFFIXES)}); unpack archives first")
    if path.is_dir():
        return detect_folder_format(path), path
    if looks_like_path(source):
        raise InputError(f"--source {source}: does not exist; give a folder, a file or the Hub id of a dataset")
    return "dataset", source


def detect_folder_format(folder: Path) -> str:
    """A key of FLAGS_OF_FORMAT. With a metadata file it is a dataset, whatever its subfolders."""
    from data_preparation.importing.folder_pairs import has_pair_folders
    from utils.data.folder_pairs import find_folders
    from utils.data.rows import METADATA_NAMES
    from utils.data.seed_folders import has_seed_folders
    from utils.data.suffix_pairs import find_suffix_pairs
    from utils.data.tables import TABLE_SUFFIXES

    if has_seed_folders(folder):
        return "seeds"
    is_saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    if is_saved or any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in METADATA_NAMES):
        return "dataset"
    if find_folders(folder) is not None or has_pair_folders(folder):
        return "folders"
    if any(path.suffix.lower() in (".parquet", ".arrow", ".tar") for path in folder.rglob("*")):
        return "dataset"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if any(name.lower().endswith(TABLE_SUFFIXES) for name in names):
        return "table"
    if find_suffix_pairs(folder):
        return "dataset"
    content = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    raise InputError(
        f"--source {folder}: holds {content}, which is not a known format. Give two folders of images (--edited_dir, "
        "or subfolders such as original/ and edited/), the original InstructPix2Pix's files (seeds.json, or folders "
        "with prompt.json), a dataset (parquet files, save_to_disk or metadata.jsonl), or a table of paths or URLs"
    )


def open_pair_source(args: argparse.Namespace, format_name: str, place: Path | str) -> PairSource:
    """The pairs of the source. place: as from `detect_format`. Raises InputError."""
    from utils.data.columns import Columns

    columns = Columns(args.original_image_column, args.edit_prompt_column, args.edited_image_column)
    if format_name == "folders":
        from data_preparation.importing.folder_pairs import find_folder_pairs, has_pair_folders
        from utils.data.folder_pairs import find_folders

        folders = (place, args.edited_dir.expanduser().absolute()) if args.edited_dir else find_folders(place)
        folders = folders or ((place, place) if has_pair_folders(place) else None)
        if folders is None:
            raise InputError(f"--source {place}: has no subfolders such as original/ and edited/; give --edited_dir")
        common = read_phrasings(args.task, args.heldout_phrasings)[0] if args.task else args.edit_prompt or []
        if args.task:  # the cartoons of others may have outlines or not
            common = [text for text in common if promises_outlines(text) is None] or common
        return find_folder_pairs(place, *folders, common, args.prompts)
    if format_name == "seeds":
        from data_preparation.importing.seed_folders import find_seed_folders

        return find_seed_folders(place, args.samples_per_prompt)
    if format_name == "table":
        from data_preparation.importing.table_pairs import DownloadLimits, find_table_pairs, table_in

        limits = DownloadLimits(args.download_mb, args.download_timeout, args.download_retries, args.download_threads)
        return find_table_pairs(table_in(place) if place.is_dir() else place, columns, args.image_root, limits)
    from data_preparation.importing.dataset_pairs import find_dataset_pairs

    split = args.dataset_split or "train"
    rows = (args.streaming, args.max_num_samples, columns, args.inverse)
    return find_dataset_pairs(str(place), args.dataset_config_name, split, *rows)


def common_provenance(args: argparse.Namespace, place: Path | str) -> dict[str, Any]:
    """Keywords of `make_pair` that are the same in every row; never a path on this machine."""
    from utils.licences import find_dataset_license

    name, license_name = public_name(str(place)), args.source_license or find_dataset_license(str(place))
    if license_name is None:
        print(f"warning: the licence of {name} is unknown; give it with --source_license", file=sys.stderr)
    provenance = {"source_dataset": name, "source_license": license_name}
    return provenance | ({"task": Path(args.task).stem, "phrasing": "train"} if args.task else {})


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    from data_preparation.generation.runner import run_generation
    from data_preparation.importing.source_pairs import ImportedPairs
    from utils.quiet import quiet_libraries

    quiet_libraries()
    format_name, place = detect_format(args.source, args.edited_dir, args.format)
    if problems := format_problems(args, format_name):
        raise InputError.from_problems(problems)
    source, provenance = open_pair_source(args, format_name, place), common_provenance(args, place)
    limit = args.max_num_samples
    is_shuffled = limit is not None and limit < source.num_items and not args.streaming
    generator = ImportedPairs(source, args.seed, args.image_format, args.all_prompts, is_shuffled, provenance)
    drawn = {"seed": args.seed, "image_format": args.image_format, "all_prompts": args.all_prompts}
    settings = source.identity() | provenance | drawn
    output = {"workers": choose_workers(args), "overwrite": args.overwrite}
    summary = run_generation(generator, args.data_root, settings, max_rows=limit, **output)
    print(summary.describe(args.data_root))


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()
