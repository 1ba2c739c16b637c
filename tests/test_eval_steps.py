"""--eval_steps: edits of rows that are not trained on, scored, logged, drawn, and decisive for --save_best."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from tests.pairs import save_pairs
from tests.runs import TORCHRUN, run, training_flags, weights_of
from utils.data.geometry import Geometry, prepare_pair
from utils.data.sources import open_source
from utils.editing.edit_images import SamplingSettings, edit_images
from utils.pixel_metrics import pixel_scores

TRAIN = train_instruct_pix2pix.main
SAMPLING = ("--validation_num_inference_steps=2", "--validation_guidance_scale=2", "--report_to=tensorboard")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


def evaluations(folder: Path) -> dict[int, dict]:
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "eval_psnr" in entry}


def test_the_scores_are_those_of_the_published_editor(tiny_base, pairs, tmp_path):
    """Every two steps and at the end, with the averaged weights; the card states them."""
    flags = ("--eval_steps=2", f"--eval_dataset={pairs}", "--eval_samples=3", "--use_ema", *SAMPLING)
    out = tmp_path / "out"
    assert TRAIN(training_flags(tiny_base, pairs, out, *flags, "--max_train_steps=3")) == 0
    found = evaluations(out)
    assert list(found) == [2, 3]
    source, geometry = open_source(str(pairs)), Geometry(32, center_crop=True)
    rows = [source.rows[row] for row in (0, 2, 4)]
    prepared = [prepare_pair(row["original_image"], row["edited_image"], geometry) for row in rows]
    originals, targets = (
        [getattr(pair, side).transpose(1, 2, 0) for pair in prepared] for side in ("original", "edited")
    )
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(out)
    edits = edit_images(
        pipeline,
        [Image.fromarray(pixels) for pixels in originals],
        [row["edit_prompt"] for row in rows],
        [3, 4, 5],
        SamplingSettings(2, 2.0, 1.5),
    )
    scores = [pixel_scores(np.asarray(edit), target) for edit, target in zip(edits, targets, strict=True)]
    for name in ("psnr", "ssim", "l1"):
        assert found[3][f"eval_{name}"] == pytest.approx(np.mean([score[name] for score in scores]), rel=1e-3)
    no_edit = [pixel_scores(a, b)["psnr"] for a, b in zip(originals, targets, strict=True)]
    assert found[3]["eval_no_edit_psnr"] == pytest.approx(np.mean(no_edit))
    assert Image.open(out / "validation/eval-step-3.png").height > 3 * 128
    assert "PSNR of held-out edits (dB)" in (out / "README.md").read_text()


def test_the_best_edits_are_published(tiny_base, pairs, tmp_path):
    """By the score that is asked for, also after resuming; training itself is not changed."""
    flags = ("--validation_split=0.3", "--learning_rate=0.05", *SAMPLING)
    evaluated = (*flags, "--eval_steps=1", "--save_best=psnr", "--checkpointing_steps=2")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "plain", *flags)) == 0
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *evaluated)) == 0
    found = {step: entry["eval_psnr"] for step, entry in evaluations(tmp_path / "out").items()}
    best = json.loads((tmp_path / "out/checkpoint-best/best.json").read_text())
    assert best["global_step"] == max(found, key=found.get) and best["eval_psnr"] == max(found.values())
    assert f"{max(found.values()):.4g}"[:4] in (tmp_path / "out/README.md").read_text()
    assert weights_of(tmp_path / "out/unet") == weights_of(tmp_path / "out/checkpoint-best/unet")
    assert weights_of(tmp_path / "out/checkpoint-4/unet") == weights_of(tmp_path / "plain/unet")
    resumed = (*evaluated, "--resume_from_checkpoint=checkpoint-2")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *resumed)) == 0
    assert {step: entry["eval_psnr"] for step, entry in evaluations(tmp_path / "out").items()} == found


def test_two_processes_and_sdxl(tiny_base, tiny_sdxl, pairs, tmp_path):
    flags = ("--eval_steps=1", f"--eval_dataset={pairs}", "--eval_samples=2", *SAMPLING)
    one = training_flags(tiny_base, pairs, tmp_path / "one", *flags, "--max_train_steps=1")
    assert TRAIN([*one, "--gradient_accumulation_steps=2"]) == 0
    two = training_flags(tiny_base, pairs, tmp_path / "two", *flags, "--max_train_steps=1")
    run("train_instruct_pix2pix.py", two, TORCHRUN)
    assert evaluations(tmp_path / "two")[1]["eval_psnr"] == pytest.approx(
        evaluations(tmp_path / "one")[1]["eval_psnr"], rel=1e-3
    )
    xl = training_flags(tiny_sdxl, pairs, tmp_path / "xl", *flags, "--max_train_steps=1")
    assert train_instruct_pix2pix_sdxl.main(xl) == 0
    assert np.isfinite(evaluations(tmp_path / "xl")[1]["eval_psnr"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_steps=2"], "--eval_steps needs rows"),
        (["--save_best=psnr", "--validation_split=0.2"], "--save_best psnr is a score of --eval_steps"),
        (["--eval_dataset=x"], "--eval_dataset has the rows of --eval_steps"),
        (["--eval_steps=1", "--eval_dataset=./none"], "./none does not exist"),
    ],
)
def test_mistakes_are_named(flags, message, tiny_base, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags))
    assert message in capsys.readouterr().err
