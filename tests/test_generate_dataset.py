"""Pairs are exact, the same for a seed, and bad input gets one clear message."""

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_preparation import generate_dataset
from data_preparation.instructions import read_phrasings
from data_preparation.photographs import fit_picture, read_photograph
from data_preparation.tasks.plan import LOW_LEVEL
from data_preparation.toy_edits import EDITS, exact_results
from tests.killing import rows_of, survive

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "assets" / "photos"


def generate(data_root: Path, *flags: str) -> list[dict]:
    """Run the script's main and read all rows back, images as arrays."""
    defaults = ["--dataset_id", str(PHOTOS), "--task", "all", "--max_num_samples", "24", "--resolution", "64"]
    assert generate_dataset.main([*defaults, "--data_root", str(data_root), *flags]) == 0
    return read_back(data_root)


def read_back(data_root: Path) -> list[dict]:
    rows = [row for path in sorted((data_root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        for name in ("original_image", "edited_image"):
            row[name] = np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))
        row["settings"] = json.loads(row["settings"])
    return rows


def refused(data_root: Path, *flags: str, photos: Path = PHOTOS) -> str:
    """What a run that must fail says on stderr."""
    command = [sys.executable, str(ROOT / "data_preparation" / "generate_dataset.py"), "--dataset_id", str(photos)]
    result = subprocess.run(
        [*command, "--data_root", str(data_root), *flags], capture_output=True, text=True, cwd=data_root.parent
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert not data_root.exists()
    return result.stderr


def test_every_pair_of_the_toy_is_exact_and_says_what_it_is(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "toy", "--heldout_phrasings", "3", "--crop", "random")
    assert len(rows) == 24 and {row["task"] for row in rows} <= set(EDITS)
    for row in rows:
        assert row["original_image"].shape == (64, 64, 3)
        assert np.array_equal(row["edited_image"], EDITS[row["task"]](row["original_image"]))
        assert row["edit_prompt"] in read_phrasings(f"toy/{row['task']}", 3)[0]
        assert row["phrasing"] == "train" and (PHOTOS / row["source"]).exists()
        assert row["source_license"] in ("CC0-1.0", "Public domain") and row["source_dataset"] == "photos"


def test_a_degradation_can_be_made_again_from_the_row(tmp_path):
    """The clean photograph is the edited image, and what was drawn is in the row."""
    rows = generate(tmp_path / "pairs", "--task", "low_level", "identity", "--max_num_samples", "40")
    assert {row["task"] for row in rows} <= set(LOW_LEVEL) | {"identity"} and len({row["task"] for row in rows}) > 7
    for row in rows:
        is_same = np.array_equal(row["original_image"], row["edited_image"])
        assert is_same == (row["task"] == "identity"), row["task"]
        clean = fit_picture(read_photograph(PHOTOS / row["source"]), 64)
        assert np.array_equal(row["edited_image"], clean)
        assert row["settings"].keys() - {"teacher"} or row["task"] in ("identity", "colorize")
        assert row["edit_prompt"] in read_phrasings(row["task"], 10)[0]


def test_weights_are_shares_of_the_rows(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "identity=3", "jpeg", "--max_num_samples", "400")
    share = sum(row["task"] == "identity" for row in rows) / len(rows)
    assert 0.67 < share < 0.83


def test_every_photograph_comes_up_once_before_one_comes_up_twice(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "identity", "--split", "all", "--max_num_samples", "100")
    sources = [row["source"] for row in rows]
    count = len(list(PHOTOS.glob("*.jpg")))
    assert len(set(sources[:count])) == count and sources[:count] != sorted(sources[:count])
    assert (
        len(
            generate(
                tmp_path / "one-each",
                "--task",
                "identity",
                "--split",
                "all",
                "--overwrite",
                "--max_num_samples",
                str(count),
            )
        )
        == count
    )


def test_same_seed_same_rows_and_a_longer_set_begins_with_them(tmp_path):
    first, longer = generate(tmp_path / "a"), generate(tmp_path / "b", "--max_num_samples", "30")
    other = generate(tmp_path / "c", "--seed", "1")
    for one, two in zip(first, longer, strict=False):
        assert one["edit_prompt"] == two["edit_prompt"] and np.array_equal(one["original_image"], two["original_image"])
    assert [row["edit_prompt"] for row in first] != [row["edit_prompt"] for row in other]


def test_splits_share_no_photograph_and_phrasings_are_kept_apart(tmp_path):
    split = {
        row["file_name"]: row["split"] for row in map(json.loads, (PHOTOS / "metadata.jsonl").read_text().splitlines())
    }
    train = generate(tmp_path / "train", "--task", "toy")
    heldout = generate(tmp_path / "heldout", "--task", "toy", "--split", "heldout", "--phrasings", "both")
    assert {split[row["source"]] for row in train} == {"train"}
    assert {split[row["source"]] for row in heldout} == {"heldout"}
    assert {row["phrasing"] for row in train} == {"train"} and {row["phrasing"] for row in heldout} == {
        "train",
        "heldout",
    }
    for row in heldout:
        assert row["edit_prompt"] in read_phrasings(f"toy/{row['task']}", 3)[row["phrasing"] == "heldout"]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_photographs_may_lie_in_a_dataset(kind, tmp_path):
    pictures = [Image.open(PHOTOS / name) for name in ("cat.jpg", "astronaut.jpg")]
    rows = datasets.Dataset.from_dict({"photo": pictures, "id": ["the cat", "the astronaut"]}).cast_column(
        "photo", datasets.Image()
    )
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "photos"))
    else:
        (tmp_path / "photos").mkdir()
        rows.to_parquet(str(tmp_path / "photos/train.parquet"))
    made = generate(
        tmp_path / "pairs",
        "--dataset_id",
        str(tmp_path / "photos"),
        "--max_num_samples",
        "2",
        "--task",
        "colorize",
        "--source_license",
        "cc-by-4.0",
    )
    assert {row["source"] for row in made} == {"the cat", "the astronaut"}
    assert {row["source_license"] for row in made} == {"cc-by-4.0"}
    cat = next(row for row in made if row["source"] == "the cat")
    assert np.array_equal(cat["edited_image"], fit_picture(np.asarray(pictures[0].convert("RGB")), 64))


def test_the_view_is_kept_unless_a_crop_is_asked_for(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "wide.png")
    shapes = {
        crop: generate(
            tmp_path / crop,
            "--dataset_id",
            str(tmp_path / "wide.png").rsplit("/", 1)[0],
            "--crop",
            crop,
            "--max_num_samples",
            "1",
            "--resolution",
            "128",
        )[0]["edited_image"].shape[:2]
        for crop in ("none", "square")
    }
    assert shapes == {"none": (128, 192), "square": (128, 128)}


@pytest.mark.slow
def test_killed_twenty_times_the_rows_are_the_same(tmp_path):
    flags = ["--dataset_id", PHOTOS, "--task", "all", "--max_num_samples", 100, "--resolution", 64]
    result = survive("data_preparation.generate_dataset", flags, tmp_path, 20, ("datasets", "cv2", "pyarrow.parquet"))
    assert result["kills"] == 20
    for root in result["sets"]:
        assert rows_of(Path(root)) == rows_of(Path(result["whole"]))


@pytest.mark.parametrize("resolution", [64, 72, 256])
def test_edits_keep_size_and_type_and_differ_from_one_another(resolution):
    image = np.asarray(Image.open(PHOTOS / "astronaut.jpg").resize((resolution, resolution)))
    before = image.copy()
    results = {"input": image, **exact_results(image)}
    assert np.array_equal(image, before)
    for name, result in results.items():
        assert result.dtype == np.uint8 and result.shape == image.shape
        for other_name, other in results.items():
            if name != other_name:
                error = np.mean((result.astype(float) - other) ** 2)
                assert 10 * np.log10(255**2 / error) < 23, (name, other_name)


def test_bad_images_are_counted_and_others_take_their_places(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "empty.png").write_bytes(b"")
    Image.new("L", (90, 70), 90).save(photos / "good.png")
    rows = generate(tmp_path / "pairs", "--dataset_id", str(photos))
    assert len(rows) == 24 and {row["source"] for row in rows} == {"good.png"}
    said = capsys.readouterr().out
    assert "photograph cut.jpg not an image" in said and "photograph empty.png empty file" in said


def test_another_run_goes_on_or_is_refused(tmp_path, capsys):
    before = generate(tmp_path / "pairs")
    generate(tmp_path / "pairs")
    assert "made before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate(tmp_path / "pairs", "--resolution", "72")
    assert "resolution was 64 and is now 72" in capsys.readouterr().err
    assert len(read_back(tmp_path / "pairs")) == len(before)
    assert len(generate(tmp_path / "pairs", "--overwrite", "--max_num_samples", "2")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_all_mistakes_in_flags_are_told_at_once(tmp_path):
    flags = [
        "--task",
        "paint",
        "sepia=-1",
        "--resolution",
        "65",
        "--max_num_samples",
        "0",
        "--seed",
        "-1",
        "--teacher_range",
        "1",
        "--teacher",
        "onnx:nowhere.onnx",
    ]
    message = refused(tmp_path / "pairs", *flags)
    for part in (
        "--task paint: unknown",
        "--task sepia=-1",
        "--resolution 65",
        "--max_num_samples 0",
        "--seed -1",
        "--teacher_range 1",
        "there is no file nowhere.onnx",
    ):
        assert part in message
    assert "there is no folder" in refused(tmp_path / "pairs", "--task", "jpeg", photos=tmp_path / "nowhere")


def test_no_images_is_one_message(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "holds no image" in refused(tmp_path / "pairs", "--task", "all", photos=tmp_path / "photos")
