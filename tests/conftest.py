"""Offline by default; tiny models made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

from tests.tiny import make_tiny_sd  # noqa: E402


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 4-channel Stable Diffusion."""
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "base", in_channels=4)


@pytest.fixture(scope="session")
def tiny_editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 8-channel InstructPix2Pix editor."""
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "editor", in_channels=8, seed=1)
