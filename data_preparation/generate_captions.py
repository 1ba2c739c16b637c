"""Captions -> (instruction, edited caption), by a language model: phase one of InstructPix2Pix.

    python data_preparation/generate_captions.py --captions captions.txt --data_root triples \\
        --base_url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-7B-Instruct --num_samples 1000
    python data_preparation/generate_captions.py --captions laion/some-captions --caption_column TEXT \\
        --data_root triples --model my-instruct-model --batch_size 32

A server's key is read from the environment (OPENAI_API_KEY) alone. Killed at any moment, the same command goes on.
docs/captions.md has the formats.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.captions.flags import add_model_flags, model_problems, pick_sampling, pick_source  # noqa: E402
from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

LIMITS = {"num_samples": (1, 10**9), "edits_per_caption": (1, 1000), "tries": (1, 20), "items_per_shard": (1, 10**6)}
LEDGER = "usage.jsonl"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("captions").add_argument
    add(
        "--captions",
        required=True,
        metavar="SOURCE",
        help="a .txt (a caption in each line), .jsonl, .json, .csv or "
        ".parquet file, a folder of such or of a saved dataset, or the id of a dataset on the Hub",
    )
    add("--caption_column", metavar="NAME", help="column of the captions (default: caption, text, TEXT, prompt, ...)")
    add("--split", default="train", help="of the dataset (default train)")
    add("--config", metavar="NAME", help="configuration of a dataset that has several")
    add("--dataset_revision", metavar="REVISION", help="branch, tag or commit of a dataset on the Hub")
    add("--num_samples", type=int, metavar="N", help="triples that are wanted (default: of all captions)")
    add(
        "--edits_per_caption",
        type=int,
        default=1,
        metavar="N",
        help="different edits of each caption, at most (default 1)",
    )
    add(
        "--tries",
        type=int,
        default=3,
        metavar="N",
        help="questions for each edit until an answer can be used (default 3, as the original)",
    )
    add(
        "--items_per_shard",
        type=int,
        default=100,
        metavar="N",
        help="captions that are made and saved together; "
        "what is made between two is lost when the run is killed (default 100)",
    )
    add_model_flags(parser)
    add_generation_flags(parser, image_format=None)
    parser.add_argument(
        "--jsonl",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write prompts.jsonl, the original's file, when all is there (default: yes)",
    )
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    problems = [*model_problems(args), *generation_flag_problems(args)]
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            problems.append(f"--{name} {value}: must be from {least} to {most}")
    path = Path(args.captions)
    if args.captions.startswith(("/", ".", "~")) and not path.expanduser().exists():
        problems.append(f"--captions {args.captions}: there is no such file or folder")
    if problems:
        raise InputError.from_problems(problems)


def generate(args: argparse.Namespace) -> str:
    """Make the triples; returns what is to be said of them."""
    from data_preparation.captions.ledger import Ledger, describe_cost
    from data_preparation.captions.moderation import digest_moderation
    from data_preparation.captions.prompt_files import write_prompts
    from data_preparation.captions.prompts import digest_prompts
    from data_preparation.captions.recipe import TripleRecipe
    from data_preparation.generation.inputs import Captions
    from data_preparation.generation.runner import run_generation

    root = args.data_root.absolute()
    captions = Captions(args.captions, args.caption_column, args.split, args.config, args.dataset_revision)
    opened, sampling = captions.open(), pick_sampling(args)
    ledger = Ledger(root / LEDGER)
    before = ledger.read().requests
    recipe = TripleRecipe(
        len(opened),
        captions,
        pick_source(args, args.num_workers),
        sampling,
        args.seed,
        args.edits_per_caption,
        args.tries,
        args.moderation,
        root / LEDGER,
    )
    settings: dict[str, Any] = dict(
        captions=opened.digest,
        caption_column=opened.column,
        model=args.model,
        revision=args.revision,
        server=bool(args.base_url),
        structure=args.structure,
        sampling=vars(sampling),
        seed=args.seed,
        edits_per_caption=args.edits_per_caption,
        tries=args.tries,
        moderation=digest_moderation(args.moderation),
        dtype=args.dtype,
        batch_size=args.batch_size,
        prompts=digest_prompts(),
    )
    summary = run_generation(
        recipe,
        args.data_root,
        settings,
        items_per_shard=args.items_per_shard,
        max_rows=args.num_samples,
        workers=choose_workers(args, needs_gpu=not args.base_url and args.device != "cpu"),
        unit="triple",
        overwrite=args.overwrite,
        note=lambda: describe_cost(ledger.read(), args.price_in, args.price_out),
    )
    said = [summary.describe(args.data_root, "triple")]
    if args.jsonl:
        said.append(f"  the same as lines of JSON: {write_prompts(args.data_root)}")
    used = ledger.read()
    if used.requests:
        said.append(f"  spent in this folder: {describe_cost(used, args.price_in, args.price_out)}")
    if used.requests > before:
        done, seconds = used.requests - before, summary.seconds
        said.append(f"  this run: {done:,} requests in {seconds:,.0f} s, {done / seconds:,.1f} a second")
    return "\n".join(said)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        check_flags(args)
        quiet_libraries()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        print(generate(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
