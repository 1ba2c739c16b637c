"""Fixtures that several test files share: tiny models, datasets, a local Hub. Offline by default."""

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with one core per test process, more threads are slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import huggingface_hub  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from PIL import Image  # noqa: E402

from tests.hub_server import Hub, connect_client, hub_server  # noqa: E402
from tests.pairs import make_dataset, make_noise, make_rows  # noqa: E402
from tests.runs import training_flags  # noqa: E402
from tests.tiny import make_tiny_sd, make_tiny_sdxl  # noqa: E402
from utils.editing.edit_images import Editor  # noqa: E402
from utils.editing.loading import load_editor  # noqa: E402


@pytest.fixture(autouse=True)
def restore_process_state() -> Iterator[None]:
    """Restore accelerate's state and the signal handlers after scripts that run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty local Hub."""
    with hub_server(tmp_path / "hub") as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The local Hub as the endpoint of this process, with no saved token and no pauses between retries."""
    connect_client(monkeypatch, hub.url, tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 4-channel Stable Diffusion."""
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "base", in_channels=4)


@pytest.fixture(scope="session")
def tiny_editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 8-channel InstructPix2Pix editor."""
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "editor", in_channels=8, seed=1)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 4-channel SDXL."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl", in_channels=4)


@pytest.fixture(scope="session")
def tiny_sdxl_editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 8-channel SDXL editor."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl-editor", in_channels=8, seed=1)


@pytest.fixture(scope="session")
def loaded_editors(tiny_editor: Path, tiny_sdxl_editor: Path) -> dict[str, Editor]:
    """The tiny editors in memory, "sd" and "sdxl"; copy one before changing it."""
    pipelines = {"sd": load_editor(tiny_editor), "sdxl": load_editor(tiny_sdxl_editor)}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.fixture
def editor(loaded_editors: dict[str, Editor]) -> Editor:
    """A copy of the tiny editor: a test may change its scheduler and settings, but not the shared weights."""
    return copy.copy(loaded_editors["sd"])


@pytest.fixture
def photos() -> list[Image.Image]:
    """Two images, 40 pixels wide and 24 high."""
    return [make_noise(seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def four_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good pairs."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    make_dataset(make_rows(4)).save_to_disk(str(folder))
    return folder


@pytest.fixture
def flags(tiny_base: Path, four_pairs: Path, tmp_path: Path) -> list[str]:
    """Flags that train two steps, into the output folder of an earlier run."""
    output_dir = tmp_path / "out"
    (output_dir / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/weights", "args.json", "training_curve.png", "README.md", "my notes.txt"):
        (output_dir / name).write_text(f"{name} of the former run")
    (output_dir / "training_log.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.1}\n')
    return training_flags(tiny_base, four_pairs, output_dir, "--max_train_steps=2", "--report_to=none")
