"""Writes a dataset of pairs to a folder in the layout of another trainer; skipped rows are counted and named."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count as count_from
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from data_preparation.exporting.pair_layouts import LAYOUTS, ExportedPair
from data_preparation.importing.dataset_pairs import map_provenance
from data_preparation.importing.source_pairs import clean_prompts, read_and_decode, stored_image
from data_preparation.photographs import seeded_rng
from utils.atomic_files import atomic_folder
from utils.data.columns import Columns
from utils.data.rows import open_rows
from utils.data.sources import Source, open_source
from utils.errors import InputError
from utils.pixels import BadRow

BATCH, THREADS = 64, 8  # rows in memory, and threads that decode them
MAX_NAMED = 5  # rows that are named for each reason
CAPTIONS = ("original_prompt", "edited_prompt")


@dataclass(frozen=True)
class PairExport:
    """The flags of export_pairs.py."""

    dataset_name: str
    output_dir: Path
    layout: str
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    streaming: bool = False
    max_num_samples: int | None = None
    cache_dir: str | None = None
    original_image_column: str | None = None
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    all_prompts: bool = False
    image_format: str = "png"
    seed: int = 0


def export_pairs(options: PairExport) -> str:
    """Write the folder; it appears when it is complete. Returns the summary to print. Raises InputError."""
    place = options.output_dir.absolute()
    source, captions = _open(options)
    total = None if options.streaming else len(source.rows)
    skipped: dict[str, list[str]] = defaultdict(list)
    with atomic_folder(place, "run the same command again") as folder, ThreadPoolExecutor(THREADS) as threads:
        writer, count = LAYOUTS[options.layout](folder, place), 0
        rows = zip(count_from(), source.rows, captions, strict=False)
        rows = tqdm(rows, total=total, desc="export", unit="row", mininterval=0.5)
        for batch in _batches(rows):
            made = threads.map(lambda row: _pairs_of(*row, source.columns, options), batch)
            for (number, *_), pairs in zip(batch, made, strict=True):
                if isinstance(pairs, BadRow):
                    skipped[pairs.kind].append(source.row_name(number))
                    continue
                for pair in pairs:
                    writer.add(f"{count:07d}", pair)
                    count += 1
        writer.finish()
        if count == 0:
            raise InputError("\n".join(["no pair was exported", *_describe(skipped)]))
        if place.is_dir():  # an empty one, which not every system replaces
            place.rmdir()
        folder.rename(place)
    written = f"wrote {count:,} pairs in the layout {options.layout} to {options.output_dir}"
    return "\n".join([written, *_describe(skipped)])


def _open(options: PairExport) -> tuple[Source, Iterable[dict]]:
    """(the pairs, for each row the captions that the dataset has, as original_prompt and edited_prompt)."""
    place = (options.dataset_split, options.streaming)
    source = open_source(
        options.dataset_name,
        options.dataset_config_name,
        None,
        *place,
        options.max_num_samples,
        options.cache_dir,
        options.original_image_column,
        options.edit_prompt_column,
        options.edited_image_column,
        options.seed,
    )
    if options.layout != "seeds":  # the others have no place for them
        return source, repeat({})
    rows = open_rows(options.dataset_name, False, options.dataset_config_name, *place, options.cache_dir)
    found = map_provenance(rows.features, source.columns)
    columns = {name: name if found.is_ours else found.texts.get(name) for name in CAPTIONS}
    names = {column: name for name, column in columns.items() if column}
    if not names:
        return source, repeat({})
    rows = rows if source.row_numbers is None else rows.select(source.row_numbers)
    rows = rows.select_columns(list(names))
    return source, ({names[column]: value for column, value in row.items()} for row in rows)


def _batches(rows: Iterator) -> Iterator[list]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _pairs_of(
    number: int, row: dict, captions: dict, columns: Columns, options: PairExport
) -> list[ExportedPair] | BadRow:
    """The pairs of a row: one for each instruction, or for one of them, drawn from the seed."""
    try:
        prompts = clean_prompts(row[columns.prompt])
        if not prompts:
            raise BadRow("no instruction")
        if len(prompts) > 1 and not options.all_prompts:
            prompts = [prompts[seeded_rng(options.seed, number).integers(len(prompts))]]
        original, edited = (
            stored_image(*read_and_decode(f"{role} image", row[getattr(columns, role)]), options.image_format)
            for role in ("original", "edited")
        )
    except BadRow as error:
        return error
    both = tuple(captions.get(name) or "" for name in CAPTIONS)
    return [ExportedPair(original, prompt, edited, both) for prompt in prompts]


def _describe(skipped: dict[str, list[str]]) -> list[str]:
    lines = []
    for reason, rows in sorted(skipped.items(), key=lambda item: -len(item[1])):
        more = f" and {len(rows) - MAX_NAMED:,} more" if len(rows) > MAX_NAMED else ""
        lines.append(f"  skipped, {reason}: {len(rows):,} ({', '.join(rows[:MAX_NAMED])}{more})")
    return lines
