"""Captions -> (instruction, edited caption), by a language model: phase one of InstructPix2Pix.

    python data_preparation/generate_captions.py --captions captions.txt --data_root triples \\
        --base_url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-7B-Instruct --num_samples 1000
    python data_preparation/generate_captions.py --captions laion/some-captions --caption_column TEXT \\
        --data_root triples --model my-instruct-model --batch_size 32

The key of a server is read from the environment (OPENAI_API_KEY). To resume an interrupted run, run the same command
again. docs/captions.md describes the formats.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation import peer_flags  # noqa: E402
from data_preparation.captions.model_flags import (  # noqa: E402
    add_model_flags,
    choose_model,
    find_model_problems,
    use_server_as_original,
)
from data_preparation.generation.generation_flags import (  # noqa: E402
    add_generation_flags,
    choose_workers,
    generation_flag_problems,
    parse_with_dataset_config,
)
from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

LIMITS = {"num_samples": (1, 10**9), "edits_per_caption": (1, 1000), "tries": (1, 20), "items_per_shard": (1, 10**6)}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=__doc__, formatter_class=raw, aliases=peer_flags.GENERATE_CAPTIONS)
    add = parser.add_argument_group("captions").add_argument
    source_help = ".txt (one caption per line), .jsonl, .json, .csv or .parquet file, dataset folder, or Hub dataset id"
    add("--captions", required=True, metavar="SOURCE", help=source_help)
    add("--caption_column", metavar="NAME", help="column of the captions (default: caption, text, TEXT, prompt, ...)")
    add("--split", default="train", help="split of the dataset (default train)")
    add("--dataset_config_name", metavar="NAME", help="configuration of a dataset that has several")
    add("--dataset_revision", metavar="REVISION", help="branch, tag or commit of a dataset on the Hub")
    add("--num_samples", type=int, metavar="N", help="number of triples (default: use all captions)")
    add("--edits_per_caption", type=int, default=1, metavar="N", help="different edits of each caption (default 1)")
    tries_help = "attempts for each edit until an answer is usable (default 3, as the original)"
    add("--tries", type=int, default=3, metavar="N", help=tries_help)
    shard_help = "captions saved together; a killed run loses its unfinished shards (default 100)"
    add("--items_per_shard", type=int, default=100, metavar="N", help=shard_help)
    add_model_flags(parser)
    add_generation_flags(parser, image_format=None)
    jsonl_help = "also write prompts.jsonl, the file of the original (default: yes)"
    parser.add_argument("--jsonl", action=argparse.BooleanOptionalAction, default=True, help=jsonl_help)
    args = parse_with_dataset_config(parser, argv)
    use_server_as_original(args, bool(parser.implied))
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with the problems of all flags."""
    problems = [*find_model_problems(args), *generation_flag_problems(args)]
    for name, (lowest, highest) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            problems.append(f"--{name} {value}: must be from {lowest} to {highest}")
    if args.ray and args.requests_per_minute and not args.num_workers:
        problems.append("--requests_per_minute with --ray: give --num_workers, which share the limit evenly")
    path = Path(args.captions)
    if args.captions.startswith(("/", ".", "~")) and not path.expanduser().exists():
        problems.append(f"--captions {args.captions}: the file or folder does not exist")
    if problems:
        raise InputError.from_problems(problems)


def generate(args: argparse.Namespace) -> str:
    """Generate the triples. Returns the summary to print."""
    from data_preparation.captions.backends import UsageLog, describe_token_cost
    from data_preparation.captions.model_flags import digest_moderation
    from data_preparation.captions.prompts import SamplingOptions, digest_prompts
    from data_preparation.captions.triple_generation import TripleGenerator, export_prompts
    from data_preparation.generation.inputs import Captions
    from data_preparation.generation.runner import run_generation
    from data_preparation.generation.user_functions import with_absolute_path

    usage_path = args.data_root.absolute() / "usage.jsonl"
    captions = Captions(args.captions, args.caption_column, args.split, args.dataset_config_name, args.dataset_revision)
    opened, sampling, usage_log = captions.open(), pick(args, SamplingOptions), UsageLog(usage_path)
    requests_before, model = usage_log.total()["requests"], choose_model(args, num_runs(args))
    moderation = args.moderation and with_absolute_path(args.moderation)
    asking = (args.seed, args.edits_per_caption, args.tries, moderation)
    generator = TripleGenerator(len(opened), captions, model, sampling, *asking, usage_path)
    flags = ("model", "revision", "structure", "seed", "edits_per_caption", "tries", "dtype", "batch_size")
    settings = {name: getattr(args, name) for name in flags} | {
        "captions": opened.digest,
        "caption_column": opened.column,
        "server": bool(args.base_url),
        "sampling": vars(sampling),
        "moderation": digest_moderation(args.moderation),
        "prompts": digest_prompts(),
    }
    summary = run_generation(
        generator,
        args.data_root,
        settings,
        items_per_shard=args.items_per_shard,
        max_rows=args.num_samples,
        workers=choose_workers(args, needs_gpu=not args.base_url and args.device != "cpu"),
        unit="triple",
        overwrite=args.overwrite,
        note=lambda: describe_token_cost(usage_log.total(), args.price_in, args.price_out),
    )
    lines = [summary.describe(args.data_root, "triple")]
    if args.jsonl and not summary.unfinished:
        lines.append(f"  also written as JSON lines: {export_prompts(args.data_root)}")
    return "\n".join([*lines, *describe_usage(args, usage_log.total(), requests_before, summary.seconds)])


def num_runs(args: argparse.Namespace) -> int:
    """Workers of all partitions, which share --requests_per_minute."""
    return max(1, args.num_workers) * args.num_partitions


def describe_usage(args: argparse.Namespace, usage: Counter, requests_before: int, seconds: float) -> list[str]:
    from data_preparation.captions.backends import describe_token_cost

    lines = []
    if usage["requests"]:
        lines.append(f"  total usage of this folder: {describe_token_cost(usage, args.price_in, args.price_out)}")
    if new := usage["requests"] - requests_before:
        lines.append(f"  this run: {new:,} requests in {seconds:,.0f} s, {new / seconds:,.1f} per second")
    return lines


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
