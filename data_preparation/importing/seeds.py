"""The layout that the original InstructPix2Pix generates and trains on.

seeds.json                     [[folder, [seed, ...]], ...]
0000001/prompt.json            {"input" or "caption": ..., "edit": ..., "output": ...}
0000001/1234_0.jpg             before, and 1234_1.jpg after
0000001/metadata.jsonl         {"seed": 1234, "p2p_threshold": ..., "cfg_scale": ..., "clip_sim_0": ..., ...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_preparation.importing.folders import digest_of
from data_preparation.importing.pairs import Found, Reader
from data_preparation.importing.provenance import numbers_of
from utils.errors import InputError
from utils.pixels import BadRow

SEEDS, PROMPT, METADATA = "seeds.json", "prompt.json", "metadata.jsonl"
PICTURE = re.compile(r"(?P<seed>\d+)_(?P<side>[01])\.(jpg|jpeg|png|webp)", re.IGNORECASE)
SETTINGS = ("p2p_threshold", "cfg_scale")
EXTENSIONS = ("jpg", "png", "jpeg", "webp")


@dataclass(frozen=True)
class SeedFolders:
    """prompts: (folder, its seeds) each. samples_per_prompt: how many of them are taken, None for all."""

    folder: Path
    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    samples_per_prompt: int | None = None

    @property
    def num_items(self) -> int:
        return len(self.prompts)

    def open(self) -> Reader:
        def read(items: Sequence[int]) -> Iterator[tuple[int, Found | BadRow]]:
            for item in items:
                try:
                    yield from ((item, found) for found in self._pairs(*self.prompts[item]))
                except BadRow as error:
                    yield item, error

        return read

    def identity(self) -> dict[str, Any]:
        return {"format": "seeds", "prompts": digest_of(self.prompts), "samples_per_prompt": self.samples_per_prompt}

    def _pairs(self, name: str, seeds: tuple[int, ...]) -> Iterator[Found]:
        folder = self.folder / name
        texts = read_prompt(folder)
        metadata = read_metadata(folder)
        if self.samples_per_prompt is not None:
            # The best by direction first, as the reference writes them; a stable sort where none is known.
            seeds = sorted(seeds, key=lambda seed: -numbers_of(metadata.get(seed, {})).get("clip_sim_dir", 0.0))
            seeds = seeds[: self.samples_per_prompt]
        for seed in seeds:
            facts = metadata.get(seed, {})
            provenance = texts | {
                "source": name,
                "seed": seed,
                "scores": {key: number for key, number in numbers_of(facts).items() if key.startswith("clip_sim")}
                or None,
                "settings": {key: facts[key] for key in SETTINGS if key in facts} or None,
            }
            prompts = [provenance.pop("edit")]
            yield Found(*(_picture(folder, seed, side) for side in (0, 1)), prompts, provenance)


def find_seeds(folder: Path, samples_per_prompt: int | None = None) -> SeedFolders:
    """What seeds.json lists; without that file, what the folders hold, in the order of their names."""
    path = folder / SEEDS
    prompts = _read_seeds(path) if path.is_file() else _list_folders(folder)
    if not prompts:
        raise InputError(
            f"{path if path.is_file() else folder} names no pair: neither seeds.json nor a folder with {PROMPT}"
        )
    return SeedFolders(folder, prompts, samples_per_prompt)


def has_seeds(folder: Path) -> bool:
    """Whether a folder looks like this layout."""
    return (folder / SEEDS).is_file() or next(folder.glob(f"*/{PROMPT}"), None) is not None


def read_prompt(folder: Path) -> dict[str, str]:
    """{"original_prompt", "edit", "edited_prompt"} of a folder. Raises `BadRow`."""
    if not folder.is_dir():
        raise BadRow(f"no such folder: {folder.name}")
    try:
        values = json.loads((folder / PROMPT).read_text(encoding="utf-8"))
        # The released prompts say `input`; the ones that the reference's own script makes of captions, `caption`.
        caption = values["input"] if "input" in values else values["caption"]
        return {"original_prompt": caption, "edit": values["edit"], "edited_prompt": values["output"]}
    except FileNotFoundError:
        raise BadRow(f"no {PROMPT}") from None
    except (OSError, ValueError, TypeError) as error:
        raise BadRow(f"{PROMPT} cannot be read: {error}") from None
    except KeyError as error:
        raise BadRow(f"{PROMPT} lacks a key: {error}") from None


def read_metadata(folder: Path) -> dict[int, dict[str, Any]]:
    """What was drawn and measured, by seed; the last line of a seed holds (a run that was repeated appends its own)."""
    path, found = folder / METADATA, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            values = json.loads(line)
            found[int(values["seed"])] = values
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a crash; the pictures are there all the same
    return found


def _picture(folder: Path, seed: int, side: int) -> Path:
    paths = [folder / f"{seed}_{side}.{extension}" for extension in EXTENSIONS]
    return next((path for path in paths if path.is_file()), paths[0])


def _read_seeds(path: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not JSON: {error}. Remove it, and the folders beside it are read instead"
        ) from None
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a list, [[folder, [seed, ...]], ...], not {type(entries).__name__}")
    wrong = [
        f"{path}, entry {index} is {str(entry)[:60]}" for index, entry in enumerate(entries) if not _is_entry(entry)
    ]
    if wrong:
        raise InputError.from_problems(
            [*wrong[:5], f"{len(wrong)} of {len(entries)} entries are not [folder, [seed, ...]]"]
        )
    return tuple((name, tuple(int(seed) for seed in seeds)) for name, seeds in entries)


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)):
        return False
    return all(str(seed).isdecimal() and 0 <= int(seed) < 2**63 for seed in entry[1])


def _list_folders(folder: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    prompts = []
    for path in sorted(folder.glob(f"*/{PROMPT}")):
        sides: dict[int, set[str]] = {}
        for file in path.parent.iterdir():
            if match := PICTURE.fullmatch(file.name):
                sides.setdefault(int(match["seed"]), set()).add(match["side"])
        seeds = tuple(sorted(seed for seed, found in sides.items() if len(found) == 2))
        if seeds:
            prompts.append((path.parent.name, seeds))
    return tuple(prompts)
