"""Contact sheets and animations that show edits next to their inputs."""

from collections.abc import Iterator

from PIL import Image, ImageDraw

from utils.fonts import Font, fit_font

LABEL_HEIGHT, FONT_SIZE, MAX_LABEL = 16, 10, 300
CELL, MAX_SHEET_ROWS = 256, 50
HOLD_MS, FADE_MS, FADE_FRAMES = 1200, 80, 4
MIN_GIF_SIDE, GIF_SIDE = 256, 512


def draw_grid(
    rows: list[list[Image.Image]], labels: list[str] | list[list[str]], cell: int | None = None
) -> Image.Image:
    """Draw rows of images with labels above them, each image scaled to fit a square of `cell` pixels.

    labels: one for each row, or a list for each row with one label for each image, truncated to its cell.
    cell: the longest side of all images by default. The tallest image of a row sets its height.
    """
    cell = cell or max(max(image.size) for row in rows for image in row)
    scaled = [[_fit(image, cell) for image in row] for row in rows]
    heights = [LABEL_HEIGHT + max(image.height for image in row) for row in scaled]
    sheet = Image.new("RGB", (max(len(row) for row in rows) * cell, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for row, label, height in zip(scaled, labels, heights, strict=True):
        texts = [(label, sheet.width)] if isinstance(label, str) else [(text, cell) for text in label]
        for column, (text, width) in enumerate(texts):
            shown, font = _truncate(text, draw, width - 6)
            draw.text((column * cell + 3, top + 8), shown, fill="black", font=font, anchor="lm")
        for column, image in enumerate(row):
            sheet.paste(image, (column * cell, top + LABEL_HEIGHT))
        top += height
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scale the longer side to `side` pixels; from a factor of 2, the pixels stay visible as squares."""
    scale = side / max(image.size)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def _truncate(text: str, draw: ImageDraw.ImageDraw, width: int) -> tuple[str, Font]:
    """(the text truncated to `width` pixels, a font that has its characters)."""
    text, font = fit_font(text[:MAX_LABEL], FONT_SIZE)
    if draw.textlength(text, font) <= width:
        return text, font
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text.rstrip()}...", font


def draw_sheets(rows: list[list[Image.Image]], labels: list[list[str]]) -> Iterator[Image.Image]:
    """Contact sheets with up to `MAX_SHEET_ROWS` rows each; images smaller than a cell are not enlarged."""
    for start in range(0, len(rows), MAX_SHEET_ROWS):
        part = rows[start : start + MAX_SHEET_ROWS]
        cell = min(CELL, max(128, *(max(image.size) for row in part for image in row)))
        yield draw_grid(part, labels[start : start + MAX_SHEET_ROWS], cell)


def make_animation(images: list[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """An endless cross-fade through the images -> (frames, durations in milliseconds).

    All frames have the aspect ratio of the first image and a longer side of `MIN_GIF_SIDE` to `GIF_SIDE` pixels.
    """
    side = min(GIF_SIDE, max(MIN_GIF_SIDE, *images[0].size))
    size = _fit(images[0], side).size
    stills = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
    frames, durations = [], []
    for still, following in zip(stills, [*stills[1:], stills[0]], strict=True):
        fades = [Image.blend(still, following, step / (FADE_FRAMES + 1)) for step in range(1, FADE_FRAMES + 1)]
        frames += [still, *fades]
        durations += [HOLD_MS] + [FADE_MS] * FADE_FRAMES
    return frames, durations
