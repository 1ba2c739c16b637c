"""The edits of a run at a glance: an animation for each input, and contact sheets."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.contact_sheets import CELL, GIF_SIDE, draw_sheets, make_animation
from utils.editing.jobs import Job, add_suffix
from utils.editing.records import read_record, save_image
from utils.pixels import BadRow, decode_image

SHEET = "contact-sheet"


def save_animations(jobs: list[Job]) -> list[Path]:
    """Save a GIF of each input and its edits beside them; returns the files. Inputs without an edit are skipped."""
    saved = []
    for group in _group_by_input(jobs):
        images = _load_group(group, GIF_SIDE)
        if images:
            frames, durations = make_animation([image for image, _ in images])
            saved.append(group[0].base.with_suffix(".gif"))
            options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
            save_image(frames[0], saved[-1], **options)
    return saved


def save_sheets(jobs: list[Job]) -> list[Path]:
    """Save contact sheets with one row per input: the input, and its edits under their instructions."""
    groups = _group_by_input(jobs)
    rows = [images for images in (_load_group(group, CELL) for group in groups) if images]
    if not rows:
        return []
    base, names = groups[0][0].base, {job.output.stem for job in jobs}
    name = SHEET if SHEET not in names else f"{SHEET}-of-edits"  # an input may have that name
    first = add_suffix(base.with_suffix(".png"), "-grid") if len(groups) == 1 else base.with_name(f"{name}.png")
    saved = []
    sheets = draw_sheets([[image for image, _ in row] for row in rows], [[text for _, text in row] for row in rows])
    for number, sheet in enumerate(sheets, 1):
        saved.append(first if number == 1 else add_suffix(first, f"-{number}"))
        save_image(sheet, saved[-1])
    return saved


def _group_by_input(jobs: list[Job]) -> list[list[Job]]:
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(id(job.read), []).append(job)
    return list(groups.values())


def _load_group(group: list[Job], side: int) -> list[tuple[Image.Image, str]]:
    """(image, caption) of an input, cropped like its edits, and of its saved edits; no side is longer than `side`.

    Empty where no edit was saved.
    """
    edits = []
    for job in group:
        record = read_record(job.output) or {}
        try:
            edits.append((decode_image(job.output), record.get("instruction", job.instruction), record.get("seed")))
        except BadRow:
            continue  # the edit failed, and has been reported
    if not edits:
        return []
    width, height = edits[0][0].size
    scale = max(1.0, CELL / max(width, height))  # a small edit does not make the input small
    size = (round(width * scale), round(height * scale))
    original = ImageOps.fit(decode_image(group[0].read()), size, Image.Resampling.LANCZOS)
    has_seeds = len({seed for _, _, seed in edits}) > 1
    images = [(original, group[0].name)]
    images += [(edit, f"{text} #{seed}" if has_seeds else str(text)) for edit, text, seed in edits]
    for image, _ in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return images


def describe_repeat(former: Path, repeated: Path) -> str:
    """How the image of `--repeat` compares with the first one."""
    images = [np.asarray(decode_image(path)).astype(int) for path in (former, repeated)]
    if images[0].shape != images[1].shape:
        return f"differs from {former} in its size"
    difference = int(np.abs(images[0] - images[1]).max())
    return f"identical to {former}" if difference == 0 else f"differs from {former} by up to {difference} of 255"
