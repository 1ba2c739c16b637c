"""guidance_curves.py as its user runs it, on a tiny editor."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from evaluation import guidance_curves
from evaluation.statistics import area_under_front
from tests.encoders import save_clip, save_dino
from tests.runs import TORCHRUN, run
from tests.test_metrics import save_samples
from utils.editing.editor_setup import open_editor
from utils.editing.flags import EditorOptions
from utils.editing.recommended import choose_best

SCALES = ["--image_guidance_scales", "1", "1.5", "--guidance_scales", "3"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All flags but --model and --output_dir."""
    folder = tmp_path_factory.mktemp("evaluation")
    encoders = [f"--clip_model={save_clip(folder / 'clip')}", f"--dino_model={save_dino(folder / 'dino')}"]
    data = f"--dataset_name={save_samples(folder / 'data')}"
    return [data, *encoders, *SCALES, "--steps=2", "--resolution=32", "--batch_size=2"]


def results_of(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name != "flags"}


def test_two_processes_and_a_resumed_run_give_the_same_table(flags, tiny_editor, tmp_path):
    assert guidance_curves.main([*flags, f"--model={tiny_editor}", f"--output_dir={tmp_path / 'one'}"]) == 0
    results = results_of(tmp_path / "one")
    assert [point["image_guidance_scale"] for point in results["points"]] == [1, 1.5]
    scores = [point["scores"] for point in results["points"]]
    assert {"clip_direction", "clip_image", "dino_target", "psnr", "inside_l1", "outside_ssim"} <= set(scores[0])
    places = [(score["clip_direction"], score["clip_image"]) for score in scores]
    assert results["area_under_front"]["editor"] == pytest.approx(area_under_front([*places, (0, 1)]), abs=1e-5)
    assert results["no_edit"]["source_l1"]["mean"] == 0 and results["no_edit"]["clip_image"]["mean"] == pytest.approx(1)
    assert Image.open(tmp_path / "one/curves.png").width > 500 and (tmp_path / "one/curves.pdf").exists()
    lines = [json.loads(line) for line in (tmp_path / "one/curves.jsonl").read_text().splitlines()]
    assert [line["clip_image"] for line in lines] == [score["clip_image"] for score in scores]

    shutil.copytree(tmp_path / "one/edits", tmp_path / "two/edits")  # as after a kill: some edits are missing
    left = sorted((tmp_path / "two").rglob("*.png"))
    for path in left[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in left[1::2]}
    run(
        "evaluation/guidance_curves.py",
        [*flags, f"--model={tiny_editor}", f"--output_dir={tmp_path / 'two'}"],
        TORCHRUN,
    )
    assert results_of(tmp_path / "two") == results
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_recommended_settings_are_used(flags, tiny_editor, tmp_path, capsys):
    """By the editor, its records and its card; the best by a criterion that the samples have."""
    editor = shutil.copytree(tiny_editor, tmp_path / "editor")
    (editor / "README.md").write_text(
        "pipe(\n    guidance_scale=7.0,\n    image_guidance_scale=1.5,\n)\nguidance_scale is 7\n"
    )
    more = [f"--model={editor}", f"--output_dir={tmp_path / 'out'}", "--recommend"]
    assert guidance_curves.main([*flags, *more]) == 0
    points = results_of(tmp_path / "out")["points"]
    best = max(points, key=lambda point: point["scores"]["psnr"])
    assert f"image_guidance_scale {best['image_guidance_scale']:g}" in capsys.readouterr().out
    found = open_editor(EditorOptions(str(editor))).recommended
    assert found == {"guidance_scale": 3, "image_guidance_scale": best["image_guidance_scale"], "steps": 2}
    card = (editor / "README.md").read_text()
    assert f"    guidance_scale=3,\n    image_guidance_scale={best['image_guidance_scale']:g},\n" in card
    (editor / "recommended.json").write_text("{}")
    with pytest.raises(Exception, match="recommended.json is damaged"):
        open_editor(EditorOptions(str(editor)))


def test_the_best_point():
    from evaluation.curves import CurvePoint

    def point(**scores: float) -> CurvePoint:
        return CurvePoint("x", {}, scores, {})

    followed, copied = point(clip_direction=0.2, clip_image=0.8), point(clip_direction=0.0, clip_image=1.0)
    against = point(clip_direction=-0.1, clip_image=0.9)
    assert choose_best([copied, followed, against], None) == (followed, "clip_product", pytest.approx(0.16))
    assert choose_best([point(l1=0.1), low := point(l1=0.05)], "l1") == (low, "l1", 0.05)
    with pytest.raises(Exception, match="no such score"):
        choose_best([point(l1=0.1)], "psnr")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image_guidance_scales", "-1"], "--image_guidance_scale -1.0: must be"),
        (["--recommend", "--model=me/editor"], "--model me/editor is not a folder"),
        (["--num_samples=0"], "--num_samples 0: must be at least 1"),
        (["--legacy"], "--legacy always uses 512 pixels"),
        (
            ["--dino_model=none", "--criterion=dino_target", "--recommend"],
            "--recommend by dino_target: the samples have no",
        ),
        (["--output_dir=setup.cfg/x", "--model=./missing"], "--model ./missing is not a folder or file"),
    ],
)
def test_mistakes_are_named(more, message, flags, tiny_editor, tmp_path, capsys):
    with pytest.raises(SystemExit):
        guidance_curves.main([*flags, f"--model={tiny_editor}", f"--output_dir={tmp_path}", *more])
    assert message in capsys.readouterr().err
