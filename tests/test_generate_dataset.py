"""Pairs are exact, the same for a seed, and bad input gets one clear message."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_preparation import generate_dataset
from data_preparation.edits import EDITS, exact_results
from data_preparation.instructions import available_tasks, read_phrasings

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "assets" / "photos"


def generate(data_root: Path, *flags: str) -> list[dict]:
    """Run the script's main and read all rows back, images as arrays."""
    import pyarrow.parquet as pq

    defaults = ["--dataset_id", str(PHOTOS), "--task", "all", "--max_num_samples", "24", "--resolution", "64"]
    generate_dataset.main([*defaults, "--data_root", str(data_root), *flags])
    rows = [row for path in sorted((data_root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        for name in ("original_image", "edited_image"):
            row[name] = np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))
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


def test_every_task_has_an_edit_and_phrasings():
    assert set(available_tasks()) == set(EDITS)
    for task in available_tasks():
        train, heldout = read_phrasings(task)
        assert len(train) >= 12 and len(heldout) == 3 and len(set(train + heldout)) == len(train + heldout)


def test_pairs_are_exact_and_say_what_they_are(tmp_path):
    rows = generate(tmp_path / "pairs")
    assert len(rows) == 24
    for row in rows:
        assert row["original_image"].shape == (64, 64, 3)
        assert np.array_equal(row["edited_image"], EDITS[row["task"]](row["original_image"]))
        assert row["edit_prompt"] in read_phrasings(row["task"])[0]
        assert row["phrasing"] == "train" and (PHOTOS / row["source"]).exists()


def test_same_seed_same_rows_and_a_longer_set_begins_with_them(tmp_path):
    first, longer = generate(tmp_path / "a"), generate(tmp_path / "b", "--max_num_samples", "30")
    other = generate(tmp_path / "c", "--seed", "1")
    for one, two in zip(first, longer, strict=False):
        assert one["edit_prompt"] == two["edit_prompt"] and np.array_equal(one["original_image"], two["original_image"])
    assert [row["edit_prompt"] for row in first] != [row["edit_prompt"] for row in other]


def test_splits_share_no_photograph_and_only_heldout_shows_heldout_phrasings(tmp_path):
    split = {
        row["file_name"]: row["split"] for row in map(json.loads, (PHOTOS / "metadata.jsonl").read_text().splitlines())
    }
    train, heldout = (
        generate(tmp_path / "train", "--split", "train"),
        generate(tmp_path / "heldout", "--split", "heldout"),
    )
    assert {split[row["source"]] for row in train} == {"train"}
    assert {split[row["source"]] for row in heldout} == {"heldout"}
    assert {row["phrasing"] for row in heldout} == {"train", "heldout"}
    for row in heldout:
        assert row["edit_prompt"] in read_phrasings(row["task"])[row["phrasing"] == "heldout"]


def test_datasets_reads_the_folder(tmp_path):
    import datasets

    generate(tmp_path / "pairs", "--max_num_samples", "3")
    rows = datasets.load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["original_image", "edit_prompt", "edited_image", "task", "source", "phrasing"]
    assert rows[0]["original_image"].size == (64, 64)


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


def test_bad_images_are_skipped_and_counted(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "empty.png").write_bytes(b"")
    Image.new("L", (40, 30), 90).save(photos / "good.png")
    rows = generate(tmp_path / "pairs", "--dataset_id", str(photos))
    assert {row["source"] for row in rows} == {"good.png"}
    assert "skipped 2 of 3 images" in capsys.readouterr().err


def test_an_existing_folder_is_replaced_only_when_told(tmp_path):
    generate(tmp_path / "pairs")
    with pytest.raises(SystemExit):
        generate(tmp_path / "pairs")
    assert len(generate(tmp_path / "pairs", "--overwrite", "--max_num_samples", "2")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_all_mistakes_in_flags_are_told_at_once(tmp_path):
    flags = ["--task", "paint", "sepia", "--resolution", "65", "--max_num_samples", "0", "--heldout_phrasings", "-1"]
    message = refused(tmp_path / "pairs", *flags, photos=tmp_path / "nowhere")
    assert "--task paint: unknown; allowed are cartoonize" in message
    assert "no such folder" in message and "--resolution 65" in message and "--max_num_samples 0" in message


def test_no_images_is_one_message(tmp_path):
    (tmp_path / "photos").mkdir()
    assert refused(tmp_path / "pairs", "--task", "all", photos=tmp_path / "photos").startswith("error: --dataset_id")
