"""Flags shared by all scripts that generate a dataset. Light imports only, so that --help is fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import FlagParser
from utils.settings_file import SUFFIXES, add_config_flag, is_settings_file

if TYPE_CHECKING:
    from data_preparation.generation.runner import WorkerSettings

# --image_format -> arguments of PIL.Image.save: png and webp are lossless, JPEG has no chroma subsampling.
IMAGE_FORMATS = {
    "png": dict(format="PNG", compress_level=3),
    "jpeg": dict(format="JPEG", quality=95, subsampling=0),
    "jpeg100": dict(format="JPEG", quality=100, subsampling=0),
    "webp": dict(format="WEBP", lossless=True, method=2),
}


def add_generation_flags(
    parser: argparse.ArgumentParser, image_format: str | None = "png", data_root: str | None = None
) -> None:
    """Add the flag groups "output" and "workers".

    image_format: default of --image_format; None for rows without images, which have no such flag.
    data_root: default of --data_root; None makes the flag required.
    """
    add = parser.add_argument_group("output").add_argument
    root_help = "output folder; rows are stored in FOLDER/data as parquet. Run the same command again to resume"
    root_help += f" (default {data_root})" if data_root else ""
    root = {"default": Path(data_root)} if data_root else {"required": True}
    add("--data_root", type=Path, metavar="FOLDER", help=root_help, **root)
    add("--overwrite", action="store_true", help="replace a dataset in --data_root that has different settings")
    if image_format is not None:
        format_help = f"png and webp are lossless; jpeg has quality 95, jpeg100 100 (default {image_format})"
        add("--image_format", choices=tuple(IMAGE_FORMATS), default=image_format, help=format_help)
    add("--seed", type=int, default=0, help="random seed; the same seed gives the same rows (default 0)")
    add = parser.add_argument_group("workers").add_argument
    workers_help = "worker processes; the number does not change the rows (default 0: no extra process)"
    add("--num_workers", type=int, default=0, metavar="N", help=workers_help)
    ray_help = "use Ray: a cluster's address, auto, or local (needs pip install -r requirements-ray.txt)"
    add("--ray", metavar="ADDRESS", help=ray_help)
    gpus_help = "GPUs per Ray worker, may be a fraction (default 1 if a model runs, else 0)"
    add("--gpus_per_worker", type=float, metavar="N", help=gpus_help)
    parts_help = "jobs that share the work and --data_root, such as a Slurm array; the last one completes the dataset"
    add("--num_partitions", type=int, default=1, metavar="N", help=parts_help)
    add("--partition", type=int, default=0, metavar="I", help="number of this job, from 0 to N - 1 (default 0)")


def parse_with_dataset_config(parser: FlagParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse with --config FILE; a value that is not a file of flags is --dataset_config_name, as it was once."""
    add_config_flag(parser)
    parser.config_may_be_a_name = True
    args = parser.parse_args(argv)
    if args.config and not is_settings_file(args.config):
        if Path(args.config).is_file():
            parser.error(f"--config {args.config}: the name of a file of flags must end in {', '.join(SUFFIXES)}")
        args.dataset_config_name = args.dataset_config_name or args.config
    return args


def generation_flag_problems(args: argparse.Namespace) -> list[str]:
    """One line for each flag of `add_generation_flags` with an invalid value."""
    problems = []
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    if not 0 <= args.num_workers <= 1024:
        problems.append(f"--num_workers {args.num_workers}: must be from 0 to 1024")
    if args.gpus_per_worker is not None and not 0 <= args.gpus_per_worker <= 64:
        problems.append(f"--gpus_per_worker {args.gpus_per_worker}: must be from 0 to 64")
    if not 1 <= args.num_partitions <= 100_000:
        problems.append(f"--num_partitions {args.num_partitions}: must be from 1 to 100000")
    elif not 0 <= args.partition < args.num_partitions:
        allowed = f"must be from 0 to {args.num_partitions - 1}, below --num_partitions {args.num_partitions}"
        problems.append(f"--partition {args.partition}: {allowed}")
    if args.data_root.exists() and not args.data_root.is_dir():
        problems.append(f"--data_root {args.data_root}: is a file; give a folder")
    return problems


def choose_workers(args: argparse.Namespace, needs_gpu: bool = False) -> WorkerSettings:
    """The worker settings of the flags. needs_gpu: default of --gpus_per_worker."""
    from data_preparation.generation.runner import WorkerSettings

    gpus = float(needs_gpu) if args.gpus_per_worker is None else args.gpus_per_worker
    return WorkerSettings(args.num_workers, args.ray, gpus, args.partition, args.num_partitions)
