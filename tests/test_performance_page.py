"""The figures of docs/performance.md are those of benchmarks/results."""

import json

from benchmarks.performance_page import PAGE, RESULTS, TABLE, fill_tables

FIELDS = ("cell", "metric", "peer", "peer_tuned", "ours", "ratio", "goal", "limit", "machine", "versions", "date")


def test_the_page_has_the_tables_that_its_script_makes():
    page = PAGE.read_text()
    assert len(TABLE.findall(page)) == page.count("<!-- results")
    assert fill_tables(page) == page, "run: python benchmarks/performance_page.py"
    damaged = page.replace("| ours |", "| ours, changed by hand |")
    assert damaged != page and fill_tables(damaged) == page


def test_results_have_one_form():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for row in (row for file in files for row in json.loads(file.read_text())):
        assert set(FIELDS) <= set(row)
