"""Measures training steps beside diffusers' example: its script at its defaults, tuned, and ours, live and cached.

    python benchmarks/training.py --peer DIFFUSERS/examples/instruct_pix2pix                       # on the CPU
    python benchmarks/training.py --peer DIFFUSERS/examples/instruct_pix2pix --cells sd15-256      # on a GPU

The same base with random weights (but the toy's), the same JPEG pairs, the same seed and number of steps; every run is
a process of its own (timed_script.py), and rounds take turns, so that what else the machine does meets all of them
alike. `peer` is diffusers' documented command, `peer_tuned` the best that its flags allow. Prints Markdown and adds to
benchmarks/results/training.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.record import add_results  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

CACHED = "--cache_latents --center_crop"
TUNED = "--dataloader_num_workers=8 --allow_tf32"


@dataclass(frozen=True)
class Cell:
    """What is trained, and the flags of each side. The flags of a variant are added to `both`.

    goals: ratios to reach: (ours, variant of ours) -> at most this many of the peer's seconds for a sample.
    """

    base: str
    resolution: int
    stored: int
    both: str
    variants: dict[str, str]
    goals: dict[tuple[str, str], float]
    steps: int
    warmup: int = 3
    pairs: int = 256

    @property
    def script(self) -> str:
        return "train_instruct_pix2pix_sdxl.py" if self.base == "sdxl" else "train_instruct_pix2pix.py"


def _gpu_cell(base: str, resolution: int, batch: int, goals: dict, peer: str = "", **more: object) -> Cell:
    """Default: bf16, batch 4, recomputed blocks. Tuned: a larger batch, workers, TF32, and nothing recomputed."""
    ours = f"--train_batch_size={batch}"
    variants = {
        "peer": "--train_batch_size=4 --gradient_checkpointing",
        "peer_tuned": f"{ours} {TUNED} {peer}",
        "ours": ours,
        "ours_cached": f"{ours} {CACHED}",
        "ours_no_graphs": f"{ours} {CACHED} --cuda_graphs=no",
    }
    return Cell(base, resolution, 512, "--mixed_precision=bf16 --use_ema", variants, goals, **more)


GPU_GOALS = {("peer", "ours_cached"): 1 / 6, ("peer_tuned", "ours_cached"): 1 / 1.7}
CPU_GOALS = {("peer", "ours"): 0.85, ("peer", "ours_cached"): 0.65}
SIDES = {"peer": "", "ours": "", "ours_cached": CACHED}
CELLS = {
    "toy": Cell("toy", 64, 512, "--train_batch_size=4 --use_ema", SIDES, CPU_GOALS, 60, warmup=5),
    "depth": Cell("deep", 64, 512, "--train_batch_size=1 --use_ema", SIDES, {("peer", "ours_cached"): 0.6}, 20),
    "sd15": Cell("sd15", 128, 512, "--train_batch_size=1 --use_ema", SIDES, CPU_GOALS, 3, warmup=1, pairs=16),
    "sd15-256": _gpu_cell("sd15", 256, 32, GPU_GOALS, steps=20, warmup=5),
    "sd15-512": _gpu_cell("sd15", 512, 16, GPU_GOALS, steps=15, warmup=5),
    "sdxl-1024": Cell(
        "sdxl",
        1024,
        1024,
        "--mixed_precision=bf16 --gradient_checkpointing",
        {  # the example encodes all images of a batch at once: 21 GB for a batch of 1 in float32, 86 GB for 4
            "peer": "--train_batch_size=1",
            "peer_tuned": f"--train_batch_size=2 {TUNED} --vae_precision=bf16",
            "ours": "--train_batch_size=4 --vae_precision=bf16",
            "ours_cached": f"--train_batch_size=4 {CACHED}",
        },
        {("peer", "ours_cached"): 1 / 1.8, ("peer_tuned", "ours_cached"): 1 / 1.4},
        steps=6,
        warmup=3,
        pairs=48,
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder of diffusers' examples/instruct_pix2pix")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["toy", "depth"], help="what to measure")
    parser.add_argument("--variants", nargs="+", help="measure only these")
    parser.add_argument("--rounds", type=int, default=1, help="the median of so many runs")
    parser.add_argument("--work", type=Path, default=Path("/tmp/training-benchmark"), help="folder of models and data")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/training.json")
    args = parser.parse_args(argv)
    args.peer = args.peer.resolve()
    for name in args.cells:
        measured = measure(args, name, args.variants or list(CELLS[name].variants))
        print_table(name, CELLS[name], measured)


def measure(args: argparse.Namespace, name: str, variants: list[str]) -> dict[str, dict[str, float]]:
    """The medians of every variant over the rounds; what is measured so far is written after every run."""
    cell, measured = CELLS[name], {}
    make = "import sys; from pathlib import Path; from benchmarks.training_bases import *; work = Path(sys.argv[1]); "
    make += f"make_base({cell.base!r}, work); make_pairs(work, {cell.pairs}, {cell.stored})"
    subprocess.run([sys.executable, "-c", make, str(args.work)], cwd=REPOSITORY, check=True)
    runs = {variant: [] for variant in variants}
    for variant in variants * args.rounds:
        if values := run_variant(args, cell, variant):
            runs[variant].append(values)
            found = runs[variant]
            measured[variant] = {key: statistics.median(run[key] for run in found) for key in found[0]}
            write_results(args.results, name, cell, measured)
    return measured


def run_variant(args: argparse.Namespace, cell: Cell, name: str) -> dict[str, float] | None:
    """Seconds for a step and a sample, peak memory, and seconds to the first step; None where the run fails."""
    flags = f"{cell.both} {cell.variants[name]}"
    output, result = args.work / f"out-{name}", args.work / "result.json"
    shutil.rmtree(output, ignore_errors=True)
    result.unlink(missing_ok=True)
    is_peer = name.startswith("peer")
    base = REPOSITORY / "assets/toy-sd" if cell.base == "toy" else args.work / cell.base
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/timed_script.py"),
        str(result),
        str(cell.warmup),
        str(cell.steps),
        str((args.peer if is_peer else REPOSITORY) / cell.script),
        f"--pretrained_model_name_or_path={base}",
        f"--dataset_name={args.work / f'pairs-{cell.stored}-{cell.pairs}'}",
        "--original_image_column=original_image",
        "--edit_prompt_column=edit_prompt",
        "--edited_image_column=edited_image",
        f"--output_dir={output}",
        f"--resolution={cell.resolution}",
        f"--max_train_steps={cell.warmup + cell.steps + 2}",
        "--seed=0",
        "--lr_warmup_steps=0",
        *flags.split(),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"IS_PEER": "1"} if is_peer else {})
    print(f"{name}: {flags}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with (args.work / f"{name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=args.work).returncode
    if code or not result.exists():
        print(f"{name} failed:\n{(args.work / f'{name}.log').read_text()[-3000:]}", file=sys.stderr, flush=True)
        return None
    batch = int(flags.split("--train_batch_size=")[1].split()[0])
    values = json.loads(result.read_text())
    values |= {"sample_s": values["step_s"] / batch, "samples_per_s": batch / values["step_s"]}
    print(f"{name}: {values} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return values


def write_results(path: Path, name: str, cell: Cell, measured: dict[str, dict[str, float]]) -> None:
    """Replace the cell's rows in the results file. The ratio and the goal are of the tuned peer, where there is one."""
    base = next((peer for peer in ("peer_tuned", "peer") if peer in measured), None)
    rows = [
        {
            "metric": "seconds for a sample",
            "peer": round(measured["peer"]["sample_s"], 5) if "peer" in measured else None,
            "peer_tuned": round(measured["peer_tuned"]["sample_s"], 5) if "peer_tuned" in measured else None,
            "ours": round(measured[variant]["sample_s"], 5),
            "variant": variant,
            "ratio": round(measured[variant]["sample_s"] / measured[base]["sample_s"], 3) if base else None,
            "goal": round(cell.goals[base, variant], 3) if (base, variant) in cell.goals else None,
            "limit": None,
            "details": {key: round(value, 5) for key, value in measured[variant].items()},
        }
        for variant in measured
    ]
    add_results(path, name, rows)


def print_table(name: str, cell: Cell, measured: dict[str, dict[str, float]]) -> None:
    peers = [peer for peer in ("peer", "peer_tuned") if peer in measured]
    print(f"\n{name}: {cell.both}\n")
    heads = ["samples/s", "s/step", "host ms/step", "peak GB", "operations", "syncs", "start s"]
    print(f"| | {' | '.join(heads)} | {' | '.join(f'of {peer}' for peer in peers)} |")
    print("|---" * (1 + len(heads) + len(peers)) + "|")
    for variant, values in measured.items():
        cells = [
            f"{values['samples_per_s']:.2f}",
            f"{values['step_s']:.4f}",
            f"{1000 * values['host_s']:.1f}",
            f"{values.get('peak_gb', 0):.1f}",
            f"{values.get('operations', 0):.0f}",
            f"{values.get('syncs', 0):.0f}",
            f"{values['first_step_s']:.1f}",
            *(f"{values['sample_s'] / measured[peer]['sample_s']:.3f}" for peer in peers),
        ]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
