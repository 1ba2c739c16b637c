"""One sentence for a model that cannot be loaded: the libraries raise errors of many kinds, some hiding the reason."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from utils.errors import InputError

ADVICE = "give the folder of a whole diffusers pipeline, or its id on the Hub; copy a damaged file again"


@contextmanager
def explaining_load_errors(what: str, advice: str = ADVICE) -> Iterator[None]:
    """A model that is missing, out of reach or damaged raises an `InputError` that begins with `what`."""
    damaged = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)
    try:
        yield
    except InputError:
        raise
    except (OSError, *damaged, SafetensorError, SingleFileComponentError) as error:
        reason = f": {_first_line(error)}" if isinstance(error, OSError) else f", is it damaged? {_first_line(error)}"
        if is_hub_out_of_reach(error):
            reason = ": it is no folder here, the Hub cannot be reached (or offline mode is on), and it is not cached"
        raise InputError(f"{what} cannot be loaded{reason} ({advice})") from error


def is_hub_out_of_reach(error: BaseException | None) -> bool:
    """diffusers wraps the reason: without a connection it says that the repository lacks the file."""
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
