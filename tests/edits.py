"""Shared by the tests of editing: photographs, the edit service on a tiny editor, counts of what a model computes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

import infer
from tests.pairs import make_noise
from utils.editing.editor_setup import OpenedEditor
from utils.editing.jobs import Job
from utils.editing.service import EditService

ORIGIN = {"model": {"name": "m", "weights": "w"}, "machine": {"device": "cpu"}, "settings": {"dtype": "fp32"}}


def make_photos(folder: Path) -> Path:
    """Two wide photographs, a tall one and a broken file."""
    folder.mkdir()
    for name, size in (("a", (60, 40)), ("b", (60, 40)), ("tall", (40, 60))):
        make_noise(size[::-1], seed=len(name) + ord(name[0])).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def make_service(
    editor: Any,
    recommended: dict | None = None,
    origin: dict = ORIGIN,
    batch_size: int = 1,
    messages: list | None = None,
) -> EditService:
    """messages: where the service's messages for the user go."""
    opened = OpenedEditor(editor, origin, recommended or {}, [])
    return EditService(opened, batch_size, print if messages is None else messages.append)


def edit_jobs(service: EditService, jobs: list[Job], seed: int | None = None) -> Counter:
    """Edit and save jobs as infer.py does."""
    return infer.edit_jobs(service, jobs, service.choose_seed(jobs) if seed is None else seed)


@contextmanager
def counting(pipeline: Any) -> Iterator[dict[str, Any]]:
    """Counts the encoded "texts" and "images", and lists the "rows" of each call of the UNet."""
    counts = {"texts": 0, "images": 0, "rows": []}

    def count(name: str):
        def hook(module, inputs, output) -> None:
            counts[name] += inputs[0].shape[0] if name != "rows" else [inputs[0].shape[0]]

        return hook

    models = {"texts": pipeline.text_encoder, "images": pipeline.vae.encoder, "rows": pipeline.unet}
    hooks = [model.register_forward_hook(count(name)) for name, model in models.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def make_safety_checker() -> tuple[StableDiffusionSafetyChecker, CLIPImageProcessor]:
    """A tiny safety checker with random weights, and its processor."""
    shape = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    vision = dict(**shape, image_size=30, patch_size=3, projection_dim=64)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=64)).eval()
    return checker, CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
