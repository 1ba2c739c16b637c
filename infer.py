"""Edit photographs by instruction with an InstructPix2Pix model (Stable Diffusion 1.x/2.x, SDXL, CosXL).

    python infer.py --model my-editor --input photo.jpg --edit "turn it into a pencil drawing"
    python infer.py --model timbrooks/instruct-pix2pix --input photos/ --output edited/ --edit "make it snowy"
    python infer.py --model my-base --lora my-adapter --input photo.jpg --edit "make it snowy" --num_images 4 --grid
    python infer.py --model my-editor --jobs jobs.jsonl
    python infer.py --repeat photo-edited.png

The spellings of the original edit_cli.py (--cfg-text, --cfg-image, --steps, ...) work too. See docs/editing.md.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import FlagParser, pick
from utils.editing.flags import EditorOptions, find_editing_problems
from utils.editing.job_files import plan_lines
from utils.editing.jobs import Job, Settings, plan_jobs
from utils.editing.records import require_record
from utils.editing.repeats import find_model, plan_repeat
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.errors import InputError, exit_on_input_error
from utils.quiet import hide_progress_bars, quiet_libraries


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what to edit").add_argument
    add("--input", help="an image, a folder of images, or the http(s) address of an image")
    add(
        "--edit",
        action="append",
        metavar="INSTRUCTION",
        help='what to change, such as "make it winter"; may be given several times, for an edit by each',
    )
    add(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="a file with an edit a line, as "
        '{"image": "a.jpg", "edit": "make it winter", "steps": 30, "seed": 1}, in the place of --input and --edit',
    )
    add("--repeat", type=Path, metavar="PICTURE", help="make the edit of this picture once more, from its own record")
    add("--surprise_me", action="store_true", help="draw the instruction by the seed, in the place of --edit")
    add(
        "--num_images",
        type=int,
        metavar="N",
        help="edits of each image by each instruction, with the seeds SEED, SEED+1, ... (default 1)",
    )
    add(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="longer side of the edit, about; the aspect ratio is kept and "
        "both sides become multiples of 64 (default 512, for SDXL 1024, or what the model was made for if less)",
    )
    add = parser.add_argument_group("what to save").add_argument
    add("--output", help="file for one image (default NAME-edited.png), folder for a folder (default FOLDER-edited)")
    add("--keep_size", action="store_true", help="bring each edit to its input's own size")
    add("--gif", action="store_true", help="also save an animation of each input and its edits")
    add("--grid", action="store_true", help="also save a contact sheet of the inputs and their edits")
    add = parser.add_argument_group("how").add_argument
    add(
        "--guidance_scale",
        "--cfg-text",
        dest="guidance_scale",
        type=float,
        metavar="S",
        help="how closely to follow the instruction (default 7.5)",
    )
    add(
        "--image_guidance_scale",
        "--cfg-image",
        dest="image_guidance_scale",
        type=float,
        metavar="S",
        help="how closely to keep to the image (default 1.5; 1 takes a third less time)",
    )
    add(
        "--randomize_cfg",
        action="store_true",
        help="draw the two by the seed, up to a fifth around the "
        "editor's own (around 7.5 and 1.5: from 6 to 9 and 1.2 to 1.8)",
    )
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "STOP"),
        help="share of the steps in which "
        "guidance is on, such as 0 0.6; the others take a third of the time (default 0 1)",
    )
    add("--steps", type=int, metavar="N", help="denoising steps (default 20; the original's is 100)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same edit (default: random, and printed)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help="%(choices)s (default: the model's own)")
    add("--timestep_spacing", choices=SPACINGS, help="which steps it takes; few steps want trailing")
    add("--eta", type=float, metavar="E", help="share of fresh noise in the steps of DDIM (default 0) and TCD (0.3)")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help="an editor: a folder in diffusers' format, an id on the Hub, or one .safetensors file; one "
        "made by adapt_distill.py brings its own defaults for --steps, --cfg-text, --cfg-image and --eta",
    )
    add(
        "--lora",
        metavar="ADAPTER",
        help="a LoRA or DoRA for it in diffusers' format: a folder, its file, or an id on "
        "the Hub; one that was trained on a text-to-image --model makes an editor of it",
    )
    add("--lora_scale", type=float, metavar="S", help="how strongly it applies (default 1)")
    add(
        "--config",
        "--single_file_config",
        dest="single_file_config",
        metavar="PIPELINE",
        help="for a --model in one "
        "file: a folder or Hub id of a pipeline of its family, whose configuration and tokenizers it gets (default: "
        "the one on the Hub that diffusers takes it for)",
    )
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--no_safety_checker", action="store_true", help="drop the safety checker of a model that has one")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="edits made at once (default 1); halved where the memory is too small",
    )
    add("--compile", action="store_true", help="compile the UNet first: pays for many edits of one size")
    add("--vae_slicing", action="store_true", help="decode the images of a batch one by one, to save memory")
    add("--vae_tiling", action="store_true", help="encode and decode in tiles, for images too large for the memory")
    parser.add_argument("--ckpt", "--vae-ckpt", dest="original_model", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> tuple[list[Job], dict]:
    """What to edit, and of a picture that is repeated the record, from which the missing flags are set."""
    if args.repeat:
        record = require_record(args.repeat)
        job = plan_repeat(args.repeat, record, args.input, args.output)
        args.model = args.model or find_model(record, args.repeat)
        if "adapter" in record:
            args.lora = args.lora or find_model(record, args.repeat, "adapter")
            args.lora_scale = record["adapter"].get("scale")
        args.revision, args.variant = (record["model"].get(name) for name in ("revision", "variant"))
        for flag in ("dtype", "compile", "vae_slicing", "vae_tiling", "no_safety_checker"):
            setattr(args, flag, record["settings"].get(flag))
        return [job], record
    if args.guidance_interval:
        args.guidance_interval = tuple(args.guidance_interval)
    edits = [None] if args.surprise_me else args.edit
    planned = pick(args, Settings), args.num_images or 1
    if args.jobs:
        return plan_lines(args.jobs, args.output, edits or [], *planned), {}
    return plan_jobs(args.input, args.output, edits, *planned), {}


def edit_jobs(pipeline: Any, jobs: list[Job], args: argparse.Namespace, origin: dict, defaults: dict) -> Any:
    """Edit and save every job; returns the `Outcome` of utils/editing/service.py."""
    from utils.editing.service import EditRun

    with tqdm(total=len(jobs), unit="edit", leave=False, disable=None) as bar:
        run = EditRun(
            pipeline,
            origin,
            defaults=defaults,
            batch_size=args.batch_size,
            on_edits=bar.update,
            say=lambda line: tqdm.write(line, file=sys.stderr),
            on_step=lambda done, total: bar.set_postfix_str(f"step {done} of {total}"),
        )
        return run.edit(jobs, args.seed)


def run(args: argparse.Namespace) -> int:
    if problems := find_editing_problems(vars(args)):
        raise InputError.from_problems(problems)
    jobs, record = plan(args)

    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    from utils.editing.editor_setup import open_editor

    hide_progress_bars()
    opened = open_editor(pick(args, EditorOptions), record, args.repeat)
    for line in opened.messages:
        print(line, file=sys.stderr)
    used = {name: value for name, value in opened.recommended.items() if getattr(args, name) is None}
    if used:
        print("recommended by this editor:", ", ".join(f"{name} {value}" for name, value in used.items()))
    started = time.monotonic()
    outcome = edit_jobs(opened.pipeline, jobs, args, opened.origin, opened.recommended)
    return report(jobs, outcome, args, time.monotonic() - started)


def report(jobs: list[Job], outcome: Any, args: argparse.Namespace, seconds: float) -> int:
    """Save what shows the edits, say what was done, and give the exit code."""
    from utils.editing.previews import describe_repeat, save_animations, save_sheets

    for problem in dict.fromkeys(outcome.problems):  # a bad image has one for each of its edits
        print(f"skipped {problem}", file=sys.stderr)
    shows = [*(save_animations(jobs) if args.gif else []), *(save_sheets(jobs) if args.grid else [])]
    where = jobs[0].output if len(jobs) == 1 else jobs[0].output.parent
    done = f", {outcome.finished} finished before" if outcome.finished else ""
    seeds = sorted({outcome.seed + job.offset if job.seed is None else job.seed + job.offset for job in jobs})
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]} to {seeds[-1]}"
    print(f"{outcome.edited} of {len(jobs)} edited in {seconds:.1f} s{done}, {seed}: {where}")
    print("".join(f"{show}\n" for show in shows), end="")
    if args.repeat and not outcome.problems:
        print(describe_repeat(args.repeat, jobs[0].output))
    return 1 if outcome.problems else 0


def main(argv: list[str] | None = None) -> int:
    try:
        with exit_on_input_error():
            return run(parse_flags(argv))
    except KeyboardInterrupt:
        print("stopped; every file that was saved is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
