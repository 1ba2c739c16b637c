"""Measures clipping, the AdamW step and the EMA beside the peer's way, for the shapes of Stable Diffusion's UNet.

    python benchmarks/optimizer.py                     # half of SD 1.5's parameters on the CPU, SD 1.5 on a GPU
    python benchmarks/optimizer.py --size sd15

The peer: torch's AdamW with its defaults and diffusers' `EMAModel`; tuned: `EMAModel(foreach=True)`. Ours: the
optimizer and EMA of our training. Clipping is the same call on both sides. The median counts. Prints Markdown and adds
to benchmarks/results/optimizer.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.record import add_results  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

SHARES = {"toy": None, "half": 0.5, "sd15": 1.0}
METRICS = {"step": "seconds to step AdamW", "ema": "seconds to average", "clip": "seconds to clip"}
GOAL, LIMIT = 1.0, "the memory's bandwidth: every weight and its state are read and written"


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHARES, help="the UNet (default: half on the CPU, sd15 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many (default 5)")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/optimizer.json")
    args = parser.parse_args(argv)
    import torch

    size = args.size or ("sd15" if torch.cuda.is_available() else "half")
    measured = measure(SHARES[size], args.rounds)
    rows = [
        {"metric": name, "peer": measured["peer", key], "peer_tuned": measured.get(("peer_tuned", key))}
        | {"ours": measured["ours", key], "ratio": round(measured["ours", key] / measured["peer", key], 3)}
        | {"goal": GOAL, "limit": LIMIT}
        for key, name in METRICS.items()
    ]
    add_results(args.results, size, rows)
    print("| | peer, s | tuned, s | ours, s | ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['metric']} | {row['peer']} | {row['peer_tuned'] or ''} | {row['ours']} | {row['ratio']} |")


def measure(share: float | None, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by (side, operation)."""
    import torch
    from diffusers.training_utils import EMAModel

    from benchmarks.checkpoint_sides import make_unet
    from utils.training.ema import MovingAverage
    from utils.training.optimizers import OptimizationOptions, make_optimizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet(share).to(device)
    parameters = list(unet.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)

    optimizers = {"peer": torch.optim.AdamW(parameters), "ours": make_optimizer(parameters, OptimizationOptions(), 1)}
    seconds = {}
    for side, optimizer in optimizers.items():
        seconds[side, "step"] = _median(optimizer.step, rounds, device)
        seconds[side, "clip"] = _median(clip, rounds, device)
        optimizer.state.clear()  # one at a time is in memory
    for side, is_foreach in {"peer": False, "peer_tuned": True}.items():
        average = EMAModel(parameters, foreach=is_foreach)
        seconds[side, "ema"] = _median(lambda average=average: average.step(parameters), rounds, device)
        del average
    ours = MovingAverage(unet, 0.9999)
    seconds["ours", "ema"] = _median(lambda: ours.update(unet, 100), rounds, device)
    return {key: round(value, 5) for key, value in seconds.items()}


def _median(function: Callable[[], object], rounds: int, device: str) -> float:
    """Of `rounds` calls after one, which makes the state."""
    import torch

    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
