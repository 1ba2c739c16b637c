"""Imports follow the layers, and nothing heavy is imported before the flags are checked."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PREPARATION = REPOSITORY / "data_preparation"
MODULES = {
    "instructions",
    "peer_flags",
    "photographs",
    "published_prompts",
    "toy_edits",
}  # modules in data_preparation/ that are not scripts
DATA_SCRIPTS = sorted(path for path in PREPARATION.glob("[a-z]*.py") if path.stem not in MODULES)
SCRIPTS = [*sorted(REPOSITORY.glob("*.py")), *DATA_SCRIPTS]
UTILS = sorted((REPOSITORY / "utils").rglob("*.py"))
ABOVE_UTILS = {path.stem for path in REPOSITORY.glob("*.py")} | {
    "data_preparation",
    "evaluation",
    "benchmarks",
    "tests",
}

COMMAND_LINE = {"cli.py", "training/flags.py", "training/flag_checks.py"}
GROUPS = ["", "models", "data", "checks", "editing", "training", "merging", "web"]  # in the order of imports


def group_of(module: str) -> str:
    """The folder of utils/ that a module is in; "" for a flat file."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in GROUPS else ""


def imports_of(path: Path, only_top: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if only_top else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", UTILS, ids=lambda path: path.stem)
def test_utils_import_nothing_above_them(path):
    assert not {name for name in imports_of(path) if name.split(".")[0] in ABOVE_UTILS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_imports_a_script(path):
    names = {script.stem for script in SCRIPTS} | {f"data_preparation.{script.stem}" for script in DATA_SCRIPTS}
    assert not imports_of(path) & names


@pytest.mark.parametrize("path", sorted(PREPARATION.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parts_of_data_preparation_import_no_script(path):
    assert not imports_of(path) & {f"data_preparation.{script.stem}" for script in DATA_SCRIPTS}


@pytest.mark.parametrize("path", UTILS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_groups_of_utils_import_only_earlier_groups(path):
    """Flat files < models < data < checks < editing < training < merging and web, which do not import each other."""
    own = group_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    used = {group_of(name) for name in imports_of(path) if name.split(".")[0] == "utils"}
    allowed = set(GROUPS[: GROUPS.index(own) + 1]) - ({"merging"} if own == "web" else set())
    assert used <= allowed


@pytest.mark.parametrize("folder", ["utils", "data_preparation"])
def test_imports_have_no_cycle(folder):
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    graph = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): imports_of(path) for path in paths}
    assert len(graph) > 50
    graph = {module: {name for name in names if name in graph} for module, names in graph.items()}
    while free := {module for module, names in graph.items() if not names}:
        graph = {module: names - free for module, names in graph.items() if module not in free}
    assert not graph


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_start_light(path):
    """Top-level imports of a script and of the modules that it imports."""
    heavy = {"torch", "diffusers", "transformers", "datasets", "accelerate", "numpy", "cv2", "pyarrow", "PIL", "gradio"}
    heavy = heavy if path in DATA_SCRIPTS else heavy - {"numpy", "PIL"}
    todo, seen = {name for name in imports_of(path, only_top=True)}, set()
    while todo:
        name = todo.pop()
        seen.add(name)
        file = REPOSITORY / f"{name.replace('.', '/')}.py"
        if file.exists():
            todo |= imports_of(file, only_top=True) - seen
    assert not {name.split(".")[0] for name in seen} & heavy


@pytest.mark.parametrize("path", UTILS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_only_command_line_modules_read_args(path):
    """Everything else has parameters of its own, or small dataclasses."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    parameters = {parameter.arg for node in functions for parameter in (*node.args.args, *node.args.kwonlyargs)}
    assert path.relative_to(REPOSITORY / "utils").as_posix() in COMMAND_LINE or "args" not in parameters
