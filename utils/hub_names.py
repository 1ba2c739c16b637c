"""What users name a model or a dataset by: a path on this machine, or an id on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")
_SAMPLED_BYTES = 2**16  # at each end of a file


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path: it exists, or is not written like an id ("owner/name", or "name" alone)."""
    return Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name)


def is_hub_id(name: str) -> bool:
    """Whether `name` is written like an id on the Hub and is not a path on this machine."""
    return not looks_like_path(name)


def public_name(name: str) -> str:
    """A Hub id unchanged; of a path only the last part, because the rest is private."""
    return Path(name).expanduser().resolve().name if looks_like_path(name) else name


def snapshot_revision(path: Path) -> str | None:
    """The commit of a file or folder in the Hub's cache; None elsewhere."""
    match = _SNAPSHOT.search(path.as_posix())
    return match[1] if match else None


def find_revision(name: str, revision: str | None, *files: str) -> str:
    """The commit of a Hub repository, or a digest of the files of a local path.

    The first of `files` that the repository has is downloaded, so the answer is the same before and after the model
    itself is. Raises OSError when none can be had.
    """
    from huggingface_hub import hf_hub_download

    if Path(name).expanduser().exists():
        return digest_files(Path(name).expanduser())
    for file in files[:-1]:
        try:
            return snapshot_revision(Path(hf_hub_download(name, file, revision=revision)))
        except OSError:  # the repository lacks it, or the Hub is out of reach; the last file decides
            continue
    return snapshot_revision(Path(hf_hub_download(name, files[-1], revision=revision)))


def digest_files(path: Path) -> str:
    """A digest of a file or of all files of a folder: their names, sizes, first and last bytes."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(file.stat().st_size - _SAMPLED_BYTES, 0))
            digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()
