"""Pairs for instruction tuning from photographs: an original image, an instruction, the edited image.

    python data_preparation/generate_dataset.py --dataset_id photos/ --task cartoonize --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id frgfm/imagenette --config 320px --task low_level cartoonize=5 \\
        --max_num_samples 5000 --resolution 256 --num_workers 4 --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id photos/ --task cartoonize --teacher onnx:whitebox.onnx --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id photos/ --task vaporwave.txt --teacher python:mine.py:paint --data_root pairs

For a restoration (derain, denoise ...) the photograph is the edited image, and the original is made by degrading it; for
an edit (cartoonize, your own) a teacher makes the edited image. Killed at any moment, the same command goes on; the same
seed gives the same rows for any number of workers. docs/data.md shows every task and says what each column holds.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.generation.generation_flags import add_generation_flags, choose_workers, generation_flag_problems  # noqa: E402
from data_preparation.instructions import available_tasks, read_phrasings  # noqa: E402
from data_preparation.tasks.plan import GROUPS, TOY, Task, plan_tasks  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

IMAGENETTE, IMAGENETTE_HUB, IMAGENETTE_SAMPLES = "imagenette", ("frgfm/imagenette", "full_size"), 5000
BATCHED = ("onnx", "torchhub", "diffusers")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("photographs").add_argument
    add(
        "--dataset_id",
        default=IMAGENETTE,
        metavar="PHOTOS",
        help="a folder of photographs (searched with its "
        "subfolders), a saved dataset, or an id on the Hub (default imagenette, of which 5,000 photographs)",
    )
    add("--image_column", metavar="NAME", help="of a dataset (default: image, or the only column of images)")
    add("--config", metavar="NAME", help="configuration of a dataset on the Hub")
    add("--revision", metavar="COMMIT", help="commit, tag or branch of a dataset on the Hub")
    add(
        "--split",
        default="train",
        help="of a dataset, or of a folder whose metadata.jsonl names splits; `all` takes "
        "all of such a folder (default train)",
    )
    add("--source_license", metavar="ID", help="licence of the photographs (default: what their card or metadata says)")
    add("--max_num_samples", type=int, metavar="N", help="pairs to make (default: one of each photograph)")
    add(
        "--resolution",
        type=int,
        default=256,
        metavar="PIXELS",
        help="shorter side of the pictures; smaller photographs are not enlarged but by --crop random (default 256)",
    )
    add(
        "--crop",
        choices=("none", "square", "random"),
        default="none",
        help="none: the whole view; square: the square "
        "in the middle; random: a square of half to all of the shorter side, anywhere, mirrored half the time, for few "
        "photographs (default none)",
    )
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--task",
        nargs="+",
        default=["cartoonize"],
        metavar="TASK[=WEIGHT]",
        help=f"{', '.join(available_tasks())}; a "
        f"group ({', '.join(GROUPS)}); or your own text file with one phrasing a line. A weight is the share of "
        "the rows (default cartoonize)",
    )
    add(
        "--heldout_phrasings",
        type=int,
        default=10,
        metavar="N",
        help="of each task, so many last phrasings stay out of training (default 10; 3 of a task of the toy world)",
    )
    add(
        "--phrasings",
        choices=("train", "heldout", "both"),
        default="train",
        help="which ways of asking the rows take; heldout and both are for evaluation (default train)",
    )
    add = parser.add_argument_group("teacher, who makes the edited image of a task that is no restoration").add_argument
    add(
        "--teacher",
        action="append",
        default=[],
        metavar="[TASK=]TEACHER",
        help="opencv (cartoons, the default), "
        "onnx:FILE, torchhub:REPO:MODEL (asks for --trust_remote_code), diffusers:MODEL (an editing or image-to-image "
        "pipeline), python:FILE:FUNCTION; may repeat with the names of tasks",
    )
    add("--teacher_prompt", metavar="TEXT", help="what a diffusers teacher is asked (default: the row's instruction)")
    add(
        "--teacher_settings",
        default="{}",
        metavar="JSON",
        help="further arguments of a diffusers call, such "
        'as \'{"num_inference_steps": 20}\', or of a torchhub model, such as \'{"pretrained": "paprika"}\'',
    )
    add(
        "--teacher_range",
        default="-1,1",
        metavar="BLACK,WHITE",
        help="values that an onnx or torchhub network takes "
        "(default -1,1; a negative one is written --teacher_range=-1,1)",
    )
    add("--teacher_output_range", metavar="BLACK,WHITE", help="values that it gives (default: as it takes)")
    add("--teacher_layout", choices=("auto", "nchw", "nhwc"), default="auto", help="order of its dimensions")
    add(
        "--teacher_multiple",
        type=int,
        default=1,
        metavar="N",
        help="what sides must be a multiple of, reached by mirroring the border (default 1)",
    )
    add("--teacher_channels", choices=("rgb", "bgr"), default="rgb", help="order of its colours (default rgb)")
    add("--trust_remote_code", action="store_true", help="run the code of a torchhub repository, which you have read")
    add("--batch_size", type=int, default=1, metavar="N", help="pictures that a teacher gets at once (default 1)")
    add("--device", default="auto", help="of a teacher: cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="of a diffusers teacher (default fp16 on cuda, else fp32)")
    add_generation_flags(parser, data_root="cartoonizer-dataset")
    parser.set_defaults(most=sys.maxsize)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> list[Task]:
    """The tasks; raises one InputError with everything that can be told from the flags alone."""
    tasks, problems = plan_tasks(args.task, args.teacher)
    if args.resolution < 64 or args.resolution > 4096 or args.resolution % 8:
        problems.append(f"--resolution {args.resolution}: must be a multiple of 8 from 64 to 4096")
    if args.max_num_samples is not None and args.max_num_samples < 1:
        problems.append(f"--max_num_samples {args.max_num_samples}: must be at least 1")
    for flag, least, most in (("batch_size", 1, 4096), ("teacher_multiple", 1, 1024), ("heldout_phrasings", 0, 10_000)):
        if not least <= getattr(args, flag) <= most:
            problems.append(f"--{flag} {getattr(args, flag)}: must be from {least} to {most}")
    for flag in ("teacher_range", "teacher_output_range"):
        if getattr(args, flag) is not None and read_range(getattr(args, flag)) is None:
            problems.append(f"--{flag} {getattr(args, flag)}: must be two different numbers, as in 0,1 or -1,1")
    if read_settings(args.teacher_settings) is None:
        problems.append(
            f"--teacher_settings {args.teacher_settings}: must be a JSON object, as in '{{\"strength\": 0.6}}'"
        )
    if any(task.teacher.startswith("torchhub:") for task in tasks) and not args.trust_remote_code:
        problems.append("--teacher torchhub runs the repository's code: read it, and say --trust_remote_code")
    if args.phrasings != "train" and args.heldout_phrasings == 0:
        problems.append(f"--phrasings {args.phrasings} needs --heldout_phrasings of at least 1")
    problems += generation_flag_problems(args)
    if problems:
        raise InputError.from_problems(problems)
    return tasks


def read_range(text: str) -> tuple[float, float] | None:
    try:
        black, white = map(float, text.split(","))
    except ValueError:
        return None
    return (black, white) if black != white and abs(black) + abs(white) < 1e6 else None


def read_settings(text: str) -> dict | None:
    try:
        settings = json.loads(text)
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def make_recipe(args: argparse.Namespace, tasks: list[Task]) -> tuple:
    """(recipe, settings of the manifest). The heavy imports begin here."""
    from data_preparation.generation.inputs import Photographs
    from data_preparation.tasks.recipe import PairRecipe, public_teacher
    from data_preparation.tasks.teachers import TeacherSettings, describe_models

    if args.dataset_id == IMAGENETTE:  # as in instruction-tuned-sd, whose commands name neither
        args.dataset_id, args.config = IMAGENETTE_HUB[0], args.config or IMAGENETTE_HUB[1]
        args.most = IMAGENETTE_SAMPLES
    photographs = Photographs(args.dataset_id, args.split, args.image_column, args.config, args.revision)
    found = photographs.open()
    phrasings = {task.phrasings: read_phrasings(task.phrasings, num_heldout(args, task)) for task in tasks}
    output_range = read_range(args.teacher_output_range) if args.teacher_output_range else None
    teacher = TeacherSettings(
        read_range(args.teacher_range),
        output_range,
        args.teacher_layout,
        args.teacher_multiple,
        args.teacher_channels,
        args.teacher_prompt,
        read_settings(args.teacher_settings),
        args.device,
        args.dtype,
        args.trust_remote_code,
    )
    count = args.max_num_samples or min(len(found), args.most)
    recipe = PairRecipe(
        photographs,
        tuple(tasks),
        phrasings,
        count,
        args.seed,
        args.resolution,
        args.crop,
        args.phrasings,
        args.image_format,
        args.source_license,
        args.batch_size,
        teacher,
    )
    uses_model = any(task.teacher.partition(":")[0] in BATCHED for task in tasks)
    settings = {
        "generator": "generate_dataset",
        "photographs": found.dataset,
        "photographs_digest": found.digest,
        "split": args.split,
        "seed": args.seed,
        "resolution": args.resolution,
        "crop": args.crop,
        "image_format": args.image_format,
        "phrasings": args.phrasings,
        "source_license": args.source_license,
        "tasks": {task.name: [task.weight, public_teacher(task.teacher), describe_models(task)] for task in tasks},
        "instructions": {name: list(map(len, both)) for name, both in phrasings.items()},
    }
    if uses_model:
        settings |= {name: value for name, value in vars(args).items() if name.startswith("teacher_")}
        settings["batch_size"] = args.batch_size
    return recipe, settings, uses_model


def num_heldout(args: argparse.Namespace, task: Task) -> int:
    return min(args.heldout_phrasings, 3) if task.phrasings in TOY else args.heldout_phrasings


def run(args: argparse.Namespace) -> int:
    tasks = check_flags(args)
    quiet_libraries()
    recipe, settings, uses_model = make_recipe(args, tasks)
    from data_preparation.generation.runner import run_generation

    summary = run_generation(
        recipe, args.data_root, settings, workers=choose_workers(args, uses_model), overwrite=args.overwrite
    )
    print(summary.describe(args.data_root))
    return 0


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        return run(parse_flags(argv))


if __name__ == "__main__":
    sys.exit(main())
