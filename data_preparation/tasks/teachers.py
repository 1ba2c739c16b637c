"""Loads the teacher of a task: the function that generates its edited images, or degrades its original images.

    teach(images, instructions, generators) -> [(edited uint8 RGB (H, W, 3), drawn values for JSON), ...]

All images of a call have the same size. Random values come from the generators of the rows.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_preparation.generation.user_functions import call_function, find_imported_files, load_function
from data_preparation.instructions import promises_outlines
from data_preparation.tasks.plan import DEGRADATION, EXACT, OPENCV, Task, TeacherSettings
from data_preparation.tasks.tensor_teachers import (
    Teacher,
    check_edit,
    find_torchhub_folder,
    load_onnx_teacher,
    load_torchhub_teacher,
)
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import find_revision, is_hub_id, public_name


def load_teacher(task: Task, settings: TeacherSettings, rank: int, models: list[dict] | None) -> Teacher:
    """models: of `describe_models`, for the commit to load. Raises InputError."""
    if task.teacher == DEGRADATION:
        from data_preparation.tasks.degradations import DEGRADATIONS

        degrade = DEGRADATIONS[task.name]
        return lambda images, _, generators: [degrade(*row) for row in zip(images, generators, strict=True)]
    if task.teacher == OPENCV:
        return _load_cartoonist()
    if task.teacher == EXACT:
        from data_preparation.toy_edits import EDITS

        return lambda images, *_: [(EDITS[task.name](image), {}) for image in images]
    kind, _, name = task.teacher.partition(":")
    if kind == "python":
        return _load_python_teacher(task.teacher)
    if kind == "onnx":
        return load_onnx_teacher(name, settings, rank)
    if kind == "torchhub":
        return load_torchhub_teacher(name, settings, rank)
    return _load_diffusers_teacher(name, settings, rank, models[0]["revision"])


def describe_models(teacher: str) -> list[dict] | None:
    """The "models" column of the rows: {"id", "revision"} of a teacher that is a model or a function, else None.

    The revision is the commit on the Hub, or a digest: of the file of a network; of a function's file and the files
    beside it that it imports; of the code of a repository for torch.hub, which may load weights from elsewhere. Raises
    InputError.
    """
    kind, _, name = teacher.partition(":")
    if kind == "onnx":
        return [{"id": Path(name).name, "revision": _digest_files(Path(name).parent, [Path(name)])}]
    if kind == "python":
        file = Path(name.rpartition(":")[0]).absolute()
        return [{"id": Path(name).name, "revision": _digest_files(file.parent, find_imported_files(file))}]
    if kind == "torchhub":
        repository = name.rpartition(":")[0]
        folder = find_torchhub_folder(repository, f"--teacher {teacher}")
        revision = _digest_files(folder, sorted(folder.rglob("*.py")))
        return [{"id": Path(name).name if Path(repository).exists() else name, "revision": revision}]
    if kind == "diffusers":
        with explaining_load_errors(f"--teacher {teacher}"):
            return [{"id": public_name(name), "revision": find_revision(name, None, "model_index.json")}]
    return None


def _digest_files(folder: Path, files: Sequence[Path]) -> str:
    """Of names below `folder` and contents; of one file, of its content alone."""
    if len(files) == 1:
        return hashlib.blake2b(files[0].read_bytes(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        content = hashlib.blake2b(path.read_bytes()).digest()
        digest.update(json.dumps(path.relative_to(folder).as_posix()).encode() + content)
    return digest.hexdigest()


def public_teacher(teacher: str) -> str:
    """The teacher as rows name it: of a local path, only the last part."""
    kind, separator, name = teacher.partition(":")
    is_path = kind in ("onnx", "python") or kind == "diffusers" and not is_hub_id(name)
    is_path = is_path or kind == "torchhub" and Path(name.rpartition(":")[0]).exists()
    return f"{kind}:{Path(name).name}" if separator and is_path else teacher


def _load_cartoonist() -> Teacher:
    """Cartoons with ink lines, except where the instruction asks for none."""
    from data_preparation.tasks.cartoon import draw_cartoon

    def teach(images: list, instructions: list, _: list) -> list[tuple[np.ndarray, dict]]:
        has_ink = [promises_outlines(instruction) is not False for instruction in instructions]
        return [(draw_cartoon(*row), {"ink": row[1]}) for row in zip(images, has_ink, strict=True)]

    return teach


def _load_python_teacher(spec: str) -> Teacher:
    """A function of the user's file: image -> image, or (image, generator) -> image."""
    function = load_function("--teacher", spec)
    num_arguments = min(len(call_function("--teacher", spec, inspect.signature, function).parameters), 2)

    def teach(images: list, _: list, generators: list) -> list[tuple[np.ndarray, dict]]:
        edits = []
        for image, generator in zip(images, generators, strict=True):
            edited = call_function("--teacher", spec, function, *(image.copy(), generator)[:num_arguments])
            edits.append((check_edit(edited, image, f"--teacher {spec}"), {}))
        return edits

    return teach


def _load_diffusers_teacher(model: str, settings: TeacherSettings, rank: int, revision: str) -> Teacher:
    """A pipeline whose call accepts `prompt` and `image`; a text-to-image pipeline is used for image-to-image.

    Each row gets a CPU generator, seeded by the generator of the row; the edited image is resized to the size of its
    original. Raises InputError.
    """
    import torch
    from PIL import Image

    from utils.runtime import choose_device

    flag = f"--teacher diffusers:{model}"
    device, dtype = choose_device(settings.device, settings.dtype, rank=rank)
    with explaining_load_errors(flag):
        pipeline = _open_pipeline(model, dtype, revision if is_hub_id(model) else None).to(device)
    pipeline.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipeline.__call__).parameters
    kind, unknown = type(pipeline).__name__, sorted(settings.extra.keys() - accepted.keys())
    if not {"prompt", "image"} <= accepted.keys():
        raise InputError(f"{flag}: a {kind} does not accept a prompt and an image, so it cannot edit")
    if unknown:
        raise InputError(f"--teacher_settings: a {kind} does not accept {unknown[0]}; allowed: {', '.join(accepted)}")

    def teach(images: list, instructions: list, generators: list) -> list[tuple[np.ndarray, dict]]:
        seeds = [int(generator.integers(2**63)) for generator in generators]
        try:
            edits = pipeline(
                prompt=[settings.teacher_prompt or instruction for instruction in instructions],
                image=[Image.fromarray(image) for image in images],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **settings.extra,
            ).images
        except (ValueError, TypeError, RuntimeError) as error:  # sizes, memory, settings that contradict each other
            raise InputError(f"{flag} failed: {str(error).splitlines()[0]}") from error
        height, width = images[0].shape[:2]
        fitted = [edit.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for edit in edits]
        return [(np.array(edit), {"teacher_seed": seed}) for edit, seed in zip(fitted, seeds, strict=True)]

    return teach


def _open_pipeline(model: str, dtype: Any, revision: str | None) -> Any:
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, revision=revision)
    if "image" in inspect.signature(pipeline.__call__).parameters:
        return pipeline
    return AutoPipelineForImage2Image.from_pipe(pipeline)
