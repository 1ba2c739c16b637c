"""`--config FILE`: flags in a YAML or JSON file, such as args.json of an earlier run; the command line wins."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError

SUFFIXES = (".yaml", ".yml", ".json")
# In args.json of a run, but not settings: chosen anew by each run, or secret.
IGNORED = ("hub_token", "config", "local_rank", "resume_from_checkpoint")
UNSET = re.compile(r"\$(\w+|\{[^}]*\})|%\w+%")
# Flags whose values are words for people or secrets, in which "~" and "$" mean themselves.
TEXT_FLAGS = ("edit", "prompt", "instruction", "token", "key", "negative", "license", "note", "caption", "pattern")
PATH_FLAGS = ("prompts", "captions", "tokenizer")  # that have one of these words in their names
PREFIXED_HOME = re.compile(
    r"((?:[^=:/]+=)?(?:onnx|diffusers|python|blocklist):)(~.*)"
)  # --teacher night=onnx:~/night.onnx


def add_config_flag(parser: argparse.ArgumentParser, group: Any = None) -> None:
    """Let a parser read `--config FILE` (`FlagParser.parse_known_args`)."""
    what = "YAML or JSON file of flags, such as args.json of an earlier run; flags on the command line override it"
    (group or parser).add_argument("--config", metavar="FILE", help=what)


def is_settings_file(value: str) -> bool:
    """Whether --config names a file of flags, not a pipeline."""
    return value.lower().endswith(SUFFIXES)


def find_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the value of --config, the other words). Of several, the last counts."""
    value, rest, index = None, [], 0
    while index < len(words):
        if words[index] == "--config" and index + 1 < len(words):
            value, index = words[index + 1], index + 2
        elif words[index].startswith("--config="):
            value, index = words[index].partition("=")[2], index + 1
        else:
            rest.append(words[index])
            index += 1
    return value, rest


def read_config(file: str, parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The settings of a file as command-line words, without those that `words` set. Raises InputError."""
    path = Path(os.path.expandvars(file)).expanduser()
    values = _load(path)
    if isinstance(values.get("model"), dict):  # a model's architecture, as the original edit_cli.py needs it
        return []
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    actions |= {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    found, problems = [], []
    for key, value in values.items():
        action = actions.get(str(key).lstrip("-")) or actions.get(str(key).lstrip("-").replace("-", "_"))
        if key in IGNORED or (action is not None and given & set(action.option_strings)):
            continue
        if action is None and value is None:  # a setting of another script that this file does not use
            continue
        if action is None:
            similar = difflib.get_close_matches(str(key), actions, n=1)
            hint = f": did you mean {similar[0]}?" if similar else ""
            problems.append(f"--config {path}: {key!r} is not a flag{hint}")
            continue
        try:
            found += _as_words(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            problems.append(f"--config {path}: {key} is {value!r}; it must be {_describe(action)}")
    if problems:
        raise InputError.from_problems(problems)
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not JSON: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must map flags to values, such as learning_rate: 1e-5")
    return values


def _as_words(action: argparse.Action, value: Any) -> list[str]:
    """A setting as command-line words. Raises ValueError or TypeError for a value that the flag does not accept."""
    flag = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise TypeError
        return [flag if value else f"--no-{flag[2:]}" if f"--no-{flag[2:]}" in action.option_strings else flag]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError
        return [flag] if value else []
    is_appended = isinstance(action, argparse._AppendAction)
    is_several = is_appended or action.nargs in ("+", "*") or isinstance(action.nargs, int)
    if isinstance(value, (list, tuple)) != is_several and not (is_several and not isinstance(value, dict)):
        raise TypeError
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for one in values:
        _check(action, one)
    if isinstance(action, argparse._AppendAction) and action.nargs is None:
        return [f"{flag}={one}" for one in values]
    return [f"{flag}={values[0]}"] if not is_several else ([flag, *map(str, values)] if values else [])


def _check(action: argparse.Action, value: Any) -> None:
    if isinstance(value, (dict, list, bool)):
        raise TypeError
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.type is None and not isinstance(value, str) and action.choices is None and not isinstance(value, int):
        raise TypeError
    if action.choices is not None and converted not in action.choices:
        raise ValueError


def _describe(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return "true or false"
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    names = {int: "a whole number", float: "a number", None: "text", Path: "a path"}
    kind = names.get(action.type, "another kind of value")
    return f"{kind} or a list of them" if action.nargs in ("+", "*") else kind


def expand_paths(parsed: argparse.Namespace) -> list[str]:
    """Replace "~" and environment variables in every value that may be a path; returns one line for each problem."""
    problems = []
    for name, value in vars(parsed).items():
        is_path = isinstance(value, Path) or name in PATH_FLAGS
        if not is_path and any(word in name for word in TEXT_FLAGS):
            continue
        expanded = [_expand(one) for one in value] if isinstance(value, list) else _expand(value)
        for one in expanded if isinstance(expanded, list) else [expanded]:
            if isinstance(one, (str, Path)) and (match := UNSET.search(str(one))) and "://" not in str(one):
                problems.append(f"--{name} {one}: the environment variable {match[0].strip('${}%')} is not set")
        setattr(parsed, name, expanded)
    return problems


def _expand(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value) or "://" in str(value):
        return value
    text = os.path.expandvars(str(value))
    if text.startswith("~"):
        text = os.path.expanduser(text)
    elif match := PREFIXED_HOME.fullmatch(text):
        text = match[1] + os.path.expanduser(match[2])
    return value if text == str(value) else type(value)(text) if isinstance(value, str) else Path(text)
