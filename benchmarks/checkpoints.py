"""Measures saving and loading a checkpoint beside accelerate's `save_state`, which diffusers' examples use.

    python benchmarks/checkpoints.py                              # toy-sd, and half of SD 1.5's parameters
    python benchmarks/checkpoints.py --sizes sd15 --save_only     # SD 1.5: 13.8 GB of memory, and as much disk

A checkpoint holds the UNet, its EMA and the state of AdamW in float32, random. Both sides take turns on the same disk.
Ours also flushes every file to the disk, and verifies every digest when it loads; the peer does neither, so ours is
also measured without the flush. Loading takes the peer twice the memory. Prints Markdown and adds to
benchmarks/results/checkpoints.json.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["toy", "half"], help="what is saved")
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
    peer, ours = Peer(unet, ema, optimizer), Ours(unet, ema, optimizer)
    seconds: dict[str, list[tuple[float, float]]] = {"save": [], "save, not flushed": [], "load": []}
    for _ in range(rounds):
        shutil.rmtree(folder / "peer", ignore_errors=True)
        saved_by_peer = _time(partial(peer.save, folder / "peer"))
        loaded_by_peer = 0.0 if save_only else _time(partial(peer.load, folder / "peer"))
        shutil.rmtree(folder / "peer")
        with mock.patch("utils.training.checkpoints.flush_to_disk"):
            unflushed = _time(partial(ours.save, folder / "ours"))
        shutil.rmtree(folder / "ours")
        seconds["save"].append((saved_by_peer, _time(partial(ours.save, folder / "ours"))))
        seconds["save, not flushed"].append((saved_by_peer, unflushed))
        if not save_only:
            seconds["load"].append((loaded_by_peer, _time(partial(ours.load, folder / "ours"))))
        shutil.rmtree(folder / "ours")
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in seconds.items() if pairs}


def _time(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
