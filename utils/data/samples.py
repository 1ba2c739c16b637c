"""One row under one draw -> a sample; samples of one size -> a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from utils.data.draws import sample_draws
from utils.data.geometry import Geometry, PreparedPair, Size, is_mirrored, prepare_pair
from utils.data.sources import Source
from utils.errors import InputError
from utils.pixels import BadRow

MAX_CONSECUTIVE_BAD_ROWS = 100


@dataclass(frozen=True)
class SampleSettings:
    """What a sample depends on beside its row and its draw."""

    geometry: Geometry
    seed: int
    num_train_timesteps: int
    latent_channels: int = 4
    vae_scale_factor: int = 8


def make_sample(row: dict, source: Source, draw: int, settings: SampleSettings, bucket: Size | None = None) -> dict:
    """One row under the randomness of `draw`: the pair at training size, one prompt, the draws. Raises `BadRow`."""
    geometry = settings.geometry
    height, width = bucket or (geometry.resolution, geometry.resolution)
    factor = settings.vae_scale_factor
    latent_shape = (settings.latent_channels, height // factor, width // factor)
    draws = sample_draws(settings.seed, draw, latent_shape, settings.num_train_timesteps)
    columns = source.columns
    prompt = choose_prompt(row[columns.prompt], draws["u_prompt"])
    pair = prepare_pair(
        row[columns.original], row[columns.edited], geometry, draws["u_crop"], draws["u_flip"], prompt, bucket
    )
    return dict(pair=pair, prompt=prompt, draws=draws)


def make_cached_sample(
    prompt_value: object, draw: int, settings: SampleSettings, read_cache: Callable[[bool], tuple]
) -> dict:
    """As `make_sample`, with the moments of `latent_cache` in the place of the pixels. Raises `BadRow`.

    `read_cache(is_flipped)` gives the moments float32 (3C, h, w) and the sizes (3, 2).
    """
    side = settings.geometry.resolution // settings.vae_scale_factor
    latent_shape = (settings.latent_channels, side, side)
    draws = sample_draws(settings.seed, draw, latent_shape, settings.num_train_timesteps)
    prompt = choose_prompt(prompt_value, draws["u_prompt"])
    moments, sizes = read_cache(is_mirrored(settings.geometry, draws["u_flip"], prompt))
    return dict(moments=moments, sizes=sizes, prompt=prompt, draws=draws)


def choose_prompt(value: object, u_prompt: float) -> str:
    """The prompt of a row; of a list, one of those that are not empty, by the uniform draw `u_prompt`."""
    if isinstance(value, (list, tuple, np.ndarray)):
        usable = [prompt for prompt in value if isinstance(prompt, str) and prompt.strip()]
        if not usable:
            raise BadRow("no prompt in the list")
        return usable[int(u_prompt * len(usable))]
    if value is None:
        raise BadRow("no prompt")
    if not isinstance(value, str):
        raise BadRow(f"the prompt is not text but {type(value).__name__}")
    if not value.strip():
        raise BadRow("empty prompt")
    return value


def list_prompts(source: Source) -> Iterator[str]:
    """Every prompt that the rows of a source can give, again for each row that has it."""
    column = source.columns.prompt
    for batch in source.rows.select_columns([column]).iter(1000):
        for value in batch[column]:
            values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
            yield from (prompt for prompt in values if isinstance(prompt, str) and prompt.strip())


def collate(samples: list[dict], rows: list[str], bad_rows: list[tuple[str, str]]) -> dict:
    """Samples of one size -> the batch that the training step takes (shapes in `make_loader`)."""
    draws = [sample["draws"] for sample in samples]
    if "moments" in samples[0]:
        images, sizes = {"moments": _stack([s["moments"] for s in samples])}, [s["sizes"] for s in samples]
    else:
        pairs: list[PreparedPair] = [s["pair"] for s in samples]
        images = {f"{name}_pixels": _stack([getattr(p, name) for p in pairs]) for name in ("original", "edited")}
        sizes = [(pair.original_size, pair.crop_top_left, pair.target_size) for pair in pairs]
    names = ("original_sizes", "crop_top_lefts", "target_sizes")
    images |= dict(zip(names, torch.from_numpy(np.array(sizes, dtype=np.int64)).unbind(1), strict=True))
    return images | dict(
        prompts=[sample["prompt"] for sample in samples],
        timesteps=torch.tensor([draw["timestep"] for draw in draws], dtype=torch.int64),
        noise=_stack([draw["noise"] for draw in draws]),
        posterior_noise=_stack([draw["posterior_noise"] for draw in draws]),
        offset_noise=_stack([draw["offset_noise"] for draw in draws]),
        dropout=torch.tensor([draw["u_dropout"] for draw in draws], dtype=torch.float32),
        rows=rows,
        bad_rows=bad_rows,
    )


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def too_many_bad_rows(bad_rows: list[tuple[str, str]]) -> InputError:
    """The error for rows that are all bad, with the first of them."""
    examples = "".join(f"\n  - {row}: {reason}" for row, reason in bad_rows[:5])
    return InputError(f"{len(bad_rows)} rows in a row cannot be used; look at the data and the column flags:{examples}")
