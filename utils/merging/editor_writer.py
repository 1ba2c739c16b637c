"""Writes the merged editor: merged weights, the other components, settings, report and card, then moved into place."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import diffusers
from tqdm import tqdm

from utils.atomic_files import atomic_folder
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.hub_names import public_name
from utils.merging.adapted_card import write_adapted, write_adapted_card
from utils.merging.editor_folder import INDEX, EditorFolder, link_components, move_into
from utils.merging.merge import MergeReport, cast_rows
from utils.merging.recipe import MergeRecipe, OpenedRecipe
from utils.models.stable_diffusion import editor_class
from utils.runtime import DTYPES
from utils.weight_files import write_safetensors

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def write_editor(
    recipe: MergeRecipe, opened: OpenedRecipe, repo_id: str | None, extra_files: dict[str, Callable[[Path], None]]
) -> MergeReport:
    """Merge, write the whole editor into a temporary folder inside `output_dir`, then move it there.

    extra_files: name -> function that writes it. Raises `InputError`; an earlier editor is then unchanged.
    """
    _require_disk_space(recipe, opened)
    report, editor = MergeReport(), opened.editor
    with atomic_folder(recipe.output_dir / "editor") as unfinished:
        link_components(editor, unfinished, leave_out=("unet", *(["scheduler"] if recipe.scheduler else [])))
        (unfinished / "unet").mkdir()
        (unfinished / "unet" / "config.json").write_text(json.dumps(editor.unet_config, indent=2) + "\n")
        write_unet(unfinished / UNET_FILE, recipe, opened, report)
        index = dict(editor.index)
        if recipe.scheduler:
            make_scheduler(recipe, editor).save_pretrained(unfinished / "scheduler")
            index["scheduler"] = ["diffusers", recipe.scheduler[0]]
        (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, write in extra_files.items():
            write(unfinished / name)
        facts = _collect_facts(recipe, opened)
        write_adapted(unfinished, facts)
        licences = [asdict(licence) | {"source": public_name(licence.source)} for licence in opened.licences]
        (unfinished / "report.json").write_text(json.dumps(report.as_json() | {"licences": licences}, indent=1) + "\n")
        name = (repo_id or recipe.output_dir.resolve().name).split("/")[-1]
        pipeline_class = editor_class(editor.is_sdxl).__name__
        write_adapted_card(unfinished, facts, opened.licences, pipeline_class, name, repo_id)
        move_into(unfinished, recipe.output_dir)
    return report


def write_unet(path: Path, recipe: MergeRecipe, opened: OpenedRecipe, report: MergeReport) -> None:
    """Stream the merged UNet into one file, with a progress bar."""
    dtype, shapes = DTYPES[recipe.dtype], opened.unet.shapes
    total = _unet_bytes(recipe, opened)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None, leave=False) as bar:

        def count_bytes() -> Iterator[tuple]:
            for name, value in cast_rows(opened.merge(recipe.merge, report), dtype):
                yield name, value
                bar.update(value.nbytes)

        write_safetensors(path, {name: (shape, dtype) for name, shape in shapes.items()}, count_bytes())


def make_scheduler(recipe: MergeRecipe, editor: EditorFolder) -> Any:
    """The scheduler of the merged editor, with the editor's betas and prediction type.

    Raises `InputError` if they do not fit together (`choose_scheduler`).
    """
    own_class = getattr(diffusers, editor.scheduler_config.get("_class_name", ""), diffusers.DDIMScheduler)
    own = own_class.from_config(editor.scheduler_config)
    if not recipe.scheduler:
        return own
    class_name, settings = recipe.scheduler
    chosen = choose_scheduler(own, class_name)
    return type(chosen).from_config(dict(chosen.config), **settings)


def _unet_bytes(recipe: MergeRecipe, opened: OpenedRecipe) -> int:
    return sum(map(prod, opened.unet.shapes.values())) * DTYPES[recipe.dtype].itemsize


def _require_disk_space(recipe: MergeRecipe, opened: OpenedRecipe) -> None:
    needed, free = _unet_bytes(recipe, opened), shutil.disk_usage(recipe.output_dir).free
    if free < needed:
        raise InputError(
            f"--output_dir {recipe.output_dir} has {free / 1e9:.2f} GB free, and the UNet needs {needed / 1e9:.2f} GB: "
            "make room, or use --dtype fp16"
        )


def _collect_facts(recipe: MergeRecipe, opened: OpenedRecipe) -> dict[str, Any]:
    """The content of `adapted.json`."""
    scheduler, settings = recipe.scheduler or (opened.editor.scheduler_config.get("_class_name", ""), {})
    licences = {licence.source: licence for licence in opened.licences}
    sources = [("editor", recipe.model.name, opened.editor.revision, ())]
    sources += [(role, found.source.name, found.revision, found.files) for role, found in opened.files.items()]
    described = []
    for role, name, revision, files in sources:
        source = {"role": role, "name": public_name(name), "revision": revision, "files": [path.name for path in files]}
        licence = {"licence": licences[name].name or None, "restrictions": list(licences[name].restrictions)}
        described.append(source | licence)
    merge = asdict(recipe.merge) | {"block_weights": dict(recipe.merge.block_weights)}
    own = {"lcm_guidance": recipe.lcm_guidance, "dtype": recipe.dtype, "sources": described}
    recommended = recipe.recommended | {"scheduler": scheduler, "scheduler_settings": settings}
    return {"made_by": "adapt_distill.py", "preset": recipe.preset} | merge | own | {"recommended": recommended}
