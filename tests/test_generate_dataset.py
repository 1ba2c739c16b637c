"""generate_dataset.py: exact and reproducible pairs, and one clear message for bad input."""

import io
import json
import shutil
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
from data_preparation.photographs import fit_image, read_photograph
from data_preparation.tasks.plan import LOW_LEVEL_TASKS
from data_preparation.toy_edits import EDITS, exact_results
from tests.killing import kill_and_resume, rows_of

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "assets" / "photos"


def generate(data_root: Path, *flags: str) -> list[dict]:
    """Run the main function of the script and read all rows, with images as arrays."""
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


def test_toy_pairs_are_exact_and_have_provenance(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "toy", "--heldout_phrasings", "3", "--crop", "random")
    assert len(rows) == 24 and {row["task"] for row in rows} <= set(EDITS)
    for row in rows:
        assert row["original_image"].shape == (64, 64, 3)
        assert np.array_equal(row["edited_image"], EDITS[row["task"]](row["original_image"]))
        assert row["edit_prompt"] in read_phrasings(f"toy/{row['task']}", 3)[0]
        assert row["phrasing"] == "train" and (PHOTOS / row["source"]).exists()
        assert row["source_license"] in ("CC0-1.0", "Public domain") and row["source_dataset"] == "photos"


def test_degradation_pairs(tmp_path):
    """The clean photograph is the edited image, and the row has the drawn parameters."""
    rows = generate(tmp_path / "pairs", "--task", "low_level", "identity", "--max_num_samples", "40")
    assert {row["task"] for row in rows} <= set(LOW_LEVEL_TASKS) | {"identity"} and len(
        {row["task"] for row in rows}
    ) > 7
    for row in rows:
        is_same = np.array_equal(row["original_image"], row["edited_image"])
        assert is_same == (row["task"] == "identity"), row["task"]
        clean = fit_image(read_photograph(PHOTOS / row["source"]), 64)
        assert np.array_equal(row["edited_image"], clean)
        assert row["settings"].keys() - {"teacher"} or row["task"] in ("identity", "colorize")
        assert row["edit_prompt"] in read_phrasings(row["task"], 10)[0]


def test_weights_are_relative_shares_of_the_rows(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "identity=3", "jpeg", "--max_num_samples", "400")
    share = sum(row["task"] == "identity" for row in rows) / len(rows)
    assert 0.67 < share < 0.83


def test_every_photograph_is_used_once_per_epoch(tmp_path):
    rows = generate(tmp_path / "pairs", "--task", "identity", "--split", "all", "--max_num_samples", "100")
    sources = [row["source"] for row in rows]
    count = len(list(PHOTOS.glob("*.jpg")))
    assert len(set(sources[:count])) == count and sources[:count] != sorted(sources[:count])


def test_rows_depend_on_the_seed_and_not_on_the_number_of_rows(tmp_path):
    first, longer = generate(tmp_path / "a"), generate(tmp_path / "b", "--max_num_samples", "30")
    other = generate(tmp_path / "c", "--seed", "1")
    for one, two in zip(first, longer, strict=False):
        assert one["edit_prompt"] == two["edit_prompt"] and np.array_equal(one["original_image"], two["original_image"])
    assert [row["edit_prompt"] for row in first] != [row["edit_prompt"] for row in other]


def test_splits_of_photographs_and_phrasings(tmp_path):
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
def test_photographs_in_a_dataset(kind, tmp_path):
    images = [Image.open(PHOTOS / name) for name in ("cat.jpg", "astronaut.jpg")]
    rows = datasets.Dataset.from_dict({"photo": images, "id": ["the cat", "the astronaut"]}).cast_column(
        "photo", datasets.Image()
    )
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "photos"))
    else:
        (tmp_path / "photos").mkdir()
        rows.to_parquet(str(tmp_path / "photos/train.parquet"))
    flags = ["--max_num_samples=2", "--task=colorize", "--source_license=cc-by-4.0"]
    made = generate(tmp_path / "pairs", f"--dataset_id={tmp_path / 'photos'}", *flags)
    assert {row["source"] for row in made} == {"the cat", "the astronaut"}
    assert {row["source_license"] for row in made} == {"cc-by-4.0"}
    cat = next(row for row in made if row["source"] == "the cat")
    assert np.array_equal(cat["edited_image"], fit_image(np.asarray(images[0].convert("RGB")), 64))


def test_crop(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "wide.png")
    flags = [f"--dataset_id={tmp_path}", "--max_num_samples=1", "--resolution=128"]
    for crop, shape in (("none", (128, 192, 3)), ("square", (128, 128, 3))):
        (row,) = generate(tmp_path / crop, *flags, f"--crop={crop}")
        assert row["edited_image"].shape == shape


@pytest.mark.slow
def test_killed_runs_resume_with_the_same_rows(tmp_path):
    flags = ["--dataset_id", PHOTOS, "--task", "all", "--max_num_samples", 100, "--resolution", 64]
    imports = ("datasets", "cv2", "pyarrow.parquet")
    uninterrupted, outputs = kill_and_resume("data_preparation.generate_dataset", flags, tmp_path, 20, imports)
    assert all(rows_of(output) == rows_of(uninterrupted) for output in outputs)


@pytest.mark.parametrize("resolution", [64, 72, 256])
def test_toy_edits_keep_the_size_and_differ(resolution):
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


def test_unreadable_photographs_are_counted_and_replaced(tmp_path, capsys, caplog):
    """The counts, which are published, have no file names; the log has."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "empty.png").write_bytes(b"")
    Image.new("L", (90, 70), 90).save(photos / "good.png")
    rows = generate(tmp_path / "pairs", "--dataset_id", str(photos), "--task", "identity", "cartoonize")
    assert len(rows) == 24 and {row["source"] for row in rows} == {"good.png"}
    output = capsys.readouterr().out
    assert "photograph not an image" in output and "photograph empty file" in output
    manifest = (tmp_path / "pairs/manifest.json").read_text()
    assert "empty file" in manifest and "cut.jpg" not in manifest
    assert "photograph cut.jpg cannot be used: not an image" in caplog.text


def test_changed_instructions_are_noticed(tmp_path, capsys):
    """By their texts: as many others are another dataset."""
    (tmp_path / "task.txt").write_text("make it red\nmake it crimson\n")
    (tmp_path / "paint.py").write_text("def paint(image):\n    return 255 - image\n")
    flags = [f"--task={tmp_path / 'task.txt'}", f"--teacher=python:{tmp_path / 'paint.py'}:paint"]
    flags += ["--heldout_phrasings=0", "--max_num_samples=4"]
    generate(tmp_path / "out", *flags)
    (tmp_path / "task.txt").write_text("make it blue\nmake it crimson\n")
    with pytest.raises(SystemExit):
        generate(tmp_path / "out", *flags)
    assert "instructions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--dataset_id is missing: give a folder of photographs"),
        (["--dataset_id=imagenette/320px-v2"], "--dataset_id imagenette/320px-v2 is a script on the Hub"),
        (["--dataset_id=frgfm/imagenette"], "imagenette2-320.tgz"),
    ],
)
def test_datasets_that_cannot_be_opened(flags, message, capsys):
    """The default of instruction-tuned-sd consists of a script."""
    with pytest.raises(SystemExit):
        generate_dataset.main(flags)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_what_is_no_photograph_is_named(tmp_path, capsys):
    photographs = tmp_path / "photographs"
    (photographs / "more").mkdir(parents=True)
    shutil.copy(PHOTOS / "coffee.jpg", photographs / "more/coffee.jpg")
    for name in ("notes.docx", "metadata.jsonl", ".hidden"):
        (photographs / name).write_text("")
    generate(tmp_path / "out", "--task", "identity", f"--dataset_id={photographs}", "--max_num_samples=2")
    assert "skipped 1 (not an image): notes.docx\n" in capsys.readouterr().err


def test_running_again(tmp_path, capsys):
    before = generate(tmp_path / "pairs")
    generate(tmp_path / "pairs")
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate(tmp_path / "pairs", "--resolution", "72")
    assert "resolution was 64 and is now 72" in capsys.readouterr().err
    assert len(read_back(tmp_path / "pairs")) == len(before)
    assert len(generate(tmp_path / "pairs", "--overwrite", "--max_num_samples", "2")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_all_invalid_flags_are_reported_together(tmp_path, capsys):
    flags = ["--task", "paint", "sepia=-1", "--resolution=65", "--max_num_samples=0", "--seed=-1", "--teacher_range=1"]
    with pytest.raises(SystemExit) as stopped:
        generate(tmp_path / "pairs", *flags, "--teacher=onnx:nowhere.onnx", "--phrasings=both", "--heldout_phrasings=0")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "pairs").exists()
    for part in (
        "--task paint: unknown",
        "--task sepia=-1",
        "--resolution 65",
        "--max_num_samples 0",
        "--seed -1",
        "--teacher_range 1",
        "--phrasings both: needs",
        "the file nowhere.onnx does not exist",
    ):
        assert part in error


def test_missing_photographs_are_one_message(tmp_path):
    (tmp_path / "photos").mkdir()
    script = [sys.executable, str(ROOT / "data_preparation" / "generate_dataset.py"), "--task", "jpeg"]
    for folder, message in (("nowhere", "does not exist"), ("photos", "has no images")):
        command = [*script, f"--dataset_id={tmp_path / folder}", f"--data_root={tmp_path / 'pairs'}"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "pairs").exists()
