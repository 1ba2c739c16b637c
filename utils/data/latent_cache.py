"""The VAE's moments of all pairs, computed once and saved: `--cache_latents`.

Encoding both images in each step is about two fifths of the compute of training SD 1.5. A cached pair has one crop, so
the crop must not be random; with --random_flip, the pair is cached both plain and mirrored.

KEY/rows-NNNNN.safetensors, with a KEY for each source, holds `ROWS_PER_SHARD` rows: `moments` float16 (rows, flips,
3C, h, w), the mean of the original (C) and the mean and log variance of the edited image (2C); `sizes` int64 (rows,
flips, 3, 2), the original size, the crop's top left and the target size, for SDXL. The metadata lists bad rows with
their reasons.

float16 rounds a mean by at most 1/2048 of it: 0.0004 for a scaled latent of 1, which training hides under noise with a
standard deviation of at least 0.03.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from utils.atomic_files import UNFINISHED, remove_unfinished
from utils.data.geometry import Geometry, PreparedPair, prepare_pair
from utils.data.sources import Source, images_digest
from utils.errors import InputError
from utils.models.latents import encode_moments, refuse_infinite
from utils.pixels import BadRow

ROWS_PER_SHARD = 256
# Pairs that the VAE encodes at a time. On the CPU one: in a batch, the last bits depend on a pair's place in it.
GPU_BATCH, MAX_THREADS = 8, 8
DAY = 24 * 3600.0
Item, Result = TypeVar("Item"), TypeVar("Result")


class LatentCache:
    """Reads the moments of a row; can be used in loader workers."""

    def __init__(self, folders: list[Path], geometry: Geometry) -> None:
        """folders: of each source."""
        self.folders = folders
        self.geometry = geometry

    def read(self, source: int, row: int, is_flipped: bool) -> tuple[np.ndarray, np.ndarray]:
        """Moments float32 (3C, h, w) and sizes (3, 2) of one pair. Raises BadRow as decoding would."""
        shard = _open_shard(shard_path(self.folders[source], row // ROWS_PER_SHARD))
        reason = json.loads(shard.metadata()["bad_rows"]).get(str(row))
        if reason is not None:
            raise BadRow(reason)
        index, flip = row % ROWS_PER_SHARD, int(is_flipped)
        slices = (shard.get_slice(name) for name in ("moments", "sizes"))
        moments, sizes = (part[index : index + 1, flip : flip + 1][0, 0] for part in slices)
        return moments.astype(np.float32), sizes


@lru_cache(maxsize=64)
def _open_shard(path: Path) -> safe_open:
    return safe_open(path, framework="np")


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"rows-{shard:05d}.safetensors"


def make_latent_cache(
    accelerator: Accelerator, cache_dir: Path, sources: list[Source], geometry: Geometry, vae: AutoencoderKL
) -> LatentCache:
    """Encode the shards that are not cached yet, split among the processes, and return the reader.

    cache_dir: may be shared by runs. The folder of a source in it is named by a key of its images, the geometry and the
    VAE's weights and dtype. Raises `InputError` when the disk has no room for the missing shards.
    """
    encoder = _digest_encoder(geometry, vae)
    folders = [cache_dir / f"{images_digest(source)[:16]}-{encoder}" for source in sources]
    by_folder = dict(zip(folders, sources, strict=True))  # a mix may contain a source twice
    for folder in by_folder:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, older_than=DAY)  # of killed runs; younger ones may belong to a run beside this one
    # Shards are given out by their numbers among all of them. Among the missing ones the processes would count
    # differently: those that list the folder later find shards that others have written by then.
    every = [
        (folder, shard)
        for folder, source in by_folder.items()
        for shard in range(-(-len(source.rows) // ROWS_PER_SHARD))
    ]

    def find_missing(shards: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        return [(folder, shard) for folder, shard in shards if not shard_path(folder, shard).exists()]

    def count(shards: list[tuple[Path, int]]) -> int:
        return sum(len(_rows_of(by_folder[folder], shard)) for folder, shard in shards)

    _require_space(cache_dir, count(find_missing(every)), geometry, vae)
    own = find_missing(every[accelerator.process_index :: accelerator.num_processes])
    is_hidden = not (own and accelerator.is_main_process)
    with tqdm(total=count(own), desc="Encoding latents", unit="pair", disable=is_hidden) as bar:
        for folder, shard in own:
            _write_shard(shard_path(folder, shard), by_folder[folder], shard, geometry, vae)
            bar.update(count([(folder, shard)]))
    accelerator.wait_for_everyone()
    if absent := find_missing(every):
        raise InputError(
            f"--cache_latents: {shard_path(*absent[0])} and {len(absent) - 1} more files that other processes wrote "
            "are not here: give an --output_dir or --latent_cache_dir that all machines share"
        )
    return LatentCache(folders, geometry)


def _require_space(folder: Path, num_rows: int, geometry: Geometry, vae: AutoencoderKL) -> None:
    """Raise `InputError` if that many more rows do not fit on the disk."""
    scale, flips = 2 ** (len(vae.config.block_out_channels) - 1), 2 if geometry.random_flip else 1
    needed = num_rows * flips * 3 * vae.config.latent_channels * (geometry.resolution // scale) ** 2 * 2
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"--cache_latents needs {needed / 1e9:.1f} GB for {num_rows} rows, and {folder} has {free / 1e9:.1f} GB "
            "free: make room, give a --latent_cache_dir on another disk, or drop --cache_latents"
        )


def _digest_encoder(geometry: Geometry, vae: AutoencoderKL) -> str:
    """A digest of everything but the images that the moments depend on."""
    digest = hashlib.sha256(f"{geometry} {vae.dtype} float16 2".encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows_of(source: Source, shard: int) -> range:
    return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(source.rows)))


def _write_shard(path: Path, source: Source, shard: int, geometry: Geometry, vae: AutoencoderKL) -> None:
    bad_rows = {}
    stored = ((row, source.rows[row]) for row in _rows_of(source, shard))
    prepared = _in_threads(partial(_prepare_row, source, geometry), stored)  # decoded while the VAE works
    rows: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    while batch := list(islice(prepared, GPU_BATCH if vae.device.type == "cuda" else 1)):
        encoded = iter(_encode([one for _, one, _ in batch if one is not None], vae))
        for row, one, reason in batch:
            rows.append(None if one is None else next(encoded))
            bad_rows |= {} if reason is None else {row: reason}
    good = next((row for row in rows if row is not None), (torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    empty = tuple(map(torch.zeros_like, good))
    moments, sizes = (torch.stack(values) for values in zip(*(row or empty for row in rows), strict=True))
    if moments.abs().max() > torch.finfo(torch.float16).max:
        raise InputError("--cache_latents: this VAE's latents are too large for 16 bits; drop the flag")
    moments = moments.half()
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")  # another run may share the folder
    save_file({"moments": moments, "sizes": sizes}, unfinished, metadata={"bad_rows": json.dumps(bad_rows)})
    unfinished.rename(path)


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in order; a few items ahead of the one that is asked for."""
    count = min(MAX_THREADS, os.cpu_count() or 1)
    remaining, waiting = iter(items), deque()
    with ThreadPoolExecutor(count) as threads:
        waiting.extend(threads.submit(function, item) for item in islice(remaining, 2 * count + GPU_BATCH))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(function, item) for item in islice(remaining, 1))


def _prepare_row(
    source: Source, geometry: Geometry, stored: tuple[int, dict]
) -> tuple[int, list[PreparedPair] | None, str | None]:
    """(row, the pair plain and, with random_flip, mirrored, reason why it is bad). stored: row and its values."""
    row, values = stored
    try:
        pair = prepare_pair(values[source.columns.original], values[source.columns.edited], geometry)
    except BadRow as error:
        return row, None, error.reason
    return row, [pair, pair.mirrored()] if geometry.random_flip else [pair], None


def _encode(rows: list[list[PreparedPair]], vae: AutoencoderKL) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Moments float32 (flips, 3C, h, w) and sizes (flips, 3, 2) of each row."""
    encoded = []
    for variant in zip(*rows, strict=True):  # the rows, all plain or all mirrored
        pixels = np.stack([image for pair in variant for image in (pair.original, pair.edited)])
        moments = encode_moments(vae, torch.from_numpy(pixels))
        refuse_infinite(moments, vae)
        original, edited = moments.cpu().unflatten(0, (len(variant), 2)).unbind(1)  # (rows, 2C, h, w) each
        encoded.append(torch.cat([original.chunk(2, dim=1)[0], edited], dim=1))
    sizes = [[[pair.original_size, pair.crop_top_left, pair.target_size] for pair in variants] for variants in rows]
    return list(zip(torch.stack(encoded, dim=1), map(torch.tensor, sizes), strict=True)) if rows else []
