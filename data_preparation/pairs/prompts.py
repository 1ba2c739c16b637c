"""The captions with their edits, as generate_captions.py writes them."""

from __future__ import annotations

from data_preparation.generation.inputs import Captions, OpenCaptions
from utils.errors import InputError

IMAGE_NAME_COLUMNS = ("file_name", "image", "photograph", "image_file", "source")


def open_prompts(prompts: Captions) -> OpenCaptions:
    """The captions. Raises InputError where there are no edits beside them."""
    opened = prompts.open()
    missing = [name for name in ("edit", "output") if name not in opened.row(0)]
    if missing:
        raise InputError(
            f"--prompts {prompts.dataset_id}: has no text column {' and '.join(missing)}; its text columns are "
            f"{', '.join(opened.row(0))}. generate_captions.py makes what is needed of captions"
        )
    return opened


def read_text(row: dict, column: str) -> str:
    """A text of a row without space around it; "" where it has none."""
    return (row.get(column) or "").strip()


def find_image_name(row: dict, column: str | None) -> str:
    """What a caption's row calls its photograph: by `column`, else by the first of the usual ones that is filled."""
    columns = (column,) if column else IMAGE_NAME_COLUMNS
    return next((text for name in columns if (text := read_text(row, name))), "")
