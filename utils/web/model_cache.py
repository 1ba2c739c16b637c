"""The editors that the page offers: named in a menu, loaded when first used, the last ones kept in memory."""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from utils.editing.edit_images import OutOfMemory
from utils.editing.editor_setup import read_recommended
from utils.editing.service import EditService
from utils.editing.settings import DEFAULT_SETTINGS
from utils.hub_names import public_name


class ModelCache:
    """Editors by name. `load` opens a folder, file or Hub id; `capacity` of them stay in memory.

    defaults: of the settings that an editor does not recommend; revision: of the recommendations of models on the Hub.
    """

    def __init__(
        self,
        models: list[str],
        load: Callable[[str], EditService],
        capacity: int,
        defaults: dict[str, Any] = DEFAULT_SETTINGS,
        revision: str | None = None,
    ) -> None:
        self._models = name_models(models)
        self._load, self._capacity, self._defaults = load, capacity, defaults
        self._loaded: OrderedDict[str, EditService] = OrderedDict()  # the last used one is the last
        self._lock = threading.Lock()
        self._recommended = {name: read_recommended(model, revision) for name, model in self._models.items()}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def settings(self, name: str) -> dict[str, Any]:
        """Steps, guidance scales and eta: as the editor's `adapted.json` recommends, else the defaults."""
        return self._defaults | self._recommended[name]

    def has_recommended(self, name: str) -> bool:
        return bool(self._recommended[name])

    def is_loaded(self, name: str) -> bool:
        return name in self._loaded

    def get(self, name: str) -> EditService:
        """The editor, loaded if necessary; the least recently used one makes room for it.

        All others make room where the memory is too small. Raises OutOfMemory where it is too small for one.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._open(name)
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def _open(self, name: str) -> EditService:
        while len(self._loaded) >= self._capacity:
            self._loaded.popitem(last=False)
            _free_memory()
        try:
            return self._load(self._models[name])
        except OutOfMemory:
            if not self._loaded:
                raise
        self._loaded.clear()  # after the except block, whose traceback refers to a part of the new model
        _free_memory()
        return self._load(self._models[name])


def name_models(models: list[str]) -> dict[str, str]:
    """Menu name -> model: the last part of a path or the Hub id, or the whole path if two would have the same name."""
    models = list(dict.fromkeys(models))
    names = [public_name(model) for model in models]
    return {name if names.count(name) == 1 else model: model for name, model in zip(names, models, strict=True)}


def _free_memory() -> None:
    gc.collect()  # pipelines have reference cycles, and the next model needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
