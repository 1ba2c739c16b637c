"""Pairs in two folders, matched by file names, with a caption file for each pair: the layout of many trainers."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from utils.archives import ARCHIVE_SUFFIXES, list_members
from utils.data.suffix_pairs import ENDING, caption_stem
from utils.errors import InputError
from utils.image_formats import has_image_suffix

_BEFORE = ("control", "controls", "ctrl", "cond", "conditioning", "condition", "conditioning_image", "reference", "ref")
_BEFORE += ("before", "unedited")
_BEFORE += ("source", "sources", "src", "input", "inputs", "input_image", "original", "originals")
_BEFORE += ("original_image", "original_images", "source_image", "source_images", "control_image", "control_images")
_AFTER = ("target", "targets", "tgt", "dst", "edited", "edits", "edited_image", "edited_images", "output", "outputs")
_AFTER += ("after", "result", "results", "target_image", "target_images", "output_image", "gt", "groundtruth")
_AFTER += ("ground_truth", "image", "images", "img", "cartoon")
# Subfolders before and after the edit; for restoration, the clean photographs are the edited images.
SUBFOLDERS = {name: _AFTER for name in _BEFORE} | {
    "a": ("b",),
    "traina": ("trainb",),
    "lq": ("gt", "hq"),
    "low": ("high",),
    "blur": ("sharp",),
    "noisy": ("clean", "gt"),
    "rainy": ("clean", "gt"),
    "hazy": ("clean", "clear", "gt"),
}
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_FOLDERS = ("captions", "caption", "prompts", "prompt", "instructions", "txt", "text", "texts")
MAX_LISTED = 8


def find_folders(source: Path) -> tuple[Path, Path] | None:
    """(folder of original images, folder of edited images): two subfolders of `SUBFOLDERS`. Raises InputError."""
    folders = [path for path in sorted(source.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {path.name.casefold(): path for path in folders}
    last_words = [
        (re.split(r"[\s._-]", re.sub(r"[\s._-]?\d+\Z", "", path.name.casefold()))[-1], path) for path in folders
    ]
    counts = Counter(word for word, _ in last_words)
    # my_control and my_target or control_1, where no folder has the plain name.
    found |= {word: path for word, path in last_words if word not in found and counts[word] == 1}
    pairs = [(found[a], found[b]) for a in SUBFOLDERS if a in found for b in SUBFOLDERS[a] if b in found]
    pairs = list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))
    if len(pairs) > 1:
        names = ", and ".join(" or ".join(dict.fromkeys(two.name for two in side)) for side in zip(*pairs, strict=True))
        raise InputError(
            f"{source} has several pairs of folders ({names}): choose two with data_preparation/import_pairs.py "
            "--source FOLDER --edited_dir FOLDER, or move the others away"
        )
    return pairs[0] if pairs else None


def refuse_packed_folders(folder: Path) -> None:
    """Raise InputError for an archive that holds the two folders of the images of pairs."""
    for archive in sorted(path for path in folder.glob("*") if path.suffix.lower() in ARCHIVE_SUFFIXES):
        try:
            members = [member for member in list_members(archive) if has_image_suffix(member)]
        except (OSError, ValueError):
            continue  # is reported by what reads it
        inside = {part for member in members for part in member.casefold().split("/")[:-1]}
        names = next(((a, b) for a in SUBFOLDERS for b in SUBFOLDERS[a] if {a, b} <= inside), None)
        if names:
            unpack = "unzip" if archive.suffix.lower() == ".zip" else "tar xf"
            raise InputError(
                f"{archive} holds the folders {names[0]}/ and {names[1]}/: unpack it ({unpack} '{archive.name}') and "
                "give the folder in which they are, or write a table of its images' names beside it"
            )


def match_files(originals: Path, edited: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(paths of each pair below the two folders, sorted; one line for each kind of file that is not used).

    The images of a pair have the same path without suffix, else without an end such as "_after". Files of a folder
    that differ only in their suffix are not used, because either could be meant.
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
        *list_files("files with the same name but different suffixes", originals, left_duplicates),
        *list_files("files with the same name but different suffixes", edited, right_duplicates),
        *list_files("files without a partner", originals, [lefts[name] for name in lefts if name not in names]),
        *list_files("files without a partner", edited, [rights[name] for name in rights if name not in used]),
    ]
    return sorted((lefts[left], rights[right]) for left, right in names.items()), problems


def read_captions(
    originals: Path, edited: Path, pairs: list[tuple[str, str]], source: Path | None = None
) -> list[str | None]:
    """The caption of each pair: the text file of the edited image's name, else of the original's; None without one.

    The file is beside the image, in a folder of `CAPTION_FOLDERS` in `source`, or in `source`. An end such as "_after"
    may be missing in its name. The lines of a file are one instruction. Raises InputError.
    """
    captions = []
    others = _caption_folders(source) if source else []
    for original, changed in pairs:
        places = [(edited, changed), (originals, original)]
        places += [(other, name) for other in others for name in (changed, original)]
        stems = [(place, stem) for place, name in places for stem in (without_suffix(name), caption_stem(name))]
        names = dict.fromkeys(place / stem for place, stem in stems)
        files = [name.with_name(f"{name.name}{suffix}") for name in names for suffix in CAPTION_SUFFIXES]
        file = next((file for file in files if file.is_file()), None)
        try:
            text = "" if file is None else file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from None
        captions.append(" ".join(text.split()) or None)
    return captions


def _caption_folders(source: Path) -> list[Path]:
    inside = {path.name.casefold(): path for path in sorted(source.iterdir()) if path.is_dir()}
    return [inside[name] for name in CAPTION_FOLDERS if name in inside] + [source]


def list_files(what: str, place: Path, names: list[str]) -> list[str]:
    """["files without a partner in photos: a.png, b.png, c.png"], or [] for no names."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return [f"{len(names)} {what} in {place}: {', '.join(names[:MAX_LISTED])}{more}"] if names else []


def without_suffix(path: str) -> str:
    """A path without the suffix of an image file."""
    pure = PurePosixPath(path.replace("\\", "/"))
    return str(pure.with_suffix("")) if has_image_suffix(pure.name) else str(pure)


def _files_by_name(folder: Path, other: Path) -> tuple[dict[str, str], list[str]]:
    """(image files by path without suffix, files that share one); `other` may lie in `folder`, and is left out."""
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist")
    is_inside = other.resolve().is_relative_to(folder.resolve())
    found = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        is_in_other = is_inside and path.resolve().is_relative_to(other.resolve())
        if has_image_suffix(path) and path.is_file() and not is_in_other:
            relative = path.relative_to(folder).as_posix()
            found[without_suffix(relative)].append(relative)
    duplicates = [path for group in found.values() if len(group) > 1 for path in group]
    return {name: group[0] for name, group in found.items() if len(group) == 1}, duplicates


def _group_by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[ENDING.sub("", name)].append(name)
    return groups
