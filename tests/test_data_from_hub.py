"""Photographs and captions from a dataset on the Hub: the scripts as processes against the local Hub server."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.chat_server import chat_server
from tests.hub_server import Hub, hub_server

REPOSITORY = Path(__file__).resolve().parents[1]
CARD = """---
license: cc-by-4.0
configs:
- config_name: full_size
  data_files: train.parquet
---
Photographs of a park.
"""
PUSH = """
import sys
from huggingface_hub import HfApi

api = HfApi()
api.create_repo("user/park", repo_type="dataset")
api.upload_folder(repo_id="user/park", repo_type="dataset", folder_path=sys.argv[1])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """A Hub with user/park: three photographs in column "photo", captions in column "words", licence cc-by-4.0."""
    folder = tmp_path_factory.mktemp("park")
    rows = {
        "photo": [Image.new("RGB", (96, 72), colour) for colour in ("red", "green", "blue")],
        "words": ["a red bench", "a green bench", "a blue bench"],
        "id": ["r", "g", "b"],
    }
    datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).to_parquet(str(folder / "train.parquet"))
    (folder / "README.md").write_text(CARD)
    with hub_server(tmp_path_factory.mktemp("hub")) as served:
        environment = served.environment(tmp_path_factory.mktemp("push-cache"), token="write-token")
        subprocess.run([sys.executable, "-c", PUSH, str(folder)], env=environment, check=True, capture_output=True)
        yield served


def run(hub: Hub, tmp_path: Path, script: str, *flags: str, token: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "data_preparation" / script), *flags]
    environment = hub.environment(tmp_path / "cache", token=token)
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


def read(data_root: Path) -> list[dict]:
    return pq.read_table(data_root / "data").to_pylist()


def test_photographs_at_a_commit(hub: Hub, tmp_path: Path):
    commit = next(repo for repo in hub.repos.values() if repo.id == "user/park").commits[-1][0]
    flags = ["--dataset_id", "user/park", "--revision", commit, "--task", "jpeg", "--num_workers", "2"]
    result = run(hub, tmp_path, "generate_dataset.py", *flags, "--data_root", "pairs")
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "pairs")
    assert sorted(row["source"] for row in rows) == ["b", "g", "r"]
    assert {(row["source_dataset"], row["source_license"]) for row in rows} == {("user/park", "cc-by-4.0")}


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--dataset_id=user/park", "--revision=nowhere"], "nowhere"), (["--dataset_id=user/nothing"], "user/nothing")],
    ids=["revision", "id"],
)
def test_missing_revision_or_dataset(flags: list[str], word: str, hub: Hub, tmp_path: Path):
    result = run(hub, tmp_path, "generate_dataset.py", *flags, "--task=jpeg", "--data_root=pairs")
    assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "pairs").exists()


def test_captions(hub: Hub, tmp_path: Path):
    with chat_server() as served:
        flags = ["--captions=user/park", "--caption_column=words", f"--base_url={served.url}", "--model=echo"]
        result = run(hub, tmp_path, "generate_captions.py", *flags, "--data_root=triples")
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "triples")
    assert sorted(row["caption"] for row in rows) == ["a blue bench", "a green bench", "a red bench"]
    assert {(row["source_dataset"], row["source_license"]) for row in rows} == {("user/park", "cc-by-4.0")}
    assert {json.loads(row["model"])["id"] for row in rows} == {"echo"}


def test_commands_of_instruction_tuned_sd_without_flags(hub: Hub, tmp_path: Path):
    """The defaults cartoonize a dataset into cartoonizer-dataset and push it."""
    for script, flags in (("generate_dataset.py", ["--dataset_id=user/park"]), ("export_to_hub.py", [])):
        result = run(hub, tmp_path, script, *flags, token="write-token")
        assert result.returncode == 0, result.stderr
    files = next(repo for repo in hub.repos.values() if repo.id == "user/cartoonizer-dataset").files
    assert "README.md" in files and any(name.startswith("data/train-") for name in files)
    rows = read(tmp_path / "cartoonizer-dataset")
    assert [row["task"] for row in rows] == ["cartoonize"] * 3
    assert {row["source_dataset"] for row in rows} == {"user/park"}
