"""Edits beside their inputs: contact sheets and animations."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw

LABEL_HEIGHT = 16
CELL, MAX_SHEET_ROWS = 256, 50
HOLD_MS, FADE_MS, FADE_FRAMES = 1200, 80, 4
MIN_GIF_SIDE, GIF_SIDE = 256, 512


def draw_grid(
    rows: list[list[Image.Image]], labels: list[str] | list[list[str]], cell: int | None = None
) -> Image.Image:
    """A sheet with labelled rows of pictures; every picture is fitted into a square of `cell` pixels.

    labels: for each row one, or one for each of its pictures, which is cut where the next begins. A row is as high as
    its highest picture.
    """
    cell = cell or max(max(image.size) for row in rows for image in row)
    sized = [[_fit(image, cell) for image in row] for row in rows]
    heights = [LABEL_HEIGHT + max(image.height for image in row) for row in sized]
    sheet = Image.new("RGB", (max(len(row) for row in rows) * cell, sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for row, label, height in zip(sized, labels, heights, strict=True):
        texts = [(label, sheet.width)] if isinstance(label, str) else [(text, cell) for text in label]
        for column, (text, room) in enumerate(texts):
            pen.text((column * cell + 3, top + 2), _cut(text, pen, room - 6), fill="black")
        for column, image in enumerate(row):
            sheet.paste(image, (column * cell, top + LABEL_HEIGHT))
        top += height
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    """With its longer side as `side`; what is enlarged twice or more keeps its pixels."""
    scale = side / max(image.size)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def _cut(text: str, pen: ImageDraw.ImageDraw, room: int) -> str:
    """As much of a text as fits into `room` pixels, in the letters that Pillow's own font has."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    if pen.textlength(text) <= room:
        return text
    while text and pen.textlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text.rstrip()}..."


def draw_sheets(rows: list[list[Image.Image]], labels: list[list[str]]) -> Iterator[Image.Image]:
    """Contact sheets of inputs and edits, `MAX_SHEET_ROWS` rows on each; small pictures are not enlarged."""
    for start in range(0, len(rows), MAX_SHEET_ROWS):
        part = rows[start : start + MAX_SHEET_ROWS]
        cell = min(CELL, max(128, *(max(image.size) for row in part for image in row)))
        yield draw_grid(part, labels[start : start + MAX_SHEET_ROWS], cell)


def make_animation(pictures: list[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The input and its edits, each held and faded into the next, the last into the first: frames and milliseconds.

    All take the shape of the first, with a longer side from `MIN_GIF_SIDE` to `GIF_SIDE` pixels.
    """
    side = min(GIF_SIDE, max(MIN_GIF_SIDE, *pictures[0].size))
    size = _fit(pictures[0], side).size
    stills = [picture.convert("RGB").resize(size, Image.Resampling.LANCZOS) for picture in pictures]
    frames, durations = [], []
    for still, following in zip(stills, [*stills[1:], stills[0]], strict=True):
        fades = [Image.blend(still, following, step / (FADE_FRAMES + 1)) for step in range(1, FADE_FRAMES + 1)]
        frames += [still, *fades]
        durations += [HOLD_MS] + [FADE_MS] * FADE_FRAMES
    return frames, durations
