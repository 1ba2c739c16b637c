"""One row of generate_dataset.py: a photograph, a task, a way of asking for it, and the pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import datasets
import numpy as np

from data_preparation.generation.inputs import OpenPhotographs, Photographs
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.recipe import Made
from data_preparation.photographs import fit_picture, random_square, row_generator
from data_preparation.tasks.plan import DEGRADATION, Task
from data_preparation.tasks.teachers import TeacherSettings, batches_of_one_size, describe_models, open_teacher
from utils.pixels import BadRow

TRIES = 10  # photographs looked at for one row, where some cannot be read
ORDER_STREAM = 1 << 62  # row number from which the orders of the photographs are drawn


@dataclass(frozen=True)
class PairRecipe:
    """What decides the rows of a run; see the flags of generate_dataset.py.

    phrasings: by task, (those for training, those held out); kind: "train", "heldout" or "both".
    """

    photographs: Photographs
    tasks: tuple[Task, ...]
    phrasings: dict[str, tuple[list[str], list[str]]]
    num_items: int
    seed: int = 0
    resolution: int = 256
    crop: str = "none"
    kind: str = "train"
    image_format: str = "png"
    source_license: str | None = None
    batch_size: int = 1
    teacher: TeacherSettings = field(default_factory=TeacherSettings)

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int) -> Callable[[range], Made]:
        maker = _Maker(self, self.photographs.open(), rank)
        return maker.make


class Wish(NamedTuple):
    """A row whose draws are made and whose edit is not."""

    task: Task
    prompt: str
    kind: str
    picture: np.ndarray
    photograph: int
    generator: np.random.Generator


class _Maker:
    def __init__(self, recipe: PairRecipe, photographs: OpenPhotographs, rank: int) -> None:
        self.recipe, self.photographs, self._rank = recipe, photographs, rank
        self._read = lru_cache(maxsize=32)(photographs.read)
        self._order = lru_cache(maxsize=4)(self._draw_order)
        weights = np.array([task.weight for task in recipe.tasks])
        self._shares = np.cumsum(weights / weights.sum())
        self._teach = lru_cache(maxsize=None)(lambda task: open_teacher(task, recipe.teacher, rank))
        self._models = lru_cache(maxsize=None)(describe_models)

    def make(self, items: range) -> Made:
        rejected: Counter = Counter()
        wishes = [wish for item in items if (wish := self._draw(item, rejected)) is not None]
        edits: dict[int, tuple] = {}
        for task in dict.fromkeys(wish.task for wish in wishes):
            rows = [row for row, wish in enumerate(wishes) if wish.task == task]
            for places in batches_of_one_size([wishes[row].picture for row in rows], self.recipe.batch_size):
                batch = [wishes[rows[place]] for place in places]
                columns = zip(*((wish.picture, wish.prompt, wish.generator) for wish in batch), strict=True)
                taught = self._teach(task)(*map(list, columns))
                edits |= zip((rows[place] for place in places), taught, strict=True)
        return Made([self._row(wish, *edits[row]) for row, wish in enumerate(wishes)], dict(rejected))

    def _draw_order(self, epoch: int) -> np.ndarray:
        return row_generator(self.recipe.seed, ORDER_STREAM + epoch).permutation(len(self.photographs))

    def _photograph(self, item: int) -> int:
        """Every photograph comes up once before any comes up twice."""
        epoch, place = divmod(item, len(self.photographs))
        return int(self._order(epoch)[place])

    def _draw(self, item: int, rejected: Counter) -> Wish | None:
        generator = row_generator(self.recipe.seed, item)
        task = self.recipe.tasks[int(np.searchsorted(self._shares, generator.random(), side="right"))]
        photograph, picture = self._photograph(item), None
        for _ in range(TRIES):
            try:
                picture = self._cut(self._read(photograph), generator)
                break
            except BadRow as error:
                rejected[f"photograph {self.photographs.name(photograph)} {error.reason}"] += 1
                photograph = int(generator.integers(len(self.photographs)))
        if picture is None:
            return None
        trained, heldout = self.recipe.phrasings[task.phrasings]
        kind = {"train": 0, "heldout": 1, "both": int(generator.random() < 0.5)}[self.recipe.kind]
        prompts = (trained, heldout)[kind]
        prompt = prompts[generator.integers(len(prompts))]
        return Wish(task, prompt, ("train", "heldout")[kind], picture, photograph, generator)

    def _cut(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self.recipe.crop == "random":
            return random_square(picture, self.recipe.resolution, generator)
        return fit_picture(picture, self.recipe.resolution, is_square=self.recipe.crop == "square")

    def _row(self, wish: Wish, edited: np.ndarray, drawn: dict) -> dict:
        is_degraded = wish.task.teacher == DEGRADATION
        original, edited = (edited, wish.picture) if is_degraded else (wish.picture, edited)
        recipe, photographs = self.recipe, self.photographs
        return make_pair(
            original,
            wish.prompt,
            edited,
            image_format=recipe.image_format,
            task=wish.task.name,
            phrasing=wish.kind,
            source=photographs.name(wish.photograph),
            source_dataset=photographs.dataset,
            source_license=recipe.source_license or photographs.license_of(wish.photograph),
            models=self._models(wish.task),
            seed=recipe.seed,
            settings={"teacher": public_teacher(wish.task.teacher), **drawn},
        )


def public_teacher(teacher: str) -> str:
    """A teacher's name without the folders of this machine."""
    kind, separator, rest = teacher.partition(":")
    return f"{kind}:{rest.rsplit('/', 1)[-1]}" if separator and kind in ("onnx", "python") else teacher
