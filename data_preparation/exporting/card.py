"""The card of a published pair set: the front matter that the Hub reads, then the sections of sections.py."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, DatasetCardData, get_token

from data_preparation.exporting import sections
from data_preparation.exporting.facts import Facts
from data_preparation.exporting.licensing import OTHER, is_repo_id
from data_preparation.exporting.sections import Export
from utils.hub import redact
from utils.licences import is_hub_licence

GRID = "assets/grid.jpg"
SIZE_CATEGORIES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


def card_text(export: Export, facts: Facts) -> str:
    """`README.md`; no path and no token gets into it."""
    parts = [
        f"# {sections.pretty(export.repo_id)}",
        sections.summary(export, facts),
        f"![{len(facts.tasks)} tasks: originals, edited pictures, instructions]({GRID})",
        "## Use",
        sections.usage(export),
        "## Splits",
        sections.splits(export, facts),
        "## Tasks",
        sections.tasks(facts),
        *(["## Scores", sections.scores(facts)] if facts.scores else []),
        "## How it was made",
        sections.making(export, facts),
        "## Columns",
        sections.columns(export.features),
        "## Licence",
        sections.licence(export.decision),
        "## Limitations and bias",
        sections.limitations(export, facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return redact(f"---\n{_front_matter(export, facts).to_yaml()}\n---\n\n{body}\n", get_token())


def save_card(text: str, folder: Path) -> None:
    """Write it beside its place and rename it."""
    half_written = folder / ".README.md"
    DatasetCard(text).save(half_written)
    half_written.replace(folder / "README.md")


def _front_matter(export: Export, facts: Facts) -> DatasetCardData:
    total = sum(sizes["rows"] for sizes in export.sizes.values())
    carried = export.decision.carried
    is_known = is_hub_licence(carried)
    info = datasets.DatasetInfo(
        features=export.features,
        splits=datasets.SplitDict.from_split_dict(
            {
                split: {"name": split, "num_bytes": sizes["bytes"], "num_examples": sizes["rows"]}
                for split, sizes in export.sizes.items()
            }
        ),
        download_size=sum(sizes["file_bytes"] for sizes in export.sizes.values()),
        dataset_size=sum(sizes["bytes"] for sizes in export.sizes.values()),
    )
    # With the number of files in the name: files of another export of this repository never count as rows of this one.
    files = [
        {"split": split, "path": f"data/{split}-*-of-{sizes['files']:05d}.parquet"}
        for split, sizes in export.sizes.items()
    ]
    data = DatasetCardData(
        license=carried if is_known else OTHER,
        license_name=None if is_known else re.sub(r"[^\w.-]+", "-", carried) if carried != OTHER else "see-each-row",
        pretty_name=sections.pretty(export.repo_id),
        language=[export.language],
        task_categories=["image-to-image"],
        size_categories=[next((name for limit, name in SIZE_CATEGORIES if total < limit), "10M<n<100M")],
        tags=["instruct-pix2pix", "image-editing", "instruction-tuning", *_task_tags(facts)],
        source_datasets=sorted({name for name, _ in facts.sources if is_repo_id(name)}) or None,
        configs=[{"config_name": "default", "data_files": files}],
    )
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _task_tags(facts: Facts) -> list[str]:
    return [task for task in facts.tasks if task != "unnamed" and re.fullmatch(r"[\w-]{1,40}", task)][:20]
