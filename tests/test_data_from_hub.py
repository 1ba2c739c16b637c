"""Photographs and captions of a Hub dataset: the scripts as processes against the local Hub server."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

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


@pytest.fixture
def hub(tmp_path: Path):
    """A Hub with user/park: three photographs with captions under "photo" and "words", by cc-by-4.0."""
    folder = tmp_path / "park"
    folder.mkdir()
    rows = {
        "photo": [Image.new("RGB", (96, 72), colour) for colour in ("red", "green", "blue")],
        "words": ["a red bench", "a green bench", "a blue bench"],
        "id": ["r", "g", "b"],
    }
    datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).to_parquet(str(folder / "train.parquet"))
    (folder / "README.md").write_text(CARD)
    with hub_server(tmp_path / "hub") as served:
        environment = served.environment(tmp_path / "push-cache", token="write-token")
        subprocess.run([sys.executable, "-c", PUSH, str(folder)], env=environment, check=True, capture_output=True)
        yield served


def run(hub: Hub, tmp_path: Path, script: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "data_preparation" / script), "--data_root", str(tmp_path / "made")]
    environment = hub.environment(tmp_path / "cache")
    return subprocess.run([*command, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True)


def rows_of(tmp_path: Path) -> list[dict]:
    return [
        row for file in sorted((tmp_path / "made/data").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_photographs_of_a_hub_dataset(hub: Hub, tmp_path: Path):
    result = run(
        hub, tmp_path, "generate_dataset.py", "--dataset_id", "user/park", "--task", "jpeg", "--num_workers", "2"
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path)
    assert sorted(row["source"] for row in rows) == ["b", "g", "r"]
    assert {(row["source_dataset"], row["source_license"]) for row in rows} == {("user/park", "cc-by-4.0")}


def test_a_commit_of_a_hub_dataset_is_taken_and_an_absent_one_told(hub: Hub, tmp_path: Path):
    commit = next(repo for repo in hub.repos.values() if repo.id == "user/park").commits[-1][0]
    flags = ["--dataset_id", "user/park", "--task", "colorize", "--max_num_samples", "1"]
    assert run(hub, tmp_path, "generate_dataset.py", *flags, "--revision", commit).returncode == 0
    refused = run(hub, tmp_path, "generate_dataset.py", *flags, "--revision", "nowhere", "--overwrite")
    assert refused.returncode == 2 and "nowhere" in refused.stderr and "Traceback" not in refused.stderr


def test_captions_of_a_hub_dataset(hub: Hub, tmp_path: Path):
    from tests.chat_server import chat_server

    with chat_server() as served:
        result = run(
            hub,
            tmp_path,
            "generate_captions.py",
            "--captions",
            "user/park",
            "--caption_column",
            "words",
            "--base_url",
            served.url,
            "--model",
            "echo",
        )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path)
    assert sorted(row["caption"] for row in rows) == ["a blue bench", "a green bench", "a red bench"]
    assert {(row["source_dataset"], row["source_license"]) for row in rows} == {("user/park", "cc-by-4.0")}
    assert {json.loads(row["model"])["id"] for row in rows} == {"echo"}


def test_an_id_that_does_not_exist(hub: Hub, tmp_path: Path):
    result = run(hub, tmp_path, "generate_dataset.py", "--dataset_id", "user/nothing", "--task", "jpeg")
    assert result.returncode == 2 and "user/nothing" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "made").exists()


def test_the_commands_of_instruction_tuned_sd_run_as_they_stand(hub: Hub, tmp_path: Path):
    """Without a flag Imagenette is taken and cartoonized into cartoonizer-dataset, which the export takes."""
    kind, park = next((key.split("/")[0], repo) for key, repo in hub.repos.items() if repo.id == "user/park")
    hub.repos[f"{kind}/frgfm/imagenette"] = replace(park, id="frgfm/imagenette")
    environment = hub.environment(tmp_path / "cache", token="write-token")
    for script in ("generate_dataset.py", "export_to_hub.py"):
        command = [sys.executable, str(REPOSITORY / "data_preparation" / script)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    files = next(repo for repo in hub.repos.values() if repo.id == "user/cartoonizer-dataset").files
    assert "README.md" in files and any(name.startswith("data/train-") for name in files)
    rows = pq.read_table(tmp_path / "cartoonizer-dataset/data").to_pylist()
    assert [row["task"] for row in rows] == ["cartoonize"] * 3
    assert {row["source_dataset"] for row in rows} == {"frgfm/imagenette"}
