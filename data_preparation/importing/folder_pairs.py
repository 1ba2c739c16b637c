"""Pairs of two folders, matched by file names, or of a folder for each pair, and their instructions."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from data_preparation.importing.dataset_pairs import CARTOONS
from data_preparation.importing.source_pairs import ReadPairs, SourcePair, clean_prompts, digest_json, read_each
from utils.data.column_words import ORIGINAL_WORDS, image_word
from utils.data.folder_pairs import list_files, match_files, read_captions, without_suffix
from utils.data.suffix_pairs import ENDING
from utils.data.tables import read_columns
from utils.errors import InputError
from utils.image_formats import has_image_suffix

MAX_PROBED = 20  # subfolders
PROMPT_FILES = ("prompts.txt", "prompts.csv", "prompts.jsonl")
NAME_COLUMNS = ("file_name", "filename", "name", "file", "image", "original_image", "original", "input")
PROMPT_COLUMNS = ("edit_prompt", "instruction", "prompt", "edit", "edit_instruction", "text", "caption")


@dataclass(frozen=True)
class FolderSource:
    """originals, edited: the folders. pairs: (path below `originals`, path below `edited`, instructions) each."""

    originals: Path
    edited: Path
    pairs: tuple[tuple[str, str, tuple[str, ...]], ...]

    @property
    def num_items(self) -> int:
        return len(self.pairs)

    def open(self) -> ReadPairs:
        return partial(read_each, pairs_of=self._pairs_of)

    def _pairs_of(self, item: int) -> list[SourcePair]:
        original, edited, prompts = self.pairs[item]
        is_cartoonized = PurePosixPath(edited).stem == CARTOONS
        return [
            SourcePair(self.originals / original, self.edited / edited, prompts, {"source": original}, is_cartoonized)
        ]

    def identity(self) -> dict[str, Any]:
        names = [pair[:2] for pair in self.pairs]
        sizes = [((self.originals / one).stat().st_size, (self.edited / two).stat().st_size) for one, two in names]
        # Each distinct list of instructions once, as pairs may share a long one.
        indices = {prompts: index for index, prompts in enumerate(dict.fromkeys(prompts for *_, prompts in self.pairs))}
        prompts = [list(indices), [indices[prompts] for *_, prompts in self.pairs]]
        return {"format": "folders", "pairs": digest_json([names, sizes, prompts])}


def find_folder_pairs(
    source: Path, originals: Path, edited: Path, common: Sequence[str], prompt_file: Path | None
) -> FolderSource:
    """The pairs of two folders with their instructions; prints a warning about unused files. Raises InputError.

    originals, edited: both are `source` if it has a folder for each pair, see `match_pair_folders`. common:
    instructions for every pair; without them, `prompt_file`, a file of `PROMPT_FILES` in `source`, or caption files
    beside the images are read.
    """
    pairs, problems = match_pair_folders(source) if originals == edited else match_files(originals, edited)
    if not pairs:
        first = f"no image of {originals} has the name of an image in {edited}"
        raise InputError.from_problems([first, *problems])
    prompts = [tuple(clean_prompts(common))] * len(pairs)
    if not common:
        path = prompt_file or next((source / name for name in PROMPT_FILES if (source / name).is_file()), None)
        if path is not None:
            prompts, unknown = assign_prompts(path, [pair[0] for pair in pairs])
            problems += list_files("names without exactly one pair", path, unknown)
        else:
            prompts = [tuple(clean_prompts(caption)) for caption in read_captions(originals, edited, pairs, source)]
        if not any(prompts):
            raise InputError(
                f"--source {source}: the pairs have no instructions; give --edit_prompt, --task or --prompts, create "
                f"{source / PROMPT_FILES[0]} (in each line a name, a tab and the instruction), .csv or .jsonl, or a "
                ".txt file of the name of each image"
            )
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return FolderSource(originals, edited, tuple((*pair, some) for pair, some in zip(pairs, prompts, strict=True)))


def match_pair_folders(source: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(paths of each pair, one line for each kind of folder that is not used) of a folder for each pair.

    As instruction-tuned-sd writes them: HASH/original_image.png and HASH/cartoonized_image.png.
    """
    pairs, unused = [], []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        pair = _find_pair(folder)
        unused += [] if pair else [folder.name]
        pairs += [tuple(path.relative_to(source).as_posix() for path in pair)] if pair else []
    return pairs, list_files("folders without exactly one original and one edited image", source, unused)


def has_pair_folders(source: Path) -> bool:
    """Whether one of the first subfolders holds a pair: there may be hundreds of thousands."""
    folders = (path for path in source.iterdir() if path.is_dir())
    return any(_find_pair(path) for path in islice(folders, MAX_PROBED))


def _find_pair(folder: Path) -> tuple[Path, Path] | None:
    """(original, edited image) of a folder with two images, one of which is named as an original."""
    images = [path for path in sorted(folder.iterdir()) if has_image_suffix(path) and path.is_file()]
    originals = [path for path in images if image_word(path.stem) in ORIGINAL_WORDS]
    if len(images) != 2 or len(originals) != 1:
        return None
    return originals[0], next(path for path in images if path != originals[0])


def assign_prompts(path: Path, names: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(instructions of each file in `names`, names in `path` that fit no file or several); never by position.

    Raises InputError.
    """
    entries = _read_text(path, len(names)) if path.suffix.lower() == ".txt" else _read_table(path)
    if isinstance(entries, tuple):
        return [entries] * len(names), []
    by_path = {without_suffix(name): index for index, name in enumerate(names)}
    by_base = defaultdict(list)
    for name, index in by_path.items():
        for base in {PurePosixPath(name).name, ENDING.sub("", PurePosixPath(name).name)}:
            by_base[base].append(index)
    prompts, unknown = [[] for _ in names], []
    for name, prompt in entries:
        key = without_suffix(name)
        candidates = [by_path[key]] if key in by_path else by_base[PurePosixPath(key).name]
        if len(candidates) == 1:
            prompts[candidates[0]].append(prompt)
        else:
            unknown.append(name)
    if not any(prompts):
        raise InputError(
            f"{path} names none of the images: it has {', '.join(unknown[:3])}; the images are {', '.join(names[:3])}"
        )
    return [tuple(clean_prompts(values)) for values in prompts], unknown


def _read_text(path: Path, num_pairs: int) -> list[tuple[str, str]] | tuple[str, ...]:
    """(name, instruction) of each line; or, if no line has a tab, a tuple of instructions for every pair."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    without_tab = [line for line in lines if "\t" not in line]
    if not lines:
        raise InputError(f"{path} is empty")
    if not without_tab:
        return [tuple(part.strip() for part in line.split("\t", 1)) for line in lines]
    if len(without_tab) < len(lines):
        raise InputError(f"{path}: this line has no tab between name and instruction: {without_tab[0][:80]}")
    if len(lines) == num_pairs > 1:
        raise InputError(
            f"{path} has as many lines as there are pairs ({num_pairs}), but no names: start each line with the name "
            "of its image and a tab. (Lines without names apply to every pair; give these with --edit_prompt)"
        )
    return tuple(lines)


def _read_table(path: Path) -> list[tuple[str, str]]:
    columns = read_columns(path)
    name_column = next((name for name in NAME_COLUMNS if name in columns), None)
    prompt_column = next((name for name in PROMPT_COLUMNS if name in columns and name != name_column), None)
    if name_column is None or prompt_column is None:
        raise InputError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; it needs a name ({', '.join(NAME_COLUMNS)}) "
            f"and an instruction ({', '.join(PROMPT_COLUMNS)})"
        )
    entries = []
    for name, prompt in zip(columns[name_column], columns[prompt_column], strict=True):
        if isinstance(name, str):
            entries += [(name, value) for value in (prompt if isinstance(prompt, list) else [prompt])]
    return entries
