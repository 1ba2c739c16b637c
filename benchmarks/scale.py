"""What it takes to make the original's data anew: 450,000 captions and their pairs. Prints what docs/scale.md has.

    python benchmarks/scale.py
    python benchmarks/scale.py --measure                          # times UNets of the real shapes on this machine
    python benchmarks/scale.py --tokens_per_second 2500 --price_per_hour 2.5

Operations are counted on the real shapes, without weights. Without --measure they are divided by what the GPU does at
the share of its peak that it is assumed to reach; with it, by what this machine does in a UNet of random weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

from benchmarks.memory_models import PROMPT_TOKENS, UNETS, VAE  # noqa: E402
from data_preparation.captions.prompts import Question, chat_messages  # noqa: E402

CAPTIONS, RESOLUTION = 450_000, 512
PAIRS_PER_CAPTION = 4  # kept at most; the authors' set kept 313,010 of 451,990 after taking one of each
CHARACTERS_PER_TOKEN = 4
TRIPLE_TOKENS = 45  # of an answer
# The published set: 63 GB for 313,010 pairs of 512 pixels in JPEG.
BYTES_PER_PAIR = 63e9 / 313_010


@dataclass(frozen=True)
class Way:
    """Phase two in one way. rows: of the UNet for a candidate; candidates: at most, for each caption."""

    name: str
    unet: str
    rows: int
    candidates: int


WAYS = (
    Way("`--preset ip2p`: SD 1.5, 100 steps, guidance", "sd15", 100 * 4, 100),
    Way("`--preset fast`: SDXL-Turbo, 4 steps", "sdxl", 4 * 2, 16),
    Way("fast settings on SD 1.5 + LCM-LoRA", "sd15", 4 * 2, 16),
)


@cache
def unet_operations(family: str) -> float:
    """Floating-point operations of one row of a text-to-image UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNETS[family] | {"in_channels": 4})
        return _count(lambda: unet(**unet_inputs(unet, 1, "meta", torch.float32)))


def unet_inputs(unet: torch.nn.Module, batch: int, device: str, dtype: torch.dtype) -> dict:
    """Rows of the real sizes for a UNet of either family."""
    side, place = RESOLUTION // 8, dict(device=device, dtype=dtype)
    inputs = dict(
        sample=torch.zeros(batch, 4, side, side, **place),
        timestep=torch.zeros(batch, device=device),
        encoder_hidden_states=torch.zeros(batch, PROMPT_TOKENS, unet.config.cross_attention_dim, **place),
    )
    if unet.config.addition_embed_type == "text_time":
        pooled, time_ids = torch.zeros(batch, 1280, **place), torch.zeros(batch, 6, **place)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return inputs


@cache
def decode_operations() -> float:
    """Of decoding one picture."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae, side = AutoencoderKL(**VAE), RESOLUTION // 8
        return _count(lambda: vae.decode(torch.zeros(1, 4, side, side)))


@cache
def clip_operations() -> float:
    """Of CLIP ViT-L/14 on one picture."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
        return _count(lambda: model(torch.zeros(1, 3, 224, 224)))


@torch.no_grad()
def _count(run: object) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def seconds_per_caption(way: Way, args: argparse.Namespace) -> float:
    """On one GPU, when every candidate is sampled."""
    return operations_per_caption(way) / (
        args.speeds[way.unet] if args.measure else args.peak_tflops * 1e12 * args.utilisation
    )


def operations_per_caption(way: Way) -> float:
    """Of the UNet, the decoder and CLIP, when every candidate is sampled."""
    pictures = 2 * way.candidates * (decode_operations() + clip_operations())
    return way.rows * way.candidates * unet_operations(way.unet) + pictures


@torch.no_grad()
def measure_speed(family: str) -> float:
    """Operations a second of a UNet of random weights: 32 rows in 16 bits on a GPU, else one row in 32 bits."""
    from diffusers import UNet2DConditionModel

    device, dtype, batch = ("cuda", torch.float16, 32) if torch.cuda.is_available() else ("cpu", torch.float32, 1)
    unet = UNet2DConditionModel.from_config(UNETS[family] | {"in_channels": 4}).eval().to(device, dtype)
    inputs = unet_inputs(unet, batch, device, dtype)
    seconds = []
    for _ in range(5 if device == "cuda" else 2):  # the first one warms up
        started = time.perf_counter()
        unet(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    print(f"{family} on {device}: {batch / min(seconds[1:]):.3g} rows a second", file=sys.stderr)
    return batch * unet_operations(family) / min(seconds[1:])


def prompt_tokens() -> float:
    """Tokens of a question with its worked examples, about."""
    messages = chat_messages(Question("a photograph of a red fox that sleeps in the snow", 0), 8)
    return sum(len(message["content"]) for message in messages) / CHARACTERS_PER_TOKEN + 8 * len(messages)


def print_captions(args: argparse.Namespace) -> None:
    seconds = CAPTIONS * TRIPLE_TOKENS / args.tokens_per_second
    print(
        f"Captions: {prompt_tokens():.0f} tokens asked and {TRIPLE_TOKENS} answered for each, "
        f"{CAPTIONS * (prompt_tokens() + TRIPLE_TOKENS) / 1e6:,.0f} million in all. On one GPU that answers "
        f"{args.tokens_per_second:,.0f} tokens a second: {seconds / 3600:,.1f} hours, "
        f"${seconds / 3600 * args.price_per_hour:,.0f}. At a service that takes ${args.price_in:g} and "
        f"${args.price_out:g} for a million: "
        f"${CAPTIONS * (prompt_tokens() * args.price_in + TRIPLE_TOKENS * args.price_out) / 1e6:,.0f}.\n"
    )


def print_pairs(args: argparse.Namespace) -> None:
    print("| way | UNet rows a caption | TFLOP a caption | s a caption | GPU hours | on 8 GPUs | on 64 | cost |")
    print("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        rows, work = way.rows * way.candidates, operations_per_caption(way) / 1e12
        seconds = seconds_per_caption(way, args)
        hours = CAPTIONS * seconds / 3600
        print(
            f"| {way.name} | {rows:,} | {work:,.0f} | {seconds:,.2f} | {hours:,.0f} | {hours / 8 / 24:,.1f} days | "
            f"{hours / 64 / 24:,.2f} days | ${hours * args.price_per_hour:,.0f} |"
        )
    for kept in (1, PAIRS_PER_CAPTION):
        size = CAPTIONS * kept * BYTES_PER_PAIR / 1e9
        print(f"\n{kept} pair{'s' * (kept > 1)} of each caption: {CAPTIONS * kept:,} rows, {size:,.0f} GB", end="")
    print()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peak_tflops", type=float, default=312, help="of the GPU in 16 bits (default 312, an A100)")
    add("--utilisation", type=float, default=0.25, help="share of the peak that is reached (default 0.25)")
    add("--measure", action="store_true", help="time UNets of the real shapes here, in the place of the two")
    add("--tokens_per_second", type=float, default=2000, help="answers of a 7B model on one GPU (default 2000)")
    add("--price_per_hour", type=float, default=2.0, help="of a GPU in dollars (default 2)")
    add("--price_in", type=float, default=0.15, help="of a million tokens asked (default 0.15)")
    add("--price_out", type=float, default=0.6, help="of a million tokens answered (default 0.6)")
    args = parser.parse_args(argv)
    families = {way.unet for way in WAYS} if torch.cuda.is_available() else {"sd15"}
    args.speeds = {family: measure_speed(family) for family in sorted(families)} if args.measure else {}
    args.speeds.setdefault("sdxl", args.speeds.get("sd15"))  # a CPU's memory is spared the second one
    print(
        f"One row at {RESOLUTION} pixels: SD 1.5 {unet_operations('sd15') / 1e12:.3f} TFLOP, SDXL "
        f"{unet_operations('sdxl') / 1e12:.3f}; decoding a picture {decode_operations() / 1e12:.2f}, CLIP "
        f"{clip_operations() / 1e12:.2f}.\n"
    )
    print_captions(args)
    print_pairs(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
