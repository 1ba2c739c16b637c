"""A dataset of the Hub or of this machine as generators take it: its rows, a digest, a name and a licence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np

from utils.data.rows import open_rows
from utils.errors import InputError

NAME_COLUMNS = ("file_name", "source", "id", "image_id", "img_id", "key", "url", "URL", "filename")
SAMPLED_ROWS = 64  # of a dataset, whose content goes into the digest


def open_dataset(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
    if revision is not None and not Path(name).expanduser().is_dir():
        try:
            return datasets.load_dataset(name, config, split=split, revision=revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"cannot open {name} at revision {revision}: {error}") from error
    return open_rows(name, False, config, split, False, None)


def digest_rows(rows: datasets.Dataset, columns: list[str]) -> str:
    """Of the number of rows and of what is in some of them."""
    digest = hashlib.blake2b(json.dumps([len(rows), columns]).encode(), digest_size=16)
    for index in np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int)):
        for name, value in sorted(rows[int(index)].items()):
            if name in columns:
                content = value.get("bytes") or str(value.get("path")).encode() if isinstance(value, dict) else None
                digest.update(content if content is not None else json.dumps(value, default=str).encode())
    return digest.hexdigest()


def name_column(rows: datasets.Dataset) -> str | None:
    return next((name for name in NAME_COLUMNS if name in rows.features), None)


def whole_path(dataset: str) -> str:
    """A path from the root on, as a worker may run in another folder; a Hub id as it is."""
    path = Path(dataset).expanduser()
    return str(path.absolute()) if path.exists() else dataset


def public_name(dataset: str) -> str:
    """A Hub id as it is; of a path the last part alone, as the rest is the user's own."""
    path = Path(dataset).expanduser()
    return path.resolve().name if path.exists() else dataset


def find_license(dataset: str, rows: datasets.Dataset | None) -> str | None:
    """The licence of the card in a folder or on the Hub, or of the dataset's own metadata; None where it is unknown."""
    from huggingface_hub import DatasetCard

    path = Path(dataset).expanduser()
    try:
        if path.exists():
            readme = (path if path.is_dir() else path.parent) / "README.md"
            data = DatasetCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        else:
            data = DatasetCard.load(dataset, ignore_metadata_errors=True).data
        found = data.get("license_name") or data.get("license") if data else None
        found = found[0] if isinstance(found, list) and found else found
    except Exception:  # it only describes: neither a missing network nor an odd card may end a run
        found = None
    return found or (rows.info.license if rows is not None else None) or None
