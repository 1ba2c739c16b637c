"""Chooses the weight of the delta on the user's images: few-step edits compared with the editor's own at 30 steps.

Small weights leave few-step edits blurred, large ones prevent editing. For each weight of a grid, the pairs are edited
with the same noise as by the teacher, which is the editor itself, and compared with its edits:
  latent_distance   root mean square difference of the latents (pixel_distance: of the pixels)
  direction         cosine similarity of the two changes of the input, in latents; 1: the same edit, 0: unrelated
  saturation        ratio of the colour spreads; above 1: more saturated than the teacher's edit
The weight with the smallest normalised distance from a perfect score is chosen (`choose_weight`).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from tqdm import tqdm

from utils.contact_sheets import draw_grid
from utils.editing.edit_images import Editor, OutOfMemory, SamplingSettings, edit_pixels, fit_to_model
from utils.editing.encodings import Encodings
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.image_sources import load_image_source
from utils.json_lines import read_json_lines
from utils.merging.editor_writer import make_scheduler
from utils.merging.merge import MergeOptions, MergeReport
from utils.merging.recipe import MergeRecipe, OpenedRecipe
from utils.models.latents import scale_latents
from utils.runtime import choose_device

TEACHER = dict(num_inference_steps=30, guidance_scale=7.5, image_guidance_scale=1.5)
BATCH_SIZE = 4  # pairs edited at once, halved where the memory is too small
MIN_CELL = 128  # pixels of an image on the contact sheet
Pair = tuple[Image.Image, str]


@dataclass(frozen=True)
class WeightScores:
    """Means over the pairs at one weight."""

    weight: float
    latent_distance: float
    pixel_distance: float
    direction: float
    saturation: float


@dataclass
class Calibration:
    """scores: by increasing weight; sheet: for each pair the input, the teacher's edit and the edit at each weight."""

    scores: list[WeightScores]
    chosen: float
    sheet: Image.Image

    def files(self) -> dict[str, Callable[[Path], None]]:
        """The files for the editor's folder: name -> function that writes it."""
        # JSON knows no NaN: a weight that overflows in half precision has no distances.
        scores = [
            {name: value if math.isfinite(value) else None for name, value in asdict(one).items()}
            for one in self.scores
        ]
        content = {"chosen": self.chosen, "teacher": TEACHER, "scores": scores}
        return {
            "calibration.json": lambda path: path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"),
            "calibration.png": lambda path: _plot_scores(self.scores, self.chosen, path),
            "calibration_sheet.png": lambda path: self.sheet.save(path),
        }

    def describe(self) -> str:
        lines = ["calibration, compared with the editor itself at 30 steps:"]
        lines += ["weight  latent distance  pixel distance  direction  saturation"]
        for scores in self.scores:
            weight, latent, pixel, direction, saturation = astuple(scores)
            mark = "  <- chosen" if weight == self.chosen else ""
            mark = mark if math.isfinite(pixel) else "  overflows in half precision: not chosen"
            lines.append(f"{weight:<6g}  {latent:<15.4f}  {pixel:<14.4f}  {direction:<9.4f}  {saturation:.4f}{mark}")
        if len(self.scores) > 1 and self.chosen in (self.scores[0].weight, self.scores[-1].weight):
            lines.append("the best weight is at the end of the grid: extend --calibrate_weights")
        return "\n".join(lines)


def read_pairs(path: Path) -> list[Pair]:
    """Images and instructions of a .jsonl file with {"image": PATH or URL, "edit": INSTRUCTION} per line.

    Paths are relative to the folder of the file. Raises `InputError` that names the line.
    """
    if not path.is_file():
        raise InputError(f"--calibrate {path} does not exist: give a .jsonl file with an image and an edit per line")
    pairs = []
    for number, row in read_json_lines(path):
        where, image, edit = f"--calibrate {path}, line {number}:", row.get("image"), row.get("edit")
        if not isinstance(image, str) or not isinstance(edit, str) or not edit.strip():
            raise InputError(f'{where} must be {{"image": "photo.jpg", "edit": "make it winter"}}')
        pairs.append((load_image_source(image if "://" in image else str(path.parent / image), where), edit))
    if not pairs:
        raise InputError(f"--calibrate {path} is empty: give 8 to 16 pairs of an image and an edit")
    return pairs


def calibrate(
    recipe: MergeRecipe, opened: OpenedRecipe, pairs: list[Pair], weights: list[float], device: str
) -> Calibration:
    """Edit the pairs at each weight, with the merged editor's scheduler and settings, and choose a weight."""
    device, dtype = choose_device(device)
    folder, variant = opened.editor.folder, opened.editor.variant
    # Without the safety checker: the images that it blacks out cannot be compared.
    pipeline = load_editor(folder, dtype=dtype, device=device, variant=variant, safety_checker=False)
    settings = SamplingSettings(
        num_inference_steps=recipe.recommended["steps"],
        scheduler=make_scheduler(recipe, opened.editor),
        guidance_rescale=recipe.recommended.get("guidance_rescale", 0.0),
        **{name: recipe.recommended[name] for name in ("guidance_scale", "image_guidance_scale", "eta")},
    )
    resolution = recipe.recommended.get("resolution")
    images = [fit_to_model(image, pipeline, resolution) for image, _ in pairs]
    prompts, inputs = [prompt for _, prompt in pairs], [_to_pixels(image) for image in images]
    editor = _BatchedEditor(pipeline, images, prompts)
    teacher = editor.edit(SamplingSettings(**TEACHER))
    if not all(pixels.isfinite().all() for pixels in teacher):
        raise InputError(
            f"--calibrate: the edits of the editor itself have NaN values in {dtype}, so there is nothing to compare "
            "with: give --device cpu, which calibrates in float32"
        )
    input_latents, teacher_latents = (list(map(editor.encode, many)) for many in (inputs, teacher))
    columns, scores = [inputs, teacher], []
    for weight in tqdm(sorted(weights), desc="calibrating", unit="weight", disable=None, leave=False):
        _load_merged(pipeline.unet, opened, replace(recipe.merge, weight=weight))
        edits = editor.edit(settings)
        columns.append([pixels.nan_to_num(0.0) for pixels in edits])
        rows = [
            _compare(pixels, target, editor.encode(pixels), latents, start)
            for pixels, target, latents, start in zip(edits, teacher, teacher_latents, input_latents, strict=True)
        ]
        scores.append(WeightScores(weight, *(sum(values) / len(rows) for values in zip(*rows, strict=True))))
    tried = ", ".join(f"{score.weight:g}" for score in scores)
    labels = [f"{prompt}: input, 30 steps, then weight {tried}" for prompt in prompts]
    cell = max(MIN_CELL, *(max(image.size) for image in images))
    sheet = draw_grid([[_to_image(column[i]) for column in columns] for i in range(len(pairs))], labels, cell)
    return Calibration(scores, choose_weight(scores), sheet)


@torch.no_grad()
def _load_merged(unet: torch.nn.Module, opened: OpenedRecipe, options: MergeOptions) -> None:
    """Copy merged weights into a UNet in memory."""
    parameters = dict(unet.named_parameters())
    for name, rows, value in opened.merge(options, MergeReport()):
        parameters[name][rows].copy_(value)


class _BatchedEditor:
    """Edits the pairs in batches that fit into the memory, image i with seed i."""

    def __init__(self, pipeline: Editor, images: list[Image.Image], prompts: list[str]) -> None:
        self._pipeline, self._images, self._prompts = pipeline, images, prompts
        self._encodings, self._batch_size = Encodings(pipeline), BATCH_SIZE

    def edit(self, settings: SamplingSettings) -> list[torch.Tensor]:
        """(3, H, W) in [0, 1] each. Raises OutOfMemory where not even one image fits."""
        edits: list[torch.Tensor] = []
        while len(edits) < len(self._images):
            rows = slice(len(edits), len(edits) + self._batch_size)
            seeds = list(range(len(self._images)))[rows]
            inputs = (self._images[rows], self._prompts[rows], seeds, settings)
            try:
                edits += edit_pixels(self._pipeline, *inputs, encodings=self._encodings)[0]
            except OutOfMemory:
                if self._batch_size == 1:
                    raise
                self._batch_size //= 2
        return edits

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (3, H, W) in [0, 1] -> scaled latents (1, 4, h, w), float32 on the CPU."""
        latents = self._encodings.encode_images([_to_image(pixels.nan_to_num(0.0))]).float().cpu()
        is_scaled = getattr(self._pipeline, "is_cosxl_edit", False)
        return latents if is_scaled else scale_latents(latents, self._pipeline.vae.config)


def choose_weight(scores: list[WeightScores]) -> float:
    """The weight with the smallest normalised distance from a perfect score; of equal ones the smallest weight.

    Weights whose edits have NaN values are left out; raises InputError if all have. Latent distance, 1 - direction and
    |log saturation| are each scaled to [0, 1] over the grid; the distance is the Euclidean norm of the three.
    """
    scores = [score for score in scores if all(map(math.isfinite, astuple(score)))]
    if not scores:
        raise InputError(
            "--calibrate: the edits have NaN values at every weight: give other --calibrate_weights, or --device cpu, "
            "which calibrates in float32"
        )
    costs = [(s.latent_distance, 1 - s.direction, abs(math.log(max(s.saturation, 1e-6)))) for s in scores]
    ranges = [(min(column), max(column)) for column in zip(*costs, strict=True)]

    def distance(cost: tuple[float, ...]) -> float:
        pairs = zip(cost, ranges, strict=True)
        return math.hypot(*((value - low) / (high - low) if high > low else 0.0 for value, (low, high) in pairs))

    return min((distance(cost), score.weight) for score, cost in zip(scores, costs, strict=True))[1]


def _compare(
    pixels: torch.Tensor, target: torch.Tensor, latents: torch.Tensor, target_latents: torch.Tensor, start: torch.Tensor
) -> tuple[float, float, float, float]:
    """The scores of one edit. pixels, target: (3, H, W); latents, target_latents, start: (1, 4, h, w)."""
    change, target_change = (latents - start).flatten(), (target_latents - start).flatten()
    return (
        float((latents - target_latents).square().mean().sqrt()),
        float((pixels - target).square().mean().sqrt()),
        float(torch.nn.functional.cosine_similarity(change, target_change, dim=0)),
        (_colour_spread(pixels) + 1e-4) / (_colour_spread(target) + 1e-4),
    )


def _colour_spread(pixels: torch.Tensor) -> float:
    """Root mean square distance of the colours (3, H, W) from grey."""
    return float((pixels - pixels.mean(dim=0)).square().mean().sqrt())


def _to_pixels(image: Image.Image) -> torch.Tensor:
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image.convert("RGB")))[0]


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels[None]))[0]


def _plot_scores(scores: list[WeightScores], chosen: float, path: Path) -> None:
    """Plot the three scores over the weight, and the chosen weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis, weights = figure.subplots(), [score.weight for score in scores]
    for name in ("latent_distance", "direction", "saturation"):
        axis.plot(weights, [getattr(score, name) for score in scores], "o-", label=name.replace("_", " "))
    axis.axvline(chosen, color="tab:gray", linestyle=":", label=f"chosen: {chosen:g}")
    axis.set(xlabel="weight", title="few steps compared with the editor itself at 30 steps")
    axis.legend()
    figure.savefig(path, dpi=110, format="png")
