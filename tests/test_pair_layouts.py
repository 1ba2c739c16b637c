"""Datasets in the layouts and with the image columns that users have: read by training and by import_pairs.py."""

import base64
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preparation import import_pairs
from tests.pairs import encode, make_image
from tests.runs import training_flags
from train_instruct_pix2pix import main as train
from utils.data.rows import open_rows
from utils.data.samples import choose_prompt
from utils.data.sources import open_source, sources_digest
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

NUM_PAIRS = 3
PROMPTS = [f"make it {word}" for word in ("red", "green", "blue")]
IMAGES = [(encode(make_image(index)), encode(make_image(10 + index))) for index in range(NUM_PAIRS)]


def write_files(folder: Path, originals: str, editeds: str) -> None:
    """originals, editeds: such as "control/{}.png"."""
    for index, pair in enumerate(IMAGES):
        for name, content in zip((originals, editeds), pair, strict=True):
            path = folder / name.format(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def control_and_target(folder: Path) -> None:
    """ai-toolkit: a caption file beside each target."""
    write_files(folder, "control/{}.png", "target/{}.png")
    for index, prompt in enumerate(PROMPTS):
        (folder / f"target/{index}.txt").write_text(prompt.replace(" ", "\n", 1) + "\n")


def source_and_images(folder: Path) -> None:
    """Captions beside the originals, other suffixes, subfolders."""
    write_files(folder, "source/a/{}.png", "images/a/{}_edited.webp")
    for index, prompt in enumerate(PROMPTS):
        (folder / f"source/a/{index}.caption").write_text(f"\ufeff{prompt}", encoding="utf-8")


def lines_of_sd_scripts(folder: Path) -> None:
    write_files(folder, "c/{}.png", "t/{}.png")
    rows = [
        dict(image_path=str(folder / f"t/{i}.png"), control_path=str(folder / f"c/{i}.png"), caption=prompt)
        for i, prompt in enumerate(PROMPTS)
    ]
    write_lines(folder / "train.jsonl", rows)


def table_of_diffsynth(folder: Path) -> None:
    """A CSV written on Windows."""
    write_files(folder, "in/{}.png", "out/{}.png")
    lines = [f"out\\{i}.png,{prompt},in\\{i}.png\r\n" for i, prompt in enumerate(PROMPTS)]
    (folder / "metadata.csv").write_text("\ufeffimage,prompt,edit_image\r\n" + "".join(lines), newline="")


def lists_of_file_names(folder: Path) -> None:
    write_files(folder, "a{}.png", "b{}.png")
    rows = [
        dict(input_file_names=[f"a{i}.png"], output_file_names=[f"b{i}.png"], prompt=p) for i, p in enumerate(PROMPTS)
    ]
    write_lines(folder / "metadata.jsonl", rows)


def images_in_a_zip(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for index, pair in enumerate(IMAGES):
            for name, content in zip("ab", pair, strict=True):
                archive.writestr(f"{name}/{index}.png", content)
    rows = [dict(original=f"a/{i}.png", edited=f"b/{i}.png", instruction=p) for i, p in enumerate(PROMPTS)]
    write_lines(folder / "metadata.jsonl", rows)


def json_list(folder: Path) -> None:
    """Images as base64 text."""
    folder.mkdir(exist_ok=True)
    rows = [
        dict(source=base64.b64encode(pair[0]).decode(), target=base64.b64encode(pair[1]).decode(), instruction=prompt)
        for pair, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))


def tars(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for index, (pair, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        (folder / "x.json").write_text(json.dumps({"edit_prompt": prompt, "score": 1}))
        (folder / "0.png").write_bytes(pair[0])
        (folder / "1.png").write_bytes(pair[1])
        with tarfile.open(folder / f"train-{index}.tar", "w") as tar:
            for name, end in (("0.png", "original.png"), ("1.png", "edited.png"), ("x.json", "json")):
                tar.add(folder / name, f"sample{index}.{end}")
    for name in ("x.json", "0.png", "1.png"):
        (folder / name).unlink()


def seeds(folder: Path) -> None:
    for index, (pair, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        place = folder / f"000{index}"
        place.mkdir(parents=True)
        (place / "prompt.json").write_text(json.dumps({"caption": "a", "edit": prompt, "output": "b"}))
        for side, content in enumerate(pair):
            (place / f"77_{side}.jpg").write_bytes(content)
    (folder / "seeds.json").write_text(json.dumps([[f"000{index}", [77]] for index in range(NUM_PAIRS)]))


def parquet(columns: dict[str, list]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({**columns, "instruction": PROMPTS}), folder / "train-0.parquet")

    return write


def parquet_of_paths(folder: Path) -> None:
    write_files(folder, "files/a{}.png", "files/b{}.png")
    parquet({side: [f"files/{name}{i}.png" for i in range(3)] for side, name in (("input", "a"), ("output", "b"))})(
        folder
    )


def columns_of(wrap: Callable[[bytes], object]) -> dict[str, list]:
    return {name: [wrap(pair[side]) for pair in IMAGES] for side, name in enumerate(("source_img", "target_img"))}


LAYOUTS = {
    "control and target": control_and_target,
    "source and images": source_and_images,
    "sd-scripts": lines_of_sd_scripts,
    "DiffSynth": table_of_diffsynth,
    "lists of file names": lists_of_file_names,
    "images in a zip": images_in_a_zip,
    "base64": json_list,
    "tars": tars,
    "seeds": seeds,
    "parquet of paths": parquet_of_paths,
    "bytes": parquet(columns_of(lambda content: content)),
    "dicts without metadata": parquet(columns_of(lambda content: {"bytes": content, "path": "x.png"})),
    "lists of one": parquet(columns_of(lambda content: [{"bytes": content, "path": None}])),
    "nested": parquet(
        {
            "images": [
                {"source": {"bytes": one, "path": None}, "target": {"bytes": two, "path": None}} for one, two in IMAGES
            ]
        }
    ),
}


def check_pairs(rows: list[tuple[object, object, object]]) -> None:
    assert len(rows) == NUM_PAIRS
    for original, prompt, edited in rows:
        index = PROMPTS.index(choose_prompt(prompt, 0.0))
        np.testing.assert_array_equal(np.asarray(decode_image(original)), np.asarray(make_image(index)))
        np.testing.assert_array_equal(np.asarray(decode_image(edited)), np.asarray(make_image(10 + index)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_reads_it_directly(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "data")
    for streaming in (False, True):
        source = open_source(
            dataset_name=str(tmp_path / "data"), streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        columns = source.columns
        check_pairs([(row[columns.original], row[columns.prompt], row[columns.edited]) for row in source.rows])
    assert len(sources_digest([open_source(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))])) == 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_command_imports_it(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS[layout](tmp_path / "data")
    import_pairs.main(["--source", str(tmp_path / "data"), "--data_root", str(tmp_path / "pairs"), "--num_workers=0"])
    rows = open_rows(str(tmp_path / "pairs"), True, None, "train", False, str(tmp_path / "cache"))
    rows = rows.cast_column("original_image", datasets.Image(decode=False))
    rows = rows.cast_column("edited_image", datasets.Image(decode=False))
    check_pairs([(row["original_image"], row["edit_prompt"], row["edited_image"]) for row in rows])


def test_a_run_on_control_and_target(tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    control_and_target(tmp_path / "data")
    (tmp_path / "data/target/2.txt").unlink()
    (tmp_path / "data/control/alone.png").write_bytes(IMAGES[0][0])
    flags = training_flags(tiny_base, tmp_path / "data", tmp_path / "out", "--max_bad_rows=1")
    assert train(flags) == 0
    assert "1 files without a partner" in caplog.text and "alone.png" in caplog.text
    assert "train[2]: no prompt" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [path.unlink() for path in data.glob("target/*.txt")], "none of the 3 pairs .* target/0.txt"),
        (lambda data: [path.rename(f"{path}x") for path in data.glob("target/*.png")], "no image of control has"),
        (lambda data: shutil.copytree(data / "control", data / "source"), "several pairs .*control or source, and"),
        (lambda data: (data / "target/0.txt").write_bytes(b"\xff\xfe\x00"), "0.txt cannot be read as UTF-8"),
    ],
)
def test_incomplete_folders_are_refused(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    control_and_target(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(dataset_name=str(tmp_path))


def test_lists_of_several_images_are_bad_rows_with_a_reason(tmp_path: Path) -> None:
    columns = {name: [[{"bytes": one, "path": None}] * 2 for one, _ in IMAGES] for name in ("source", "target")}
    parquet(columns)(tmp_path)
    source = open_source(dataset_name=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(BadRow, match="a list of 2 images"):
        decode_image(source.rows[0]["source"])
    assert len(sources_digest([source])) == 32


def test_images_by_path_beside_a_nested_column(tmp_path: Path) -> None:
    write_files(tmp_path, "a{}.png", "b{}.png")
    rows = [dict(original=f"a{i}.png", edited=f"b{i}.png", prompt=p, meta={"score": i}) for i, p in enumerate(PROMPTS)]
    write_lines(tmp_path / "metadata.jsonl", rows)
    source = open_source(dataset_name=str(tmp_path))
    check_pairs([(row["original"], row["prompt"], row["edited"]) for row in source.rows])


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"train-0\.tar cannot be read as a WebDataset"):
        open_source(dataset_name=str(tmp_path))


def test_a_copy_that_does_not_fit_is_refused_and_a_large_one_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    LAYOUTS["bytes"](tmp_path / "data")
    monkeypatch.setattr("utils.data.dataset_cache.ANNOUNCED_BYTES", 100)
    monkeypatch.setattr("utils.data.dataset_cache.RESERVE", 1e15)
    with pytest.raises(InputError, match="are free.*--cache_dir on a larger disk, or --streaming"):
        open_source(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("utils.data.dataset_cache.RESERVE", 1)
    open_source(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert "datasets copies 0.0 GB into" in caplog.text
    caplog.clear()
    open_source(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert not caplog.text
