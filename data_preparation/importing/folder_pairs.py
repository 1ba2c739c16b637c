"""Pairs of two folders, matched by file names, and their instructions."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_preparation.importing.source_pairs import ReadPairs, SourcePair, clean_prompts, digest_json, read_each
from data_preparation.photographs import SUFFIXES
from utils.data.rows import read_columns
from utils.errors import InputError

# Subfolders before and after the edit; for restoration, the clean photographs are the edited images.
SUBFOLDERS = {
    "original": ("edited", "target", "cartoon"),
    "originals": ("edited", "edits", "targets"),
    "original_image": ("edited_image",),
    "original_images": ("edited_images",),
    "input_image": ("edited_image",),
    "input": ("target", "output", "edited", "gt", "groundtruth"),
    "inputs": ("targets", "outputs", "edited"),
    "before": ("after",),
    "source": ("target", "edited"),
    "sources": ("targets",),
    "src": ("dst", "tgt", "edited"),
    "a": ("b",),
    "traina": ("trainb",),
    "lq": ("gt", "hq"),
    "low": ("high",),
    "blur": ("sharp",),
    "noisy": ("clean", "gt"),
    "rainy": ("clean", "gt"),
    "hazy": ("clean", "clear", "gt"),
}
# What the names of the two images of a pair may end in, such as cat.jpg and cat_edited.png.
ENDING = re.compile(
    r"(?<=.)[_-](original|edited|edit|input|output|source|target|src|tgt|before|after|in|out|a|b|gt|cartoon|cartoonized"
    r"|result)\Z",
    re.IGNORECASE | re.DOTALL,
)
PROMPT_FILES = ("prompts.txt", "prompts.csv", "prompts.jsonl")
NAME_COLUMNS = ("file_name", "filename", "name", "file", "image", "original_image", "original", "input")
PROMPT_COLUMNS = ("edit_prompt", "instruction", "prompt", "edit", "edit_instruction", "text", "caption")
MAX_LISTED = 8


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
        return [SourcePair(self.originals / original, self.edited / edited, prompts, {"source": original})]

    def identity(self) -> dict[str, Any]:
        names = [pair[:2] for pair in self.pairs]
        sizes = [((self.originals / one).stat().st_size, (self.edited / two).stat().st_size) for one, two in names]
        # Each distinct list of instructions once, as pairs may share a long one.
        indices = {prompts: index for index, prompts in enumerate(dict.fromkeys(prompts for *_, prompts in self.pairs))}
        prompts = [list(indices), [indices[prompts] for *_, prompts in self.pairs]]
        return {"format": "folders", "pairs": digest_json([names, sizes, prompts])}


def find_folders(source: Path, edited_dir: Path | None) -> tuple[Path, Path] | None:
    """(folder of original images, folder of edited images): the given ones, or two subfolders of `SUBFOLDERS`."""
    if edited_dir is not None:
        return source, edited_dir.expanduser().absolute()
    found = {path.name.casefold(): path for path in sorted(source.iterdir()) if path.is_dir()}
    pairs = [(found[a], found[b]) for a in SUBFOLDERS if a in found for b in SUBFOLDERS[a] if b in found]
    if len(pairs) > 1:
        names = "; ".join(f"{one.name} and {two.name}" for one, two in pairs)
        raise InputError(
            f"--source {source}: has several pairs of folders ({names}); choose two with --source and --edited_dir"
        )
    return pairs[0] if pairs else None


def find_folder_pairs(
    source: Path, originals: Path, edited: Path, common: Sequence[str], prompt_file: Path | None
) -> FolderSource:
    """The pairs of two folders with their instructions; prints a warning about unused files. Raises InputError.

    common: instructions for every pair. Without them, `prompt_file` or a file of `PROMPT_FILES` in `source` is read.
    """
    pairs, problems = match_files(originals, edited)
    if not pairs:
        first = f"no image of {originals} has the name of an image in {edited}"
        raise InputError.from_problems([first, *problems])
    prompts = [tuple(clean_prompts(common))] * len(pairs)
    if not common:
        path = prompt_file or next((source / name for name in PROMPT_FILES if (source / name).is_file()), None)
        if path is None:
            raise InputError(
                f"--source {source}: the pairs have no instructions; give --edit_prompt, --task or --prompts, or "
                f"create {source / PROMPT_FILES[0]} (in each line a name, a tab and the instruction), .csv or .jsonl"
            )
        prompts, unknown = assign_prompts(path, [pair[0] for pair in pairs])
        problems += _list_files("names without exactly one pair", path, unknown)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return FolderSource(originals, edited, tuple((*pair, some) for pair, some in zip(pairs, prompts, strict=True)))


def match_files(originals: Path, edited: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(paths of each pair below the two folders, sorted; one line for each kind of file that is not used).

    The images of a pair have the same path without suffix, else the same path without `ENDING`. Files of a
    folder that differ only in their suffix are not used, because either could be meant.
    """
    lefts, left_duplicates = _files_by_name(originals, edited)
    rights, right_duplicates = _files_by_name(edited, originals)
    names = {name: name for name in lefts if name in rights}
    left_stems = _group_by_stem(name for name in lefts if name not in names)
    right_stems = _group_by_stem(name for name in rights if name not in names)
    for stem, candidates in left_stems.items():
        if len(candidates) == 1 and len(right_stems.get(stem, ())) == 1:
            names[candidates[0]] = right_stems[stem][0]
    used = set(names.values())
    problems = [
        *_list_files("files with the same name but different suffixes", originals, left_duplicates),
        *_list_files("files with the same name but different suffixes", edited, right_duplicates),
        *_list_files("files without a partner", originals, [lefts[name] for name in lefts if name not in names]),
        *_list_files("files without a partner", edited, [rights[name] for name in rights if name not in used]),
    ]
    return sorted((lefts[left], rights[right]) for left, right in names.items()), problems


def assign_prompts(path: Path, names: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(instructions of each file in `names`, names in `path` that fit no file or several); never by position.

    Raises InputError.
    """
    entries = _read_text(path, len(names)) if path.suffix.lower() == ".txt" else _read_table(path)
    if isinstance(entries, tuple):
        return [entries] * len(names), []
    by_path = {_without_suffix(name): index for index, name in enumerate(names)}
    by_base = defaultdict(list)
    for name, index in by_path.items():
        for base in {PurePosixPath(name).name, ENDING.sub("", PurePosixPath(name).name)}:
            by_base[base].append(index)
    prompts, unknown = [[] for _ in names], []
    for name, prompt in entries:
        key = _without_suffix(name)
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


def _files_by_name(folder: Path, other: Path) -> tuple[dict[str, str], list[str]]:
    """(image files by path without suffix, files that share one); `other` may lie in `folder`, and is left out."""
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist")
    is_inside = other.resolve().is_relative_to(folder.resolve())
    found = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        is_in_other = is_inside and path.resolve().is_relative_to(other.resolve())
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_in_other:
            relative = path.relative_to(folder).as_posix()
            found[_without_suffix(relative)].append(relative)
    duplicates = [path for group in found.values() if len(group) > 1 for path in group]
    return {name: group[0] for name, group in found.items() if len(group) == 1}, duplicates


def _without_suffix(path: str) -> str:
    """A path without the suffix of an image file."""
    pure = PurePosixPath(path.replace("\\", "/"))
    return str(pure.with_suffix("")) if pure.suffix.lower() in SUFFIXES else str(pure)


def _group_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[ENDING.sub("", name)].append(name)
    return groups


def _list_files(what: str, place: Path, names: list[str]) -> list[str]:
    """["files without a partner in photos: a.png, b.png, c.png"], or [] for no names."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return [f"{what} in {place}: {', '.join(names[:MAX_LISTED])}{more}"] if names else []
