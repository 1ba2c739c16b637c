"""The running session: what the checks found, the models, and the batches."""

import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from utils.data.batches import make_loader
from utils.data.geometry import Geometry, held_out_geometry
from utils.data.latent_cache import LatentCache
from utils.data.latent_encoding import Encoder, make_latent_cache
from utils.data.sources import Source
from utils.models.stable_diffusion import StableDiffusion
from utils.training.loop import TrainingState
from utils.training.objective import Objective
from utils.training.preflight import RunPlan
from utils.training.settings import Settings

Batches = Generator[dict, None, None]
MAX_DEFAULT_WORKERS = 8
MAX_WORKERS = 2  # of the held-out rows: they are few, and workers start anew at every validation


def latent_cache_folder(settings: Settings) -> Path:
    """The folder of --cache_latents."""
    return Path(settings.data.latent_cache_dir or settings.output_dir / "latent-cache")


@dataclass(frozen=True)
class TrainingSession:
    """Everything that validation and publishing read."""

    settings: Settings
    plan: RunPlan
    parts: StableDiffusion
    objective: Objective
    state: TrainingState

    @property
    def accelerator(self) -> Accelerator:
        return self.state.accelerator

    @property
    def num_workers(self) -> int:
        """Data loading processes of each process: of the flag, or as many as its cores feed a GPU with."""
        given = self.settings.data.dataloader_num_workers
        if given is not None or self.accelerator.device.type != "cuda":
            return given or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(MAX_DEFAULT_WORKERS, max(1, cores // on_this_machine))

    def training_batches(self) -> Batches:
        """The endless stream of this process's micro-batches, from the current progress on."""
        settings, plan = self.settings, self.plan
        cache = None
        if settings.data.cache_latents and not settings.run.dry_run:
            cache = self._make_cache(plan.sources, settings.geometry)
        loader = make_loader(
            plan.sources,
            settings.geometry,
            **self._loader_settings(),
            cache=cache,
            start_batch=plan.progress.draws // (settings.data.train_batch_size * self.accelerator.num_processes),
            num_workers=self.num_workers,
        )
        return iter(loader)

    def held_out_batches(self) -> Batches:
        """This process's share of the held-out rows, from the first; crops are centred and nothing is mirrored."""
        geometry = held_out_geometry(self.settings.geometry)
        rows, cache = self.plan.held_out, None
        if self.settings.data.cache_latents:
            cache = self._make_cache(rows, geometry)
        workers = min(MAX_WORKERS, self.num_workers)
        return iter(make_loader(rows, geometry, **self._loader_settings(), cache=cache, num_workers=workers))

    def _make_cache(self, sources: list[Source], geometry: Geometry) -> LatentCache:
        folder = latent_cache_folder(self.settings)
        num_crops = 1 if geometry.center_crop else self.settings.data.cache_crops
        return make_latent_cache(self.accelerator, folder, sources, Encoder(geometry, self.parts.vae, num_crops))

    def _loader_settings(self) -> dict:
        return dict(
            seed=self.plan.progress.seed,
            batch_size=self.settings.data.train_batch_size,
            latent_channels=self.parts.vae.config.latent_channels,
            vae_scale_factor=self.parts.latent_scale,
            num_train_timesteps=len(self.plan.schedule),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
