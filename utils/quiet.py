"""Keeps other libraries' hints and progress bars out of the way of our own lines; their errors still show.

Nothing is imported here: the settings must stand before the libraries are.
"""

from __future__ import annotations

import logging
import os
import warnings

SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "WANDB_SILENT": "true",
}
CHATTY = (
    "bitsandbytes",
    "kernels",
    "httpx",
    "httpx2",
    "accelerate",
    "datasets",
    "peft",
    "torch.distributed",
    "torch.utils._pytree",
    "torchao",
)


def quiet_libraries() -> None:
    """Call before torch, diffusers or transformers are imported. What the user set in the environment wins."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def hide_progress_bars() -> None:
    """Call after diffusers and transformers are imported: their bars for loading and sampling say little."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
