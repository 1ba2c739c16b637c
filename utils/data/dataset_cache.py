"""What `datasets` copies into its cache before a dataset can be read in any order, said before it happens."""

import logging
import shutil
from pathlib import Path

import datasets

from utils.errors import InputError

logger = logging.getLogger(__name__)

ANNOUNCED_BYTES = 2_000_000_000
RESERVE = 1.05  # the copy is about as large as the files


def announce_copy(builder: datasets.DatasetBuilder, name: str, folder: Path) -> None:
    """Log the size of the copy that datasets makes, if it is large. Raises InputError if the disk is too small.

    A parquet file is compressed in groups of rows, so that no single row of it can be read fast: datasets writes an
    uncompressed copy once. `--streaming` reads the files in place.
    """
    cache = Path(builder.cache_dir)
    if cache.exists():
        return
    files = [Path(str(path)) for paths in (builder.config.data_files or {}).values() for path in paths]
    if folder.is_dir():
        num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    else:
        num_bytes = (builder.info.download_size or 0) + (builder.info.dataset_size or 0)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    what = "copies" if folder.is_dir() else "downloads and copies"
    if num_bytes * RESERVE > free:
        raise InputError(
            f"{name}: datasets {what} {num_bytes / 1e9:.1f} GB into {existing}, where {free / 1e9:.1f} GB are free. "
            "Give --cache_dir on a larger disk, or --streaming, which reads the files in place"
        )
    if num_bytes > ANNOUNCED_BYTES:
        logger.warning("%s: datasets %s %.1f GB into %s, once", name, what, num_bytes / 1e9, cache)
