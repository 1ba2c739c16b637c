"""Publishing: the best weights, the saved pipeline or adapter with its model card, and the upload to the Hub."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from utils.atomic_files import atomic_folder, remove_path
from utils.editing.recommended import RECOMMENDED
from utils.hub import upload
from utils.hub_names import public_name
from utils.model_cards import TrainedModel, write_trained_card
from utils.models.adapters import add_adapter, merge_adapter
from utils.models.noise_schedules import make_inference_scheduler
from utils.models.stable_diffusion import editor_class, load_stable_diffusion, make_editor, widen_conv_in
from utils.runtime import DTYPES
from utils.training.checkpoints import Weights, put_weights, read_trained, save_trained, trained_weights
from utils.training.optimizers import averaged_weights
from utils.training.preflight import publishes_pipeline
from utils.training.session import TrainingSession
from utils.training.training_log import CURVE, draw_curve, read_log

LOGGED = {"loss": "held_out_loss"} | {name: f"eval_{name}" for name in ("psnr", "ssim", "l1")}
MEASURES = {  # their names in the model card
    "held_out_loss": "held-out loss",
    "eval_psnr": "PSNR of held-out edits (dB)",
    "eval_no_edit_psnr": "PSNR of the unedited inputs (dB)",
    "eval_ssim": "SSIM of held-out edits",
    "eval_l1": "L1 of held-out edits",
}


@dataclass(frozen=True)
class BestWeights:
    """The trained weights with the best value of a metric so far, in `checkpoint-best/`. metric: None saves nothing."""

    output_dir: Path
    metric: str | None

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far; never NaN."""
        sign = -1 if self.metric in ("psnr", "ssim") else 1
        return sign * value < (float("inf") if best is None else sign * best)

    @property
    def path(self) -> Path:
        return self.output_dir / "checkpoint-best"

    def save(self, unet: UNet2DConditionModel, step: int, value: float) -> None:
        """Replace the saved weights with the UNet's current ones."""
        with atomic_folder(self.path) as unfinished:
            save_trained(unfinished / "unet", unet)
            (unfinished / "best.json").write_text(json.dumps({"global_step": step, LOGGED[self.metric]: value}))
            remove_path(self.path)
            unfinished.rename(self.path)

    def load(self, unet: UNet2DConditionModel) -> tuple[Weights, int] | None:
        """(weights, their step), or None if nothing is saved."""
        if not self.metric or not (self.path / "best.json").exists():
            return None
        description = json.loads((self.path / "best.json").read_text())
        if LOGGED[self.metric] not in description:  # of an earlier run with another metric
            return None
        return read_trained(self.path / "unet", unet), description["global_step"]


def publish(session: TrainingSession, best: BestWeights) -> None:
    """Save the pipeline or the adapter in `publish_dtype`, with its model card, and push it with --push_to_hub.

    Raises `InputError` if it cannot be written or pushed; the checkpoints are kept.
    """
    settings, options = session.settings, session.settings.publishing
    with averaged_weights(session.state.optimizer):
        results = choose_weights(session, best)
        if publishes_pipeline(settings):
            pipeline = make_final_pipeline(session).to(DTYPES[options.publish_dtype])
            save_result(pipeline.save_pretrained, settings.output_dir, "pipeline")
        else:
            dtype = DTYPES[options.publish_dtype]
            weights = {name: value.to(dtype) for name, value in trained_weights(session.state.model).items()}
            save_result(
                lambda folder: save_trained(folder, session.state.model, weights), settings.output_dir, "adapter"
            )
    (settings.output_dir / RECOMMENDED).unlink(missing_ok=True)  # of an earlier editor in this folder
    write_trained_card(settings.output_dir, describe_model(session, results), options.hub_token)
    result = "pipeline" if publishes_pipeline(settings) else "adapter"
    print(f"the {result} is saved in {settings.output_dir}", file=sys.stderr, flush=True)
    if session.plan.repo_id:
        url = upload(settings.output_dir, session.plan.repo_id, options.hub_token, private=options.hub_private_repo)
        print(f"pushed to {url}", file=sys.stderr, flush=True)


def choose_weights(session: TrainingSession, best: BestWeights) -> dict[str, float]:
    """Copy the weights to be published into the model; returns their evaluation results by name."""
    state = session.state
    if saved := best.load(state.model):
        weights, step = saved
        put_weights(state.model, weights)
        return read_measures(session.settings.output_dir, step)
    if state.ema:
        if session.settings.optimization.weights_dtype == "bf16":
            state.model.to(torch.float32)  # bf16 would round the average
        put_weights(state.model, state.ema.state_dict())
    return read_measures(session.settings.output_dir)


def read_measures(output_dir: Path, step: int | None = None) -> dict[str, float]:
    """What the log says about the weights of a step, by default about the last ones, by its name in the card."""
    entries = [entry for entry in read_log(output_dir) if step is None or entry["step"] == step]
    last = {name: entry[name] for entry in entries for name in MEASURES if name in entry}
    return {MEASURES[name]: last[name] for name in MEASURES if name in last}


def make_final_pipeline(session: TrainingSession) -> DiffusionPipeline:
    """The pipeline with the trained weights, all in float32; an adapter is merged into a newly loaded base."""
    settings, plan, unet = session.settings, session.plan, None
    if not settings.adapter.is_used:
        unet = session.state.model.to("cpu", torch.float32, memory_format=torch.contiguous_format)
    parts = load_stable_diffusion(settings.model, unet=unet)  # the frozen models in memory may have 16 bits
    if settings.adapter.is_used:
        if plan.needs_widening:
            widen_conv_in(parts.unet)
        add_adapter(parts.unet, settings.adapter, train_conv_in=plan.trains_conv_in, initial=plan.initial_adapter)
        put_weights(parts.unet, trained_weights(session.state.model))
        merge_adapter(parts.unet)
    return make_editor(parts, make_inference_scheduler(parts.scheduler, plan.schedule))


def save_result(save: Callable[[Path], None], output_dir: Path, name: str) -> None:
    """Write files and components into `output_dir`, each complete or absent, and `model_index.json` last.

    Without that file the folder is not a pipeline. save: writes into a folder. name: what it writes, for the message of
    the `InputError` that is raised if it cannot be written.
    """
    with atomic_folder(output_dir / name) as unfinished:
        save(unfinished)
        apply_umask(unfinished)
        if (unfinished / "model_index.json").exists():
            (output_dir / "model_index.json").unlink(missing_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
            remove_path(output_dir / path.name)
            path.rename(output_dir / path.name)
        unfinished.rmdir()


def apply_umask(folder: Path) -> None:
    """Give files the permissions of the user's umask; safetensors makes them readable for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


# ---- the model card -------------------------------------------------------------------------------------------------


def describe_model(session: TrainingSession, results: dict[str, float]) -> TrainedModel:
    """What the model card says about this run."""
    settings, plan = session.settings, session.plan
    curve = settings.output_dir / CURVE
    if not (curve.exists() and plan.progress.validated_step == plan.progress.global_step):  # else it is just drawn
        curve = draw_curve(settings.output_dir)
    sheets = sorted((settings.output_dir / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    hyperparameters = {"steps": plan.progress.global_step, "samples per step": plan.samples_per_step}
    hyperparameters |= asdict(settings.objective) | asdict(settings.optimization) | asdict(settings.geometry)
    if settings.adapter.is_used:
        hyperparameters |= asdict(settings.adapter)
        if settings.adapter.init_adapter:
            hyperparameters["init_adapter"] = public_name(settings.adapter.init_adapter)
    hyperparameters |= {"prediction_type": plan.schedule.prediction_type, "use_ema": settings.run.use_ema}
    hyperparameters |= {
        f"{name} from step {step}": f"{new} (before: {old})" for step, name, old, new in plan.progress.changes
    }
    datasets = [settings.data.dataset_name or settings.data.train_data_dir]
    if settings.data.train_mix:
        datasets = [source.name.rsplit(":", 1)[0] for source in plan.sources]
    return TrainedModel(
        base_model=settings.model.name,
        pipeline_class=editor_class(session.parts.is_sdxl).__name__,
        is_adapter=not publishes_pipeline(settings),
        needs_widening=plan.needs_widening,
        command=["accelerate", "launch", *sys.argv],
        repo_id=plan.repo_id,
        datasets=datasets,
        hyperparameters={k: v for k, v in hyperparameters.items() if v is not None} | {"seed": plan.progress.seed},
        results=results,
        widget=save_validation_inputs(session),
        samples=[f"validation/{path.name}" for path in sheets[-1:]],
        curve=curve.name if curve else None,
        resolution=settings.geometry.resolution,
    )


def save_validation_inputs(session: TrainingSession) -> list[tuple[str, str]]:
    """Save the validation images for the card's widgets; returns (path in output_dir, prompt) of each."""
    widget = []
    for index, (image, prompt) in enumerate(session.plan.validation_pairs):
        path = Path("validation") / f"input-{index}.png"
        (session.settings.output_dir / path).parent.mkdir(exist_ok=True)
        image.save(session.settings.output_dir / path)
        widget.append((str(path), prompt))
    return widget
