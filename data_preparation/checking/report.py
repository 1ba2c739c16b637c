"""A diagnosis as text for the terminal, as JSON, and as one HTML page with example images."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, Template
from PIL import Image

from data_preparation.checking.diagnosis import Diagnosis
from utils.checks import image_measures as measures
from utils.checks.findings import KINDS, SEVERITIES, printable
from utils.checks.pair_inspection import WORKING_SIDE, working_pair
from utils.data.columns import usable_prompts
from utils.pixels import BadRow, decode_image

TEMPLATE = Path(__file__).with_name("report.html")
VERDICTS = {
    "error": "Has rows that spoil training or evaluation scores",
    "warning": "Ready for training; look at the warnings first",
    "fine": "No problems found",
}
TERMINAL_ROWS, PAGE_ROWS = 4, 12  # row names listed for each finding
MAX_EXAMPLES = 6
THUMBNAIL_SIDE = 224
MAX_TASKS = 24
NO_TASK = "(none)"
OPEN_END = 1 << 31
SIDE_BINS = [0, 64, 128, 256, 384, 512, 768, 1024, 2048, OPEN_END]
TOKEN_BINS = [0, 8, 16, 24, 32, 48, 64, 78, OPEN_END]
BRIGHTNESS_BINS = list(range(0, 257, 16))
COLOUR_BINS = [0, 2, 10, 20, 30, 40, 50, 60, 80, 100, OPEN_END]


def describe(diagnosis: Diagnosis) -> str:
    """The lines for the terminal: of each finding the number of rows, some row names, an example and what to do."""
    columns, findings, row_name = diagnosis.source.columns, diagnosis.findings, diagnosis.source.row_name
    dataset, num_rows = diagnosis.dataset, describe_rows(len(diagnosis.records))
    lines = [
        f"{dataset.dataset_name}, split {dataset.split}: {num_rows} with "
        f"{diagnosis.num_originals:,} different originals, checked in {diagnosis.seconds:.1f} s",
        f"  columns: {columns.original} / {columns.prompt} / {columns.edited}",
    ]
    lines += [f"  compared with {name}: {describe_rows(count)}" for name, count in diagnosis.compared_with.items()]
    width = max((len(KINDS[kind].title) for kind in findings.kinds()), default=0)
    for kind in findings.kinds():
        severity, title, advice, _ = KINDS[kind]
        rows = findings.rows[kind]
        names = list_rows(diagnosis, kind, TERMINAL_ROWS)
        example = f"{row_name(rows[0])}: {findings.details[kind][rows[0]]}"
        lines.append(f"{severity:<8} {title:<{width}} {len(rows):>7,}  {names}")
        if severity != "info":
            lines += [f"{'':<8} {printable(example, 108)}", f"{'':<8} -> {advice}"]
    is_fine = verdict(diagnosis) == "fine"
    return "\n".join([*lines, "no problems found" if is_fine else count_findings(diagnosis)])


def describe_rows(count: int) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} row{'s' * (count != 1)}"


def count_findings(diagnosis: Diagnosis) -> str:
    errors, warnings = (describe_rows(diagnosis.findings.num_rows(severity)) for severity in ("error", "warning"))
    return f"{errors} with errors, {warnings} with warnings"


def list_rows(diagnosis: Diagnosis, kind: str, limit: int) -> str:
    """Names of the first rows with a finding."""
    rows = diagnosis.findings.rows[kind]
    names = ", ".join(diagnosis.source.row_name(row) for row in rows[:limit])
    return names + (", ..." if len(rows) > limit else "")


def verdict(diagnosis: Diagnosis) -> str:
    """The highest severity that was found, "error" or "warning", else "fine"."""
    return next((severity for severity in SEVERITIES[:2] if any(diagnosis.findings.kinds(severity))), "fine")


def write_reports(diagnosis: Diagnosis, folder: Path) -> None:
    """Write report.html and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    report = make_report(diagnosis)
    (folder / "report.html").write_text(make_page(diagnosis, report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_report(diagnosis: Diagnosis) -> dict[str, Any]:
    """The content of report.json: all row numbers of every finding, and details on the first thousand rows."""
    findings, numbers = diagnosis.findings, diagnosis.source.row_numbers
    numbers = list(range(len(diagnosis.records))) if numbers is None else numbers.tolist()  # in the whole dataset
    return {
        "dataset": diagnosis.dataset.dataset_name,
        "split": diagnosis.dataset.split,
        "columns": vars(diagnosis.source.columns),
        "rows": len(diagnosis.records),
        "different_originals": diagnosis.num_originals,
        "compared_with": diagnosis.compared_with,
        "seconds": round(diagnosis.seconds, 1),
        "verdict": verdict(diagnosis),
        "rows_with_errors": findings.num_rows("error"),
        "rows_with_warnings": findings.num_rows("warning"),
        "findings": {
            kind: {
                **KINDS[kind]._asdict(),
                "count": findings.count(kind),
                "rows": [numbers[row] for row in findings.rows[kind]],
                "details": {str(numbers[row]): text for row, text in findings.details[kind].items()},
            }
            for kind in findings.kinds()
        },
        "histograms": make_histograms(diagnosis),
    }


def make_histograms(diagnosis: Diagnosis) -> dict[str, dict]:
    """Each with its title, the labels of the bins, and the counts of each series."""
    records = diagnosis.records
    images = {side: records[side][records[side]["height"] > 0] for side in ("original", "edited")}
    tokens = records["tokens"][records["tokens"] > 0]
    tasks = diagnosis.tasks.most_common(MAX_TASKS)
    if len(diagnosis.tasks) > MAX_TASKS:
        tasks.append(("(others)", len(diagnosis.records) - sum(count for _, count in tasks)))

    def histogram(title: str, edges: list[int], series: dict[str, np.ndarray]) -> dict:
        ranges = zip(edges, edges[1:], strict=False)
        labels = [f"{low}+" if high == OPEN_END else f"{low}-{high - 1}" for low, high in ranges]
        bins = np.array(edges, dtype=np.float64)
        counts = {name: np.histogram(values, bins=bins)[0].tolist() for name, values in series.items()}
        return {"title": title, "labels": labels, "series": counts}

    sides = {name: np.maximum(image["height"], image["width"]) for name, image in images.items()}
    brightness = {name: image["brightness"] for name, image in images.items()}
    colourfulness = {name: image["colourfulness"] for name, image in images.items()}
    return {
        "longer_side": histogram("Longer side in pixels", SIDE_BINS, sides),
        "brightness": histogram("Brightness (mean luminance, 0 to 255)", BRIGHTNESS_BINS, brightness),
        "colourfulness": histogram("Colourfulness (grey 0, photographs about 30)", COLOUR_BINS, colourfulness),
        "tokens": histogram("Tokens of the instruction", TOKEN_BINS, {"rows": tokens}),
        "tasks": {
            "title": "Rows of each task",
            "labels": [name or NO_TASK for name, _ in tasks],
            "series": {"rows": [count for _, count in tasks]},
        },
    }


def make_page(diagnosis: Diagnosis, report: dict[str, Any]) -> str:
    """The HTML page: no scripts, nothing loaded from elsewhere, every text of the dataset escaped."""
    charts = [histogram for histogram in report["histograms"].values() if histogram["labels"] != [NO_TASK]]
    examples = {
        kind: [make_example(diagnosis, kind, row) for row in diagnosis.findings.rows[kind][:MAX_EXAMPLES]]
        for kind in report["findings"]
    }
    template = Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return template.render(
        report=report,
        verdict_text=VERDICTS[report["verdict"]],
        counts=count_findings(diagnosis),
        describe_rows=describe_rows,
        row_names={kind: list_rows(diagnosis, kind, PAGE_ROWS) for kind in report["findings"]},
        examples=examples,
        charts=[(histogram, make_bars(histogram)) for histogram in charts],
    )


def make_bars(histogram: dict) -> list[dict]:
    """Label, widths in percent and counts of every bin, without empty bins at both ends."""
    bins = list(zip(*histogram["series"].values(), strict=True))
    filled = [index for index, counts in enumerate(bins) if any(counts)]
    largest = max(map(max, bins), default=0)
    return [
        {
            "label": histogram["labels"][index],
            "widths": [f"{max(100 * count / largest, 0.4 if count else 0):.1f}" for count in bins[index]],
            "counts": " / ".join(f"{count:,}" for count in bins[index]),
        }
        for index in (range(filled[0], filled[-1] + 1) if filled else ())
    ]


def make_example(diagnosis: Diagnosis, kind: str, row: int) -> dict:
    """Texts and images of a row. images: (caption, data URI, or None if the image cannot be read)."""
    source = diagnosis.source
    values, columns = source.rows[row], source.columns
    images = [_read_image(values[name]) for name in (columns.original, columns.edited)]
    captioned = list(zip(("original", "edited"), images, strict=True))
    if kind == "misaligned" and None not in images:
        captioned.append(("edges: original red, edited blue", draw_edges(*images)))
    return {
        "name": source.row_name(row),
        "prompt": " / ".join(usable_prompts(values[columns.prompt])),
        "detail": diagnosis.findings.details[kind].get(row, ""),
        "images": [(caption, image and as_data_uri(image)) for caption, image in captioned],
    }


def _read_image(value: object) -> Image.Image | None:
    try:
        return decode_image(value, shorter_side=WORKING_SIDE // 2)
    except BadRow:
        return None


def draw_edges(original: Image.Image, edited: Image.Image) -> Image.Image:
    """Edges of the original in red and of the edited image in blue, on white; violet where they coincide."""
    pair = working_pair(np.asarray(original), np.asarray(edited))
    ink = [np.clip(measures.edge_map(measures.to_gray(image)) * 110, 0, 255) for image in pair]
    return Image.fromarray(np.stack([255 - ink[1], 255 - np.maximum(*ink), 255 - ink[0]], axis=-1).astype(np.uint8))


def as_data_uri(image: Image.Image) -> str:
    """A JPEG thumbnail; smaller images keep their size."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=84)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
