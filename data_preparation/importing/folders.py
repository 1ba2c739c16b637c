"""Two folders of pictures that belong together by name, and the ways to ask for what lies between them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_preparation.importing.pairs import Found, Reader, usable_prompts
from data_preparation.photographs import SUFFIXES
from utils.data.rows import read_columns
from utils.errors import InputError
from utils.pixels import BadRow

# Names of subfolders, before and after the edit; those of photographs to restore have the clean ones as edited.
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
# What names of partners may end in, after a common beginning; the longest that fits is cut off.
ENDINGS = tuple(
    f"{mark}{word}"
    for mark in "_-"
    for word in (
        "original",
        "edited",
        "edit",
        "input",
        "output",
        "source",
        "target",
        "src",
        "tgt",
        "before",
        "after",
        "in",
        "out",
        "a",
        "b",
        "gt",
        "cartoon",
        "cartoonized",
        "result",
    )
)
PROMPT_FILES = ("prompts.txt", "prompts.csv", "prompts.jsonl")
NAME_COLUMNS = ("file_name", "filename", "name", "file", "image", "original_image", "original", "input")
PROMPT_COLUMNS = ("edit_prompt", "instruction", "prompt", "edit", "edit_instruction", "text", "caption")
NAMES_SHOWN = 8


@dataclass(frozen=True)
class FolderPairs:
    """originals, edited: the folders. pairs: (path below `originals`, path below `edited`, ways to ask) each."""

    originals: Path
    edited: Path
    pairs: tuple[tuple[str, str, tuple[str, ...]], ...]

    @property
    def num_items(self) -> int:
        return len(self.pairs)

    def open(self) -> Reader:
        def read(items: Sequence[int]) -> Iterator[tuple[int, Found | BadRow]]:
            for item in items:
                original, edited, prompts = self.pairs[item]
                yield item, Found(self.originals / original, self.edited / edited, prompts, {"source": original})

        return read

    def identity(self) -> dict[str, Any]:
        sizes = [
            ((self.originals / one).stat().st_size, (self.edited / two).stat().st_size) for one, two, _ in self.pairs
        ]
        names = [pair[:2] for pair in self.pairs]
        numbers = {ways: number for number, ways in enumerate(dict.fromkeys(ways for *_, ways in self.pairs))}
        ways = [list(numbers), [numbers[ways] for *_, ways in self.pairs]]  # phrasings stand in it once, not per pair
        return {"format": "folders", "pairs": digest_of([names, sizes, ways])}


def digest_of(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def find_folders(source: Path, edited_dir: Path | None) -> tuple[Path, Path] | None:
    """(folder of originals, folder of edited pictures): as given, or two subfolders with known names, else None."""
    if edited_dir is not None:
        return source, edited_dir.expanduser().absolute()
    found = {path.name.casefold(): path for path in sorted(source.iterdir()) if path.is_dir()}
    pairs = [
        (found[name], found[other])
        for name in SUBFOLDERS
        if name in found
        for other in SUBFOLDERS[name]
        if other in found
    ]
    if len(pairs) > 1:
        names = "; ".join(f"{one.name} and {two.name}" for one, two in pairs)
        raise InputError(
            f"--source {source} holds several pairs of folders ({names}): name two with --source and --edited_dir"
        )
    return pairs[0] if pairs else None


def match_files(originals: Path, edited: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(paths below the two folders of each pair, in order; a line for each kind of file that has no partner).

    Partners have the same path but for the kind of file; else the same but for one of `ENDINGS`. A name that two files
    of a folder have (cat.jpg and cat.png) is nobody's: either could be meant.
    """
    lefts, left_doubles = _by_name(originals, edited)
    rights, right_doubles = _by_name(edited, originals)
    names = {name: name for name in lefts if name in rights}
    short_lefts = _by_beginning(name for name in lefts if name not in names)
    short_rights = _by_beginning(name for name in rights if name not in names)
    for short, candidates in short_lefts.items():
        if len(candidates) == 1 and len(short_rights.get(short, ())) == 1:
            names[candidates[0]] = short_rights[short][0]
    pairs = sorted((lefts[left], rights[right]) for left, right in names.items())
    partners = set(names.values())
    problems = [
        _describe("twice under one name", originals, left_doubles),
        _describe("twice under one name", edited, right_doubles),
        _describe("without a partner", originals, [lefts[name] for name in lefts if name not in names]),
        _describe("without a partner", edited, [rights[name] for name in rights if name not in partners]),
    ]
    return pairs, [problem for problem in problems if problem]


def find_pairs(
    source: Path, originals: Path, edited: Path, common: Sequence[str], prompt_file: Path | None
) -> FolderPairs:
    """The pairs of two folders with their instructions; what is left out is told on stderr. Raises InputError.

    common: ways to ask, for every pair. Without them, `prompt_file` or a prompts.txt, .csv or .jsonl in `source`.
    """
    pairs, problems = match_files(originals, edited)
    if not pairs:
        raise InputError.from_problems(
            [f"no picture of {originals} has a partner of the same name in {edited}", *problems]
        )
    prompts = [tuple(usable_prompts(common))] * len(pairs)
    if not common:
        path = prompt_file or next((source / name for name in PROMPT_FILES if (source / name).is_file()), None)
        if path is None:
            raise InputError(
                f"the pairs of {source} have no instruction: give --edit_prompt, --task or --prompts, or put a "
                f"prompts.txt (a name, a tab and the instruction in each line), .csv or .jsonl into {source}"
            )
        prompts, more = assign_prompts(path, [pair[0] for pair in pairs])
        problems += more
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return FolderPairs(originals, edited, tuple((*pair, ways) for pair, ways in zip(pairs, prompts, strict=True)))


def assign_prompts(path: Path, names: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(ways to ask for each of these files, what could not be assigned); never by position. Raises InputError."""
    entries = _read_text(path, len(names)) if path.suffix.lower() == ".txt" else _read_table(path)
    if isinstance(entries, tuple):
        return [entries] * len(names), []
    by_path = {_name_of(name): index for index, name in enumerate(names)}
    by_base = defaultdict(list)
    for name, index in by_path.items():
        for base in {PurePosixPath(name).name, _beginning(PurePosixPath(name).name)}:
            by_base[base].append(index)
    ways, unknown = [[] for _ in names], []
    for name, prompt in entries:
        key = _name_of(name)
        candidates = [by_path[key]] if key in by_path else by_base[PurePosixPath(key).name]
        if len(candidates) == 1:
            ways[candidates[0]].append(prompt)
        else:
            unknown.append(name)
    if not any(ways):
        raise InputError(
            f"{path} names none of the pictures: it has {', '.join(unknown[:3])}, they are {', '.join(names[:3])}"
        )
    return [tuple(usable_prompts(values)) for values in ways], [
        _describe("of no pair, or of several", path, unknown)
    ] * bool(unknown)


def _read_text(path: Path, num_pairs: int) -> list[tuple[str, str]] | tuple[str, ...]:
    """Lines of name, tab, instruction; or, where no line has a tab, ways to ask for every pair."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    with_tab = [line for line in lines if "\t" in line]
    if not lines:
        raise InputError(f"{path} is empty")
    if len(with_tab) == len(lines):
        return [tuple(part.strip() for part in line.split("\t", 1)) for line in lines]
    if with_tab:
        line = next(line for line in lines if "\t" not in line)
        raise InputError(f"{path}: this line has no tab between a name and an instruction, unlike others: {line[:80]}")
    if len(lines) == num_pairs > 1:
        raise InputError(
            f"{path} has as many lines as there are pairs ({num_pairs}), but no names: begin each line with the name "
            "of its picture and a tab. (Lines without names are ways to ask for every pair: --edit_prompt gives those)"
        )
    return tuple(lines)


def _read_table(path: Path) -> list[tuple[str, str]]:
    columns = read_columns(path)
    name_column = next((name for name in NAME_COLUMNS if name in columns), None)
    prompt_column = next((name for name in PROMPT_COLUMNS if name in columns and name != name_column), None)
    if name_column is None or prompt_column is None:
        raise InputError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; needed are a name ({', '.join(NAME_COLUMNS)}) "
            f"and an instruction ({', '.join(PROMPT_COLUMNS)})"
        )
    entries = []
    for name, prompt in zip(columns[name_column], columns[prompt_column], strict=True):
        if isinstance(name, str):
            entries += [(name, value) for value in (prompt if isinstance(prompt, list) else [prompt])]
    return entries


def _name_of(path: str) -> str:
    """A path without the ending of a picture's file."""
    pure = PurePosixPath(path.replace("\\", "/"))
    return str(pure.with_suffix("")) if pure.suffix.lower() in SUFFIXES else str(pure)


def _beginning(name: str) -> str:
    endings = [ending for ending in ENDINGS if name.lower().endswith(ending) and len(name) > len(ending)]
    return name[: -len(max(endings, key=len))] if endings else name


def _by_beginning(names: Iterator[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name in names:
        found[_beginning(name)].append(name)
    return found


def _by_name(folder: Path, other: Path) -> tuple[dict[str, str], list[str]]:
    """(path below `folder` by name, paths whose name another file has); a folder inside the other is not its part."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    is_inside = other.resolve().is_relative_to(folder.resolve())
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not (is_inside and path.resolve().is_relative_to(other.resolve()))
    ]
    found = defaultdict(list)
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        found[_name_of(relative)].append(relative)
    doubles = [path for group in found.values() if len(group) > 1 for path in group]
    return {name: group[0] for name, group in found.items() if len(group) == 1}, doubles


def _describe(what: str, place: Path, names: list[str]) -> str:
    """ "3 without a partner in photos: a.png, b.png, c.png", or "" for none."""
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names):,} {what} in {place}: {', '.join(names[:NAMES_SHOWN])}{more}" if names else ""
