"""The flags that every generator has. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_preparation.generation.pools import Workers

IMAGE_FORMATS = ("png", "jpeg", "jpeg100", "webp")


def add_making_flags(
    parser: argparse.ArgumentParser, image_format: str | None = "png", data_root: str | None = None
) -> None:
    """The group of flags; without `image_format` (the default of --image_format) the rows hold no images.

    data_root: where the rows go by default; without one the flag is required.
    """
    default = {"required": True} if data_root is None else {"default": Path(data_root)}
    add = parser.add_argument_group("output").add_argument
    add(
        "--data_root",
        type=Path,
        metavar="FOLDER",
        **default,
        help="where the rows go, as parquet files in "
        "FOLDER/data; the same command again goes on with what is there" + f" (default {data_root})" * bool(data_root),
    )
    add("--overwrite", action="store_true", help="replace a set of other settings in --data_root")
    if image_format is not None:
        add(
            "--image_format",
            choices=IMAGE_FORMATS,
            default=image_format,
            help="how images are stored: png and webp "
            f"without loss, jpeg at quality 95, jpeg100 at 100 (default {image_format})",
        )
    add(
        "--seed", type=int, default=0, help="of everything that is drawn; the same seed gives the same rows (default 0)"
    )
    add = parser.add_argument_group("workers").add_argument
    add(
        "--num_workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that make rows; the rows are the same for any number (default 0: this one)",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="make the rows on a Ray cluster: its address, `auto`, or `local` for one on "
        "this machine (pip install -r requirements-ray.txt)",
    )
    add(
        "--gpus_per_worker",
        type=float,
        default=None,
        metavar="N",
        help="GPUs that each Ray worker asks for, also a part of one (default 1 where the work is a model's, else 0)",
    )


def making_problems(args: argparse.Namespace) -> list[str]:
    """What cannot be with these flags, one line each."""
    problems = []
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed {args.seed}: must be from 0 to 2**63 - 1")
    if not 0 <= args.num_workers <= 1024:
        problems.append(f"--num_workers {args.num_workers}: must be from 0 to 1024")
    if args.gpus_per_worker is not None and not 0 <= args.gpus_per_worker <= 64:
        problems.append(f"--gpus_per_worker {args.gpus_per_worker}: must be from 0 to 64")
    if args.data_root.exists() and not args.data_root.is_dir():
        problems.append(f"--data_root {args.data_root}: is a file; give a folder")
    return problems


def pick_workers(args: argparse.Namespace, needs_gpu: bool = False) -> Workers:
    """Who makes the rows."""
    from data_preparation.generation.pools import Workers

    gpus = args.gpus_per_worker
    return Workers(args.num_workers, args.ray, (1.0 if needs_gpu else 0.0) if gpus is None else gpus)
