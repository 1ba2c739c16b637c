"""The training state of a sharded run: what every process does together where whole weights need only one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from utils.errors import InputError
from utils.training.checkpoints import TRAINING_STATE, new_checkpoint, read_trained, trained_weights
from utils.training.loop import TrainingState
from utils.training.sharding import free_gathered, gather, make_whole_unet, put_all, put_optimizer_state, save_shards


class ShardedState(TrainingState):
    """The training state of a run whose weights are divided: `unet` and `model` are the same object."""

    def save(self, output_dir: Path, limit: int | None, in_background: bool = False) -> None:
        """Write a checkpoint, each process its part; not in the background."""
        free_gathered(self.model)
        optimizer = self.optimizer.optimizer
        state = {"optimizer": {"param_groups": optimizer.state_dict()["param_groups"]}}
        state["lr_scheduler"] = self.lr_scheduler.state_dict()
        is_main = self.accelerator.is_main_process
        with new_checkpoint(output_dir, self.progress, limit) if is_main else nullcontext() as own:
            folder = Path(broadcast_object_list([str(own)])[0])
            if is_main:
                torch.save(state, folder / TRAINING_STATE)
            try:
                save_shards(folder, self.model, self.ema, optimizer)
            except OSError as error:
                if is_main:
                    raise
                raise InputError(f"{folder} could not be written (a full disk?): {error}") from error
        self.accelerator.wait_for_everyone()

    def _load_whole(self, checkpoint: Path, optimizer_state: dict) -> None:
        put_all(trained_weights(self.model), read_trained(checkpoint / "unet", self.model))
        put_optimizer_state(self.model, self.optimizer.optimizer, optimizer_state)
        if self.ema:
            put_all(self.ema.state_dict(), read_trained(checkpoint / "unet_ema", self.model))

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """As in `TrainingState`; each process has only a part of the norm."""
        return super().clip_gradients(max_norm).full_tensor()

    @contextmanager
    def published_weights(self) -> Iterator[None]:
        """As in `TrainingState`; forward passes within may leave weights gathered."""
        model = self.model
        free_gathered(model)
        with super().published_weights():
            try:
                yield
            finally:
                free_gathered(model)

    def whole_unet(self) -> UNet2DConditionModel | None:
        """A gathered copy on the main process's CPU; None in the others."""
        free_gathered(self.model)
        weights = gather(trained_weights(self.model), self.accelerator)
        return make_whole_unet(self.model, weights) if self.accelerator.is_main_process else None

    def unshard(self) -> None:
        """Replace the model of the main process by a gathered one with the weights to publish."""
        with self.published_weights():
            unet = self.whole_unet()
        self.model, self.unet, self.ema = unet, unet, None
