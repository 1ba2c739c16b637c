"""Measures prompt embeddings beside diffusers' example, which encodes the prompts of every batch in the step.

    python benchmarks/prompts.py                    # toy-sd and SD 1.5's text encoder with random weights

`peer` encodes a batch in the training step. Ours encodes each distinct prompt once (`stored`) and then reads it, from
the device (`resident`) or from the memory-mapped files (`mapped`), until the embeddings are on the device. Prints
Markdown and adds to benchmarks/results/prompts.json.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from benchmarks.record import add_results  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.data import prompt_cache  # noqa: E402
from utils.models.conditioning import GPU_BATCH, PromptEncoder  # noqa: E402

TOKENIZER = REPOSITORY / "assets/toy-sd/tokenizer"


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=("toy", "sd15"), default=["toy", "sd15"], help="what encodes")
    parser.add_argument("--prompts", type=int, default=256, help="number of distinct prompts")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts of a training step")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/prompts.json")
    args = parser.parse_args(argv)
    for name in args.encoders:
        rates = measure(name, args.prompts, args.batch_size)
        ours = {variant: rate for variant, rate in rates.items() if variant != "peer"}
        rows = [
            {
                "metric": "prompts per second",
                "peer": round(rates["peer"], 1),
                "peer_tuned": None,
                "ours": round(rate, 1),
                "variant": variant,
                "ratio": round(rate / rates["peer"], 3),
                "goal": None,
                "limit": None,
                "details": {"prompts": args.prompts, "batch_size": args.batch_size},
            }
            for variant, rate in ours.items()
        ]
        add_results(args.results, name, rows)
        print(f"\n{name}\n\n| | prompts/s | of peer |\n|---|---|---|")
        for variant, rate in rates.items():
            print(f"| {variant} | {rate:.1f} | {rate / rates['peer']:.2f} |", flush=True)


def make_encoder(name: str, device: torch.device) -> PromptEncoder:
    """toy-sd's text encoder, or one of SD 1.5's size (CLIP ViT-L) with random weights; 16 bits on a GPU."""
    if name == "toy":
        model = CLIPTextModel.from_pretrained(REPOSITORY / "assets/toy-sd/text_encoder")
    else:
        torch.manual_seed(0)
        model = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    length = model.config.max_position_embeddings  # 77, and 24 of toy-sd
    encoder = PromptEncoder([CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=length)], [model])
    if device.type == "cuda":
        encoder.batch_size = GPU_BATCH
    return encoder


def measure(name: str, count: int, batch_size: int) -> dict[str, float]:
    """Prompts per second of each way."""
    accelerator = Accelerator()
    encoder = make_encoder(name, accelerator.device)
    prompts = [f"make it gray {number}" for number in range(count)]
    batches = [prompts[start : start + batch_size] for start in range(0, count, batch_size)]
    (tokenizer,), (model,) = encoder.tokenizers, encoder.text_encoders

    @torch.no_grad()
    def encode_in_the_step(batch: list[str]) -> torch.Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer(batch, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return model(tokens.input_ids.to(accelerator.device))[0]

    rates = {"peer": count / seconds(encode_in_the_step, batches, accelerator.device)}
    with tempfile.TemporaryDirectory() as folder:
        encoder.encode(prompts[: encoder.batch_size])  # the first call is slower

        def store(_: Any) -> bool:
            return prompt_cache.store_prompts(accelerator, Path(folder), lambda: prompts, encoder)

        rates["stored"] = count / seconds(store, [None], accelerator.device, warmup=0)
        repeats = batches * max(1, 4096 // count)
        rates["resident"] = batch_size * len(repeats) / seconds(encoder, repeats, accelerator.device)
        prompt_cache.RESIDENT_BYTES = 0
        store(None)
        rates["mapped"] = batch_size * len(repeats) / seconds(encoder, repeats, accelerator.device)
        prompt_cache.RESIDENT_BYTES = 256 * 2**20
    return rates


def seconds(function: Callable[[Any], object], inputs: list, device: torch.device, warmup: int = 2) -> float:
    """Wall-clock time of one call for each input, to the end of the device's work."""
    for value in inputs[:warmup]:
        function(value)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for value in inputs:
        function(value)
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
