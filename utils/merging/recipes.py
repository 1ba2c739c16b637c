"""From the values of flags to a recipe: a flag wins, then the preset speaks, then the custom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.editing.schedulers import OWN_TIMESTEPS, SCHEDULERS
from utils.merging.ingredients import Recipe
from utils.merging.merge import MergeOptions
from utils.merging.methods import DEFAULT_DENSITY
from utils.merging.presets import PARTS, PRESETS, TRAILING, Preset
from utils.merging.weight_sources import WeightSource

ROLES = ("distilled", "base", "lora", "delta")
FEW_STEPS = {"steps": 4, "guidance_scale": 1.5, "image_guidance_scale": 1.0, "eta": 0.0}
TCD_ETA = 0.3  # TCDScheduler's own default


def make_recipe(flags: Mapping[str, Any]) -> Recipe:
    """flags: the values of adapt_distill.py's flags by their names, found good. The weight may be left open (None)."""
    preset = PRESETS.get(flags["preset"])
    weights = [text.rpartition("=") for text in flags["block_weights"]]
    merge = MergeOptions(
        weight=preset.weight if flags["weight"] is None and preset else flags["weight"],
        block_weights=tuple((pattern, float(weight)) for pattern, _, weight in weights),
        conv_in=flags["conv_in"],
        method=flags["method"],
        seed=flags["seed"],
        density=flags["density"] or DEFAULT_DENSITY[flags["method"]],
    )
    scheduler = choose_scheduler_settings(flags["scheduler"], flags["timestep_spacing"], preset)
    recommended = {name: getattr(preset, name, value) for name, value in FEW_STEPS.items()} if scheduler else {}
    if flags["scheduler"] == "tcd" and not preset:
        recommended["eta"] = TCD_ETA  # the pipelines' own 0 takes its noise away
    recommended |= {name: flags[name] for name in FEW_STEPS if flags[name] is not None}
    return Recipe(
        model=WeightSource("--model", flags["model"], variant=flags["model_variant"], revision=flags["model_revision"]),
        output_dir=Path(flags["output_dir"]),
        sources=make_sources(flags, preset),
        merge=merge,
        scheduler=scheduler,
        lcm_guidance=preset.lcm_guidance if preset and flags["lcm_guidance"] is None else flags["lcm_guidance"],
        recommended=recommended,
        dtype=flags["dtype"],
        cache_dir=flags["cache_dir"],
        preset=flags["preset"],
        licences={preset.id: preset.licence} if preset and preset.licence else {},
        family=preset.family if preset else None,
    )


def make_sources(flags: Mapping[str, Any], preset: Preset | None) -> dict[str, WeightSource]:
    """The sources by their roles; a source that is named in place of the preset's has nothing of that one's."""
    known: dict[str, dict[str, str | None]] = {}
    if preset:
        known[preset.kind] = {"name": preset.id} | {part: getattr(preset, part, None) for part in PARTS}
        known |= {"base": {"name": preset.base}} if preset.base else {}
    sources = {}
    for role in ROLES:
        fields = {} if flags[role] else known.get(role, {})
        given = {"name": flags[role]} | {part: flags[f"{role}_{part}"] for part in PARTS}
        fields = fields | {part: value for part, value in given.items() if value}
        if "name" in fields:
            sources[role] = WeightSource(f"--{role}", **fields)
    return sources


def choose_scheduler_settings(
    name: str | None, timestep_spacing: str | None, preset: Preset | None
) -> tuple[str, dict[str, Any]] | None:
    """(class, settings) of the new editor's scheduler; None for the editor's own."""
    if name is None:
        return (preset.scheduler, preset.scheduler_settings) if preset else None
    class_name, settings = SCHEDULERS[name]
    spacing = {"timestep_spacing": timestep_spacing} if timestep_spacing else TRAILING
    has_spacing = class_name not in OWN_TIMESTEPS and not class_name.startswith("EDM")
    return class_name, settings | (spacing if has_spacing or timestep_spacing else {})
