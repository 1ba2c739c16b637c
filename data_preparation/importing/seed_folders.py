"""Pairs in the layout that the original InstructPix2Pix generates and trains on.

seeds.json                     [[folder, [seed, ...]], ...]
0000001/prompt.json            {"input" or "caption": ..., "edit": ..., "output": ...}
0000001/1234_0.jpg             original image; 1234_1.jpg is the edited image
0000001/metadata.jsonl         {"seed": 1234, "p2p_threshold": ..., "cfg_scale": ..., "clip_sim_0": ..., ...}
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_preparation.importing.dataset_pairs import finite_numbers
from data_preparation.importing.source_pairs import ReadPairs, SourcePair, digest_json, read_each
from utils.errors import InputError
from utils.pixels import BadRow

SEEDS, PROMPT, METADATA = "seeds.json", "prompt.json", "metadata.jsonl"
IMAGE_NAME = re.compile(r"(?P<seed>\d+)_(?P<side>[01])\.(jpg|jpeg|png|webp)", re.IGNORECASE)
SETTINGS = ("p2p_threshold", "cfg_scale")
EXTENSIONS = ("jpg", "png", "jpeg", "webp")
FolderSeeds = tuple[tuple[str, tuple[int, ...]], ...]  # (folder, its seeds) each


@dataclass(frozen=True)
class SeedFolderSource:
    """An item is a folder. samples_per_prompt: how many of its pairs are used, None for all."""

    folder: Path
    prompts: FolderSeeds
    samples_per_prompt: int | None = None

    @property
    def num_items(self) -> int:
        return len(self.prompts)

    def open(self) -> ReadPairs:
        return partial(read_each, pairs_of=self._pairs_of)

    def identity(self) -> dict[str, Any]:
        return {"format": "seeds", "prompts": digest_json(self.prompts), "samples_per_prompt": self.samples_per_prompt}

    def _pairs_of(self, item: int) -> Iterator[SourcePair]:
        name, seeds = self.prompts[item]
        folder = self.folder / name
        original_prompt, edit, edited_prompt = read_prompt(folder)
        metadata = read_seed_metadata(folder)
        if self.samples_per_prompt is not None:
            # The best direction first, as the reference writes them; the sort is stable if it is unknown.
            seeds = sorted(seeds, key=lambda seed: -finite_numbers(metadata.get(seed, {})).get("clip_sim_dir", 0.0))
            seeds = seeds[: self.samples_per_prompt]
        for seed in seeds:
            values = metadata.get(seed, {})
            scores = {key: number for key, number in finite_numbers(values).items() if key.startswith("clip_sim")}
            provenance = {
                "original_prompt": original_prompt,
                "edited_prompt": edited_prompt,
                "source": name,
                "seed": seed,
                "scores": scores or None,
                "settings": {key: values[key] for key in SETTINGS if key in values} or None,
            }
            yield SourcePair(_find_image(folder, seed, 0), _find_image(folder, seed, 1), [edit], provenance)


def find_seed_folders(folder: Path, samples_per_prompt: int | None = None) -> SeedFolderSource:
    """The pairs that seeds.json lists; without that file, those of all folders. Raises InputError."""
    path = folder / SEEDS
    prompts = _read_seeds(path) if path.is_file() else _list_folders(folder)
    if not prompts:
        raise InputError(
            f"{path if path.is_file() else folder} names no pair: give a folder with seeds.json, or whose subfolders "
            f"hold {PROMPT} and images"
        )
    return SeedFolderSource(folder, prompts, samples_per_prompt)


def has_seed_folders(folder: Path) -> bool:
    return (folder / SEEDS).is_file() or next(folder.glob(f"*/{PROMPT}"), None) is not None


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


def read_seed_metadata(folder: Path) -> dict[int, dict[str, Any]]:
    """Settings and scores by seed; the last line of a seed counts, because a repeated run appends."""
    path, by_seed = folder / METADATA, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            values = json.loads(line)
            by_seed[int(values["seed"])] = values
        except (ValueError, KeyError, TypeError):
            continue  # a crash cut the line short; the images exist all the same
    return by_seed


def _find_image(folder: Path, seed: int, side: int) -> Path:
    paths = [folder / f"{seed}_{side}.{extension}" for extension in EXTENSIONS]
    return next((path for path in paths if path.is_file()), paths[0])


def _read_seeds(path: Path) -> FolderSeeds:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}. Remove it to import all folders beside it") from None
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
