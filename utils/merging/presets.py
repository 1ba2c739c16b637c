"""The published few-step distillations of SD 1.5 and SDXL (presets.json): their files, bases, and recommended settings.

Ids, files and settings are those of the model pages; `unverified` names what could not be checked there. How well the
merged editors edit was not tested. docs/fast_editing.md explains which distillations are not listed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE_FIELDS = ("subfolder", "weight_name", "variant", "revision")  # of a weight source; each has a flag
SD15, SDXL = "sd1.5", "sdxl"
TRAILING = {"timestep_spacing": "trailing"}  # starts at the last timestep, as few-step models were trained


@dataclass(frozen=True)
class Preset:
    """A LoRA, or a distilled UNet from which the UNet of `base` is subtracted.

    scheduler: class name in diffusers; scheduler_settings override the editor's. licence: None if the source's model
    card has it. unverified: what was not checked on the model page. note: for readers of presets.json.
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
    unverified: str = ""
    note: str = ""

    @property
    def kind(self) -> str:
        return "distilled" if self.base else "lora"


_CONTENT = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
PRESETS = {name: Preset(**values) for name, values in _CONTENT.items()}


def describe_presets() -> str:
    """The presets as a table, one per line."""
    rows = [["preset", "source", "minus", "weight", "scheduler", "steps", "guidance", "eta", "licence", "not verified"]]
    for name, preset in PRESETS.items():
        source = "/".join(part for part in (preset.id, preset.subfolder, preset.weight_name) if part)
        settings = ", ".join(f"{key}={value}" for key, value in preset.scheduler_settings.items())
        scheduler = preset.scheduler.removesuffix("Scheduler") + (f" ({settings})" if settings else "")
        scales = f"{preset.guidance_scale:g} / {preset.image_guidance_scale:g}"
        numbers = [f"{preset.steps}", scales, f"{preset.eta:g}"]
        row = [name, source, preset.base or "-", f"{preset.weight:g}", scheduler, *numbers]
        rows.append([*row, preset.licence or "-", preset.unverified or "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
