"""The tasks and teachers that --task and --teacher select. Light imports only, so that --help is fast."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_preparation.generation.user_functions import find_function_problem
from data_preparation.instructions import FOLDER, available_tasks

LOW_LEVEL_TASKS = (
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
DEGRADATION_TASKS = (*LOW_LEVEL_TASKS, "identity")  # the photograph is the edited image, its degraded copy the original
TOY_TASKS = tuple(f"toy/{path.stem}" for path in sorted((FOLDER / "toy").glob("*.txt")))
TASK_GROUPS = {"all": ("cartoonize", *DEGRADATION_TASKS), "low_level": LOW_LEVEL_TASKS, "toy": TOY_TASKS}
EXACT, DEGRADATION, OPENCV = "exact", "degradation", "opencv"  # teachers without a model or a file
TEACHERS = "opencv, onnx:FILE, torchhub:REPO:MODEL, diffusers:MODEL and python:FILE:FUNCTION"


@dataclass(frozen=True)
class Task:
    """name: as in the rows; phrasings: argument of `read_phrasings`; weight: relative share of the rows.

    teacher: EXACT, DEGRADATION, OPENCV, "onnx:FILE", "torchhub:REPO:MODEL", "diffusers:MODEL", "python:FILE:FUNCTION".
    """

    name: str
    phrasings: str
    teacher: str
    weight: float = 1.0


@dataclass(frozen=True)
class TeacherSettings:
    """The flags of teachers that are models.

    input_range, output_range: values of black and white (output_range None: as the input); extra: further arguments of
    the loader (torchhub) or of the call (diffusers); teacher_layout: nchw, nhwc or auto; teacher_multiple: of the
    sides, reached by mirroring; teacher_channels: rgb or bgr; teacher_prompt: replaces the instructions of the rows.
    """

    input_range: tuple[float, float] = (-1.0, 1.0)
    output_range: tuple[float, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    teacher_layout: str = "auto"
    teacher_multiple: int = 1
    teacher_channels: str = "rgb"
    teacher_prompt: str | None = None
    device: str = "auto"
    dtype: str | None = None


def plan_tasks(task_words: list[str], teacher_words: list[str]) -> tuple[list[Task], list[str]]:
    """(tasks, problems) of `--task NAME[=WEIGHT] ...` and `--teacher [TASK=]TEACHER ...`."""
    weights, problems = _read_weights(task_words)
    default, by_task = None, {}
    for word in teacher_words:
        name, has_name, teacher = word.partition("=")
        if has_name and name in weights:
            by_task[name] = teacher
        elif default is None:
            default = word
        else:
            problems.append(f"--teacher {word}: only one may be without a task; name the task, as in cartoonize={word}")
    tasks = []
    for name, weight in weights.items():
        task, problem = _plan_task(name, weight, by_task.get(name, default))
        problems += [problem] if problem else []
        tasks += [task] if task else []
    unused = [name for name in by_task if name in DEGRADATION_TASKS]
    problems += [f"--teacher {name}={by_task[name]}: {name} is a degradation and needs no teacher" for name in unused]
    return tasks, problems


def _read_weights(task_words: list[str]) -> tuple[dict[str, float], list[str]]:
    weights, problems = {}, []
    for word in task_words:
        name, _, number = word.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = 0.0
        if not 0 < weight < 1e9:
            problems.append(f"--task {word}: the weight must be a number above 0, as in cartoonize=2")
        weights |= dict.fromkeys(TASK_GROUPS.get(name, (name,)), weight)
    return weights, problems


def _plan_task(name: str, weight: float, teacher: str | None) -> tuple[Task | None, str | None]:
    is_file = name.endswith(".txt")
    if not is_file and name not in (*available_tasks(), *TOY_TASKS):
        similar = difflib.get_close_matches(name, [*available_tasks(), *TASK_GROUPS], 1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        allowed = ", ".join([*TASK_GROUPS, *available_tasks()])
        return None, f"--task {name}: unknown{hint}; give {allowed}, or a text file with one instruction per line"
    if is_file and not Path(name).is_file():
        return None, f"--task {name}: the file does not exist; give a text file with one instruction per line"
    if name in DEGRADATION_TASKS:
        return Task(name, name, DEGRADATION, weight), None
    if teacher is None:
        if name != "cartoonize" and f"toy/{name.removeprefix('toy/')}" not in TOY_TASKS:
            return None, f"--task {name}: needs a teacher for the edited images; give --teacher {name}=TEACHER"
        teacher = OPENCV if name == "cartoonize" else EXACT
    return Task(Path(name).stem, name, teacher, weight), _find_teacher_problem(name, teacher)


def _find_teacher_problem(task: str, teacher: str) -> str | None:
    kind, _, name = teacher.partition(":")
    if teacher == OPENCV and Path(task).stem != "cartoonize":
        return f"--teacher opencv only draws cartoons; give another teacher for {task}"
    if teacher in (OPENCV, EXACT):
        return None
    if kind not in ("onnx", "torchhub", "diffusers", "python") or not name:
        return f"--teacher {teacher}: unknown; allowed are {TEACHERS}"
    if kind == "onnx" and not Path(name).is_file():
        return f"--teacher {teacher}: the file {name} does not exist"
    if kind == "torchhub" and ":" not in name:
        return f"--teacher {teacher}: must name a repository and a model, as in torchhub:owner/name:main:generator"
    if kind == "python" and (problem := find_function_problem(teacher)):
        return f"--teacher {problem}"
    return None
