"""Simulates the generation of a million rows without images: what the bookkeeping of the generators costs.

    python benchmarks/bookkeeping.py                                     # a million rows in 100,000 shards
    python benchmarks/bookkeeping.py --rows 20000 --shard_rows 2

Time and memory for each tenth of the shards must stay the same: nothing may be counted again for each further shard.
Prints Markdown.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from data_preparation.generation.runner import GeneratedRows, GenerateRows, run_generation  # noqa: E402
from utils.cli import FlagParser  # noqa: E402


@dataclass(frozen=True)
class Numbers:
    """A `RowGenerator` of rows that hold their number; every hundredth item is rejected."""

    num_items: int

    def features(self) -> datasets.Features:
        return datasets.Features({"number": datasets.Value("int64")})

    def open(self, rank: int) -> GenerateRows:
        def generate(items: range) -> GeneratedRows:
            rows = [{"number": item} for item in items if item % 100]
            return GeneratedRows(rows, {"a multiple of 100": len(items) - len(rows)})

        return generate


def main() -> None:
    import psutil

    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="items (default 1000000)")
    parser.add_argument("--shard_rows", type=int, default=10, metavar="N", help="items of a shard (default 10)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    num_shards, marks = -(-args.rows // args.shard_rows), []
    process, done = psutil.Process(), [0]

    def note() -> str:
        done[0] += 1
        if done[0] % max(1, num_shards // 10) == 0:
            marks.append((done[0], time.monotonic(), process.memory_info().rss))
        return ""

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bookkeeping-") as folder:
        marks.append((0, time.monotonic(), process.memory_info().rss))
        run_generation(Numbers(args.rows), Path(folder, "made"), {}, items_per_shard=args.shard_rows, note=note)
        end = time.monotonic()
    print("| shards | ms per shard | memory, GB |\n|---|---|---|")
    for (first, start, _), (last, stop, memory) in zip(marks, marks[1:], strict=False):
        print(f"| {first:,} to {last:,} | {1000 * (stop - start) / (last - first):.2f} | {memory / 1e9:.2f} |")
    print(f"\nfinishing the dataset: {end - marks[-1][1]:.0f} s")


if __name__ == "__main__":
    main()
