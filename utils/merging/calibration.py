"""The weight of a change, chosen on the user's own pictures: few steps compared with the undistilled editor at many.

A small weight leaves few-step edits blurred, a great one drives the editing out. For each weight of a grid the pairs
are edited with the same noise, and three things are compared with the teacher, which is the editor itself:
  latent_distance   root mean square between the latents of the two edits (also of their pixels: pixel_distance)
  direction         cosine between the two changes of the input, in latents: 1 is the same edit, 0 has nothing of it
  saturation        spread of the colours, as a ratio: above 1 the edit is gaudier, below 1 paler
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from utils.contact_sheets import draw_grid
from utils.editing.edit_images import Editor, edit_pixels, fit_to_model
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.merging.editor_writer import make_scheduler
from utils.merging.ingredients import Ingredients, Recipe
from utils.merging.merge import MergeOptions, MergeReport
from utils.models.latents import encode_moments, mode_of_original_latents, scale_latents
from utils.pictures import load_picture
from utils.runtime import choose_device

TEACHER = dict(num_inference_steps=30, guidance_scale=7.5, image_guidance_scale=1.5)
SEED = 0
MIN_CELL = 128  # pixels of a picture on the sheet
Pair = tuple[Image.Image, str]
Merge = Callable[[MergeOptions, MergeReport], Iterator]


@dataclass(frozen=True)
class Scores:
    """Means over the pairs at one weight."""

    weight: float
    latent_distance: float
    pixel_distance: float
    direction: float
    saturation: float


@dataclass
class Calibration:
    """scores: by rising weight; sheet: each pair's input, teacher's edit and the edit at each weight."""

    scores: list[Scores]
    chosen: float
    sheet: Image.Image

    def files(self) -> dict[str, Callable[[Path], None]]:
        """What goes into the editor's folder: name -> what writes it."""
        content = {"chosen": self.chosen, "teacher": TEACHER, "scores": [asdict(one) for one in self.scores]}
        return {
            "calibration.json": lambda path: path.write_text(json.dumps(content, indent=1) + "\n"),
            "calibration.png": lambda path: draw_scores(self.scores, self.chosen, path),
            "calibration_sheet.png": lambda path: self.sheet.save(path),
        }

    def describe(self) -> str:
        header = "weight  latent distance  pixel distance  direction  saturation"
        lines = [
            f"{one.weight:<6g}  {one.latent_distance:<15.4f}  {one.pixel_distance:<14.4f}  {one.direction:<9.4f}  "
            f"{one.saturation:.4f}{'  <- taken' if one.weight == self.chosen else ''}"
            for one in self.scores
        ]
        if len(self.scores) > 1 and self.chosen in (self.scores[0].weight, self.scores[-1].weight):
            lines.append(
                "the best weight is an end of the grid: widen it with --calibrate_weights, and look at the sheet"
            )
        return "\n".join(["calibration, against the editor itself at 30 steps:", header, *lines])


def read_pairs(path: Path) -> list[Pair]:
    """Pictures and instructions of a .jsonl file: {"image": PATH or URL, "edit": INSTRUCTION} a line.

    A path is relative to the file's folder. Raises `InputError` that names the line.
    """
    if not path.is_file():
        raise InputError(f"--calibrate {path} does not exist: give a .jsonl file with an image and an edit a line")
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"--calibrate {path}, line {number}:"
        try:
            row = json.loads(line)
            image, edit = row["image"], row["edit"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{where} it must read {{"image": "photo.jpg", "edit": "make it winter"}}') from error
        if not isinstance(image, str) or not isinstance(edit, str) or not edit.strip():
            raise InputError(f"{where} image and edit must be texts")
        pairs.append((load_picture(image if "://" in image else str(path.parent / image), where), edit))
    if not pairs:
        raise InputError(f"--calibrate {path} is empty: give 8 to 16 pairs of an image and an edit")
    return pairs


def calibrate_recipe(
    recipe: Recipe, ingredients: Ingredients, pairs: list[Pair], weights: list[float], device: str
) -> Calibration:
    """Load the recipe's editor and try the weights with the scheduler and settings that the new one will have."""
    editor = ingredients.editor
    place, dtype = choose_device(device)
    pipeline = load_editor(editor.folder, dtype=dtype, device=place, variant=editor.variant)
    scheduler = make_scheduler(recipe, editor)
    settings = {name: recipe.recommended[name] for name in ("guidance_scale", "image_guidance_scale", "eta")}
    settings["num_inference_steps"] = recipe.recommended["steps"]
    return calibrate(pipeline, ingredients.merge, recipe.merge, pairs, weights, scheduler, settings)


def calibrate(
    pipeline: Editor,
    merge: Merge,
    options: MergeOptions,
    pairs: list[Pair],
    weights: list[float],
    scheduler: Any,
    settings: dict[str, Any],
) -> Calibration:
    """Edit the pairs at each weight and choose. The pipeline's UNet is left with the last weight's values.

    merge: `Ingredients.merge`. scheduler, settings: of the few steps (as keyword arguments of `edit_pixels`).
    """
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # what it blacks out cannot be compared
    images, prompts = [fit_to_model(image, pipeline) for image, _ in pairs], [prompt for _, prompt in pairs]
    seeds = list(range(SEED, SEED + len(pairs)))
    inputs = [_to_pixels(image) for image in images]
    teacher, _ = edit_pixels(pipeline, images, prompts, seeds=seeds, **TEACHER)
    original, wanted = ([_encode(pipeline.vae, one) for one in pixels] for pixels in (inputs, teacher))
    columns, scores = [inputs, teacher], []
    for weight in tqdm(sorted(weights), desc="calibrating", unit="weight", disable=None, leave=False):
        put_merged(pipeline.unet, merge, replace(options, weight=weight))
        edits, _ = edit_pixels(pipeline, images, prompts, seeds=seeds, scheduler=scheduler, **settings)
        columns.append(edits)
        rows = [
            _compare(pixels, target, _encode(pipeline.vae, pixels), latents, start)
            for pixels, target, latents, start in zip(edits, teacher, wanted, original, strict=True)
        ]
        scores.append(Scores(weight, *(sum(values) / len(rows) for values in zip(*rows, strict=True))))
    labels = [
        f"{prompt}: input, 30 steps, then weight {', '.join(f'{s.weight:g}' for s in scores)}" for prompt in prompts
    ]
    cell = max(MIN_CELL, *(max(image.size) for image in images))
    sheet = draw_grid([[_to_image(column[i]) for column in columns] for i in range(len(pairs))], labels, cell)
    return Calibration(scores, choose_weight(scores), sheet)


@torch.no_grad()
def put_merged(unet: torch.nn.Module, merge: Merge, options: MergeOptions) -> None:
    """Give a UNet in memory the merged weights, row by row."""
    parameters = dict(unet.named_parameters())
    for name, rows, value in merge(options, MergeReport()):
        parameters[name][rows].copy_(value)


def choose_weight(scores: list[Scores]) -> float:
    """The knee: the weight nearest to a perfect one.

    Distance, 1 - direction and the logarithm of saturation, each taken as a share of its range over the grid; the
    Euclidean distance from zero of the three decides, and of equals the smaller weight.
    """
    costs = [(one.latent_distance, 1 - one.direction, abs(math.log(max(one.saturation, 1e-6)))) for one in scores]
    ranges = [(min(column), max(column)) for column in zip(*costs, strict=True)]

    def distance(cost: tuple[float, ...]) -> float:
        shares = [
            (value - low) / (high - low) if high > low else 0.0 for value, (low, high) in zip(cost, ranges, strict=True)
        ]
        return math.hypot(*shares)

    return min(zip(scores, costs, strict=True), key=lambda pair: (distance(pair[1]), pair[0].weight))[0].weight


def _compare(
    pixels: torch.Tensor, target: torch.Tensor, latents: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor
) -> tuple[float, float, float, float]:
    """The scores of one edit. pixels, target: (3, H, W); latents, wanted, start: (1, 4, h, w)."""
    made, meant = (latents - start).flatten(), (wanted - start).flatten()
    return (
        float((latents - wanted).square().mean().sqrt()),
        float((pixels - target).square().mean().sqrt()),
        float(torch.nn.functional.cosine_similarity(made, meant, dim=0)),
        (colour_spread(pixels) + 1e-4) / (colour_spread(target) + 1e-4),
    )


def colour_spread(pixels: torch.Tensor) -> float:
    """Root mean square distance of the colours (3, H, W) from grey."""
    return float((pixels - pixels.mean(dim=0)).square().mean().sqrt())


def _encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) in [0, 1] -> latents (1, 4, h, w) of about unit variance, on the CPU."""
    moments = encode_moments(vae, (pixels * 255).round().to(torch.uint8)[None])
    return scale_latents(mode_of_original_latents(moments), vae.config).cpu()


def _to_pixels(image: Image.Image) -> torch.Tensor:
    content = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return content.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))


def draw_scores(scores: list[Scores], chosen: float, path: Path) -> None:
    """The three scores over the weight, and the weight that was taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    weights = [one.weight for one in scores]
    for name in ("latent_distance", "direction", "saturation"):
        axis.plot(weights, [getattr(one, name) for one in scores], "o-", label=name.replace("_", " "))
    axis.axvline(chosen, color="tab:gray", linestyle=":", label=f"taken: {chosen:g}")
    axis.set(xlabel="weight", title="few steps against the editor itself at 30 steps")
    axis.legend()
    figure.savefig(path, dpi=110, format="png")
