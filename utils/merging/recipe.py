"""What to merge: a recipe from the flags and the preset, and its sources found, opened and checked before writing."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.atomic_files import make_writable, remove_unfinished
from utils.editing.schedulers import OWN_TIMESTEPS, SCHEDULERS
from utils.editing.settings import DEFAULT_SETTINGS
from utils.errors import InputError
from utils.hub import check_push_rights
from utils.licences import Licence, look_up_licence, terms_of
from utils.merging.deltas import Delta, StoredDifference, UNetDifference, UNetWeights
from utils.merging.editor_folder import EditorFolder, find_editor, require_output_dir
from utils.merging.lora_delta import LoraDelta
from utils.merging.merge import DEFAULT_DENSITY, MergeOptions, MergeReport, Rows, check_block_weights, merge_rows
from utils.merging.presets import PRESETS, SD15, SDXL, SOURCE_FIELDS, TRAILING, Preset
from utils.merging.weight_sources import SourceFiles, WeightSource, find_source_files
from utils.weight_files import TensorFiles

ROLES = ("distilled", "base", "lora", "delta")
SDXL_WEIGHT = 0.5  # of distilled SDXL UNets, as instruction-tuned-sd recommends
FEW_STEPS = {"steps": 4, "guidance_scale": 1.5, "image_guidance_scale": 1.0, "eta": 0.0}
TCD_ETA = 0.3  # the default of TCDScheduler


@dataclass(frozen=True)
class MergeRecipe:
    """What to merge.

    sources: by role: "distilled" with "base", "lora" or "delta"; TIES also needs "base". scheduler: (class name,
    settings); None keeps the editor's. recommended: settings for `adapted.json`. preset: a key of `PRESETS`.
    """

    model: WeightSource
    output_dir: Path
    sources: dict[str, WeightSource]
    merge: MergeOptions
    dtype: str = "fp32"
    lcm_guidance: float | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None
    recommended: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    cache_dir: str | None = None

    @property
    def source_names(self) -> list[str]:
        """The names of the editor and of all sources, each once."""
        return list(dict.fromkeys([self.model.name, *(source.name for source in self.sources.values())]))


def make_recipe(flags: Mapping[str, Any]) -> MergeRecipe:
    """The recipe of checked flags of adapt_distill.py. Flags override the preset; the weight may stay None."""
    preset = PRESETS.get(flags["preset"])
    block_weights = [text.rpartition("=") for text in flags["block_weights"]]
    merge = MergeOptions(
        weight=preset.weight if flags["weight"] is None and preset else flags["weight"],
        block_weights=tuple((pattern, float(weight)) for pattern, _, weight in block_weights),
        conv_in=flags["conv_in"],
        method=flags["method"],
        seed=flags["seed"],
        density=flags["density"] or DEFAULT_DENSITY[flags["method"]],
    )
    scheduler = _choose_scheduler(flags["scheduler"], flags["timestep_spacing"], preset)
    recommended = {name: getattr(preset, name, value) for name, value in FEW_STEPS.items()} if scheduler else {}
    if flags["scheduler"] == "tcd" and not preset:
        recommended["eta"] = TCD_ETA  # the pipelines' default, 0, removes its noise
    if preset and preset.resolution:
        recommended["resolution"] = preset.resolution
    recommended |= {name: flags[name] for name in DEFAULT_SETTINGS if flags[name] is not None}
    return MergeRecipe(
        model=WeightSource("--model", flags["model"], variant=flags["model_variant"], revision=flags["model_revision"]),
        output_dir=Path(flags["output_dir"]),
        sources=_make_sources(flags, preset),
        merge=merge,
        scheduler=scheduler,
        lcm_guidance=preset.lcm_guidance if preset and flags["lcm_guidance"] is None else flags["lcm_guidance"],
        recommended=recommended,
        dtype=flags["dtype"],
        cache_dir=flags["cache_dir"],
        preset=flags["preset"],
    )


def _make_sources(flags: Mapping[str, Any], preset: Preset | None) -> dict[str, WeightSource]:
    """Sources by role. A source that a flag names replaces the preset's with all its fields."""
    known: dict[str, dict[str, str | None]] = {}
    if preset:
        known[preset.kind] = {"name": preset.id} | {name: getattr(preset, name, None) for name in SOURCE_FIELDS}
        known |= {"base": {"name": preset.base}} if preset.base else {}
    sources = {}
    for role in ROLES:
        given = {"name": flags[role]} | {name: flags[f"{role}_{name}"] for name in SOURCE_FIELDS}
        values = ({} if flags[role] else known.get(role, {})) | {name: value for name, value in given.items() if value}
        if "name" in values:
            sources[role] = WeightSource(f"--{role}", **values)
    return sources


def _choose_scheduler(name: str | None, spacing: str | None, preset: Preset | None) -> tuple[str, dict] | None:
    """(class name, settings) of the new editor's scheduler; None keeps the editor's."""
    if name is None:
        return (preset.scheduler, preset.scheduler_settings) if preset else None
    class_name, settings = SCHEDULERS[name]
    if spacing:
        return class_name, settings | {"timestep_spacing": spacing}
    has_spacing = class_name not in OWN_TIMESTEPS and not class_name.startswith("EDM")
    return class_name, settings | (TRAILING if has_spacing else {})


@dataclass(frozen=True)
class OpenedRecipe:
    """The editor and the sources of a recipe, opened and checked. Their weights are read when they are merged."""

    editor: EditorFolder
    unet: UNetWeights
    delta: Delta
    base: UNetWeights | None
    files: dict[str, SourceFiles]
    licences: list[Licence]

    def merge(self, options: MergeOptions, report: MergeReport) -> Iterator[Rows]:
        return merge_rows(self.unet, self.delta, options, self.base, report)


def open_recipe(recipe: MergeRecipe, token: str | None = None, unpacked: Path | None = None) -> OpenedRecipe:
    """Find, download and check the editor and all sources. Raises `InputError`.

    unpacked: the folder of an editor that is one file (`unpacked_editor`).
    """
    editor, preset = find_editor(recipe.model, recipe.cache_dir, unpacked), PRESETS.get(recipe.preset)
    if preset:
        _refuse_preset_mismatch(recipe.preset, preset, editor)
    own = find_source_files(replace(recipe.model, name=str(editor.folder), subfolder="unet"), "unet")
    shapes, layers = TensorFiles(own.files, recipe.model.flag_and_name).shapes, editor.layers_per_block
    files = {
        role: find_source_files(source, "lora" if role == "lora" else "unet", recipe.cache_dir)
        for role, source in recipe.sources.items()
    }
    unets = {role: UNetWeights(found, shapes, layers) for role, found in files.items() if role != "lora"}
    if "lora" in files:
        delta = LoraDelta(files["lora"], shapes, layers)
    elif "delta" in files:
        delta = StoredDifference(unets["delta"])
    else:
        # Whether a preset's UNet has a guidance embedding is not known for sure.
        can_fold = unets["distilled"].has_guidance_embedding or not preset
        delta = UNetDifference(unets["distilled"], unets["base"], recipe.lcm_guidance if can_fold else None)
    check_block_weights(recipe.merge, list(shapes))
    known = {preset.id: preset.licence} if preset else {}
    licences = [look_up_licence(name, known.get(name), token) for name in recipe.source_names]
    return OpenedRecipe(editor, UNetWeights(own, shapes, layers), delta, unets.get("base"), files, licences)


def _refuse_preset_mismatch(name: str, preset: Preset, editor: EditorFolder) -> None:
    family = SDXL if editor.is_sdxl else SD15
    if preset.family != family:
        raise InputError(f"--preset {name} is for {preset.family}, but {editor.name} is {family}")
    prediction = editor.scheduler_config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InputError(f"--preset {name} is for epsilon prediction, but {editor.name} uses {prediction}")


def fill_defaults(recipe: MergeRecipe, opened: OpenedRecipe) -> MergeRecipe:
    """Set the weight and the recommended settings that flags and preset leave open.

    With the editor's own scheduler the defaults are those of every editor: the merge changes its style, not its speed.
    """
    weight = recipe.merge.weight
    if weight is None:
        weight = SDXL_WEIGHT if "distilled" in recipe.sources and opened.editor.is_sdxl else 1.0
    # The card shows eta as the pipelines use it: 0 by default.
    usual = {name: DEFAULT_SETTINGS[name] for name in FEW_STEPS} | {"eta": 0.0}
    recommended = {} if recipe.scheduler else usual
    return replace(recipe, merge=replace(recipe.merge, weight=weight), recommended=recommended | recipe.recommended)


@dataclass(frozen=True)
class PushOptions:
    """The fields are flags."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private_repo: bool = False
    accept_license: bool = False


def prepare_output(recipe: MergeRecipe, options: PushOptions) -> str | None:
    """Check the output folder and the right to push; returns the repository id, or None without --push_to_hub."""
    if require_output_dir(recipe.output_dir, recipe.source_names):
        print(f"--output_dir {recipe.output_dir}: the editor in it will be replaced", file=sys.stderr)
    make_writable(recipe.output_dir, "--output_dir")
    remove_unfinished(recipe.output_dir)
    if not options.push_to_hub:
        return None
    return check_push_rights(options.hub_model_id, options.hub_token, recipe.output_dir, options.hub_private_repo)


def check_licences(licences: list[Licence], options: PushOptions) -> None:
    """Print restricted and unknown licences, and refuse to push without --accept_license. Raises `InputError`."""
    lines = [f"{one.source} is {' and '.join(one.restrictions)} ({one.name})" for one in licences if one.restrictions]
    for line in lines:
        print(f"licence: {line}, and so is the merged editor", file=sys.stderr)
    for one in licences:
        if terms_of(one.name) is None and not one.restrictions:
            named = f"the terms of {one.name}, the licence of {one.source}, are not known here"
            lines.append(named if one.name else f"the licence of {one.source} is unknown")
            print(f"licence: {lines[-1]}: read it before you publish the merged editor", file=sys.stderr)
    if lines and options.push_to_hub and not options.accept_license:
        raise InputError(f"--push_to_hub: {'; '.join(lines)}: add --accept_license if the licences allow your use")
