"""What must not be in a pair set: the safety checker of a model, and a function of the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image

from data_preparation.pairs.models import ModelChoice, load_image_processor
from utils.errors import InputError, explaining_load_errors

ImageCheck = Callable[[list[np.ndarray]], list[bool]]  # uint8 (H, W, 3) each -> whether it must not be kept


def load_checks(choice: ModelChoice, image_check: str | None, pipeline: Any) -> dict[str, ImageCheck]:
    """Every check that applies, by the reason that its rejections are counted under.

    The safety checker is the one that is named, else the pipeline's own where it has one.
    """
    checks: dict[str, ImageCheck] = {}
    checker, processor = getattr(pipeline, "safety_checker", None), getattr(pipeline, "feature_extractor", None)
    if choice.safety_checker:
        checker, processor = _load_safety_checker(choice.safety_checker, choice.safety_revision)
        checker.to(pipeline.unet.device)
    if checker is not None and not choice.no_safety_checker:
        checks["flagged by the safety checker"] = _as_check(checker, processor)
    if image_check:
        checks["flagged by --image_check"] = load_function(image_check)
    return checks


def _load_safety_checker(name: str, revision: str | None) -> tuple[StableDiffusionSafetyChecker, Any]:
    """From a repository or folder of its own, or from a whole pipeline."""
    is_pipeline = (Path(name) / "model_index.json").is_file()
    place = {} if Path(name).exists() else dict(revision=revision)
    model_place = place | (dict(subfolder="safety_checker") if is_pipeline else {})
    processor_place = place | (dict(subfolder="feature_extractor") if is_pipeline else {})
    advice = "give CompVis/stable-diffusion-safety-checker, its folder, or the folder of a pipeline that has one"
    with explaining_load_errors(f"--safety_checker {name}", advice):
        checker = StableDiffusionSafetyChecker.from_pretrained(name, **model_place).eval()
        return checker, load_image_processor(name, **processor_place)


def _as_check(checker: StableDiffusionSafetyChecker, processor: Any) -> ImageCheck:
    place = next(checker.parameters())

    @torch.no_grad()
    def check(images: list[np.ndarray]) -> list[bool]:
        pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        # It blackens what it flags, so it is given copies of a pixel each.
        flags = checker(images=np.zeros((len(images), 1, 1, 3)), clip_input=pixels.to(place.device, place.dtype))[1]
        return [bool(flag) for flag in flags]

    return check


def load_function(spec: str) -> ImageCheck:
    """`python:FILE:FUNCTION`: a function of uint8 pictures (H, W, 3), which says of each whether to reject it.

    Raises InputError where there is no such function.
    """
    kind, _, rest = spec.partition(":")
    file, _, function = rest.rpartition(":")
    if kind != "python" or not file or not function:
        raise InputError(f"--image_check {spec}: must be python:FILE:FUNCTION")
    if not Path(file).is_file():
        raise InputError(f"--image_check {spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"image_check_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        found = getattr(module, function)
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"--image_check {spec}: cannot be loaded ({type(error).__name__}: {error})") from error
    return lambda images: _call(found, spec, images)


def _call(function: Callable, spec: str, images: list[np.ndarray]) -> list[bool]:
    try:
        flags = [bool(flag) for flag in function(images)]
    except Exception as error:  # as above
        raise InputError(f"--image_check {spec}: raised {type(error).__name__}: {error}") from error
    if len(flags) != len(images):
        raise InputError(f"--image_check {spec}: gave {len(flags)} answers for {len(images)} pictures")
    return flags
