"""Copies of published datasets train without column flags, and can be imported."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

import finetune_instruct_pix2pix
import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from data_preparation import import_pairs
from tests.published import BLUE, RED, SHAPES, TEXT, save_shape
from tests.runs import losses_of, training_flags
from utils.data.batches import make_loader
from utils.data.columns import Columns
from utils.data.geometry import Geometry
from utils.data.samples import check_first_rows
from utils.data.sources import open_source
from utils.errors import InputError
from utils.pixels import decode_image

SCRIPTS = [train_instruct_pix2pix, finetune_instruct_pix2pix, train_instruct_pix2pix_sdxl]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small copy of each dataset under its own name."""
    folder = tmp_path_factory.mktemp("published")
    for name, shape in SHAPES.items():
        save_shape(folder / name, shape)
    return folder


def has_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Whether (H, W, 3) or (B, 3, H, W) has one colour, apart from JPEG artefacts."""
    axes = (0, 1) if pixels.ndim == 3 else (0, 2, 3)
    return np.abs(pixels.mean(axis=axes) - np.array(colour)).max() < 4


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", SHAPES)
def test_columns_and_first_batch(name, streaming, published):
    shape = SHAPES[name]
    source = open_source(str(published / name), split=shape.split, streaming=streaming)
    assert source.columns == Columns(shape.original, shape.prompt, shape.edited)
    assert check_first_rows([source], Geometry(32)) == []
    if streaming and name != "BleachNick/UltraEdit":  # datasets waits five seconds at the end of each shuffled stream
        return
    batch = next(iter(make_loader([source], Geometry(32), seed=0, batch_size=3, num_train_timesteps=1000)))
    assert has_colour(batch["original_pixels"].numpy(), RED) and has_colour(batch["edited_pixels"].numpy(), BLUE)
    assert all(prompt.startswith(f"{shape.prompt} ") for prompt in batch["prompts"]) and batch["bad_rows"] == []


@pytest.mark.parametrize("name", SHAPES)
def test_training_without_column_flags(name, published, tiny_base, tiny_editor, tiny_sdxl, tmp_path):
    """One step for each dataset, with the three scripts in turn."""
    index = list(SHAPES).index(name) % len(SCRIPTS)
    base = (tiny_base, tiny_editor, tiny_sdxl)[index]
    flags = training_flags(base, published / name, tmp_path / "out", "--max_train_steps=1", "--report_to=none")
    flags += ["--max_bad_rows=0", "--streaming"] if "OmniEdit" in name else ["--max_bad_rows=0"]
    if SHAPES[name].split != "train":
        flags.append(f"--dataset_split={SHAPES[name].split}")
    SCRIPTS[index].main(flags)
    assert len(losses_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_import(name, published, tmp_path):
    shape = SHAPES[name]
    flags = ["--source", str(published / name), "--data_root", str(tmp_path / "pairs"), "--dataset_split", shape.split]
    import_pairs.main(flags)
    (path,) = (tmp_path / "pairs/data").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    stored = open_source(str(published / name), split=shape.split).rows
    assert len(rows) == len(stored) == 4
    for row, before in zip(rows, stored, strict=True):
        assert row["edited_image"]["bytes"] == before[shape.edited]["bytes"]
        assert has_colour(np.asarray(decode_image(row["original_image"])), RED)
        assert row["edit_prompt"] in before[shape.prompt] and row["source_dataset"] == name.split("/")[1]
    captions = [
        name
        for name in ("original_prompt", "input", "source_caption", "INPUT_CAPTION_BY_LLAMA")
        if name in shape.features
    ]
    assert rows[1]["original_prompt"] == (f"{captions[0]} 1" if captions else None)
    assert set(json.loads(rows[0]["scores"] or "{}")) == {
        {"clip_sim_source": "clip_sim_0", "clip_sim_target": "clip_sim_1"}.get(column, column)
        for column in shape.features
        if "sim" in column or "score" in column
    }
    if "cartoonization" in name:
        assert decode_image(rows[0]["original_image"]).size == (1080, 720)
    source = open_source(str(tmp_path / "pairs"))
    assert check_first_rows([source], Geometry(32)) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sysuyy/ImgEdit", ["lists of paths", "import_pairs.py"]),
        ("AILab-CVC/SEED-Data-Edit-Part1-Openimages", ["split tar.gz archives", "import_pairs.py"]),
        ("AILab-CVC/SEED-Data-Edit-Part1-Unsplash", ["split tar.gz archives", "import_pairs.py"]),
        ("apple/pico-banana-400k", ["jsonl of URLs", "import_pairs.py"]),
    ],
)
def test_archives_are_refused_before_the_download(name, words, tiny_base, tmp_path, capsys):
    with pytest.raises(InputError) as caught:
        open_source(name)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(SystemExit):
        train_instruct_pix2pix.main(training_flags(tiny_base, Path(name), tmp_path / "out"))
    assert words[0] in capsys.readouterr().err


def test_unknown_columns_need_flags(tmp_path):
    """UCSC-VLAA/GPT-Image-Edit-1.5M: columns that are not known are not guessed by their position."""
    features = dict(picture=datasets.Image(), words=TEXT, result=datasets.Image())
    values = dict(picture=[None], words=["x"], result=[None])
    rows = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    (tmp_path / "GPT-Image-Edit-1.5M").mkdir()
    rows.to_parquet(str(tmp_path / "GPT-Image-Edit-1.5M/train.parquet"))
    with pytest.raises(InputError, match="are not known: name them with --original_image_column"):
        open_source(str(tmp_path / "GPT-Image-Edit-1.5M"))
