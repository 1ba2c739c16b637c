"""The rows of generate_dataset.py: each is drawn from (seed, row) as a photograph, a task and an instruction."""

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import datasets
import numpy as np

from data_preparation.generation.inputs import OpenPhotographs, Photographs
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.runner import GeneratedRows, GenerateRows
from data_preparation.instructions import promises_outlines
from data_preparation.photographs import fit_image, random_square, seeded_rng
from data_preparation.tasks.clean_targets import find_flaw
from data_preparation.tasks.plan import DEGRADATION, EXACT, Task, TeacherSettings
from data_preparation.tasks.teachers import load_teacher, public_teacher
from utils.checks import image_measures
from utils.pixels import BadRow

logger = logging.getLogger(__name__)
MAX_KEPT, MAX_KEPT_BYTES = 32, 2_000_000  # photographs that a worker keeps, and the largest of them
MAX_NAMED = 5  # unusable photographs that a worker names in its log
MAX_TRIES = 20  # photographs tried for one row, if some cannot be read or are no clean targets of its task
CARTOONIZE = "cartoonize"  # the task whose instructions may promise outlines, or their absence
MIN_INK, MAX_NO_INK = 0.01, 0.005  # share of ink lines in cartoons with and without outlines
ORDER_STREAM = 1 << 62  # index from which the orders of the photographs are drawn


@dataclass(frozen=True)
class PhotographPairGenerator:
    """A `RowGenerator`; the fields are flags of generate_dataset.py.

    phrasings: by `Task.phrasings`, (for training, held out); phrasing_split: "train", "heldout" or "both";
    models: by `Task.teacher`, of `describe_models`.
    """

    photographs: Photographs
    tasks: tuple[Task, ...]
    phrasings: dict[str, tuple[list[str], list[str]]]
    phrasing_split: str
    models: dict[str, list[dict] | None]
    teacher_settings: TeacherSettings
    num_items: int
    seed: int
    resolution: int
    crop: str
    image_format: str
    source_license: str | None
    batch_size: int

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> GenerateRows:
        return _PhotographPairWorker(self, self.photographs.open(), rank).generate


class PlannedPair(NamedTuple):
    """A row with everything drawn, before the teacher runs. image: uint8 RGB (H, W, 3); phrasing: train or heldout."""

    task: Task
    prompt: str
    phrasing: str
    image: np.ndarray
    photograph: int
    generator: np.random.Generator


class _PhotographPairWorker:
    def __init__(self, settings: PhotographPairGenerator, photographs: OpenPhotographs, rank: int) -> None:
        self.settings, self.photographs = settings, photographs
        self._recent: OrderedDict[tuple, np.ndarray] = (
            OrderedDict()
        )  # small ones: the same few are used again and again
        self._order = lru_cache(maxsize=4)(self._draw_order)
        self._named: set[int] = set()
        weights = np.array([task.weight for task in settings.tasks])
        self._shares = np.cumsum(weights / weights.sum())
        models, flags = settings.models, settings.teacher_settings
        self._teacher = cache(lambda task: load_teacher(task, flags, rank, models[task.teacher]))

    def generate(self, items: range) -> GeneratedRows:
        rejected: Counter = Counter()
        planned = {item: pair for item in items if (pair := self._plan(item, rejected)) is not None}
        batches: dict[tuple, list[int]] = {}  # a teacher gets images of one size
        for item, pair in planned.items():
            batches.setdefault((pair.task, pair.image.shape), []).append(item)
        edits: dict[int, tuple] = {}
        for (task, _), members in batches.items():
            for start in range(0, len(members), self.settings.batch_size):
                batch = members[start : start + self.settings.batch_size]
                rows = [planned[item] for item in batch]
                inputs = [row.image for row in rows], [row.prompt for row in rows], [row.generator for row in rows]
                edits |= zip(batch, self._teacher(task)(*inputs), strict=True)
        rows = [self._make_row(pair, *edits[item], rejected) for item, pair in planned.items()]
        return GeneratedRows([row for row in rows if row is not None], dict(rejected))

    def _draw_order(self, epoch: int) -> np.ndarray:
        return seeded_rng(self.settings.seed, ORDER_STREAM + epoch).permutation(len(self.photographs))

    def _plan(self, item: int, rejected: Counter) -> PlannedPair | None:
        """Draw a row; None if no photograph suits its task. Each epoch uses every photograph once."""
        settings, generator = self.settings, seeded_rng(self.settings.seed, item)
        task = settings.tasks[int(np.searchsorted(self._shares, generator.random(), side="right"))]
        epoch, place = divmod(item, len(self.photographs))
        photograph = int(self._order(epoch)[place])
        for _ in range(MAX_TRIES):
            image = self._fit(photograph, task, generator, rejected)
            if image is not None:
                break
            photograph = int(generator.integers(len(self.photographs)))
        else:
            rejected[f"no photograph for {task.name} in {MAX_TRIES} tries"] += 1
            return None
        is_heldout = {"train": 0, "heldout": 1, "both": int(generator.random() < 0.5)}[settings.phrasing_split]
        prompts = settings.phrasings[task.phrasings][is_heldout]
        prompt = prompts[generator.integers(len(prompts))]
        return PlannedPair(task, prompt, ("train", "heldout")[is_heldout], image, photograph, generator)

    def _fit(self, photograph: int, task: Task, generator: np.random.Generator, rejected: Counter) -> np.ndarray | None:
        """The photograph at the size of the pair; None, and counted, if it is unreadable or no clean target."""
        settings = self.settings
        try:
            stored = self._read(photograph, is_whole=task.teacher == DEGRADATION)
            if settings.crop == "random":
                image = random_square(stored, settings.resolution, generator)
            else:
                image = fit_image(stored, settings.resolution, is_square=settings.crop == "square")
        except BadRow as error:
            rejected[f"photograph {error.kind}"] += 1
            self._name_unusable(photograph, error)
            return None
        flaw = find_flaw(task.name, image, stored) if task.teacher == DEGRADATION else None
        if flaw is not None:
            rejected[f"photograph {flaw}"] += 1
            return None
        return image

    def _read(self, photograph: int, is_whole: bool) -> np.ndarray:
        """uint8 RGB (H, W, 3). is_whole: at its stored size, for the measures of clean targets. Raises BadRow.

        Else a large JPEG is decoded at a reduced size, which leaves two or more pixels for each of the pair's.
        """
        key = (photograph, is_whole)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        # A random square has at least half of the shorter side (`random_square`); twice that, so that the resizing and
        # not the decoder decides how it looks.
        side = self.settings.resolution * (4 if self.settings.crop == "random" else 1)
        image = self.photographs.read(photograph, None if is_whole else side)
        if image.nbytes <= MAX_KEPT_BYTES:
            self._recent[key] = image
            if len(self._recent) > MAX_KEPT:
                self._recent.popitem(last=False)
        return image

    def _name_unusable(self, photograph: int, error: BadRow) -> None:
        """In the log alone: the counts by reason are published, and file names may be private."""
        if photograph not in self._named and len(self._named) < MAX_NAMED:
            self._named.add(photograph)
            logger.warning("photograph %s cannot be used: %s", self.photographs.name(photograph), error.reason)

    def _find_prompt(self, pair: PlannedPair, result: np.ndarray) -> str | None:
        """The drawn instruction, or another one if the cartoon lacks the outlines that it promises; None if all do."""
        is_toy = pair.task.teacher == EXACT  # its phrasings are few, and its editor is trained on all of them
        if is_toy or pair.task.name != CARTOONIZE or (promise := promises_outlines(pair.prompt)) is None:
            return pair.prompt
        ink = image_measures.ink(pair.image, result)
        if ink >= MIN_INK if promise else ink <= MAX_NO_INK:
            return pair.prompt
        others = self.settings.phrasings[pair.task.phrasings][pair.phrasing == "heldout"]
        others = [prompt for prompt in others if promises_outlines(prompt) is None]
        return others[pair.generator.integers(len(others))] if others else None

    def _make_row(self, pair: PlannedPair, result: np.ndarray, drawn: dict, rejected: Counter) -> dict | None:
        settings, photographs, teacher = self.settings, self.photographs, pair.task.teacher
        prompt = self._find_prompt(pair, result)
        if prompt is None:
            rejected["cartoon without the outlines of its instruction"] += 1
            return None
        original, edited = (result, pair.image) if teacher == DEGRADATION else (pair.image, result)
        return make_pair(
            original,
            prompt,
            edited,
            settings.image_format,
            task=pair.task.name,
            phrasing=pair.phrasing,
            source=photographs.name(pair.photograph),
            source_dataset=photographs.dataset,
            source_license=settings.source_license or photographs.license_of(pair.photograph),
            models=settings.models[teacher],
            seed=settings.seed,
            settings={"teacher": public_teacher(teacher), **drawn},
        )
