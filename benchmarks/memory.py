"""What fits on which card: the memory of training Stable Diffusion 1.5 and XL, counted without a GPU.

    python benchmarks/memory.py                              # every model, resolution and way to train
    python benchmarks/memory.py --model sdxl --resolution 512 768 --blocks
    python benchmarks/memory.py --markdown --plot            # the tables of docs/memory.md and its picture

Where a CUDA GPU is found, each configuration takes three real steps with random weights, and the peak that PyTorch
reports stands beside the count (--no-measure leaves that out).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.memory_count import StepCount  # noqa: E402
from benchmarks.memory_ladder import CACHED, LADDER, Configuration, Surroundings, estimate  # noqa: E402
from benchmarks.memory_models import KINDS, TEXT_PARAMETERS, UNETS, count_unet, count_vae_encoding, weigh, weigh_vae  # noqa: E402
from benchmarks.memory_tables import NOTES, TITLES, Row, blocks_table, counts_table, fits_table, totals_table  # noqa: E402
from utils.training.memory_saving import list_blocks  # noqa: E402

PICTURE = Path(__file__).resolve().parents[1] / "docs/pictures/memory.png"
VAE_DTYPES = {"sd15": torch.bfloat16, "sdxl": torch.float32}  # the defaults of --vae_precision under bf16
RECOMPUTED = {False: None, True: ["all"]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(UNETS), default=list(UNETS), help="default: both")
    parser.add_argument(
        "--resolution", nargs="+", type=int, default=[256, 512, 768, 1024], help="sides in pixels, multiples of 64"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="samples of a micro-batch")
    parser.add_argument("--accumulate", action="store_true", help="as with --gradient_accumulation_steps above 1")
    parser.add_argument("--blocks", action="store_true", help="what the recomputation of each block alone saves")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=PICTURE, metavar="FILE", help=f"draw the ladder (into {PICTURE.name})"
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="take real steps on the GPU too; by default where there is one",
    )
    args = parser.parse_args(argv)
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA GPU, and PyTorch finds none: drop the flag")
    if wrong := [side for side in args.resolution if side < 64 or side % 64]:
        parser.error(f"--resolution is {wrong[0]}, and it must be a multiple of 64")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}, and the lowest allowed is 1")
    return args


def count_model(model: str, resolutions: list[int], batch_size: int) -> dict[tuple[str, bool, int], StepCount]:
    """Every count that the ladder of a model needs, by (kind, is recomputed, resolution)."""
    counts = {}
    for kind in KINDS:
        for is_recomputed, blocks in RECOMPUTED.items():
            for resolution in resolutions:
                print(f"counting {model}, {kind}, at {resolution}", file=sys.stderr, flush=True)
                counts[kind, is_recomputed, resolution] = count_unet(UNETS[model], kind, resolution, batch_size, blocks)
    return counts


def list_surroundings(model: str, configuration: Configuration, resolution: int, batch_size: int) -> list[Surroundings]:
    """What may stand on the GPU beside the UNet: with cached latents the VAE is idle. Text encoders have left."""
    dtype = VAE_DTYPES[model]
    vae = weigh_vae(dtype)
    if configuration.is_peer:  # which encodes the two images of a pair one after the other
        encoding = count_vae_encoding(resolution, batch_size, dtype)
        return [Surroundings("VAE, text encoders", vae + 2 * TEXT_PARAMETERS[model], encoding)]
    encoding = count_vae_encoding(resolution, 2 * batch_size, dtype)
    return [Surroundings(CACHED, vae), Surroundings("VAE (encodes)", vae, encoding)]


def climb(model: str, counts: dict[tuple[str, bool, int], StepCount], args: argparse.Namespace) -> list[Row]:
    """Every row of a model."""
    weights = {kind: weigh(UNETS[model], kind) for kind in KINDS}
    rows = []
    for configuration in LADDER:
        for is_recomputed, blocks in RECOMPUTED.items():
            for resolution in args.resolution:
                count = counts[configuration.kind, is_recomputed, resolution]
                for around in list_surroundings(model, configuration, resolution, args.batch_size):
                    memory = estimate(configuration, weights[configuration.kind], count, around, args.accumulate)
                    measured = None
                    if args.measure:
                        measured = measure(model, configuration, resolution, args.batch_size, blocks, around)
                    rows.append(Row(model, configuration, is_recomputed, around.name, resolution, memory, measured))
    return rows


def measure(
    model: str,
    configuration: Configuration,
    resolution: int,
    batch_size: int,
    blocks: list[str] | None,
    around: Surroundings,
) -> int | None:
    """The peak of real steps; None where they do not fit on this GPU."""
    from benchmarks.memory_measure import measure_peak

    print(f"measuring {model}, {configuration.name}, at {resolution}", file=sys.stderr, flush=True)
    try:
        return measure_peak(UNETS[model], configuration, resolution, batch_size, blocks, around, VAE_DTYPES[model])
    except torch.OutOfMemoryError:
        return None


def count_blocks(model: str, resolution: int, batch_size: int) -> dict[str, int]:
    """Saved bytes when one block alone is recomputed; all weights are trained, in bf16."""
    chosen = {"none": None} | {name: [name] for name in (*list_blocks(UNETS[model]), "all")}
    return {
        name: count_unet(UNETS[model], "bf16", resolution, batch_size, blocks, only_saved=True)
        for name, blocks in chosen.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Print the ladder; returns the exit code."""
    args = parse_args(argv)
    heading = "\n### {}\n" if args.markdown else "\n{}"
    rows = []
    for model in args.model:
        counts = count_model(model, args.resolution, args.batch_size)
        own = climb(model, counts, args)
        rows += own
        title = f"{TITLES[model]}, batch {args.batch_size}: {{}} (GB)"
        print(heading.format(title.format("the peak of a training step")), totals_table(own, args.markdown), sep="\n")
        print(heading.format(title.format("what a step takes beyond the weights, counted")))
        print(counts_table(counts, args.markdown))
        if args.blocks:
            side = max(args.resolution)
            print(heading.format(title.format(f"saved at {side} when one block alone is recomputed, counted")))
            print(blocks_table(count_blocks(model, side, args.batch_size), args.markdown))
    print(
        heading.format("What fits: the largest resolution, counted, latents cached (r: with --gradient_checkpointing)")
    )
    print(fits_table(rows, args.markdown))
    print(f"\n{NOTES}")
    if args.plot:
        from benchmarks.memory_plot import plot_ladder

        plot_ladder(rows, args.plot, args.batch_size)
        print(f"drawn into {args.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
