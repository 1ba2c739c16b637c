"""What cache_latents.py does: open the data and the VAE of a training, and encode in its processes or on Ray."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from data_preparation.generation.processes import run_on_ray
from utils.data.geometry import Geometry, held_out_geometry
from utils.data.latent_encoding import Encoder, encode_missing, name_folders, open_latent_cache
from utils.data.sources import Source
from utils.errors import InputError
from utils.models.stable_diffusion import load_stable_diffusion, read_configs
from utils.runtime import DTYPES, start_accelerator, vae_dtype
from utils.training.preflight import open_checked_sources
from utils.training.session import latent_cache_folder
from utils.training.settings import Settings

MAX_RAY_JOBS = 256


@dataclass(frozen=True)
class Part:
    """Rows that are encoded with one geometry: those to train on, or the held-out ones."""

    sources: list[Source]
    folders: list[Path]
    encoder: Encoder

    def encode(self, rank: int, num_processes: int) -> int:
        return encode_missing(self.folders, self.sources, self.encoder, rank, num_processes)

    def check(self) -> None:
        """Raise `InputError` where rows are missing."""
        open_latent_cache(self.folders, self.sources, self.encoder)


def open_parts(settings: Settings, device: torch.device, dtype: torch.dtype) -> list[Part]:
    """The rows and the encoder of a training with these settings. Raises `InputError`.

    Which rows are held out depends on the seed: without --seed, all rows are encoded for training, and a training run
    encodes its held-out rows itself.
    """
    data = settings.data if settings.run.seed is not None else replace(settings.data, validation_split=0.0)
    sources, held_out = open_checked_sources(replace(settings, data=data), settings.run.seed or 0)
    configs = read_configs(settings.model)
    with torch.device("meta"):  # its weights are not needed
        unet = UNet2DConditionModel.from_config(configs.unet)
    parts = load_stable_diffusion(settings.model, unet)
    vae = parts.vae.requires_grad_(False).to(device, vae_dtype(settings.run.vae_precision, parts.is_sdxl, dtype))
    folder = latent_cache_folder(settings)

    def make_part(sources: list[Source], geometry: Geometry, num_crops: int) -> Part:
        encoder = Encoder(geometry, vae, num_crops)
        return Part(sources, name_folders(folder, sources, encoder), encoder)

    found = [make_part(sources, settings.geometry, settings.data.cache_crops)]
    return found + ([make_part(held_out, held_out_geometry(settings.geometry), 1)] if held_out else [])


def encode_here(settings: Settings) -> tuple[list[Path], int]:
    """Encode in the processes of `accelerate launch`: (folders, in the main process; rows that all encoded)."""
    accelerator = start_accelerator(settings.machine)
    parts = open_parts(settings, accelerator.device, DTYPES.get(accelerator.mixed_precision, torch.float32))
    own = sum(part.encode(accelerator.process_index, accelerator.num_processes) for part in parts)
    count = sum(gather_object([own]))
    for part in parts:
        part.check()
    folders = [folder for part in parts for folder in part.folders] if accelerator.is_main_process else []
    accelerator.end_training()
    return folders, count


def encode_on_ray(settings: Settings, address: str, num_workers: int, num_gpus: float | None) -> tuple[list[Path], int]:
    """Encode in the actors of a Ray cluster; its nodes have the data, the model and the cache under the same paths."""
    precision = settings.machine.mixed_precision or "no"
    parts = open_parts(settings, torch.device("cpu"), DTYPES.get(precision, torch.float32))
    num_rows = sum(len(source.rows) for part in parts for source in part.sources)
    jobs = {index: range(index, index + 1) for index in range(min(MAX_RAY_JOBS, -(-num_rows // 64)))}
    gpus = float(torch.cuda.is_available()) if num_gpus is None else num_gpus
    open_worker, count = partial(_open_worker, settings, precision, len(jobs)), 0
    with tqdm(total=len(jobs), desc="Encoding latents", unit="part") as bar:
        for _, result in run_on_ray(open_worker, jobs, address, num_workers, gpus):
            count += int(result)
            bar.update()
    for part in parts:
        part.check()
    return [folder for part in parts for folder in part.folders], count


def _open_worker(settings: Settings, precision: str, num_jobs: int, _rank: int) -> Callable[[range], bytes]:
    device = Accelerator().device
    parts = open_parts(settings, device, DTYPES.get(precision, torch.float32))

    def encode(jobs: range) -> bytes:
        try:
            return str(sum(part.encode(job, num_jobs) for part in parts for job in jobs)).encode()
        except FileNotFoundError as error:
            raise InputError(f"--ray: a node cannot write the cache ({error}); give a folder that all share") from None

    return encode


def describe_cache(settings: Settings, folders: list[Path], count: int, seconds: float) -> str:
    """What was done, and the flags that use it."""
    files = [path for folder in dict.fromkeys(folders) for path in folder.glob("rows-*.safetensors")]
    size = sum(path.stat().st_size for path in files)
    rate = f", {count / seconds:.1f} a second" if count else ""
    return (
        f"encoded {count} rows in {seconds:.0f} s{rate}; the cache has {size / 1e9:.2f} GB in {len(files)} files\n"
        "train with the same flags of data, geometry, VAE and precision, and\n"
        f"  --cache_latents --latent_cache_dir {latent_cache_folder(settings)}"
    )
