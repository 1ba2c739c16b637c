"""What a language model answers, as a triple (caption, edit, output), or the reason why it is none.

Two formats: a JSON object with the keys edit and output, and the original InstructPix2Pix's, in which a model that was
fine-tuned on it continues `caption\\n##\\n` by `edit\\n%%\\noutput\\nEND`. Whatever a model says, nothing here raises.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import NamedTuple

PROMPT_END, SEPARATOR, STOP = "\n##\n", "\n%%\n", "\nEND"  # of the original's dataset_creation/prepare_for_gpt.py
MAX_EDIT_WORDS = 30
MAX_TOKENS = 75  # CLIP reads 77, two of which are the start and the end
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_")
_DECODER = json.JSONDecoder(strict=False)  # line breaks inside a string are forgiven: they become spaces


class Triple(NamedTuple):
    """A caption, what to change about it, and the caption after the change; each one line of text."""

    caption: str
    edit: str
    output: str


class Rejected(NamedTuple):
    """Why an answer gives no triple; the reasons are few, and counted."""

    reason: str


def parse_json(caption: str, text: str, is_finished: bool = True) -> Triple | Rejected:
    """Of an answer `{"edit": ..., "output": ...}`; thoughts before it, a code fence or words around it are forgiven."""
    text = _THOUGHTS.sub("", text)
    fenced = _FENCE.match(text)
    text = fenced.group(1) if fenced else text
    if not text.strip():
        return Rejected("empty")
    try:
        answer, _ = _DECODER.raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return Rejected("no JSON" if is_finished else "cut off")
    if not all(key in answer for key in ("edit", "output")):
        return Rejected("missing key")
    if not all(isinstance(answer[key], str) for key in ("edit", "output")):
        return Rejected("not text")
    return check_triple(caption, answer["edit"], answer["output"])


def parse_legacy(caption: str, text: str, is_finished: bool = True) -> Triple | Rejected:
    """Of an answer `edit\\n%%\\noutput`, which ends at the stop word or, where that was cut away, with the text."""
    text, stop, _ = text.partition(STOP)
    if not text.strip():
        return Rejected("empty")
    if not (stop or is_finished):
        return Rejected("cut off")
    parts = text.split(SEPARATOR)
    if len(parts) != 2 or PROMPT_END in text:
        return Rejected("no delimiter")
    return check_triple(caption, *parts)


PARSERS = {"chat": parse_json, "legacy": parse_legacy}


def check_triple(caption: str, edit: str, output: str) -> Triple | Rejected:
    """The triple with its white space in order, or what is wrong with it."""
    try:
        caption, edit, output = map(clean, (caption, edit, output))
    except UnicodeError:
        return Rejected("not text")
    if not (caption and fold(edit) and fold(output)):
        return Rejected("empty")
    if fold(output) == fold(caption):
        return Rejected("output equal to caption")
    if len(edit.split()) > MAX_EDIT_WORDS or count_tokens(edit) > MAX_TOKENS:
        return Rejected("edit too long")
    if count_tokens(output) > MAX_TOKENS:
        return Rejected("output too long")
    return Triple(caption, edit, output)


def clean(text: str) -> str:
    """One line without control characters. Raises UnicodeError for half of a surrogate pair, which no file can hold."""
    text.encode()
    text = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(text.split())


def fold(text: str) -> str:
    """What is compared: letters, digits and signs, without case, accents' spelling, punctuation and white space."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = (letter if unicodedata.category(letter)[0] in "LMNS" else " " for letter in text)
    return " ".join("".join(kept).split())


def count_tokens(text: str) -> int:
    """About how many tokens CLIP makes of a text: a word is one, a long one more, a digit or a sign is one.

    An estimate, so that a server's answers are judged without a download: CLIP's words have 5 letters on average, and
    those over 10 are mostly split.
    """
    return sum(-(-len(piece) // 10) if piece[0].isalpha() else 1 for piece in _PIECES.findall(text))
