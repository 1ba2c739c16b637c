"""Encode the images of a dataset once, for trainings with --cache_latents.

    accelerate launch data_preparation/cache_latents.py --latent_cache_dir latents --center_crop --resolution 256 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name my-pairs
    python data_preparation/cache_latents.py --ray auto ...

It accepts the flags of a training script: replace the script's name in your command. The flags of the data, the
geometry, the VAE and the precision decide what is encoded; the others change nothing. A training with the same ones
then encodes nothing, and needs no GPU time for it. Run the same command again to resume; several processes, machines
and jobs may share the folder.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import pick  # noqa: E402
from utils.errors import exit_on_input_error  # noqa: E402
from utils.training.flags import parse_training_flags  # noqa: E402
from utils.training.launcher import prepare_process  # noqa: E402

INTERRUPTED = "interrupted: run the same command again to resume"


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("workers").add_argument
    add("--ray", metavar="ADDRESS", help="use Ray: a cluster's address, auto, or local; its nodes need the same paths")
    add("--num_workers", type=int, metavar="N", help="Ray actors (default: as many as fit)")
    add(
        "--gpus_per_worker", type=float, metavar="N", help="GPUs per actor, may be a fraction (default 1, or 0 without)"
    )
    parser.set_defaults(cache_latents=True)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    description = "Encode the images of a dataset once, for trainings with --cache_latents."
    args = parse_training_flags(argv, description, family="any", add_own_flags=add_own_flags)
    with exit_on_input_error():
        prepare_process()
        from data_preparation.generation.latents import describe_cache, encode_here, encode_on_ray
        from utils.training.settings import Settings

        settings, started = pick(args, Settings), time.monotonic()
        try:
            if args.ray:
                folders, count = encode_on_ray(settings, args.ray, args.num_workers or 0, args.gpus_per_worker)
            else:
                folders, count = encode_here(settings)
        except KeyboardInterrupt:
            print(f"\n{INTERRUPTED}", file=sys.stderr)
            return 130
        if folders:
            print(describe_cache(settings, folders, count, time.monotonic() - started), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
