"""infer.py --best_of: of several seeds, the edit that CLIP or a vision model likes best."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from evaluation.feature_metrics import load_image_text_encoder
from evaluation.flags import IP2P_CLIP
from evaluation.samples import Sample
from utils.editing.flags import JUDGE_METRICS
from utils.editing.jobs import Job
from utils.editing.service import EditResult
from utils.errors import InputError
from utils.pixels import decode_image


class BestOf:
    """Chooses one of `count` edits of each job, which differ in their seeds.

    judge: a metric, whose model is CLIP or SigLIP, or the address of a server with a vision model. clip_text: the
    similarity of edit and instruction; clip_image: of edit and input; clip_both: their product, the first from 0 on.
    """

    def __init__(self, count: int, judge: str, model: str | None, device: str) -> None:
        self.count, self._name, self._judge, self._clip = count, judge, None, None
        if judge in JUDGE_METRICS:
            self._clip = load_image_text_encoder(model or IP2P_CLIP, device)
        else:
            from evaluation.judge import Judge, JudgeOptions

            self._folder = TemporaryDirectory(prefix="judgements-")
            self._judge = Judge(JudgeOptions(judge, model), Path(self._folder.name))

    def expand(self, jobs: list[Job]) -> list[Job]:
        """Every job with `count` seeds and the same output."""
        return [replace(job, offset=job.offset * self.count + k) for job in jobs for k in range(self.count)]

    def choose(self, results: Iterable[EditResult]) -> Iterator[EditResult]:
        """One result for each job that was expanded: the best edit, a problem, or an edit that was there before."""
        groups: dict[Any, list[EditResult]] = {}
        for result in results:
            key = (result.job.output, result.job.offset // self.count)
            group = groups.setdefault(key, [])
            group.append(result)
            if len(group) == self.count:
                yield self._best(groups.pop(key))

    def _best(self, group: list[EditResult]) -> EditResult:
        edits = [result for result in group if not result.problem]
        if not edits:
            return group[0]
        # An edit without an image is the best one of a former run.
        images = [result.image.convert("RGB") if result.image else decode_image(result.job.output) for result in edits]
        original = next((result.original for result in edits if result.original), images[0])
        instruction = edits[0].job.instruction or next(r.record["instruction"] for r in edits if r.record)
        scores = self._score(original, instruction, images)
        best = max(range(len(edits)), key=lambda index: scores[index])
        if edits[best].record is None:
            return edits[best]
        chosen = {"count": self.count, "judge": self._name, "score": round(scores[best], 5)}
        return replace(edits[best], record=edits[best].record | {"best_of": chosen})

    def _score(self, original: Image.Image, instruction: str, images: list[Image.Image]) -> list[float]:
        if self._judge:
            marks = self._judge.mark([Sample(0, original.convert("RGB"), instruction)] * len(images), images)
            if not any(marks):
                raise InputError(f"--judge {self._name}: the server refuses to judge this edit: give another one")
            return [mark.get("judge_o", -1.0) for mark in marks]
        features = self._clip.encode_images([original.convert("RGB"), *images])
        with_text = features[1:] @ self._clip.encode_texts([instruction])[0]
        with_input = features[1:] @ features[0]
        values = {"clip_text": with_text, "clip_image": with_input, "clip_both": with_text.clamp(min=0) * with_input}
        return torch.as_tensor(values[self._name]).tolist()
