"""infer.py --best_of: the edit that the judge likes best, of all seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from evaluation.feature_metrics import load_image_text_encoder
from tests.chat_server import chat_server
from tests.encoders import save_clip
from tests.pairs import make_image
from tests.test_judge import seen
from utils.editing.records import read_record


@pytest.fixture(scope="module")
def flags(tiny_editor, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All flags but --output and those of the judge."""
    folder = tmp_path_factory.mktemp("best")
    make_image(5, (64, 64)).save(folder / "photo.png")
    model = ["--model", str(tiny_editor), "--input", str(folder / "photo.png"), "--edit", "make it red"]
    return [*model, "--steps", "2", "--seed", "10", "--resolution", "64", "--batch_size", "2"]


def test_clip_chooses(flags, tmp_path, capsys):
    """Among the edits that single runs give; a second run keeps the file."""
    clip, out = save_clip(tmp_path / "clip"), tmp_path / "best.png"
    chosen = [*flags, "--output", str(out), "--best_of", "4", "--judge", "clip_text", "--judge_model", str(clip)]
    assert infer.main(chosen) == 0
    edits = []
    for seed in range(10, 14):
        assert infer.main([*flags, "--seed", str(seed), "--output", str(tmp_path / f"{seed}.png")]) == 0
        edits.append(Image.open(tmp_path / f"{seed}.png").convert("RGB"))
    encoder = load_image_text_encoder(str(clip), "cpu")
    scores = (
        torch.stack([encoder.encode_images([edit])[0] for edit in edits]) @ encoder.encode_texts(["make it red"])[0]
    )
    record = read_record(out)
    assert record["seed"] == 10 + int(scores.argmax()) and record["best_of"]["judge"] == "clip_text"
    assert record["best_of"]["score"] == pytest.approx(float(scores.max()), abs=1e-3)
    difference = np.asarray(Image.open(out), int) - np.asarray(edits[int(scores.argmax())], int)
    assert np.abs(difference).max() <= 1  # the last bits depend on the batch
    before = out.read_bytes()
    assert infer.main(chosen) == 0 and out.read_bytes() == before
    assert "1 already finished" in capsys.readouterr().out


def test_a_vision_model_chooses(flags, tmp_path):
    """The darkest edit, for a judge that likes it dark."""

    def dark(parts: list[dict], body: dict) -> str:
        edit = seen(parts)[1][1]
        value = 10 - edit.mean() / 25.6
        return json.dumps(dict.fromkeys(("success", "overediting", "naturalness", "artefacts"), value))

    out = ["--output", str(tmp_path / "best.png"), "--num_images", "2"]
    with chat_server(reply=dark) as server:
        judge = ["--judge", server.url, "--judge_model", "echo", "--best_of", "3"]
        assert infer.main([*flags, *out, *judge]) == 0
        assert len(server.requests) == 6
    records = [read_record(path) for path in sorted(Path(tmp_path).rglob("*.png"))]
    assert len(records) == 2 and records[0]["seed"] in (10, 11, 12) and records[1]["seed"] in (13, 14, 15)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--best_of", "1"], "--best_of 1: must be from 2"),
        (["--judge", "clip_text"], "add --best_of N"),
        (["--best_of", "2", "--judge", "beauty"], "--judge beauty: give clip_text"),
        (["--best_of", "2", "--judge", "http://localhost:1"], "give the name of its model"),
    ],
)
def test_mistakes_are_named(more, message, flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        infer.main([*flags, "--output", str(tmp_path / "x.png"), *more])
    assert message in capsys.readouterr().err
