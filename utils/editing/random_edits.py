"""What is left to chance, drawn by the seed of an edit: the same seed draws the same."""

from __future__ import annotations

import random

EASY_INSTRUCTIONS = (  # edits that the toy editor has learned too
    "turn it into a cartoon",
    "make it a pencil drawing",
    "make it night",
    "give it a sepia tone",
    "make it foggy",
    "put it in the light of a sunset",
    "make it black and white",
    "turn it into a mosaic",
)
INSTRUCTIONS = (
    *EASY_INSTRUCTIONS,
    "make it snow",
    "make it a rainy night",
    "turn the season to autumn",
    "make it spring, with blossoms everywhere",
    "put it under water",
    "set it on the moon",
    "as if seen through a window with raindrops",
    "add a rainbow to the sky",
    "add hot-air balloons to the sky",
    "add fireworks",
    "turn it into a watercolour",
    "turn it into an oil painting by Van Gogh",
    "turn it into a woodblock print by Hokusai",
    "turn it into a stained glass window",
    "turn it into a charcoal sketch",
    "turn it into pixel art",
    "turn it into a Lego model",
    "turn it into a clay figure scene",
    "turn it into a paper cut-out",
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
    "light it with candles",
    "make it look like a dream",
    "make it a festival",
)
SPREAD = 0.2  # a fifth around 7.5 and 1.5 is 6 to 9 and 1.2 to 1.8, from which edit_app.py draws


def draw_instruction(seed: int, name: str) -> str:
    """One of `INSTRUCTIONS`; the name of the input takes part, so that the images of a folder get different ones."""
    return random.Random(f"instruction {seed} {name}").choice(INSTRUCTIONS)


def draw_scales(seed: int | None, scales: tuple[float, float]) -> tuple[float, float]:
    """Guidance scales of text and image, up to a fifth around the given ones, of two digits; None draws anew."""
    draw = random.Random(None if seed is None else f"scales {seed}")
    return tuple(round(scale * draw.uniform(1 - SPREAD, 1 + SPREAD), 2) for scale in scales)
