"""Generate an instruction-tuning dataset from photographs: original image, instruction, edited image.

    python data_preparation/generate_dataset.py --dataset_id photos/ --task cartoonize --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id photos/ --task low_level cartoonize=5 \\
        --max_num_samples 5000 --resolution 256 --num_workers 4 --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id photos/ --task cartoonize --teacher onnx:whitebox.onnx --data_root pairs
    python data_preparation/generate_dataset.py --dataset_id photos/ --task vaporwave.txt --teacher python:mine.py:paint --data_root pairs

For a restoration task (derain, denoise ...) the photograph is the edited image, and the original image is a degraded
copy of it. For an edit (cartoonize, your own task) a teacher generates the edited image. The same seed gives the same
rows for any number of workers. Run the same command again to resume. See docs/data.md for all tasks and columns.
"""  # noqa: E501

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation import peer_flags  # noqa: E402
from data_preparation.generation.generation_flags import (  # noqa: E402
    add_generation_flags,
    choose_workers,
    generation_flag_problems,
    parse_with_dataset_config,
)
from data_preparation.instructions import available_tasks, read_phrasings  # noqa: E402
from data_preparation.tasks.plan import TASK_GROUPS, TEACHERS, TOY_TASKS, Task, TeacherSettings, plan_tasks  # noqa: E402
from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

# The dataset of instruction-tuned-sd: its names in TensorFlow Datasets, and its id on the Hub.
IMAGENETTE = re.compile(r"imagenette(/(full-size|320px|160px)(-v2)?)?|frgfm/imagenette")
NO_IMAGENETTE = (
    "is a script on the Hub, which `datasets` no longer runs: download imagenette2-320.tgz from fast.ai "
    "(https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz), unpack it, and give that folder. Its images are "
    "ImageNet's, for research only"
)
ROW_FLAGS = ("seed", "resolution", "crop", "image_format", "source_license")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=__doc__, formatter_class=raw, aliases=peer_flags.GENERATE_DATASET)
    add = parser.add_argument_group("photographs").add_argument
    add("--dataset_id", metavar="PHOTOS", help="folder (with subfolders), saved dataset or Hub id")
    add("--image_column", metavar="NAME", help="image column (default: image, or the only one)")
    add("--dataset_config_name", metavar="NAME", help="configuration of the dataset on the Hub")
    add("--revision", metavar="COMMIT", help="commit, tag or branch of the dataset on the Hub")
    add("--split", default="train", help="split of the dataset or of metadata.jsonl; all for all of a folder (train)")
    add("--source_license", metavar="ID", help="licence of the photographs (default: from the card or metadata.jsonl)")
    add("--max_num_samples", type=int, metavar="N", help="number of pairs (default: one per photograph)")
    size_help = "shorter side of the images; only --crop random enlarges smaller photographs (default 256)"
    add("--resolution", type=int, default=256, metavar="PIXELS", help=size_help)
    crop_help = "whole image, centre square, or random square of at least half the side, mirrored or not (default none)"
    add("--crop", choices=("none", "square", "random"), default="none", help=crop_help)
    add = parser.add_argument_group("tasks").add_argument
    names = f"{', '.join(available_tasks())}; a group ({', '.join(TASK_GROUPS)})"
    task_help = f"{names}; or a text file with one instruction per line. WEIGHT: share of the rows (default cartoonize)"
    add("--task", nargs="+", default=["cartoonize"], metavar="TASK[=WEIGHT]", help=task_help)
    heldout_help = "phrasings of each task to hold out, of other patterns than the rest (default 10; toy tasks 3)"
    add("--heldout_phrasings", type=int, default=10, metavar="N", help=heldout_help)
    kind_help = "phrasings to use as instructions; heldout and both are for evaluation (default train)"
    add("--phrasings", choices=("train", "heldout", "both"), default="train", help=kind_help)
    add_teacher_flags(parser)
    add_generation_flags(parser, data_root="cartoonizer-dataset")
    return parse_with_dataset_config(parser, argv)


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teacher, which generates the edited images").add_argument
    teacher_help = f"{TEACHERS} (default opencv, for cartoonize); may be repeated with task names"
    add("--teacher", action="append", default=[], metavar="[TASK=]TEACHER", help=teacher_help)
    add("--teacher_prompt", metavar="TEXT", help="prompt of a diffusers teacher (default: the instruction of the row)")
    settings_help = "more arguments of the diffusers call or torchhub model, such as '{\"num_inference_steps\": 20}'"
    add("--teacher_settings", default="{}", metavar="JSON", help=settings_help)
    range_help = "input range of an onnx or torchhub network; write --teacher_range=-1,1 (default -1,1)"
    add("--teacher_range", default="-1,1", metavar="BLACK,WHITE", help=range_help)
    add("--teacher_output_range", metavar="BLACK,WHITE", help="its output range (default: --teacher_range)")
    add("--teacher_layout", choices=("auto", "nchw", "nhwc"), default="auto", help="its dimension order (default auto)")
    multiple_help = "pad its input to a multiple of N by mirroring the border (default 1)"
    add("--teacher_multiple", type=int, default=1, metavar="N", help=multiple_help)
    add("--teacher_channels", choices=("rgb", "bgr"), default="rgb", help="its channel order (default rgb)")
    add("--trust_remote_code", action="store_true", help="allow running the code of a torchhub repository")
    add("--batch_size", type=int, default=1, metavar="N", help="images per call of a teacher (default 1)")
    add("--device", default="auto", help="device of the teacher: cuda, mps or cpu (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of a diffusers teacher (fp16 on cuda, else fp32)")


def check_flags(args: argparse.Namespace) -> list[Task]:
    """The tasks. Raises one InputError with all problems of the flags."""
    tasks, problems = plan_tasks(args.task, args.teacher)
    if args.dataset_id is None:
        problems.append("--dataset_id is missing: give a folder of photographs, a saved dataset or a Hub id")
    elif IMAGENETTE.fullmatch(args.dataset_id) and not Path(args.dataset_id).exists():
        problems.append(f"--dataset_id {args.dataset_id} {NO_IMAGENETTE}")
    if args.resolution < 64 or args.resolution > 4096 or args.resolution % 8:
        problems.append(f"--resolution {args.resolution}: must be a multiple of 8 from 64 to 4096")
    if args.max_num_samples is not None and args.max_num_samples < 1:
        problems.append(f"--max_num_samples {args.max_num_samples}: must be at least 1")
    for flag, low, high in (("batch_size", 1, 4096), ("teacher_multiple", 1, 1024), ("heldout_phrasings", 0, 10_000)):
        if not low <= getattr(args, flag) <= high:
            problems.append(f"--{flag} {getattr(args, flag)}: must be from {low} to {high}")
    for flag in ("teacher_range", "teacher_output_range"):
        if getattr(args, flag) is not None and read_range(getattr(args, flag)) is None:
            problems.append(f"--{flag} {getattr(args, flag)}: must be two different numbers, as in 0,1 or -1,1")
    if read_json_object(args.teacher_settings) is None:
        example = '{"strength": 0.6}'
        problems.append(f"--teacher_settings {args.teacher_settings}: must be a JSON object, as in '{example}'")
    if any(task.teacher.startswith("torchhub:") for task in tasks) and not args.trust_remote_code:
        problems.append("--teacher torchhub runs the code of the repository: read it, then give --trust_remote_code")
    if args.phrasings != "train" and args.heldout_phrasings == 0:
        problems.append(f"--phrasings {args.phrasings}: needs --heldout_phrasings of at least 1")
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


def read_json_object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def make_generator(args: argparse.Namespace, tasks: list[Task]) -> tuple[Any, dict]:
    """(PhotographPairGenerator, settings for the manifest). Opens the photographs and finds the models."""
    from data_preparation.generation.inputs import Photographs
    from data_preparation.generation.user_functions import with_absolute_path
    from data_preparation.importing.source_pairs import digest_json
    from data_preparation.tasks.photograph_pairs import PhotographPairGenerator
    from data_preparation.tasks.teachers import describe_models, public_teacher

    place = (args.dataset_id, args.split, args.image_column, args.dataset_config_name, args.revision)
    photographs = Photographs(*place)
    opened = photographs.open()
    print("".join(f"{line}\n" for line in opened.skipped), end="", file=sys.stderr)
    tasks = [replace(task, teacher=with_absolute_path(task.teacher)) for task in tasks]
    models = {task.teacher: describe_models(task.teacher) for task in tasks}
    generator = PhotographPairGenerator(
        photographs=photographs,
        tasks=tuple(tasks),
        phrasings={task.phrasings: read_phrasings(task.phrasings, num_heldout(args, task)) for task in tasks},
        phrasing_split=args.phrasings,
        models=models,
        teacher_settings=read_teacher_settings(args),
        num_items=args.max_num_samples or len(opened),
        **{name: getattr(args, name) for name in (*ROW_FLAGS, "batch_size")},
    )
    names = ["split", "phrasings", *ROW_FLAGS]
    if uses_model(tasks):
        names += ["batch_size", *(name for name in vars(args) if name.startswith("teacher_"))]
    settings = {
        "generator": "generate_dataset",
        "photographs": opened.dataset,
        "photographs_digest": opened.digest,
        "tasks": {task.name: [task.weight, public_teacher(task.teacher), models[task.teacher]] for task in tasks},
        "instructions": {name: [*map(len, both), digest_json(both)] for name, both in generator.phrasings.items()},
    }
    return generator, settings | {name: getattr(args, name) for name in names}


def read_teacher_settings(args: argparse.Namespace) -> TeacherSettings:
    output_range = read_range(args.teacher_output_range) if args.teacher_output_range else None
    settings, extra = pick(args, TeacherSettings), read_json_object(args.teacher_settings)
    return replace(settings, input_range=read_range(args.teacher_range), output_range=output_range, extra=extra)


def num_heldout(args: argparse.Namespace, task: Task) -> int:
    return min(args.heldout_phrasings, 3) if task.phrasings in TOY_TASKS else args.heldout_phrasings


def uses_model(tasks: list[Task]) -> bool:
    return any(task.teacher.startswith(("onnx:", "torchhub:", "diffusers:")) for task in tasks)


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        args = parse_flags(argv)
        tasks = check_flags(args)
        quiet_libraries()
        from data_preparation.generation.runner import run_generation

        generator, settings = make_generator(args, tasks)
        workers = choose_workers(args, needs_gpu=uses_model(tasks) and args.device != "cpu")
        summary = run_generation(generator, args.data_root, settings, workers=workers, overwrite=args.overwrite)
        print(summary.describe(args.data_root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
