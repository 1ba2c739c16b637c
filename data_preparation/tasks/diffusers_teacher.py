"""A diffusers pipeline as teacher: an instruction-tuned editor, or image-to-image with a prompt."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from data_preparation.tasks.teachers import Picture, Teach, TeacherSettings
from utils.errors import InputError
from utils.runtime import choose_device


def open_diffusers(model: str, settings: TeacherSettings, rank: int) -> Teach:
    """Any pipeline whose call takes `prompt` and `image`; one for text alone is opened for image-to-image.

    A picture comes back at its own size. Each row has a CPU generator seeded from its own. Raises InputError.
    """
    device, dtype = choose_device(settings.device, settings.dtype)
    if str(device) == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
    pipeline = _load(model, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipeline.__call__).parameters
    name = f"--teacher diffusers:{model}"
    if not {"prompt", "image"} <= takes.keys():
        raise InputError(f"{name}: a {type(pipeline).__name__} takes no prompt and image, so it cannot edit")
    if unknown := sorted(settings.extra.keys() - takes.keys()):
        raise InputError(f"--teacher_settings: {name[10:]} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")

    def teach(
        pictures: list[Picture], instructions: list[str], generators: list[np.random.Generator]
    ) -> list[tuple[Picture, dict]]:
        seeds = [int(generator.integers(2**63)) for generator in generators]
        arguments: dict[str, Any] = dict(
            prompt=[settings.prompt or instruction for instruction in instructions],
            image=[Image.fromarray(picture) for picture in pictures],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        try:
            edits = pipeline(**arguments, **settings.extra).images
        except (ValueError, TypeError, RuntimeError) as error:  # sizes, memory, settings that do not go together
            raise InputError(f"{name} failed: {str(error).splitlines()[0]}") from error
        height, width = pictures[0].shape[:2]
        fitted = [edit.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for edit in edits]
        return [(np.array(edit), {"teacher_seed": seed}) for edit, seed in zip(fitted, seeds, strict=True)]

    return teach


def _load(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype)
        if "image" in inspect.signature(pipeline.__call__).parameters:
            return pipeline
        return AutoPipelineForImage2Image.from_pipe(pipeline)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"--teacher diffusers:{model} cannot be loaded: {str(error).splitlines()[0]}") from error


def find_revision(model: str) -> dict:
    """The id of a model with the commit that is used; a folder by its name alone."""
    if Path(model).exists():
        return {"id": Path(model).resolve().name, "revision": None}
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:  # neither a folder nor an id: loading it will say so
        index = None
    return {"id": model, "revision": Path(index).parent.name if isinstance(index, str) else None}
