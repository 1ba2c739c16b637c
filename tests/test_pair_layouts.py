"""Datasets in the layouts and with the image columns that users have: read by training and by import_pairs.py."""

import base64
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
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
from utils import archives
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


def table_beside_tars(folder: Path) -> None:
    """The tar has the images that the table names, which is no WebDataset."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for index, pair in enumerate(IMAGES):
            for side, content in zip("ab", pair, strict=True):
                info = tarfile.TarInfo(f"{side}/{index}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    lines = [f"a/{i}.png,b/{i}.png,{prompt}\n" for i, prompt in enumerate(PROMPTS)]
    (folder / "pairs.csv").write_text("source_image,target_image,instruction\n" + "".join(lines))


def zip_with_a_top_folder(folder: Path) -> None:
    """Compressed; the table was written where the folder was."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, pair in enumerate(IMAGES):
            for name, content in zip("ab", pair, strict=True):
                archive.writestr(f"export/{name}/{index}.png", content)
    rows = [dict(original=f"a/{i}.png", edited=f"b/{i}.png", instruction=p) for i, p in enumerate(PROMPTS)]
    write_lines(folder / "train.jsonl", rows)


def start_and_end(folder: Path) -> None:
    """Both images of a pair in one folder, told apart by the ends of their names."""
    write_files(folder, "set/{}_start.png", "set/{}_end.png")
    for index, prompt in enumerate(PROMPTS):
        (folder / f"set/{index}.txt").write_text(prompt)


def condition_labels(folder: Path) -> None:
    """OneTrainer: the edited image has no end."""
    write_files(folder, "{}-condlabel.png", "{}.png")
    for index, prompt in enumerate(PROMPTS):
        (folder / f"{index}.txt").write_text(prompt)


def write_captions(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for index, prompt in enumerate(PROMPTS):
        (folder / f"{index}.txt").write_text(prompt)


def my_control(folder: Path) -> None:
    write_files(folder, "my_control/{}.png", "my_images/{}.png")
    write_captions(folder / "captions")


def captions_beside_the_folders(folder: Path) -> None:
    write_files(folder, "cond/{}.png", "target/{}.png")
    write_captions(folder)


def csv_of_a_spreadsheet(folder: Path) -> None:
    """Semicolons and UTF-16, as office programs save it."""
    write_files(folder, "in/{}.png", "out/{}.png")
    lines = [f'in/{i}.png;out/{i}.png;"{prompt}"\r\n' for i, prompt in enumerate(PROMPTS)]
    text = "input_image;edited_image;edit_prompt\r\n" + "".join(lines)
    (folder / "metadata.csv").write_bytes(text.encode("utf-16"))


def csv_of_another_spreadsheet(folder: Path) -> None:
    """Quoted names with commas, and UTF-16 without its mark."""
    write_files(folder, "in/{}.png", "out/{}.png")
    lines = [f'"in/{i}.png";"{prompt}";"out/{i}.png"' for i, prompt in enumerate(PROMPTS)]
    text = "\n".join(['"source_image";"instruction";"target_image"', *lines])
    (folder / "pairs.csv").write_bytes(text.encode("utf-16-le"))


def numbered_folders(folder: Path) -> None:
    """Names of the images in both folders end in their side; the captions' folder is written with a capital."""
    write_files(folder, "control_1/{}_start.png", "target/{}_end.png")
    write_captions(folder / "Captions")


def parquet_of_paths_in_a_zip(folder: Path) -> None:
    """The zip holds two folders of images, as one that must be unpacked does, but the table names them."""
    write_files(folder / "packed", "control/{}.png", "target/{}.png")
    shutil.make_archive(str(folder / "images"), "zip", folder / "packed")
    shutil.rmtree(folder / "packed")
    columns = {name: [f"{name}/{index}.png" for index in range(NUM_PAIRS)] for name in ("control", "target")}
    pq.write_table(pa.table(columns | {"instruction": PROMPTS}), folder / "train.parquet")


def relative_paths_below_a_subfolder(folder: Path) -> None:
    write_files(folder, "images/in/{}.png", "images/out/{}.png")
    rows = [dict(source=f"in/{i}.png", target=f"out/{i}.png", instruction=p) for i, p in enumerate(PROMPTS)]
    write_lines(folder / "pairs.jsonl", rows)


def table_beside_the_split(folder: Path) -> None:
    write_files(folder, "train/{}_a.png", "train/{}_b.png")
    rows = [dict(source=f"train/{i}_a.png", target=f"train/{i}_b.png", instruction=p) for i, p in enumerate(PROMPTS)]
    write_lines(folder / "train.jsonl", rows)


def tab_separated(folder: Path) -> None:
    write_files(folder, "in/{}.png", "out/{}.png")
    lines = [f"in/{i}.png\tout/{i}.png\t{prompt}\n" for i, prompt in enumerate(PROMPTS)]
    (folder / "pairs.tsv").write_text("input_image\tedited_image\tedit_prompt\n" + "".join(lines))


def long_fields(folder: Path) -> None:
    """Images as base64 text in a CSV: longer than Python's csv module reads by itself."""
    folder.mkdir(exist_ok=True)
    lines = []
    for pair, prompt in zip(IMAGES, PROMPTS, strict=True):
        texts = [base64.b64encode(content + bytes(200_000)).decode() for content in pair]
        lines.append(f"{texts[0]},{texts[1]},{prompt}\n")
    (folder / "pairs.csv").write_text("source,target,instruction\n" + "".join(lines))


def numbered_control_paths(folder: Path) -> None:
    """musubi-tuner, with a column of other types in every row."""
    write_files(folder, "c/{}.png", "t/{}.png")
    scores = [1, "high", None]
    rows = [
        dict(image_path=f"t/{i}.png", control_path_0=f"c/{i}.png", caption=prompt, score=scores[i])
        for i, prompt in enumerate(PROMPTS)
    ]
    write_lines(folder / "train.jsonl", rows)


def kontext_images(folder: Path) -> None:
    write_files(folder, "c/{}.png", "t/{}.png")
    rows = [dict(image=f"t/{i}.png", kontext_images=[f"c/{i}.png"], prompt=p) for i, p in enumerate(PROMPTS)]
    (folder / "metadata.json").write_text(json.dumps(rows))


def paths_of_another_machine(folder: Path) -> None:
    write_files(folder, "sets/c/{}.png", "sets/t/{}.png")
    place = "D:\\work\\sets" if os.name == "posix" else "/mnt/work/sets"
    rows = [
        dict(source=f"{place}/c/{i}.png", target=f"{place}\\t\\{i}.png", instruction=p) for i, p in enumerate(PROMPTS)
    ]
    write_lines(folder / "pairs.jsonl", rows)


def paths_from_the_dataset(folder: Path) -> None:
    """The table is in the folder of its split, and its paths start from the dataset's."""
    write_files(folder, "c/{}.png", "t/{}.png")
    (folder / "train").mkdir()
    rows = [dict(source=f"c/{i}.png", target=f"t/{i}.png", instruction=p) for i, p in enumerate(PROMPTS)]
    write_lines(folder / "train/metadata.jsonl", rows)


def paths_beside_the_parquet(folder: Path) -> None:
    write_files(folder, "data/a{}.png", "data/b{}.png")
    parquet({side: [f"{name}{i}.png" for i in range(3)] for side, name in (("input", "a"), ("output", "b"))})(folder)
    (folder / "train-0.parquet").rename(folder / "data/train-0.parquet")


LAYOUTS = {
    "a table beside tars": table_beside_tars,
    "zip with a top folder": zip_with_a_top_folder,
    "start and end": start_and_end,
    "condition labels": condition_labels,
    "my_control": my_control,
    "captions beside the folders": captions_beside_the_folders,
    "a spreadsheet's CSV": csv_of_a_spreadsheet,
    "another spreadsheet's CSV": csv_of_another_spreadsheet,
    "numbered folders": numbered_folders,
    "parquet of paths in a zip": parquet_of_paths_in_a_zip,
    "relative paths below a subfolder": relative_paths_below_a_subfolder,
    "a table beside its split": table_beside_the_split,
    "TSV": tab_separated,
    "long fields": long_fields,
    "numbered control paths": numbered_control_paths,
    "kontext_images": kontext_images,
    "another machine": paths_of_another_machine,
    "paths from the dataset": paths_from_the_dataset,
    "paths beside the parquet": paths_beside_the_parquet,
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


def pack(data: Path) -> None:
    shutil.move(shutil.make_archive(str(data.parent / "packed"), "zip", data), data / "images.zip")
    shutil.rmtree(data / "control")
    shutil.rmtree(data / "target")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [path.unlink() for path in data.glob("target/*.txt")], "none of the 3 pairs .* target/0.txt"),
        (lambda data: [path.rename(f"{path}x") for path in data.glob("target/*.png")], "no image of control has"),
        (lambda data: shutil.copytree(data / "control", data / "source"), "several pairs .*control or source, and"),
        (lambda data: (data / "target/0.txt").write_bytes(b"\xff\xfe\x00"), "0.txt cannot be read as UTF-8"),
        (pack, "images.zip holds the folders control/ and target/: unpack it .unzip 'images.zip'"),
    ],
)
def test_incomplete_folders_are_refused(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    control_and_target(data)
    change(data)
    with pytest.raises(InputError, match=message):
        open_source(dataset_name=str(data))


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


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted in /proc")
def test_hundreds_of_tars_are_indexed_once_and_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a forked process, as of a data loader."""
    for index in range(100):
        files = {"x.original.png": IMAGES[0][0], "x.edited.png": IMAGES[0][1], "x.txt": b"make it red"}
        write_tar(tmp_path / f"train-{index:03}.tar", files)
    indexed, index_tar = [], archives._list_tar
    monkeypatch.setattr(archives, "_list_tar", lambda archive: indexed.append(archive) or index_tar(archive))
    rows = open_source(dataset_name=str(tmp_path)).rows

    def read_all() -> None:
        for _ in range(2):
            assert all(decode_image(row["original"]).size == make_image(0).size for row in rows)

    def count_open() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the descriptor of the listing itself
                count += os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path))
        return count

    read_all()
    assert len(rows) == len(indexed) == 100 and count_open() <= archives.MAX_OPEN
    process = multiprocessing.get_context("fork").Process(target=read_all)
    process.start()
    process.join()
    assert process.exitcode == 0 and len(indexed) == 100


def test_files_of_one_name_in_two_archives_are_told_apart(tmp_path: Path) -> None:
    for name, (one, two) in (("first", IMAGES[0]), ("second", IMAGES[1])):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("a.png", one)
            archive.writestr("b.png", two)
    rows = [dict(source="a.png", target="b.png", instruction="x")]
    write_lines(tmp_path / "pairs.jsonl", rows)
    message = r"a.png is in several archives \(first.zip, second.zip\): write first/a.png or second/a.png in the"
    with pytest.raises(InputError, match=message):
        open_source(dataset_name=str(tmp_path))
    named = [dict(source=f"{name}/a.png", target=f"{name}/b.png", instruction="x") for name in ("first", "second")]
    write_lines(tmp_path / "pairs.jsonl", named)
    for index, row in enumerate(open_source(dataset_name=str(tmp_path)).rows):
        np.testing.assert_array_equal(np.asarray(decode_image(row["source"])), np.asarray(make_image(index)))


def test_a_file_of_two_tars_is_refused_too(tmp_path: Path) -> None:
    for name, pair in (("first", IMAGES[0]), ("second", IMAGES[1])):
        write_tar(tmp_path / f"{name}.tar", dict(zip(("a.png", "b.png"), pair, strict=True)))
    write_lines(tmp_path / "pairs.jsonl", [dict(source="a.png", target="b.png", instruction="x")])
    with pytest.raises(InputError, match=r"a.png is in several archives \(first.tar, second.tar\)"):
        open_source(dataset_name=str(tmp_path))


@pytest.mark.parametrize("has_bytes", [True, False], ids=["images", "paths in the tar"])
@pytest.mark.parametrize("name", ["train.parquet", "data/train-0.parquet"])
def test_parquet_of_pairs_decides_over_a_tar_beside_it(name: str, has_bytes: bool, tmp_path: Path) -> None:
    members = {f"{side}/{index}.png": pair[side] for index, pair in enumerate(IMAGES) for side in (0, 1)}
    write_tar(tmp_path / "images.tar", members)
    columns = {
        column: [
            {"bytes": pair[side], "path": None} if has_bytes else f"{side}/{i}.png" for i, pair in enumerate(IMAGES)
        ]
        for side, column in enumerate(("source", "target"))
    }
    (tmp_path / name).parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns | {"instruction": PROMPTS}), tmp_path / name)
    for streaming in (False, True):
        rows = open_source(dataset_name=str(tmp_path), streaming=streaming, cache_dir=str(tmp_path / "cache")).rows
        check_pairs([(row["source"], row["instruction"], row["target"]) for row in rows])


@pytest.mark.parametrize("table", ["data/test-0.parquet", "test.jsonl"])
def test_a_table_of_another_split_beside_a_tar(table: str, tmp_path: Path) -> None:
    """The tar is named as no split: it only holds images."""
    write_tar(tmp_path / "images.tar", {f"{s}/{i}.png": pair[s] for i, pair in enumerate(IMAGES) for s in (0, 1)})
    columns = {name: [f"{side}/{i}.png" for i in range(NUM_PAIRS)] for side, name in enumerate(("source", "target"))}
    path = tmp_path / table
    path.parent.mkdir(exist_ok=True)
    rows = pa.table(columns | {"instruction": PROMPTS})
    pq.write_table(rows, path) if path.suffix == ".parquet" else write_lines(path, rows.to_pylist())
    rows = open_source(dataset_name=str(tmp_path), split="test", cache_dir=str(tmp_path / "cache")).rows
    check_pairs([(row["source"], row["instruction"], row["target"]) for row in rows])


def test_damage_inside_an_archive_is_a_bad_row(tmp_path: Path) -> None:
    images_in_a_zip(tmp_path)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[60] ^= 0xFF  # within the first image
    (tmp_path / "images.zip").write_bytes(content)
    rows = open_source(dataset_name=str(tmp_path)).rows
    with pytest.raises(BadRow, match="damaged|checksum"):
        decode_image(rows[0]["original"])
    assert decode_image(rows[1]["original"])


def test_images_that_were_moved_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths_of_another_machine(tmp_path)
    for row in open_source(dataset_name=str(tmp_path), streaming=True).rows:
        assert decode_image(row["source"])
    assert caplog.text.count("does not exist: the images are taken from") == 1


def write_moved(folder: Path, places: list[str]) -> None:
    """A table of another machine (/m/in, /m/out) and where its images are now."""
    rows = [dict(source=f"/m/in/{i}.png", target=f"/m/out/{i}.png", instruction=p) for i, p in enumerate(PROMPTS)]
    for place in places:
        write_files(folder, *place.split())
    write_lines(folder / "pairs.jsonl", rows)


def test_images_that_moved_below_a_subfolder_or_from_several_places(tmp_path: Path) -> None:
    write_moved(tmp_path, ["train/in/{}.png train/out/{}.png"])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[2]["source"] = "/another/depth/of/in/2.png"
    (tmp_path / "train/of").mkdir()
    shutil.move(tmp_path / "train/in/2.png", tmp_path / "train/of/2.png")
    (tmp_path / "train/of/in").mkdir()
    shutil.move(tmp_path / "train/of/2.png", tmp_path / "train/of/in/2.png")
    write_lines(tmp_path / "pairs.jsonl", rows)
    check_pairs(list(map(tuple, ([row[c] for c in ("source", "instruction", "target")] for row in read(tmp_path)))))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["{}.png unused/{}.png"], "/m/out/0.png does not exist, and the only file .* is also another image"),
        (["in/{}.png out/{}.png", "train/in/{}.png train/out/{}.png"], "could be .*/in/0.png and .*/train/in/0.png"),
    ],
)
def test_moved_images_that_could_be_others_are_refused(places: list[str], message: str, tmp_path: Path) -> None:
    write_moved(tmp_path / "data", places)
    shutil.rmtree(tmp_path / "data/unused", ignore_errors=True)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "data")
    with pytest.raises(SystemExit):
        import_pairs.main(["--source", str(tmp_path / "data/pairs.jsonl"), "--data_root", str(tmp_path / "p")])


def read(folder: Path) -> datasets.Dataset:
    return open_source(dataset_name=str(folder)).rows
