"""The card of an adapted editor, and `adapted.json`, from which infer.py and app.py take their defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, get_token

from utils.hub import redact
from utils.licences import Licence

ADAPTED = "adapted.json"
FEW_STEPS = "; other numbers of steps and other schedulers than these are not what the source was trained for"
_TEXT = """\
# {name}

An image editor that follows instructions, [InstructPix2Pix](https://arxiv.org/abs/2211.09800), adapted by weight
arithmetic with `adapt_distill.py`: the weights of its UNet are those of {editor} plus {weight} times the change that
{change} makes. Nothing was trained for it. How good its edits are was not measured when this card was written.

## Use

```python
import torch
from diffusers import {pipeline_class}
from diffusers.utils import load_image

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
pipeline = {pipeline_class}.from_pretrained({model}, torch_dtype=dtype).to(device)
edited = pipeline(
    "make it a watercolor painting",
    image=load_image("photograph.jpg"),
{call}
    generator=torch.manual_seed(0),
).images[0]
edited.save("edited.png")
```

The saved scheduler is `{scheduler}`{advice}.{eta}

## How it was made

{table}

Sizes of the change, block by block, and what was left out: `report.json`.

## Licences

{licences}
"""


def write_adapted(folder: Path, facts: Mapping[str, object]) -> None:
    """Write `adapted.json`; `facts["recommended"]`: steps, guidance_scale, image_guidance_scale, eta, scheduler."""
    (folder / ADAPTED).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def write_adapted_card(
    folder: Path, facts: Mapping, licences: Sequence[Licence], pipeline_class: str, name: str, repo_id: str | None
) -> None:
    """Write `README.md`; no token gets into it."""
    recommended, sources = facts["recommended"], facts["sources"]
    rows = {key: value for key, value in facts.items() if key not in ("recommended", "sources", "made_by") and value}
    rows |= {source["role"]: _describe(source) for source in sources}
    known = {licence.name for licence in licences if licence.name}
    restricted = [licence.name for licence in licences if licence.restrictions and licence.name]
    data = ModelCardData(
        license=_as_hub_licence((restricted or sorted(known) or [""])[0]),
        base_model=[licence.source for licence in licences if _is_hub_id(licence.source)] or None,
        base_model_relation="merge" if any(_is_hub_id(licence.source) for licence in licences) else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "image-to-image", "diffusers", "few-step"],
    )
    call = {"num_inference_steps": recommended["steps"]}
    call |= {key: recommended[key] for key in ("guidance_scale", "image_guidance_scale", "eta")}
    changes = [f"`{source['name']}`" for source in sources if source["role"] not in ("editor", "base")]
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    text = _TEXT.format(
        name=name,
        editor=f"`{sources[0]['name']}`",
        weight=facts["weight"],
        change=" and ".join(changes),
        pipeline_class=pipeline_class,
        model=json.dumps(repo_id or name),
        call="\n".join(f"    {key}={value}," for key, value in call.items()),
        scheduler=recommended["scheduler"],
        advice=FEW_STEPS if recommended["steps"] <= 8 else "",
        eta=" Pipelines pass `eta=0` unless it is given, in place of TCD's own." if recommended["eta"] else "",
        table="\n".join(["| what | value |", "|---|---|", *lines]),
        licences="\n".join(_tell(licence) for licence in licences),
    )
    ModelCard(redact(f"---\n{data.to_yaml()}\n---\n\n{text}", get_token())).save(folder / "README.md")


def _describe(source: Mapping) -> str:
    revision = f" at `{source['revision']}`" if source.get("revision") else ""
    return (
        f"`{source['name']}`{revision}: {', '.join(source['files'])}" if source.get("files") else f"`{source['name']}`"
    )


def _tell(licence: Licence) -> str:
    named = f"`{licence.name}`" if licence.name else "**not known to the script: look it up before publishing**"
    forbidden = f"; it is **{' and '.join(licence.restrictions)}**" if licence.restrictions else ""
    return f"- `{short_name(licence.source)}`: {named}{forbidden}. Its terms pass on to this model."


def short_name(name: str) -> str:
    """A Hub id, or of a local path the last part: where it lay is its owner's affair."""
    return name if _is_hub_id(name) else Path(name).resolve().name


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()


def _as_hub_licence(name: str) -> str:
    is_known = name.startswith(("cc-", "creativeml", "openrail", "apache", "mit", "bigscience"))
    return name if is_known else "other"


def _cell(value: object) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
