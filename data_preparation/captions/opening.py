"""From the description of a language model to the model, with the imports that this one needs and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_preparation.captions.backend import Backend, LocalModel
from data_preparation.captions.prompts import Sampling

if TYPE_CHECKING:
    from data_preparation.captions.client import Server


@dataclass(frozen=True)
class Source:
    """A model behind a server, or one on this machine. structure: how a server is asked for JSON, or "auto"."""

    model: str
    server: Server | None = None
    local: LocalModel | None = None
    structure: str = "auto"


def open_backend(source: Source, sampling: Sampling, rank: int = 0) -> Backend:
    """Raises InputError where the model cannot be used."""
    if source.server is not None:
        from data_preparation.captions.server import ServedModel

        return ServedModel(source.server, source.model, sampling, source.structure)
    from data_preparation.captions.local import LoadedModel

    return LoadedModel(source.local, sampling, rank)
