"""Publish pairs as a dataset on the Hugging Face Hub: split by source image, with a card, under a licence that holds.

    python data_preparation/export_to_hub.py --data_root pairs --repo_id my-pairs --private
    python data_preparation/export_to_hub.py --data_root pairs --repo_id my-pairs --no_push

--data_root is a pair set of these scripts, or any folder or saved dataset on which the training scripts run. The export
is made in a folder first (by default beside it, data_root-export), where it can be looked at, and uploaded from there.
Killed at any moment, the same command goes on. docs/exporting.md tells what comes out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SMALLEST_SHARD = 1000


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("the pairs").add_argument
    add(
        "--data_root",
        type=Path,
        default=Path("cartoonizer-dataset"),
        help="folder of the pairs (default cartoonizer-dataset)",
    )
    add("--dataset_split", default="train", help="which of its splits, where it has several (default: train)")
    add = parser.add_argument_group("the export").add_argument
    add("--export_dir", type=Path, help="folder to make it in (default: data_root-export, beside it)")
    add(
        "--split",
        default="90,5,5",
        metavar="T,V,T",
        help="percent of train, validation and test, counted in rows; "
        "all rows of one source image go to one side (default: 90,5,5)",
    )
    add("--seed", type=int, default=0, help="of the split")
    add("--max_shard_size", default="500MB", metavar="SIZE", help="of one parquet file, about (default: 500MB)")
    add("--num_workers", type=int, default=0, help="processes that write files; the files are the same for any number")
    add("--overwrite", action="store_true", help="replace an export of other rows or settings, once this is complete")
    add = parser.add_argument_group("the card").add_argument
    add(
        "--license",
        metavar="ID",
        help="the Hub's id of a licence, no more permissive than any source's, or other "
        "(default: that of the strictest source)",
    )
    add(
        "--accept_unknown_license",
        action="store_true",
        help="you vouch for sources and models whose licence is not known, or whose terms are not",
    )
    add("--language", default="en", help="of the instructions, as ISO 639-1 (default: en)")
    add = parser.add_argument_group("the Hub").add_argument
    add(
        "--repo_id",
        metavar="NAME",
        help="dataset to publish as: name, or owner/name (default: the name of --data_root)",
    )
    add("--private", action="store_true", help="make it a private dataset")
    add("--no_push", action="store_true", help="make the export and upload nothing")
    add("--hub_token", help="better: `hf auth login` or HF_TOKEN, which leave no trace in the shell")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with all that can be told from the flags; split and size become numbers."""
    problems = []
    if not args.data_root.is_dir():
        problems.append(f"--data_root {args.data_root}: no such folder; give the folder of the pairs")
    args.export_dir = args.export_dir or args.data_root.absolute().with_name(f"{args.data_root.absolute().name}-export")
    args.export_dir = args.export_dir.absolute()
    if args.data_root.is_dir() and args.export_dir.resolve().is_relative_to(args.data_root.resolve()):
        problems.append(
            f"--export_dir {args.export_dir}: lies in --data_root, whose readers would find every row twice"
        )
    args.repo_id = args.repo_id or args.data_root.absolute().name
    if not re.fullmatch(r"(?:[\w-][\w.-]*/)?\w[\w.-]{0,95}", args.repo_id) or ".." in args.repo_id:
        problems.append(f"--repo_id {args.repo_id}: must be name or owner/name, of letters, digits, '-', '_' and '.'")
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", args.language):
        problems.append(f"--language {args.language}: must be an ISO 639-1 code such as en or de")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    if not 0 <= args.num_workers <= 256:
        problems.append(f"--num_workers {args.num_workers}: must be from 0 to 256")
    if args.private and args.no_push:
        problems.append("--private belongs to the upload, which --no_push leaves out: drop one of them")
    args.split, found = parse_split(args.split)
    args.max_shard_size, more = parse_size(args.max_shard_size)
    problems += found + more
    if problems:
        raise InputError.from_problems(problems)


def parse_split(text: str) -> tuple[list[float], list[str]]:
    """Shares of train, validation and test, which sum to 1, and what is wrong with the text."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share <= 100 for share in shares) or abs(sum(shares) - 100) > 1e-6:
        return [], [f"--split {text}: must be three shares in percent that sum to 100, such as 90,5,5 or 100,0,0"]
    if not shares[0]:
        return [], [f"--split {text}: leaves nothing to train on"]
    return [share / 100 for share in shares], []


def parse_size(text: str) -> tuple[int, list[str]]:
    """A size in bytes, and what is wrong with the text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match.group(1)) * UNITS.get(match.group(2), 0)) if match else 0
    if size < SMALLEST_SHARD:
        return 0, [f"--max_shard_size {text}: must be a number with a unit, such as 500MB or 1GB"]
    return size, []


def run(args: argparse.Namespace) -> None:
    quiet_libraries()
    from data_preparation.exporting.exports import Options, make_export, read_record
    from data_preparation.exporting.pushing import push
    from utils.hub import check_push_rights

    read_record(args.export_dir)  # refuses a folder that is not ours before the Hub is asked
    repo_id = args.repo_id
    if not args.no_push:
        repo_id = check_push_rights(repo_id, args.hub_token, args.export_dir, args.private, repo_type="dataset")
    folder = make_export(pick(args, Options), repo_id)
    print(f"the export stands in {folder}; its README.md is the card")
    if args.no_push:
        print("not uploaded (--no_push); the same command without it uploads")
        return
    print(f"uploading to {repo_id}", flush=True)
    address = push(folder, repo_id, args.hub_token)
    print(f"published: {address}\n  datasets.load_dataset({repo_id!r})")


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    with exit_on_input_error():
        check_flags(args)
        run(args)


if __name__ == "__main__":
    main()
