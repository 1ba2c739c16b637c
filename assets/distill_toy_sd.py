"""Distil assets/toy-sd into a few-step student by latent consistency distillation (2310.04378).

    python assets/distill_toy_sd.py --output demo-output/toy-lcm

From any point on the teacher's path from noise to image, the student learns to predict the end of the path. The output
is for `adapt_distill.py --distilled demo-output/toy-lcm --base assets/toy-sd`. Takes a quarter of an hour on two CPU
cores. Run it again to resume from the last state.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from assets.make_toy_sd import base_batch, encode_bank, learning_rate, save_state  # noqa: E402
from assets.toy_data import generator, load_photographs  # noqa: E402
from assets.toy_models import MAX_TOKENS  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

SOLVER_STEPS = 50  # of the teacher's path; the student is trained across one of them at a time
DATA_DEVIATION, TIMESTEP_SCALING = 0.5, 10.0  # as in LCMScheduler, which runs the student
TARGET_DECAY = 0.95
UNet, Schedule = UNet2DConditionModel, DDIMScheduler


def consistency(
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """f(x_t, t) = c_skip x_t + c_out x_0(x_t), latents (B, 4, h, w): x_t itself at t = 0 (section 4.1)."""
    scaled = (timesteps * TIMESTEP_SCALING).view(-1, 1, 1, 1)
    skip = DATA_DEVIATION**2 / (scaled**2 + DATA_DEVIATION**2)
    out = scaled / (scaled**2 + DATA_DEVIATION**2).sqrt()
    return skip * noisy + out * predict_original(unet, schedule, noisy, timesteps, text)


def predict_original(
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """x_0 = alpha x_t - sigma v, (B, 4, h, w), from the predicted velocity."""
    alpha, sigma = alpha_sigma(schedule, timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = unet(noisy, timesteps, text).sample
    return alpha * noisy - sigma * velocity.float()


def alpha_sigma(schedule: Schedule, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the image and of the noise at timesteps (B,), (B, 1, 1, 1) each."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


@torch.no_grad()
def teacher_step(
    teacher: UNet, schedule: Schedule, noisy: torch.Tensor, start: torch.Tensor, end: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """One DDIM step of the teacher from timesteps `start` to `end` (B,), without guidance, which editors add."""
    original = predict_original(teacher, schedule, noisy, start, text)
    alpha, sigma = alpha_sigma(schedule, start)
    noise = (noisy - alpha * original) / sigma
    alpha, sigma = alpha_sigma(schedule, end)
    return alpha * original + sigma * noise


def distill(args: argparse.Namespace) -> UNet:
    """Train the student; returns the average of its weights."""
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.float32)
    schedule, teacher = DDIMScheduler.from_config(pipeline.scheduler.config), pipeline.unet.eval().requires_grad_(False)
    student, target = copy.deepcopy(teacher).train().requires_grad_(True), copy.deepcopy(teacher)
    optimizer, first = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0), 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        student.load_state_dict(state["student"]), target.load_state_dict(state["target"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    latents, captions = encode_bank(
        pipeline.vae, load_photographs(ASSETS / "photos", "train"), args.seed, args.bank_size
    )
    texts, rows_of = encode_captions(pipeline, captions)
    started, period = time.time(), schedule.config.num_train_timesteps // SOLVER_STEPS
    for step in range(first, args.steps):
        rng = generator(args.seed, "lcm", step)
        rows, images = base_batch(latents, rows_of[:, None], torch.zeros(1, 1, dtype=torch.int64), rng)
        text, noise = texts[rows[:, 0]], torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        start = torch.from_numpy(rng.integers(1, SOLVER_STEPS + 1, len(images))) * period - 1
        end = (start - period).clamp(min=0)
        noisy = schedule.add_noise(images, noise, start)
        with torch.no_grad():
            closer = teacher_step(teacher, schedule, noisy, start, end, text)
            goal = consistency(target, schedule, closer, end, text)
        difference = consistency(student, schedule, noisy, start, text) - goal
        loss = ((difference**2 + 1e-6).sqrt() - 1e-3).mean()  # pseudo-Huber
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.learning_rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - TARGET_DECAY)
        if (step + 1) % 100 == 0:
            state = {"student": student.state_dict(), "target": target.state_dict(), "step": step + 1}
            save_state(args.state, **state, optimizer=optimizer.state_dict())
            pace = (time.time() - started) / (step + 1 - first)
            print(f"step {step + 1}: loss {loss.item():.4f}, {pace * 1000:.0f} ms/step", flush=True)
    return target


@torch.no_grad()
def encode_captions(pipeline: StableDiffusionPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the distinct captions, the empty one first (N, 24, D), and the row of each caption (B,)."""
    distinct = ["", *dict.fromkeys(captions)]
    padded = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    tokens = pipeline.tokenizer(distinct, **padded).input_ids
    embeds = torch.cat([pipeline.text_encoder(part).last_hidden_state for part in tokens.split(256)])
    places = {caption: row for row, caption in enumerate(distinct)}
    return embeds, torch.tensor([places[caption] for caption in captions])


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ASSETS / "toy-sd")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--bank_size", type=int, default=4800, help="number of encoded images, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.state = args.output / "state.pt"
    unet = distill(args)
    pipeline = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.float32)
    pipeline.unet, pipeline.scheduler = unet, LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(args.output)


if __name__ == "__main__":
    main()
