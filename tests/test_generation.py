"""The runner of row generators: the same rows from any workers, after a kill, and clear errors."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_preparation.generation.dataset_folder import DatasetFolder
from data_preparation.generation.generation_flags import IMAGE_FORMATS
from data_preparation.generation.pair_rows import encode_image, make_pair, pair_features
from data_preparation.generation.processes import ray_cluster
from data_preparation.generation.runner import GeneratedRows, GenerationSummary, WorkerSettings, run_generation
from data_preparation.photographs import seeded_rng
from tests.killing import rows_of
from utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_ROWS = (0, 1, 1, 1, 2)  # one of these numbers is drawn for each item


@dataclass(frozen=True)
class NumberGenerator:
    """Rows with noise images.

    pauses: seconds per shard; is_failing: raises InputError from item 40 on; killed_marker: the first worker that
    reaches item 40 creates this file and kills itself.
    """

    num_items: int
    seed: int = 0
    pauses: float = 0.0
    killed_marker: str = ""
    is_failing: bool = False

    def features(self) -> datasets.Features:
        return pair_features()

    def open(self, rank: int):
        return self._generate

    def _generate(self, items: range) -> GeneratedRows:
        time.sleep(self.pauses)
        if self.is_failing and items.start >= 40:
            raise InputError("the server is down")
        if self.killed_marker and items.start == 40 and not Path(self.killed_marker).exists():
            Path(self.killed_marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows, rejected = [], 0
        for item in items:
            rng = seeded_rng(self.seed, item)
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            count = NUM_ROWS[rng.integers(5)]
            rejected += count == 0
            rows += [make_pair(pixels, f"number {item}.{k}", 255 - pixels, seed=self.seed) for k in range(count)]
        return GeneratedRows(rows, {"unlucky": rejected} if rejected else {})


def rows_of_item(item: int) -> int:
    """How many rows a NumberGenerator with seed 0 gives for an item."""
    rng = seeded_rng(0, item)
    rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return NUM_ROWS[rng.integers(5)]


def generate(generator: NumberGenerator, data_root: Path, **options) -> GenerationSummary:
    return run_generation(generator, data_root, {"name": "numbers"}, items_per_shard=10, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The dataset of 100 items from a run in this process."""
    root = tmp_path_factory.mktemp("uninterrupted") / "pairs"
    generate(NumberGenerator(100), root)
    return root


def prompts_of(root: Path) -> list[str]:
    return [
        prompt
        for path in sorted((root / "data").iterdir())
        for prompt in pq.read_table(path)["edit_prompt"].to_pylist()
    ]


def test_datasets_loads_the_generated_dataset(uninterrupted, tmp_path):
    rows = datasets.load_dataset(str(uninterrupted), split="train", cache_dir=str(tmp_path))
    assert rows.features == pair_features()
    expected = [f"number {item}.{k}" for item in range(100) for k in range(rows_of_item(item))]
    assert rows["edit_prompt"][:] == expected
    original, edited = (np.asarray(rows[0][f"{name}_image"]) for name in ("original", "edited"))
    assert np.array_equal(edited, 255 - original)
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == len(expected)
    assert manifest["rejected"] == {"unlucky": sum(rows_of_item(item) == 0 for item in range(100))}
    assert sorted(path.name for path in uninterrupted.iterdir()) == ["data", "manifest.json"]


def test_image_formats():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in IMAGE_FORMATS:
        stored = np.asarray(Image.open(io.BytesIO(encode_image(pixels, name))).convert("RGB"))
        assert np.array_equal(stored, pixels) == (name in ("png", "webp")) and stored.shape == pixels.shape


def test_make_pair_refuses_unknown_columns():
    with pytest.raises(TypeError, match="unknown columns: colour"):
        make_pair(b"", "make it red", b"", colour="red")


def test_worker_processes_give_the_same_bytes_after_a_worker_is_killed(uninterrupted, tmp_path):
    marker = tmp_path / "killed"
    generator = NumberGenerator(100, killed_marker=str(marker))
    summary = generate(generator, tmp_path / "pairs", workers=WorkerSettings(2))
    assert marker.exists() and rows_of(tmp_path / "pairs") == rows_of(uninterrupted)
    assert summary.rejected["unlucky"] > 0


def test_workers_exit_when_their_parent_is_killed(tmp_path):
    """Otherwise they would keep their models in GPU memory."""
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from data_preparation.generation.runner import WorkerSettings\n"
        "from tests.test_generation import NumberGenerator, generate\n"
        "if __name__ == '__main__':\n"
        "    generate(NumberGenerator(1000, pauses=0.2), Path(sys.argv[1]), workers=WorkerSettings(2))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, tmp_path / "run.py", tmp_path / "pairs"]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "pairs/.making").glob("shard-*.parquet")))
    workers = [child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, workers)))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.05)


def test_an_error_in_a_worker_keeps_the_finished_shards(uninterrupted, tmp_path):
    for workers in (WorkerSettings(), WorkerSettings(2)):
        with pytest.raises(InputError, match="the server is down"):
            generate(NumberGenerator(100, is_failing=True), tmp_path / "pairs", workers=workers)
    assert len(list((tmp_path / "pairs/.making").glob("shard-*.parquet"))) == 4
    assert not (tmp_path / "pairs/data").exists()
    generate(NumberGenerator(100), tmp_path / "pairs")
    assert rows_of(tmp_path / "pairs") == rows_of(uninterrupted)


def test_a_damaged_shard_is_generated_again(uninterrupted, tmp_path):
    with pytest.raises(InputError):
        generate(NumberGenerator(100, is_failing=True), tmp_path / "pairs")
    shard = tmp_path / "pairs/.making/shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    generate(NumberGenerator(100), tmp_path / "pairs")
    assert rows_of(tmp_path / "pairs") == rows_of(uninterrupted)


@pytest.mark.parametrize("workers", [WorkerSettings(), WorkerSettings(2)], ids=["in process", "processes"])
def test_max_rows_keeps_the_first_rows(workers, uninterrupted, tmp_path):
    summary = generate(NumberGenerator(100), tmp_path / "pairs", max_rows=25, workers=workers)
    assert summary.rows == 25 and prompts_of(tmp_path / "pairs") == prompts_of(uninterrupted)[:25]
    needed = next(end for end in range(10, 101, 10) if sum(map(rows_of_item, range(end))) >= 25)
    assert summary.rejected["unlucky"] == sum(rows_of_item(item) == 0 for item in range(needed))


@pytest.mark.parametrize("max_rows", [None, 25])
def test_partitions_share_the_work_and_the_last_completes_the_dataset(max_rows, uninterrupted, tmp_path):
    shards_of = {}
    for index in (2, 0, 1):
        before = set(tmp_path.glob("pairs/.making/shard-*"))
        options = dict(max_rows=max_rows, workers=WorkerSettings(partition=index, num_partitions=3))
        if index == 0 and max_rows is None:  # interrupted, and run again
            with pytest.raises(InputError, match="the server is down"):
                generate(NumberGenerator(100, is_failing=True), tmp_path / "pairs", **options)
        summary = generate(NumberGenerator(100), tmp_path / "pairs", **options)
        shards_of[index] = {path.name for path in set(tmp_path.glob("pairs/.making/shard-*")) - before}
        assert summary.unfinished == {2: (0, 1), 0: (1,), 1: ()}[index]
        assert (tmp_path / "pairs/data").exists() == (index == 1)
    own = [range(index, 10, 3) for index in (2, 0)]
    names = [{f"shard-{shard:06d}.parquet" for shard in shards} for shards in own]
    assert all(shards_of[index] <= some for index, some in zip((2, 0), names, strict=True))
    assert prompts_of(tmp_path / "pairs") == prompts_of(uninterrupted)[:max_rows]
    if max_rows is None:
        assert [shards_of[2], shards_of[0]] == names and rows_of(tmp_path / "pairs") == rows_of(uninterrupted)
        again = generate(NumberGenerator(100), tmp_path / "pairs", workers=WorkerSettings(0, None, 0, 2, 3))
        assert again.was_complete


def test_shards_of_partitions_without_a_shared_disk_are_copied_together(uninterrupted, tmp_path):
    for index in range(2):
        workers = WorkerSettings(partition=index, num_partitions=2)
        generate(NumberGenerator(100), tmp_path / f"node{index}", workers=workers)
    shutil.copytree(tmp_path / "node1/.making", tmp_path / "node0/.making", dirs_exist_ok=True)
    generate(NumberGenerator(100), tmp_path / "node0", workers=workers)
    assert rows_of(tmp_path / "node0") == rows_of(uninterrupted)


def test_partitions_run_at_the_same_time(uninterrupted, tmp_path):
    def run(index: int) -> GenerationSummary:
        workers = WorkerSettings(partition=index, num_partitions=4)
        return generate(NumberGenerator(100, pauses=0.02), tmp_path / "pairs", workers=workers)

    with ThreadPoolExecutor(4) as threads:
        summaries = list(threads.map(run, range(4)))
    assert any(not summary.unfinished for summary in summaries)
    assert rows_of(tmp_path / "pairs") == rows_of(uninterrupted)


def test_a_run_waits_for_partitions_and_few_items_are_shared(tmp_path):
    running = DatasetFolder(tmp_path / "pairs", {}, partition=(0, 2))
    with pytest.raises(InputError, match="another run is writing it"):
        DatasetFolder(tmp_path / "pairs", {}, partition=(0, 2))
    with pytest.raises(InputError, match="runs with --partition are writing it"):
        DatasetFolder(tmp_path / "pairs", {})
    running.close()
    for index in range(4):  # of one shard, three partitions would have nothing
        generate(NumberGenerator(4), tmp_path / "few", workers=WorkerSettings(partition=index, num_partitions=4))
    assert len(prompts_of(tmp_path / "few")) == sum(map(rows_of_item, range(4)))


def test_a_complete_dataset_is_kept_and_different_settings_are_refused(tmp_path):
    root = tmp_path / "pairs"
    run_generation(NumberGenerator(20), root, {"seed": 0, "model": "a"})
    before = rows_of(root)
    summary = run_generation(NumberGenerator(20), root, {"seed": 0, "model": "a"})
    assert summary.was_complete and rows_of(root) == before
    with pytest.raises(InputError, match='model was "a" and is now "b"'):
        run_generation(NumberGenerator(20), root, {"seed": 0, "model": "b"})
    assert rows_of(root) == before
    run_generation(NumberGenerator(10), root, {"seed": 0, "model": "b"}, overwrite=True)
    assert len(rows_of(root)) < len(before) and not (root / ".making").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"not ours")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="contains holiday.jpg"):
            generate(NumberGenerator(10), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(InputError, match="is a file"):
        generate(NumberGenerator(10), tmp_path / "holiday.jpg")


def test_two_runs_cannot_write_the_same_folder(tmp_path):
    folder = DatasetFolder(tmp_path / "pairs", {})
    with pytest.raises(InputError, match="another run is writing it"):
        DatasetFolder(tmp_path / "pairs", {})
    folder.close()
    DatasetFolder(tmp_path / "pairs", {}).close()


def test_no_rows_at_all_is_an_error_with_the_reasons(tmp_path):
    @dataclass(frozen=True)
    class EmptyGenerator(NumberGenerator):
        def open(self, rank: int):
            return lambda items: GeneratedRows([], {"too dark": len(items)})

    with pytest.raises(InputError, match=r"no rows were generated \(too dark: 8\)"):
        generate(EmptyGenerator(8), tmp_path / "pairs")


def test_a_full_disk_is_one_message(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from tests.test_generation import NumberGenerator, generate\n"
        "from utils.errors import exit_on_input_error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "with exit_on_input_error(): generate(NumberGenerator(100), Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pairs")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot be written (File too large). Finished shards are kept" in result.stderr
    assert not list((tmp_path / "pairs/.making").glob("*.unfinished"))


@pytest.mark.slow
def test_ray_gives_the_same_bytes_after_errors_and_killed_actors(uninterrupted, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    if not any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        with pytest.raises(InputError, match="--ray auto: no cluster can be reached"):
            generate(NumberGenerator(100), tmp_path / "pairs", workers=WorkerSettings(ray="auto"))
    marker, workers = tmp_path / "killed", WorkerSettings(2, ray="local")
    with ray_cluster("local"):  # both runs use it: starting one takes long
        with pytest.raises(InputError, match="the server is down"):
            generate(NumberGenerator(100, is_failing=True), tmp_path / "pairs", workers=workers)
        with pytest.raises(InputError, match="a worker needs 64 GPU, and no node has more than"):
            too_many = WorkerSettings(1, ray="local", gpus_per_worker=64)
            generate(NumberGenerator(100), tmp_path / "pairs", workers=too_many)
        with pytest.raises(InputError, match="a worker failed with TypeError"):
            generate(NumberGenerator(100, pauses="x"), tmp_path / "pairs", workers=workers)
        generator = NumberGenerator(100, killed_marker=str(marker), pauses=0.05)
        generate(generator, tmp_path / "pairs", workers=workers)
    assert marker.exists() and rows_of(tmp_path / "pairs") == rows_of(uninterrupted)


def test_ctrl_c_prints_how_to_resume(tmp_path, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(SystemExit) as error:
        generate(NumberGenerator(1000, pauses=0.1), tmp_path / "pairs")
    assert error.value.code == 130 and "run the same command again to resume" in capsys.readouterr().err
