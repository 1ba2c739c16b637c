"""Pairs of the original InstructPix2Pix, in the layout of utils/data/seed_folders.py, with their scores.

0000001/metadata.jsonl         {"seed": 1234, "p2p_threshold": ..., "cfg_scale": ..., "clip_sim_0": ..., ...}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_preparation.importing.dataset_pairs import finite_numbers
from data_preparation.importing.source_pairs import ReadPairs, SourcePair, digest_json, read_each
from utils.data.seed_folders import FolderSeeds, find_seed_image, list_seeds, read_prompt

METADATA = "metadata.jsonl"
SETTINGS = ("p2p_threshold", "cfg_scale")


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
            yield SourcePair(find_seed_image(folder, seed, 0), find_seed_image(folder, seed, 1), [edit], provenance)


def find_seed_folders(folder: Path, samples_per_prompt: int | None = None) -> SeedFolderSource:
    """The pairs that seeds.json lists; without that file, those of all folders. Raises InputError."""
    return SeedFolderSource(folder, list_seeds(folder), samples_per_prompt)


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
