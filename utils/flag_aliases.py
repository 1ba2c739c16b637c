"""Flags by the names of other projects, accepted beside our own: a table for each script, not shown by --help."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from utils.errors import InputError


@dataclass(frozen=True)
class FlagAliases:
    """The flags of another project's script, all written with underscores and without "--".

    renamed: their flag -> ours, or a function from its value to our words, which may raise InputError. ranges: our flag
    with two values -> their two flags, with their defaults. implied: their flag -> our words for what that command
    means without further flags; flags that are given override them. refused: their flag -> what to use, and why.
    """

    project: str = ""
    renamed: dict[str, str | Callable[[str], list[str]]] = field(default_factory=dict)
    ranges: dict[str, tuple[tuple[str, float], tuple[str, float]]] = field(default_factory=dict)
    implied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def translate_flags(words: Sequence[str], flags: Iterable[str], aliases: FlagAliases) -> tuple[list[str], list[str]]:
    """(our command line, implied words) of a command line with aliases, or with dashes instead of underscores.

    flags: our own. Raises InputError with all problems.
    """
    own = {_key(flag): flag for flag in flags if flag.startswith("--")}
    ends = {name for both in aliases.ranges.values() for name, _ in both}
    translated, implied, problems, given, rest = [], [], [], {}, deque(words)
    while rest:
        word = rest.popleft()
        name, equals, value = word.partition("=")
        key = _key(name) if name.startswith("--") and name != "--" else ""
        implied += aliases.implied.get(key, ())
        if word == "--":
            translated += [word, *rest]
            break
        if name in own.values() or not key:
            translated.append(word)
        elif key in own:
            translated.append(own[key] + equals + value)
        elif key in aliases.refused:
            problems.append(f"{name} (of {aliases.project}): {aliases.refused[key]}")
        elif isinstance(aliases.renamed.get(key), str):
            translated.append(f"--{aliases.renamed[key]}{equals}{value}")
        elif key in aliases.renamed or key in ends:
            if not equals and not rest:
                problems.append(f"{name}: give a value")
                continue
            given[key] = value if equals else rest.popleft()
        else:
            translated.append(word)
    translated += _translate_values(given, aliases, problems)
    if problems:
        raise InputError.from_problems(problems)
    return translated, implied


def _translate_values(given: dict[str, str], aliases: FlagAliases, problems: list[str]) -> list[str]:
    """Our words for the flags whose values are converted, or are an end of a range; adds to `problems`."""
    words = []
    for key, value in given.items():
        try:
            words += aliases.renamed[key](value) if key in aliases.renamed else []
        except InputError as error:
            problems.append(str(error))
    for ours, both in aliases.ranges.items():
        if any(name in given for name, _ in both):
            words += [f"--{ours}", *(str(given.get(name, default)) for name, default in both)]
    return words


def _key(flag: str) -> str:
    return flag[2:].replace("-", "_")
