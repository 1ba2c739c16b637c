"""The picture of a card: rows of several tasks, each as original, edited and instruction."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from data_preparation.exporting.facts import UNNAMED_TASK, first_text, text_groups
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

SIDE = 240  # of the box for a picture, in pixels
MARGIN = 12
LINES = 2  # of an instruction
Place = tuple[Path, int, int, str, str]  # file, row group, row in it, task, instruction


def make_grid(folder: Path, rows: int = 8) -> Image.Image:
    """Two pairs side by side in a line, of as many tasks as there is room for. Raises InputError: none is readable."""
    pairs = []
    for place in _choose(folder, rows):
        try:
            pairs.append((*_decode(place), *place[3:]))
        except BadRow:
            continue
        if len(pairs) == rows:
            break
    if not pairs:
        raise InputError("no row that was looked at has two readable pictures: run check_dataset.py first")
    return _draw(pairs)


def _choose(folder: Path, rows: int) -> list[Place]:
    """Rows in the order in which they are wanted: the first of each task, then the second ...; of other sources first.

    More than `rows`, because some may be unreadable.
    """
    by_task: dict[str, list[Place]] = {}
    seen: set[tuple] = set()
    later: dict[str, list[Place]] = {}
    for path, group, columns in text_groups(folder, "train"):
        absent = [None] * len(columns["edit_prompt"])
        names = zip(columns["edit_prompt"], columns.get("task") or absent, columns.get("source") or absent, strict=True)
        for row, (prompt, task, source) in enumerate(names):
            task = task or UNNAMED_TASK
            place = (path, group, row, task, first_text(prompt))
            is_new = source is None or source not in seen
            kept = by_task if is_new else later
            if len(kept.setdefault(task, [])) < rows:
                kept[task].append(place)
                seen.add(source)
    queues = {task: by_task.get(task, []) + later.get(task, []) for task in sorted(by_task | later)}
    longest = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)][: 4 * rows]


def _decode(place: Place) -> tuple[Image.Image, Image.Image]:
    path, group, row = place[:3]
    table = pq.ParquetFile(path).read_row_group(group, ["original_image", "edited_image"]).slice(row, 1)
    return tuple(decode_image(table[name].to_pylist()[0]) for name in ("original_image", "edited_image"))


def _draw(pairs: list[tuple]) -> Image.Image:
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    fitted = [(_fit(original), _fit(edited), task, prompt) for original, edited, task, prompt in pairs]
    tallest = max(picture.height for pair in fitted for picture in pair[:2])
    width, height = 2 * SIDE + 3 * MARGIN, tallest + LINES * 21 + 22 + 2 * MARGIN
    across = min(2, len(pairs))
    sheet = Image.new("RGB", (across * width, -(-len(pairs) // across) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (original, edited, task, prompt) in enumerate(fitted):
        left, top = index % across * width + MARGIN, index // across * height + MARGIN
        for column, picture in enumerate((original, edited)):
            indent = (SIDE - picture.width) // 2, (tallest - picture.height) // 2
            sheet.paste(picture, (left + column * (SIDE + MARGIN) + indent[0], top + indent[1]))
        draw.text((left, top + tallest + 4), task, fill="#666666", font=small)
        for line, text in enumerate(_wrap(prompt, font, 2 * SIDE + MARGIN)):
            draw.text((left, top + tallest + 22 + 21 * line), text, fill="black", font=font)
    return sheet


def _fit(picture: Image.Image) -> Image.Image:
    """The picture with its longer side at SIDE; a tiny one shows its pixels."""
    factor = SIDE / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if factor >= 4 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit into `width` pixels; the last ends in "..." where not all fits."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = lines[:LINES]
        while lines[-1] and font.getlength(lines[-1] + " ...") > width:
            lines[-1] = lines[-1].rpartition(" ")[0]
        lines[-1] += " ..."
    return lines


def save_grid(folder: Path, place: Path) -> None:
    """Make the picture of the files in `folder` and write it as a JPEG."""
    content = io.BytesIO()
    make_grid(folder).save(content, "JPEG", quality=90)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.getvalue())
