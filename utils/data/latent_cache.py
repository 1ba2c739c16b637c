"""The VAE's moments of all pairs, computed once and saved: `--cache_latents`.

Encoding both images in each step is about two fifths of the compute of training SD 1.5. A cached pair has one crop, so
the crop must not be random; with --random_flip, the pair is cached both plain and mirrored.

latent-cache/KEY/source-I-NNNNN.safetensors holds `ROWS_PER_SHARD` rows: `moments` float32 (rows, flips, 3C, h, w), the
mean of the original (C) and the mean and log variance of the edited image (2C); `sizes` int64 (rows, flips, 3, 2), the
original size, the crop's top left and the target size, for SDXL. The metadata lists bad rows with their reasons.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from utils.atomic_files import UNFINISHED
from utils.data.geometry import Geometry, prepare_pair
from utils.data.samples import choose_prompt
from utils.data.sources import Source
from utils.errors import InputError
from utils.models.latents import encode_moments, refuse_infinite
from utils.pixels import BadRow

ROWS_PER_SHARD = 256


class LatentCache:
    """Reads the moments of a row; can be used in loader workers."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        self.folder = folder
        self.geometry = geometry

    def read(self, source: int, row: int, is_flipped: bool) -> tuple[np.ndarray, np.ndarray]:
        """Moments float32 (3C, h, w) and sizes (3, 2) of one pair. Raises BadRow as decoding would."""
        shard = _open_shard(shard_path(self.folder, source, row // ROWS_PER_SHARD))
        reason = json.loads(shard.metadata()["bad_rows"]).get(str(row))
        if reason is not None:
            raise BadRow(reason)
        index, flip = row % ROWS_PER_SHARD, int(is_flipped)
        return tuple(shard.get_slice(name)[index : index + 1, flip : flip + 1][0, 0] for name in ("moments", "sizes"))


@lru_cache(maxsize=64)
def _open_shard(path: Path) -> safe_open:
    return safe_open(path, framework="np")


def shard_path(folder: Path, source: int, shard: int) -> Path:
    return folder / f"source-{source}-{shard:05d}.safetensors"


def make_latent_cache(
    accelerator: Accelerator,
    output_dir: Path,
    sources: list[Source],
    data_digest: str,
    geometry: Geometry,
    vae: AutoencoderKL,
) -> LatentCache:
    """Encode the shards that are not cached yet, split among the processes, and return the reader.

    The folder's name is a key of the data, the geometry and the VAE's weights and dtype.
    """
    folder = output_dir / "latent-cache" / _cache_key(data_digest, geometry, vae)
    folder.mkdir(parents=True, exist_ok=True)
    # Shards are given out by their numbers among all of them. Among the missing ones the processes would count
    # differently: those that list the folder later find shards that others have written by then.
    every = [(i, shard) for i, source in enumerate(sources) for shard in range(-(-len(source.rows) // ROWS_PER_SHARD))]
    own = every[accelerator.process_index :: accelerator.num_processes]
    missing = [(index, shard) for index, shard in own if not shard_path(folder, index, shard).exists()]
    num_rows = sum(len(_rows_of(sources[index], shard)) for index, shard in missing)
    is_hidden = not (missing and accelerator.is_main_process)
    with tqdm(total=num_rows, desc="Encoding latents", unit="pair", disable=is_hidden) as bar:
        for index, shard in missing:
            _write_shard(shard_path(folder, index, shard), sources[index], shard, geometry, vae)
            bar.update(len(_rows_of(sources[index], shard)))
    accelerator.wait_for_everyone()
    if absent := [path for index, shard in every if not (path := shard_path(folder, index, shard)).exists()]:
        raise InputError(
            f"--cache_latents: {absent[0]} and {len(absent) - 1} more files that other processes wrote are not here: "
            "give an --output_dir that all machines share"
        )
    return LatentCache(folder, geometry)


def _cache_key(data_digest: str, geometry: Geometry, vae: AutoencoderKL) -> str:
    """A digest of everything that the moments depend on."""
    digest = hashlib.sha256(f"{data_digest} {geometry} {vae.dtype}".encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows_of(source: Source, shard: int) -> range:
    return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(source.rows)))


def _write_shard(path: Path, source: Source, shard: int, geometry: Geometry, vae: AutoencoderKL) -> None:
    rows, bad_rows = [], {}
    for row in _rows_of(source, shard):
        try:
            rows.append(_encode_row(source.rows[row], source, geometry, vae))
        except BadRow as error:
            bad_rows[row] = error.reason
            rows.append(None)
    good = next((row for row in rows if row is not None), (torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    empty = tuple(map(torch.zeros_like, good))
    moments, sizes = (torch.stack(values) for values in zip(*(row or empty for row in rows), strict=True))
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    save_file({"moments": moments, "sizes": sizes}, unfinished, metadata={"bad_rows": json.dumps(bad_rows)})
    unfinished.rename(path)


def _encode_row(row: dict, source: Source, geometry: Geometry, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair -> moments float32 (flips, 3C, h, w) and sizes (flips, 3, 2).

    Not in batches: the last bits would depend on the other rows.
    """
    choose_prompt(row[source.columns.prompt], 0.0)  # raises BadRow
    variants, sizes = [], []
    for u_flip in (1.0, 0.0) if geometry.random_flip else (1.0,):
        pair = prepare_pair(row[source.columns.original], row[source.columns.edited], geometry, u_flip=u_flip)
        pixels = torch.from_numpy(np.stack([pair.original, pair.edited]))
        original, edited = moments = encode_moments(vae, pixels).cpu()  # (2C, h, w) each
        refuse_infinite(moments, vae)
        variants.append(torch.cat([original.chunk(2)[0], edited]))
        sizes.append([pair.original_size, pair.crop_top_left, pair.target_size])
    return torch.stack(variants), torch.tensor(sizes)
