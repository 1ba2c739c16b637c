"""From trained weights to a whole pipeline in a folder, with its card, and to the Hub."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from utils.atomic_files import remove_whole, written_beside
from utils.hub import upload
from utils.models.adapters import add_adapter, merge_adapter
from utils.models.noise_schedules import make_published_scheduler
from utils.models.stable_diffusion import editor_class, load_stable_diffusion, make_editor, widen_conv_in
from utils.training.card import ModelFacts, write_card
from utils.training.optimizers import averaged_weights
from utils.training.preflight import Plan, publishes_pipeline
from utils.training.session import Run
from utils.training.settings import Settings
from utils.training.trained_weights import Weights, put_weights, read_trained, save_trained, trained_weights
from utils.training.training_log import draw_curve, read_log


@dataclass(frozen=True)
class BestWeights:
    """The UNet with the lowest held-out loss so far, in `checkpoint-best/`."""

    output_dir: Path
    enabled: bool

    @property
    def place(self) -> Path:
        return self.output_dir / "checkpoint-best"

    def keep(self, unet: UNet2DConditionModel, step: int, loss: float) -> None:
        """Replace what was kept by what was trained of the UNet, as it is now."""
        if not self.enabled:
            return
        with written_beside(self.place) as unfinished:
            save_trained(unfinished / "unet", unet)
            (unfinished / "best.json").write_text(json.dumps({"global_step": step, "held_out_loss": loss}))
            remove_whole(self.place)
            unfinished.rename(self.place)

    def load(self, unet: UNet2DConditionModel) -> tuple[Weights, dict] | None:
        """(weights, what is known of them), or None where nothing was kept."""
        if not self.enabled or not (self.place / "best.json").exists():
            return None
        return read_trained(self.place / "unet", unet), json.loads((self.place / "best.json").read_text())


def save_pipeline(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """Save a pipeline into `output_dir`, each part renamed into its place and `model_index.json` last.

    Until that file stands, nothing takes the folder for a whole pipeline. Raises `InputError` where it cannot be
    written; the checkpoints stand.
    """
    with written_beside(output_dir / "pipeline") as unfinished:
        pipeline.save_pretrained(unfinished)
        make_readable(unfinished)
        (output_dir / "model_index.json").unlink(missing_ok=True)
        for part in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
            remove_whole(output_dir / part.name)
            part.rename(output_dir / part.name)
        unfinished.rmdir()


def make_readable(folder: Path) -> None:
    """Give files the mode that the user's umask says: safetensors writes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def finish(run: Run, best: BestWeights) -> None:
    """Publish what was trained, in float32: the whole editor, or the adapter alone; push it where that is asked for.

    Raises `InputError` where it cannot be written or pushed; the checkpoints stand.
    """
    settings, options = run.settings, run.settings.publishing
    with averaged_weights(run.trainee.optimizer):
        results = choose_weights(run, best)
        if publishes_pipeline(settings):
            save_pipeline(make_whole_editor(run), settings.output_dir)
        else:
            publish_adapter(run.trainee.model, settings.output_dir)
    write_card(settings.output_dir, gather_facts(run, results), options.hub_token)
    kind = "editor" if publishes_pipeline(settings) else "adapter"
    print(f"the {kind} stands in {settings.output_dir}", file=sys.stderr, flush=True)
    if run.plan.repo_id:
        url = upload(settings.output_dir, run.plan.repo_id, options.hub_token, private=options.hub_private_repo)
        print(f"pushed to {url}", file=sys.stderr, flush=True)


def make_whole_editor(run: Run) -> DiffusionPipeline:
    """The editor with the weights trained, every part in float32; an adapter is merged into a base loaded anew."""
    settings, unet = run.settings, None
    if settings.adapter.lora_rank is None:
        unet = run.trainee.model.to("cpu", torch.float32, memory_format=torch.contiguous_format)
    parts = load_stable_diffusion(settings.model, unet=unet)  # the frozen ones anew: in memory they may have 16 bits
    if settings.adapter.lora_rank is not None:
        if run.plan.is_widened:
            widen_conv_in(parts.unet)
        add_adapter(parts.unet, settings.adapter, train_conv_in=run.plan.trains_conv_in)
        put_weights(parts.unet, trained_weights(run.trainee.model))
        merge_adapter(parts.unet)
    return make_editor(parts, make_published_scheduler(parts.scheduler, run.plan.schedule))


def publish_adapter(unet: UNet2DConditionModel, output_dir: Path) -> None:
    """Write the adapter beside its place and rename it into it."""
    with written_beside(output_dir / "adapter") as unfinished:
        save_trained(unfinished, unet)
        make_readable(unfinished)
        for path in sorted(unfinished.iterdir()):
            path.rename(output_dir / path.name)
        unfinished.rmdir()


def choose_weights(run: Run, best: BestWeights) -> dict[str, float]:
    """Put the weights to be published into the model; returns what was measured of them, by name."""
    kept = best.load(run.trainee.model)
    if kept:
        put_weights(run.trainee.model, kept[0])
        return {"held-out loss": kept[1]["held_out_loss"]}
    if run.trainee.ema:
        if run.settings.optimization.weights_dtype == "bf16":
            run.trainee.model.to(torch.float32)  # the average is finer than weights in bf16 can hold
        put_weights(run.trainee.model, run.trainee.ema.state_dict())
    held_out = [entry["held_out_loss"] for entry in read_log(run.settings.output_dir) if "held_out_loss" in entry]
    return {"held-out loss": held_out[-1]} if held_out else {}


def gather_facts(run: Run, results: dict[str, float]) -> ModelFacts:
    """What the card tells of a run."""
    settings, plan = run.settings, run.plan
    curve = draw_curve(settings.output_dir)
    samples = sorted((settings.output_dir / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    hyperparameters = {"steps": plan.progress.global_step, "samples per step": plan.samples_per_step}
    hyperparameters |= asdict(settings.objective) | asdict(settings.optimization) | asdict(settings.geometry)
    if settings.adapter.lora_rank is not None:
        hyperparameters |= asdict(settings.adapter)
    hyperparameters |= {"prediction_type": plan.schedule.config.prediction_type, "use_ema": settings.run.use_ema}
    return ModelFacts(
        base_model=settings.model.name,
        pipeline_class=editor_class(run.parts.is_sdxl).__name__,
        is_adapter=not publishes_pipeline(settings),
        is_base_widened=plan.is_widened,
        command=["accelerate", "launch", *sys.argv],
        repo_id=plan.repo_id,
        datasets=name_datasets(settings, plan),
        hyperparameters={k: v for k, v in hyperparameters.items() if v is not None} | {"seed": plan.progress.seed},
        results=results,
        widget=save_inputs(settings.output_dir, plan.pairs),
        samples=[f"validation/{path.name}" for path in samples[-1:]],
        curve=curve.name if curve else None,
        resolution=settings.geometry.resolution,
    )


def name_datasets(settings: Settings, plan: Plan) -> list[str]:
    """Ids or folders of what was trained on."""
    if settings.data.train_mix:
        return [source.name.rsplit(":", 1)[0] for source in plan.sources]
    return [settings.data.dataset_name or settings.data.train_data_dir]


def save_inputs(output_dir: Path, pairs: list[tuple[Image.Image, str]]) -> list[tuple[str, str]]:
    """Keep the validation pictures for the card's widgets: (path in output_dir, instruction) each."""
    widget = []
    for index, (image, prompt) in enumerate(pairs):
        path = Path("validation") / f"input-{index}.png"
        (output_dir / path).parent.mkdir(exist_ok=True)
        image.save(output_dir / path)
        widget.append((str(path), prompt))
    return widget
