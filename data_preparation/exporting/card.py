"""The dataset card: facts counted in the exported files, presented by the template dataset_card.md."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, get_token

from data_preparation.exporting.export_shards import DROPPED, HELD_OUT, SPLITS, RowKeys, measure_splits
from data_preparation.exporting.licensing import NO_SOURCE, OTHER, LicenceChoice, names_repository
from data_preparation.exporting.reading import ExportInput, ExportOptions, scrub
from data_preparation.generation.pair_rows import PROVENANCE_COLUMNS, parse_json
from utils.hub import redact
from utils.licences import license_fields
from utils.pixels import BadRow, peek_size

TEMPLATE = Path(__file__).with_name("dataset_card.md")
GRID = "assets/grid.jpg"
SIZE_CATEGORIES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
NO_TASK = "unnamed"
MAX_INSTRUCTIONS = 3  # listed for each task
MAX_VALUES = 6  # listed for each setting that is not a number
MEASURED_ROWS = 200


@dataclass
class ValueRange:
    """Values of a setting: low and high of its numbers, and the first of its other values."""

    low: float = np.inf
    high: float = -np.inf
    texts: list[str] = field(default_factory=list)

    def add(self, value: object) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.low, self.high = min(self.low, value), max(self.high, value)
        elif isinstance(value, (str, bool)) and str(value) not in self.texts and len(self.texts) <= MAX_VALUES:
            self.texts.append(str(value))

    def __str__(self) -> str:
        texts = [_shorten(text, 40) for text in sorted(self.texts)]
        parts = texts[:MAX_VALUES] + (["..."] if len(texts) > MAX_VALUES else [])
        if self.low < self.high:
            parts.insert(0, f"{self.low:.4g} to {self.high:.4g}")
        elif self.low == self.high:
            parts.insert(0, f"{self.low:.4g}")
        return ", ".join(parts)


@dataclass
class ExportFacts:
    """sizes: of `measure_splits`; num_sources: source images of each split; num_dropped: held-out rows not exported.

    rows: by (task, split); scores: values by name; models: rows by (id, revision); sources: rows by (dataset, licence);
    settings: task -> name -> values; sides: int (n, 2), height and width of some originals.
    """

    sizes: dict[str, dict[str, int]]
    num_sources: dict[str, int]
    num_dropped: int
    sides: np.ndarray
    rows: Counter = field(default_factory=Counter)
    instructions: dict[str, list[str]] = field(default_factory=dict)
    held_out: Counter = field(default_factory=Counter)
    scores: dict[str, list[float]] = field(default_factory=dict)
    models: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    settings: dict[str, dict[str, ValueRange]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.rows})

    @property
    def num_rows(self) -> int:
        return sum(sizes["rows"] for sizes in self.sizes.values())

    def add(self, columns: Mapping[str, list], split: str) -> None:
        """Count the rows of a row group."""
        self.sources.update(zip(columns["source_dataset"], columns["source_license"], strict=True))
        self.held_out[split] += columns["phrasing"].count(HELD_OUT)
        names = ("edit_prompt", "task", "models", "settings", "scores")
        for prompt, task, models, settings, scores in zip(*(columns[name] for name in names), strict=True):
            task = task or NO_TASK
            self.rows[task, split] += 1
            listed, text = self.instructions.setdefault(task, []), first_instruction(prompt)
            if text and len(listed) < MAX_INSTRUCTIONS and text not in listed:
                listed.append(text)
            for entry in parse_json(models) or ():
                if isinstance(entry, dict):
                    self.models[str(entry.get("id")), entry.get("revision") or ""] += 1
            for name, value in flatten_values(parse_json(settings)).items():
                self.settings.setdefault(task, {}).setdefault(name, ValueRange()).add(value)
            for name, value in flatten_values(parse_json(scores)).items():
                if isinstance(value, (int, float)) and np.isfinite(value):
                    self.scores.setdefault(name, []).append(float(value))


def gather_facts(folder: Path, keys: RowKeys, splits: np.ndarray) -> ExportFacts:
    """Count what the card needs in the files of `folder`. splits: of `assign_splits`."""
    num_sources = {
        split: len({key for key, number in zip(keys.sources, splits, strict=True) if number == index})
        for index, split in enumerate(SPLITS)
    }
    facts = ExportFacts(measure_splits(folder), num_sources, int((splits == DROPPED).sum()), _measure_images(folder))
    for split in SPLITS:
        for _, _, columns in read_text_groups(folder, split):
            facts.add(columns, split)
    return facts


def read_text_groups(folder: Path, split: str) -> Iterator[tuple[Path, int, dict[str, list]]]:
    """(file, row group, its text columns) of a split, in order. Columns that the files do not have hold None."""
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        names = [name for name in ("edit_prompt", *PROVENANCE_COLUMNS) if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            columns = file.read_row_group(group, names).to_pydict()
            absent = [None] * len(columns["edit_prompt"])
            yield path, group, dict.fromkeys(PROVENANCE_COLUMNS, absent) | columns


def first_instruction(prompt: str | list | None) -> str:
    """The instruction of a row, or the first of several."""
    return (prompt[0] if prompt else "") if isinstance(prompt, list) else prompt or ""


def flatten_values(value: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty for anything but a dict."""
    flat: dict[str, object] = {}
    for name, inner in value.items() if isinstance(value, dict) else ():
        flat |= flatten_values(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat


def _measure_images(folder: Path) -> np.ndarray:
    """(n, 2) int: height and width of original images from all parts of the dataset; reads image headers only."""
    groups = [
        (path, i) for path in sorted(folder.glob("*.parquet")) for i in range(pq.read_metadata(path).num_row_groups)
    ]
    chosen = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, min(20, len(groups))).astype(int))]
    sides = []
    for path, group in chosen:
        images = pq.ParquetFile(path).read_row_group(group, ["original_image"])["original_image"]
        for image in images.slice(0, MEASURED_ROWS // len(chosen)).to_pylist():
            try:
                sides.append(peek_size(image))
            except BadRow:
                continue
    return np.array(sides, dtype=int).reshape(-1, 2)


def make_card(
    repo_id: str, options: ExportOptions, rows: ExportInput, facts: ExportFacts, choice: LicenceChoice
) -> str:
    """The text of README.md, without private paths and tokens."""
    shares = [f"{100 * share:g}% {split}" for split, share in zip(SPLITS, options.split, strict=True) if share]
    low, high = facts.sides.min(axis=0, initial=1 << 31), facts.sides.max(axis=0, initial=0)
    sizes = dict.fromkeys(f"{width}×{height}" for height, width in (low, high))
    settings = flatten_values(scrub(rows.settings))
    card = DatasetCard.from_template(
        _front_matter(repo_id, options.language, rows.features, facts, choice),
        template_path=str(TEMPLATE),
        cell=markdown_cell,
        code=markdown_code,
        repo_id=repo_id,
        grid=GRID,
        facts=facts,
        task_names=[" ".join(task.split()) for task in facts.tasks if task != NO_TASK],
        scores=[(name, len(values), _statistics(values)) for name, values in sorted(facts.scores.items())],
        shares=", ".join(shares),
        seed=options.seed,
        image_sizes=" to ".join(sizes) if len(facts.sides) else "",
        columns=list(rows.features),
        settings=[(name, _setting_text(value)) for name, value in settings.items() if value is not None],
        rejected=sorted(scrub(rows.rejected).items()),
        choice=choice,
        no_source=NO_SOURCE,
        instruction_language=options.language,
    )
    return redact(f"{str(card).rstrip()}\n", get_token())


def markdown_cell(value: object) -> str:
    """A value in a Markdown table: pipes and line breaks do not end the cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_code(value: str) -> str:
    """A value as code in a Markdown table; empty for ""."""
    return "`{}`".format(markdown_cell(value).replace("`", "'")) if value else ""


def _statistics(values: list[float]) -> list[str]:
    """Mean, lowest, 5 %, median and 95 %."""
    return [f"{value:.3f}" for value in (np.mean(values), min(values), *np.percentile(values, (5, 50, 95)))]


def _front_matter(
    repo_id: str, language: str, features: datasets.Features, facts: ExportFacts, choice: LicenceChoice
) -> DatasetCardData:
    fields = license_fields(choice.licence)
    if choice.licence == OTHER:
        fields["license_name"] = "see-each-row"
    splits = {
        split: {"name": split, "num_bytes": sizes["bytes"], "num_examples": sizes["rows"]}
        for split, sizes in facts.sizes.items()
    }
    info = datasets.DatasetInfo(
        features=features,
        splits=datasets.SplitDict.from_split_dict(splits),
        download_size=sum(sizes["file_bytes"] for sizes in facts.sizes.values()),
        dataset_size=sum(sizes["bytes"] for sizes in facts.sizes.values()),
    )
    # The number of files is part of their names, so files of another version of this dataset are never read.
    files = [
        {"split": split, "path": f"data/{split}-*-of-{sizes['files']:05d}.parquet"}
        for split, sizes in facts.sizes.items()
    ]
    task_tags = [task for task in facts.tasks if task != NO_TASK and re.fullmatch(r"[\w-]{1,40}", task)][:20]
    data = DatasetCardData(
        **fields,
        pretty_name=re.sub(r"[-_]+", " ", repo_id.split("/")[-1]).strip(),
        language=[language],
        task_categories=["image-to-image"],
        size_categories=[next((name for limit, name in SIZE_CATEGORIES if facts.num_rows < limit), "10M<n<100M")],
        tags=["instruct-pix2pix", "image-editing", "instruction-tuning", *task_tags],
        source_datasets=sorted({name for name, _ in facts.sources if names_repository(name)}) or None,
        configs=[{"config_name": "default", "data_files": files}],
    )
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _setting_text(value: object) -> str:
    return _shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 200)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
