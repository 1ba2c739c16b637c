"""Estimates the cost of generating a dataset like that of InstructPix2Pix: 450,000 captions and their pairs.

    python benchmarks/scale.py
    python benchmarks/scale.py --measure                          # times UNets of the real sizes on this machine
    python benchmarks/scale.py --tokens_per_second 2500 --price_per_hour 2.5

FLOPs are counted for the real model sizes, without weights. They are divided by an assumed share of the peak of a GPU,
or with --measure by the speed of a UNet with random weights on this machine. docs/scaling.md has the output.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import FlagParser  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

from benchmarks.memory_models import PROMPT_TOKENS, UNETS, VAE  # noqa: E402
from data_preparation.captions.prompts import Question, chat_messages  # noqa: E402

CAPTIONS, RESOLUTION = 450_000, 512
PAIRS_PER_CAPTION = 4  # at most; the published dataset has 313,010 pairs of 451,990 captions, one of each
CHARACTERS_PER_TOKEN = 4
TRIPLE_TOKENS = 45  # of a completion
# The published dataset: 63 GB for 313,010 pairs of 512 pixels in JPEG.
BYTES_PER_PAIR = 63e9 / 313_010


@dataclass(frozen=True)
class PairMethod:
    """A way to generate pairs. rows: UNet rows per candidate; candidates: per caption, at most."""

    name: str
    unet: str
    rows: int
    candidates: int


METHODS = (
    PairMethod("`--preset ip2p`: SD 1.5, 100 steps, guidance", "sd15", 100 * 4, 100),
    PairMethod("`--preset fast`: SDXL-Turbo, 4 steps", "sdxl", 4 * 2, 16),
    PairMethod("fast settings on SD 1.5 + LCM-LoRA", "sd15", 4 * 2, 16),
)


@cache
def unet_flops(family: str) -> float:
    """FLOPs of one row of a text-to-image UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNETS[family] | {"in_channels": 4})
        return _count_flops(lambda: unet(**unet_inputs(unet, 1, "meta", torch.float32)))


def unet_inputs(unet: torch.nn.Module, batch: int, device: str, dtype: torch.dtype) -> dict:
    """Inputs of the real size for a UNet of either family."""
    side, options = RESOLUTION // 8, dict(device=device, dtype=dtype)
    inputs = dict(
        sample=torch.zeros(batch, 4, side, side, **options),
        timestep=torch.zeros(batch, device=device),
        encoder_hidden_states=torch.zeros(batch, PROMPT_TOKENS, unet.config.cross_attention_dim, **options),
    )
    if unet.config.addition_embed_type == "text_time":
        pooled, time_ids = torch.zeros(batch, 1280, **options), torch.zeros(batch, 6, **options)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return inputs


@cache
def decoder_flops() -> float:
    """FLOPs of decoding one image."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae, side = AutoencoderKL(**VAE), RESOLUTION // 8
        return _count_flops(lambda: vae.decode(torch.zeros(1, 4, side, side)))


@cache
def clip_flops() -> float:
    """FLOPs of CLIP ViT-L/14 for one image."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
        return _count_flops(lambda: model(torch.zeros(1, 3, 224, 224)))


@torch.no_grad()
def _count_flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def seconds_per_caption(method: PairMethod, args: argparse.Namespace) -> float:
    """On one GPU, without early stop."""
    return flops_per_caption(method) / (
        args.speeds[method.unet] if args.measure else args.peak_tflops * 1e12 * args.utilisation
    )


def flops_per_caption(method: PairMethod) -> float:
    """FLOPs of the UNet, the decoder and CLIP, without early stop."""
    images = 2 * method.candidates * (decoder_flops() + clip_flops())
    return method.rows * method.candidates * unet_flops(method.unet) + images


@torch.no_grad()
def measure_speed(family: str) -> float:
    """FLOPs per second of a UNet with random weights: 32 rows in float16 on a GPU, else one row in float32."""
    from diffusers import UNet2DConditionModel

    device, dtype, batch = ("cuda", torch.float16, 32) if torch.cuda.is_available() else ("cpu", torch.float32, 1)
    unet = UNet2DConditionModel.from_config(UNETS[family] | {"in_channels": 4}).eval().to(device, dtype)
    inputs = unet_inputs(unet, batch, device, dtype)
    seconds = []
    for _ in range(5 if device == "cuda" else 2):  # the first one is the warm-up
        started = time.perf_counter()
        unet(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    print(f"{family} on {device}: {batch / min(seconds[1:]):.3g} rows per second", file=sys.stderr)
    return batch * unet_flops(family) / min(seconds[1:])


def prompt_tokens() -> float:
    """Approximate tokens of a prompt with its examples."""
    messages = chat_messages(Question("a photograph of a red fox that sleeps in the snow", 0), 8)
    return sum(len(message["content"]) for message in messages) / CHARACTERS_PER_TOKEN + 8 * len(messages)


def print_captions(args: argparse.Namespace) -> None:
    seconds = CAPTIONS * TRIPLE_TOKENS / args.tokens_per_second
    print(
        f"Captions: {prompt_tokens():.0f} prompt tokens and {TRIPLE_TOKENS} completion tokens each, "
        f"{CAPTIONS * (prompt_tokens() + TRIPLE_TOKENS) / 1e6:,.0f} million in total. On one GPU that generates "
        f"{args.tokens_per_second:,.0f} tokens per second: {seconds / 3600:,.1f} hours, "
        f"${seconds / 3600 * args.price_per_hour:,.0f}. With an API at ${args.price_in:g} and "
        f"${args.price_out:g} per million tokens: "
        f"${CAPTIONS * (prompt_tokens() * args.price_in + TRIPLE_TOKENS * args.price_out) / 1e6:,.0f}.\n"
    )


def print_pairs(args: argparse.Namespace) -> None:
    print("| method | UNet rows/caption | TFLOP/caption | s/caption | GPU hours | 8 GPUs | 64 GPUs | cost |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        rows, work = method.rows * method.candidates, flops_per_caption(method) / 1e12
        seconds = seconds_per_caption(method, args)
        hours = CAPTIONS * seconds / 3600
        print(
            f"| {method.name} | {rows:,} | {work:,.0f} | {seconds:,.2f} | {hours:,.0f} | {hours / 8 / 24:,.1f} days | "
            f"{hours / 64 / 24:,.2f} days | ${hours * args.price_per_hour:,.0f} |"
        )
    for kept in (1, PAIRS_PER_CAPTION):
        size = CAPTIONS * kept * BYTES_PER_PAIR / 1e9
        print(f"\n{kept} pair{'s' * (kept > 1)} per caption: {CAPTIONS * kept:,} rows, {size:,.0f} GB", end="")
    print()


def main(argv: list[str] | None = None) -> int:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peak_tflops", type=float, default=312, help="peak of the GPU in float16 (default 312, an A100)")
    add("--utilisation", type=float, default=0.25, help="share of the peak in practice (default 0.25)")
    add("--measure", action="store_true", help="time UNets of the real sizes instead")
    add("--tokens_per_second", type=float, default=2000, help="of a 7B model on one GPU (default 2000)")
    add("--price_per_hour", type=float, default=2.0, help="price of a GPU in dollars (default 2)")
    add("--price_in", type=float, default=0.15, help="price of a million prompt tokens (default 0.15)")
    add("--price_out", type=float, default=0.6, help="price of a million completion tokens (default 0.6)")
    args = parser.parse_args(argv)
    families = {method.unet for method in METHODS} if torch.cuda.is_available() else {"sd15"}
    args.speeds = {family: measure_speed(family) for family in sorted(families)} if args.measure else {}
    args.speeds.setdefault("sdxl", args.speeds.get("sd15"))  # to save memory, a CPU does not time SDXL
    print(
        f"One UNet row at {RESOLUTION} pixels: SD 1.5 {unet_flops('sd15') / 1e12:.3f} TFLOP, SDXL "
        f"{unet_flops('sdxl') / 1e12:.3f}; decoding an image {decoder_flops() / 1e12:.2f}, CLIP "
        f"{clip_flops() / 1e12:.2f}.\n"
    )
    print_captions(args)
    print_pairs(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
