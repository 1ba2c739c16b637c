"""What the training benchmarks train on: base models with random weights, and JPEG pairs."""

import io
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.memory_models import UNETS, VAE

REPOSITORY = Path(__file__).resolve().parents[1]
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
NARROW = (32, 64, 128, 128)  # channels of a UNet and a VAE of SD 1.5's depth, whose kernels take no time


def make_base(kind: str, folder: Path) -> Path:
    """The folder of a text-to-image base. kind: toy (ours, trained), deep (SD 1.5's depth, narrow), sd15 or sdxl."""
    if kind == "toy":
        return REPOSITORY / "assets/toy-sd"
    target = folder / kind
    if (target / "model_index.json").exists():
        return target
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = _make_sdxl() if kind == "sdxl" else _make_sd(is_narrow=kind == "deep")
    pipeline.to(dtype=torch.float16)  # half the time of writing and reading; training starts from float32 all the same
    pipeline.save_pretrained(target)
    return target


def _make_sd(is_narrow: bool) -> StableDiffusionPipeline:
    channels, width = (NARROW, 64) if is_narrow else (UNETS["sd15"]["block_out_channels"], 768)
    unet = UNETS["sd15"] | dict(in_channels=4, sample_size=64, block_out_channels=channels, cross_attention_dim=width)
    vae = VAE | dict(block_out_channels=NARROW) if is_narrow else VAE
    encoder = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(encoder),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _make_sdxl() -> StableDiffusionXLPipeline:
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        num_hidden_layers=32,
        projection_dim=1280,
        hidden_act="gelu",
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=UNet2DConditionModel(**UNETS["sdxl"] | dict(in_channels=4, sample_size=128)),
        scheduler=EulerDiscreteScheduler(**NOISE),
        add_watermarker=False,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(REPOSITORY / "assets/toy-sd/tokenizer", model_max_length=77)


def make_pairs(folder: Path, count: int, side: int) -> Path:
    """A dataset that both scripts read: a parquet file of JPEG pairs with an instruction each."""
    import datasets

    target = folder / f"pairs-{side}-{count}"
    if (target / "done").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    (target / "data").mkdir(parents=True)
    photographs = sorted((REPOSITORY / "assets/photos").glob("*.jpg"))
    rows = []
    for index in range(count):
        rng = np.random.default_rng(index)
        image = Image.open(photographs[index % len(photographs)]).convert("RGB")
        shorter = min(image.size)
        left, top = (int(rng.integers(size - shorter + 1)) for size in image.size)
        square = image.crop((left, top, left + shorter, top + shorter)).resize((side, side))
        original, edited = map(_jpeg, (square, square.convert("L").convert("RGB")))
        rows.append({"original_image": original, "edit_prompt": f"make it gray {index}", "edited_image": edited})
    data = datasets.Dataset.from_list(rows)
    for column in ("original_image", "edited_image"):
        data = data.cast_column(column, datasets.Image())
    data.to_parquet(str(target / "data/train-00000-of-00001.parquet"))
    (target / "done").touch()
    return target


def _jpeg(image: Image.Image) -> dict:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return {"bytes": content.getvalue(), "path": None}
