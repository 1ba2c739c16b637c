"""The layout that the original InstructPix2Pix generates and trains on.

seeds.json                     [[folder, [seed, ...]], ...]
0000001/prompt.json            {"input" or "caption": ..., "edit": ..., "output": ...}
0000001/1234_0.jpg             original image; 1234_1.jpg is the edited image
"""

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.errors import InputError
from utils.pixels import BadRow

logger = logging.getLogger(__name__)

SEEDS, PROMPT = "seeds.json", "prompt.json"
IMAGE_NAME = re.compile(r"(?P<seed>\d+)_(?P<side>[01])\.(jpg|jpeg|png|webp)", re.IGNORECASE)
EXTENSIONS = ("jpg", "png", "jpeg", "webp")
READERS = 16  # threads: most of the time is the disk's latency
FolderSeeds = tuple[tuple[str, tuple[int, ...]], ...]  # (folder, its seeds) each


def has_seed_folders(folder: Path) -> bool:
    return (folder / SEEDS).is_file() or next(folder.glob(f"*/{PROMPT}"), None) is not None


def list_seeds(folder: Path) -> FolderSeeds:
    """The folders and seeds that seeds.json lists; without that file, those of all folders. Raises InputError."""
    path = folder / SEEDS
    if any(folder.glob("*.zip")) and next(folder.glob(f"*/{PROMPT}"), None) is None:
        raise InputError(f"{folder} has zip files that are not unpacked: run unzip '{folder}/*.zip' -d {folder}")
    prompts = _read_seeds(path) if path.is_file() else _list_folders(folder)
    if not prompts:
        raise InputError(
            f"{path if path.is_file() else folder} names no pair: give a folder with seeds.json, or whose subfolders "
            f"hold {PROMPT} and images"
        )
    return prompts


def read_pairs(folder: Path) -> dict[str, list[str | None]]:
    """The columns original_image and edited_image (paths) and edit_prompt of all pairs, one row for each seed.

    Images are not looked at: with hundreds of thousands of folders that takes long. A prompt that cannot be read is
    None, so that its rows are skipped and counted. Folders that do not exist are left out with a warning: seeds.json
    lists those of all zip files of the download. Raises InputError.
    """
    folder = folder.resolve()  # relative paths would start from the folder
    listed, existing = list_seeds(folder), {entry.name for entry in os.scandir(folder)}
    prompts = tuple(entry for entry in listed if entry[0].partition("/")[0] in existing)
    absent = [name for name, _ in listed if name.partition("/")[0] not in existing]
    if absent:
        counts = f"{len(absent):,} of the {len(listed):,} folders that {folder / SEEDS} lists do not exist"
        named = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        if not prompts:
            raise InputError(f"{counts}: give the folder in which they are ({named})")
        logger.warning("%s and are not used: %s", counts, named)
    extension = _find_extension(folder, prompts)

    def read(name: str) -> str | None:
        try:
            return read_prompt(folder / name)[1]
        except BadRow:
            return None

    with ThreadPoolExecutor(READERS) as threads:
        edits = threads.map(read, [name for name, _ in prompts])
        edits = list(tqdm(edits, total=len(prompts), desc="Reading prompts", unit="prompt", disable=None, leave=False))
    rows: dict[str, list[str | None]] = {"original_image": [], "edit_prompt": [], "edited_image": []}
    for (name, seeds), edit in zip(prompts, edits, strict=True):
        for seed in seeds:
            rows["original_image"].append(str(folder / name / f"{seed}_0.{extension}"))
            rows["edited_image"].append(str(folder / name / f"{seed}_1.{extension}"))
            rows["edit_prompt"].append(edit)
    return rows


def read_prompt(folder: Path) -> tuple[str, str, str]:
    """(original caption, edit, edited caption) of a folder. Raises BadRow."""
    if not folder.is_dir():
        raise BadRow(f"no such folder: {folder.name}")
    try:
        values = json.loads((folder / PROMPT).read_text(encoding="utf-8"))
        # The published dataset says `input`; the reference's own script writes `caption`.
        return values["input"] if "input" in values else values["caption"], values["edit"], values["output"]
    except FileNotFoundError:
        raise BadRow(f"no {PROMPT}") from None
    except (OSError, ValueError, TypeError) as error:
        raise BadRow(f"{PROMPT} cannot be read: {error}") from None
    except KeyError as error:
        raise BadRow(f"{PROMPT} misses a key: {error}") from None


def find_seed_image(folder: Path, seed: int, side: int) -> Path:
    paths = [folder / f"{seed}_{side}.{extension}" for extension in EXTENSIONS]
    return next((path for path in paths if path.is_file()), paths[0])


def _find_extension(folder: Path, prompts: FolderSeeds) -> str:
    name, seeds = next(((name, seeds) for name, seeds in prompts if seeds), ("", (0,)))
    return find_seed_image(folder / name, seeds[0], 0).suffix[1:]


def _read_seeds(path: Path) -> FolderSeeds:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}. Remove it to use all folders beside it") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a list, [[folder, [seed, ...]], ...], not {type(entries).__name__}")
    wrong = [f"{path}, entry {index}: {str(one)[:60]}" for index, one in enumerate(entries) if not _is_entry(one)]
    if wrong:
        total = f"{len(wrong)} of {len(entries)} entries are not [folder, [seed, ...]]"
        raise InputError.from_problems([*wrong[:5], total])
    return tuple((name, tuple(int(seed) for seed in seeds)) for name, seeds in entries)


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)):
        return False
    return all(str(seed).isdecimal() and 0 <= int(seed) < 2**63 for seed in entry[1])


def _list_folders(folder: Path) -> FolderSeeds:
    prompts = []
    for path in sorted(folder.glob(f"*/{PROMPT}")):
        sides: dict[int, set[str]] = {}
        for file in path.parent.iterdir():
            if match := IMAGE_NAME.fullmatch(file.name):
                sides.setdefault(int(match["seed"]), set()).add(match["side"])
        if seeds := tuple(sorted(seed for seed, found in sides.items() if len(found) == 2)):
            prompts.append((path.parent.name, seeds))
    return tuple(prompts)
