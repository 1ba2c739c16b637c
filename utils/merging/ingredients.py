"""What is to be adapted and of what: the sources found, opened and checked before anything is written; pushing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.atomic_files import make_writable, remove_unfinished
from utils.editing.jobs import Recommended
from utils.errors import InputError
from utils.hub import check_push_rights, upload
from utils.licences import Licence, look_up_licence
from utils.merging.deltas import Delta, Difference, StoredDifference
from utils.merging.editor_folder import EditorFolder, find_editor, require_output_dir
from utils.merging.lora_delta import LoraDelta
from utils.merging.merge import MergeOptions, MergeReport, Rows, check_options, merge_rows
from utils.merging.unet_weights import Shape, UNetWeights
from utils.merging.weight_sources import Located, WeightSource, locate

SDXL_WEIGHT = 0.5  # of full SDXL models: instruction-tuned-sd's advice
UNHURRIED = asdict(Recommended(eta=0.0))  # as the pipelines give it, for which the card is written


@dataclass(frozen=True)
class Recipe:
    """What to make. sources: "distilled" with "base", "lora" or "delta" (TIES wants "base" with these too).

    scheduler: (class of diffusers, settings), or None for the editor's own. recommended: steps, guidance_scale,
    image_guidance_scale and eta for `adapted.json`. licences: source -> what is known of its licence beforehand.
    family: "sd1.5" or "sdxl", what the preset is for; None: not known.
    """

    model: WeightSource
    output_dir: Path
    sources: dict[str, WeightSource]
    merge: MergeOptions
    dtype: str = "fp32"
    lcm_guidance: float | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None
    recommended: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    family: str | None = None
    cache_dir: str | None = None


@dataclass(frozen=True)
class Publishing:
    """The fields are flags."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private_repo: bool = False
    accept_license: bool = False


@dataclass(frozen=True)
class Ingredients:
    """What a recipe's sources are, opened and found to fit; no weight was read yet."""

    editor: EditorFolder
    unet: UNetWeights
    delta: Delta
    base: UNetWeights | None
    located: dict[str, Located]
    licences: list[Licence]

    def merge(self, options: MergeOptions, report: MergeReport) -> Iterator[Rows]:
        return merge_rows(self.unet, self.delta, options, self.base, report)


def open_ingredients(recipe: Recipe, token: str | None = None, unpacked: Path | None = None) -> Ingredients:
    """Find, download and check everything that will be merged. Raises `InputError`.

    unpacked: the folder that was made of an editor in one file (`unpacking`).
    """
    model = recipe.model
    editor = find_editor(model.name, model.revision, model.variant, recipe.cache_dir, unpacked)
    _require_family(recipe, editor)
    own = locate(replace(model, name=str(editor.folder), subfolder="unet"), "unet")
    shapes = UNetWeights.read_shapes(own)
    layers = editor.layers_per_block
    unet = UNetWeights(own, shapes, layers)
    located = {
        role: locate(source, "lora" if role == "lora" else "unet", recipe.cache_dir)
        for role, source in recipe.sources.items()
    }
    base = UNetWeights(located["base"], shapes, layers) if "base" in located else None
    delta = _open_delta(recipe, located, shapes, layers, base)
    check_options(recipe.merge, list(shapes))
    names = [model.name, *(source.name for source in recipe.sources.values())]
    licences = [look_up_licence(name, recipe.licences.get(name), token) for name in dict.fromkeys(names)]
    return Ingredients(editor, unet, delta, base, located, licences)


def settle(recipe: Recipe, ingredients: Ingredients) -> Recipe:
    """The recipe with a weight and with recommended settings, where it left them open.

    Without a scheduler of its own the new editor is run as the old one is (infer.py's defaults): for style, not speed.
    """
    weight = recipe.merge.weight
    if weight is None:
        weight = SDXL_WEIGHT if "distilled" in recipe.sources and ingredients.editor.is_sdxl else 1.0
    recommended = recipe.recommended if recipe.scheduler else UNHURRIED | recipe.recommended
    return replace(recipe, merge=replace(recipe.merge, weight=weight), recommended=recommended)


def _open_delta(
    recipe: Recipe,
    located: dict[str, Located],
    shapes: dict[str, Shape],
    layers: int | list[int],
    base: UNetWeights | None,
) -> Delta:
    if "lora" in located:
        return LoraDelta(located["lora"], shapes, layers)
    if "delta" in located:
        return StoredDifference(UNetWeights(located["delta"], shapes, layers))
    distilled = UNetWeights(located["distilled"], shapes, layers)
    # A preset's guidance stands by for an embedding that is known from memory only.
    is_foldable = distilled.has_guidance_embedding or not recipe.preset
    return Difference(distilled, base, recipe.lcm_guidance if is_foldable else None)


def _require_family(recipe: Recipe, editor: EditorFolder) -> None:
    family = "sdxl" if editor.is_sdxl else "sd1.5"
    if recipe.family and recipe.family != family:
        raise InputError(f"--preset {recipe.preset} is for {recipe.family}, and {editor.name} is of {family}")
    predicts = editor.scheduler_config.get("prediction_type", "epsilon")
    if recipe.preset and predicts != "epsilon":
        raise InputError(
            f"--preset {recipe.preset} predicts epsilon, and {editor.name} {predicts}: they cannot be added"
        )


def check_place(recipe: Recipe, publishing: Publishing) -> str | None:
    """Refuse an output folder that is not ours, and see to the right to push; the repository's id where we push."""
    names = [recipe.model.name, *(source.name for source in recipe.sources.values())]
    if require_output_dir(recipe.output_dir, names):
        print(f"the adapted editor that stands in {recipe.output_dir} will be replaced", file=sys.stderr)
    make_writable(recipe.output_dir, "--output_dir")
    remove_unfinished(recipe.output_dir)
    if not publishing.push_to_hub:
        return None
    return check_push_rights(
        publishing.hub_model_id, publishing.hub_token, recipe.output_dir, publishing.hub_private_repo
    )


def check_licences(licences: list[Licence], publishing: Publishing) -> None:
    """Name what may not be sold or passed on, and refuse to push it unless that is accepted. Raises `InputError`."""
    restricted = [
        f"{one.source} is {' and '.join(one.restrictions)} ({one.name})" for one in licences if one.restrictions
    ]
    for line in restricted:
        print(f"licence: {line}; so is the editor made of it", file=sys.stderr)
    if restricted and publishing.push_to_hub and not publishing.accept_license:
        raise InputError(
            f"--push_to_hub: {'; '.join(restricted)}. If its terms allow what you do, give --accept_license too"
        )


def push(recipe: Recipe, publishing: Publishing, repo_id: str) -> str:
    """Upload the editor; returns its address. Raises `InputError`; the editor stands whole in its folder."""
    return upload(
        recipe.output_dir, repo_id, publishing.hub_token, "An adapted editor", private=publishing.hub_private_repo
    )
