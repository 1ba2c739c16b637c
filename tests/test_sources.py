"""Sources of pairs: the formats, mixes, held-out rows, the digest, and names of datasets."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.pairs import make_dataset, make_image, make_rows, make_source, write_image_folder
from utils.data.columns import Columns
from utils.data.held_out import group_rows, hold_out, hold_out_first
from utils.data.sources import Source, open_mix, open_source, sources_digest
from utils.errors import InputError
from utils.hub_names import looks_like_path, public_name
from utils.pixels import decode_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    make_dataset(make_rows(6)).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    make_dataset(make_rows(2, first=6)).to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    return folder


def check_rows(source: Source, num_rows: int) -> None:
    """The rows are those of `make_rows`, in order, with images not decoded."""
    rows = list(source.rows)
    assert [row["edit_prompt"] for row in rows] == [f"edit number {index}" for index in range(num_rows)]
    for index, row in enumerate(rows):
        assert set(row) == {"original_image", "edit_prompt", "edited_image"}
        assert isinstance(row["original_image"], dict)
        np.testing.assert_array_equal(np.asarray(decode_image(row["original_image"])), np.asarray(make_image(index)))
        np.testing.assert_array_equal(
            np.asarray(decode_image(row["edited_image"])), 255 - np.asarray(make_image(index))
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder(parquet_folder: Path, streaming: bool) -> None:
    source = open_source(str(parquet_folder), streaming=streaming)
    check_rows(source, 6)
    assert source.is_streaming == streaming
    assert source.name == "train"
    assert len(list(open_source(str(parquet_folder), split="validation", streaming=streaming).rows)) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_dict", [False, True])
def test_saved_to_disk(tmp_path: Path, is_dict: bool, streaming: bool) -> None:
    dataset = make_dataset(make_rows(3))
    dataset = datasets.DatasetDict(train=dataset, test=dataset) if is_dict else dataset
    dataset.save_to_disk(str(tmp_path / "saved"))
    check_rows(open_source(train_data_dir=str(tmp_path / "saved"), streaming=streaming), 3)
    with pytest.raises(InputError, match="its splits: (test, )?train"):
        open_source(str(tmp_path / "saved"), split="dev", streaming=streaming)


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    """A parquet file of pyarrow or pandas has no image type: only structs of bytes, or bytes."""
    rows = make_rows(3)
    rows["edited_image"] = [image["bytes"] for image in rows["edited_image"]]
    (tmp_path / "plain").mkdir()
    datasets.Dataset.from_dict(rows).to_pandas().to_parquet(tmp_path / "plain" / "pairs.parquet")
    check_rows(open_source(str(tmp_path / "plain")), 3)


def write_metadata(folder: Path, columns: dict[str, list], kind: str) -> None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "names", [("original_image", "edited_image"), ("original_image_file_name", "edited_image_file_name")]
)
@pytest.mark.parametrize("subfolder", ["", "train"])
def test_folder_with_two_images_per_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, names: tuple[str, str], subfolder: str
) -> None:
    """huggingface/diffusers#3878, #6039, #8824; and paths are relative to the metadata, not to the current folder."""
    folder = tmp_path / "pairs" / subfolder
    paths = write_image_folder(folder, 3)
    columns = {names[0]: paths["original_image"], "edit_prompt": paths["edit_prompt"], names[1]: paths["edited_image"]}
    write_metadata(folder, columns, kind)
    monkeypatch.chdir(tmp_path)
    check_rows(open_source(train_data_dir="pairs"), 3)
    check_rows(open_source(train_data_dir="pairs", streaming=True), 3)
    with pytest.raises(InputError, match="'test' is not in pairs; its splits: train"):
        open_source("pairs", split="test")


def test_file_name_is_the_column_image(tmp_path: Path) -> None:
    paths = write_image_folder(tmp_path, 2)
    columns = dict(
        file_name=paths["original_image"], edit_prompt=paths["edit_prompt"], edited_image=paths["edited_image"]
    )
    write_metadata(tmp_path, columns, "jsonl")
    assert open_source(str(tmp_path), original_image_column="image").columns.original == "image"


def test_metadata_with_null_prompts_missing_files_and_lists(tmp_path: Path) -> None:
    paths = write_image_folder(tmp_path, 3)
    (tmp_path / paths["edited_image"][1]).unlink()
    paths["edit_prompt"] = [None, ["one", "another"], ["third"]]
    write_metadata(tmp_path, paths, "jsonl")
    source = open_source(str(tmp_path))
    assert source.rows[0]["edit_prompt"] is None
    assert source.rows[1]["edit_prompt"] == ["one", "another"]
    with pytest.raises(Exception, match="no such file"):
        decode_image(source.rows[1]["edited_image"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"original_image": "a.png"}\nnot json\n', "line 2 is not JSON"),
        ('"text"\n', "line 1 is not a JSON object"),
        ("", "has no rows"),
        (
            '{"edit_prompt": "x", "original_image": 1}\n{"edit_prompt": "y", "original_image": [2]}\n',
            "columns of .* are not known",
        ),
    ],
)
def test_damaged_metadata(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path))


def test_csv_with_an_unquoted_comma(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("original_image,edit_prompt,edited_image\na.png,make it, please,b.png\n")
    with pytest.raises(InputError, match="quotes"):
        open_source(str(tmp_path))


def test_images_without_metadata_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", 2)
    with pytest.raises(InputError, match=r"none of the 2 pairs of original_image and edited_image has an instruction"):
        open_source(train_data_dir=str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "either --dataset_name"),
        (dict(dataset_name="a", train_data_dir="b"), "either --dataset_name"),
        (dict(dataset_name="/no/such/folder"), "the folder /no/such/folder does not exist"),
        (dict(train_data_dir="no-such-folder"), "the folder no-such-folder does not exist"),
        (dict(dataset_name="nobody/nothing"), "nobody/nothing from the Hugging Face Hub"),
        (dict(dataset_name="x", max_train_samples=0), "--max_train_samples is 0"),
    ],
)
def test_missing_dataset(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(**arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_split_config_and_folder(parquet_folder: Path, tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(InputError, match="'dev' is not in .*; its splits: train, validation"):
        open_source(str(parquet_folder), split="dev", streaming=streaming)
    with pytest.raises(InputError, match="other"):
        open_source(str(parquet_folder), dataset_config_name="other", streaming=streaming)
    with pytest.raises(InputError, match="is a file"):
        open_source(str(next(parquet_folder.iterdir())), streaming=streaming)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot open the folder"):
        open_source(str(tmp_path / "empty"), streaming=streaming)


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot open the folder"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_empty_dataset(tmp_path: Path, kind: str) -> None:
    empty = make_dataset(make_rows(1)).select([])
    if kind == "saved":
        empty.save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        empty.to_parquet(str(tmp_path / "data" / "train.parquet"))
    with pytest.raises(InputError, match="has no rows"):
        open_source(str(tmp_path / "data"))


def test_max_train_samples_is_a_random_subset_with_its_row_numbers(parquet_folder: Path) -> None:
    source = open_source(str(parquet_folder), max_train_samples=3, seed=1)
    assert len(source.rows) == 3
    assert [f"edit number {number}" for number in source.row_numbers] == source.rows["edit_prompt"][:]
    assert source.row_name(2) == f"train[{source.row_numbers[2]}]"
    again = open_source(str(parquet_folder), max_train_samples=3, seed=1)
    np.testing.assert_array_equal(source.row_numbers, again.row_numbers)
    assert len(open_source(str(parquet_folder), max_train_samples=99).rows) == 6
    assert len(list(open_source(str(parquet_folder), max_train_samples=3, streaming=True).rows)) == 3


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner/name.v1-2_x", "Owner/1B"])
def test_hub_ids(name: str) -> None:
    assert not looks_like_path(name) and public_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["/a/b", "./b", "../b", "~/b", "a/b/", "a//b", "a/b/c", "my pairs", "a/my pairs", "C:\\b", "C:/b", "existing", ""],
)
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that exists on this machine, or that does not have the form of a Hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").touch()
    assert looks_like_path(name) and "/" not in public_name(name)


# ---- mixes ----------------------------------------------------------------------------------------------------------


def test_mix(parquet_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(2)
    rows["before"], rows["after"] = rows.pop("original_image"), rows.pop("edited_image")
    make_dataset(rows, "before", "after").save_to_disk(str(tmp_path / "mine"))
    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n"
        f"  - {{name: {parquet_folder}, split: validation, weight: 3}}\n"
        f"  - {{name: mine, original_image_column: before, edited_image_column: after}}\n"
    )
    first, second = open_mix(tmp_path / "mix.yaml")
    assert (first.weight, first.name, len(first.rows)) == (3.0, f"{parquet_folder}:validation", 2)
    assert (second.weight, second.name, second.columns.original) == (1.0, "mine:train", "before")


def test_all_problems_of_a_mix_are_reported(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n  - {name: a, wieght: 2}\n  - {split: train, weight: -1}\n  - {name: b, weight: true}\n  - text\n"
    )
    with pytest.raises(InputError) as caught:
        open_mix(tmp_path / "mix.yaml")
    for word in ("'wieght'", "`name` is missing", "weight is -1", "weight is True", "'text' is not a mapping"):
        assert word in str(caught.value)
    (tmp_path / "mix.yaml").write_text("datasets:\n  - {name: /no/a}\n  - {name: /no/b}\n")
    with pytest.raises(InputError, match=r"(?s)datasets\[0\].*/no/a.*datasets\[1\].*/no/b"):
        open_mix(tmp_path / "mix.yaml")


@pytest.mark.parametrize("text", ["- a", "datasets: []", "a: [", "", None])
def test_mix_file_without_a_list(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(InputError, match="--train_mix"):
        open_mix(tmp_path / "mix.yaml")


# ---- held-out rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "fraction", "expected"), [(50, 0.1, 5), (50, 0.001, 1), (3, 0.99, 2), (2, 0.5, 1)]
)
def test_hold_out(num_rows: int, fraction: float, expected: int) -> None:
    kept, held_out = hold_out([make_source(num_rows)], fraction, seed=3)
    assert len(held_out[0].rows) == expected
    numbers = np.concatenate([kept[0].row_numbers, held_out[0].row_numbers])
    assert sorted(numbers) == list(range(num_rows))
    assert held_out[0].rows[0]["edit_prompt"] == f"edit number {held_out[0].row_numbers[0]}"
    again = hold_out([make_source(num_rows)], fraction, seed=3)
    np.testing.assert_array_equal(again[1][0].row_numbers, held_out[0].row_numbers)


def test_hold_out_errors(parquet_folder: Path) -> None:
    with pytest.raises(InputError, match="--validation_split is 1"):
        hold_out([make_source(3)], 1, seed=0)
    with pytest.raises(InputError, match="--streaming"):
        hold_out([open_source(str(parquet_folder), streaming=True)], 0.1, seed=0)
    with pytest.raises(InputError, match="two rows"):
        hold_out([make_source(1)], 0.5, seed=0)
    kept, held_out = hold_out([make_source(1), make_source(4)], 0.5, seed=0)
    assert [len(source.rows) for source in kept] == [1, 2]
    assert [len(source.rows) for source in held_out] == [2]


def test_rows_of_one_image_stay_together() -> None:
    """Otherwise the best weights would be chosen by an image that was trained on."""
    source = make_source(40)
    images = [source.rows[index // 4 * 4]["original_image"] for index in range(40)]  # ten images, four edits of each
    rows = source.rows.remove_columns("original_image").add_column("original_image", images)
    rows = rows.cast_column("original_image", source.rows.features["original_image"])
    source = dataclasses.replace(source, rows=rows)
    groups = group_rows(source)
    assert groups.tolist() == [index // 4 for index in range(40)]
    assert group_rows(source.select(np.arange(39, -1, -1))).tolist() == [index // 4 for index in range(40)]
    for fraction, expected in ((0.2, 8), (0.01, 4), (0.95, 36)):
        kept, held_out = hold_out([source], fraction, seed=1)
        assert len(held_out[0].rows) == expected
        assert not {*groups[kept[0].row_numbers]} & {*groups[held_out[0].row_numbers]}
    assert len(hold_out([source], 0.9, seed=1, limit=12)[1][0].rows) == 12


def test_images_by_path_and_the_folders_of_a_prompt_are_groups(tmp_path: Path) -> None:
    paths = ["0001/77_0.jpg", "0001/78_0.jpg", "0002/77_0.jpg", "photos/a.png", "photos/b.png", "photos/a.png"]
    columns = {"original_image": paths, "edit_prompt": ["x"] * 6, "edited_image": paths}
    rows = datasets.Dataset.from_dict(columns)
    for name in ("original_image", "edited_image"):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    source = Source(rows, Columns("original_image", "edit_prompt", "edited_image"), "train")
    assert group_rows(source).tolist() == [0, 0, 1, 2, 3, 2]


def test_a_stream_holds_out_its_first_rows(parquet_folder: Path) -> None:
    stream = open_source(str(parquet_folder), streaming=True)
    everything = [row["edit_prompt"] for row in stream.rows]
    rest, first = hold_out_first(stream, 3)
    assert [row["edit_prompt"] for row in first.rows] == everything[:3]
    assert [row["edit_prompt"] for row in rest.rows] == everything[3:] and rest.is_streaming and not first.is_streaming
    with pytest.raises(InputError, match="none is left to train on"):
        hold_out_first(stream, len(everything))


# ---- digest ---------------------------------------------------------------------------------------------------------


def test_digest_is_the_same_in_another_process(parquet_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from utils.data.sources import open_source, sources_digest as d\n"
        "for f in sys.argv[2:]: print(d([open_source(f, cache_dir=sys.argv[1], streaming=s) "
        "for s in (False,)]), d([open_source(f, cache_dir=sys.argv[1], streaming=True)]))"
    )
    saved, images = tmp_path / "saved", tmp_path / "images"
    make_dataset(make_rows(6)).save_to_disk(str(saved))
    write_metadata(images, write_image_folder(images, 6), "jsonl")
    folders = [str(parquet_folder), str(saved), str(images)]
    command = [sys.executable, "-c", code, str(tmp_path / "other-cache"), *folders]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    here = [sources_digest([open_source(folder, streaming=s)]) for folder in folders for s in (False, True)]
    assert output == here
    assert here[0] == here[2] == here[4]  # the same rows in different formats


def test_digest_of_a_moved_folder(tmp_path: Path) -> None:
    write_metadata(tmp_path / "a", write_image_folder(tmp_path / "a", 3), "jsonl")
    before = sources_digest([open_source(str(tmp_path / "a"))])
    (tmp_path / "a").rename(tmp_path / "b")
    assert sources_digest([open_source(str(tmp_path / "b"))]) == before


def test_digest_of_many_files_changes_with_each_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where seeds.json lists other images of the same folders, between those whose sizes are looked at."""
    monkeypatch.setattr("utils.data.sources.MAX_SIZED_FILES", 3)
    monkeypatch.setattr("utils.data.sources.DIGESTED_ROWS", 2)
    names = write_image_folder(tmp_path, 9)
    write_metadata(tmp_path, names, "jsonl")
    before = sources_digest([open_source(str(tmp_path))])
    other = tmp_path / "another.png"
    metadata = tmp_path / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    column = next(name for name, value in rows[4].items() if str(value).endswith(".png"))
    shutil.copy(tmp_path / rows[4][column], other)
    rows[4][column] = other.name
    metadata.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert sources_digest([open_source(str(tmp_path))]) != before


def test_digest_changes_with_the_rows() -> None:
    bigger = {"bytes": make_rows(1)["original_image"][0]["bytes"] + b"x", "path": None}
    rows = make_rows(300)
    other_pixels = {"bytes": rows["original_image"][1]["bytes"], "path": None}
    variants = [
        [make_source(300)],
        [make_source(299)],
        [make_source(300, edit_prompt={171: "another"})],
        [make_source(300, edit_prompt={171: None})],
        [make_source(300, edited_image={171: bigger})],
        [make_source(300, original_image={0: other_pixels})],
        [make_source(300, weight=2.0)],
        [make_source(300), make_source(300)],
        [make_source(300).select(np.arange(299))],
        [make_source(300).select(np.arange(1, 300))],
        hold_out([make_source(300)], 0.1, seed=0)[0],
        hold_out([make_source(300)], 0.1, seed=1)[0],
    ]
    assert len({sources_digest(sources) for sources in variants}) == len(variants)
    assert sources_digest(variants[0]) == sources_digest([make_source(300)])
