"""Training on datasets with mistakes: wrong columns and files are errors; bad rows are skipped, counted and named.

Every test calls the training script's `main`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.mistakes import fails_early, fails_late, finishes, output_dir_of
from tests.pairs import encode, make_dataset, make_image, make_rows, write_image_folder
from tests.runs import training_flags
from tests.test_pixels import png_header


@pytest.fixture
def flags_on(tiny_base: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """flags_on(rows or folder, *more): flags for two steps, which visit each of four rows once."""

    def make(data: dict[str, list] | datasets.Dataset | Path, *more: str) -> list[str]:
        if not isinstance(data, Path):
            folder = tmp_path / "pairs"
            (make_dataset(data) if isinstance(data, dict) else data).save_to_disk(str(folder))
            data = folder
        return training_flags(
            tiny_base, data, tmp_path / "out", "--max_train_steps=2", "--report_to=none", "--max_bad_rows=1", *more
        )

    return make


def spoilt(num_rows: int = 4, **changes: dict[int, object]) -> dict[str, list]:
    """Good rows except `column={row: value}`; a value of bytes is an image file."""
    rows = make_rows(num_rows)
    for column, values in changes.items():
        for row, value in values.items():
            rows[column][row] = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    return rows


# ---- columns --------------------------------------------------------------------------------------------------------


def plain(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def renamed(old: str, new: str) -> datasets.Dataset:
    return make_dataset(make_rows(4)).rename_column(old, new)


COLUMN_MISTAKES = {
    "missing column": (
        lambda: make_dataset(make_rows(4)).remove_columns("edited_image"),
        "",
        ("--edited_image_column", "original_image (image), edit_prompt (string)"),
    ),
    "unknown names": (
        lambda: renamed("edit_prompt", "what"),
        "",
        ("not known", "--edit_prompt_column", "what (string)"),
    ),
    "wrong name by flag": (
        lambda: make_dataset(make_rows(4)),
        "--edit_prompt_column=promt",
        ("no column 'promt'", "edit_prompt (string)"),
    ),
    "image and prompt swapped": (
        lambda: make_dataset(make_rows(4)),
        "--original_image_column=edit_prompt --edit_prompt_column=original_image",
        ("--original_image_column: column 'edit_prompt' holds string", "--edit_prompt_column: column 'original_image'"),
    ),
    "one column twice": (
        lambda: make_dataset(make_rows(4)),
        "--original_image_column=edited_image",
        ("both name 'edited_image'",),
    ),
    "text in an image column": (
        lambda: plain(original_image=["a"] * 4, edit_prompt=["b"] * 4, edited_image=["c"] * 4),
        "",
        ("--original_image_column: column 'original_image' holds string", "an image is needed"),
    ),
    "integers as prompts": (
        lambda: make_dataset(make_rows(4) | {"edit_prompt": [1, 2, 3, 4]}),
        "",
        ("--edit_prompt_column: column 'edit_prompt' holds int64", "a string"),
    ),
    "no rows": (lambda: make_dataset(make_rows(1)).select([]), "", ("has no rows",)),
    "unknown split": (
        lambda: make_dataset(make_rows(4)),
        "--dataset_split=test",
        ("--dataset_split 'test'", "its splits: train"),
    ),
    "unknown configuration": (
        lambda: make_dataset(make_rows(4)),
        "--dataset_config_name=small",
        ("--dataset_config_name small", "no config"),
    ),
    "one row to hold out": (
        lambda: make_dataset(make_rows(1)),
        "--validation_split=0.5",
        ("--validation_split", "two rows"),
    ),
}


@pytest.mark.parametrize("make, extra, words", COLUMN_MISTAKES.values(), ids=COLUMN_MISTAKES)
def test_columns(flags_on: Callable, make: Callable, extra: str, words: tuple[str, ...]) -> None:
    fails_early(flags_on(make(), *extra.split()), *words)


# ---- missing data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, words",
    [
        ("/no/such/folder", ("the folder /no/such/folder does not exist",)),
        ("./no-such-folder", ("the folder ./no-such-folder does not exist", "id of the Hub")),
        ("nobody/nothing", ("nobody/nothing from the Hugging Face Hub",)),
        (__file__, ("is a file", "give its folder")),
    ],
    ids=["missing folder", "missing relative folder", "Hub id while offline", "a file"],
)
def test_missing_dataset(flags_on: Callable, data: str, words: tuple[str, ...]) -> None:
    fails_early(flags_on(Path("unused"), f"--dataset_name={data}"), *words)


@pytest.mark.parametrize(
    "content, words",
    [(b"PAR1 and no more", ("cannot open", "Either the file is corrupted")), (b"", ("cannot open", "0 bytes"))],
    ids=["cut off", "0 bytes"],
)
def test_damaged_parquet(flags_on: Callable, tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").write_bytes(content)
    fails_late(flags_on(tmp_path / "data"), str(tmp_path / "data"), *words)


def test_empty_folder(flags_on: Callable, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    fails_early(flags_on(tmp_path / "data"), str(tmp_path / "data"), "any data files")


# ---- folders of images ----------------------------------------------------------------------------------------------


def write_metadata(folder: Path, num_rows: int = 4) -> list[str]:
    """Pairs as files with a metadata.jsonl; returns its lines."""
    columns = write_image_folder(folder, num_rows)
    lines = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return lines


def test_one_missing_image_file(flags_on: Callable, tmp_path: Path) -> None:
    write_metadata(tmp_path / "data")
    (tmp_path / "data/edited_image/1.png").unlink()
    words = ("skipped train[1]: edited image: no such file", "1 bad rows were skipped: train[1]")
    finishes(flags_on(tmp_path / "data"), *words)


def test_all_image_files_missing(flags_on: Callable, tmp_path: Path) -> None:
    write_metadata(tmp_path / "data")
    for path in (tmp_path / "data").glob("*/*.png"):
        path.unlink()
    fails_early(flags_on(tmp_path / "data"), "4 consecutive rows cannot be used", "train[0]", "no such file")


def test_metadata_with_invalid_json(flags_on: Callable, tmp_path: Path) -> None:
    lines = write_metadata(tmp_path / "data")
    (tmp_path / "data/metadata.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    fails_early(flags_on(tmp_path / "data"), "metadata.jsonl, line 2 is not JSON")


def test_metadata_without_a_header(flags_on: Callable, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", 2)
    lines = [f"original_image/{number}.png,red,edited_image/{number}.png\n" for number in (0, 1)]
    (tmp_path / "data/metadata.csv").write_text("".join(lines))
    fails_early(flags_on(tmp_path / "data"), "not known", "red (string)")


# ---- rows -----------------------------------------------------------------------------------------------------------

PNG = encode(make_image(1))
BAD_ROWS = [  # (column, value, reason)
    ("original_image", None, "original image: no image"),
    ("original_image", b"", "original image: empty file (0 bytes)"),
    ("edited_image", b"no image at all", "edited image: not an image in a format"),
    ("edited_image", PNG[:66], "edited image: cannot be decoded"),
    ("edited_image", encode(make_image(1), "JPEG")[:400], "edited image: cannot be decoded"),
    ("original_image", encode(make_image(1, (1, 1))), "original image: too small: 1x1 pixels"),
    ("original_image", png_header(20_000, 20_000), "original image: too large"),
    (
        "edited_image",
        encode(make_image(1, (48, 40))),
        "the aspect ratios of the two images differ by more than 2% (48x40",
    ),
    ("edit_prompt", None, "no prompt"),
    ("edit_prompt", "", "empty prompt"),
    ("edit_prompt", " \n", "empty prompt"),
]


def test_bad_rows_are_skipped_counted_and_named(flags_on: Callable) -> None:
    """Every second row is bad, each for another reason; two steps visit every row once."""
    count = len(BAD_ROWS)
    changes = {column: {} for column, _, _ in BAD_ROWS}
    for number, (column, value, _) in enumerate(BAD_ROWS):
        changes[column][2 * number] = value
    flags = flags_on(spoilt(2 * count, **changes), f"--train_batch_size={count}", f"--max_bad_rows={count}")
    seen = finishes(flags, f"{count} bad rows were skipped: train[", f"(bad rows so far: {count})")
    for number, (_, _, reason) in enumerate(BAD_ROWS):
        assert f"skipped train[{2 * number}]: {reason}" in seen


def test_an_empty_list_of_prompts_is_skipped(flags_on: Callable) -> None:
    rows = make_rows(4) | {"edit_prompt": [["one", "another"], [], ["x"], [None, "y"]]}
    finishes(flags_on(rows), "skipped train[1]: no prompt in the list", "1 bad rows were skipped: train[1]")


IMAGE = make_image(1)
UNUSUAL_IMAGES = {
    "CMYK": encode(IMAGE.convert("CMYK"), "JPEG"),
    "16 bits": encode(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(np.uint16) * 257)),
    "palette": encode(IMAGE.convert("P")),
    "palette with transparency": encode(IMAGE.convert("P"), transparency=0),
    "RGBA": encode(IMAGE.convert("RGBA")),
    "grey with alpha": encode(IMAGE.convert("LA")),
    "1 bit": encode(IMAGE.convert("1")),
    "animated": encode(IMAGE.convert("P"), "GIF", save_all=True, append_images=[make_image(2)]),
    "20,000 pixels wide": encode(make_image(1, (16, 20_000))),
}


def test_unusual_images_are_used_for_training(flags_on: Callable) -> None:
    images = dict(enumerate(UNUSUAL_IMAGES.values()))
    rows = spoilt(len(images), original_image=images, edited_image=images)
    assert "skipped" not in finishes(flags_on(rows, f"--train_batch_size={len(images)}", "--max_train_steps=1"))


def test_prompts_over_the_token_limit_are_used_and_reported(flags_on: Callable) -> None:
    rows = spoilt(edit_prompt={1: "make it blue " * 40, 2: "x" * 500})
    seen = finishes(flags_on(rows), "2 prompts were longer than the text encoder's limit")
    assert "skipped" not in seen


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_dataset_smaller_than_a_batch_is_enough(flags_on: Callable, num_rows: int) -> None:
    assert "skipped" not in finishes(flags_on(make_rows(num_rows), "--train_batch_size=4"))


@pytest.mark.parametrize(
    "limit, words", [("1", ("--max_bad_rows 1", "2 rows are bad")), ("0.4", ("--max_bad_rows 0.4", "1.6 of 4 rows"))]
)
def test_more_bad_rows_than_allowed(flags_on: Callable, limit: str, words: tuple[str, ...]) -> None:
    rows = spoilt(original_image={1: b"", 2: b"no image"})
    fails_late(flags_on(rows, f"--max_bad_rows={limit}"), *words, "train[1]: original image", "raise the limit")


def test_bad_rows_are_counted_across_a_resumed_run(flags_on: Callable) -> None:
    rows = spoilt(original_image={1: b""})
    finishes(flags_on(rows, "--checkpointing_steps=2"))
    flags = [flag for flag in flags_on(Path("unused")) if not flag.startswith("--dataset_name")]
    pairs = output_dir_of(flags).parent / "pairs"
    more = (f"--dataset_name={pairs}", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    finishes([*flags, *more], "1 bad rows were skipped: train[1]")
    fails_late([*flags, *more, "--max_train_steps=4", "--max_bad_rows=0"], "1 rows are bad", "train[1]")


def test_only_bad_rows(flags_on: Callable) -> None:
    rows = make_rows(4) | {"edit_prompt": [None, "", " ", None]}
    fails_early(flags_on(rows, "--max_bad_rows=100"), "4 consecutive rows cannot be used", "train[3]: no prompt")


# ---- streams --------------------------------------------------------------------------------------------------------


def test_a_bad_row_of_a_stream_is_skipped(flags_on: Callable) -> None:
    finishes(flags_on(spoilt(edited_image={1: b""}), "--streaming", "--max_bad_rows=5"), "empty file", "bad rows were")


def test_a_stream_with_only_bad_rows(flags_on: Callable) -> None:
    rows = make_rows(4) | {"edit_prompt": [None, "", " ", None]}
    fails_early(flags_on(rows, "--streaming"), "4 consecutive rows cannot be used", "no prompt")


def test_an_empty_stream(flags_on: Callable) -> None:
    fails_early(flags_on(make_dataset(make_rows(1)).select([]), "--streaming"), "has no rows")


# ---- mixes ----------------------------------------------------------------------------------------------------------

MIX_MISTAKES = {
    "missing file": (None, ("cannot be read", "No such file")),
    "bad YAML": ("datasets: [", ("cannot be read", "line 1")),
    "no list": ("pairs", ("`datasets:`", "`name:`")),
    "unknown key": ("datasets: [{name: pairs, wieght: 2}]", ("datasets[0]", "'wieght'", "weight")),
    "missing name": ("datasets: [{split: train}]", ("datasets[0]", "`name` is missing")),
    "negative weight": ("datasets: [{name: pairs, weight: -1}]", ("weight is -1", "above 0")),
    "missing datasets": ("datasets: [{name: /no/a}, {name: /no/b}]", ("datasets[0]", "/no/a", "datasets[1]", "/no/b")),
    "unknown column": ("datasets: [{name: pairs, edit_prompt_column: what}]", ("datasets[0]", "no column 'what'")),
}


@pytest.mark.parametrize("text, words", MIX_MISTAKES.values(), ids=MIX_MISTAKES)
def test_mix(flags_on: Callable, tmp_path: Path, text: str | None, words: tuple[str, ...]) -> None:
    flags = [flag for flag in flags_on(make_rows(4)) if not flag.startswith("--dataset_name")]
    if text is not None:
        (tmp_path / "mix.yaml").write_text(text)
    fails_early([*flags, f"--train_mix={tmp_path / 'mix.yaml'}"], "--train_mix", "mix.yaml", *words)
