"""Triples written by people (or chosen among a model's) as what a model is fine-tuned on, checked line by line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from data_preparation.captions.prompts import TASK
from data_preparation.captions.triples import PROMPT_END, SEPARATOR, STOP, Rejected, Triple, check_triple, fold
from utils.errors import InputError

MAX_SHOWN = 5  # lines named for each reason


@dataclass
class Checked:
    """Triples that can be used, and the numbers of the lines that cannot, by reason."""

    triples: list[Triple] = field(default_factory=list)
    rejected: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> str:
        """A line for each reason, with the first line numbers."""
        lines = []
        for reason, numbers in sorted(self.rejected.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(map(str, numbers[:MAX_SHOWN])) + (", ..." if len(numbers) > MAX_SHOWN else "")
            lines.append(f"  left out, {reason}: {len(numbers):,} (line {shown})")
        return "\n".join(lines)


def read_triples(path: Path, is_legacy: bool) -> Checked:
    """Of a file with an object {"caption" or "input", "edit", "output"} in each line. Raises InputError."""
    checked, seen = Checked(), set()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"--input {path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        triple = read_line(line, is_legacy)
        if isinstance(triple, Triple) and (key := tuple(map(fold, triple))) in seen:
            triple = Rejected("duplicate")
        if isinstance(triple, Rejected):
            checked.rejected.setdefault(triple.reason, []).append(number)
            continue
        seen.add(key)
        checked.triples.append(triple)
    if not checked.triples:
        raise InputError(f"--input {path} holds no triple that can be used\n{checked.describe()}".rstrip())
    return checked


def read_line(line: str, is_legacy: bool) -> Triple | Rejected:
    """Never raises."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Rejected("no JSON")
    if not isinstance(row, dict):
        return Rejected("no JSON object")
    values = [row.get("caption", row.get("input")), row.get("edit"), row.get("output")]
    if any(value is None for value in values):
        return Rejected("missing key")
    if not all(isinstance(value, str) for value in values):
        return Rejected("not text")
    marks = [mark.strip() for mark in (PROMPT_END, SEPARATOR)]
    marks += [STOP]  # alone it is a word like others, on a line of its own it ends the answer
    if is_legacy and any(mark in value for mark in marks for value in values):
        return Rejected("delimiter inside the text")
    return check_triple(*values)


def split_triples(triples: list[Triple], share: float, seed: int) -> tuple[list[Triple], list[Triple]]:
    """(for training, for validation). All triples of a caption are on one side, whatever else the file holds."""
    held = [_draw(triple.caption, seed) < share for triple in triples]
    pairs = list(zip(triples, held, strict=True))
    return [triple for triple, is_held in pairs if not is_held], [triple for triple, is_held in pairs if is_held]


def _draw(caption: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed} {fold(caption)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def as_line(triple: Triple, is_legacy: bool) -> str:
    """legacy: {"prompt", "completion"} with the original's delimiters; else {"messages"} of a chat."""
    if is_legacy:
        completion = f"{triple.edit}{SEPARATOR}{triple.output}{STOP}"
        row = {"prompt": f"{triple.caption}{PROMPT_END}", "completion": completion}
    else:
        answer = json.dumps({"edit": triple.edit, "output": triple.output}, ensure_ascii=False)
        contents = {"system": TASK, "user": f"Caption: {triple.caption}", "assistant": answer}
        row = {"messages": [{"role": role, "content": content} for role, content in contents.items()]}
    return json.dumps(row, ensure_ascii=False) + "\n"
