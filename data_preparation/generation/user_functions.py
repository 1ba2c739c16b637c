"""`python:FILE:FUNCTION`: a function of the user's own file, as a teacher, an image check or a moderator."""

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import InputError


def find_function_problem(spec: str) -> str | None:
    """Why `spec` cannot name a function, or None. Nothing is imported."""
    kind, file, name = _split(spec)
    if kind != "python" or not file or not name.isidentifier():
        return f"{spec} must be python:FILE:FUNCTION, such as python:my_edits.py:paint"
    return None if Path(file).is_file() else f"{spec}: the file {file} does not exist"


def load_function(flag: str, spec: str) -> Callable[..., Any]:
    """The function that `spec` names.

    flag: for messages, such as "--teacher". Raises InputError if the file cannot be imported or lacks the function.
    """
    if problem := find_function_problem(spec):
        raise InputError(f"{flag} {problem}")
    _, file, name = _split(spec)
    module_spec = importlib.util.spec_from_file_location(f"user_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    if (folder := str(Path(file).absolute().parent)) not in sys.path:
        sys.path.append(folder)  # for the modules beside it; last, so that they hide no others
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"{flag} {spec} cannot be loaded: {type(error).__name__}: {error}") from error
    return function


def with_absolute_path(spec: str) -> str:
    """KIND:PATH or KIND:PATH:NAME with an absolute path: a worker may run in another folder. Others are unchanged."""
    kind, _, rest = spec.partition(":")
    path, colon, name = rest.rpartition(":")
    if rest and Path(rest).exists():
        return f"{kind}:{Path(rest).absolute()}"
    return f"{kind}:{Path(path).absolute()}{colon}{name}" if path and Path(path).exists() else spec


def find_imported_files(file: Path) -> list[Path]:
    """The file and those in its folder that it imports, also through each other: sorted absolute paths."""
    folder, found, todo = file.parent, set(), [file]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # is reported when the function is loaded
            continue
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                parent = f"{node.module}." if node.module else ""
                names += [node.module or "", *(f"{parent}{alias.name}" for alias in node.names)]
            for name in filter(None, names):
                module = folder.joinpath(*name.split("."))
                todo += [path for path in (module.with_suffix(".py"), module / "__init__.py") if path.is_file()]
    return sorted(found)


def call_function(flag: str, spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of `load_function`; whatever it raises becomes an InputError."""
    try:
        return function(*arguments)
    except Exception as error:
        raise InputError(f"{flag} {spec} failed: {type(error).__name__}: {error}") from error


def _split(spec: str) -> tuple[str, str, str]:
    """python:FILE:FUNCTION -> its three parts; a path may hold colons."""
    kind, _, rest = spec.partition(":")
    file, _, name = rest.rpartition(":")
    return kind, file, name
