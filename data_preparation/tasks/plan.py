"""What `--task` and `--teacher` ask for: which tasks, how often, and who makes the edited image. Nothing heavy here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from data_preparation.instructions import FOLDER, available_tasks

LOW_LEVEL = (
    "derain",
    "denoise",
    "deblur",
    "dehaze",
    "low_light",
    "raindrop",
    "sharpen",
    "colorize",
    "super_resolve",
    "jpeg",
)
DEGRADED = (*LOW_LEVEL, "identity")  # the original image is made, and the photograph is the edited one
TOY = tuple(f"toy/{path.stem}" for path in sorted((FOLDER / "toy").glob("*.txt")))
GROUPS = {"all": ("cartoonize", *DEGRADED), "low_level": LOW_LEVEL, "toy": TOY}
EXACT, DEGRADATION, OPENCV = "exact", "degradation", "opencv"  # teachers that need nothing
PREFIXES = ("onnx:", "torchhub:", "diffusers:", "python:")


@dataclass(frozen=True)
class Task:
    """name: what the rows say; phrasings: what `read_phrasings` takes; teacher: EXACT, DEGRADATION, OPENCV or
    "onnx:FILE", "torchhub:REPO:MODEL", "diffusers:MODEL", "python:FILE:FUNCTION"; weight: share of the rows."""

    name: str
    phrasings: str
    teacher: str
    weight: float = 1.0


def plan_tasks(words: list[str], teachers: list[str]) -> tuple[list[Task], list[str]]:
    """(tasks, problems) of `--task NAME[=WEIGHT] ...` and `--teacher [TASK=]TEACHER ...`."""
    weights, problems = _read_weights(words)
    for_all, for_one = None, {}
    for given in teachers:
        name, is_named, teacher = given.partition("=")
        if is_named and name in weights:
            for_one[name] = teacher
        elif for_all is None:
            for_all = given
        else:
            problems.append(f"--teacher {given}: a second one for all tasks; name its task, as in cartoonize={given}")
    tasks = []
    for name, weight in weights.items():
        task, problem = _plan_task(name, weight, for_one.get(name, for_all))
        problems += [problem] if problem else []
        tasks += [task] if task else []
    unused = [name for name in for_one if name in DEGRADED]
    problems += [f"--teacher {name}={for_one[name]}: {name} is a degradation, which needs none" for name in unused]
    return tasks, problems


def _read_weights(words: list[str]) -> tuple[dict[str, float], list[str]]:
    weights: dict[str, float] = {}
    problems = []
    for word in words:
        name, _, number = word.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = 0.0
        if not 0 < weight < 1e9:
            problems.append(f"--task {word}: the weight must be a number above 0, as in cartoonize=2")
        for member in GROUPS.get(name, (name,)):
            weights[member] = weight
    return weights, problems


def _plan_task(name: str, weight: float, teacher: str | None) -> tuple[Task | None, str]:
    is_file = name.endswith(".txt")
    if not is_file and name not in (*available_tasks(), *TOY):
        near = difflib.get_close_matches(name, [*available_tasks(), *GROUPS], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return None, (
            f"--task {name}: unknown{hint}; allowed are {', '.join(GROUPS)}, {', '.join(available_tasks())}, or your "
            "own text file with one phrasing a line"
        )
    if is_file and not Path(name).is_file():
        return None, f"--task {name}: no such file; give a text file with one phrasing a line"
    if name in DEGRADED:
        return Task(name, name, DEGRADATION, weight), ""
    if teacher is None:
        if f"toy/{name.removeprefix('toy/')}" in TOY and name != "cartoonize":
            teacher = EXACT
        elif name == "cartoonize":
            teacher = OPENCV
        else:
            return None, f"--task {name}: say who makes the edited images, by --teacher {name}=TEACHER"
    return Task(Path(name).stem, name, teacher, weight), _teacher_problem(name, teacher)


def _teacher_problem(task: str, teacher: str) -> str:
    prefix, _, rest = teacher.partition(":")
    if teacher == OPENCV and Path(task).stem != "cartoonize":
        return f"--teacher opencv draws cartoons and nothing else: give another for {task}"
    if teacher in (OPENCV, EXACT):
        return ""
    if f"{prefix}:" not in PREFIXES or not rest:
        return (
            f"--teacher {teacher}: allowed are opencv, onnx:FILE, torchhub:REPO:MODEL, diffusers:MODEL and "
            "python:FILE:FUNCTION"
        )
    if prefix == "onnx" and not Path(rest).is_file():
        return f"--teacher {teacher}: there is no file {rest}"
    if prefix == "torchhub" and ":" not in rest:
        return f"--teacher {teacher}: give the repository and the model in it, as in torchhub:owner/name:main:generator"
    if prefix == "python":
        file, _, function = rest.rpartition(":")
        if not Path(file).is_file() or not function.isidentifier():
            return f"--teacher {teacher}: give a file and a function in it, as in python:my_edits.py:paint"
    return ""
