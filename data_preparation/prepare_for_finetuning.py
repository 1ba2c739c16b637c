"""Triples {"caption" or "input", "edit", "output"}, one per line -> a file to fine-tune a language model on.

    python data_preparation/prepare_for_finetuning.py --input triples.jsonl --output finetuning.jsonl --format legacy
    python data_preparation/prepare_for_finetuning.py --input triples.jsonl --output chat.jsonl --validation_split 0.05

legacy is the original's format (prompt and completion with delimiters), for generate_captions.py --format legacy; chat
writes messages, the format of common trainers. Unusable lines are left out and reported.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation import peer_flags  # noqa: E402
from data_preparation.captions.prompts import (  # noqa: E402
    PROMPT_END,
    SEPARATOR,
    STOP,
    TASK,
    Rejected,
    Triple,
    check_triple,
    comparable_text,
    example_messages,
    legacy_prompt,
)
from data_preparation.published_prompts import find_published_prompts  # noqa: E402
from utils.atomic_files import write_atomically  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.json_lines import parse_json_object  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402

MAX_LISTED = 5  # line numbers printed for each reason


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=__doc__, formatter_class=raw, aliases=peer_flags.PREPARE_FOR_FINETUNING)
    add = parser.add_argument_group("files").add_argument
    input_help = "triples: a file, a folder of generate_captions.py, or human-written-prompts (the original's file)"
    add("--input", type=Path, required=True, metavar="FILE", help=input_help)
    output_help = "output file; --validation_split also writes NAME-validation.jsonl beside it"
    add("--output", type=Path, required=True, metavar="FILE", help=output_help)
    add("--overwrite", action="store_true", help="replace existing output files")
    add = parser.add_argument_group("format").add_argument
    add("--format", choices=("legacy", "chat"), default="chat", help="format of the lines (default chat)")
    split_help = "share of the captions held out for validation (default 0)"
    add("--validation_split", type=float, default=0.0, metavar="SHARE", help=split_help)
    add("--seed", type=int, default=0, help="random seed of the split (default 0)")
    add_config_flag(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> dict[str, Path]:
    """The output files by purpose. Raises one InputError with the problems of all flags."""
    problems = []
    args.input = find_published_prompts(str(args.input)) or args.input
    if args.input.is_dir():
        args.input = args.input / "prompts.jsonl"
    if not args.input.is_file():
        problems.append(f"--input {args.input}: the file does not exist")
    if not 0 <= args.validation_split < 1:
        problems.append(f"--validation_split {args.validation_split}: must be from 0 to below 1")
    outputs = {"training": args.output}
    if args.validation_split > 0:
        outputs["validation"] = args.output.with_name(f"{args.output.stem}-validation{args.output.suffix}")
    for path in outputs.values():
        if path.is_dir():
            problems.append(f"--output {path}: is a folder; give a file")
        elif path.exists() and path.resolve() == args.input.resolve():
            problems.append(f"--output {path}: is the input file; choose another name")
        elif path.exists() and not args.overwrite:
            problems.append(f"--output {path}: already exists; choose another name, or add --overwrite")
    if problems:
        raise InputError.from_problems(problems)
    return outputs


def read_triples(path: Path, is_legacy: bool) -> tuple[list[Triple], dict[str, list[int]]]:
    """(usable triples, line numbers of the other lines by reason). Raises InputError if there is no usable triple."""
    triples, seen, rejected = [], set(), defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"--input {path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        triple = parse_line(line, is_legacy)
        if isinstance(triple, Triple) and (key := tuple(map(comparable_text, triple))) in seen:
            triple = Rejected("duplicate")
        if isinstance(triple, Rejected):
            rejected[triple.reason].append(number)
            continue
        seen.add(key)
        triples.append(triple)
    if not triples:
        raise InputError("\n".join([f"--input {path} contains no usable triple", *describe_rejected(rejected)]))
    return triples, rejected


def parse_line(line: str, is_legacy: bool) -> Triple | Rejected:
    """Raises nothing."""
    try:
        row = parse_json_object(line, "the line")
    except (ValueError, RecursionError):
        return Rejected("no JSON object")
    values = [row.get("caption", row.get("input")), row.get("edit"), row.get("output")]
    if any(value is None for value in values):
        return Rejected("missing key")
    if not all(isinstance(value, str) for value in values):
        return Rejected("not text")
    delimiters = (PROMPT_END.strip(), SEPARATOR.strip(), STOP)  # STOP without its line break is an ordinary word
    if is_legacy and any(delimiter in value for delimiter in delimiters for value in values):
        return Rejected("delimiter inside the text")
    return check_triple(*values)


def describe_rejected(rejected: dict[str, list[int]]) -> list[str]:
    """One line for each reason, the most frequent first."""
    lines = []
    for reason, numbers in sorted(rejected.items(), key=lambda item: -len(item[1])):
        listed = ", ".join(map(str, numbers[:MAX_LISTED])) + (", ..." if len(numbers) > MAX_LISTED else "")
        lines.append(f"  left out, {reason}: {len(numbers):,} (line {listed})")
    return lines


def split_triples(triples: list[Triple], share: float, seed: int) -> tuple[list[Triple], list[Triple]]:
    """(for training, for validation). All triples of a caption are in one part, which depends only on the caption."""
    parts: tuple[list[Triple], list[Triple]] = ([], [])
    for triple in triples:
        key = f"{seed} {comparable_text(triple.caption)}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        parts[draw < share].append(triple)
    return parts


def format_line(triple: Triple, is_legacy: bool) -> str:
    """{"prompt", "completion"} with the original's delimiters, or the {"messages"} of a chat, as one line of JSON."""
    if is_legacy:
        completion = f"{triple.edit}{SEPARATOR}{triple.output}{STOP}"
        row = {"prompt": legacy_prompt(triple.caption), "completion": completion}
    else:
        row = {"messages": [{"role": "system", "content": TASK}, *example_messages(triple)]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def prepare(args: argparse.Namespace, outputs: dict[str, Path]) -> str:
    """Write the files. Returns the summary to print."""
    is_legacy = args.format == "legacy"
    triples, rejected = read_triples(args.input, is_legacy)
    parts = split_triples(triples, args.validation_split, args.seed)
    if not all(parts[: len(outputs)]):
        problem = f"with {len(triples)} triples, the training or the validation file would be empty"
        raise InputError(f"--validation_split {args.validation_split}: {problem}")
    lines = []
    for (purpose, path), part in zip(outputs.items(), parts, strict=False):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(format_line(triple, is_legacy) for triple in part).encode())
        except OSError as error:
            raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from error
        lines.append(f"wrote {len(part):,} lines for {purpose} to {path}")
    return "\n".join([*lines, *describe_rejected(rejected)])


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        print(prepare(args, check_flags(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
