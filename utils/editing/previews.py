"""What shows the edits of a run at a glance: an animation for each input, contact sheets of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.contact_sheets import CELL, GIF_SIDE, draw_sheets, make_animation
from utils.editing.edit_images import save_image
from utils.editing.jobs import Job, add_suffix
from utils.editing.records import read_record
from utils.pixels import BadRow, decode_image

SHEET = "contact-sheet"


def save_animations(jobs: list[Job]) -> list[Path]:
    """For each input a GIF of it and its edits beside these; the files. Inputs without an edit have none."""
    saved = []
    for group in group_by_input(jobs):
        pictures = _load(group, GIF_SIDE)
        if len(pictures) > 1:
            frames, durations = make_animation([picture for picture, _ in pictures])
            saved.append(group[0].base.with_suffix(".gif"))
            save_image(
                frames[0], saved[-1], save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
            )
    return saved


def save_sheets(jobs: list[Job]) -> list[Path]:
    """Contact sheets with a row for each input and its edits under their instructions; the files."""
    groups = group_by_input(jobs)
    rows = [pictures for pictures in (_load(group, CELL) for group in groups) if len(pictures) > 1]
    base, names = groups[0][0].base, {job.output.stem for job in jobs}
    name = SHEET if SHEET not in names else f"{SHEET}-of-edits"  # an input may have that name
    if not rows:
        return []
    first = add_suffix(base.with_suffix(".png"), "-grid") if len(groups) == 1 else base.with_name(f"{name}.png")
    saved = []
    sheets = draw_sheets([[picture for picture, _ in row] for row in rows], [[text for _, text in row] for row in rows])
    for number, sheet in enumerate(sheets, 1):
        saved.append(first if number == 1 else add_suffix(first, f"-{number}"))
        save_image(sheet, saved[-1])
    return saved


def group_by_input(jobs: list[Job]) -> list[list[Job]]:
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(id(job.read), []).append(job)
    return list(groups.values())


def _load(group: list[Job], side: int) -> list[tuple[Image.Image, str]]:
    """The input, cropped as its edits are, and the edits that stand; at most `side` pixels long, with captions."""
    edits = []
    for job in group:
        record = read_record(job.output) or {}
        try:
            edits.append((decode_image(job.output), record.get("instruction", job.instruction), record.get("seed")))
        except BadRow:
            continue  # it could not be made, which has been told
    if not edits:
        return []
    width, height = edits[0][0].size
    scale = max(1.0, CELL / max(width, height))  # a small edit does not make the input small too
    size = (round(width * scale), round(height * scale))
    original = ImageOps.fit(decode_image(group[0].read()), size, Image.Resampling.LANCZOS)
    has_seeds = len({seed for _, _, seed in edits}) > 1
    pictures = [(original, group[0].name)]
    pictures += [(edit, f"{text} #{seed}" if has_seeds else str(text)) for edit, text, seed in edits]
    for picture, _ in pictures:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return pictures


def describe_repeat(former: Path, repeated: Path) -> str:
    """Whether a repeated edit equals the former one."""
    pictures = [np.asarray(decode_image(path)).astype(int) for path in (former, repeated)]
    if pictures[0].shape == pictures[1].shape:
        difference = int(np.abs(pictures[0] - pictures[1]).max())
        return f"equal to {former} to the bit" if difference == 0 else f"differs from {former} by up to {difference}"
    return f"differs from {former} in its size"
