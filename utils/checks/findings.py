"""What can be wrong with a dataset of pairs: the kinds of findings, their collection, and the check for `--dry_run`."""

import time
from array import array
from collections.abc import Collection, Iterator
from typing import NamedTuple

from utils.checks.pair_inspection import inspect_row
from utils.data.draws import random_subset
from utils.data.sources import Source

SEVERITIES = ("error", "warning", "info")
MAX_DETAILS = 1000  # of each kind; the row numbers are not limited


class FindingKind(NamedTuple):
    """severity: an error spoils training or evaluation. is_dropped: the cleaned copy of a dataset omits the row."""

    severity: str
    title: str
    advice: str
    is_dropped: bool = False


def _error(title: str, advice: str) -> FindingKind:
    return FindingKind("error", title, advice, is_dropped=True)


def _warning(title: str, advice: str) -> FindingKind:
    return FindingKind("warning", title, advice)


KINDS: dict[str, FindingKind] = {
    "unreadable": _error("image cannot be read", "training skips the row; recreate the file or drop the row"),
    "blank": _error("image of one colour", "often the output of a safety checker; drop the row"),
    "no_prompt": _error("no instruction", "training skips the row; write an instruction or drop the row"),
    "aspect": _error("aspect ratios differ", "only --resize_mode squash trains it; crop both images alike"),
    "identical": _error("nothing edited", "teaches no edit; drop the row or set its task to identity"),
    "swapped": _error("original and edited swapped", "teaches the opposite edit; swap the images (--fix_swapped)"),
    "exchanged": _error("same pair in both directions", "the same instruction for opposite edits; drop the wrong row"),
    "overlap": _error("image of the other dataset", "scores on that dataset would be too good; drop the row"),
    "near_identical": _warning("almost nothing edited", "teaches weak edits; look at the examples"),
    "misaligned": _warning("edited image shifted", "teaches blurring; crop both images alike (--fix_shifts)"),
    "long_prompt": _warning("instruction over 77 tokens", "the text encoder ignores the rest; shorten it"),
    "duplicate": FindingKind("warning", "duplicate row", "counts twice in training; drop one", is_dropped=True),
    "near_duplicate": _warning("near-duplicate row", "a recompressed or resized copy; drop one"),
    "tiny": _warning("very small image", "training enlarges it, which blurs; use a larger one"),
    "huge": _warning("very large image", "slow to decode in every epoch; resize it once"),
    "animated": _warning("animation", "training uses the first frame; save the frame you want, or drop the row"),
    "transparent": FindingKind("info", "transparent image", "training shows it on white; nothing to do"),
    "size_differs": FindingKind(
        "info", "sizes differ", "the edited image is resized; check that both show the same crop"
    ),
    "direction": FindingKind("info", "mentions left or right", "--random_flip does not mirror the row; nothing to do"),
    "same_source": FindingKind("info", "original used again", "keep rows of one original in the same split"),
}


class Findings:
    """Findings by kind: the numbers of all rows, and the details of the first ones."""

    def __init__(self) -> None:
        self.rows: dict[str, array] = {}
        self.details: dict[str, dict[int, str]] = {}

    def add(self, kind: str, row: int, detail: str) -> None:
        """Add a finding. The details of several findings of one kind on one row are joined."""
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
        """The kinds that were found, in the order of `KINDS`."""
        for kind, meaning in KINDS.items():
            if kind in self.rows and severity in (None, meaning.severity):
                yield kind

    def num_rows(self, severity: str) -> int:
        """Number of rows with any finding of this severity."""
        return len({row for kind in self.kinds(severity) for row in self.rows[kind]})

    def dropped(self, ignored: Collection[str] = ()) -> dict[int, str]:
        """The rows that a cleaned copy omits, each with its first kind in `KINDS` that is not `ignored`."""
        found: dict[int, str] = {}
        for kind in self.kinds():
            if KINDS[kind].is_dropped and kind not in ignored:
                for row in self.rows[kind]:
                    found.setdefault(row, kind)
        return found


def printable(text: str, length: int = 160) -> str:
    """Text of a dataset for one line of a terminal: without control characters, cut to `length`."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= length else f"{text[: length - 3].rstrip()}..."


def quick_check(sources: list[Source], seed: int, max_rows: int = 256, max_seconds: float = 10.0) -> list[str]:
    """Check some rows of each source, and describe the errors and warnings in lines to print.

    The rows are drawn by the seed; of a stream, they are the first ones. Stops after `max_seconds`.
    """
    deadline = time.monotonic() + max_seconds
    findings, names = Findings(), []
    for position, source in enumerate(sources):
        now = time.monotonic()
        until = now + (deadline - now) / (len(sources) - position)  # the remaining time is split among the sources
        columns = source.columns
        for name, row in _sample_rows(source, seed, max(1, max_rows // len(sources))):
            inspection = inspect_row(row[columns.original], row[columns.edited], row[columns.prompt])
            for kind, detail in inspection.findings:
                findings.add(kind, len(names), detail)
            names.append(name)
            if time.monotonic() > until:
                break
    kinds = [*findings.kinds("error"), *findings.kinds("warning")]
    if not kinds:
        return [f"a quick check of {len(names)} rows found no problems"]
    lines = [f"a quick check of {len(names)} rows found problems (details: data_preparation/check_dataset.py):"]
    for kind in kinds:
        row, count = findings.rows[kind][0], findings.count(kind)
        example = printable(f"{names[row]}: {findings.details[kind][row]}")
        lines.append(f"  warning: {KINDS[kind].title}: {count} row{'s' * (count != 1)}, such as {example}")
    return lines


def _sample_rows(source: Source, seed: int, size: int) -> Iterator[tuple[str, dict]]:
    """(name, row) of some rows."""
    if source.is_streaming:
        for row, values in enumerate(source.rows.take(size)):
            yield f"{source.name}[stream {row}]", values
    else:
        for row in random_subset(seed, len(source.rows), size).tolist():
            yield source.row_name(row), source.rows[row]
