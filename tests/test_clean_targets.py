"""Photographs that have the flaw which a restoration task removes are no targets of it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_preparation.photographs import fit_image, read_photograph, seeded_rng
from data_preparation.tasks.clean_targets import TARGET_RULES, find_flaw
from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.tasks.plan import LOW_LEVEL_TASKS
from tests.test_generate_dataset import generate

PHOTOS = Path(__file__).parent.parent / "assets" / "photos"
NAMES = ("astronaut", "cat", "coffee", "raccoon", "garden_2", "city_2", "meadow_3", "quay_1", "dandelion", "park_1")
FLAWS = {
    "derain": "too rainy",
    "denoise": "too noisy",
    "deblur": "too blurred",
    "dehaze": "too hazy",
    "low_light": "too dark",
    "sharpen": "too blurred",
    "colorize": "too grey",
    "super_resolve": "too blurred",
    "jpeg": "too blocky",
}


@pytest.mark.parametrize("side", [128, 256, 512])
def test_good_photographs_suit_every_task(side):
    for name in NAMES:
        stored = read_photograph(PHOTOS / f"{name}.jpg")
        for task in (*LOW_LEVEL_TASKS, "identity", "cartoonize"):
            assert find_flaw(task, fit_image(stored, side), stored) is None, (name, task)


@pytest.mark.parametrize("task", FLAWS)
def test_degraded_photographs_are_no_targets_of_their_task(task):
    flaws = []
    for row, name in enumerate(NAMES):
        clean = fit_image(read_photograph(PHOTOS / f"{name}.jpg"), 256)
        degraded = DEGRADATIONS[task](clean, seeded_rng(0, row))[0]
        flaws.append(find_flaw(task, degraded, degraded))
        assert find_flaw("identity", degraded, degraded) is None
    # Those that are hardly degraded pass; many at low resolution are as sharp as a soft photograph.
    share = 0.3 if task == "super_resolve" else 0.6
    assert sum(flaw is not None for flaw in flaws) >= share * len(NAMES), flaws
    assert f"{FLAWS[task]} for {task}" in flaws


def test_every_restoration_has_a_measure():
    assert TARGET_RULES.keys() == set(LOW_LEVEL_TASKS)


def test_blocks_are_found_after_cropping():
    photograph = read_photograph(PHOTOS / "astronaut.jpg")
    _, file = cv2.imencode(".jpg", photograph, [cv2.IMWRITE_JPEG_QUALITY, 8])
    blocky = cv2.imdecode(file, cv2.IMREAD_COLOR)
    assert find_flaw("jpeg", photograph, blocky[3:, 5:]) == "too blocky for jpeg"
    assert find_flaw("jpeg", blocky, photograph) is None, "the stored photograph decides"


def test_uniform_images_are_measured_without_warnings(recwarn):
    for value in (0, 128, 255):
        image = np.full((64, 80, 3), value, np.uint8)
        assert find_flaw("denoise", image, image) is None
        assert find_flaw("deblur", image, image) == "too blurred for deblur"
        assert find_flaw("derain", image, image) in (None, "too hazy for derain")
    assert not recwarn.list


def save_photographs(folder: Path) -> None:
    folder.mkdir()
    good = fit_image(read_photograph(PHOTOS / "coffee.jpg"), 256)
    grey = cv2.cvtColor(cv2.cvtColor(good, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    for name, image in {"good": good, "grey": grey, "dark": good // 4}.items():
        Image.fromarray(image).save(folder / f"private {name}.png")


def test_photographs_are_skipped_for_one_task_only(tmp_path, capsys):
    """The summary and the manifest count the reasons, without names of files."""
    save_photographs(tmp_path / "photos")
    flags = ["--dataset_id", str(tmp_path / "photos"), "--resolution", "128", "--max_num_samples", "30"]
    rows = generate(tmp_path / "pairs", *flags, "--task", "colorize", "low_light", "identity")
    used = {}
    for row in rows:
        used.setdefault(row["task"], set()).add(row["source"].removeprefix("private ").removesuffix(".png"))
    assert len(rows) == 30
    assert used == {"colorize": {"good", "dark"}, "low_light": {"good", "grey"}, "identity": {"good", "grey", "dark"}}
    output, manifest = capsys.readouterr().out, (tmp_path / "pairs/manifest.json").read_text()
    for reason in ("photograph too grey for colorize", "photograph too dark for low_light"):
        assert f"rejected, {reason}: " in output and json.loads(manifest)["rejected"][reason] > 0
    assert "private" not in manifest


def test_without_any_clean_photograph_there_is_no_row(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80), "gray").save(tmp_path / "photos/gray.png")
    flags = ["--dataset_id", str(tmp_path / "photos"), "--max_num_samples", "2"]
    with pytest.raises(SystemExit):
        generate(tmp_path / "pairs", *flags, "--task", "colorize")
    assert "no photograph for colorize in 20 tries" in capsys.readouterr().err
    assert len(generate(tmp_path / "others", *flags, "--task", "identity")) == 2
