"""The adapted editor in its folder: merged, put together, described, and moved into place when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.atomic_files import written_beside
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.merging.card import short_name, write_adapted, write_adapted_card
from utils.merging.editor_folder import INDEX, EditorFolder, link_parts, move_into
from utils.merging.ingredients import Ingredients, Recipe
from utils.merging.merge import MergeReport, cast_rows
from utils.models.stable_diffusion import editor_class
from utils.runtime import DTYPES
from utils.weight_files import write_safetensors

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def write_editor(
    recipe: Recipe,
    ingredients: Ingredients,
    repo_id: str | None,
    extras: dict[str, Callable[[Path], None]] | None = None,
) -> MergeReport:
    """Merge and write the whole editor beside its place inside `output_dir`, then move it there.

    extras: further files, name -> what writes it. Raises `InputError`; what stood before stands still.
    """
    _require_room(recipe, ingredients)
    report, editor = MergeReport(), ingredients.editor
    with written_beside(recipe.output_dir / "editor") as unfinished:
        link_parts(editor, unfinished, leave_out=("unet", *(["scheduler"] if recipe.scheduler else [])))
        (unfinished / "unet").mkdir()
        (unfinished / "unet" / "config.json").write_text(json.dumps(editor.unet_config, indent=2) + "\n")
        write_unet(unfinished / UNET_FILE, recipe, ingredients, report)
        index = dict(editor.index)
        if recipe.scheduler:
            scheduler = make_scheduler(recipe, editor)
            scheduler.save_pretrained(unfinished / "scheduler")
            index["scheduler"] = ["diffusers", recipe.scheduler[0]]
        (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, write in (extras or {}).items():
            write(unfinished / name)
        facts = gather_facts(recipe, ingredients)
        write_adapted(unfinished, facts)
        licences = [asdict(licence) | {"source": short_name(licence.source)} for licence in ingredients.licences]
        (unfinished / "report.json").write_text(json.dumps(report.as_json() | {"licences": licences}, indent=1) + "\n")
        name = (repo_id or recipe.output_dir.resolve().name).split("/")[-1]
        write_adapted_card(
            unfinished, facts, ingredients.licences, editor_class(editor.is_sdxl).__name__, name, repo_id
        )
        move_into(unfinished, recipe.output_dir)
    return report


def write_unet(path: Path, recipe: Recipe, ingredients: Ingredients, report: MergeReport) -> None:
    """Stream the merged UNet into one file, with a bar that tells the rate."""
    dtype, shapes = DTYPES[recipe.dtype], ingredients.unet.shapes
    total = sum(map(prod, shapes.values())) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None, leave=False) as bar:

        def counted() -> Iterator[tuple]:
            for name, value in cast_rows(ingredients.merge(recipe.merge, report), dtype):
                yield name, value
                bar.update(value.nbytes)

        write_safetensors(path, {name: (shape, dtype) for name, shape in shapes.items()}, counted())


def make_scheduler(recipe: Recipe, editor: EditorFolder) -> Any:
    """The new editor's scheduler: the recipe's, with the editor's own betas and kind of prediction.

    Raises `InputError` where they do not go together (`choose_scheduler`).
    """
    import diffusers

    own_class = getattr(diffusers, editor.scheduler_config.get("_class_name", ""), diffusers.DDIMScheduler)
    own = own_class.from_config(editor.scheduler_config)
    if not recipe.scheduler:
        return own
    class_name, settings = recipe.scheduler
    chosen = choose_scheduler(own, class_name)
    return type(chosen).from_config(dict(chosen.config), **settings)


def _require_room(recipe: Recipe, ingredients: Ingredients) -> None:
    needed = sum(map(prod, ingredients.unet.shapes.values())) * DTYPES[recipe.dtype].itemsize
    free = shutil.disk_usage(recipe.output_dir).free
    if free < needed:
        raise InputError(
            f"--output_dir {recipe.output_dir} has {free / 1e9:.2f} GB free, and the UNet takes {needed / 1e9:.2f} GB: "
            "make room, or take --dtype fp16"
        )


def gather_facts(recipe: Recipe, ingredients: Ingredients) -> dict[str, Any]:
    """What `adapted.json` says."""
    own_class = ingredients.editor.scheduler_config.get("_class_name", "")
    scheduler, settings = recipe.scheduler or (own_class, {})
    licences = {licence.source: licence for licence in ingredients.licences}

    def tell(role: str, name: str, revision: str | None, files: list[str]) -> dict:
        licence = licences[name]
        return {
            "role": role,
            "name": short_name(name),
            "revision": revision,
            "files": files,
            "licence": licence.name or None,
            "restrictions": list(licence.restrictions),
        }

    sources = [tell("editor", recipe.model.name, ingredients.editor.revision, [])]
    for role, found in ingredients.located.items():
        files = [path.name for path in found.files]
        sources.append(tell(role, found.source.name, found.revision, files))
    merge = asdict(recipe.merge) | {"block_weights": dict(recipe.merge.block_weights)}
    return {
        "made_by": "adapt_distill.py",
        "preset": recipe.preset,
        **merge,
        "lcm_guidance": recipe.lcm_guidance,
        "dtype": recipe.dtype,
        "sources": sources,
        "recommended": recipe.recommended | {"scheduler": scheduler, "scheduler_settings": settings},
    }
