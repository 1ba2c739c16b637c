"""The ways to ask for each edit; the last ones of each file are kept out of training.

One phrasing a line, fifty or more a file. Only the toy world's edits, in instructions/toy, have fifteen: its text
encoder, frozen when the demo's editor is trained, has seen their words and no others. Of 38 new ways of asking for a
cartoon it took 10 for another edit; hence cartoonize.txt stands in both folders.
"""

from __future__ import annotations

from pathlib import Path

from utils.errors import InputError

FOLDER = Path(__file__).resolve().parent / "instructions"


def available_tasks() -> list[str]:
    """Names of the tasks that have a file of phrasings, sorted. Needs no import of the edits themselves."""
    return sorted(name for name in _files() if not name.startswith("toy/"))


def _files() -> dict[str, Path]:
    """Every name that `read_phrasings` takes, with its file."""
    toy = sorted((FOLDER / "toy").glob("*.txt"))
    return {f"toy/{path.stem}": path for path in toy} | {path.stem: path for path in (*toy, *FOLDER.glob("*.txt"))}


def read_phrasings(task: str, num_heldout: int = 3) -> tuple[list[str], list[str]]:
    """(phrasings for training, phrasings kept out of it) of one task, by its name or by the path of a .txt file.

    "toy/cartoonize" and its like name the toy world's file; a plain name means that only where there is no larger one.
    The last `num_heldout` lines of the file are kept out. Raises `InputError` for an unknown task, an unreadable file,
    a file without a phrasing or with one twice, and where none would be left for training.
    """
    path = _find_file(task)
    lines = _read_lines(path)
    if not 0 <= num_heldout < len(lines):
        raise InputError(
            f"{num_heldout} phrasings of '{task}' were to be held out: it has {len(lines)}, and training needs at "
            f"least one; give a number from 0 to {len(lines) - 1}, or add lines to {path}"
        )
    return lines[: len(lines) - num_heldout], lines[len(lines) - num_heldout :]


def _find_file(task: str) -> Path:
    path = Path(task)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"{task}: no such file; give a text file with one phrasing a line")
        return path
    if task not in _files():
        raise InputError(
            f"'{task}' is no task: choose from {', '.join(available_tasks())}, or give the path of a .txt file with "
            "one phrasing a line"
        )
    return _files()[task]


def _read_lines(path: Path) -> list[str]:
    """The phrasings of a file, stripped; empty lines do not count."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path}: holds no phrasing; write one a line")
    first_seen: dict[str, str] = {}
    problems = []
    for line in lines:
        if line.casefold() in first_seen:
            problems.append(f"{path}: '{line}' stands there twice; delete one")
        first_seen.setdefault(line.casefold(), line)
    if problems:
        raise InputError.from_problems(problems)
    return lines
