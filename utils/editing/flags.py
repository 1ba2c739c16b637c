"""The flags of infer.py and app.py about the editor, and the checks of infer.py's flags. Nothing heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.editing.settings import EditSettings, find_setting_problems
from utils.hub_names import looks_like_path, split_hub_file

# The flags whose values --repeat reads from the image, besides the settings of an edit.
RECORDED = ("edit", "jobs", "surprise_me", "num_images", "seed")
RECORDED_OPTIONS = ("dtype", "compile", "vae_slicing", "vae_tiling", "no_safety_checker", "lora_scale")


JUDGE_METRICS = ("clip_text", "clip_image", "clip_both")
OFFLOADS = ("model", "sequential")  # which part of the weights is on the GPU: one model, or one layer


@dataclass(frozen=True)
class EditorOptions:
    """Which editor to load and how to run it; the fields are flags of infer.py."""

    model: str
    revision: str | None = None
    variant: str | None = None
    lora: tuple[str, ...] | list[str] | None = None
    lora_scale: tuple[float, ...] | list[float] | None = None
    vae: str | None = None
    single_file_config: str | None = None
    no_safety_checker: bool = False
    device: str = "auto"
    dtype: str | None = None
    compile: bool = False
    offload: str | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False


def find_flag_problems(flags: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with infer.py's flags by themselves, one line each."""
    return (
        _find_model_problems(flags)
        + _find_input_problems(flags)
        + _find_judge_problems(flags)
        + find_setting_problems({**flags, "lora_scale": None})
    )


def find_missing_path(flag: str, name: str | None) -> list[str]:
    """A line if `name` can only be a path and does not exist."""
    is_on_hub = flag == "lora" and name and split_hub_file(name)
    is_missing = name and looks_like_path(name) and not Path(name).exists() and not is_on_hub
    return [f"--{flag} {name} is not a folder or file that exists"] if is_missing else []


def find_offload_problems(offload: str | None, device: str, is_compiled: bool = False) -> list[str]:
    """What is wrong with --offload beside the other flags of the machine."""
    if offload and device == "cpu":
        return [f"--offload {offload} needs a GPU: remove it, or --device cpu"]
    if offload == "sequential" and is_compiled:
        return ["--compile has no effect with --offload sequential: remove one"]
    return []


def find_scale_problems(lora: Sequence[str] | None, scales: Sequence[float] | None) -> list[str]:
    """What is wrong with --lora_scale: one scale for each adapter, or one for all."""
    given = " ".join(map(str, scales or ()))
    if scales and not lora:
        return [f"--lora_scale {given} has no effect without --lora"]
    if scales and len(scales) not in (1, len(lora)):
        return [f"--lora_scale {given}: give one scale, or one for each of the {len(lora)} adapters of --lora"]
    return [problem for scale in scales or () for problem in find_setting_problems({"lora_scale": scale})]


def _find_model_problems(flags: Mapping[str, Any]) -> list[str]:
    problems = []
    if not flags["model"] and not flags["repeat"]:
        problems.append("--model is missing: give the folder, the file or the Hub id of an editor")
    if flags.get("trust_record") and not flags["repeat"]:
        problems.append("--trust_record is for --repeat: remove it")
    problems += find_offload_problems(flags["offload"], flags["device"], flags["compile"])
    for flag in ("model", "vae", "single_file_config"):
        problems += find_missing_path(flag, flags[flag])
    for lora in flags["lora"] or ():
        problems += find_missing_path("lora", lora)
    problems += find_scale_problems(flags["lora"], flags["lora_scale"])
    if flags["single_file_config"] and flags["model"] and Path(flags["model"]).is_dir():
        problems.append(f"--config is for a --model in one file, and {flags['model']} is a folder: remove it")
    return problems


def _find_judge_problems(flags: Mapping[str, Any]) -> list[str]:
    problems, judge = [], flags.get("judge")
    if flags.get("best_of") is not None and not 2 <= flags["best_of"] <= 1000:
        problems.append(f"--best_of {flags['best_of']}: must be from 2 to 1000")
    if not flags.get("best_of") and (judge or flags.get("judge_model")):
        problems.append("--judge and --judge_model choose one of --best_of edits: add --best_of N")
    if flags.get("best_of") and flags["repeat"]:
        problems.append("--repeat makes one edit again: remove --best_of")
    if judge and judge not in JUDGE_METRICS and "://" not in judge:
        problems.append(f"--judge {judge}: give {', '.join(JUDGE_METRICS)} or an address such as http://localhost:8000")
    if judge and "://" in judge and not flags.get("judge_model"):
        problems.append("--judge names a server: give the name of its model, too, with --judge_model")
    return problems


def _find_input_problems(flags: Mapping[str, Any]) -> list[str]:
    problems = []
    missing = [f"--{flag}" for flag in ("input", "edit") if not flags[flag]]
    if flags["repeat"]:
        recorded = (*RECORDED, *(field.name for field in fields(EditSettings)), *RECORDED_OPTIONS)
        given = [f"--{flag}" for flag in recorded if flags[flag] is not None and flags[flag] is not False]
        if given:
            problems.append(f"--repeat reads these from the image: remove {', '.join(given)}")
    elif flags["jobs"] and flags["input"]:
        problems.append("--jobs names its images itself: remove --input")
    elif missing and not flags["jobs"] and not (flags["surprise_me"] and flags["input"]):
        problems.append(f"{', '.join(missing)} missing: give an image and an instruction (or --jobs)")
    if flags["repeat"] and len(flags["input"] or []) > 1:
        problems.append(f"--repeat has one input, and --input names {len(flags['input'])}: give one")
    if flags.get("recursive") and not flags["input"]:
        problems.append("--recursive is for the folders of --input: remove it")
    if any(not edit.strip() for edit in flags["edit"] or []):
        problems.append("--edit is empty: describe what to change")
    if flags["surprise_me"] and flags["edit"]:
        problems.append("--surprise_me draws the instruction: remove --edit")
    return problems
