"""Generate image pairs from captions and edits, as in InstructPix2Pix: Prompt-to-Prompt, filtered by CLIP.

    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset fast
    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset ip2p --batch_size 16
    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset fast \\
        --init_images photographs --original real --num_inference_steps 8

Each row of --prompts has a caption, an edit and the edited caption, as written by generate_captions.py. See
docs/pairs.md.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation import peer_flags  # noqa: E402
from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from data_preparation.generation.user_functions import find_function_problem, with_absolute_path  # noqa: E402
from data_preparation.pairs import settings as pair_settings  # noqa: E402
from data_preparation.pairs.settings import PRESETS, PairSettings  # noqa: E402
from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import hide_progress_bars, quiet_libraries  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402

ROW_FLAGS = ("seed", "batch_size", "device", "dtype", "image_format", "init_image_column")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=__doc__, formatter_class=raw, aliases=peer_flags.GENERATE_PAIRS)
    add = parser.add_argument_group("input").add_argument
    prompts_help = "output of generate_captions.py, .jsonl file, folder or Hub id: columns caption, edit and output; "
    prompts_help += "or gpt-generated-prompts or human-written-prompts, the original's files"
    add("--prompts", required=True, metavar="CAPTIONS", help=prompts_help)
    add("--caption_column", metavar="NAME", help="column of the original captions (default: caption, or input)")
    add("--split", default="train", help="split of --prompts and --init_images (default train)")
    add("--max_captions", type=int, metavar="N", help="use only the first N captions")
    add("--init_images", metavar="PHOTOGRAPHS", help="start from photographs: a folder, a saved dataset or a Hub id")
    column_help = "column of --prompts with the photograph's name (default: file_name, image, photograph ...)"
    add("--init_image_column", metavar="NAME", help=column_help)
    add("--image_column", metavar="NAME", help="image column of --init_images")
    strength_help = "with --init_images: share of the steps to run; 1 ignores the photograph (default 0.6)"
    add("--strength", type=float, metavar="S", help=strength_help)
    original_help = "with --init_images: the photograph itself, or the image generated from it (default generated)"
    add("--original", choices=("real", "generated"), help=original_help)
    pair_settings.add_settings_flags(parser)
    add = parser.add_argument_group("image checks").add_argument
    safety_help = "such as CompVis/stable-diffusion-safety-checker (default: that of --model, if any)"
    add("--safety_checker", metavar="MODEL", help=safety_help)
    add("--no_safety_checker", action="store_true", help="disable the safety checker of --model")
    check_help = "function from a list of uint8 RGB arrays (H, W, 3) to a list of bools, True to reject"
    add("--image_check", metavar="python:FILE:FUNCTION", help=check_help)
    add_model_flags(parser)
    add_generation_flags(parser, image_format="jpeg100")
    add_config_flag(parser)
    return parser.parse_args(argv)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", help="Stable Diffusion 1.x/2.x or SDXL: folder, Hub id or .safetensors file (default: by preset)")
    add("--revision", help="branch, tag or commit of the model")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--single_file_config", metavar="PIPELINE", help="for a --model in one file: a pipeline of its family")
    vae_help = "another autoencoder (default: stabilityai/sd-vae-ft-mse with the ip2p model, else that of the model)"
    add("--vae", metavar="MODEL", help=vae_help)
    add("--lora", metavar="ADAPTER", help="adapter, such as latent-consistency/lcm-lora-sdv1-5 (with --scheduler lcm)")
    add("--lora_scale", type=float, default=1.0, metavar="S", help="scale of the adapter (default 1)")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu; workers share GPUs (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add("--batch_size", type=int, default=8, metavar="N", help="pairs denoised at once (default 8)")
    add("--captions_per_file", type=int, metavar="N", help="captions per output file (ip2p 2, fast 50)")


def check_flags(args: argparse.Namespace, settings: PairSettings) -> None:
    """Raises one InputError with all problems of the flags."""
    problems = generation_flag_problems(args)
    problems += pair_settings.find_pair_problems(settings, has_photographs=bool(args.init_images))
    for name, limit in (("max_captions", 10**12), ("batch_size", 4096), ("captions_per_file", 100_000)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= limit:
            problems.append(f"--{name} {value}: must be from 1 to {limit}")
    for first, second in (("share_range", "share_steps"), ("safety_checker", "no_safety_checker")):
        if getattr(args, first) and getattr(args, second):
            problems.append(f"--{first} and --{second}: give only one of them")
    if args.image_check and (problem := find_function_problem(args.image_check)):
        problems.append(f"--image_check {problem}")
    if not args.init_images:
        names = ("init_image_column", "image_column", "strength", "original")
        problems += [f"--{name}: needs --init_images" for name in names if getattr(args, name) is not None]
    if problems:
        raise InputError.from_problems(problems)


def make_generator(args: argparse.Namespace, settings: PairSettings) -> tuple[Any, dict]:
    """(CaptionPairGenerator, settings for the manifest). Opens the captions and finds the models. Raises InputError."""
    from data_preparation.generation.inputs import Captions, Photographs
    from data_preparation.pairs.candidates import open_prompts
    from data_preparation.pairs.caption_pairs import CaptionPairGenerator
    from data_preparation.pairs.filters import load_image_check
    from data_preparation.pairs.models import ModelChoice, resolve_models
    from utils.hub_names import digest_files

    preset = PRESETS[args.preset]
    choice = pick(args, ModelChoice)
    if not args.model:
        choice = dataclasses.replace(choice, model=preset.model, vae=args.vae or preset.vae)
    prompts = Captions(args.prompts, args.caption_column, args.split)
    opened = open_prompts(prompts)
    photographs = Photographs(args.init_images, args.split, args.image_column) if args.init_images else None
    started_from = photographs.open() if photographs else None
    print("".join(f"{line}\n" for line in started_from.skipped) if started_from else "", end="", file=sys.stderr)
    inputs = {"prompts": opened.digest, "photographs": started_from.digest if started_from else None}
    if args.image_check:
        load_image_check(args.image_check)
        file, function = args.image_check.removeprefix("python:").rsplit(":", 1)
        inputs["image_check"] = [function, digest_files(Path(file))]
    choice, models = resolve_models(choice)
    generator = CaptionPairGenerator(
        num_items=min(len(opened), args.max_captions or len(opened)),
        prompts=prompts,
        settings=settings,
        choice=choice,
        models=models,
        photographs=photographs,
        image_check=args.image_check and with_absolute_path(args.image_check),
        **{name: getattr(args, name) for name in ROW_FLAGS},
    )
    flags = {name: getattr(args, name) for name in (*ROW_FLAGS, "variant", "lora_scale", "no_safety_checker")}
    manifest = {"generator": "generate_pairs", "models": models, **inputs, **flags, **dataclasses.asdict(settings)}
    return generator, json.loads(json.dumps(manifest))  # tuples become lists, as in the stored manifest


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_flags(argv)
        settings = pair_settings.choose_settings(args)
        check_flags(args, settings)
        quiet_libraries()
        from data_preparation.generation.runner import run_generation
        from data_preparation.pairs.candidates import describe_cost

        generator, manifest = make_generator(args, settings)
        hide_progress_bars()
        summary = run_generation(
            generator,
            args.data_root,
            manifest,
            items_per_shard=args.captions_per_file or PRESETS[args.preset].captions_per_shard,
            workers=choose_workers(args, needs_gpu=args.device != "cpu"),
            overwrite=args.overwrite,
        )
        print(summary.describe(args.data_root))
        if not summary.unfinished:
            print(describe_cost(args.data_root, summary.rows, summary.rejected))


if __name__ == "__main__":
    main()
