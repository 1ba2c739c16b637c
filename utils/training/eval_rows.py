"""The rows of --eval_steps: of --eval_dataset, or the held-out ones."""

from dataclasses import dataclass

from PIL import Image

from utils.data.geometry import held_out_geometry, prepare_pair
from utils.data.samples import choose_prompt
from utils.data.sources import Source, open_source
from utils.errors import InputError
from utils.pixels import BadRow
from utils.training.settings import Settings


@dataclass(frozen=True)
class EvalRow:
    """A pair at the training size, of the same crop, and its prompt."""

    original: Image.Image
    edited: Image.Image
    prompt: str


def read_eval_rows(settings: Settings, held_out: list[Source]) -> list[EvalRow]:
    """Up to --eval_samples rows, evenly spread; none without --eval_steps. Raises `InputError` if none can be read."""
    options, data = settings.validation, settings.data
    if not options.eval_steps:
        return []
    if options.eval_dataset:
        columns = (data.original_image_column, data.edit_prompt_column, data.edited_image_column)
        source = open_source(
            options.eval_dataset, None, None, options.eval_split, False, None, data.cache_dir, *columns
        )
        sources = [source]
    else:
        sources = held_out
    places = [(source, row) for source in sources for row in range(len(source.rows))]
    count = min(options.eval_samples, len(places))
    chosen = [places[index * len(places) // count] for index in range(count)]
    rows, geometry, reason = [], held_out_geometry(settings.geometry), "it has no rows"
    for source, row in chosen:
        values, columns = source.rows[row], source.columns
        try:
            pair = prepare_pair(values[columns.original], values[columns.edited], geometry)
            prompt = choose_prompt(values[columns.prompt], 0.0)
        except BadRow as error:
            reason = error.reason
            continue
        images = (Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in (pair.original, pair.edited))
        rows.append(EvalRow(*images, prompt))
    if not rows:
        raise InputError(f"--eval_dataset {options.eval_dataset or '(held-out rows)'}: no row can be read: {reason}")
    return rows
