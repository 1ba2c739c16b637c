"""Measures how fast training pairs are decoded and resized, beside what diffusers' example does with them.

    python benchmarks/loader.py
    python benchmarks/loader.py --stored_size 1024 --resolution 512

Uses one thread, and counts the CPU time of the process. A pair starts as two JPEG files in memory and ends as arrays of
the training size. diffusers' examples/instruct_pix2pix decodes both images whole, resizes them with Pillow, and makes
float32 tensors in [-1, 1]; ours stay uint8 until they are on the device. Prints Markdown.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from utils.cli import FlagParser  # noqa: E402
from utils.data.geometry import Geometry, prepare_pair  # noqa: E402
from utils.data.latent_cache import ROWS_PER_SHARD, CachedRows, LatentCache  # noqa: E402

PHOTOGRAPHS = ("astronaut.jpg", "raccoon.jpg", "coffee.jpg", "cat.jpg")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored_size", type=int, default=512, help="side of the stored images")
    parser.add_argument("--resolution", type=int, default=256, help="side of the training images")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of each measurement")
    return parser.parse_args(argv)


def read_photographs(size: int) -> list[bytes]:
    """JPEG files of that side with the quality of InstructPix2Pix's published dataset, about."""
    files = []
    for name in PHOTOGRAPHS:
        image = Image.open(REPOSITORY / "assets" / "photos" / name).convert("RGB")
        side, content = min(image.size), io.BytesIO()
        image.crop((0, 0, side, side)).resize((size, size)).save(content, "JPEG", quality=90)
        files.append(content.getvalue())
    return files


def as_diffusers(files: tuple[bytes, bytes], resolution: int) -> torch.Tensor:
    """What the example's dataset transform does, without its crop and its mirroring, which copy little."""
    images = [Image.open(io.BytesIO(file)).convert("RGB").resize((resolution, resolution)) for file in files]
    pixels = np.concatenate([np.array(image).transpose(2, 0, 1) for image in images])
    return 2 * (torch.tensor(pixels) / 255) - 1


def milliseconds(function: Callable[[int], object], seconds: float) -> float:
    """CPU time of one call, after a first round."""
    for index in range(8):
        function(index)
    count, started = 0, time.process_time()
    while (passed := time.process_time() - started) < seconds:
        function(count)
        count += 1
    return 1000 * passed / count


def write_cache(folder: Path, resolution: int) -> LatentCache:
    """A shard of a latent cache, as of Stable Diffusion 1.5."""
    side = resolution // 8
    rows, normal = range(ROWS_PER_SHARD), np.random.default_rng(0).standard_normal
    tensors = {str(row): normal((2, 12, side, side)).astype(np.float16) for row in rows}
    tensors["sizes"] = np.zeros((ROWS_PER_SHARD, 2, 3, 2), np.int64)
    metadata = {"rows": json.dumps(list(rows)), "bad_rows": "{}"}
    save_file(tensors, folder / "rows-00000-0.safetensors", metadata=metadata)
    return LatentCache([CachedRows(folder, np.array(rows))], Geometry(resolution, center_crop=True, random_flip=True))


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    torch.set_num_threads(1)
    files = read_photographs(args.stored_size)
    pairs = [(one, other) for one in files for other in files]
    geometry = Geometry(args.resolution)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder), args.resolution)
        times = {
            "diffusers' example": lambda index: as_diffusers(pairs[index % len(pairs)], args.resolution),
            "ours": lambda index: prepare_pair(*pairs[index % len(pairs)], geometry),
            "ours, `--cache_latents`": lambda index: cache.read(0, index % ROWS_PER_SHARD, index % 2 == 0),
        }
        measured = {name: milliseconds(function, args.seconds) for name, function in times.items()}
    print(f"JPEG pairs of {args.stored_size} pixels for a resolution of {args.resolution}, one core:\n")
    print("| | ms/pair | pairs/s | times as fast |\n|---|---|---|---|")
    peer = measured["diffusers' example"]
    for name, value in measured.items():
        print(f"| {name} | {value:.2f} | {1000 / value:,.0f} | {peer / value:.1f} |")


if __name__ == "__main__":
    main()
