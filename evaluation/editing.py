"""Edits all samples with one editor, the way infer.py edits, into a folder; what is there already is kept."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from evaluation.samples import Sample
from utils.editing.edit_images import fit_to_model
from utils.editing.editor_setup import OpenedEditor, open_editor
from utils.editing.flags import EditorOptions
from utils.editing.jobs import Job
from utils.editing.service import EditService
from utils.editing.settings import EditSettings
from utils.errors import InputError
from utils.models.latents import encode_moments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleEditor:
    """Edits samples with one editor, in all processes together.

    The seed of an edit is seed + the number of its row. An edit that exists with the same settings is kept, so a killed
    run is resumed.
    """

    editor: OpenedEditor
    state: PartialState
    seed: int = 0
    batch_size: int = 1

    @classmethod
    def open(cls, options: EditorOptions, state: PartialState, seed: int, batch_size: int) -> SampleEditor:
        """The editor on this process's own GPU. Raises InputError."""
        is_own = options.device == "auto" and state.device.type == "cuda"
        editor = open_editor(replace(options, device=str(state.device)) if is_own else options)
        for message in editor.messages:
            logger.warning(message)
        return cls(editor, state, seed, batch_size)

    def edit(self, samples: list[Sample], settings: EditSettings, folder: Path, label: str) -> list[Path]:
        """The edit of each sample in `folder`, of the size of its original. Raises InputError for one that fails."""
        paths = [folder / f"{sample.name}.png" for sample in samples]
        folder.mkdir(parents=True, exist_ok=True)
        own = list(zip(samples, paths, strict=True))[self.state.process_index :: self.state.num_processes]
        jobs = [
            Job(path.name, partial(_as_png, one.original), one.instruction, settings, self.seed, one.number, path)
            for one, path in own
        ]
        service = EditService(self.editor, self.batch_size, say=logger.warning)
        with tqdm(total=len(jobs), desc=label, unit="edit", disable=not self.state.is_main_process) as bar:
            for result in service.edit(jobs, self.seed):
                if result.problem:
                    raise InputError(f"row {result.job.offset}: {result.problem}")
                if result.image is not None:
                    result.save(result.job.output)
                bar.update()
        self.state.wait_for_everyone()
        return paths

    def edit_turns(self, samples: list[Sample], settings: EditSettings, folder: Path, label: str) -> list[Path]:
        """As `edit`, but every turn of a session edits the edit of the turn before it.

        Raises `InputError` where the rows have no sessions.
        """
        if not all(sample.session for sample in samples):
            raise InputError("--benchmark magicbrush_multi needs the columns img_id and turn_index: use magicbrush")
        found: dict[int, Path] = {}
        former: dict[str, Path] = {}
        for turn in sorted({sample.turn for sample in samples}):
            now = [sample for sample in samples if sample.turn == turn]
            now = [
                replace(sample, original=Image.open(former[sample.session]).convert("RGB"))
                if sample.session in former
                else sample
                for sample in now
            ]
            paths = self.edit(now, settings, folder, f"{label}, turn {turn}")
            former |= {sample.session: path for sample, path in zip(now, paths, strict=True)}
            found |= {sample.number: path for sample, path in zip(now, paths, strict=True)}
        return [found[sample.number] for sample in samples]


@torch.no_grad()
def round_trip(editor: OpenedEditor, image: Image.Image, resolution: int | None) -> Image.Image:
    """The image through the editor's VAE, at the size at which the editor works: no edit can be closer to it."""
    pipeline = editor.pipeline
    fitted = fit_to_model(image, pipeline, resolution, crop=False)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None]
    mean = encode_moments(pipeline.vae, pixels).chunk(2, dim=1)[0]
    decoded = pipeline.vae.decode(mean.to(pipeline.vae.dtype)).sample.float()[0]
    values = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(values).resize(image.size, Image.Resampling.LANCZOS)


def _as_png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()
