"""From trained weights to a whole pipeline in a folder, with its card, and to the Hub."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from utils.card import ModelFacts, write_card
from utils.checkpoints import UNFINISHED, load_weights, remove_whole, save_weights
from utils.errors import InputError
from utils.hub import upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishingOptions:
    """The fields are flags."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    hub_token: str | None = None


@dataclass(frozen=True)
class BestWeights:
    """The UNet with the lowest held-out loss so far, in `checkpoint-best/`."""

    output_dir: Path
    enabled: bool

    @property
    def place(self) -> Path:
        return self.output_dir / "checkpoint-best"

    def keep(self, unet: UNet2DConditionModel, step: int, loss: float) -> None:
        """Replace what was kept by the UNet as it is now."""
        if not self.enabled:
            return
        unfinished = self.output_dir / f"{UNFINISHED}{self.place.name}"
        remove_whole(unfinished)
        save_weights(unfinished / "unet", unet, unet.state_dict())
        (unfinished / "best.json").write_text(json.dumps({"global_step": step, "held_out_loss": loss}))
        remove_whole(self.place)
        unfinished.rename(self.place)

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """(weights, what is known of them), or None where nothing was kept."""
        if not self.enabled or not (self.place / "best.json").exists():
            return None
        return load_weights(self.place, "unet"), json.loads((self.place / "best.json").read_text())


def save_pipeline(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """Save a pipeline into `output_dir`, each part renamed into its place and `model_index.json` last.

    Until that file stands, nothing takes the folder for a whole pipeline. Raises `InputError` where it cannot be
    written; the checkpoints stand.
    """
    unfinished = output_dir / f"{UNFINISHED}pipeline"
    try:
        remove_whole(unfinished)
        pipeline.save_pretrained(unfinished)
        (output_dir / "model_index.json").unlink(missing_ok=True)
        for part in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
            remove_whole(output_dir / part.name)
            part.rename(output_dir / part.name)
        unfinished.rmdir()
    except Exception as error:
        remove_whole(unfinished)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise InputError(
                f"the pipeline could not be written to {output_dir}: {error}. The checkpoints stand: make room and run "
                "the same command with --resume_from_checkpoint latest"
            ) from error
        raise


def publish(
    pipeline: DiffusionPipeline, output_dir: Path, facts: ModelFacts, options: PublishingOptions, repo_id: str | None
) -> None:
    """Save the pipeline with its card, and push both where that is asked for. Raises `InputError`; nothing is lost."""
    save_pipeline(pipeline, output_dir)
    write_card(output_dir, facts, options.hub_token)
    print(f"the editor stands in {output_dir}", file=sys.stderr, flush=True)
    if repo_id:
        url = upload(output_dir, repo_id, options.hub_token, private=options.hub_private_repo)
        print(f"pushed to {url}", file=sys.stderr, flush=True)
