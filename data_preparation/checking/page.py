"""A diagnosis as one HTML file: no script, nothing loaded from elsewhere, readable in the dark and on a telephone."""

from __future__ import annotations

from html import escape

from data_preparation.checking.doctor import Diagnosis
from data_preparation.checking.examples import Example, make_examples
from data_preparation.checking.numbers import Histogram, make_histograms, verdict
from data_preparation.checking.terminal import count_rows
from utils.checks.findings import KINDS

VERDICTS = {
    "error": "Has rows that spoil training or scores",
    "warning": "Can be trained on; look at the warnings",
    "fine": "Nothing found that would spoil training",
}
MAX_NAMES = 12
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d2126; --soft: #5d6670; --line: #dcd9d1; --card: #fff;
  --error: #b3261e; --warning: #8a5a00; --info: #2f5d8a; --fine: #1f7a4d; --one: #5479a8; --two: #d08a3c; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8e6e1; --soft: #a2a8b0; --line: #34383e;
  --card: #1f2226; --error: #ff8a80; --warning: #f2bf5e; --info: #8ab8e6; --fine: #7bd3a4; --one: #7fa3d1;
  --two: #e0a564; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 44px 0 4px; } p { margin: 4px 0; }
.soft, figcaption, th { color: var(--soft); } .small { font-size: .875rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .info { color: var(--info); }
.fine { color: var(--fine); }
.verdict { font-size: 1.15rem; font-weight: 600; margin: 14px 0 2px; }
table { border-collapse: collapse; width: 100%; margin-top: 20px; }
th { text-align: left; font-weight: 500; font-size: .875rem; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.count { text-align: right; font-variant-numeric: tabular-nums; } a { color: inherit; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px;
  margin-top: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.pictures { display: flex; gap: 8px; } figure { margin: 0; flex: 1 1 0; min-width: 0; }
figure img { width: 100%; display: block; border-radius: 4px; } 
.prompt { max-height: 7.5em; overflow: auto; } figcaption { font-size: .8125rem; }
.none { aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 4px; display: grid; place-items: center;
  text-align: center; color: var(--soft); font-size: .8125rem; padding: 8px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 28px 36px; }
h3 { font-size: 1rem; margin: 12px 0 8px; font-weight: 600; }
.bars { display: grid; grid-template-columns: minmax(64px, max-content) 1fr max-content; gap: 3px 10px;
  font-size: .8125rem; align-items: center; font-variant-numeric: tabular-nums; }
.bar { height: 8px; border-radius: 2px; background: var(--one); }
.bar + .bar { background: var(--two); margin-top: 2px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 0;
  background: var(--one); } .key + .key { margin-left: 14px; } .key + .key::before { background: var(--two); }
@media (max-width: 560px) { td.advice, th.advice { display: none; } body { padding: 16px 14px 48px; } }
"""


def make_page(diagnosis: Diagnosis) -> str:
    """The whole file. Every text of the dataset is escaped."""
    findings = diagnosis.findings
    problems = [kind for kind in findings.kinds() if KINDS[kind].severity != "info"]
    hints = [kind for kind in findings.kinds() if KINDS[kind].severity == "info"]
    sections = "".join(_section(diagnosis, kind) for kind in [*problems, *hints])
    histograms = make_histograms(diagnosis)
    if len(histograms["tasks"].labels) < 2 and "(not said)" in histograms["tasks"].labels:
        del histograms["tasks"]
    charts = "".join(map(_chart, histograms.values()))
    title = escape(f"{diagnosis.pairs.dataset}, {diagnosis.pairs.split}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\"><title>{title}</title><style>{STYLE}</style></head><body>\n"
        f"{_head(diagnosis)}{_table(diagnosis)}{sections}<h2>The whole dataset</h2>\n"
        f'<div class="charts">{charts}</div></body></html>\n'
    )


def _head(diagnosis: Diagnosis) -> str:
    findings, pairs = diagnosis.findings, diagnosis.pairs
    found = verdict(diagnosis)
    counts = f"{count_rows(findings.num_rows('error'))} with errors, "
    counts += f"{count_rows(findings.num_rows('warning'))} with warnings"
    columns = " / ".join(vars(diagnosis.source.columns).values())
    against = "".join(f", compared with {name} ({count_rows(count)})" for name, count in diagnosis.against.items())
    about = f"{count_rows(diagnosis.num_rows)} with {diagnosis.num_sources:,} different originals{against}"
    return (
        f"<h1>{escape(pairs.dataset)}</h1>"
        f'<p class="soft small">split {escape(pairs.split)} · {escape(columns)} · {escape(about)}</p>'
        f'<p class="verdict {found}">{VERDICTS[found]}</p><p class="soft">{counts}</p>\n'
    )


def _table(diagnosis: Diagnosis) -> str:
    rows = "".join(
        f'<tr><td class="{KINDS[kind].severity}">{KINDS[kind].severity}</td>'
        f'<td><a href="#{kind}">{escape(KINDS[kind].title)}</a></td>'
        f'<td class="count">{diagnosis.findings.count(kind):,}</td>'
        f'<td class="advice soft">{escape(KINDS[kind].advice)}</td></tr>\n'
        for kind in diagnosis.findings.kinds()
    )
    if not rows:
        return ""
    head = '<tr><th></th><th>found</th><th style="text-align:right">rows</th><th class="advice">what to do</th></tr>'
    return f"<table>{head}{rows}</table>\n"


def _section(diagnosis: Diagnosis, kind: str) -> str:
    severity, title, advice, is_dropped = KINDS[kind]
    rows = diagnosis.findings.rows[kind]
    names = ", ".join(diagnosis.source.row_name(row) for row in rows[:MAX_NAMES]) + (", …" * (len(rows) > MAX_NAMES))
    left_out = " A cleaned copy (--fix) leaves these rows out." if is_dropped else ""
    examples = "".join(map(_card, make_examples(diagnosis, kind)))
    return (
        f'<section id="{kind}"><h2><span class="{severity}">{severity}</span> · {escape(title)} · '
        f"{count_rows(len(rows))}</h2><p>{escape(advice[0].upper() + advice[1:])}.{left_out}</p>"
        f'<p class="soft small">{escape(names)}</p><div class="cards">{examples}</div></section>\n'
    )


def _card(example: Example) -> str:
    figures = _figure("original", example.original) + _figure("edited", example.edited)
    figures += _figure("edges: red before, blue after", example.edges) if example.edges else ""
    prompt = escape(example.prompt) if example.prompt else '<span class="soft">no instruction</span>'
    prompt = f'<p class="prompt">{prompt}</p>'
    return (
        f'<div class="card"><div class="pictures">{figures}</div>{prompt}'
        f'<p class="soft small">{escape(example.name)}: {escape(example.detail)}</p></div>\n'
    )


def _figure(label: str, picture: str | None) -> str:
    shown = f'<img src="{picture}" alt="{label}">' if picture else '<div class="none">cannot be read</div>'
    return f"<figure>{shown}<figcaption>{label}</figcaption></figure>"


def _chart(histogram: Histogram) -> str:
    """Horizontal bars, one for each series in each bin; bins without rows at both ends are left out."""
    totals = [sum(values) for values in zip(*histogram.series.values(), strict=True)]
    filled = [index for index, total in enumerate(totals) if total]
    bins = range(filled[0], filled[-1] + 1) if filled else range(0)
    largest = max((max(values) for values in histogram.series.values() if values), default=0) or 1
    rows = ""
    for index in bins:
        counts = [values[index] for values in histogram.series.values()]
        widths = [max(100 * count / largest, 0.4 if count else 0) for count in counts]  # one row is seen, none is not
        bars = "".join(f'<div class="bar" style="width:{width:.1f}%"></div>' for width in widths)
        numbers = " / ".join(f"{count:,}" for count in counts)
        rows += f"<span>{escape(histogram.labels[index])}</span><div>{bars}</div><span>{numbers}</span>"
    names = list(histogram.series)
    key = "".join(f'<span class="key">{name}</span>' for name in names) if len(names) > 1 else ""
    return f'<div><h3>{escape(histogram.title)}</h3><div class="bars">{rows}</div><p class="soft small">{key}</p></div>'
