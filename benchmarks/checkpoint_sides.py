"""The two sides of `checkpoints.py`: what diffusers' example does to save and load its training state, and ours."""

from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from benchmarks.memory_models import UNETS
from utils.training.checkpoints import (
    Progress,
    choose_checkpoint,
    load_training_state,
    put_weights,
    read_trained,
    save_checkpoint,
    save_trained,
)
from utils.training.ema import MovingAverage

TOY = Path(__file__).resolve().parents[1] / "assets/toy-sd/unet"


def make_unet(share: float | None) -> UNet2DConditionModel:
    """Random weights. share: of SD 1.5's parameters, about; None for toy-sd."""
    torch.manual_seed(0)
    if share is None:
        return UNet2DConditionModel.from_pretrained(TOY)
    channels = [32 * round(width * share**0.5 / 32) for width in UNETS["sd15"]["block_out_channels"]]
    return UNet2DConditionModel(**UNETS["sd15"] | {"block_out_channels": channels})


def make_trained(share: float | None) -> tuple[UNet2DConditionModel, MovingAverage, torch.optim.Optimizer]:
    """A UNet of `make_unet` with its EMA, and AdamW with its state."""
    unet = make_unet(share)
    optimizer = torch.optim.AdamW(unet.parameters())
    for parameter in unet.parameters():
        moments = {name: torch.rand_like(parameter).detach() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0)} | moments
    return unet, MovingAverage(unet, 0.999), optimizer


class Peer:
    """accelerate's `save_state` with the hooks of diffusers' example: `EMAModel.save_pretrained` beside the UNet."""

    def __init__(self, unet: UNet2DConditionModel, ema: MovingAverage, optimizer: torch.optim.Optimizer) -> None:
        self._unet, self._optimizer = unet, optimizer
        self._ema = EMAModel([], model_cls=UNet2DConditionModel, model_config=unet.config)
        self._ema.shadow_params = list(ema.state_dict().values())
        self._accelerator = Accelerator(cpu=True)
        self._accelerator._models.append(unet)
        self._accelerator._optimizers.append(self._accelerator.prepare_optimizer(optimizer, device_placement=False))
        self._accelerator.register_save_state_pre_hook(self._save_models)
        self._accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, folder: Path) -> None:
        self._accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self._accelerator.load_state(str(folder))

    def _save_models(self, models: list, weights: list, folder: str) -> None:
        self._ema.save_pretrained(str(Path(folder, "unet_ema")))
        self._unet.save_pretrained(str(Path(folder, "unet")))
        weights.clear()

    def _load_models(self, models: list, folder: str) -> None:
        loaded = EMAModel.from_pretrained(str(Path(folder, "unet_ema")), UNet2DConditionModel)
        self._ema.load_state_dict(loaded.state_dict())
        models.clear()
        self._unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())


class Ours:
    """What `TrainingState` does in the main process: a checkpoint written at once, and loaded once verified."""

    def __init__(self, unet: UNet2DConditionModel, ema: MovingAverage, optimizer: torch.optim.Optimizer) -> None:
        self._unet, self._ema, self._optimizer = unet, ema, optimizer

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        weights = {"unet": self._unet.state_dict(), "unet_ema": self._ema.state_dict()}
        models = {name: partial(save_trained, unet=self._unet, weights=weights[name]) for name in weights}
        save_checkpoint(folder, Progress(), models, {"optimizer": self._optimizer.state_dict()}, None)

    def load(self, folder: Path) -> None:
        checkpoint = choose_checkpoint(folder, "latest")
        put_weights(self._unet, read_trained(checkpoint / "unet", self._unet))
        self._ema.load_state_dict(read_trained(checkpoint / "unet_ema", self._unet))
        self._optimizer.load_state_dict(load_training_state(checkpoint)["optimizer"])
