"""The VAE's moments of all pairs, computed once and saved: `--cache_latents`. This file reads them.

Encoding both images in each step is about two fifths of the compute of training SD 1.5. A cached pair has a fixed crop,
or the `num_crops` crops of `--cache_crops`, each plain and, with --random_flip, mirrored: its variants.

KEY/rows-BLOCK-DIGEST.safetensors, with a KEY for the images, the geometry and the VAE, holds rows of one block of
`ROWS_PER_SHARD` rows of the dataset: those that were needed when it was written, so that another choice of rows (a
split, a limit) encodes only what is missing. Tensors: for each row, by its number, moments float16 (variants, 3C, h,
w): the mean of the original (C), the mean and the log variance of the edited image (2C); and `sizes` int64 (rows,
variants, 3, 2): the original size, the crop's top left and the target size, for SDXL. The metadata lists the rows, and
the bad rows with their reasons.

float16 rounds a mean by at most 1/2048 of it: 0.0004 for a scaled latent of 1, which training hides under noise with a
standard deviation of at least 0.03.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from utils.data.draws import fixed_crop
from utils.data.geometry import Geometry
from utils.pixels import BadRow

ROWS_PER_SHARD = 256
OPEN_SHARDS = 512  # below the usual limit of 1,024 open files


class LatentCache:
    """Reads the moments of a row; can be used in loader workers."""

    def __init__(self, sources: list[CachedRows], geometry: Geometry, num_crops: int = 1) -> None:
        self.sources = sources
        self.geometry = geometry
        self.num_crops = num_crops

    def read(self, source: int, row: int, is_flipped: bool, u_crop: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Moments float32 (3C, h, w) and sizes (3, 2) of one pair. Raises BadRow as decoding would.

        u_crop: uniform draw in [0, 1) that chooses the crop.
        """
        flips = 2 if self.geometry.random_flip else 1
        return self.sources[source].read(row, int(u_crop * self.num_crops) * flips + int(is_flipped))


class CachedRows:
    """Finds the rows of one source in the files of a folder.

    numbers: of a source that is a part of its dataset, the number of each row in the dataset.
    """

    def __init__(self, folder: Path, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self._files: list[Path] = []
        self._places = np.full((int(numbers.max(initial=-1)) + 1, 2), -1, dtype=np.int32)  # (file, index in it)
        files = list_shards(folder)
        for block in np.unique(numbers // ROWS_PER_SHARD):
            for path in files[int(block)]:
                for index, row in enumerate(rows_of(path)):
                    if row < len(self._places):
                        self._places[row] = (len(self._files), index)
                self._files.append(path)

    def missing(self) -> np.ndarray:
        """The numbers of the source's rows that are in no file."""
        return self._numbers[self._places[self._numbers, 0] < 0]

    def read(self, row: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
        """Moments float32 (3C, h, w) and sizes (3, 2) of a row of the source. Raises BadRow."""
        number = int(self._numbers[row])
        file, index = self._places[number]
        shard, bad_rows = _open_shard(self._files[file])
        if reason := bad_rows.get(str(number)):
            raise BadRow(reason)
        moments = shard.get_slice(str(number))[variant : variant + 1][0]
        return moments.astype(np.float32), shard.get_slice("sizes")[index : index + 1, variant : variant + 1][0, 0]


def list_shards(folder: Path) -> defaultdict[int, list[Path]]:
    """The files of a folder by the number of their block."""
    found = defaultdict(list)
    for path in sorted(folder.glob("rows-*.safetensors")):
        found[int(path.name.split("-")[1])].append(path)
    return found


def rows_of(path: Path) -> list[int]:
    """The numbers of the rows in a file, bad ones included; none for a damaged file."""
    try:
        with safe_open(path, framework="np") as shard:
            return json.loads(shard.metadata()["rows"])
    except (SafetensorError, OSError):
        return []


def crop_positions(number: int, num_crops: int, geometry: Geometry) -> list[tuple[float, float]]:
    """The positions (y, x) in [0, 1) of the crops that are cached of a row: the same in every run."""
    is_fixed = geometry.center_crop or geometry.resize_mode == "squash"
    return [(0.5, 0.5)] if is_fixed else [fixed_crop(number, crop) for crop in range(num_crops)]


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: Path) -> tuple[safe_open, dict[str, str]]:
    """The file, and the reasons of its bad rows."""
    shard = safe_open(path, framework="np")
    return shard, json.loads(shard.metadata()["bad_rows"])
