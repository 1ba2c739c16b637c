"""The samples of an evaluation: rows of a dataset with what a score needs."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from utils.data.columns import is_image_feature, is_prompt_feature, resolve_columns, usable_prompts
from utils.data.draws import random_subset
from utils.data.rows import open_rows
from utils.errors import InputError
from utils.masks import MASK_COLUMNS, read_mask
from utils.pixel_metrics import changed_area
from utils.pixels import BadRow, decode_image

logger = logging.getLogger(__name__)
CAPTIONS = {  # what published datasets call them
    "original": ("original_prompt", "input_caption", "source_caption", "original_caption", "source_global_caption"),
    "edited": ("edited_prompt", "output_caption", "target_caption", "edited_caption", "target_global_caption"),
}
SESSION, TURN = "img_id", "turn_index"  # of MagicBrush
PLACE = ("task_type", "instruction_language", "key")  # of GEdit-Bench
NONE, EXACT = "none", "exact"
EXACT_THRESHOLD = 8  # of 255: below it, a target that was stored as a JPEG differs from its original everywhere
Edit = Image.Image | Path  # an edited image, or its file


@dataclass(frozen=True)
class DatasetOptions:
    """Which rows to evaluate on; the fields are flags.

    edited_image_column: "none" for a dataset without target images; mask_column: "exact" marks where the target differs
    from the original, for targets that are exact; num_samples: a random subset, always the same.
    """

    dataset_name: str
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    original_image_column: str | None = None
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    original_caption_column: str | None = None
    edited_caption_column: str | None = None
    mask_column: str | None = None
    num_samples: int | None = None
    seed: int = 0
    cache_dir: str | None = None


@dataclass(frozen=True)
class Sample:
    """original and edited (the target, if there is one): RGB; mask: bool (H, W) of the original, True where it is to be
    edited; number: of the row in the dataset; session, turn: of datasets whose rows continue each other, from 1 on;
    place: where the scorer of a benchmark expects the edit."""

    number: int
    original: Image.Image
    instruction: str
    edited: Image.Image | None = None
    original_caption: str | None = None
    edited_caption: str | None = None
    mask: np.ndarray | None = None
    place: tuple[str, ...] = ()
    session: str = ""
    turn: int = 1

    @property
    def name(self) -> str:
        """The name of the files of its edits, without a suffix."""
        return f"{self.number:06d}"

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(self.original)

    @property
    def target_pixels(self) -> np.ndarray | None:
        return None if self.edited is None else np.asarray(self.edited)

    @property
    def has_captions(self) -> bool:
        """Whether there are two different captions; without them, there is no direction of the edit."""
        return bool(self.original_caption and self.edited_caption) and self.original_caption != self.edited_caption


def open_samples(options: DatasetOptions) -> list[Sample]:
    """The samples that can be read; others are logged. Raises InputError, also where none is left."""
    name = options.dataset_name
    rows = open_rows(name, False, options.dataset_config_name, options.dataset_split, False, options.cache_dir)
    columns = find_columns(rows.features, options)
    used = {*columns.values(), SESSION, TURN, *PLACE}
    rows = rows.select_columns([column for column in rows.features if column in used])
    for column in (columns["original"], columns["edited"], columns["mask"]):
        if isinstance(rows.features.get(column), datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return read_chosen(len(rows), lambda number: read_sample(number, rows[number], columns), options)


def read_chosen(count: int, read: Callable[[int], Sample], options: DatasetOptions) -> list[Sample]:
    """The samples of all numbers below `count`, or of --num_samples of them; bad ones are logged.

    read: number -> sample, or raises BadRow. Raises InputError where none is left.
    """
    numbers, samples, bad = range(count), [], []
    if options.num_samples is not None and options.num_samples < count:
        numbers = random_subset(options.seed, count, options.num_samples).tolist()
    for number in numbers:
        try:
            samples.append(read(number))
        except BadRow as error:
            bad.append(f"{options.dataset_split}[{number}]: {error.reason}")
    if bad:
        logger.warning("%d rows cannot be read and are left out: %s", len(bad), "; ".join(bad[:5]))
    if not samples:
        raise InputError(f"--dataset_name {options.dataset_name} has no row that can be read: {'; '.join(bad[:2])}")
    return samples


def find_columns(features: datasets.Features, options: DatasetOptions) -> dict[str, str | None]:
    """The column of each part of a sample; None where there is none. Raises InputError."""
    name, edited = options.dataset_name, options.edited_image_column
    given = (options.original_image_column, options.edit_prompt_column)
    if edited == NONE:
        columns = dict(zip(("original", "prompt"), given, strict=True)) | {"edited": None}
        checks = (
            ("original", is_image_feature, "--original_image_column"),
            ("prompt", is_prompt_feature, "--edit_prompt_column"),
        )
        problems = [
            f"{flag} {columns[role]}: name a column of the right type; {name} has {list(features)}"
            for role, is_right, flag in checks
            if columns[role] not in features or not is_right(features[columns[role]])
        ]
        if problems:
            raise InputError.from_problems(problems)
    else:
        found = resolve_columns(name, features, *given, edited)
        columns = {"original": found.original, "prompt": found.prompt, "edited": found.edited}
    for part, known in (*((f"{side}_caption", names) for side, names in CAPTIONS.items()), ("mask", MASK_COLUMNS)):
        flag = getattr(options, f"{part}_column")
        if part == "mask" and flag == EXACT:
            if edited == NONE:
                raise InputError("--mask_column exact compares the target images, and --edited_image_column is none")
            columns[part] = EXACT
            continue
        if flag and flag not in features:
            raise InputError(f"--{part}_column {flag}: {name} has the columns {', '.join(features)}")
        columns[part] = flag or next((column for column in known if column in features), None)
    return columns


def read_sample(number: int, row: dict, columns: dict[str, str | None]) -> Sample:
    """Raises BadRow."""
    prompts = usable_prompts(row[columns["prompt"]])
    if not prompts:
        raise BadRow("no instruction")
    original = decode_image(row[columns["original"]])
    captions = {
        f"{side}_caption": row[columns[f"{side}_caption"]] if columns[f"{side}_caption"] else None for side in CAPTIONS
    }
    edited, mask = decode_image(row[columns["edited"]]) if columns["edited"] else None, None
    if columns["mask"] == EXACT:
        mask = changed_area(np.asarray(original), np.asarray(edited), EXACT_THRESHOLD)
    elif columns["mask"] and row[columns["mask"]]:
        mask = read_mask(row[columns["mask"]], original.size)
    return Sample(
        number,
        original,
        prompts[0],
        edited,
        mask=mask,
        place=tuple(str(row[name]) for name in PLACE) if set(PLACE) <= set(row) else (),
        session=str(row[SESSION]) if SESSION in row else "",
        turn=int(row[TURN]) if SESSION in row and TURN in row else 1,
        **captions,
    )


def batches(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def read_edit(edit: Edit) -> Image.Image:
    """An edit as an RGB image."""
    return Image.open(edit).convert("RGB") if isinstance(edit, Path) else edit


def last_turns(samples: list[Sample]) -> list[Sample]:
    """The last turn of each session."""
    last: dict[str, Sample] = {}
    for sample in samples:
        if sample.session not in last or sample.turn > last[sample.session].turn:
            last[sample.session] = sample
    return list(last.values())
