"""The editors that the browser offers: named in a menu, loaded when first used, the last few kept in memory."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from utils.editing.editor_setup import OpenedEditor, read_recommended
from utils.editing.jobs import Recommended


class Shelf:
    """Editors by name. `load` opens a folder, file or Hub id; `capacity` of them stay in memory."""

    def __init__(
        self, models: list[str], load: Callable[[str], OpenedEditor], capacity: int, default: Recommended | None = None
    ) -> None:
        self._models = name_models(models)
        self._load, self._capacity = load, capacity
        self._loaded: OrderedDict[str, OpenedEditor] = OrderedDict()  # the one used last stands last
        self._lock = threading.Lock()
        self._own = {name: read_recommended(model) for name, model in self._models.items()}
        self._default = default or Recommended()

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def recommended(self, name: str) -> Recommended:
        """What the editor's `adapted.json` says, which adapt_distill.py writes; the rest is the default."""
        return replace(self._default, **self._own[name])

    def has_its_own(self, name: str) -> bool:
        """Whether an editor comes with settings of its own, as an adapted one does."""
        return bool(self._own[name])

    def is_loaded(self, name: str) -> bool:
        return name in self._loaded

    def take(self, name: str) -> OpenedEditor:
        """The editor, loaded when it is not there; the one that was not used for longest makes room for it."""
        with self._lock:
            if name not in self._loaded:
                while len(self._loaded) >= self._capacity:
                    self._loaded.popitem(last=False)
                    _free_memory()
                self._loaded[name] = self._load(self._models[name])
            self._loaded.move_to_end(name)
            return self._loaded[name]


def name_models(models: list[str]) -> dict[str, str]:
    """Short names for a menu: the last part of each path or id, and all of it where two would be called the same."""
    models = list(dict.fromkeys(models))
    short = [Path(model).resolve().name if Path(model).exists() else model for model in models]
    return {name if short.count(name) == 1 else model: model for name, model in zip(short, models, strict=True)}


def _free_memory() -> None:
    import torch

    gc.collect()  # pipelines hold each other in cycles, and the next model needs the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
