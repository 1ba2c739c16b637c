"""Fine-tune assets/toy-sd to one style, the woodcut: three tones per channel from indigo to cream, and ink lines.

    python assets/style_toy_sd.py --output demo-output/toy-woodcut

As usual for a style, only the UNet is trained, on stylized images with unchanged captions. The output is for
`adapt_distill.py --distilled demo-output/toy-woodcut --base assets/toy-sd`. Takes five minutes on one CPU core.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from assets.make_toy_sd import base_batch, base_loss, encode_bank, learning_rate  # noqa: E402
from assets.toy_data import generator, load_photographs  # noqa: E402
from data_preparation.toy_edits import EDITS  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

TONES = 3
INDIGO, CREAM = np.array([0.16, 0.10, 0.42], np.float32), np.array([1.0, 0.93, 0.72], np.float32)


def woodcut(image: np.ndarray) -> np.ndarray:
    """The style: uint8 RGB (H, W, 3) -> the same. Colours remain different, so all edits can be distinguished."""
    tones = np.floor(image / 256 * TONES) / (TONES - 1)
    inked = tones * (EDITS["sketch"](image) / 255)
    return np.round((INDIGO + (CREAM - INDIGO) * inked) * 255).astype(np.uint8)


def fine_tune(pipeline: StableDiffusionPipeline, steps: int, peak: float, bank_size: int, seed: int) -> None:
    """Fine-tune the pipeline's UNet in place."""
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.requires_grad_(False)
    photographs = load_photographs(ASSETS / "photos", "train")
    latents, captions = encode_bank(pipeline.vae, photographs, seed, bank_size, woodcut)
    padded = dict(padding="max_length", truncation=True, return_tensors="pt")
    tokens, empty = (pipeline.tokenizer(texts, **padded).input_ids for texts in (captions, [""]))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=peak, weight_decay=0.0)
    started, losses = time.time(), []
    for step in range(steps):
        rng = generator(seed, "style", step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        batch = base_batch(latents, tokens, empty, rng)
        loss = base_loss(unet, text_encoder, pipeline.scheduler, *batch, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            pace = (time.time() - started) / (step + 1)
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {pace * 1000:.0f} ms/step", flush=True)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ASSETS / "toy-sd")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--bank_size", type=int, default=1600, help="number of training images, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.float32)
    fine_tune(pipeline, args.steps, args.learning_rate, args.bank_size, args.seed)
    pipeline.save_pretrained(args.output)


if __name__ == "__main__":
    main()
