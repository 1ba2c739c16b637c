"""Very small CLIP, SigLIP and DINO models with random weights, saved as the Hub has them."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

TOKENIZER = Path(__file__).parent.parent / "assets/toy-sd/tokenizer"
SIDE = 32


def save_clip(folder: Path) -> Path:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=layers | ids, vision_config=layers | dict(image_size=SIDE, patch_size=8), projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    return folder
