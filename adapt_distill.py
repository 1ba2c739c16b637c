"""Make an editor that edits in few steps, or in another style, by adding a change of weights: W* = W_editor + w dW.

    python adapt_distill.py --list_presets
    python adapt_distill.py --model timbrooks/instruct-pix2pix --preset lcm-lora-sd1.5 --output_dir fast-editor
    python adapt_distill.py --model my-editor --distilled some/fine-tune --base the/base --output_dir my-style

dW is a distilled UNet minus its base, a LoRA, or a folder that already holds a difference. Nothing is trained, and
memory holds a few rows of a tensor at a time. docs/distillation.md tells what to expect.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

from utils.cli import FlagParser, pick
from utils.editing.jobs import Recommended
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.errors import InputError, exit_on_input_error
from utils.merging.presets import PARTS, PRESETS, describe_presets
from utils.quiet import hide_progress_bars, quiet_libraries

MEANINGS = {
    "distilled": "a distilled or fine-tuned model",
    "base": "what that was trained from",
    "lora": "a LoRA",
    "delta": "a difference of weights",
}
GRID = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
RECOMMENDED = tuple(field.name for field in fields(Recommended))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--list_presets", action="store_true", help="print the known distillations and stop")
    parser.add_argument(
        "--model",
        help="the editor, SD or SDXL: a folder in diffusers' format, a Hub id, or one "
        ".safetensors file, which is loaded whole",
    )
    parser.add_argument(
        "--single_file_config",
        metavar="PIPELINE",
        help="for a --model in one file: a folder or Hub "
        "id of a pipeline of its family (default: the one on the Hub that diffusers takes it for)",
    )
    for part, meaning in (("revision", "its branch, tag or commit"), ("variant", "of its weight files, such as fp16")):
        parser.add_argument(f"--model_{part}", help=meaning)
    parser.add_argument("--output_dir", help="folder of the new editor")
    parser.add_argument("--preset", metavar="NAME", help="a known distillation with its settings (--list_presets)")
    add_sources(parser)
    add = parser.add_argument_group("how to merge").add_argument
    add("--weight", type=float, help="w (default 1, for full SDXL models 0.5)")
    add(
        "--block_weights",
        nargs="+",
        default=[],
        metavar="REGEX=W",
        help="multiply w by W for the parameters in whose names REGEX is found; the last that is found counts",
    )
    add(
        "--conv_in",
        choices=("first_four", "skip"),
        default="first_four",
        help="the first convolution: a change of four inputs goes on the four of the noise (default), or none",
    )
    add(
        "--lcm_guidance",
        type=float,
        metavar="G",
        help="fold the guidance embedding of an LCM, at this scale, into a "
        "bias (default: that of the preset; else it is dropped)",
    )
    add("--method", choices=("linear", "ties", "dare"), default="linear", help="default linear; ties needs --base")
    add("--density", type=float, help="share of the values kept by ties (default 0.2) and dare (default 0.5)")
    add("--seed", type=int, default=0, help="of dare's choice")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the file (the sums are done in fp32)")
    add("--scheduler", choices=sorted(SCHEDULERS), help="of the new editor (default: the preset's, else the editor's)")
    add("--timestep_spacing", choices=SPACINGS, help="of a --scheduler (default trailing, as few steps want it)")
    group = parser.add_argument_group("settings that infer.py and app.py take (default: the preset's)")
    for name in RECOMMENDED:
        group.add_argument(f"--{name}", type=int if name == "steps" else float)
    add = parser.add_argument_group("choosing the weight").add_argument
    add(
        "--calibrate",
        type=Path,
        metavar="PAIRS.jsonl",
        help='lines of {"image": PATH, "edit": INSTRUCTION}: try weights on these and take the knee',
    )
    add("--calibrate_weights", type=float, nargs="+", default=GRID, metavar="W", help="the grid (default 0.3 to 1)")
    add("--device", default="auto", help="for --calibrate: cuda, mps or cpu (default: the best there is)")
    add = parser.add_argument_group("publishing").add_argument
    add("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    add("--hub_model_id", help="repository to upload to (default: the output folder's name)")
    add("--hub_private_repo", action="store_true", help="create it as a private repository")
    add("--hub_token", help="better: `hf auth login` or HF_TOKEN, which leave no trace in the shell")
    add("--accept_license", action="store_true", help="push although a source is non-commercial or bars derivatives")
    add("--cache_dir", help="where downloads are kept")
    return parser.parse_args(argv)


def add_sources(parser: FlagParser) -> None:
    for role, meaning in MEANINGS.items():
        group = parser.add_argument_group(f"--{role}: {meaning}")
        group.add_argument(f"--{role}", metavar="SOURCE", help="Hub id, folder, or file of weights")
        group.add_argument(f"--{role}_subfolder", help="where in it (a UNet: unet/ or the root, whichever has it)")
        group.add_argument(f"--{role}_weight_name", help="the file, where it has another name than diffusers gives")
        group.add_argument(f"--{role}_variant", help="variant of the files, such as fp16")
        group.add_argument(f"--{role}_revision", help="branch, tag or commit on the Hub")


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    problems = [f"--{name} is missing" for name in ("model", "output_dir") if not getattr(args, name)]
    problems += find_source_problems(args)
    if args.single_file_config and args.model and Path(args.model).is_dir():
        problems.append(f"--single_file_config is for a --model in one file, and {args.model} is a folder")
    if args.timestep_spacing and not args.scheduler:
        problems.append("--timestep_spacing belongs to --scheduler: give that too")
    if args.method == "linear" and args.density is not None:
        problems.append("--density belongs to --method ties and dare")
    if args.density is not None and not 0 < args.density <= 1:
        problems.append(f"--density {args.density}: must be above 0 and at most 1")
    for text in args.block_weights:
        if not is_number(text.rpartition("=")[2]) or not text.rpartition("=")[0]:
            problems.append(f"--block_weights {text}: must be REGEX=W, such as up_blocks=0.7")
    numbers = {name: getattr(args, name) for name in ("weight", "lcm_guidance", *RECOMMENDED)}
    for name, value in [*numbers.items(), *(("calibrate_weights", value) for value in args.calibrate_weights)]:
        lowest = -10 if "weight" in name else 1 if name == "steps" else 0
        if value is not None and not lowest <= value <= 1000:
            problems.append(f"--{name} {value}: must be from {lowest} to 1000")
    if args.calibrate and args.weight is not None:
        problems.append("--calibrate chooses the weight: drop --weight")
    if not 0 <= args.seed < 2**31:
        problems.append(f"--seed {args.seed}: must be from 0 to {2**31 - 1}")
    if problems:
        raise InputError.from_problems(problems)


def find_source_problems(args: argparse.Namespace) -> list[str]:
    preset = PRESETS.get(args.preset)
    problems = []
    if args.preset and not preset:
        problems.append(f"--preset {args.preset} is not known: --list_presets prints those that are")
    given = [f"--{name}" for name in ("preset", "distilled", "lora", "delta") if getattr(args, name)]
    if len(given) != 1:
        problems.append(f"give one of --preset, --distilled, --lora and --delta (given: {', '.join(given) or 'none'})")
    is_distilled = args.distilled or (preset and preset.kind == "distilled")
    if args.distilled and not args.base:
        problems.append("--distilled needs --base: the model that it was trained from, which is subtracted")
    if args.method == "ties" and not (args.base or (preset and preset.base)):
        problems.append("--method ties needs --base: the model that the editor was trained from")
    if args.base and args.method != "ties" and not is_distilled:
        problems.append("--base is subtracted from --distilled, or used by --method ties: drop it")
    if args.lcm_guidance is not None and not is_distilled:
        problems.append("--lcm_guidance folds the embedding of a --distilled model, which is missing")
    for role in MEANINGS:
        for part in PARTS:
            if getattr(args, f"{role}_{part}") and not getattr(args, role) and not args.preset:
                problems.append(f"--{role}_{part} belongs to --{role}, which is missing")
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
        print(
            "warning: bf16 rounds most of a small change away (docs/distillation.md): take fp32 or fp16",
            file=sys.stderr,
        )
    from utils.merging import ingredients as opening
    from utils.merging.calibration import calibrate_recipe, read_pairs
    from utils.merging.editor_folder import unpacking
    from utils.merging.editor_writer import write_editor
    from utils.merging.recipes import make_recipe

    hide_progress_bars()
    recipe, publishing = make_recipe(vars(args)), pick(args, opening.Publishing)
    pairs = read_pairs(args.calibrate) if args.calibrate else []
    repo_id = opening.check_place(recipe, publishing)
    with unpacking(args.model, args.single_file_config, args.cache_dir, recipe.output_dir) as unpacked:
        ingredients = opening.open_ingredients(recipe, args.hub_token, unpacked)
        opening.check_licences(ingredients.licences, publishing)
        recipe, extras = opening.settle(recipe, ingredients), {}
        if pairs:
            calibration = calibrate_recipe(recipe, ingredients, pairs, args.calibrate_weights, args.device)
            print(calibration.describe())
            recipe = replace(recipe, merge=replace(recipe.merge, weight=calibration.chosen))
            extras = calibration.files()
        report = write_editor(recipe, ingredients, repo_id, extras)
    print(report.describe())
    print(f"the editor stands in {recipe.output_dir}; weight {recipe.merge.weight:g}", file=sys.stderr)
    if repo_id:
        print(f"pushed to {opening.push(recipe, publishing, repo_id)}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if args.list_presets:
        print(describe_presets())
        return 0
    try:
        with exit_on_input_error():
            run(args)
    except KeyboardInterrupt:
        print("stopped; nothing half stands in the output folder", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
