"""`adapted.json`, from which infer.py and app.py take their defaults, and the model card of an adapted editor."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.editing.settings import ADAPTED
from utils.licences import Licence, merged_license_fields
from utils.model_cards import code_names, describe_licences, make_metadata, make_snippet, make_table, save_card

FEW_STEPS = 8


def write_adapted(folder: Path, facts: Mapping[str, object]) -> None:
    """Write `adapted.json`; `facts["recommended"]`: keys of `DEFAULT_SETTINGS`, and the scheduler."""
    (folder / ADAPTED).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def write_adapted_card(
    folder: Path, facts: Mapping, licences: Sequence[Licence], pipeline_class: str, name: str, repo_id: str | None
) -> None:
    """Write `README.md`, the model card."""
    recommended, sources = facts["recommended"], facts["sources"]
    rows = {key: value for key, value in facts.items() if key not in ("recommended", "sources", "made_by") and value}
    rows |= {source["role"]: _describe(source) for source in sources}
    metadata = make_metadata(
        merged_license_fields(licences),
        [licence.source for licence in licences],
        "merge",
        ["instruct-pix2pix", "image-to-image", "diffusers", "few-step"],
    )
    settings = {"num_inference_steps": recommended["steps"]}
    settings |= {key: recommended[key] for key in ("guidance_scale", "image_guidance_scale", "eta")}
    save_card(
        folder,
        "adapted_editor.md",
        metadata,
        name=name,
        editor=code_names([sources[0]["name"]]),
        weight=facts["weight"],
        change=code_names([source["name"] for source in sources if source["role"] not in ("editor", "base")]),
        snippet=make_snippet(pipeline_class, repo_id or name, settings, max_side=recommended.get("resolution")),
        scheduler=recommended["scheduler"],
        is_few_step=recommended["steps"] <= FEW_STEPS,
        eta=recommended["eta"],
        table=make_table(("what", "value"), rows),
        licences=describe_licences(licences),
    )


def _describe(source: Mapping) -> str:
    revision = f" at `{source['revision']}`" if source.get("revision") else ""
    files = f": {', '.join(source['files'])}" if source.get("files") else ""
    return f"{code_names([source['name']])}{revision}{files}"
