"""Hides other libraries' warnings, hints and progress bars; their errors are still shown.

Imports no library: the settings must be made before the libraries are imported.
"""

import logging
import os
import warnings

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "WANDB_SILENT": "true",
}
LOGGERS = (
    "bitsandbytes kernels httpx httpx2 accelerate datasets peft torch.distributed torch.utils._pytree torchao xformers"
)


def quiet_libraries() -> None:
    """Call before importing torch, diffusers or transformers. Does not change what the environment already sets."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS.split():
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def hide_progress_bars() -> None:
    """Hide the bars of diffusers and transformers for loading and sampling. Imports both libraries."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
