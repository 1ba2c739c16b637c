"""Very small CLIP, SigLIP and DINO models with random weights, saved as the Hub has them."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)

TOKENIZER = Path(__file__).parent.parent / "assets/toy-sd/tokenizer"
SIDE = 32


LAYERS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=16)


def load_tokenizer() -> tuple[CLIPTokenizer, dict]:
    """A tokenizer and the configuration of a text model for it."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    return tokenizer, LAYERS | ids


def save_clip(folder: Path) -> Path:
    tokenizer, text = load_tokenizer()
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=LAYERS | dict(image_size=SIDE, patch_size=8), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def save_clipseg(folder: Path) -> Path:
    """A CLIPSeg for images of 32 pixels."""
    tokenizer, text = load_tokenizer()
    torch.manual_seed(2)
    config = CLIPSegConfig(
        text_config=text,
        vision_config=LAYERS | dict(image_size=SIDE, patch_size=8),
        projection_dim=16,
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        extract_layers=[0, 1, 2],
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    return folder
