"""Triples {"caption" or "input", "edit", "output"}, a line each -> a file to fine-tune a language model on.

    python data_preparation/prepare_for_finetuning.py --input triples.jsonl --output finetuning.jsonl --format legacy
    python data_preparation/prepare_for_finetuning.py --input triples.jsonl --output chat.jsonl --validation_split 0.05

legacy is the original's format (prompt and completion with delimiters), for generate_captions.py --format legacy; chat
gives messages, as hosted and local trainers of instruct models take them. Lines that cannot be used are counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.captions.finetuning import as_line, read_triples, split_triples  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("files").add_argument
    add("--input", type=Path, required=True, metavar="FILE", help="triples, or a folder of generate_captions.py")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write; with --validation_split also NAME-validation.jsonl beside it",
    )
    add("--overwrite", action="store_true", help="replace files that are there")
    add = parser.add_argument_group("how").add_argument
    add("--format", choices=("legacy", "chat"), default="chat", help="(default chat)")
    add(
        "--validation_split",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the captions, kept out of training (default 0)",
    )
    add("--seed", type=int, default=0, help="of that split (default 0)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write. Raises one InputError with everything that cannot be."""
    problems = []
    if args.input.is_dir():
        args.input = args.input / "prompts.jsonl"
    if not args.input.is_file():
        problems.append(f"--input {args.input}: there is no such file")
    if not 0 <= args.validation_split < 1:
        problems.append(f"--validation_split {args.validation_split}: must be from 0 to below 1")
    outputs = {"training": args.output}
    if args.validation_split > 0:
        outputs["validation"] = args.output.with_name(f"{args.output.stem}-validation{args.output.suffix}")
    for path in outputs.values():
        if path.is_dir():
            problems.append(f"--output {path}: is a folder; give a file")
        elif path.exists() and path.resolve() == args.input.resolve():
            problems.append(f"--output {path} is the input itself: choose another name")
        elif path.exists() and not args.overwrite:
            problems.append(f"--output {path}: is there already; choose another name, or give --overwrite")
    if problems:
        raise InputError.from_problems(problems)
    return outputs


def prepare(args: argparse.Namespace, outputs: dict[str, Path]) -> str:
    """Write the files, whole or not at all; returns what is to be said of them."""
    is_legacy = args.format == "legacy"
    checked = read_triples(args.input, is_legacy)
    parts = split_triples(checked.triples, args.validation_split, args.seed)
    said = []
    if not all(parts[: len(outputs)]):
        raise InputError(
            f"--validation_split {args.validation_split}: one side of {len(checked.triples)} triples is empty"
        )
    for (kind, path), triples in zip(outputs.items(), parts, strict=False):
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text("".join(as_line(triple, is_legacy) for triple in triples), encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from error
        said.append(f"wrote {len(triples):,} lines for {kind} to {path}")
    return "\n".join([*said, *filter(None, [checked.describe()])])


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        print(prepare(args, check_flags(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
