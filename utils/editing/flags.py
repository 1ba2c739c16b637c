"""What infer.py's flags say of the editor, and what in them cannot work. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.editing.jobs import find_setting_problems

ORIGINAL_MODEL = (
    "--ckpt, --vae-ckpt and a --config of .yaml belong to the original edit_cli.py; here a model is a folder in "
    "diffusers' format or one .safetensors file. The original's is --model timbrooks/instruct-pix2pix; convert a .ckpt "
    "of your own to .safetensors once, and give it as --model FILE"
)
# What --repeat takes from the picture.
RECORDED = (
    "edit",
    "jobs",
    "surprise_me",
    "randomize_cfg",
    "num_images",
    "seed",
    "steps",
    "guidance_scale",
    "image_guidance_scale",
    "eta",
    "guidance_interval",
    "scheduler",
    "timestep_spacing",
    "resolution",
    "keep_size",
    "dtype",
    "compile",
    "vae_slicing",
    "vae_tiling",
    "no_safety_checker",
    "lora_scale",
)


@dataclass(frozen=True)
class EditorOptions:
    """Which editor, and how it is set up; the fields are infer.py's flags."""

    model: str
    revision: str | None = None
    variant: str | None = None
    lora: str | None = None
    lora_scale: float | None = None
    single_file_config: str | None = None
    no_safety_checker: bool = False
    device: str = "auto"
    dtype: str | None = None
    compile: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False


def find_editing_problems(flags: Mapping[str, Any]) -> list[str]:
    """Everything that can be told from the flags alone, one line each."""
    problems = _find_model_problems(flags) + _find_input_problems(flags)
    return problems + find_setting_problems(dict(flags))


def _find_model_problems(flags: Mapping[str, Any]) -> list[str]:
    problems = []
    if flags["original_model"] or (flags["single_file_config"] or "").endswith((".yaml", ".yml")):
        problems.append(ORIGINAL_MODEL)
    elif not flags["model"] and not flags["repeat"]:
        problems.append("--model is missing: the folder, the file or the Hub id of an editor")
    for flag in ("model", "lora", "single_file_config"):
        value = flags[flag]
        if value and value.startswith(("/", ".", "~")) and not Path(value).exists():
            problems.append(f"--{flag} {value} is not a folder or file that exists")
    if flags["lora_scale"] not in (None, 1) and not flags["lora"]:
        problems.append(f"--lora_scale {flags['lora_scale']} has nothing to scale: give --lora as well")
    if flags["single_file_config"] and flags["model"] and Path(flags["model"]).is_dir():
        problems.append(f"--config is for a --model in one file, and {flags['model']} is a folder")
    return problems


def _find_input_problems(flags: Mapping[str, Any]) -> list[str]:
    problems = []
    missing = [f"--{flag}" for flag in ("input", "edit") if not flags[flag]]
    if flags["repeat"]:
        given = [f"--{flag}" for flag in RECORDED if flags[flag] is not None and flags[flag] is not False]
        if given:
            problems.append(f"--repeat takes all of this from the picture: leave out {', '.join(given)}")
    elif flags["jobs"] and flags["input"]:
        problems.append("--jobs names its images itself: leave out --input")
    elif missing and not flags["jobs"] and not (flags["surprise_me"] and flags["input"]):
        problems.append(f"{', '.join(missing)} missing: what is to be edited, and how (or give --jobs)")
    if any(not edit.strip() for edit in flags["edit"] or []):
        problems.append("--edit is empty: say what to change")
    if flags["surprise_me"] and flags["edit"]:
        problems.append("--surprise_me draws the instruction: leave out --edit")
    return problems
