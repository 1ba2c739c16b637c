"""One row and one draw -> a sample; samples of one size -> a batch; and the rules for rows that cannot be used."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from utils.data.columns import usable_prompts
from utils.data.draws import sample_draws
from utils.data.geometry import Geometry, Size, is_mirrored, prepare_pair
from utils.data.sources import Source
from utils.errors import InputError
from utils.pixels import BadRow

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_BAD_ROWS = 100
MIN_STREAMED_ROWS = 1000  # a fraction of fewer streamed rows would be too coarse


@dataclass(frozen=True)
class SampleSettings:
    """What a sample depends on besides its row and its draw."""

    geometry: Geometry
    seed: int
    num_train_timesteps: int
    latent_channels: int = 4
    vae_scale_factor: int = 8

    def draws(self, draw: int, bucket: Size | None = None) -> dict:
        """The random values of a draw; the latents have the size of `bucket`, by default of the square."""
        height, width = bucket or (self.geometry.resolution, self.geometry.resolution)
        latent_shape = (self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return sample_draws(self.seed, draw, latent_shape, self.num_train_timesteps)


def make_sample(row: dict, source: Source, draw: int, settings: SampleSettings, bucket: Size | None = None) -> dict:
    """A row with the random values of `draw`: the pair at training size, one prompt, the draws. Raises BadRow."""
    draws, columns = settings.draws(draw, bucket), source.columns
    prompt = choose_prompt(row[columns.prompt], draws["u_prompt"])
    original, edited = row[columns.original], row[columns.edited]
    pair = prepare_pair(original, edited, settings.geometry, draws["u_crop"], draws["u_flip"], prompt, bucket)
    pixels = dict(original_pixels=pair.original, edited_pixels=pair.edited)
    sizes = (pair.original_size, pair.crop_top_left, pair.target_size)
    return dict(arrays=pixels, sizes=sizes, prompt=prompt, draws=draws)


def make_cached_sample(
    prompt_value: object,
    draw: int,
    settings: SampleSettings,
    read_cache: Callable[[bool, float], tuple],
    bucket: Size | None = None,
) -> dict:
    """Like `make_sample`, with the moments of the latent cache instead of pixels. Raises BadRow.

    read_cache: (is_mirrored, the uniform draw that chooses the crop) -> moments float32 (3C, h, w) and sizes (3, 2).
    """
    draws = settings.draws(draw, bucket)
    prompt = choose_prompt(prompt_value, draws["u_prompt"])
    is_flipped = is_mirrored(settings.geometry, draws["u_flip"], prompt)
    moments, sizes = read_cache(is_flipped, draws["u_crop"][0])
    return dict(arrays=dict(moments=moments), sizes=sizes, prompt=prompt, draws=draws)


def choose_prompt(value: object, u_prompt: float) -> str:
    """The prompt of a row; of a list, one of the usable prompts, by the uniform draw `u_prompt`. Raises BadRow."""
    prompts = usable_prompts(value)
    if prompts:
        return prompts[int(u_prompt * len(prompts))]
    if isinstance(value, (list, tuple, np.ndarray)):
        raise BadRow("no prompt in the list")
    if isinstance(value, str):
        raise BadRow("empty prompt")
    raise BadRow("no prompt" if value is None else f"the prompt is not text but {type(value).__name__}")


def list_prompts(source: Source) -> Iterator[str]:
    """All prompts that the rows of a source can give, with repetitions."""
    column = source.columns.prompt
    for batch in source.rows.select_columns([column]).iter(1000):
        for value in batch[column]:
            yield from usable_prompts(value)


def collate(samples: list[dict], rows: list[str], bad_rows: list[tuple[str, str]]) -> dict:
    """Samples of one size -> a batch for the training step (shapes in `make_loader`)."""

    def stack(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays))

    draws = [sample["draws"] for sample in samples]
    sizes = torch.from_numpy(np.array([sample["sizes"] for sample in samples], dtype=np.int64))
    batch = {name: stack([sample["arrays"][name] for sample in samples]) for name in samples[0]["arrays"]}
    batch |= dict(zip(("original_sizes", "crop_top_lefts", "target_sizes"), sizes.unbind(1), strict=True))
    batch |= {name: stack([draw[name] for draw in draws]) for name in ("noise", "posterior_noise", "offset_noise")}
    return batch | dict(
        prompts=[sample["prompt"] for sample in samples],
        timesteps=torch.tensor([draw["timestep"] for draw in draws], dtype=torch.int64),
        dropout=torch.tensor([draw["u_dropout"] for draw in draws], dtype=torch.float32),
        rows=rows,
        bad_rows=bad_rows,
    )


# ---- rows that cannot be used ---------------------------------------------------------------------------------------


def too_many_bad_rows(bad_rows: list[tuple[str, str]]) -> InputError:
    """The error for consecutive (row, reason) that are all bad; it names the first five."""
    examples = "".join(f"\n  - {row}: {reason}" for row, reason in bad_rows[:5])
    return InputError(
        f"{len(bad_rows)} consecutive rows cannot be used; check the data and the column flags:{examples}"
    )


def check_first_rows(sources: list[Source], geometry: Geometry, count: int = 8) -> list[tuple[str, str]]:
    """Decode the first `count` rows of each source -> the bad ones as (row, reason).

    Raises InputError if all of a source are bad: probably a column flag is wrong, or the image files are elsewhere.
    """
    found = []
    for source in sources:
        num_checked, bad_rows = 0, []
        for row, values in enumerate(islice(source.rows, count)):
            num_checked += 1
            try:
                prompt = choose_prompt(values[source.columns.prompt], 0.0)
                original, edited = values[source.columns.original], values[source.columns.edited]
                prepare_pair(original, edited, geometry, prompt=prompt)
            except BadRow as error:
                bad_rows.append((source.row_name(row), error.reason))
        if num_checked == 0:
            raise InputError(f"the split {source.name!r} has no rows")
        if len(bad_rows) == num_checked:
            raise too_many_bad_rows(bad_rows)
        found += bad_rows
    return found


class BadRowLimit:
    """Counts distinct bad rows, and stops the run if there are too many.

    limit: below 1 a fraction of `num_rows`, else a number of rows. For a stream (`num_rows` None), the fraction is of
    the rows drawn so far, at least 1000.
    """

    def __init__(self, limit: float, num_rows: int | None) -> None:
        if limit < 0:
            raise InputError(f"--max_bad_rows is {limit}; it must be 0 or more (below 1: a fraction of the rows)")
        self.limit = limit
        self.num_rows = num_rows
        self.reasons: dict[str, str] = {}

    def add(self, bad_rows: list[tuple[str, str]], num_drawn: int = 0) -> None:
        """Log each new (row, reason); raise InputError above the limit. num_drawn: rows drawn so far, for streams."""
        for row, reason in bad_rows:
            if row not in self.reasons:
                self.reasons[row] = reason
                logger.warning("skipped %s: %s (bad rows so far: %d)", row, reason, len(self.reasons))
        num_rows = max(num_drawn, MIN_STREAMED_ROWS) if self.num_rows is None else self.num_rows
        allowed = self.limit * num_rows if self.limit < 1 else self.limit
        if len(self.reasons) > allowed:
            examples = "".join(f"\n  - {row}: {reason}" for row, reason in list(self.reasons.items())[:20])
            raise InputError(
                f"--max_bad_rows {self.limit:g} allows {allowed:g} of {num_rows} rows, but {len(self.reasons)} rows "
                f"are bad: fix them or raise the limit:{examples}"
            )
