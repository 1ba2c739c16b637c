"""WebDataset tars, read in place: the files of a sample have one name and different extensions.

0001.original.jpg, 0001.edited.jpg, 0001.txt -> the columns original, edited and txt. The keys of a .json are columns.
"""

import json
from pathlib import Path

from utils.archives import list_members, member_path, read_member
from utils.errors import InputError
from utils.image_formats import has_image_suffix

TEXT_EXTENSIONS = ("txt", "text", "caption", "cls", "id")


def find_tars(folder: Path, split: str) -> list[Path]:
    """The tars of a split: in the folder of its name, or named SPLIT-*; for "train", else all."""
    inside = sorted((folder / split).glob("*.tar")) if (folder / split).is_dir() else []
    tars = sorted(folder.glob("*.tar"))
    if inside or not tars:
        return inside
    named = [tar for tar in tars if tar.name.startswith(split)]
    return named or (tars if split == "train" else [])


def refuse_missing_split(folder: Path, split: str) -> None:
    """Raise InputError if a folder has tars, and none of this split."""
    if any(folder.glob("*.tar")) and not find_tars(folder, split):
        raise InputError(f"--dataset_split {split!r}: none of the tars of {folder} is named {split}-*.tar")


def read_samples(tars: list[Path]) -> dict[str, list]:
    """The columns of all samples; image columns hold paths for `utils.archives.read_member`. Raises InputError."""
    samples: dict[tuple[Path, str], dict] = {}
    for tar in tars:
        try:
            for member in list_members(tar):
                folder, _, name = member.rpartition("/")
                key, _, extension = name.partition(".")
                values = samples.setdefault((tar, f"{folder}/{key}"), {"__key__": f"{folder}/{key}".lstrip("/")})
                values |= _read_values(member_path(tar, member), extension)
        except (OSError, ValueError) as error:
            raise InputError(f"{tar} cannot be read as a WebDataset: {error}") from None
    columns = dict.fromkeys(column for values in samples.values() for column in values)
    return {column: [values.get(column) for values in samples.values()] for column in columns}


def _read_values(path: str, extension: str) -> dict:
    extension = extension.lower()
    if has_image_suffix(f"x.{extension}"):
        return {extension.rpartition(".")[0] or "image": path}
    if extension.rpartition(".")[2] in TEXT_EXTENSIONS:
        return {extension: read_member(path).decode("utf-8", errors="replace").strip()}
    if extension.rpartition(".")[2] == "json":
        values = json.loads(read_member(path))
        return values if isinstance(values, dict) else {extension: str(values)}
    return {}
