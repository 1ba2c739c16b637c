"""What kind of source a user has given, found out by looking at it."""

from __future__ import annotations

import re
from pathlib import Path

from data_preparation.importing.folders import SUBFOLDERS, find_folders
from data_preparation.importing.seeds import has_seeds
from data_preparation.importing.tables import SUFFIXES as TABLE_SUFFIXES
from utils.data.rows import METADATA_NAMES
from utils.errors import InputError

SAVED_NAMES = ("dataset_dict.json", "state.json")
DATA_SUFFIXES = (".parquet", ".arrow")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_format(source: str, edited_dir: Path | None, said: str | None = None) -> tuple[str, Path | str]:
    """("folders", "seeds", "dataset" or "table", the folder, file or Hub id). said: by --format. Raises InputError.

    A folder with a metadata file is a dataset even where its subfolders are called original/ and edited/: the file
    says what belongs together.
    """
    path = Path(source).expanduser().absolute()  # a worker of Ray has another working folder
    if said == "dataset":
        return said, path if path.exists() else source
    if said is not None or edited_dir is not None:
        if not path.exists() or (path.is_file() and said != "table"):
            raise InputError(f"--source {source}: there is no such folder" + (" or file" if said == "table" else ""))
        return said or "folders", path
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table", path
        raise InputError(
            f"--source {source}: a file must be a table ({', '.join(TABLE_SUFFIXES)}); unpack archives first"
        )
    if not path.is_dir():
        if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
            raise InputError(f"--source {source}: there is no such folder or file")
        return "dataset", source
    return _format_of_folder(path), path


def table_in(folder: Path) -> Path:
    """The one table in a folder. Raises InputError."""
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    if len(tables) != 1:
        names = ", ".join(path.name for path in tables) or "none"
        raise InputError(
            f"--source {folder} should hold one table ({', '.join(TABLE_SUFFIXES)}), but has {names}: give its file"
        )
    return tables[0]


def _format_of_folder(folder: Path) -> str:
    if has_seeds(folder):
        return "seeds"
    if any((folder / name).exists() for name in SAVED_NAMES) or _has_metadata(folder):
        return "dataset"
    if find_folders(folder, None) is not None:
        return "folders"
    if any(path.suffix.lower() in DATA_SUFFIXES for path in folder.rglob("*")):
        return "dataset"
    found = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if any(name.lower().endswith(TABLE_SUFFIXES) for name in found):
        return "table"
    examples = ", ".join(f"{one}/ {others[0]}/" for one, others in list(SUBFOLDERS.items())[:3])
    names = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") or "nothing"
    raise InputError(
        f"--source {folder} holds {names}: not a pair set that is known here. It can be two folders of pictures "
        f"(with --edited_dir, or subfolders such as {examples}), the original InstructPix2Pix's layout (seeds.json, or "
        "folders with prompt.json), a dataset (parquet, saved, or metadata.jsonl), or one table of paths or addresses; "
        "--format says which"
    )


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in METADATA_NAMES)
