"""export_pairs.py: every layout is read back by training with the same pixels, files and instructions."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_preparation import export_pairs, import_pairs
from data_preparation.exporting import pair_layouts
from tests.pairs import encode, make_dataset, make_image, make_noise, make_rows, save_pairs
from utils.data.sources import Source, open_source
from utils.pixels import decode_image

ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FILES = {  # (original, edited); the first are copied, the last three are encoded again
    "png": (encode(make_image(0)), encode(make_image(1))),
    "jpeg": (encode(make_noise(seed=1), "JPEG"), encode(make_noise(seed=2), "JPEG", quality=70)),
    "webp and grey": (encode(make_noise(seed=3), "WEBP"), encode(make_noise(seed=4).convert("L"))),
    "alpha": (encode(make_image(5)), encode(make_image(6).convert("RGBA").resize((24, 20)))),
    "rotated": (encode(make_noise(seed=5), "JPEG", exif=ROTATED), encode(make_noise((40, 24), 6), "BMP")),
    "another shape": (encode(make_noise((20, 64))), encode(make_noise((64, 20), 8), "TIFF")),
}
NUM_COPIED = 3
PROMPTS = [f"make it {name}, “größer”" for name in FILES]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    both = list(zip(*FILES.values(), strict=True))
    images = [[{"bytes": content, "path": None} for content in side] for side in both]
    rows = {"before": images[0], "say": PROMPTS, "after": images[1]}
    rows |= {"original_prompt": [f"a photo {i}" for i in range(6)], "edited_prompt": [f"art {i}" for i in range(6)]}
    folder = tmp_path_factory.mktemp("pairs") / "data"
    folder.mkdir()
    make_dataset(rows, "before", "after").to_parquet(folder / "train-0.parquet")
    return folder


COLUMNS = ("--original_image_column=before", "--edit_prompt_column=say", "--edited_image_column=after")


def export(dataset: Path, output: Path, layout: str, *flags: str) -> None:
    export_pairs.main([f"--dataset_name={dataset}", f"--output_dir={output}", f"--layout={layout}", *flags])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        export(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def contents(source: Source, role: str) -> list[bytes]:
    from utils.stored_images import read_image_file

    values = [row[getattr(source.columns, role)] for row in source.rows]
    return [value["bytes"] or read_image_file(value["path"]) for value in values]


@pytest.mark.parametrize("layout", pair_layouts.LAYOUTS)
def test_a_layout_is_read_back_with_the_same_files_and_instructions(layout, pairs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pair_layouts, "SAMPLES_PER_TAR", 4)
    export(pairs, tmp_path / "out", layout, *COLUMNS)
    source = open_source(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert [row[source.columns.prompt] for row in source.rows] == PROMPTS
    for role, side in (("original", 0), ("edited", 1)):
        found = contents(source, role)
        given = [both[side] for both in FILES.values()]
        assert found[:NUM_COPIED] == given[:NUM_COPIED]
        for one, two in zip(found, given, strict=True):
            np.testing.assert_array_equal(np.asarray(decode_image(one)), np.asarray(decode_image(two)))
        encoded = [Image.open(io.BytesIO(content)) for content in found[NUM_COPIED:]]
        assert all((image.mode, image.getexif().get(0x0112)) == ("RGB", None) for image in encoded)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("layout", pair_layouts.LAYOUTS)
def test_a_layout_is_imported(layout: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export(pairs, tmp_path / "out", layout, *COLUMNS)
    import_pairs.main([f"--source={tmp_path / 'out'}", f"--data_root={tmp_path / 'imported'}"])
    rows = [row for path in sorted((tmp_path / "imported/data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["edit_prompt"] for row in rows] == PROMPTS[:-1]  # the last pair has two aspect ratios
    copied = list(FILES.values())[:NUM_COPIED]
    assert [(row["original_image"]["bytes"], row["edited_image"]["bytes"]) for row in rows[:NUM_COPIED]] == copied


def test_what_the_trainers_expect(pairs: Path, tmp_path: Path) -> None:
    for layout in pair_layouts.LAYOUTS:
        export(pairs, tmp_path / layout, layout, *COLUMNS)
    folder = tmp_path / "control_target"
    assert (folder / "target/0000001.txt").read_text(encoding="utf-8") == f"{PROMPTS[1]}\n"
    names = [f"0000000.{suffix}" for suffix in ("png", "txt")]
    assert [path.name for path in sorted(folder.glob("target/0000000.*"))] == names
    assert (folder / "control/0000001.jpg").is_file() and (folder / "control/0000002.webp").is_file()
    for layout, keys in (
        ("sd_scripts", {"control_path", "caption", "image_path"}),
        ("diffsynth", {"edit_image", "prompt", "image"}),
    ):
        row = json.loads((tmp_path / layout / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert row.keys() == keys
        target = row["image_path" if layout == "sd_scripts" else "image"]
        assert Path(target).is_absolute() == (layout == "sd_scripts")
        assert (tmp_path / layout / target).read_bytes() == FILES["png"][1]
    seeds = json.loads((tmp_path / "seeds/seeds.json").read_text())
    assert seeds[1] == ["0000001", ["0"]]  # as the original's dataset class reads them
    prompt = json.loads((tmp_path / "seeds/0000001/prompt.json").read_text())
    assert prompt == {"input": "a photo 1", "edit": PROMPTS[1], "output": "art 1"}
    assert Image.open(tmp_path / "seeds/0000001/0_1.jpg").size == (40, 24)
    with tarfile.open(tmp_path / "webdataset/train-000000.tar") as tar:
        assert tar.getnames()[:3] == ["0000000.original.png", "0000000.edited.png", "0000000.txt"]
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "imagefolder"), cache_dir=str(tmp_path / "c"))
    assert set(rows["train"].column_names) == {"original_image", "edit_prompt", "edited_image"}


def test_skipped_rows_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(9)
    for row in (1, 4):
        rows["edit_prompt"][row] = "  "
    rows["edited_image"][2] = {"bytes": b"not an image", "path": None}
    save_pairs(tmp_path / "data", rows=rows)
    export(tmp_path / "data", tmp_path / "out", "control_target")
    printed = capsys.readouterr().out
    assert "wrote 6 pairs in the layout control_target" in printed
    assert "skipped, no instruction: 2 (train[1], train[4])" in printed
    assert "skipped, edited image" in printed and ": 1 (train[2])" in printed
    rows = make_rows(2) | {"edit_prompt": ["", ""]}
    save_pairs(tmp_path / "blank", rows=rows)
    message = refusal(capsys, tmp_path / "blank", tmp_path / "none", "seeds")
    assert "no pair was exported" in message and "no instruction: 2" in message and not (tmp_path / "none").exists()


def test_a_list_of_instructions_and_a_sample(tmp_path: Path) -> None:
    rows = make_rows(8) | {"edit_prompt": [[f"do {i}", f"please do {i}"] for i in range(8)]}
    save_pairs(tmp_path / "data", rows=rows)
    for flags, count in (((), 8), (("--all_prompts",), 16), (("--max_num_samples=3",), 3), (("--streaming",), 8)):
        for name in ("a", "b"):
            export(tmp_path / "data", tmp_path / name, "diffsynth", *flags)
        lines = (tmp_path / "a/metadata.jsonl").read_text().splitlines()
        assert len(lines) == count and lines == (tmp_path / "b/metadata.jsonl").read_text().splitlines()
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")


def test_an_empty_folder_is_filled_and_columns_are_found_as_in_training(tmp_path: Path) -> None:
    save_pairs(tmp_path / "data", 3)
    (tmp_path / "out").mkdir()
    export(tmp_path / "data", tmp_path / "out", "source_target")
    assert len(list((tmp_path / "out/source").iterdir())) == 3


def test_refusals(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").touch()
    message = refusal(capsys, pairs, tmp_path / "mine", "seeds", "--max_num_samples=0")
    assert "exists already" in message and "must be at least 1" in message
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.png"]
    assert "is inside the dataset" in refusal(capsys, pairs, pairs / "out", "seeds")
    assert "invalid choice: 'kohya'" in refusal(capsys, pairs, tmp_path / "out", "kohya")
    assert "there is no column 'nay'" in refusal(capsys, pairs, tmp_path / "out", "seeds", "--edit_prompt_column=nay")
    assert "does not exist" in refusal(capsys, tmp_path / "absent", tmp_path / "out", "seeds")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing_and_runs_again(pairs, tmp_path, monkeypatch, capsys) -> None:
    def fail(name: str, content: bytes) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pair_layouts, "image_name", fail)
        export(pairs, tmp_path / "out", "control_target", *COLUMNS)
    assert not (tmp_path / "out").exists() and "interrupted: run the same command again" in capsys.readouterr().err
    export(pairs, tmp_path / "out", "control_target", *COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
