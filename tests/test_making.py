"""The runner of pair sets: same rows by any workers, after any death, and a clear word where it cannot be."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image

from data_preparation.generation import flags, pair_rows
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.generation.runner import Made, Workers, produce
from data_preparation.generation.store import Store
from data_preparation.photographs import row_generator
from tests.killing import rows_of
from utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Numbers:
    """A fifth of the items gives nothing, a fifth two rows; `pauses` takes its time; `deadly` kills its worker once."""

    num_items: int
    seed: int = 0
    pauses: float = 0.0
    deadly: str = ""
    failing: bool = False

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int):
        return self._make

    def _make(self, items: range) -> Made:
        time.sleep(self.pauses)
        if self.failing and items.start >= 40:
            raise InputError("the server is away")
        if self.deadly and items.start == 40 and not Path(self.deadly).exists():
            Path(self.deadly).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows, rejected = [], 0
        for item in items:
            generator = row_generator(self.seed, item)
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            count = (0, 1, 1, 1, 2)[generator.integers(5)]
            rejected += count == 0
            rows += [make_pair(pixels, f"number {item}.{k}", 255 - pixels, seed=self.seed) for k in range(count)]
        return Made(rows, {"unlucky": rejected} if rejected else {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "set"
    produce(Numbers(100), root, {"what": 1}, items_per_shard=10)
    return root


def prompts_of(root: Path, tmp_path: Path) -> list[str]:
    return datasets.load_dataset(str(root), split="train", cache_dir=str(tmp_path / "cache"))["edit_prompt"][:]


def test_a_set_is_what_datasets_reads(whole, tmp_path):
    rows = datasets.load_dataset(str(whole), split="train", cache_dir=str(tmp_path))
    assert rows.features == pair_features()
    expected = [f"number {i}.{k}" for i in range(100) for k in range((0, 1, 1, 1, 2)[_count(i)])]
    assert rows["edit_prompt"][:] == expected
    original, edited = (np.asarray(rows[0][f"{name}_image"]) for name in ("original", "edited"))
    assert np.array_equal(edited, 255 - original)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == len(expected)
    assert manifest["rejected"] == {"unlucky": sum(_count(i) == 0 for i in range(100))}
    assert sorted(path.name for path in whole.iterdir()) == ["data", "manifest.json"]


def _count(item: int) -> int:
    generator = row_generator(0, item)
    generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return int(generator.integers(5))


def test_every_image_format_of_the_flags_is_written():
    assert set(flags.IMAGE_FORMATS) == set(pair_rows.IMAGE_FORMATS)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in flags.IMAGE_FORMATS:
        stored = np.asarray(Image.open(io.BytesIO(pair_rows.encode_image(pixels, name))).convert("RGB"))
        assert np.array_equal(stored, pixels) == (name in ("png", "webp")) and stored.shape == pixels.shape


def test_processes_make_the_same_bytes(whole, tmp_path):
    summary = produce(Numbers(100), tmp_path / "set", {"what": 1}, items_per_shard=10, workers=Workers(2))
    assert rows_of(tmp_path / "set") == rows_of(whole) and summary.rejected["unlucky"] > 0


def test_a_lost_process_loses_nothing(whole, tmp_path):
    recipe = Numbers(100, deadly=str(tmp_path / "died"))
    produce(recipe, tmp_path / "set", {"what": 1}, items_per_shard=10, workers=Workers(2))
    assert (tmp_path / "died").exists() and rows_of(tmp_path / "set") == rows_of(whole)


def test_workers_go_when_their_parent_is_killed(tmp_path):
    """They hold models: what stays behind would keep a GPU full."""
    code = (
        "import sys; from pathlib import Path; from tests.test_making import Numbers\n"
        "from data_preparation.generation.runner import Workers, produce\n"
        "if __name__ == '__main__': produce(Numbers(1000, pauses=0.2), Path(sys.argv[1]), {}, items_per_shard=10, "
        "workers=Workers(2))\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "set"], env=environment, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: list((tmp_path / "set/.making").glob("shard-*.parquet")))
    workers = [child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, workers)))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


def test_an_error_of_a_worker_is_one_message_and_what_stood_is_gone_on_with(whole, tmp_path):
    for workers in (Workers(), Workers(2)):
        with pytest.raises(InputError, match="the server is away"):
            produce(Numbers(100, failing=True), tmp_path / "set", {"what": 1}, items_per_shard=10, workers=workers)
    assert len(list((tmp_path / "set/.making").glob("shard-*.parquet"))) == 4
    assert not (tmp_path / "set/data").exists()
    produce(Numbers(100), tmp_path / "set", {"what": 1}, items_per_shard=10)
    assert rows_of(tmp_path / "set") == rows_of(whole)


@pytest.mark.parametrize("workers", [Workers(), Workers(2)], ids=["here", "processes"])
def test_rows_wanted_are_the_first_ones_whoever_made_them(workers, whole, tmp_path):
    summary = produce(Numbers(100), tmp_path / "set", {}, items_per_shard=10, max_rows=25, workers=workers)
    assert summary.rows == 25
    assert prompts_of(tmp_path / "set", tmp_path) == prompts_of(whole, tmp_path)[:25]
    assert summary.rejected["unlucky"] == sum(_count(i) == 0 for i in range(_items_for(25)))


def _items_for(rows: int) -> int:
    """Items of the shards of ten that are needed."""
    made, item = 0, 0
    while made < rows:
        made += sum((0, 1, 1, 1, 2)[_count(i)] for i in range(item, item + 10))
        item += 10
    return item


def test_again_is_no_work_and_other_settings_are_refused_by_name(tmp_path):
    root = tmp_path / "set"
    produce(Numbers(20), root, {"seed": 0, "model": "a"})
    before = rows_of(root)
    assert produce(Numbers(20), root, {"seed": 0, "model": "a"}).was_complete and rows_of(root) == before
    with pytest.raises(InputError, match='model was "a" and is now "b"'):
        produce(Numbers(20), root, {"seed": 0, "model": "b"})
    assert rows_of(root) == before
    produce(Numbers(10), root, {"seed": 0, "model": "b"}, overwrite=True)
    assert len(rows_of(root)) < len(before) and not (root / ".making").exists()


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holiday.jpg"):
            produce(Numbers(10), tmp_path, {}, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(InputError, match="is a file"):
        produce(Numbers(10), tmp_path / "holiday.jpg", {})


def test_two_runs_do_not_write_one_folder(tmp_path):
    store = Store(tmp_path / "set", {})
    with pytest.raises(InputError, match="another run is writing it"):
        Store(tmp_path / "set", {})
    store.close()
    Store(tmp_path / "set", {}).close()


def test_a_damaged_shard_is_made_again(whole, tmp_path):
    with pytest.raises(InputError):
        produce(Numbers(100, failing=True), tmp_path / "set", {"what": 1}, items_per_shard=10)
    shard = tmp_path / "set/.making/shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    produce(Numbers(100), tmp_path / "set", {"what": 1}, items_per_shard=10)
    assert rows_of(tmp_path / "set") == rows_of(whole)


def test_nothing_made_says_why(tmp_path):
    @dataclass(frozen=True)
    class Nothing(Numbers):
        def open(self, rank: int):
            return lambda items: Made([], {"too dark": len(items)})

    with pytest.raises(InputError, match=r"not one row could be made \(too dark: 8\)"):
        produce(Nothing(8), tmp_path / "set", {})


def test_a_full_disk_is_one_message(tmp_path):
    """/dev/full is no folder, but a limit on the size of files does what a full disk does."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from tests.test_making import Numbers\n"
        "from utils.errors import exit_on_input_error\n"
        "from data_preparation.generation.runner import produce\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "with exit_on_input_error(): produce(Numbers(100), Path(sys.argv[1]), {'what': 1}, items_per_shard=10)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot be written (File too large). What is there stands" in result.stderr
    assert not list((tmp_path / "set/.making").glob("*.unfinished"))


@pytest.mark.slow
def test_ray_makes_the_same_bytes_though_an_actor_is_killed(whole, tmp_path):
    """On a local cluster: an actor dies in the middle of a shard (kill -9 of its process), and another takes over."""
    pytest.importorskip("ray", reason="Ray is not installed")
    recipe = Numbers(100, deadly=str(tmp_path / "died"), pauses=0.05)
    produce(recipe, tmp_path / "set", {"what": 1}, items_per_shard=10, workers=Workers(2, ray="local"))
    assert (tmp_path / "died").exists() and rows_of(tmp_path / "set") == rows_of(whole)


@pytest.mark.slow
def test_ray_tells_errors_and_addresses_that_do_not_answer(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(InputError, match="the server is away"):
        produce(Numbers(100, failing=True), tmp_path / "set", {}, items_per_shard=10, workers=Workers(1, ray="local"))
    with pytest.raises(InputError, match="--ray auto: no cluster"):
        produce(Numbers(100), tmp_path / "other", {}, workers=Workers(ray="auto"))


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(SystemExit) as error:
        produce(Numbers(1000, pauses=0.1), tmp_path / "set", {}, items_per_shard=10)
    assert error.value.code == 130 and "the same command goes on" in capsys.readouterr().err
