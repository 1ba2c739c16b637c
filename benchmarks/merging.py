"""Memory and time of merging three UNets of real sizes: adapt_distill.py compared with loading whole models.

    python benchmarks/merging.py --family sd15
    python benchmarks/merging.py --family sdxl --repeats 1

The files have random values in the shapes of the real UNets and are removed afterwards; SD 1.5 needs 7 GB of disk
space, SDXL 21 GB. Each method runs in its own process. Memory is counted without the imports: `anonymous` is memory
that could only be swapped out, `resident` includes mapped pages of files, which the system can drop.

    naive   three `UNet2DConditionModel.from_pretrained`, a loop over the state dicts, `save_pretrained`
    mmap    three memory-mapped `safetensors.torch.load_file`, a loop, `save_file`
    ours    utils/merging/editor_writer.py: reads, adds and writes a few rows at a time
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from utils.cli import FlagParser  # noqa: E402
from utils.merging.editor_writer import write_unet
from utils.merging.merge import MergeOptions, MergeReport
from utils.merging.recipe import MergeRecipe, open_recipe
from utils.merging.weight_sources import WeightSource
from utils.runtime import DTYPES
from utils.weight_files import split_rows, write_safetensors

# The configurations of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 where they differ from the defaults.
CONFIGS = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    },
    "tiny": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 32,
    },
}
FILE = "diffusion_pytorch_model.safetensors"
WEIGHT = 0.5


def make_files(folder: Path, family: str, dtype: torch.dtype) -> None:
    """Write editor/, distilled/ and base/ with a UNet each."""
    for seed, (name, channels) in enumerate((("editor", 8), ("distilled", 4), ("base", 4))):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config({**CONFIGS[family], "in_channels": channels})
        shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
        place = folder / name / "unet"
        place.mkdir(parents=True)
        unet.save_config(place)
        values = torch.randn(1 << 21, generator=torch.Generator().manual_seed(seed)).mul_(0.03).to(dtype)
        write_safetensors(place / FILE, {key: (shape, dtype) for key, shape in shapes.items()}, tile(shapes, values))
    (folder / "editor" / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    (folder / "editor" / "scheduler").mkdir()
    (folder / "editor" / "scheduler" / "scheduler_config.json").write_text("{}")


def tile(shapes: dict[str, tuple[int, ...]], values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Values for tensors of these shapes, a few rows at a time."""
    for name, shape in shapes.items():
        for rows in split_rows(shape, len(values)):
            count = len(range(*rows.indices(shape[0])))
            piece = torch.Size(shape[1:]).numel() * count
            yield name, values.repeat(-(-piece // len(values)))[:piece].view(count, *shape[1:])


def merge_naive(folder: Path, dtype: torch.dtype) -> None:
    models = [
        UNet2DConditionModel.from_pretrained(folder / name, subfolder="unet", torch_dtype=dtype)
        for name in ("editor", "distilled", "base")
    ]
    editor, distilled, base = (model.state_dict() for model in models)
    add_all(editor, distilled, base)
    models[0].save_pretrained(folder / "naive", max_shard_size="100GB")


def merge_mapped(folder: Path, dtype: torch.dtype) -> None:
    editor, distilled, base = (load_file(folder / name / "unet" / FILE) for name in ("editor", "distilled", "base"))
    add_all(editor, distilled, base)
    (folder / "mmap").mkdir()
    save_file({name: value.to(dtype) for name, value in editor.items()}, folder / "mmap" / FILE)


def add_all(editor: dict, distilled: dict, base: dict) -> None:
    """The merge in float32, in place."""
    for name, value in editor.items():
        delta = (distilled[name].float() - base[name].float()) * WEIGHT
        target = value[:, :4] if name == "conv_in.weight" else value
        target.copy_(target.float() + delta)


def merge_ours(folder: Path, dtype: torch.dtype) -> None:
    recipe = MergeRecipe(
        WeightSource("--model", str(folder / "editor")),
        folder,
        {role: WeightSource(f"--{role}", str(folder / role)) for role in ("distilled", "base")},
        MergeOptions(WEIGHT),
        dtype=next(name for name, kind in DTYPES.items() if kind == dtype),
    )
    (folder / "ours").mkdir()
    write_unet(folder / "ours" / FILE, recipe, open_recipe(recipe), MergeReport())


METHODS: dict[str, Callable[[Path, torch.dtype], None]] = {
    "naive": merge_naive,
    "mmap": merge_mapped,
    "ours": merge_ours,
}


def measure(method: str, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, and MiB in addition to the interpreter and its imports."""
    before, is_done = read_memory(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        while not is_done.wait(0.005):
            peak.update({name: max(value, peak[name]) for name, value in read_memory().items()})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    METHODS[method](folder, dtype)
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    return {"seconds": seconds} | {name: (peak[name] - before[name]) / 2**20 for name in before}


def read_memory() -> dict[str, int]:
    """Bytes of this process in memory (Linux): those without a file behind them, and all."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anonymous", "RssAnon"), ("resident", "VmRSS"))}


def have_same_values(folder: Path, methods: list[str]) -> bool:
    """Whether all methods wrote the same values, compared tensor by tensor."""
    from safetensors import safe_open

    with safe_open(folder / "ours" / FILE, "pt") as ours:
        for method in methods:
            with safe_open(folder / method / FILE, "pt") as other:
                if not all(torch.equal(ours.get_tensor(n), other.get_tensor(n)) for n in ours.keys()):  # noqa: SIM118
                    return False
    return True


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=CONFIGS, default="sd15")
    parser.add_argument("--ways", dest="methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="dtype of the sources and of the result")
    parser.add_argument(
        "--repeats", type=int, default=2, help="number of runs, of which the fastest counts (default: 2)"
    )
    parser.add_argument("--folder", help="folder for the files (default: the temporary folder of the system)")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)  # in the process of one method
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure, Path(flags.folder), DTYPES[flags.dtype])))
        return
    with tempfile.TemporaryDirectory(dir=flags.folder) as scratch:
        folder = Path(scratch)
        make_files(folder, flags.family, DTYPES[flags.dtype])
        results: dict[str, dict] = {}
        for method in flags.methods * flags.repeats:
            shutil.rmtree(folder / method, ignore_errors=True)
            os.sync()  # so that earlier writes do not count
            command = [sys.executable, __file__, "--measure", method, "--folder", scratch, "--dtype", flags.dtype]
            result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
            best = results.setdefault(method, result)
            results[method] = {"seconds": min(best["seconds"], result["seconds"])} | {
                name: max(best[name], result[name]) for name in ("anonymous", "resident")
            }
        equal = have_same_values(folder, flags.methods) if "ours" in flags.methods else None
    print(
        f"{flags.family}, three {flags.dtype} files; {platform.machine()}, {os.cpu_count()} CPUs, "
        f"torch {torch.__version__}"
    )
    for method, result in results.items():
        print(
            f"{method:<6} {result['seconds']:7.1f} s  anonymous {result['anonymous']:7.0f} MiB  resident "
            f"{result['resident']:7.0f} MiB"
        )
    for method in set(flags.methods) - {"ours"} if "ours" in flags.methods else ():
        ours, other = results["ours"], results[method]
        print(f"ours / {method}: " + ", ".join(f"{name} {ours[name] / max(other[name], 1e-9):.3f}" for name in ours))
    print(f"the same values: {equal}")


if __name__ == "__main__":
    main()
