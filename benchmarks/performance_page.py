"""Writes the tables of docs/performance.md from benchmarks/results/*.json.

    python benchmarks/performance_page.py

A table stands between the comments `<!-- results FILE CELL -->` and `<!-- end -->`; the text around it is written by
hand. CELL is a cell of benchmarks/results/FILE.json, or `all`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from utils.cli import FlagParser  # noqa: E402

PAGE = REPOSITORY / "docs/performance.md"
RESULTS = REPOSITORY / "benchmarks/results"
TABLE = re.compile(r"(<!-- results (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VARIANTS = {
    "peer": "diffusers' example, default",
    "peer_tuned": "diffusers' example, tuned",
    "ours": "ours",
    "ours_cached": "ours, `--cache_latents --center_crop`",
    "ours_compiled": "ours, cached, `--compile`",
}


def main(argv: list[str] | None = None) -> None:
    FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    PAGE.write_text(fill_tables(PAGE.read_text()))


def fill_tables(page: str) -> str:
    """The page with every table made again. Raises KeyError for a cell without results."""
    return TABLE.sub(lambda found: found[1] + _table(found[2], found[3]) + found[4], page)


def _table(file: str, cell: str) -> str:
    rows = json.loads((RESULTS / f"{file}.json").read_text())
    rows = [row for row in rows if cell in ("all", row["cell"])]
    if not rows:
        raise KeyError(f"benchmarks/results/{file}.json has no cell {cell}")
    lines = _training_lines(rows) if "variant" in rows[0] else _lines(rows)
    heads = sorted({f"{row['machine']}, PyTorch {row['versions']['torch']}, {row['date']}" for row in rows})
    return f"{'; '.join(heads)}.\n\n" + "\n".join(lines) + "\n"


def _training_lines(rows: list[dict]) -> list[str]:
    has_tuned = rows[0]["peer_tuned"] is not None
    columns = ["", "samples/s", "times the default", *(["times the tuned"] if has_tuned else [])]
    columns += ["s/sample of the " + ("tuned" if has_tuned else "default"), "goal"]
    columns += ["peak GB", "operations/step", "syncs/step", "to the first step"]
    lines = _head(columns)
    for row in rows:
        details = row["details"]
        cells = [VARIANTS[row["variant"]], _number(1 / row["ours"]), _number(row["peer"] / row["ours"])]
        cells += [_number(row["peer_tuned"] / row["ours"])] if has_tuned else []
        cells += [_number(row["ratio"]), _number(row["goal"])]
        cells += [_number(details.get("peak_gb")), *(f"{details[k]:.0f}" if k in details else "" for k in COUNTS)]
        cells.append(f"{details['first_step_s']:.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


COUNTS = ("operations", "syncs")


def _lines(rows: list[dict]) -> list[str]:
    lines = _head(["size", "", "peer", "peer, tuned", "ours", "ours / peer", "goal", "limit"])
    for row in rows:
        figures = [_number(row[name]) for name in ("peer", "peer_tuned", "ours", "ratio", "goal")]
        lines.append(f"| {' | '.join([row['cell'], row['metric'], *figures, row['limit'] or ''])} |")
    return lines


def _head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _number(value: float | None) -> str:
    """Three significant digits; "" for none."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
