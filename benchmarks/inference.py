"""Compare diffusers' InstructPix2Pix pipeline with ours: same weights, seeds, steps and settings, in one run.

    python benchmarks/inference.py                        # a reduced Stable Diffusion 1.5; on a GPU the real shapes
    python benchmarks/inference.py --model demo-output/editor --resolution 64

The weights are random unless a model is given, because they do not change the time of an edit. Each setting runs
alternately with both, `--repeats` times after one warm-up, and a Markdown table compares the medians: wall time and, on
the CPU, process time, which depends less on the other programs of the machine.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("torchao").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from tests.tiny import make_tokenizer  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.editing.edit_images import SamplingSettings, edit_pixels  # noqa: E402
from utils.editing.loading import load_editor  # noqa: E402
from utils.editing.schedulers import choose_scheduler  # noqa: E402

PROMPT = "make it winter"
WIDTHS = {"reduced": (64, 128, 256, 256), "sd15": (320, 640, 1280, 1280)}
VAE_WIDTHS = {"reduced": (16, 32, 64, 64), "sd15": (128, 256, 512, 512)}
RESOLUTION = {"reduced": 128, "sd15": 512}
TEXT = {"reduced": dict(num_hidden_layers=2, intermediate_size=768), "sd15": dict(num_hidden_layers=12)}


class Case(NamedTuple):
    steps: int
    scheduler: str
    guidance_scale: float
    image_guidance_scale: float


CASES = (
    Case(20, "ddim", 7.5, 1.5),
    Case(20, "ddim", 7.5, 1.0),
    Case(20, "ddim", 1.5, 1.5),
    Case(4, "lcm", 2.0, 1.5),
    Case(4, "lcm", 2.0, 1.0),
    Case(4, "lcm", 1.0, 1.0),
)


class Measurement(NamedTuple):
    """seconds: wall time; computing: process time on the CPU; rows: of the UNet in one edit."""

    pixels: torch.Tensor
    seconds: float
    computing: float
    rows: int


def make_pipeline(size: str, device: str, dtype: torch.dtype) -> StableDiffusionInstructPix2PixPipeline:
    """Stable Diffusion 1.5 with random weights: "sd15" has the real shapes, "reduced" fewer channels."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    shape = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072) | TEXT[size]
    config = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    unet = UNet2DConditionModel(
        in_channels=8,
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=WIDTHS[size],
        sample_size=RESOLUTION[size] // 8,
    )
    vae = AutoencoderKL(
        block_out_channels=VAE_WIDTHS[size],
        layers_per_block=2,
        norm_num_groups=16 if size == "reduced" else 32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device, dtype)


def measure(pipeline: Any, edit: Callable[[], torch.Tensor]) -> Measurement:
    rows = []
    hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    _wait(pipeline.device)
    started, computing = time.perf_counter(), time.process_time()
    try:
        pixels = edit()
        _wait(pipeline.device)
    finally:
        hook.remove()
    return Measurement(pixels, time.perf_counter() - started, time.process_time() - computing, sum(rows))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def edit_by_diffusers(pipeline: Any, image: Image.Image, case: Case) -> torch.Tensor:
    """(3, H, W) in [0, 1]"""
    size = dict(height=image.height, width=image.width) if hasattr(pipeline, "text_encoder_2") else {}
    edited = pipeline(
        PROMPT,
        image=image,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        output_type="np",
        image_guidance_scale=case.image_guidance_scale,
        generator=torch.Generator().manual_seed(0),
        **size,
    ).images
    return torch.from_numpy(edited)[0].permute(2, 0, 1)


def edit_by_ours(pipeline: Any, image: Image.Image, case: Case) -> torch.Tensor:
    return edit_pixels(
        pipeline,
        [image],
        [PROMPT],
        [0],
        SamplingSettings(
            num_inference_steps=case.steps,
            guidance_scale=case.guidance_scale,
            image_guidance_scale=case.image_guidance_scale,
        ),
    )[0][0]


def compare(pipeline: Any, image: Image.Image, case: Case, repeats: int) -> dict[str, Any]:
    """Medians of both pipelines over interleaved runs, each pipeline first in every second run."""
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, case.scheduler)
    ways = {"diffusers": edit_by_diffusers, "ours": edit_by_ours}
    runs: dict[str, list[Measurement]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in sorted(ways, reverse=repeat % 2 == 1):
            runs[name].append(measure(pipeline, lambda name=name: ways[name](pipeline, image, case)))
    figures = {"case": case._asdict(), "repeats": repeats}
    for name, measured in runs.items():
        counted = measured[1:]  # the first is the warm-up
        figures[name] = {
            "seconds": statistics.median(run.seconds for run in counted),
            "computing": statistics.median(run.computing for run in counted),
            "rows": counted[0].rows,
        }
    ours, stock = runs["ours"][0].pixels, runs["diffusers"][0].pixels
    figures["max_difference"] = float((ours - stock).abs().max())
    return figures


def format_table(results: list[dict[str, Any]], on_gpu: bool) -> str:
    lines = [
        "| steps | scheduler | text, image scale | UNet rows, diffusers | ours | s, diffusers | s, ours | times faster "
        + ("| largest difference |" if on_gpu else "| by computing time | largest difference |"),
        "|---" * (9 if on_gpu else 10) + "|",
    ]
    for result in results:
        case, stock, ours = Case(**result["case"]), result["diffusers"], result["ours"]
        cells = [
            case.steps,
            case.scheduler,
            f"{case.guidance_scale:g}, {case.image_guidance_scale:g}",
            stock["rows"],
            ours["rows"],
            f"{stock['seconds']:.2f}",
            f"{ours['seconds']:.2f}",
            f"{stock['seconds'] / ours['seconds']:.2f}",
        ]
        cells += [] if on_gpu else [f"{stock['computing'] / ours['computing']:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{result['max_difference']:.1e}"])) + " |")
    return "\n".join(lines)


def describe_machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = next((line.split(":")[1].strip() for line in _read_cpuinfo() if line.startswith("model name")), "CPU")
    return f"{model} ({platform.machine()}), {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def _read_cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(argv: list[str] | None = None) -> int:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an editor to measure (default: random weights)")
    parser.add_argument(
        "--size", choices=WIDTHS, help="size of the random model (default: sd15 on a GPU, else reduced)"
    )
    parser.add_argument("--resolution", type=int, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each setting (default 3)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
    size = args.size or ("sd15" if on_gpu else "reduced")
    resolution = args.resolution or (512 if args.model else RESOLUTION[size])
    if args.model:
        pipeline = load_editor(args.model, device=device, dtype=dtype)
    else:
        pipeline = make_pipeline(size, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
    own, results = pipeline.scheduler, []
    for case in CASES:
        pipeline.scheduler = own
        results.append(compare(pipeline, Image.fromarray(pixels), case, args.repeats))
        print(f"{case}: {results[-1]['diffusers']['seconds'] / results[-1]['ours']['seconds']:.2f}", file=sys.stderr)
    what = Path(args.model).name if args.model else size
    print(f"\n{what}, {resolution} pixels, {str(dtype).removeprefix('torch.')}, {describe_machine(device)}\n")
    print(format_table(results, on_gpu))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
