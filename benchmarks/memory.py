"""The memory of training Stable Diffusion 1.5 and XL, counted without a GPU, and what fits on which card.

    python benchmarks/memory.py                              # every model, resolution and configuration
    python benchmarks/memory.py --model sdxl --resolution 512 768 --blocks
    python benchmarks/memory.py --markdown --plot            # the tables and the plot of docs/memory.md

With a CUDA GPU, each configuration also takes three real steps with random weights, and the peak that PyTorch reports
is shown next to the count (unless --no-measure is given).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.memory_configurations import CACHED, CONFIGURATIONS, Configuration, OtherModels, estimate  # noqa: E402
from benchmarks.memory_count import StepCount  # noqa: E402
from benchmarks.memory_models import KINDS, TEXT_PARAMETERS, UNETS, count_unet, count_vae_encoding, weigh, weigh_vae  # noqa: E402
from benchmarks.memory_tables import NOTES, TITLES, Row, blocks_table, counts_table, fits_table, totals_table  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.training.memory_saving import list_blocks  # noqa: E402

PLOT = Path(__file__).resolve().parents[1] / "docs/pictures/memory.png"
VAE_DTYPES = {"sd15": torch.bfloat16, "sdxl": torch.float32}  # the defaults of --vae_precision under bf16
CHECKPOINTED = {False: None, True: ["all"]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(UNETS), default=list(UNETS), help="default: both")
    parser.add_argument(
        "--resolution", nargs="+", type=int, default=[256, 512, 768, 1024], help="sides in pixels, multiples of 64"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="samples per micro-batch")
    parser.add_argument(
        "--accumulate", action="store_true", help="accumulate gradients, as with --gradient_accumulation_steps above 1"
    )
    parser.add_argument("--blocks", action="store_true", help="also show what checkpointing each block alone saves")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=PLOT, metavar="FILE", help=f"draw a bar chart (default: {PLOT.name})"
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="also take real steps on the GPU (default: if there is one)",
    )
    args = parser.parse_args(argv)
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA GPU, and PyTorch finds none; drop the flag")
    if wrong := [side for side in args.resolution if side < 64 or side % 64]:
        parser.error(f"--resolution is {wrong[0]}; it must be a multiple of 64")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; it must be at least 1")
    return args


def count_model(model: str, resolutions: list[int], batch_size: int) -> dict[tuple[str, bool, int], StepCount]:
    """All counts of a model by (kind, is checkpointed, resolution)."""
    counts = {}
    for kind in KINDS:
        for is_checkpointed, blocks in CHECKPOINTED.items():
            for resolution in resolutions:
                print(f"counting {model}, {kind}, at {resolution}", file=sys.stderr, flush=True)
                counts[kind, is_checkpointed, resolution] = count_unet(
                    UNETS[model], kind, resolution, batch_size, blocks
                )
    return counts


def list_other_models(model: str, configuration: Configuration, resolution: int, batch_size: int) -> list[OtherModels]:
    """The other models on the GPU: the VAE, which is idle with cached latents. Text encoders are on the CPU."""
    dtype = VAE_DTYPES[model]
    vae = weigh_vae(dtype)
    if configuration.is_peer:  # it encodes the two images of a pair separately
        encoding = count_vae_encoding(resolution, batch_size, dtype)
        return [OtherModels("VAE, text encoders", vae + 2 * TEXT_PARAMETERS[model], encoding)]
    encoding = count_vae_encoding(resolution, 2 * batch_size, dtype)
    return [OtherModels(CACHED, vae), OtherModels("VAE (encodes)", vae, encoding)]


def make_rows(model: str, counts: dict[tuple[str, bool, int], StepCount], args: argparse.Namespace) -> list[Row]:
    """All rows of the tables of a model."""
    weights = {kind: weigh(UNETS[model], kind) for kind in KINDS}
    rows = []
    for configuration in CONFIGURATIONS:
        for is_checkpointed, blocks in CHECKPOINTED.items():
            for resolution in args.resolution:
                count = counts[configuration.kind, is_checkpointed, resolution]
                for others in list_other_models(model, configuration, resolution, args.batch_size):
                    memory = estimate(configuration, weights[configuration.kind], count, others, args.accumulate)
                    measured = None
                    if args.measure:
                        measured = measure(model, configuration, resolution, args.batch_size, blocks, others)
                    rows.append(Row(model, configuration, is_checkpointed, others.name, resolution, memory, measured))
    return rows


def measure(
    model: str,
    configuration: Configuration,
    resolution: int,
    batch_size: int,
    blocks: list[str] | None,
    others: OtherModels,
) -> int | None:
    """The peak of real steps in bytes; None if they do not fit on this GPU."""
    from benchmarks.memory_measure import measure_peak

    print(f"measuring {model}, {configuration.name}, at {resolution}", file=sys.stderr, flush=True)
    try:
        return measure_peak(UNETS[model], configuration, resolution, batch_size, blocks, others, VAE_DTYPES[model])
    except torch.OutOfMemoryError:
        return None


def count_blocks(model: str, resolution: int, batch_size: int) -> dict[str, int]:
    """Bytes saved for the backward pass if one block alone is checkpointed; all weights are trained in bf16."""
    chosen = {"none": None} | {name: [name] for name in (*list_blocks(UNETS[model]), "all")}
    return {
        name: count_unet(UNETS[model], "bf16", resolution, batch_size, blocks, only_saved=True)
        for name, blocks in chosen.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    args = parse_args(argv)
    heading = "\n### {}\n" if args.markdown else "\n{}"
    rows = []
    for model in args.model:
        counts = count_model(model, args.resolution, args.batch_size)
        own = make_rows(model, counts, args)
        rows += own
        title = f"{TITLES[model]}, batch {args.batch_size}: {{}} (GB)"
        print(heading.format(title.format("the peak of a training step")), totals_table(own, args.markdown), sep="\n")
        print(heading.format(title.format("memory of a step beyond the weights, counted")))
        print(counts_table(counts, args.markdown))
        if args.blocks:
            side = max(args.resolution)
            print(
                heading.format(
                    title.format(f"saved for the backward pass at {side} with one block checkpointed, counted")
                )
            )
            print(blocks_table(count_blocks(model, side, args.batch_size), args.markdown))
    print(
        heading.format("What fits: the largest resolution, counted, latents cached (r: with --gradient_checkpointing)")
    )
    print(fits_table(rows, args.markdown))
    print(f"\n{NOTES}")
    if args.plot:
        from benchmarks.memory_plot import plot_memory

        plot_memory(rows, args.plot, args.batch_size)
        print(f"drawn into {args.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
