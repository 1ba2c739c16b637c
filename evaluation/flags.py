"""Flags that the evaluation scripts share. Nothing heavy is imported here."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.cli import FlagParser
from utils.editing.flags import find_missing_path
from utils.editing.settings import find_setting_problems
from utils.errors import InputError, exit_on_input_error
from utils.settings_file import add_config_flag

IP2P_CLIP, MAGICBRUSH_CLIP, DINO = (
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-base-patch32",
    "facebook/dino-vits16",
)


def make_parser(description: str, clip_model: str) -> FlagParser:
    """The parser with the flags of editors, data, edits and encoders. clip_model: the default of --clip_model."""
    parser = FlagParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("editors").add_argument
    add("--model", action="append", required=True, metavar="EDITOR", help="folder or Hub id of an editor; may repeat")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add("--batch_size", type=int, default=1, metavar="N", help="edits at once, halved if out of memory (default 1)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", required=True, metavar="DATASET", help="Hub id or folder of a dataset, as for training")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset, if it has several")
    add("--dataset_split", default="train", metavar="SPLIT", help="split (default train)")
    for role in ("original_image", "edit_prompt", "edited_image"):
        extra = "; none: the dataset has no target images" if role == "edited_image" else ""
        add(f"--{role}_column", metavar="NAME", help=f"default: found as in training{extra}")
    for role in ("original_caption", "edited_caption", "mask"):
        extra = "; exact: where the target differs from the original" if role == "mask" else ""
        add(f"--{role}_column", metavar="NAME", help=f"default: found by the names of published datasets{extra}")
    add("--num_samples", type=int, metavar="N", help="a random subset of N rows, always the same (default: all)")
    add("--cache_dir", metavar="FOLDER", help="cache folder of downloaded datasets")
    add = parser.add_argument_group("edits").add_argument
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="results; the same command again resumes")
    add("--seed", type=int, default=0, metavar="N", help="seed of the subset and of the edits (default 0)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the editor's)")
    add(
        "--resolution", type=int, metavar="N", help="longer side in pixels at which the editor works (default: its own)"
    )
    add = parser.add_argument_group("scores").add_argument
    add("--clip_model", default=clip_model, metavar="MODEL", help=f"CLIP or SigLIP, or none (default {clip_model})")
    add("--dino_model", default=DINO, metavar="MODEL", help=f"DINO or DINOv2, or none (default {DINO})")
    masks = "CLIPSeg model that finds the area of the instruction where the dataset has no mask"
    add("--mask_model", metavar="MODEL", help=masks)
    add_config_flag(parser)
    return parser


def run_script(
    parse: Callable[[list[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """The exit code of an evaluation script: `run` of its flags, an error as one message, and 130 after Ctrl-C."""
    with exit_on_input_error():
        try:
            return run(parse(argv))
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again to resume", file=sys.stderr)
            return 130


def add_judge_flags(parser: FlagParser) -> None:
    add = parser.add_argument_group("judge").add_argument
    add("--judge", metavar="URL", help="server with OpenAI's API and a vision model that judges the edits")
    add("--judge_model", metavar="NAME", help="its model")
    key = "OPENAI_API_KEY"
    add("--judge_key_env", default=key, metavar="NAME", help=f"environment variable of the key (default {key})")
    add("--judge_concurrency", type=int, default=4, metavar="N", help="questions at a time (default 4)")
    add("--judge_retries", type=int, default=4, metavar="N", help="further attempts of a question (default 4)")


def find_judge_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the judge."""
    problems = []
    if bool(args.judge) != bool(args.judge_model):
        problems.append("--judge and --judge_model belong together: give both or neither")
    for name, least in (("judge_concurrency", 1), ("judge_retries", 0)):
        if not least <= getattr(args, name) <= 100:
            problems.append(f"--{name} {getattr(args, name)}: must be from {least} to 100")
    return problems


def check_flags(args: argparse.Namespace, *more: str) -> None:
    """Raise one InputError with all problems of the shared flags. more: further problems."""
    problems = [*_problems(args), *more]
    if problems:
        raise InputError.from_problems(problems)


def _problems(args: argparse.Namespace) -> Iterator[str]:
    yield from find_setting_problems(
        {name: getattr(args, name) for name in ("steps", "resolution", "seed", "batch_size")}
    )
    for model in args.model:
        for name in model.split("+"):  # an editor, and adapters of compare_models.py
            yield from find_missing_path("model", name)
    if len(set(args.model)) < len(args.model):
        yield "--model names the same editor twice: remove one"
    if args.num_samples is not None and args.num_samples < 1:
        yield f"--num_samples {args.num_samples}: must be at least 1"
    if any(path.is_file() for path in (args.output_dir, *args.output_dir.parents)):
        yield f"--output_dir {args.output_dir}: is a file or is inside one; name a folder"


def label_models(models: list[str]) -> dict[str, str]:
    """A short, distinct label for each editor, for files and plots: as many last parts of the paths as it takes."""
    parts = [[part for part in model.split("/") if part] for model in models]
    for size in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(each[-size:]) for each in parts]
        labels = ["".join(c if c.isalnum() or c in "-_.+" else "-" for c in label) for label in labels]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(models, labels, strict=True))
