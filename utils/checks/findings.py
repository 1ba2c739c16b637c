"""The kinds of things that can be wrong with a dataset of pairs: how bad each is, and what to do."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator
from typing import NamedTuple

SEVERITIES = ("error", "warning", "info")
MAX_DETAILS = 1000  # of a kind; the numbers of all rows are kept


class Kind(NamedTuple):
    """severity: an error spoils training or scores. is_dropped: a cleaned copy leaves the row out."""

    severity: str
    title: str
    advice: str
    is_dropped: bool = False


KINDS: dict[str, Kind] = {
    "unreadable": Kind(
        "error", "image cannot be read", "training skips the row; make the file again, or drop it", True
    ),
    "blank": Kind("error", "image of one colour", "often what a safety checker left; drop the row", True),
    "no_prompt": Kind("error", "no instruction", "training skips the row; write one, or drop it", True),
    "aspect": Kind("error", "aspect ratios differ", "training skips the row; crop both images alike", True),
    "identical": Kind("error", "nothing edited", "teaches to do nothing; drop it, or give it the task identity", True),
    "swapped": Kind(
        "error", "original and edited swapped", "teaches the opposite; exchange them (--fix_swapped)", True
    ),
    "exchanged": Kind(
        "error", "same pair both ways round", "one instruction cannot mean both; drop the wrong one", True
    ),
    "overlap": Kind("error", "image of the other dataset", "scores on that dataset would be too good; drop it", True),
    "near_identical": Kind("warning", "almost nothing edited", "teaches to do little; look at the examples"),
    "misaligned": Kind("warning", "edited image shifted", "blurs what is learnt; crop both alike (--fix_shifts)"),
    "long_prompt": Kind("warning", "instruction over 77 tokens", "the text encoder reads no further; shorten it"),
    "duplicate": Kind("warning", "same row again", "counts twice in training; drop one", True),
    "near_duplicate": Kind("warning", "nearly the same row again", "recompressed or resized copies; drop one"),
    "tiny": Kind("warning", "very small image", "will be enlarged and blurred; get a larger one"),
    "huge": Kind("warning", "very large image", "slow to decode at each visit; scale it down once"),
    "size_differs": Kind("info", "sizes differ", "the edited image is resized; check that both show the same crop"),
    "direction": Kind("info", "names left or right", "never mirrored by --random_flip; nothing to do"),
    "same_source": Kind("info", "original used again", "split by source image, or the test set is not unseen"),
}


class Findings:
    """What was found, by kind: the numbers of all rows, and the words on the first of them."""

    def __init__(self) -> None:
        self.rows: dict[str, array] = {}
        self.details: dict[str, dict[int, str]] = {}

    def add(self, kind: str, row: int, detail: str) -> None:
        """Add a finding on a row; of several of one kind on a row the words are joined."""
        rows, details = self.rows.setdefault(kind, array("q")), self.details.setdefault(kind, {})
        if rows and rows[-1] == row:
            if row in details:
                details[row] = f"{details[row]}; {detail}"
            return
        rows.append(row)
        if len(details) < MAX_DETAILS:
            details[row] = detail

    def count(self, kind: str) -> int:
        """Number of rows with this finding."""
        return len(self.rows.get(kind, ()))

    def kinds(self, severity: str | None = None) -> Iterator[str]:
        """The kinds that were found, the worst first."""
        for kind, meaning in KINDS.items():
            if kind in self.rows and severity in (None, meaning.severity):
                yield kind

    def num_rows(self, severity: str) -> int:
        """Rows with a finding of this severity."""
        return len({row for kind in self.kinds(severity) for row in self.rows[kind]})

    def dropped(self, forgiven: Collection[str] = ()) -> dict[int, str]:
        """The rows that a cleaned copy leaves out, each with the worst reason; reasons `forgiven` do not count."""
        found: dict[int, str] = {}
        for kind in self.kinds():
            if KINDS[kind].is_dropped and kind not in forgiven:
                for row in self.rows[kind]:
                    found.setdefault(row, kind)
        return found


def printable(text: str, length: int = 160) -> str:
    """Text of a dataset on one line of a terminal: no control characters, cut to `length`."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= length else f"{text[: length - 3].rstrip()}..."
