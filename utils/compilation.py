"""torch.compile of a UNet's repeated blocks, for training and editing."""

import logging
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

logger = logging.getLogger(__name__)
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
MAX_SHAPES = 128  # of one kind of block: SD 1.5's UNet has 18 kinds of residual block; PyTorch's own limit is 8


def find_missing_compiler(device: str) -> str | None:
    """What torch.compile needs and this machine does not have. device: cuda, cpu or mps."""
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the package triton"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"] if device == "cpu" else ["gcc", "cc", "clang"]
    return None if any(shutil.which(name) for name in compilers if name) else "a C++ compiler such as g++"


def compile_blocks(unet: torch.nn.Module) -> int:
    """Compile the residual and transformer blocks of a UNet for the shapes that they meet; returns how many.

    Most of a UNet's time passes in these blocks. Parameters keep
    their names. A block that does not compile runs as before, with a warning of PyTorch's. Compiled code is kept
    between runs, in TORCHINDUCTOR_CACHE_DIR.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(
        8 * MAX_SHAPES, torch._dynamo.config.accumulated_recompile_limit
    )
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def without_compiling(is_compiled: bool) -> AbstractContextManager:
    """Within the context compiled blocks run as written: for few calls with shapes of their own."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
