"""How users name a model or a dataset: a path on this machine, or an id on the Hugging Face Hub."""

import hashlib
import re
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/(\w[\w./-]*\.(?:safetensors|bin|pt|pth|ckpt))")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")
_SAMPLED_BYTES = 2**16  # at each end of a file


def looks_like_path(name: str) -> bool:
    """Whether `name` is a path: it exists on this machine, or it does not have the form of a Hub id.

    A Hub id is "name" or "owner/name", each of letters, digits, "_", "-" and ".", and not starting with "-" or ".".
    """
    return not _HUB_ID.fullmatch(name) or Path(name).exists()


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id and is not a path on this machine."""
    return not looks_like_path(name)


def split_hub_file(name: str) -> tuple[str, str] | None:
    """(repository, file) of a name such as owner/repository/folder/file.safetensors; None for any other name."""
    match = _HUB_FILE.fullmatch(name)
    return (match[1], match[2]) if match and not Path(name).exists() else None


def public_name(name: str) -> str:
    """What may be published of a name: a Hub id unchanged, of a path only the last part."""
    is_path = looks_like_path(name) and split_hub_file(name) is None
    return Path(name).expanduser().resolve().name if is_path else name


def snapshot_revision(path: Path) -> str | None:
    """The commit of a file or folder in the Hub's cache; None elsewhere."""
    match = _SNAPSHOT.search(path.as_posix())
    return match[1] if match else None


def find_revision(name: str, revision: str | None, *files: str) -> str | None:
    """The commit of a Hub repository, or a digest of the files of a local path.

    Downloads the first of `files` that the repository has: the answer does not depend on whether the model is cached.
    Raises OSError if none of them can be downloaded.
    """
    from huggingface_hub import hf_hub_download

    if Path(name).expanduser().exists():
        return digest_files(Path(name).expanduser())
    for file in files[:-1]:
        try:
            return snapshot_revision(Path(hf_hub_download(name, file, revision=revision)))
        except OSError:  # not in the repository, or the Hub is out of reach: the last file decides
            continue
    return snapshot_revision(Path(hf_hub_download(name, files[-1], revision=revision)))


def digest_files(path: Path) -> str:
    """A digest of a file, or of all files in a folder: their names, sizes, and first and last 64 KiB."""
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
