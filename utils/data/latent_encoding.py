"""Encodes the pairs that a latent cache does not have yet (the layout is in `latent_cache`)."""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm.auto import tqdm

from utils.atomic_files import UNFINISHED, remove_unfinished
from utils.data.geometry import Geometry, PreparedPair, bucket_of, crop_pair, decode_pair
from utils.data.latent_cache import ROWS_PER_SHARD, CachedRows, LatentCache, crop_positions, list_shards, rows_of
from utils.data.sources import Source, images_digest
from utils.errors import InputError
from utils.models.latents import encode_moments, refuse_infinite
from utils.pixels import BadRow

# Pairs that the VAE encodes at a time. On the CPU one: in a batch, the last bits depend on a pair's place in it.
GPU_BATCH, MAX_THREADS = 8, 8
DAY = 24 * 3600.0
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Encoder:
    """What makes moments of a pair: its geometry, the number of random crops, and the VAE."""

    geometry: Geometry
    vae: AutoencoderKL
    num_crops: int = 1

    @property
    def num_variants(self) -> int:
        return self.num_crops * (2 if self.geometry.random_flip else 1)

    def digest(self) -> str:
        """A digest of everything but the images that the moments depend on."""
        digest = hashlib.sha256(f"{self.geometry} {self.num_crops} {self.vae.dtype} float16 3".encode())
        for name, value in self.vae.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def make_latent_cache(
    accelerator: Accelerator, cache_dir: Path, sources: list[Source], encoder: Encoder
) -> LatentCache:
    """Encode the rows that are not cached yet, split among the processes, and return the reader.

    cache_dir: may be shared by runs. The folder of a source in it is named by a key of its images, the geometry and the
    VAE's weights and dtype. Raises `InputError` when the disk has no room for the missing rows.
    """
    folders = name_folders(cache_dir, sources, encoder)
    encode_missing(folders, sources, encoder, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return open_latent_cache(folders, sources, encoder)


def name_folders(cache_dir: Path, sources: list[Source], encoder: Encoder) -> list[Path]:
    """The folder of each source, created. Unfinished files of killed runs are removed from it after a day."""
    key = encoder.digest()
    folders = [cache_dir / f"{images_digest(source)[:16]}-{key}" for source in sources]
    for folder in dict.fromkeys(folders):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, older_than=DAY)  # younger ones may belong to a run beside this one
    return folders


def open_latent_cache(folders: list[Path], sources: list[Source], encoder: Encoder) -> LatentCache:
    """The reader of a complete cache. Raises `InputError` where rows are missing."""
    rows = [CachedRows(folder, source.numbers()) for folder, source in zip(folders, sources, strict=True)]
    for folder, one in zip(folders, rows, strict=True):
        if len(absent := one.missing()):
            raise InputError(
                f"--cache_latents: {len(absent)} rows (the first is {absent[0]}) that other processes encoded are not "
                f"in {folder}: give an --output_dir or --latent_cache_dir that all machines share"
            )
    return LatentCache(rows, encoder.geometry, encoder.num_crops)


def encode_missing(
    folders: list[Path], sources: list[Source], encoder: Encoder, rank: int = 0, num_processes: int = 1
) -> int:
    """Encode this process's share of the rows that no file has; returns how many. Raises `InputError`."""
    wanted: dict[Path, tuple[Source, np.ndarray]] = {}  # a mix may contain a dataset twice
    for folder, source in zip(folders, sources, strict=True):
        others = wanted[folder][1] if folder in wanted else ()
        wanted[folder] = (source, np.union1d(source.numbers(), others).astype(np.int64))
    # Blocks are given out by their numbers among all of them. Among the missing ones the processes would count
    # differently: those that list the folder later find files that others have written by then.
    blocks = [
        (folder, source, rows[rows // ROWS_PER_SHARD == block])
        for folder, (source, rows) in wanted.items()
        for block in np.unique(rows // ROWS_PER_SHARD)
    ]
    found = {folder: list_shards(folder) for folder in wanted}

    def missing(folder: Path, rows: np.ndarray) -> np.ndarray:
        files = found[folder][int(rows[0]) // ROWS_PER_SHARD]
        return np.setdiff1d(rows, [row for path in files for row in rows_of(path)])

    jobs = [(folder, source, missing(folder, rows)) for folder, source, rows in blocks]
    _require_space(sum(len(rows) for _, _, rows in jobs), folders[0], encoder)
    own = [job for job in jobs[rank::num_processes] if len(job[2])]
    count = sum(len(rows) for _, _, rows in own)
    with tqdm(total=count, desc="Encoding latents", unit="pair", disable=not own or rank > 0) as bar:
        for folder, source, rows in own:
            _write_shard(folder, source.whole(), rows, encoder)
            bar.update(len(rows))
    return count


def _require_space(num_rows: int, folder: Path, encoder: Encoder) -> None:
    """Raise `InputError` if that many more rows do not fit on the disk."""
    config = encoder.vae.config
    side = encoder.geometry.resolution // 2 ** (len(config.block_out_channels) - 1)  # buckets are at most as large
    needed = num_rows * encoder.num_variants * 3 * config.latent_channels * side**2 * 2
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"--cache_latents needs {needed / 1e9:.1f} GB for {num_rows} rows, and {folder} has {free / 1e9:.1f} GB "
            "free: make room, give a --latent_cache_dir on another disk, or drop --cache_latents"
        )


def _write_shard(folder: Path, source: Source, numbers: np.ndarray, encoder: Encoder) -> None:
    """Encode rows of one block of the whole dataset into a file of their own."""
    stored = ((int(number), source.rows[int(number)]) for number in numbers)
    prepared = _in_threads(partial(_prepare_row, source, encoder), stored)  # decoded while the VAE works
    tensors, bad_rows, sizes = {}, {}, {}
    while batch := list(islice(prepared, GPU_BATCH if encoder.vae.device.type == "cuda" else 1)):
        bad_rows |= {number: reason for number, _, reason in batch if reason is not None}
        for shape in dict.fromkeys(one[0].target_size for _, one, _ in batch if one):  # of buckets, several
            alike = [(number, one) for number, one, _ in batch if one and one[0].target_size == shape]
            encoded = encode_variants([one for _, one in alike], encoder.vae)
            for (number, _), (moments, its_sizes) in zip(alike, encoded, strict=True):
                tensors[str(number)], sizes[number] = _as_float16(moments), its_sizes
    empty = torch.zeros(encoder.num_variants, 3, 2, dtype=torch.int64)
    tensors["sizes"] = torch.stack([sizes.get(int(number), empty) for number in numbers])
    metadata = {"rows": json.dumps(numbers.tolist()), "bad_rows": json.dumps(bad_rows)}
    digest = hashlib.sha256(metadata["rows"].encode()).hexdigest()[:12]
    path = folder / f"rows-{int(numbers[0]) // ROWS_PER_SHARD:05d}-{digest}.safetensors"
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")  # another run may share the folder
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.rename(path)


def _as_float16(moments: torch.Tensor) -> torch.Tensor:
    if moments.abs().max() > torch.finfo(torch.float16).max:
        raise InputError("--cache_latents: this VAE's latents are too large for 16 bits; drop the flag")
    return moments.half().contiguous()


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
    source: Source, encoder: Encoder, stored: tuple[int, dict]
) -> tuple[int, list[PreparedPair] | None, str | None]:
    """(row, its variants, reason why it is bad). stored: the row's number and its values."""
    number, values = stored
    geometry = encoder.geometry
    try:
        bucket = bucket_of(values[source.columns.original], geometry)
        images = decode_pair(values[source.columns.original], values[source.columns.edited], geometry, bucket)
    except BadRow as error:
        return number, None, error.reason
    crops = [crop_pair(images, geometry, u, bucket) for u in crop_positions(number, encoder.num_crops, geometry)]
    flips = ([pair, pair.mirrored()] if geometry.random_flip else [pair] for pair in crops)
    return number, [pair for variants in flips for pair in variants], None


def encode_variants(rows: list[list[PreparedPair]], vae: AutoencoderKL) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Moments float32 (variants, 3C, h, w) and sizes (variants, 3, 2) of each row; all of one size."""
    encoded = []
    for variant in zip(*rows, strict=True):  # one variant of all rows
        pixels = np.stack([image for pair in variant for image in (pair.original, pair.edited)])
        moments = encode_moments(vae, torch.from_numpy(pixels))
        refuse_infinite(moments, vae)
        original, edited = moments.cpu().unflatten(0, (len(variant), 2)).unbind(1)  # (rows, 2C, h, w) each
        encoded.append(torch.cat([original.chunk(2, dim=1)[0], edited], dim=1))
    sizes = [[[pair.original_size, pair.crop_top_left, pair.target_size] for pair in variants] for variants in rows]
    return list(zip(torch.stack(encoded, dim=1), map(torch.tensor, sizes), strict=True)) if rows else []
