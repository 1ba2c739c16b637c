"""The photographs and the toy model in assets/, and the demo."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import demo
from data_preparation.photographs import centre_square, list_photographs, read_photograph
from data_preparation.toy_edits import EDITS
from tests.runs import ENVIRONMENT, REPOSITORY

PHOTOS, BASE = REPOSITORY / "assets/photos", REPOSITORY / "assets/toy-sd"
ROWS = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def toy() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)


def test_every_photograph_has_a_free_licence_and_a_source():
    assert {row["file_name"] for row in ROWS} == {path.name for path in PHOTOS.glob("*.jpg")} and len(ROWS) >= 16
    licences = (PHOTOS / "LICENSES.md").read_text()
    for row in ROWS:
        assert row["licence"] in ("CC0-1.0", "Public domain") and row["source"] and row["file_name"] in licences


def test_no_scene_is_in_both_splits():
    scenes = {
        split: {re.sub(r"_?\d*\.jpg$", "", row["file_name"]) for row in ROWS if row["split"] == split}
        for split in ("train", "heldout")
    }
    assert len(scenes["heldout"]) >= 5 and not scenes["train"] & scenes["heldout"]
    sources = {split: {row["source"] for row in ROWS if row["split"] == split} for split in ("train", "heldout")}
    assert not sources["train"] & sources["heldout"]


def test_the_toy_model_is_small_and_complete(toy):
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 8_000_000
    assert toy.unet.config.in_channels == 4
    image = toy("a cartoon of a cat", height=64, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


@torch.no_grad()
def test_the_autoencoder_reconstructs_held_out_photographs(toy):
    images = [centre_square(read_photograph(path), 64) for path in list_photographs(PHOTOS, "heldout")]
    pixels = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in images]).float() / 127.5 - 1  # (N, 3, 64, 64)
    decoded = toy.vae.decode(toy.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 26


@pytest.mark.slow
def test_the_demo_deletes_nothing_of_others(tmp_path: Path, capsys):
    """Folders of its names that it did not make are kept."""
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor/thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        demo.main([f"--output={tmp_path}"])
    assert "not known to be the demo's (editor)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main([f"--output={tmp_path / 'editor/thesis.txt'}", "--steps=0"])
    message = capsys.readouterr().err
    assert "is a file: name a folder" in message and "--steps 0: must be at least 1" in message
    with pytest.raises(SystemExit):
        demo.main([f"--output={tmp_path / 'editor/thesis.txt/below/it'}"])
    assert "cannot be written: Not a directory; name another folder" in capsys.readouterr().err
    assert (tmp_path / "editor/thesis.txt").read_text() == "years of work"


def test_short_demo(tmp_path: Path):
    """`make demo` with a tenth of its steps: most edits are already correct."""
    command = [sys.executable, "demo.py", "--output", str(tmp_path), "--pairs", "400", "--steps", "200"]
    run = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    for kind in ("train", "heldout"):
        assert scores[kind]["accuracy"] > 0.5 and scores[kind]["psnr"] > scores[kind]["no_edit_psnr"] + 2
        assert scores[kind]["tasks"].keys() == EDITS.keys()
    assert (tmp_path / "editor/model_index.json").exists() and list((tmp_path / "pairs").rglob("*.parquet"))
    assert Image.open(tmp_path / "grid.png").width > 1000 and Image.open(tmp_path / "training_curve.png").width > 500
