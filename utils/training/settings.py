"""The settings of a run, grouped. All fields are flags; `utils.cli.pick` fills them."""

from dataclasses import asdict, dataclass
from pathlib import Path

from utils.data.geometry import Geometry
from utils.models.adapters import AdapterOptions
from utils.models.noise_schedules import ObjectiveOptions
from utils.models.stable_diffusion import ModelOptions
from utils.runtime import MachineOptions
from utils.training.loop import LoopOptions
from utils.training.optimizers import OptimizationOptions


@dataclass(frozen=True)
class DataOptions:
    """The dataset and how it is read."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    train_mix: str | None = None
    dataset_split: str = "train"
    streaming: bool = False
    original_image_column: str | None = None
    edit_prompt_column: str | None = None
    edited_image_column: str | None = None
    max_train_samples: int | None = None
    max_bad_rows: float = 0.01
    validation_split: float = 0.0
    validation_samples: int | None = None
    cache_dir: str | None = None
    dataloader_num_workers: int | None = None
    train_batch_size: int = 16
    cache_latents: bool = False
    cache_crops: int = 1
    latent_cache_dir: str | None = None


@dataclass(frozen=True)
class RunOptions:
    """Length, memory and seed of the run, and its validation images."""

    output_dir: str = "instruct-pix2pix-model"
    seed: int | None = None
    dry_run: bool = False
    num_train_epochs: int = 100
    max_train_steps: int | None = None
    resume_from_checkpoint: str | None = None
    allow_changed: list[str] | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_blocks: list[str] | None = None
    vae_precision: str | None = None
    compile: bool = False
    cuda_graphs: str = "auto"
    auto_batch_size: bool = False
    profile: str | None = None
    use_ema: bool = False
    ema_decay: float = 0.9999
    ema_update_interval: int = 1
    ema_device: str | None = None
    val_image_url: list[str] | None = None
    validation_prompt: list[str] | None = None
    tracker_project_name: str | None = None
    tracker_run_name: str | None = None


@dataclass(frozen=True)
class ValidationOptions:
    """How often to validate, and with how many images."""

    num_validation_images: int = 4
    validation_epochs: int = 1
    validation_steps: int | None = None
    save_best: str | None = None
    eval_steps: int | None = None
    eval_dataset: str | None = None
    eval_split: str = "train"
    eval_samples: int = 16
    validation_num_inference_steps: int = 20
    validation_guidance_scale: float = 7.0
    validation_image_guidance_scale: float = 1.5
    validation_guidance_rescale: float = 0.0
    validation_negative_prompt: str | None = None


@dataclass(frozen=True)
class PublishingOptions:
    """Whether and where to upload the result."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    publish_dtype: str = "fp32"
    hub_private_repo: bool = False
    hub_token: str | None = None


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    machine: MachineOptions
    model: ModelOptions
    adapter: AdapterOptions
    data: DataOptions
    geometry: Geometry
    objective: ObjectiveOptions
    optimization: OptimizationOptions
    loop: LoopOptions
    validation: ValidationOptions
    publishing: PublishingOptions
    run: RunOptions

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir)

    def by_flag(self) -> dict:
        """All values by flag, without the access token."""
        values = {flag: value for group in asdict(self).values() for flag, value in group.items()}
        return values | {"hub_token": None}
