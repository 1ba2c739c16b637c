"""Measures saving and loading a checkpoint beside accelerate's `save_state`, which diffusers' examples use.

    python benchmarks/checkpoints.py                              # toy-sd
    python benchmarks/checkpoints.py --sizes half                 # half of SD 1.5's parameters
    python benchmarks/checkpoints.py --sizes sd15 --save_only     # SD 1.5: 13.8 GB of memory, and as much disk

A checkpoint holds the UNet, its EMA and the state of AdamW in float32, random. Both sides take turns on the same disk.
Ours also flushes every file to the disk, and verifies every digest when it loads; it is also measured without the
flush. Loading takes the peer twice the memory. Prints Markdown and adds to
benchmarks/results/checkpoints.json.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.record import add_results  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

SIZES = {"toy": None, "half": 0.5, "sd15": 1.0}
GOAL = 1.0  # of the peer's seconds, for each metric
LIMIT = "the disk; ours also flushes every file when it saves and verifies every digest when it loads"


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["toy"], help="what is saved")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many rounds (default 3)")
    parser.add_argument("--save_only", action="store_true", help="do not load")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/checkpoints.json")
    args = parser.parse_args(argv)
    print("| size | | peer, s | ours, s | ratio |\n|---|---|---|---|---|")
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoints-") as folder:
            measured = measure(size, Path(folder), args.rounds, args.save_only)
        rows = [
            {"metric": f"seconds to {name}", "peer": round(peer, 3), "peer_tuned": None, "ours": round(ours, 3)}
            | {"ratio": round(ours / peer, 3), "goal": GOAL, "limit": LIMIT}
            for name, (peer, ours) in measured.items()
        ]
        add_results(args.results, size, rows)
        for row in rows:
            print(f"| {size} | {row['metric']} | {row['peer']} | {row['ours']} | {row['ratio']} |", flush=True)


def measure(size: str, folder: Path, rounds: int, save_only: bool) -> dict[str, tuple[float, float]]:
    """Median seconds of (the peer, ours) by metric; the sides take turns."""
    from benchmarks.checkpoint_sides import Ours, Peer, make_trained

    unet, ema, optimizer = make_trained(SIZES[size])
    sides = {"peer": Peer(unet, ema, optimizer), "ours": Ours(unet, ema, optimizer)}
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for name in (*sides, "unflushed") if number % 2 == 0 else ("unflushed", *reversed(sides)):
            is_flushed, side = name != "unflushed", sides["peer" if name == "peer" else "ours"]
            with nullcontext() if is_flushed else mock.patch("utils.training.checkpoints.flush_to_disk"):
                seconds.setdefault((name, "save"), []).append(_time(partial(side.save, folder / name)))
            if is_flushed and not save_only:
                seconds.setdefault((name, "load"), []).append(_time(partial(side.load, folder / name)))
            shutil.rmtree(folder / name)
    print({" ".join(key): [round(value, 2) for value in values] for key, values in seconds.items()}, file=sys.stderr)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    compared = {"save": (median["peer", "save"], median["ours", "save"])}
    compared["save, not flushed"] = (median["peer", "save"], median["unflushed", "save"])
    return compared | ({} if save_only else {"load": (median["peer", "load"], median["ours", "load"])})


def _time(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
