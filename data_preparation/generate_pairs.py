"""Phase two of InstructPix2Pix: captions with an edit -> pairs of images, by Prompt-to-Prompt, filtered by CLIP.

    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset fast
    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset ip2p --batch_size 16
    python data_preparation/generate_pairs.py --prompts captions --data_root pairs --preset fast \\
        --init_images photographs --original real --num_inference_steps 8

--prompts holds a caption, an edit and the edited caption in each row, as generate_captions.py writes them. See
docs/pairs.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from data_preparation.pairs.flags import add_settings_flags, pick_settings  # noqa: E402
from data_preparation.pairs.presets import PRESET_FILE_ITEMS, PRESET_MODELS, PairSettings, find_setting_problems  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import hide_progress_bars, quiet_libraries  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what to make pairs of").add_argument
    add(
        "--prompts",
        required=True,
        metavar="CAPTIONS",
        help="a folder written by generate_captions.py, a .jsonl "
        "file, a folder of such, or an id on the Hub; its columns are caption (or input), edit and output",
    )
    add("--caption_column", metavar="NAME", help="the original captions' column (default: caption, or input)")
    add("--split", default="train", help="of --prompts, and of --init_images (default train)")
    add("--max_captions", type=int, metavar="N", help="take the first N captions alone")
    add(
        "--init_images",
        metavar="PHOTOGRAPHS",
        help="start from photographs, not from noise: a folder, a saved "
        "dataset or an id on the Hub. A caption names its photograph in a column; where this is the same dataset as "
        "--prompts, it is the row's own",
    )
    add(
        "--init_image_column",
        metavar="NAME",
        help="the column of --prompts that names the photograph (default: "
        "file_name, image, photograph, image_file or source)",
    )
    add("--image_column", metavar="NAME", help="the column of --init_images that holds the photographs")
    add(
        "--strength",
        type=float,
        metavar="S",
        help="with --init_images, the share of the steps that is taken: 1 "
        "leaves nothing of the photograph (default 0.6)",
    )
    add(
        "--original",
        choices=("real", "generated"),
        help="with --init_images, the original image of a pair: the "
        "photograph itself, or the picture generated from it (default generated)",
    )
    add_settings_flags(parser)
    add = parser.add_argument_group("checks").add_argument
    add(
        "--safety_checker",
        metavar="MODEL",
        help="reject what it flags, such as CompVis/stable-diffusion-safety-"
        "checker (default: the one of --model, if any)",
    )
    add("--no_safety_checker", action="store_true", help="without the one of --model")
    add(
        "--image_check",
        metavar="python:FILE:FUNCTION",
        help="reject what this function of a list of uint8 RGB arrays (H, W, 3) gives True for; FILE is run",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help="a text-to-image model of Stable Diffusion 1.x/2.x or SDXL: a folder, an id on the Hub, or "
        "one .safetensors file (ip2p stable-diffusion-v1-5, fast stabilityai/sdxl-turbo)",
    )
    add("--revision", help="branch, tag or commit of it; the commit that it is goes into every row")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--single_file_config", metavar="PIPELINE", help="for a --model in one file: a pipeline of its family")
    add(
        "--vae",
        metavar="MODEL",
        help="an autoencoder in the place of its own (ip2p stabilityai/sd-vae-ft-mse, with the preset's model)",
    )
    add(
        "--lora",
        metavar="ADAPTER",
        help="merged into it, such as latent-consistency/lcm-lora-sdv1-5 (with --scheduler lcm)",
    )
    add("--lora_scale", type=float, default=1.0, metavar="S", help="how strongly it applies (default 1)")
    add(
        "--device",
        default="auto",
        help="cuda, cuda:1, mps or cpu (default: the best there is, and workers share the GPUs)",
    )
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add("--batch_size", type=int, default=8, metavar="N", help="pairs denoised at once (default 8)")
    add(
        "--captions_per_file",
        type=int,
        metavar="N",
        help="captions between two files: what a kill costs at most (ip2p 2, fast 50)",
    )
    add_generation_flags(parser, image_format="jpeg100")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, settings: PairSettings) -> None:
    """Refuse what cannot work, all problems at once."""
    problems = generation_flag_problems(args) + find_setting_problems(settings, has_photographs=bool(args.init_images))
    if args.share_range and args.share_steps:
        problems.append("--share_range and --share_steps: give one of them")
    for name, limit in (("max_captions", 10**12), ("batch_size", 4096), ("captions_per_file", 100_000)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= limit:
            problems.append(f"--{name} {value}: must be from 1 to {limit}")
    if args.image_check and not args.image_check.startswith("python:"):
        problems.append(f"--image_check {args.image_check}: must be python:FILE:FUNCTION")
    if args.safety_checker and args.no_safety_checker:
        problems.append("--safety_checker and --no_safety_checker: give one of them")
    if not args.init_images:
        names = ("init_image_column", "image_column", "strength", "original")
        problems += [f"--{name}: needs --init_images" for name in names if getattr(args, name) is not None]
    if problems:
        raise InputError.from_problems(problems)


def make_recipe(args: argparse.Namespace, settings: PairSettings) -> tuple[Any, dict]:
    """The recipe, and what decides its rows. Opens the captions and finds the models. Raises InputError."""
    from data_preparation.generation.inputs import Captions, Photographs
    from data_preparation.pairs.image_checks import load_function
    from data_preparation.pairs.models import ModelChoice, resolve
    from data_preparation.pairs.prompts import open_prompts
    from data_preparation.pairs.recipe import PairRecipe
    from utils.hub_names import digest_files

    model, vae = PRESET_MODELS[args.preset]
    model, vae = (args.model, args.vae) if args.model else (model, args.vae or vae)
    names = {each.name for each in dataclasses.fields(ModelChoice)} - {"model", "vae"}
    choice = ModelChoice(model, vae=vae, **{name: value for name, value in vars(args).items() if name in names})
    prompts = Captions(args.prompts, args.caption_column, args.split)
    opened = open_prompts(prompts)
    photographs = Photographs(args.init_images, args.split, args.image_column) if args.init_images else None
    inputs = {"prompts": opened.digest, "photographs": photographs.open().digest if photographs else None}
    if args.image_check:
        load_function(args.image_check)
        _, file = args.image_check.split(":", 1)
        file, function = file.rsplit(":", 1)
        inputs["image_check"] = [function, digest_files(Path(file))]
    choice, models = resolve(choice)
    recipe = PairRecipe(
        min(len(opened), args.max_captions or len(opened)),
        prompts,
        settings,
        choice,
        models,
        args.seed,
        args.batch_size,
        args.device,
        args.dtype,
        args.image_format,
        photographs,
        args.init_image_column,
        args.image_check,
    )
    how = ("seed", "batch_size", "device", "dtype", "image_format", "init_image_column", "variant", "lora_scale")
    told = {name: getattr(args, name) for name in (*how, "no_safety_checker")}
    return recipe, {"generator": "generate_pairs", "models": models, **inputs, **told, **dataclasses.asdict(settings)}


def run(argv: list[str] | None) -> None:
    args = parse_flags(argv)
    settings = pick_settings(args)
    check_flags(args, settings)
    quiet_libraries()
    from data_preparation.generation.runner import run_generation
    from data_preparation.pairs.report import describe_cost

    recipe, decides = make_recipe(args, settings)
    hide_progress_bars()
    per_file = args.captions_per_file or PRESET_FILE_ITEMS[args.preset]
    decides = json.loads(json.dumps(decides))  # as the manifest gives it back: tuples are lists
    summary = run_generation(
        recipe,
        args.data_root,
        decides,
        items_per_shard=per_file,
        workers=choose_workers(args, needs_gpu=True),
        overwrite=args.overwrite,
    )
    print(summary.describe(args.data_root))
    print(describe_cost(args.data_root, summary.rows, summary.rejected))


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        run(argv)


if __name__ == "__main__":
    main()
