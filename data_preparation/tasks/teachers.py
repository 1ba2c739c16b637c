"""Who makes the edited image. Every teacher is a function of photographs, instructions and generators -> edits.

    teach(pictures, instructions, generators) -> [(edited uint8 RGB (H, W, 3), what was drawn as JSON values)]

The pictures of one call have one size. What a teacher draws comes from the rows' own generators.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_preparation.tasks.plan import DEGRADATION, EXACT, OPENCV, Task
from utils.errors import InputError

Picture = np.ndarray
Teach = Callable[[list[Picture], list[str], list[np.random.Generator]], list[tuple[Picture, dict]]]


@dataclass(frozen=True)
class TeacherSettings:
    """What the flags say of teachers that are models.

    input_range, output_range: values of black and white; layout: nchw, nhwc or auto; multiple: of the sides, reached by
    reflection; channels: rgb or bgr; prompt: for all rows in the place of their instructions; extra: further arguments
    of the model's loader (torchhub) or call (diffusers).
    """

    input_range: tuple[float, float] = (-1.0, 1.0)
    output_range: tuple[float, float] | None = None
    layout: str = "auto"
    multiple: int = 1
    channels: str = "rgb"
    prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str | None = None
    trusts_code: bool = False


def open_teacher(task: Task, settings: TeacherSettings, rank: int) -> Teach:
    """Load what a task needs. Raises InputError."""
    if task.teacher == DEGRADATION:
        from data_preparation.tasks.degradations import DEGRADATIONS

        degrade = DEGRADATIONS[task.name]
        return lambda pictures, _, generators: [degrade(*pair) for pair in zip(pictures, generators, strict=True)]
    if task.teacher in (EXACT, OPENCV):
        return _one_by_one(_find_edit(task))
    kind, _, rest = task.teacher.partition(":")
    if kind == "python":
        return _load_function(rest)
    if kind == "onnx":
        from data_preparation.tasks.tensor_teachers import open_onnx

        return open_onnx(rest, settings, rank)
    if kind == "torchhub":
        from data_preparation.tasks.tensor_teachers import open_torchhub

        return open_torchhub(rest, settings, rank)
    from data_preparation.tasks.diffusers_teacher import open_diffusers

    return open_diffusers(rest, settings, rank)


def describe_models(task: Task) -> list[dict] | None:
    """What a row says of the model that made it; None where there is none."""
    kind, _, rest = task.teacher.partition(":")
    if kind == "onnx":
        return [{"id": Path(rest).name, "revision": _digest(rest)}]
    if kind == "python":
        file, _, function = rest.rpartition(":")
        return [{"id": f"{Path(file).name}:{function}", "revision": _digest(file)}]
    if kind == "torchhub":
        return [{"id": Path(rest).name if Path(rest.rpartition(":")[0]).exists() else rest, "revision": None}]
    if kind == "diffusers":
        from data_preparation.tasks.diffusers_teacher import find_revision

        return [find_revision(rest)]
    return None


def _digest(file: str) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()


def _find_edit(task: Task) -> Callable[[Picture], Picture]:
    if task.teacher == OPENCV:
        from data_preparation.tasks.cartoon import cartoonize

        return cartoonize
    from data_preparation.toy_edits import EDITS

    return EDITS[task.name]


def _one_by_one(edit: Callable[[Picture], Picture]) -> Teach:
    return lambda pictures, *_: [(edit(picture), {}) for picture in pictures]


def _load_function(rest: str) -> Teach:
    """A function of the user's file: picture -> picture, or (picture, generator) -> picture."""
    file, _, name = rest.rpartition(":")
    spec = importlib.util.spec_from_file_location("users_edits", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
        takes_generator = len(inspect.signature(function).parameters) > 1
    except Exception as error:  # it is the user's own code, and may fail in any way
        raise InputError(f"--teacher python:{rest} cannot be loaded: {type(error).__name__}: {error}") from error

    def teach(pictures: list[Picture], _: list[str], generators: list[np.random.Generator]) -> list:
        edits = []
        for picture, generator in zip(pictures, generators, strict=True):
            try:
                edited = function(picture.copy(), generator) if takes_generator else function(picture.copy())
            except Exception as error:
                raise InputError(f"--teacher python:{rest} failed: {type(error).__name__}: {error}") from error
            edits.append((check_edit(edited, picture, f"--teacher python:{rest}"), {}))
        return edits

    return teach


def check_edit(edited: object, picture: Picture, name: str) -> Picture:
    """The edit as uint8 RGB of the picture's size. Raises InputError for anything else."""
    edited = np.asarray(edited)
    if edited.dtype != np.uint8 or edited.shape != picture.shape:
        raise InputError(
            f"{name} gave {edited.dtype} {'x'.join(map(str, edited.shape))} for a picture of uint8 "
            f"{'x'.join(map(str, picture.shape))}: it must give RGB bytes of the same size"
        )
    return np.ascontiguousarray(edited)


def batches_of_one_size(pictures: Sequence[Picture], batch_size: int) -> list[list[int]]:
    """Places of pictures of one size, at most `batch_size` in each batch, in order of first sight."""
    groups: dict[tuple, list[int]] = {}
    for place, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(place)
    return [places[i : i + batch_size] for places in groups.values() for i in range(0, len(places), batch_size)]
