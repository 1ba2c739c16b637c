"""Tiny models with random weights: real classes and files, loaded by the real loading code."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: each character is one token; `model_max_length` is 77."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, **changes: int) -> CLIPTextConfig:
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1)
    sizes = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    return CLIPTextConfig(**special | sizes | dict(vocab_size=len(tokenizer)) | changes)


def make_vae(**changes: float) -> AutoencoderKL:
    """A random autoencoder: 32x32 pixels <-> latents (4, 16, 16)."""
    vae = AutoencoderKL(
        block_out_channels=[16, 32],
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        sample_size=32,
        **changes,
    )
    return vae.eval()


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def make_unet(in_channels: int, **changes: object) -> UNet2DConditionModel:
    """A random UNet of latents (in_channels, 16, 16) and text width 32."""
    sizes = dict(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return UNet2DConditionModel(**sizes | dict(in_channels=in_channels, out_channels=4) | changes).eval()


def make_components(scratch: Path, in_channels: int = 4, prediction_type: str = "epsilon", seed: int = 0) -> dict:
    """Components of a Stable Diffusion with random weights: 32x32 pixels, latents (4, 16, 16), text width 32."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(scratch / "tokenizer-source")
    text_encoder = CLIPTextModel(text_config(tokenizer)).eval()
    return dict(
        vae=make_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make_unet(in_channels),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl_components(scratch: Path, in_channels: int = 4, prediction_type: str = "epsilon", seed: int = 0) -> dict:
    """Components of an SDXL with random weights: two text encoders of widths 32 and 64, latents (4, 16, 16)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(scratch / "tokenizer-source")
    second = text_config(tokenizer, hidden_size=64, intermediate_size=67, num_hidden_layers=3, projection_dim=48)
    unet = make_unet(
        in_channels,
        cross_attention_dim=96,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )
    return dict(
        vae=make_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(prediction_type),
        add_watermarker=False,
    )


def make_tiny_sd(folder: Path, in_channels: int = 4, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a tiny text-to-image pipeline (4 input channels) or a tiny editor (8) and return its folder."""
    components = make_components(folder.parent / f"{folder.name}-scratch", in_channels, prediction_type, seed)
    pipeline_class = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInstructPix2PixPipeline
    pipeline_class(**components).save_pretrained(folder)
    return folder


def make_tiny_sdxl(folder: Path, in_channels: int = 4, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a tiny text-to-image SDXL (4 input channels) or a tiny SDXL editor (8) and return its folder."""
    components = make_sdxl_components(folder.parent / f"{folder.name}-scratch", in_channels, prediction_type, seed)
    pipeline_class = StableDiffusionXLPipeline if in_channels == 4 else StableDiffusionXLInstructPix2PixPipeline
    pipeline_class(**components).save_pretrained(folder)
    return folder
