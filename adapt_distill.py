"""Make an editor edit in few steps, or in another style, by adding a difference of weights: W* = W_editor + w dW.

    python adapt_distill.py --list_presets
    python adapt_distill.py --model timbrooks/instruct-pix2pix --preset lcm-lora-sd1.5 --output_dir fast-editor
    python adapt_distill.py --model my-editor --distilled some/fine-tune --base the/base --output_dir my-style

dW is a distilled or fine-tuned UNet minus its base, a LoRA, or a stored difference. Nothing is trained, and only a few
rows of a tensor are in memory at a time. docs/fast_editing.md describes what to expect.
"""

import argparse
import math
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from utils.cli import FlagParser, pick
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.editing.settings import DEFAULT_SETTINGS, WHOLE_NUMBERS, find_setting_problems
from utils.errors import InputError, exit_on_input_error
from utils.merging.presets import PRESETS, SOURCE_FIELDS, describe_presets
from utils.quiet import hide_progress_bars, quiet_libraries

SOURCES = {
    "distilled": "a distilled or fine-tuned UNet",
    "base": "the model that it was trained from",
    "lora": "a LoRA",
    "delta": "a stored difference of weights",
}
GRID = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
WEIGHT_LIMITS, GUIDANCE_LIMITS, MAX_SEED = (-10, 1000), (0, 1000), 2**31 - 1


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--list_presets", action="store_true", help="print the known distillations and exit")
    add("--model", help="SD or SDXL editor: folder in diffusers' format, Hub id, or .safetensors file (loaded whole)")
    config = "for a --model in one file: folder or Hub id of a pipeline of its family (default: detected)"
    add("--single_file_config", metavar="PIPELINE", help=config)
    add("--model_revision", help="branch, tag or commit of --model")
    add("--model_variant", help="variant of the weight files of --model, such as fp16")
    add("--output_dir", help="folder of the new editor")
    add("--preset", metavar="NAME", help="a known distillation with its settings (see --list_presets)")
    add_source_flags(parser)
    add = parser.add_argument_group("merging").add_argument
    add("--weight", type=float, help="w (default: that of the preset, else 1; 0.5 for --distilled SDXL models)")
    blocks = "multiply w by W for parameters whose names match REGEX; the last match counts"
    add("--block_weights", nargs="+", default=[], metavar="REGEX=W", help=blocks)
    conv_in = "how a 4-channel delta changes conv_in: its noise channels (default), or not at all"
    add("--conv_in", choices=("first_four", "skip"), default="first_four", help=conv_in)
    lcm = "fold an LCM's guidance embedding for this scale into a bias (default: the preset's, else ignored)"
    add("--lcm_guidance", type=float, metavar="G", help=lcm)
    add("--method", choices=("linear", "ties", "dare"), default="linear", help="default: linear; ties needs --base")
    add("--density", type=float, help="fraction of values kept by ties (default: 0.2) and dare (default: 0.5)")
    add("--seed", type=int, default=0, help="seed of dare (default: 0)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="dtype of the merged UNet (default: fp32)")
    add("--scheduler", choices=sorted(SCHEDULERS), help="of the new editor (default: the preset's, else the editor's)")
    add("--timestep_spacing", choices=SPACINGS, help="of --scheduler (default: trailing, the best for few steps)")
    group = parser.add_argument_group("recommended settings, defaults of infer.py and app.py (default: the preset's)")
    for name in DEFAULT_SETTINGS:
        group.add_argument(f"--{name}", type=int if name in WHOLE_NUMBERS else float)
    add = parser.add_argument_group("choosing the weight").add_argument
    pairs = 'lines of {"image": PATH, "edit": INSTRUCTION}: try weights on them and use the best'
    add("--calibrate", type=Path, metavar="PAIRS.jsonl", help=pairs)
    add("--calibrate_weights", type=float, nargs="+", default=GRID, metavar="W", help="(default: 0.3, 0.4, ... 1)")
    add("--device", default="auto", help="of --calibrate: cuda, mps or cpu (default: the first available)")
    add = parser.add_argument_group("publishing").add_argument
    add("--push_to_hub", action="store_true", help="upload the editor to the Hugging Face Hub")
    add("--hub_model_id", help="repository to upload to (default: the name of --output_dir)")
    add("--hub_private_repo", action="store_true", help="make the new repository private")
    add("--hub_token", help="token for the Hub; `hf auth login` or HF_TOKEN are safer")
    accept = "push although a licence is non-commercial, bars derivatives or is unknown"
    add("--accept_license", action="store_true", help=accept)
    add("--cache_dir", help="folder for downloads")
    return parser.parse_args(argv)


def add_source_flags(parser: FlagParser) -> None:
    for role, meaning in SOURCES.items():
        group = parser.add_argument_group(f"--{role}: {meaning}")
        group.add_argument(f"--{role}", metavar="SOURCE", help="Hub id, folder or weight file")
        group.add_argument(f"--{role}_subfolder", help="subfolder (default for a UNet: unet/, else the root)")
        group.add_argument(f"--{role}_weight_name", help="name of the weight file (default: diffusers' name)")
        group.add_argument(f"--{role}_variant", help="variant of the weight files, such as fp16")
        group.add_argument(f"--{role}_revision", help="branch, tag or commit on the Hub")


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with all problems that the flags alone show."""
    problems = [f"--{name} is missing" for name in ("model", "output_dir") if not getattr(args, name)]
    problems += find_source_problems(args)
    if args.single_file_config and args.model and Path(args.model).is_dir():
        problems.append(f"--single_file_config is for a --model in one file, but {args.model} is a folder: remove it")
    if args.timestep_spacing and not args.scheduler:
        problems.append("--timestep_spacing needs --scheduler")
    if args.method == "linear" and args.density is not None:
        problems.append("--density needs --method ties or dare")
    if args.density is not None and not 0 < args.density <= 1:
        problems.append(f"--density {args.density}: must be above 0 and at most 1")
    for text in args.block_weights:
        if not is_number(text.rpartition("=")[2]) or not text.rpartition("=")[0]:
            problems.append(f"--block_weights {text}: must be REGEX=W, such as up_blocks=0.7")
    problems += find_setting_problems({name: getattr(args, name) for name in DEFAULT_SETTINGS})
    numbers = [("weight", args.weight, WEIGHT_LIMITS), ("lcm_guidance", args.lcm_guidance, GUIDANCE_LIMITS)]
    numbers += [("calibrate_weights", value, WEIGHT_LIMITS) for value in args.calibrate_weights]
    for name, value, (smallest, largest) in [*numbers, ("seed", args.seed, (0, MAX_SEED))]:
        if value is not None and not smallest <= value <= largest:
            problems.append(f"--{name} {value}: must be from {smallest} to {largest}")
    if args.calibrate and args.weight is not None:
        problems.append("--calibrate chooses the weight: remove --weight")
    if problems:
        raise InputError.from_problems(problems)


def find_source_problems(args: argparse.Namespace) -> list[str]:
    preset = PRESETS.get(args.preset)
    problems = []
    if args.preset and not preset:
        problems.append(f"--preset {args.preset} is unknown: see --list_presets")
    given = [f"--{name}" for name in ("preset", "distilled", "lora", "delta") if getattr(args, name)]
    if len(given) != 1:
        problems.append(f"give one of --preset, --distilled, --lora and --delta (given: {', '.join(given) or 'none'})")
    is_distilled = args.distilled or (preset and preset.kind == "distilled")
    if args.distilled and not args.base:
        problems.append("--distilled needs --base, the model that it was trained from")
    if args.method == "ties" and not (args.base or (preset and preset.base)):
        problems.append("--method ties needs --base, the model that the editor was trained from")
    if args.base and args.method != "ties" and not is_distilled:
        problems.append("--base is used with --distilled or --method ties only: remove it")
    if args.lcm_guidance is not None and not is_distilled:
        problems.append("--lcm_guidance needs --distilled")
    for role in SOURCES:
        for name in SOURCE_FIELDS:
            if getattr(args, f"{role}_{name}") and not getattr(args, role) and not args.preset:
                problems.append(f"--{role}_{name} needs --{role}")
    return problems


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def run(args: argparse.Namespace) -> None:
    check_flags(args)
    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    if args.dtype == "bf16":
        warning = "warning: --dtype bf16 rounds away most of a small delta (docs/fast_editing.md): use fp32 or fp16"
        print(warning, file=sys.stderr)
    from utils.hub import upload
    from utils.merging.calibration import calibrate, read_pairs
    from utils.merging.editor_folder import unpacked_editor
    from utils.merging.editor_writer import write_editor
    from utils.merging.recipe import (
        PushOptions,
        check_licences,
        fill_defaults,
        make_recipe,
        open_recipe,
        prepare_output,
    )

    hide_progress_bars()
    recipe, push = make_recipe(vars(args)), pick(args, PushOptions)
    pairs = read_pairs(args.calibrate) if args.calibrate else []
    repo_id = prepare_output(recipe, push)
    with unpacked_editor(args.model, args.single_file_config, args.cache_dir, recipe.output_dir) as unpacked:
        opened = open_recipe(recipe, args.hub_token, unpacked)
        check_licences(opened.licences, push)
        recipe, extra_files = fill_defaults(recipe, opened), {}
        if pairs:
            calibration = calibrate(recipe, opened, pairs, args.calibrate_weights, args.device)
            print(calibration.describe())
            recipe = replace(recipe, merge=replace(recipe.merge, weight=calibration.chosen))
            extra_files = calibration.files()
        report = write_editor(recipe, opened, repo_id, extra_files)
    print(report.describe())
    print(f"saved the editor in {recipe.output_dir} (weight {recipe.merge.weight:g})", file=sys.stderr)
    if repo_id:
        url = upload(args.output_dir, repo_id, args.hub_token, "An adapted editor", private=args.hub_private_repo)
        print(f"pushed to {url}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    try:
        with exit_on_input_error():
            if args.list_presets:
                print(describe_presets(min(100, shutil.get_terminal_size((100, 24)).columns)))
            else:
                run(args)
    except KeyboardInterrupt:
        print("interrupted: --output_dir contains no incomplete editor", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
