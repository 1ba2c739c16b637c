"""A diagnosis in a terminal."""

from __future__ import annotations

from data_preparation.checking.doctor import Diagnosis
from utils.checks.findings import KINDS, printable

MAX_NAMES = 4


def describe(diagnosis: Diagnosis) -> str:
    """What was found, the worst first: how many rows, which, the words on the first, what to do."""
    columns, findings, pairs = diagnosis.source.columns, diagnosis.findings, diagnosis.pairs
    lines = [
        f"{pairs.dataset}, split {pairs.split}: {count_rows(diagnosis.num_rows)} with {diagnosis.num_sources:,} "
        f"different originals, checked in {diagnosis.seconds:.1f} s",
        f"  columns: {columns.original} / {columns.prompt} / {columns.edited}",
    ]
    lines += [f"  compared with {name}: {count_rows(count)}" for name, count in diagnosis.against.items()]
    width = max((len(KINDS[kind].title) for kind in findings.kinds()), default=0)
    for kind in findings.kinds():
        severity, title, advice, _ = KINDS[kind]
        rows = findings.rows[kind]
        names = ", ".join(diagnosis.source.row_name(row) for row in rows[:MAX_NAMES])
        more = ", ..." if len(rows) > MAX_NAMES else ""
        example = f"{diagnosis.source.row_name(rows[0])}: {findings.details[kind][rows[0]]}"
        lines += [f"{severity:<8} {title:<{width}} {len(rows):>7,}  {names}{more}"]
        if severity != "info":
            lines += [f"{'':<8} {printable(example, 108)}", f"{'':<8} -> {advice}"]
    errors, warnings = findings.num_rows("error"), findings.num_rows("warning")
    if not errors and not warnings:
        return "\n".join([*lines, "fine: nothing found that would spoil training"])
    return "\n".join([*lines, f"{count_rows(errors)} with errors, {count_rows(warnings)} with warnings"])


def count_rows(count: int) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} row{'s' * (count != 1)}"
