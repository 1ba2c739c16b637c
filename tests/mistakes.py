"""Run training scripts that fail in this process: check the message, and that existing files are kept."""

import io
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import train_instruct_pix2pix

UNTOUCHED = ("model_index.json", "unet/", "checkpoint-")  # what even a run that has started does not change

Script = Callable[[list[str]], int]


def run_here(flags: list[str], script: Script) -> tuple[int, str]:
    """(exit code, stderr with the log lines)."""
    seen = io.StringIO()
    handler = logging.StreamHandler(seen)  # pytest replaces the script's own
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stderr(seen):
            code = script(flags)
    except SystemExit as exit:
        code = exit.code
    finally:
        logging.getLogger().removeHandler(handler)
    return code, seen.getvalue()


def fails_early(flags: list[str], *words: str, script: Script = train_instruct_pix2pix.main) -> str:
    """Check exit code 2 with a single message before a model is loaded; returns stderr. output_dir keeps its files."""
    before = read_files(output_dir_of(flags))
    refusal = AssertionError("a model was loaded")
    with mock.patch("utils.training.assembly.load_stable_diffusion", side_effect=refusal):
        code, seen = run_here(flags, script)
    assert code == 2 and seen.startswith("error: "), seen
    _check_message(seen, words)
    assert before.items() <= read_files(output_dir_of(flags)).items()
    return seen


def fails_late(flags: list[str], *words: str, script: Script = train_instruct_pix2pix.main) -> str:
    """As `fails_early`, but after models are loaded: an existing pipeline and checkpoints are kept."""
    before = {name: content for name, content in read_files(output_dir_of(flags)).items() if name.startswith(UNTOUCHED)}
    code, seen = run_here(flags, script)
    assert code == 2, seen
    _check_message(seen, words)
    left = read_files(output_dir_of(flags))
    assert before.items() <= left.items()
    assert not [name for name in left if ".unfinished" in name]
    return seen


def finishes(flags: list[str], *words: str, script: Script = train_instruct_pix2pix.main) -> str:
    """Check exit code 0, a published pipeline and `words` in stderr; returns stderr."""
    code, seen = run_here(flags, script)
    assert code == 0, seen
    assert "error" not in seen and all(word in seen for word in words), seen
    published = output_dir_of(flags)
    assert (published / "model_index.json").is_file() and (published / "README.md").is_file()
    assert json.loads((published / "unet/config.json").read_text())["in_channels"] == 8
    return seen


def _check_message(seen: str, words: tuple[str, ...]) -> None:
    assert "Traceback" not in seen
    lines = seen.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, seen
    message = seen[seen.index("error: ") :]
    assert not [word for word in words if word not in message], message


def output_dir_of(flags: list[str]) -> Path:
    """The last --output_dir among the flags."""
    return Path([flag for flag in flags if flag.startswith("--output_dir=")][-1].partition("=")[2])


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(model: Path, folder: Path) -> Path:
    """A copy of a model or an output folder that a test may damage."""
    return Path(shutil.copytree(model, folder))


def of_model(flags: list[str], model: Path | str) -> list[str]:
    """The flags with another model."""
    return [*flags, f"--pretrained_model_name_or_path={model}"]


def cut(path: Path) -> None:
    """Truncate a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
