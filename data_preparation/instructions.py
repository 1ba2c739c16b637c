"""The phrasings of each task: the ways to ask for an edit. Some patterns of a file are held out from training.

The files hold one phrasing per line, fifty or more. The tasks of the toy world, in instructions/toy, have only fifteen:
its text encoder, frozen when the demo trains its editor, knows their words and no others. Of 38 further phrasings of
cartoonize it mistook 10 for other edits, which is why cartoonize.txt exists in both folders.
"""

import logging
import re
from pathlib import Path

from utils.errors import InputError

logger = logging.getLogger(__name__)
INK = re.compile(r"\b(ink\w*|outlin\w*|lines?)\b", re.IGNORECASE)
NO_INK = re.compile(r"\b(no|without)\b[^,.;]*\b(ink|outlines?|lines?)\b|\blineless\b", re.IGNORECASE)
FOLDER = Path(__file__).resolve().parent / "instructions"
SAME_PATTERN = 0.5  # share of common words (Jaccard index) from which two phrasings have one pattern


def available_tasks() -> list[str]:
    """Sorted names of the tasks with a file of phrasings."""
    return sorted(name for name in _phrasing_files() if not name.startswith("toy/"))


def _phrasing_files() -> dict[str, Path]:
    """File by task name; a task of the toy world is also "toy/NAME"."""
    toy = sorted((FOLDER / "toy").glob("*.txt"))
    return {f"toy/{path.stem}": path for path in toy} | {path.stem: path for path in (*toy, *FOLDER.glob("*.txt"))}


def read_phrasings(task: str, num_heldout: int = 3) -> tuple[list[str], list[str]]:
    """(phrasings for training, held-out phrasings) of a task, given by name or by the path of a .txt file.

    "toy/NAME" is the file of the toy world; NAME alone means it only if there is no other file of that name. Whole
    patterns are held out (`_group_by_pattern`), from the end of the file, because an editor that knows "Make it a
    cartoon" has seen "Make it a comic", too. Of the toy world, it is the last `num_heldout` lines, which its text
    encoder was not trained with. Raises `InputError` for an unknown task, an unreadable file, a file without phrasings
    or with duplicates, and if no phrasing is left for training.
    """
    path = _find_file(task)
    lines = _read_lines(path)
    num_trained = len(lines) - num_heldout
    if num_heldout < 0 or num_trained < 1:
        allowed = f"give a number from 0 to {len(lines) - 1}, or add lines to {path}"
        raise InputError(f"cannot hold out {num_heldout} of the {len(lines)} phrasings of '{task}': {allowed}")
    if path.parent == FOLDER / "toy":
        return lines[:num_trained], lines[num_trained:]
    held_out = _choose_patterns(lines, num_heldout)
    if len(held_out) < num_heldout:
        rest = [index for index in range(len(lines)) if index not in held_out]
        held_out |= set(rest[len(rest) - (num_heldout - len(held_out)) :])
        logger.warning("%s: too few patterns; some held-out phrasings are like others that are trained with", path)
    trained = [line for index, line in enumerate(lines) if index not in held_out]
    return trained, [lines[index] for index in sorted(held_out)]


def _choose_patterns(lines: list[str], num_heldout: int) -> set[int]:
    """Indices of at most `num_heldout` lines: whole patterns, those that end last first."""
    chosen: set[int] = set()
    for group in sorted(_group_by_pattern(lines), key=max, reverse=True):
        if len(chosen) + len(group) <= num_heldout:
            chosen |= group
    return chosen


def _group_by_pattern(lines: list[str]) -> list[set[int]]:
    """Indices of lines with one pattern: they begin with the same word, or share many words, also through others."""
    words = [re.findall(r"[^\W_']+", line.casefold()) or [line] for line in lines]
    groups: list[set[int]] = []
    for index, one in enumerate(words):
        alike = [group for group in groups if any(_has_same_pattern(one, words[other]) for other in group)]
        groups = [group for group in groups if group not in alike] + [{index}.union(*alike)]
    return groups


def _has_same_pattern(one: list[str], other: list[str]) -> bool:
    first, second = set(one), set(other)
    return one[0] == other[0] or len(first & second) >= SAME_PATTERN * len(first | second)


def _find_file(task: str) -> Path:
    path, files = Path(task), _phrasing_files()
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"{task} does not exist; give a text file with one phrasing per line")
        return path
    if task not in files:
        names = ", ".join(available_tasks())
        raise InputError(f"unknown task '{task}': choose from {names}, or give a .txt file with one phrasing per line")
    return files[task]


def _read_lines(path: Path) -> list[str]:
    """The phrasings of a file without surrounding whitespace and empty lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} has no phrasings: write one per line")
    folded = [line.casefold() for line in lines]
    repeated = [line for index, line in enumerate(lines) if folded[index] in folded[:index]]
    if repeated:
        raise InputError.from_problems([f"{path}: '{line}' is repeated; delete one of them" for line in repeated])
    return lines


def promises_outlines(phrasing: str) -> bool | None:
    """Whether a phrasing of cartoonize asks for ink lines (True) or for none (False); None if it mentions none."""
    if NO_INK.search(phrasing):
        return False
    return True if INK.search(phrasing) else None
