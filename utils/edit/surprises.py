"""What is left to chance, drawn by the seed of an edit: the same seed draws the same."""

from __future__ import annotations

import random

INSTRUCTIONS = (
    "make it snow",
    "make it a rainy night",
    "turn it into a sunset",
    "make it look like early morning fog",
    "turn the season to autumn",
    "make it spring, with blossoms everywhere",
    "put it under water",
    "set it on the moon",
    "as if seen through a window with raindrops",
    "add a rainbow to the sky",
    "add hot-air balloons to the sky",
    "add fireworks",
    "turn it into a pencil drawing",
    "turn it into a watercolour",
    "turn it into an oil painting by Van Gogh",
    "turn it into a woodblock print by Hokusai",
    "turn it into a mosaic",
    "turn it into a stained glass window",
    "turn it into a charcoal sketch",
    "turn it into a comic book panel",
    "turn it into pixel art",
    "turn it into a Lego model",
    "turn it into a clay figure scene",
    "turn it into a paper cut-out",
    "make it look like an old sepia photograph",
    "make it a black and white film still",
    "make it look like a 1970s postcard",
    "give it the colours of a neon sign",
    "make it cyberpunk",
    "make it steampunk",
    "make it medieval",
    "make it look abandoned and overgrown",
    "make everything of gold",
    "make everything of glass",
    "make everything of wood",
    "make it look like a miniature model",
    "turn day into night",
    "light it with candles",
    "make it look like a dream",
    "make it a festival",
)
TEXT_RANGE, IMAGE_RANGE = (6.0, 9.0), (1.2, 1.8)  # as edit_app.py draws them


def draw_instruction(seed: int, name: str) -> str:
    """One of `INSTRUCTIONS`; the name of the input takes part, so that the images of a folder get different ones."""
    return random.Random(f"instruction {seed} {name}").choice(INSTRUCTIONS)


def draw_scales(seed: int) -> tuple[float, float]:
    """Guidance scales of text and image, rounded to two digits."""
    generator = random.Random(f"scales {seed}")
    return round(generator.uniform(*TEXT_RANGE), 2), round(generator.uniform(*IMAGE_RANGE), 2)
