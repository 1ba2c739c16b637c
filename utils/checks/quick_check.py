"""The quick form of the doctor, for `--dry_run`: some rows of the training data, a few seconds, warnings only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from utils.checks.findings import KINDS, Findings, printable
from utils.checks.pair_inspection import inspect_row
from utils.data.draws import random_subset
from utils.data.sources import Source

MAX_ROWS, MAX_SECONDS = 256, 10.0


def quick_check(
    sources: Iterable[Source], seed: int, max_rows: int = MAX_ROWS, max_seconds: float = MAX_SECONDS
) -> list[str]:
    """Check some rows of every source, and say in lines what was found (docs/checking.md).

    The rows are drawn by the seed (of a stream the first are taken); no more are begun after `max_seconds`.
    """
    sources = list(sources)
    deadline = time.monotonic() + max_seconds
    findings, names, num_checked = Findings(), [], 0
    for position, source in enumerate(sources):
        share = (deadline - time.monotonic()) / (len(sources) - position)  # a slow source leaves the others their time
        until = time.monotonic() + share
        columns = source.columns
        for name, row in _sample(source, seed, max(1, max_rows // len(sources))):
            found = inspect_row(row[columns.original], row[columns.edited], row[columns.prompt])
            for kind, detail in found.findings:
                findings.add(kind, len(names), detail)
            names.append(name)
            num_checked += 1
            if time.monotonic() > until:
                break
    return describe_quick_check(findings, names)


def describe_quick_check(findings: Findings, names: list[str]) -> list[str]:
    """Lines on what was found; names: of the rows that were checked, in order."""
    kinds = [kind for severity in ("error", "warning") for kind in findings.kinds(severity)]
    if not kinds:
        return [f"a quick check of {len(names)} rows found nothing to warn of"]
    lines = [f"a quick check of {len(names)} rows found what data_preparation/check_dataset.py would look into:"]
    for kind in kinds:
        first = findings.rows[kind][0]
        count = findings.count(kind)
        example = f"{names[first]}: {findings.details[kind][first]}"
        lines.append(f"  warning: {KINDS[kind].title}: {count} row{'s' * (count != 1)}, such as {printable(example)}")
    return lines


def _sample(source: Source, seed: int, size: int) -> Iterator[tuple[str, dict]]:
    """(name, row) of some rows."""
    if source.is_streaming:
        for row, values in enumerate(source.rows.take(size)):
            yield f"{source.name}[stream {row}]", values
        return
    for row in random_subset(seed, len(source.rows), size):
        yield source.row_name(int(row)), source.rows[int(row)]
