"""Make assets/toy-sd: a very small Stable Diffusion that knows photographs and styles, trained on assets/photos.

    python assets/make_toy_sd.py all        # or one stage at a time: tokenizer, vae, base

Under an hour on two CPU cores. Each stage saves its state beside the output every few minutes and goes on from it
when run again; whatever is random about step n is drawn from (seed, stage, n), so a resumed run draws what an unbroken one would.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from data_preparation.edits import EDITS  # noqa: E402

SIZE = 64
# How a caption names a style. The words are those of people, not of one instruction: the text encoder, frozen when an
# editor is trained, should already know that "monochrome" and "black and white" are one thing.
STYLES = {
    "photograph": ["photograph", "photo", "picture", "natural colour photograph"],
    "cartoonize": [
        "cartoon",
        "comic",
        "comic book drawing",
        "animated film frame",
        "toon with bold ink outlines",
        "cartoonized picture",
    ],
    "grayscale": [
        "black and white photo",
        "grayscale picture",
        "monochrome photograph",
        "grey picture without colour",
        "desaturated gray image",
    ],
    "sepia": [
        "sepia photograph",
        "old brown photo",
        "vintage sepia print",
        "antique aged photograph",
        "faded brown toned picture",
    ],
    "negative": [
        "negative",
        "photo negative",
        "inverted picture",
        "film negative with inverted colours",
        "reversed colour image",
    ],
    "night": ["night scene", "dark picture at night", "moonlight view", "blue midnight photo", "dark moonlit picture"],
    "sunset": [
        "sunset scene",
        "picture in orange evening light",
        "warm glowing dusk view",
        "golden hour photo",
        "red evening sun scene",
    ],
    "fog": ["foggy scene", "picture in thick white fog", "misty view", "hazy photo", "scene covered in mist and haze"],
    "sketch": [
        "pencil sketch",
        "pencil drawing",
        "sketched drawing",
        "graphite line drawing on white paper",
        "hand drawn sketch",
    ],
    "mosaic": ["mosaic", "mosaic of square tiles", "tiled picture", "ceramic tile mosaic", "pixelated grid of tiles"],
    "thermal": [
        "thermal image",
        "heat camera picture",
        "infrared heat map",
        "thermal camera view",
        "false colour infrared image",
    ],
}
TEMPLATES = [
    "a {style} of {subject}",
    "{subject}, {style}",
    "{subject} as a {style}",
    "make {subject} a {style}",
    "a {style}",
    "turn it into a {style}",
]


def generator(seed: int, stage: str, step: int) -> np.random.Generator:
    """Counter-based randomness: the same (seed, stage, step) always draws the same."""
    key = np.array([seed, int.from_bytes(stage.encode()[:8], "little")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


def load_photographs(folder: Path, split: str) -> list[tuple[np.ndarray, str]]:
    """[(uint8 RGB (H, W, 3), caption)] of one split of metadata.jsonl."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [
        (cv2.imread(str(folder / row["file_name"]))[..., ::-1], row["caption"]) for row in rows if row["split"] == split
    ]


def random_crop(image: np.ndarray, rng: np.random.Generator, largest: bool = False) -> np.ndarray:
    """A square crop (shorter side down to 60 % of it, at least 96 pixels), mirrored half the time, at SIZE pixels."""
    height, width = image.shape[:2]
    side = min(height, width)
    if largest:
        top, left = (height - side) // 2, (width - side) // 2
    else:
        side = int(rng.integers(max(96, int(side * 0.6)), side + 1))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop = cv2.resize(
        np.ascontiguousarray(image[top : top + side, left : left + side]), (SIZE, SIZE), interpolation=cv2.INTER_AREA
    )
    return np.ascontiguousarray(crop[:, ::-1]) if not largest and rng.random() < 0.5 else crop


def random_example(photographs: list, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(uint8 RGB (SIZE, SIZE, 3), caption): a crop, untouched in one case of four, else in a random style."""
    image, subject = photographs[rng.integers(len(photographs))]
    crop = random_crop(image, rng)
    style = "photograph" if rng.random() < 0.25 else list(EDITS)[rng.integers(len(EDITS))]
    words = STYLES[style][rng.integers(len(STYLES[style]))]
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(style=words, subject=subject)
    return (EDITS[style](crop) if style in EDITS else crop), caption


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 RGB pictures -> (B, 3, SIZE, SIZE) float in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_state(path: Path, **state) -> None:
    """Write the state beside its place, then rename it."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def make_tokenizer(photographs: list, output: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's form, learned from captions and instructions; any other text falls back to letters."""
    texts = [
        template.format(style=style, subject=subject)
        for _, subject in photographs
        for styles in STYLES.values()
        for style in styles
        for template in TEMPLATES
    ]
    for path in sorted((ASSETS.parent / "data_preparation" / "instructions").glob("*.txt")):
        texts += path.read_text().splitlines()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=77
    )
    tokenizer.save_pretrained(output / "tokenizer")
    return tokenizer


def make_vae() -> AutoencoderKL:
    """0.4M parameters; 64 pixels become 4 x 32 x 32: halving only once keeps reconstructions sharp."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """L1 and L2, at full and half size, with a trace of KL to keep the latents near a normal distribution."""
    posterior = vae.encode(pixels).latent_dist
    result = vae.decode(posterior.sample()).sample
    result, kl = result.float(), posterior.kl().mean() / posterior.mean[0].numel()
    half = F.l1_loss(F.avg_pool2d(result, 2), F.avg_pool2d(pixels, 2))
    return F.l1_loss(result, pixels) + 2 * F.mse_loss(result, pixels) + half + 1e-5 * kl


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, photographs: list) -> float:
    """Mean PSNR in dB over the photographs' largest square."""
    pixels = to_tensor([random_crop(image, None, largest=True) for image, _ in photographs])
    error = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1) - pixels) / 2
    return float((-10 * error.pow(2).mean(dim=(1, 2, 3)).log10()).mean())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then half a cosine."""
    return float(peak * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps)))


def train_vae(args: argparse.Namespace, photographs: list, heldout: list) -> None:
    """Train the autoencoder and save it with the scaling factor that gives latents of unit variance."""
    torch.manual_seed(args.seed)
    vae, state_path = make_vae(), args.state_dir / "vae.pt"
    optimizer, first = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4), 0
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"]), optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    for step in range(first, args.vae_steps):
        rng = generator(args.seed, "vae", step)
        torch.manual_seed(int(rng.integers(2**31)))  # the posterior's noise
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.vae_steps, 2e-3)
        # Convolutions do not mind: quarters of pictures make a step four times cheaper.
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


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=77,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """1.9M parameters, text only at 8 x 8: every edit of the toy world is one for the whole picture."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal: without it no model of this size learns to darken a whole picture."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=0,
        clip_sample=False,
        set_alpha_to_one=True,
    )


@torch.no_grad()
def encode_bank(vae: AutoencoderKL, photographs: list, seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """Latents (count, 4, 32, 32) of unit variance and their captions, encoded once: the VAE stays out of the loop."""
    latents, captions = [], []
    for batch in range(count // 32):
        rng = generator(seed, "bank", batch)
        images, texts = zip(*[random_example(photographs, rng) for _ in range(32)])
        latents.append(vae.encode(to_tensor(list(images))).latent_dist.mode() * vae.config.scaling_factor)
        captions += texts
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
    """(tokens (B, 77), latents (B, 4, 32, 32)) of random pictures, one caption in ten replaced by the empty one."""
    rows = torch.from_numpy(rng.integers(0, len(latents), size))
    dropped = torch.from_numpy(rng.random(size) < 0.1)
    return torch.where(dropped[:, None], empty, tokens[rows]), latents[rows]


def train_base(args: argparse.Namespace, photographs: list) -> None:
    """Train text encoder and UNet together on captions of photographs and styles; save the whole pipeline."""
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.output / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.output / "vae").float()
    scheduler, networks = make_scheduler(), torch.nn.ModuleList([make_unet(), make_text_encoder(tokenizer)])
    ema = EMAModel(networks.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer, first, state_path = (
        torch.optim.AdamW(networks.parameters(), lr=1e-3, fused=True),
        0,
        args.state_dir / "base.pt",
    )
    if state_path.exists():
        state = torch.load(state_path)
        for name, part in (("networks", networks), ("optimizer", optimizer), ("ema", ema)):
            part.load_state_dict(state[name])
        first = state["step"]
    latents, captions = encode_bank(vae, photographs, args.seed, args.bank_size)
    padded = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
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
    """Half precision keeps the folder small."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "tokenizer", "vae", "base"])
    parser.add_argument("--photos", type=Path, default=ASSETS / "photos")
    parser.add_argument("--output", type=Path, default=ASSETS / "toy-sd")
    parser.add_argument(
        "--state_dir", type=Path, default=ASSETS.parent / "demo-output" / "toy-sd-state", help="resumable states"
    )
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--base_steps", type=int, default=10000)
    parser.add_argument("--bank_size", type=int, default=12800, help="pictures encoded for the base, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.state_dir.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    photographs = load_photographs(args.photos, "train")
    if args.stage in ("all", "tokenizer"):
        make_tokenizer(photographs, args.output)
    if args.stage in ("all", "vae"):
        train_vae(args, photographs, load_photographs(args.photos, "heldout"))
    if args.stage in ("all", "base"):
        train_base(args, photographs)


if __name__ == "__main__":
    main()
