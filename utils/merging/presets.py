"""The published few-step distillations of SD 1.5 and SDXL (presets.json): their files, bases, and recommended settings.

Ids, files and settings are those of the model pages; `unverified` names what could not be checked there. `is_reported`
marks the few that others reported to have run on an editor; nobody is known to have run the rest. None was run here.
docs/fast_editing.md explains which distillations are not listed.
"""

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE_FIELDS = ("subfolder", "weight_name", "variant", "revision")  # of a weight source; each has a flag
SD15, SDXL = "sd1.5", "sdxl"
TRAILING = {"timestep_spacing": "trailing"}  # starts at the last timestep, as few-step models were trained


@dataclass(frozen=True)
class Preset:
    """A LoRA, or a distilled UNet from which the UNet of `base` is subtracted.

    scheduler: class name in diffusers; scheduler_settings override the editor's. resolution: recommended longer side in
    pixels, None is the editor's own. licence: None if it could not be looked up. is_reported: others ran it on an
    editor with these settings. unverified: what was not checked on the model page. note: what else is known.
    """

    family: str
    id: str
    scheduler: str
    steps: int
    subfolder: str | None = None
    weight_name: str | None = None
    variant: str | None = None
    base: str | None = None
    weight: float = 1.0
    scheduler_settings: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.5
    image_guidance_scale: float = 1.0
    eta: float = 0.0
    lcm_guidance: float | None = None
    resolution: int | None = None
    licence: str | None = None
    is_reported: bool = False
    unverified: str = ""
    note: str = ""

    @property
    def kind(self) -> str:
        return "distilled" if self.base else "lora"


_CONTENT = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
PRESETS = {name: Preset(**values) for name, values in _CONTENT.items()}


def describe_presets(width: int) -> str:
    """The presets as a table of at most `width` columns, and the details of each in the lines below its name."""
    blocks = []
    for family in (SD15, SDXL):
        blocks.append(f"presets for {family}:")
        for name, preset in PRESETS.items():
            if preset.family == family:
                lines = [_describe_source(preset), _describe_settings(preset), _describe_evidence(preset)]
                blocks.append("\n".join([f"  {name}", *(_wrap(line, width) for line in lines)]))
    return "\n".join(blocks)


def _describe_source(preset: Preset) -> str:
    source = "/".join(part for part in (preset.id, preset.subfolder, preset.weight_name) if part)
    return f"{source}{f', minus {preset.base}' if preset.base else ''}; licence {preset.licence or 'unknown'}"


def _describe_settings(preset: Preset) -> str:
    changed = "".join(f", {key}={value}" for key, value in preset.scheduler_settings.items())
    resolution = f", {preset.resolution} pixels" if preset.resolution else ""
    scales = f"guidance scale {preset.guidance_scale:g}, image guidance scale {preset.image_guidance_scale:g}"
    steps = f"{preset.steps} step{'s' if preset.steps > 1 else ''} of {preset.scheduler}{changed}"
    return f"weight {preset.weight:g}, {steps}, {scales}, eta {preset.eta:g}{resolution}"


def _describe_evidence(preset: Preset) -> str:
    evidence = "reported by others" if preset.is_reported else "not tried on an editor"
    unverified = f"; not verified: {preset.unverified}" if preset.unverified else ""
    return f"{evidence}{f' ({preset.note})' if preset.note else ''}{unverified}"


def _wrap(text: str, width: int) -> str:
    indent = " " * 6
    place = dict(initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, max(40, width), **place)
