"""Edit photographs by instruction with an InstructPix2Pix model (Stable Diffusion 1.x/2.x, SDXL, CosXL).

    python infer.py --model my-editor --input photo.jpg --edit "turn it into a pencil drawing"
    python infer.py --model timbrooks/instruct-pix2pix --input photos/ --output edited/ --edit "make it snowy"
    python infer.py --model my-base --lora my-adapter --input photo.jpg --edit "make it snowy" --num_images 4 --grid
    python infer.py --model my-editor --jobs jobs.jsonl
    python infer.py --repeat photo-edited.png

The flags of the original edit_cli.py (--cfg-text, --cfg-image, --steps, ...) work too. See docs/editing.md.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.atomic_files import FileWriter
from utils.cli import FlagParser, pick
from utils.editing.flags import OFFLOADS, EditorOptions, find_flag_problems
from utils.editing.jobs import Job, plan_input, plan_job_file
from utils.editing.records import find_model, plan_repeat, recorded_adapters, require_record
from utils.editing.schedulers import SCHEDULERS, SPACINGS
from utils.editing.settings import SCALES, EditSettings
from utils.errors import InputError, exit_on_input_error
from utils.quiet import hide_progress_bars, quiet_libraries


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_input_and_output(parser)
    _add_settings(parser)
    _add_model_and_machine(parser)
    return parser.parse_args(argv)


def _add_input_and_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    sources = "images, folders of images, patterns such as 'photos/*.jpg', and http(s) addresses"
    add("--input", nargs="+", metavar="IMAGE", help=sources)
    add("--recursive", action="store_true", help="also edit the images of subfolders")
    add("--first_frame", action="store_true", help="edit only the first frame of an animation (default: all frames)")
    add("--background", metavar="COLOR", help="fill transparent pixels (default: the edit keeps the transparency)")
    add("--edit", action="append", metavar="TEXT", help='instruction, such as "make it winter"; may repeat')
    add("--jobs", type=Path, metavar="FILE", help='JSON lines such as {"image": "a.jpg", "edit": "make it winter"}')
    add("--repeat", type=Path, metavar="IMAGE", help="make the edit of a saved image again, from the record in it")
    add("--trust_record", action="store_true", help="with --repeat: load the model that the record names")
    add("--surprise_me", action="store_true", help="draw the instruction from the seed instead of --edit")
    add("--num_images", type=int, metavar="N", help="edits per instruction, with seeds SEED, SEED+1, ... (default 1)")
    resolution = "approximate longer side of the edit (default: the model's own, such as 512, 768 or 1024)"
    add("--resolution", type=int, metavar="PIXELS", help=resolution)
    add = parser.add_argument_group("output").add_argument
    add("--output", help="file for one image (default NAME-edited.png), folder for a folder (default FOLDER-edited)")
    add("--keep_metadata", action="store_true", help="keep date, place, camera and author (default: nothing is kept)")
    add("--keep_size", action="store_true", help="resize each edit to the size of its input")
    add("--gif", action="store_true", help="also save an animation of each input and its edits")
    add("--grid", action="store_true", help="also save a contact sheet of the inputs and their edits")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("settings").add_argument
    scale = dict(type=float, metavar="S")
    add("--guidance_scale", "--cfg-text", dest=SCALES[0], **scale, help="strength of the instruction (default 7.5)")
    kept = "similarity to the input (default 1.5; 1 takes a third less time)"
    add("--image_guidance_scale", "--cfg-image", dest=SCALES[1], **scale, help=kept)
    add("--randomize_cfg", action="store_true", help="draw both scales from the seed, within 20%% of the defaults")
    add("--negative_prompt", metavar="TEXT", help="what the edit should not show (default: nothing)")
    rescaled = "0 to 1, against overexposure by guidance (default 0; 0.7 for zero terminal SNR)"
    add("--guidance_rescale", type=float, metavar="R", help=rescaled)
    interval = "fraction of the steps with guidance, such as 0 0.6; the others take a third of the time (default 0 1)"
    add("--guidance_interval", type=float, nargs=2, metavar=("START", "STOP"), help=interval)
    add("--steps", type=int, metavar="N", help="denoising steps (default 20; edit_cli.py uses 100)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same edit (default: random, and printed)")
    add("--best_of", type=int, metavar="N", help="edit with N seeds and keep the edit that --judge likes best")
    judge = "clip_text, clip_image, clip_both (default) or the address of a server with a vision model"
    add("--judge", metavar="METRIC", help=judge)
    add("--judge_model", metavar="NAME", help="its CLIP model or the server's model (default: CLIP ViT-L/14)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help="%(choices)s (default: the model's own)")
    add("--timestep_spacing", choices=SPACINGS, help="spacing of the timesteps; trailing is best for few steps")
    add("--karras_sigmas", action="store_true", help="noise levels of Karras et al. (euler, heun, dpm++, unipc)")
    add("--eta", type=float, metavar="E", help="fresh noise per step, for DDIM (default 0) and TCD (default 0.3)")


def _add_model_and_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    editor = (
        "an editor: a diffusers folder, a Hub id or one .safetensors file; recommended.json or adapted.json in it sets "
        "its defaults"
    )
    add("--model", "--ckpt", help=editor)
    adapter = (
        "LoRAs or DoRAs for --model, or one that turns a text-to-image --model into an editor: folder, file or Hub id"
    )
    add("--lora", nargs="+", action="extend", metavar="ADAPTER", help=adapter)
    add(
        "--lora_scale", nargs="+", action="extend", type=float, metavar="S", help="strength of each adapter (default 1)"
    )
    config = (
        "a YAML or JSON file of flags (flags given override it); or, for a --model in one file, a pipeline of its "
        "family for configuration and tokenizers (default: from the Hub)"
    )
    add("--config", "--single_file_config", dest="single_file_config", metavar="PIPELINE", help=config)
    parser.config_may_be_a_name = True
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add(
        "--vae",
        "--vae-ckpt",
        metavar="VAE",
        help="another autoencoder: a file, a folder or a Hub id (default: the model's own)",
    )
    add("--variant", help="variant of the weight files, such as fp16")
    add("--no_safety_checker", action="store_true", help="do not run the model's safety checker")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add("--batch_size", type=int, default=1, metavar="N", help="edits at once, halved if out of memory (default 1)")
    add("--compile", action="store_true", help="compile the UNet first, which pays off for many edits of one size")
    offload = "keep the weights in main memory: one model on the GPU at a time, or one layer (sequential, slow)"
    add("--offload", choices=OFFLOADS, help=offload)
    add("--vae_slicing", action="store_true", help="decode the images of a batch one by one, to save memory")
    add("--vae_tiling", action="store_true", help="encode and decode in tiles, for images too large for the memory")


def plan(args: argparse.Namespace) -> tuple[list[Job], dict]:
    """The jobs, and for --repeat the record of the image, which also sets the flags of the model."""
    if args.repeat:
        record = require_record(args.repeat)
        args.model = args.model or find_model(record, args.repeat, args.trust_record)
        adapters = recorded_adapters(record)
        if adapters:
            args.lora = args.lora or [find_model(one, args.repeat, args.trust_record, "adapter") for one in adapters]
        job = plan_repeat(args.repeat, record, args.input and args.input[0], args.output)
        if adapters:
            args.lora_scale = [one["adapter"].get("scale", 1.0) for one in adapters][: len(args.lora)]
        args.revision, args.variant = (record["model"].get(name) for name in ("revision", "variant"))
        for flag in ("dtype", "compile", "vae_slicing", "vae_tiling", "no_safety_checker"):
            setattr(args, flag, record["settings"].get(flag))
        return [job], record
    if args.guidance_interval:
        args.guidance_interval = tuple(args.guidance_interval)
    edits = [None] if args.surprise_me else args.edit or []
    planned = edits, pick(args, EditSettings), args.num_images or 1
    if args.jobs:
        return plan_job_file(args.jobs, args.output, *planned), {}
    return plan_input(args.input, args.output, *planned, args.recursive, lambda line: print(line, file=sys.stderr)), {}


def edit_jobs(service: Any, jobs: list[Job], seed: int, best_of: Any | None = None) -> Counter:
    """Edit and save every job; counts "edited", "finished" before and "failed" ones. best_of: chooses among seeds."""
    counts, problems, notes = Counter(), {}, {}

    def save(result: Any) -> None:
        result.save(result.job.output)
        for line in describe(result):
            tqdm.write(line, file=sys.stderr)

    def show_step(step: int, steps: int, _: int) -> None:
        bar.set_postfix_str(f"step {step} of {steps}")

    def edit() -> Iterator[Any]:
        if not best_of:
            return service.edit(jobs, seed, show_step)
        return best_of.choose(service.edit(best_of.expand(jobs), seed, show_step))

    with tqdm(total=len(jobs), unit="edit", leave=False, disable=None) as bar, FileWriter() as writer:
        for result in edit():
            bar.update(1)
            if result.image is not None:
                writer.submit(save, result)
                counts["edited"] += 1
                notes |= dict.fromkeys(result.notes)  # once for all edits of an image
            elif result.problem:
                problems[f"skipped {result.job.name}: {result.problem}"] = None  # the same for all edits of one image
                counts["failed"] += 1
            else:
                counts["finished"] += 1
    print("".join(f"{line}\n" for line in [*notes, *problems]), end="", file=sys.stderr)
    return counts


def describe(result: Any) -> list[str]:
    """What the user may not expect of a saved edit, one line each."""
    output, job, record = result.job.output, result.job, result.record
    lines = [f"replaced {output}, which had {result.replaced}"] if result.replaced else []
    if result.is_flagged:
        lines.append(f"{output} is black: flagged by the model's safety checker")
    elif job.instruction is None or job.settings.randomize_cfg:
        scales = ", ".join(str(record["settings"][name]) for name in SCALES)
        lines.append(f"{output}: {record['instruction']} (seed {record['seed']}, scales {scales})")
    return lines


def run(args: argparse.Namespace) -> int:
    if problems := find_flag_problems(vars(args)):
        raise InputError.from_problems(problems)
    jobs, record = plan(args)

    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    from utils.editing.editor_setup import open_editor
    from utils.editing.service import EditService

    hide_progress_bars()
    editor = open_editor(pick(args, EditorOptions), record, args.repeat)
    for line in editor.messages:
        print(line, file=sys.stderr)
    is_used = {name: getattr(args, name) is None for name in editor.recommended}
    is_used["eta"] = args.eta is None and args.scheduler is None  # the recommended eta belongs to the model's scheduler
    used = {name: value for name, value in editor.recommended.items() if is_used[name]}
    if used:
        print("recommended by this editor:", ", ".join(f"{name} {value}" for name, value in used.items()))
    started = time.monotonic()
    service = EditService(editor, args.batch_size, lambda line: tqdm.write(line, file=sys.stderr), args.keep_metadata)
    seed = service.choose_seed(jobs) if args.seed is None else args.seed
    best_of = None
    if args.best_of:
        from evaluation.best_of import BestOf

        best_of = BestOf(args.best_of, args.judge or "clip_both", args.judge_model, str(editor.pipeline.device))
    counts = edit_jobs(service, jobs, seed, best_of)
    report(jobs, counts, seed, time.monotonic() - started, args)
    return 1 if counts["failed"] else 0


def report(jobs: list[Job], counts: Counter, seed: int, seconds: float, args: argparse.Namespace) -> None:
    """Save the previews and print the summary."""
    from utils.editing.previews import describe_repeat, save_animations, save_sheets

    previews = [*(save_animations(jobs) if args.gif else []), *(save_sheets(jobs) if args.grid else [])]
    where = jobs[0].output if len(jobs) == 1 else jobs[0].output.parent
    finished = f", {counts['finished']} already finished" if counts["finished"] else ""
    seeds = sorted({(seed if job.seed is None else job.seed) + job.offset for job in jobs})
    used = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]} to {seeds[-1]}"
    print(f"{counts['edited']} of {len(jobs)} edited in {seconds:.1f} s{finished}, {used}: {where}")
    print("".join(f"{preview}\n" for preview in previews), end="")
    if args.repeat and not counts["failed"]:
        print(describe_repeat(args.repeat, jobs[0].output))


def main(argv: list[str] | None = None) -> int:
    try:
        with exit_on_input_error():
            return run(parse_flags(argv))
    except KeyboardInterrupt:
        print("stopped; every saved file is complete", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
