"""Edit photographs by instruction with an InstructPix2Pix model (Stable Diffusion 1.x/2.x, SDXL, CosXL).

    python infer.py --model my-editor --input photo.jpg --edit "turn it into a pencil drawing"
    python infer.py --model timbrooks/instruct-pix2pix --input photos/ --output edited/ --edit "make it snowy"
    python infer.py --model my-base --lora my-adapter --input photo.jpg --edit "make it snowy"

The spellings of the original edit_cli.py (--cfg-text, --cfg-image, --steps, ...) work too.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from utils.cli import FlagParser
from utils.errors import InputError, exit_on_input_error
from utils.pictures import load_picture
from utils.pixels import BadRow, decode_image
from utils.quiet import hide_progress_bars, quiet_libraries

WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READABLE = (*WRITABLE, ".gif", ".jfif", ".ppm", ".avif")  # what counts as an image in a folder
LIMITS = {"steps": (1, 1000), "batch_size": (1, 1024), "resolution": (8, 4096), "seed": (0, 2**63 - 1)}
LIMITS |= {"guidance_scale": (0, 1000), "image_guidance_scale": (0, 1000), "lora_scale": (-10, 10)}
ORIGINAL_MODEL = (
    "--ckpt, --vae-ckpt and a --config of .yaml belong to the original edit_cli.py; here a model is a folder in "
    "diffusers' format or one .safetensors file. The original's is --model timbrooks/instruct-pix2pix; convert a .ckpt "
    "of your own to .safetensors once, and give it as --model FILE"
)


class Job(NamedTuple):
    name: str
    load: Callable[[], Any]  # the upright RGB image; raises BadRow
    output: Path


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("what to edit").add_argument
    add("--input", required=True, help="an image, a folder of images, or the http(s) address of an image")
    add("--edit", required=True, metavar="INSTRUCTION", help='what to change, such as "make it winter"')
    add("--output", help="file for one image (default NAME-edited.png), folder for a folder (default FOLDER-edited)")
    add("--resolution", type=int, metavar="PIXELS", help="longer side of the edit, about; the aspect ratio is kept and "
        "both sides become multiples of 64 (default 512, for SDXL 1024, or what the model was made for if less)")
    add = parser.add_argument_group("how").add_argument
    add("--guidance_scale", "--cfg-text", dest="guidance_scale", type=float, default=7.5, metavar="S",
        help="how closely to follow the instruction (default 7.5)")
    add("--image_guidance_scale", "--cfg-image", dest="image_guidance_scale", type=float, default=1.5, metavar="S",
        help="how closely to keep to the image (default 1.5; 1 takes a third less time)")
    add("--steps", type=int, default=20, metavar="N", help="denoising steps (default 20; the original's is 100)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same edit (default: random, and printed)")
    add = parser.add_argument_group("model and machine").add_argument
    add("--model", help="an editor: a folder in diffusers' format, an id on the Hub, or one .safetensors file")
    add("--lora", metavar="ADAPTER", help="a LoRA or DoRA for it in diffusers' format: a folder, its file, or an id on "
        "the Hub; one that was trained on a text-to-image --model makes an editor of it")
    add("--lora_scale", type=float, default=1.0, metavar="S", help="how strongly it applies (default 1)")
    add("--config", "--single_file_config", dest="single_file_config", metavar="PIPELINE", help="for a --model in one "
        "file: a folder or Hub id of a pipeline of its family, whose configuration and tokenizers it gets (default: "
        "the one on the Hub that diffusers takes it for)")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add("--batch_size", type=int, default=1, metavar="N", help="images of a folder edited at once (default 1)")
    # fmt: on
    parser.add_argument("--ckpt", "--vae-ckpt", dest="original_model", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    problems = []
    if args.original_model or (args.single_file_config or "").endswith((".yaml", ".yml")):
        problems.append(ORIGINAL_MODEL)
    elif not args.model:
        problems.append("--model is missing: the folder, the file or the Hub id of an editor")
    for flag in ("model", "lora", "single_file_config"):
        value = getattr(args, flag)
        if value and value.startswith(("/", ".", "~")) and not Path(value).exists():
            problems.append(f"--{flag} {value} is not a folder or file that exists")
    if args.lora_scale != 1 and not args.lora:
        problems.append(f"--lora_scale {args.lora_scale} has nothing to scale: give --lora as well")
    if args.single_file_config and args.model and Path(args.model).is_dir():
        problems.append(f"--config is for a --model in one file, and {args.model} is a folder")
    if not args.edit.strip():
        problems.append("--edit is empty: say what to change")
    for flag, (least, most) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:  # not a number is out of every range
            problems.append(f"--{flag} {value}: must be from {least} to {most}")
    if problems:
        raise InputError.from_problems(problems)


def plan_jobs(source: str, output: str | None) -> list[Job]:
    """What to edit and where to save it; the output's folder is made and tried. A single image is read at once."""
    path = Path(unquote(urlsplit(source).path)) if "://" in source else Path(source)
    if "://" not in source and path.is_dir():
        return plan_folder(path, Path(output or f"{path.resolve()}-edited"))
    target = Path(output or f"{path.stem or 'image'}-edited.png")
    if target.is_dir() or (output or "").endswith("/"):
        target = target / f"{path.stem or 'image'}.png"
    if target.suffix.lower() not in WRITABLE:
        raise InputError(f"--output {target}: its name must end in one of {', '.join(WRITABLE)}")
    if target.resolve() == path.resolve():
        raise InputError(f"--output {target} is the input itself: choose another name")
    image = load_picture(source, "--input")
    check_writable(target.parent)
    return [Job(path.name, lambda: image, target)]


def plan_folder(folder: Path, target: Path) -> list[Job]:
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file, and --input {folder} is a folder: give a folder")
    if target.resolve() == folder.resolve():
        raise InputError("--output is the input folder itself: choose another, so that nothing is overwritten")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in READABLE and not p.name.startswith("."))
    if not images:
        raise InputError(f"--input {folder} holds no images ({', '.join(READABLE)})")
    check_writable(target)
    stems = [image.stem for image in images]
    names = [p.stem if stems.count(p.stem) == 1 else p.name.replace(".", "_") for p in images]  # a.jpg beside a.png
    return [
        Job(image.name, partial(decode_image, image), target / f"{name}.png")
        for image, name in zip(images, names, strict=True)
    ]


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output cannot be written in {folder}: {error.strerror}") from error


def edit_jobs(pipeline: Any, jobs: list[Job], args: argparse.Namespace, seed: int) -> list[str]:
    """Edit and save every job; returns what is wrong with the images that cannot be edited, one line each."""
    from utils.editing import edit_images, fit_to_model, save_image

    problems = []
    with tqdm(total=len(jobs), unit="image", leave=False, disable=None) as bar:
        for start in range(0, len(jobs), args.batch_size):
            batch, images, outputs = jobs[start : start + args.batch_size], [], []
            for job in batch:
                try:
                    images.append(fit_to_model(job.load(), pipeline, args.resolution))
                    outputs.append(job.output)
                except (BadRow, InputError) as error:
                    problems.append(f"{job.name}: {error}")
            edited = edit_images(
                pipeline, images, [args.edit] * len(images), seeds=[seed] * len(images),
                num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
                image_guidance_scale=args.image_guidance_scale,
                on_step=lambda done, total: bar.set_postfix_str(f"step {done} of {total}"),
            )  # fmt: skip
            for output, image in zip(outputs, edited, strict=True):
                save_image(image, output)
                if image.info["flagged"]:
                    tqdm.write(f"{output} is black: the model's safety checker objected", file=sys.stderr)
            bar.update(len(batch))
    return problems


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    jobs = plan_jobs(args.input, args.output)

    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    from utils.loading import choose_device, load_editor  # the heavy imports begin here

    hide_progress_bars()
    device, dtype = choose_device(args.device, args.dtype)
    pipeline = load_editor(
        args.model, dtype=dtype, device=device, revision=args.revision, variant=args.variant,
        single_file_config=args.single_file_config, lora=args.lora, lora_scale=args.lora_scale,
    )  # fmt: skip
    seed = secrets.randbelow(100_000) if args.seed is None else args.seed
    started = time.monotonic()
    problems = edit_jobs(pipeline, jobs, args, seed)
    seconds, where = time.monotonic() - started, jobs[0].output if len(jobs) == 1 else jobs[0].output.parent
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    print(f"{len(jobs) - len(problems)} of {len(jobs)} edited in {seconds:.1f} s, seed {seed}: {where}")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    try:
        with exit_on_input_error():
            return run(parse_flags(argv))
    except KeyboardInterrupt:
        print("stopped; every file that was saved is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
