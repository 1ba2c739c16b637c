"""What a card tells of an export, section by section, in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from data_preparation.exporting.facts import Facts, Range
from data_preparation.exporting.licensing import OTHER, UNNAMED, Decision
from data_preparation.exporting.scrubbing import scrub
from data_preparation.exporting.splitting import SPLITS
from utils.licences import Licence

MEANINGS = {
    "original_image": "the picture before the edit",
    "edit_prompt": "the instruction",
    "edited_image": "the picture after it",
    "original_prompt": "caption of the original",
    "edited_prompt": "caption of the edited picture",
    "task": "the kind of edit",
    "phrasing": "`train`, or `heldout` for a way of asking that is kept for evaluation",
    "source": "the photograph or caption that the row was made of",
    "source_dataset": "where that comes from",
    "source_license": "its licence",
    "models": "JSON: id and revision of the models that made the row",
    "seed": "of what was random about the row",
    "settings": "JSON: what was drawn for the row",
    "scores": "JSON: what filters measured",
}
SCORES = {
    "clip_sim_0": "CLIP: original and its caption",
    "clip_sim_1": "CLIP: edited picture and its caption",
    "clip_sim_dir": "CLIP: change of picture and change of caption",
    "clip_sim_image": "CLIP: original and edited picture",
}
LIMITATIONS = """\
- The pairs were made by programs and models, and were not looked at one by one. Some show no edit, another edit than
  the instruction asks for, or a change where none was asked.
- Instructions are in few forms of words ({language}); an editor trained on these pairs alone understands little else.
- The pictures carry the biases of where they come from: whom they show, and how, was the choice of photographers and
  models. They may show people, who were not asked about this use.{photographs}
- Scores are those of models, which share those biases; a high score is no proof of a right edit.
- Not meant for deceiving, for harming, or for judging people."""


@dataclass(frozen=True)
class Export:
    """What a card is about. sizes: of each split, rows, bytes, file_bytes, files. settings, rejected: of the making.

    left_out: rows with held-out phrasings of training sources; sources: source images of each split.
    """

    repo_id: str
    features: datasets.Features
    sizes: Mapping[str, Mapping[str, int]]
    settings: Mapping[str, object]
    rejected: Mapping[str, int]
    decision: Decision
    fractions: Sequence[float]
    seed: int
    sources: Mapping[str, int]
    left_out: int = 0
    language: str = "en"


def summary(export: Export, facts: Facts) -> str:
    total = sum(sizes["rows"] for sizes in export.sizes.values())
    tasks = [task for task in facts.tasks if task != "unnamed"]
    kinds = f" of {len(tasks)} kind{'s' * (len(tasks) != 1)} ({', '.join(tasks[:12])})" if tasks else ""
    text = (
        f"{total:,} pair{'s' * (total != 1)} of pictures with the instruction that leads from one to the other, for "
        "training an editor as [InstructPix2Pix](https://arxiv.org/abs/2211.09800) is trained"
    )
    return f"{text}: edits{kinds}." if kinds else f"{text}."


def usage(export: Export) -> str:
    side = 256
    split = next(iter(export.sizes))
    return f"""\
```python
from datasets import load_dataset

pairs = load_dataset({json.dumps(export.repo_id)}, split="{split}")  # streaming=True reads without downloading all
row = pairs[0]
print(row["edit_prompt"])
row["original_image"].save("original.png")
row["edited_image"].save("edited.png")
```

Its columns have the names that training scripts of InstructPix2Pix look for, so that no flag need name them:

```bash
accelerate launch --mixed_precision="fp16" train_instruct_pix2pix.py \\
    --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --dataset_name={export.repo_id} --resolution={side} --random_flip \\
    --train_batch_size=4 --gradient_accumulation_steps=4 --gradient_checkpointing \\
    --max_train_steps=15000 --learning_rate=5e-05 --lr_warmup_steps=0 --output_dir=my-editor
```"""


def splits(export: Export, facts: Facts) -> str:
    rows = [
        (
            split,
            f"{sizes['rows']:,}",
            f"{export.sources[split]:,}",
            f"{facts.held_out[split]:,}",
            _size(sizes["file_bytes"]),
            sizes["files"],
        )
        for split, sizes in export.sizes.items()
    ]
    shares = ", ".join(
        f"{100 * share:g}% {split}" for split, share in zip(SPLITS, export.fractions, strict=True) if share
    )
    text = (
        f"Split by source image ({shares}; seed {export.seed}): all rows made of one photograph or caption stand on "
        "one side, and rows that name no source are told apart by the bytes of their original."
    )
    if export.left_out or any(facts.held_out.values()):
        text += " Held-out phrasings are ways of asking kept for evaluation; train has none" + (
            f" ({export.left_out:,} such rows of training sources were left out)." if export.left_out else "."
        )
    sides = facts.sides
    if sides is not None and len(sides):
        low, high = sides.min(axis=0), sides.max(axis=0)
        shown = f"{low[1]}×{low[0]}" if (low == high).all() else f"{low[1]}×{low[0]} to {high[1]}×{high[0]}"
        text += f" Originals are {shown} pixels (width × height, {len(sides)} measured)."
    return f"{_table(('split', 'rows', 'source images', 'held-out phrasings', 'size', 'files'), rows)}\n\n{text}"


def tasks(facts: Facts) -> str:
    splits = [split for split in SPLITS if any(facts.rows[task, split] for task in facts.tasks)]
    rows = [
        (task, *(f"{facts.rows[task, split]:,}" for split in splits), "; ".join(facts.examples.get(task, [])))
        for task in facts.tasks
    ]
    return _table(("task", *splits, "instructions, for example"), rows)


def scores(facts: Facts) -> str:
    rows = [
        (
            name,
            SCORES.get(name, ""),
            f"{len(values):,}",
            *(f"{value:.3f}" for value in (values.mean(), values.min(), *np.percentile(values, (5, 50, 95)))),
        )
        for name, values in facts.scores.items()
    ]
    return _table(("score", "of what", "rows", "mean", "lowest", "5%", "median", "95%"), rows)


def making(export: Export, facts: Facts) -> str:
    told = [_code(name) for name in ("source", "models", "seed", "settings") if name in export.features]
    parts = [f"Each row says how it was made ({', '.join(told)})." if told else "How it was made was not recorded."]
    if facts.models:
        rows = [
            (_code(name), _code(revision) if revision else "", f"{count:,}")
            for (name, revision), count in sorted(facts.models.items())
        ]
        parts.append("Models:\n\n" + _table(("model", "revision", "rows"), rows))
    if export.settings:
        rows = [(name, _code(value)) for name, value in _flat(scrub(dict(export.settings))).items()]
        parts.append("Settings of the making:\n\n" + _table(("setting", "value"), rows))
    drawn = [
        (task, name, _range(found))
        for task, by_name in sorted(facts.settings.items())
        for name, found in sorted(by_name.items())
    ]
    if drawn:
        parts.append("Drawn for each row (in `settings`):\n\n" + _table(("task", "setting", "values"), drawn))
    if export.rejected:
        rows = [(reason, f"{count:,}") for reason, count in sorted(scrub(dict(export.rejected)).items())]
        parts.append("Left out by filters while it was made:\n\n" + _table(("reason", "items"), rows))
    elif export.settings:
        parts.append("No filter left anything out while it was made.")
    return "\n\n".join(parts)


def columns(features: datasets.Features) -> str:
    return _table(("column", "what"), [(_code(name), MEANINGS[name]) for name in features])


def licence(decision: Decision) -> str:
    carried = decision.carried
    first = (
        "There is no one licence for the whole."
        if carried == OTHER
        else f"These pairs are published under `{carried}`, which permits no more than any of what they are made of."
    )
    rows = [("source", _name(one), _licence_name(one)) for one in decision.sources]
    rows += [("model", _name(one), _licence_name(one)) for one in decision.models]
    return "\n\n".join([f"{first} {' '.join(decision.notes)}".strip(), _table(("", "name", "licence"), rows)])


def _name(one: Licence) -> str:
    return one.source if one.source == UNNAMED else _code(one.source)


def _licence_name(one: Licence) -> str:
    forbidden = f" (**{', '.join(one.restrictions)}**)" if one.restrictions else ""
    return f"{one.name or 'not known'}{forbidden}"


def limitations(export: Export, facts: Facts) -> str:
    photographs = "" if facts.models else "\n- The originals are photographs, or what degrading them makes of them."
    language = "English" if export.language == "en" else export.language
    return LIMITATIONS.format(language=language, photographs=photographs)


def _range(found: Range) -> str:
    parts = []
    if found.low <= found.high:
        parts.append(f"{found.low:.4g}" if found.low == found.high else f"{found.low:.4g} to {found.high:.4g}")
    values = [value if len(value) <= 40 else f"{value[:37]}..." for value in sorted(found.values)]
    return ", ".join([*parts, *values[:6], *(["..."] if len(values) > 6 else [])])


def _flat(value: Mapping, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{name}.")
        elif inner is not None:
            text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
            flat[f"{prefix}{name}"] = text if len(text) <= 200 else f"{text[:197]}..."
    return flat


def pretty(repo_id: str) -> str:
    return re.sub(r"[-_]+", " ", repo_id.split("/")[-1]).strip()


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    return "\n".join([line(header), f"|{'---|' * len(header)}", *map(line, rows)])
