"""The image of a dataset card: rows of several tasks, each with original image, edited image and instruction."""

import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from data_preparation.exporting.card import NO_TASK, first_instruction, read_text_groups
from data_preparation.generation.pair_rows import IMAGES
from utils.errors import InputError
from utils.fonts import Font, fit_font
from utils.pixels import BadRow, decode_image

NUM_PAIRS = 8
SIDE, MARGIN = 240, 12  # pixels
MAX_LINES = 2  # of an instruction
RowPlace = tuple[Path, int, int, str, str]  # file, row group, row in the group, task, instruction


def make_grid(folder: Path) -> bytes:
    """A JPEG with pairs from the files in `folder`, two in a line. Raises InputError if no pair can be read."""
    pairs = []
    for path, group, row, task, prompt in _choose_rows(folder):
        table = pq.ParquetFile(path).read_row_group(group, list(IMAGES)).slice(row, 1)
        try:
            pairs.append(([_fit(decode_image(table[name].to_pylist()[0])) for name in IMAGES], task, prompt))
        except BadRow:
            continue
        if len(pairs) == NUM_PAIRS:
            break
    if not pairs:
        raise InputError("--data_root: no pair with two readable images was found: run check_dataset.py first")
    content = io.BytesIO()
    _draw_pairs(pairs).save(content, "JPEG", quality=90)
    return content.getvalue()


def _choose_rows(folder: Path) -> list[RowPlace]:
    """The first row of each task, then the second, and so on; rows with a new source come first within a task.

    More than `NUM_PAIRS`, because some may not be readable.
    """
    first: dict[str, list[RowPlace]] = {}
    later: dict[str, list[RowPlace]] = {}
    seen: set[str] = set()
    for path, group, columns in read_text_groups(folder, "train"):
        rows = zip(columns["edit_prompt"], columns["task"], columns["source"], strict=True)
        for row, (prompt, task, source) in enumerate(rows):
            task = task or NO_TASK
            chosen = (first if source is None or source not in seen else later).setdefault(task, [])
            if len(chosen) < NUM_PAIRS:
                chosen.append((path, group, row, task, first_instruction(prompt)))
                seen.add(source)
    queues = [first.get(task, []) + later.get(task, []) for task in sorted(first | later)]
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)][: 4 * NUM_PAIRS]


def _draw_pairs(pairs: list[tuple[list[Image.Image], str, str]]) -> Image.Image:
    """pairs: (the two images, task, instruction)."""
    tallest = max(image.height for images, _, _ in pairs for image in images)
    width, height = 2 * SIDE + 3 * MARGIN, tallest + MAX_LINES * 21 + 22 + 2 * MARGIN
    num_columns = min(2, len(pairs))
    sheet = Image.new("RGB", (num_columns * width, -(-len(pairs) // num_columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (images, task, prompt) in enumerate(pairs):
        left, top = index % num_columns * width + MARGIN, index // num_columns * height + MARGIN
        for column, image in enumerate(images):
            indent = (SIDE - image.width) // 2, (tallest - image.height) // 2
            sheet.paste(image, (left + column * (SIDE + MARGIN) + indent[0], top + indent[1]))
        task, small = fit_font(task, 13)
        draw.text((left, top + tallest + 4), task, fill="#666666", font=small)
        prompt, font = fit_font(prompt, 17)
        for line, text in enumerate(_wrap(prompt, font, 2 * SIDE + MARGIN)):
            draw.text((left, top + tallest + 22 + 21 * line), text, fill="black", font=font)
    return sheet


def _fit(image: Image.Image) -> Image.Image:
    """Scaled to a longer side of SIDE pixels; very small images keep sharp pixels."""
    factor = SIDE / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if factor >= 4 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """At most MAX_LINES lines of `width` pixels; a text that does not fit ends in "..."."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        while lines[-1] and font.getlength(lines[-1] + " ...") > width:
            lines[-1] = lines[-1].rpartition(" ")[0]
        lines[-1] += " ..."
    return lines
