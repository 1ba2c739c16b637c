"""Train assets/toy-sd, a very small Stable Diffusion for photographs and styles, on assets/photos.

    python assets/make_toy_sd.py all        # or one stage: tokenizer, vae, text, base

Takes half an hour on two CPU cores. Each stage saves its state every few minutes; run it again to resume. The random
numbers of step n depend on (seed, stage, n) only, so a resumed run equals an uninterrupted one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from transformers import CLIPTokenizer

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from assets.toy_data import (  # noqa: E402
    generator,
    load_photographs,
    random_crop,
    random_example,
    text_examples,
    to_tensor,
    tokenizer_texts,
)
from assets.toy_models import MAX_TOKENS, SIZE, make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae  # noqa: E402
from utils.cli import FlagParser  # noqa: E402


def save_state(path: Path, **state) -> None:
    """Write the state to a temporary file, then rename it."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """L1 and L2 at full size, L1 at half size, and a little KL, which keeps the latents near a normal distribution."""
    posterior = vae.encode(pixels).latent_dist
    result = vae.decode(posterior.sample()).sample
    result, kl = result.float(), posterior.kl().mean() / posterior.mean[0].numel()
    half = F.l1_loss(F.avg_pool2d(result, 2), F.avg_pool2d(pixels, 2))
    return F.l1_loss(result, pixels) + 2 * F.mse_loss(result, pixels) + half + 1e-5 * kl


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, photographs: list) -> float:
    """Mean PSNR in dB over the largest squares of the photographs."""
    pixels = to_tensor([random_crop(image, None, largest=True) for image, _ in photographs])
    error = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1) - pixels) / 2
    return float((-10 * error.pow(2).mean(dim=(1, 2, 3)).log10()).mean())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine decay to zero."""
    return float(peak * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps)))


def train_vae(args: argparse.Namespace, photographs: list, heldout: list) -> None:
    """Train the autoencoder; its scaling factor gives latents of unit variance."""
    torch.manual_seed(args.seed)
    vae, state_path = make_vae(), args.state_dir / "vae.pt"
    optimizer, first = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4), 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["vae"]), optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    for step in range(first, args.vae_steps):
        rng = generator(args.seed, "vae", step)
        torch.manual_seed(int(rng.integers(2**31)))  # the posterior's noise
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.vae_steps, 2e-3)
        # Quarters of the images make a step four times cheaper, and are enough for convolutions.
        top, left = rng.integers(0, SIZE // 2 + 1, 2)
        pixels = to_tensor([random_example(photographs, rng)[0] for _ in range(8)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = vae_loss(vae, pixels[..., top : top + SIZE // 2, left : left + SIZE // 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            save_state(state_path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            psnr, pace = reconstruction_psnr(vae, heldout), (time.time() - started) / (step + 1 - first)
            print(
                f"vae {step + 1}: loss {loss.item():.4f}, held-out PSNR {psnr:.2f} dB, {pace * 1000:.0f} ms/step",
                flush=True,
            )
    rng = generator(args.seed, "scale", 0)
    with torch.no_grad():
        latents = vae.encode(to_tensor([random_example(photographs, rng)[0] for _ in range(128)])).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(args.output / "vae")


@torch.no_grad()
def encode_bank(
    vae: AutoencoderKL, photographs: list, seed: int, count: int, stylize: Callable = lambda image: image
) -> tuple[torch.Tensor, list[str]]:
    """Latents (count, 4, 32, 32) of unit variance and their captions, encoded once, before training.

    stylize: applied to every image, uint8 RGB, before it is encoded.
    """
    latents, captions = [], []
    for batch in range(count // 32):
        rng = generator(seed, "bank", batch)
        examples = [random_example(photographs, rng) for _ in range(32)]
        pixels = to_tensor([stylize(image) for image, _ in examples])
        latents.append(vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
        captions += [caption for _, caption in examples]
    return torch.cat(latents), captions


def base_loss(unet, text_encoder, scheduler, tokens, latents, rng) -> torch.Tensor:
    """Mean squared error of the predicted velocity for noise and timesteps drawn from `rng`."""
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    timesteps = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, len(latents)))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample
    return F.mse_loss(prediction.float(), scheduler.get_velocity(latents, noise, timesteps))


def base_batch(latents: torch.Tensor, tokens: torch.Tensor, empty: torch.Tensor, rng, size: int = 16):
    """Tokens (B, MAX_TOKENS) and latents (B, 4, 32, 32) of random images; one caption in ten is empty."""
    rows = torch.from_numpy(rng.integers(0, len(latents), size))
    dropped = torch.from_numpy(rng.random(size) < 0.1)
    return torch.where(dropped[:, None], empty, tokens[rows]), latents[rows]


def train_text(args: argparse.Namespace, photographs: list) -> None:
    """Pretrain the text encoder, as CLIP is: classify style and subject by the cosine of the mean hidden state.

    Diffusion training alone separates captions so slowly that the UNet learns to ignore the text.
    """
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.output / "tokenizer")
    text_encoder = make_text_encoder(tokenizer)
    texts, labels = text_examples(photographs)
    tokens = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    heads = torch.nn.ParameterList([torch.randn(11, 96), torch.randn(len(photographs), 96)])
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads], lr=1e-3)
    for step in range(args.text_steps):
        rows = torch.from_numpy(generator(args.seed, "text", step).integers(0, len(texts), 64))
        state = F.normalize(text_encoder(tokens[rows]).last_hidden_state.mean(dim=1), dim=1)
        # With a small factor before the softmax, a low loss needs large angles.
        styles, subjects = (10 * state @ F.normalize(head, dim=1).T for head in heads)
        style_labels, subject_labels = labels[rows].unbind(dim=1)
        loss = F.cross_entropy(styles, style_labels) + 0.5 * F.cross_entropy(subjects, subject_labels, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = (styles.argmax(dim=1) == style_labels).float().mean()
            print(f"text {step + 1}: loss {loss.item():.3f}, style accuracy {right:.2f}", flush=True)
    save_state(args.state_dir / "text.pt", text_encoder=text_encoder.state_dict())


def train_base(args: argparse.Namespace, photographs: list) -> None:
    """Train text encoder and UNet together on captions of photographs and styles; save the whole pipeline."""
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.output / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.output / "vae").float()
    scheduler, networks = make_scheduler(), torch.nn.ModuleList([make_unet(), make_text_encoder(tokenizer)])
    networks[1].load_state_dict(torch.load(args.state_dir / "text.pt", weights_only=True)["text_encoder"])
    ema = EMAModel(networks.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=1e-3, fused=True)
    first, state_path = 0, args.state_dir / "base.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        for name, part in (("networks", networks), ("optimizer", optimizer), ("ema", ema)):
            part.load_state_dict(state[name])
        first = state["step"]
    latents, captions = encode_bank(vae, photographs, args.seed, args.bank_size)
    padded = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    tokens, empty = tokenizer(captions, **padded).input_ids, tokenizer([""], **padded).input_ids
    started, losses = time.time(), []
    for step in range(first, args.base_steps):
        rng = generator(args.seed, "base", step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.base_steps, 2e-3)
        loss = base_loss(*networks, scheduler, *base_batch(latents, tokens, empty, rng), rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(networks.parameters())
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            state = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save_state(state_path, **state, step=step + 1)
            pace = (time.time() - started) / (step + 1 - first)
            print(f"base {step + 1}: loss {np.mean(losses[-250:]):.4f}, {pace * 1000:.0f} ms/step", flush=True)
    ema.copy_to(networks.parameters())
    save_pipeline(args.output, vae, tokenizer, *networks, scheduler)


def save_pipeline(output: Path, vae, tokenizer, unet, text_encoder, scheduler) -> None:
    """Save VAE and UNet in half precision, so that the folder is small; diffusers loads them as float32 by default.

    The text encoder stays in float32, because transformers loads it in the dtype in which it was saved.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.float(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "tokenizer", "vae", "text", "base"])
    parser.add_argument("--photos", type=Path, default=ASSETS / "photos")
    parser.add_argument("--output", type=Path, default=ASSETS / "toy-sd")
    parser.add_argument(
        "--state_dir",
        type=Path,
        default=ASSETS.parent / "demo-output" / "toy-sd-state",
        help="folder for the states of interrupted runs",
    )
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--text_steps", type=int, default=600)
    parser.add_argument("--base_steps", type=int, default=6000)
    parser.add_argument("--bank_size", type=int, default=9600, help="number of encoded images, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.state_dir.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    photographs = load_photographs(args.photos, "train")
    if args.stage in ("all", "tokenizer"):
        make_tokenizer(tokenizer_texts(photographs), args.output / "tokenizer")
    if args.stage in ("all", "vae"):
        train_vae(args, photographs, load_photographs(args.photos, "heldout"))
    if args.stage in ("all", "text"):
        train_text(args, photographs)
    if args.stage in ("all", "base"):
        train_base(args, photographs)


if __name__ == "__main__":
    main()
