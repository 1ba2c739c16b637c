"""import_pairs.py: pairs from two folders, the original InstructPix2Pix's files, datasets and tables."""

import csv
import io
import json
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import train_instruct_pix2pix
from data_preparation import import_pairs
from data_preparation.exporting.reading import open_input
from data_preparation.generation.pair_rows import pair_features
from data_preparation.importing.source_pairs import cartoonized_size, resize_like_cartoon
from data_preparation.instructions import read_phrasings
from tests.hub_server import hub_server
from tests.pairs import encode, make_image, make_rows
from tests.runs import ENVIRONMENT, REPOSITORY, training_flags
from utils.data.geometry import Geometry
from utils.data.samples import check_first_rows
from utils.data.sources import open_source
from utils.errors import InputError

SCRIPT = "data_preparation/import_pairs.py"
IMAGE, TEXT, NULL = datasets.Image(), datasets.Value("string"), datasets.Value("null")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(source: Path | str, data_root: Path, *flags: object) -> list[dict]:
    """Import and read all rows back; images as their bytes, JSON columns as values."""
    import_pairs.main(["--source", str(source), "--data_root", str(data_root), *map(str, flags)])
    return read(data_root)


def read(data_root: Path) -> list[dict]:
    rows = [row for path in sorted((data_root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        for name in ("original_image", "edited_image"):
            row[name] = row[name]["bytes"]
        for name in ("models", "settings", "scores"):
            row[name] = row[name] and json.loads(row[name])
    return rows


def refused(capsys: pytest.CaptureFixture, *flags: object) -> str:
    """The error message of a run that must fail."""
    with pytest.raises(SystemExit) as caught:
        import_pairs.main([str(flag) for flag in flags])
    assert caught.value.code == 2
    return capsys.readouterr().err


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def image_file(index: int, file_format: str = "PNG", size: tuple[int, int] = (40, 48)) -> bytes:
    return encode(make_image(index, size), file_format)


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def two_folders(folder: Path, count: int = 3, before: str = "original", after: str = "edited") -> Path:
    files = {f"{before}/{index:03d}.jpg": image_file(index, "JPEG") for index in range(count)}
    files |= {f"{after}/{index:03d}_edited.png": image_file(index + 50) for index in range(count)}
    return write(folder, files)


def save_published(folder: Path, features: dict, rows: dict, split: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
        str(folder / f"data/{split}-00000-of-00001.parquet")
    )
    return folder


def stored(*contents: bytes | None) -> list[dict | None]:
    return [content and {"bytes": content, "path": None} for content in contents]


# --- two folders ------------------------------------------------------------------------------------------------


def test_pairs_of_two_folders_can_be_trained_on(tmp_path, tiny_base, capsys):
    source = two_folders(tmp_path / "images")
    write(
        source,
        {
            "original/alone.png": image_file(9),
            "edited/other.png": image_file(9),
            "original/sub/deep.png": image_file(7),
            "edited/sub/deep.webp": image_file(8, "WEBP"),
            "original/cut.jpg": image_file(1, "JPEG")[:150],
            "edited/cut.jpg": image_file(1, "JPEG"),
            "original/wide.png": image_file(1, size=(40, 80)),
            "edited/wide.png": image_file(1),
            "README.md": "---\nlicense: cc-by-4.0\n---\n",
        },
    )
    rows = run(source, tmp_path / "pairs", "--edit_prompt", "Paint it.", " Draw it. ")
    assert [row["source"] for row in rows] == ["000.jpg", "001.jpg", "002.jpg", "sub/deep.png"]
    assert rows[0]["original_image"] == image_file(0, "JPEG") and rows[3]["edited_image"] == image_file(8, "WEBP")
    assert {row["edit_prompt"] for row in rows} <= {"Paint it.", "Draw it."}
    assert {(row["source_dataset"], row["source_license"]) for row in rows} == {("images", "cc-by-4.0")}
    printed = capsys.readouterr()
    assert "files without a partner in" in printed.err and "alone.png" in printed.err and "other.png" in printed.err
    assert "rejected, the aspect ratios of the two images differ by more than 2%: 1" in printed.out
    assert "rejected, original image cannot be decoded: 1" in printed.out

    loaded = datasets.load_dataset(str(tmp_path / "pairs"), split="train")
    assert loaded.features == pair_features() and loaded[0]["original_image"].size == (48, 40)
    flags = training_flags(tiny_base, tmp_path / "pairs", tmp_path / "out", "--max_train_steps=1", "--report_to=none")
    train_instruct_pix2pix.main(flags)
    assert (tmp_path / "out/unet/config.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "000\tzero\n001.jpg\tone\n001.jpg\tuno\n\n002\ttwo\n"),
        ("prompts.csv", 'file_name,instruction\n000.jpg,zero\noriginal/001.jpg,one\n001.jpg,uno\n002,"two"\n'),
        (
            "prompts.jsonl",
            '{"name": "000", "prompt": "zero"}\n{"name": "001", "prompt": ["one", "uno"]}\n'
            '{"name": "002.jpg", "prompt": "two"}\n',
        ),
    ],
)
def test_prompt_files(name, content, tmp_path):
    source = write(two_folders(tmp_path / "images"), {name: content})
    rows = run(source, tmp_path / "pairs", "--all_prompts")
    assert [row["edit_prompt"] for row in rows] == ["zero", "one", "uno", "two"]
    drawn = [row["edit_prompt"] for row in run(source, tmp_path / "drawn", "--seed", 5)]
    assert drawn[0] == "zero" and drawn[1] in ("one", "uno") and len(drawn) == 3


def test_task_gives_its_training_phrasings(tmp_path):
    source = two_folders(tmp_path / "images", 30, "A", "B")
    rows = run(source, tmp_path / "pairs", "--task", "cartoonize", "--heldout_phrasings", 3)
    train, heldout = read_phrasings("cartoonize", 3)
    prompts = {row["edit_prompt"] for row in rows}
    assert prompts <= set(train) and not prompts & set(heldout) and len(prompts) > 5
    assert {(row["task"], row["phrasing"]) for row in rows} == {("cartoonize", "train")}


def test_files_that_differ_only_in_their_suffix_are_not_used(tmp_path, capsys):
    source = two_folders(tmp_path / "images")
    write(source, {"original/001.png": image_file(4), "edited/x.jpg": image_file(1, "JPEG")})
    rows = run(source / "original", tmp_path / "pairs", "--edited_dir", source / "edited", "--edit_prompt", "Go.")
    assert [row["source"] for row in rows] == ["000.jpg", "002.jpg"]
    assert "files with the same name but different suffixes in" in (printed := capsys.readouterr().err)
    assert "001.jpg, 001.png" in printed


def test_edited_folder_inside_the_folder_of_originals(tmp_path):
    source = two_folders(tmp_path / "images", before=".", after="edited")
    assert len(run(source, tmp_path / "pairs", "--edited_dir", source / "edited", "--edit_prompt", "Go.")) == 3


def test_folders_of_instruction_tuned_sd(tmp_path, capsys):
    """A folder for each pair, as its generate_dataset.py writes them; the instructions are in a file."""
    cartoons = {index: image_file(50 + index, size=(40, 48)) for index in range(3)}
    files = {f"{index}ab/cartoonized_image.png": content for index, content in cartoons.items()}
    files |= {f"{index}ab/original_image.png": image_file(index, size=(41, 50)) for index in range(3)}
    files |= {"broken/original_image.png": image_file(7), "instructions.txt": "\n".join(f"toon {i}" for i in range(12))}
    source = write(tmp_path / "cartoonizer-dataset", files)
    with pytest.raises(InputError, match="has a folder for each pair and no instructions; run import_pairs.py"):
        open_input(source, "train")
    rows = run(source, tmp_path / "pairs", "--task", source / "instructions.txt")
    assert "1 folders without exactly one original and one edited image" in capsys.readouterr().err
    assert [row["edited_image"] for row in rows] == list(cartoons.values())
    assert [pixels(row["original_image"]).shape for row in rows] == [(40, 48, 3)] * 3  # cropped like them
    assert {row["edit_prompt"] for row in rows} <= {"toon 0", "toon 1"}
    assert [row["source"] for row in rows] == [f"{index}ab/original_image.png" for index in range(3)]


def test_images_that_programs_decode_differently_are_encoded_again(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    photo = make_image(1, (48, 40))
    alpha = make_image(2).convert("RGBA")
    alpha.putalpha(0)
    files = {
        "before/a.jpg": encode(photo, "JPEG", exif=turned),
        "after/a.png": image_file(3),
        "before/b.png": encode(alpha),
        "after/b.png": image_file(4),
        "before/c.bmp": image_file(5, "BMP"),
        "after/c.jpg": encode(make_image(6).convert("L"), "JPEG"),
        "after/d.png": image_file(8),
        "before/d.jpg": encode(make_image(7).convert("CMYK"), "JPEG"),
    }
    rows = run(write(tmp_path / "images", files), tmp_path / "pairs", "--edit_prompt", "Go.")
    assert [row["edited_image"] for row in rows] == [
        files[f"after/{name}"] for name in ("a.png", "b.png", "c.jpg", "d.png")
    ]
    assert all(row["original_image"].startswith(b"\x89PNG") for row in rows)
    decoded = np.asarray(Image.open(io.BytesIO(files["before/a.jpg"])).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(rows[0]["original_image"]), decoded)
    assert (pixels(rows[1]["original_image"]) == 255).all()
    assert np.array_equal(pixels(rows[2]["original_image"]), np.asarray(make_image(5)))


# --- original InstructPix2Pix's files -----------------------------------------------------------------------


def seed_folders(folder: Path) -> Path:
    files: dict[str, bytes | str] = {}
    for index, key in enumerate(("input", "caption")):
        name, seeds = f"{index:07d}", (11, 22, 33)
        files[f"{name}/prompt.json"] = json.dumps({key: f"a cat {index}", "edit": "make it a dog", "output": "a dog"})
        lines = [
            {"seed": seed, "clip_sim_dir": seed / 100, "clip_sim_0": 0.25, "cfg_scale": 7.5, "p2p_threshold": 0.5}
            for seed in seeds
        ]
        files[f"{name}/metadata.jsonl"] = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"seed": 4'
        for seed in seeds:
            files |= {f"{name}/{seed}_{side}.jpg": image_file(seed + side, "JPEG") for side in (0, 1)}
    files["seeds.json"] = json.dumps([["0000000", [11, 22, 33]], ["0000001", [11, 22, 33]]])
    return write(folder, files)


def test_original_instruct_pix2pix_folders(tmp_path):
    source = seed_folders(tmp_path / "clip-filtered")
    rows = run(source, tmp_path / "pairs", "--source_license", "other")
    assert [(row["source"], row["seed"]) for row in rows] == [
        (f"000000{i}", seed) for i in (0, 1) for seed in (11, 22, 33)
    ]
    first = rows[0]
    assert first["original_image"] == image_file(11, "JPEG") and first["edited_image"] == image_file(12, "JPEG")
    assert (first["original_prompt"], first["edited_prompt"]) == ("a cat 0", "a dog")
    assert first["edit_prompt"] == "make it a dog" and rows[5]["original_prompt"] == "a cat 1"
    assert first["scores"] == {"clip_sim_0": 0.25, "clip_sim_dir": 0.11}
    assert first["settings"] == {"cfg_scale": 7.5, "p2p_threshold": 0.5} and first["source_license"] == "other"
    best = run(source, tmp_path / "best", "--samples_per_prompt", 1)
    assert [(row["source"], row["seed"]) for row in best] == [("0000000", 33), ("0000001", 33)]
    (source / "seeds.json").unlink()
    assert run(source, tmp_path / "again", "--source_license", "other") == rows


def test_errors_in_original_instruct_pix2pix_folders_are_counted(tmp_path, capsys):
    source = seed_folders(tmp_path / "seeds")
    (source / "0000000/22_1.jpg").unlink()
    (source / "0000001/prompt.json").write_text('{"edit": "x", "output": "y"}')
    entries = json.loads((source / "seeds.json").read_text()) + [["0000009", ["1"]]]
    (source / "seeds.json").write_text(json.dumps(entries))
    assert [row["seed"] for row in run(source, tmp_path / "pairs")] == [11, 33]
    printed = capsys.readouterr().out
    for reason in ("edited image no such file: 1", "prompt.json misses a key: 1", "no such folder: 1"):
        assert f"rejected, {reason}" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[[", "is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "names no pair"),
        ('[["a", [1]], ["b"], ["c", ["x"]], ["d", [-1]]]', "3 of 4 entries are not [folder, [seed, ...]]"),
    ],
)
def test_invalid_seeds_json(content, words, tmp_path, capsys):
    write(tmp_path / "seeds", {"seeds.json": content})
    assert words in refused(capsys, "--source", tmp_path / "seeds", "--data_root", tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


# --- published datasets -----------------------------------------------------------------------------------------


def test_omni_edit_draws_a_prompt_or_uses_all(tmp_path):
    features = dict(
        omni_edit_id=TEXT,
        task=TEXT,
        src_img=IMAGE,
        edited_img=IMAGE,
        edited_prompt_list=datasets.List(TEXT),
        sc_score_1=datasets.Value("int64"),
        o_score=datasets.Value("float64"),
    )
    rows = dict(
        omni_edit_id=["o1", "o2"],
        task=["removal", "style"],
        src_img=stored(image_file(0), image_file(1)),
        edited_img=stored(image_file(2), image_file(3)),
        edited_prompt_list=[["a", "b", "", "a"], ["c"]],
        sc_score_1=[9, 8],
        o_score=[8.123456, 7.0],
    )
    source = save_published(tmp_path / "omni", features, rows)
    every = run(source, tmp_path / "all", "--all_prompts")
    assert [row["edit_prompt"] for row in every] == ["a", "b", "c"]
    drawn = {run(source, tmp_path / f"{seed}", "--seed", seed)[0]["edit_prompt"] for seed in range(6)}
    assert drawn == {"a", "b"}
    assert every[0]["task"] == "removal" and every[0]["source"] == "o1"
    assert every[0]["scores"] == {"o_score": 8.1235, "sc_score_1": 9.0}
    assert every[0]["original_image"] == image_file(0)


def test_hq_edit_inverse_pairs(tmp_path, capsys):
    features = dict(input=TEXT, input_image=IMAGE, edit=TEXT, inverse_edit=TEXT, output=TEXT, output_image=IMAGE)
    rows = dict(
        input=["a cat", "a"],
        edit=["to dog", "x"],
        inverse_edit=["to cat", None],
        output=["a dog", "b"],
        input_image=stored(image_file(0), image_file(1)),
        output_image=stored(image_file(2), image_file(3)),
    )
    source = save_published(tmp_path / "HQ-Edit", features, rows)
    plain = run(source, tmp_path / "plain")
    assert [(row["edit_prompt"], row["original_prompt"]) for row in plain] == [("to dog", "a cat"), ("x", "a")]
    found = run(source, tmp_path / "pairs", "--inverse")
    assert [row["edit_prompt"] for row in found] == ["to dog", "to cat", "x"]
    back = found[1]
    assert (back["original_image"], back["edited_image"]) == (image_file(2), image_file(0))
    assert (back["original_prompt"], back["edited_prompt"]) == ("a dog", "a cat")
    assert back["settings"] == {"inverse": True} and back["source"] == found[0]["source"]
    assert "rejected, no instruction: 1" in capsys.readouterr().out


def test_any_edit_rows_with_a_second_image_are_rejected(tmp_path, capsys):
    features = dict(
        edit_type=TEXT,
        edit_instruction=TEXT,
        visual_input=IMAGE,
        image_file=IMAGE,
        edited_file=IMAGE,
        input=TEXT,
        output=TEXT,
    )
    rows = dict(
        edit_type=["add", "visual_sketch"],
        edit_instruction=["add it", "follow it"],
        input=["a", "b"],
        output=["c", "d"],
        visual_input=stored(None, image_file(9)),
        image_file=stored(image_file(0), image_file(1)),
        edited_file=stored(image_file(2), image_file(3)),
    )
    (row,) = run(save_published(tmp_path / "any", features, rows), tmp_path / "pairs")
    assert (row["task"], row["original_prompt"], row["edited_prompt"]) == ("add", "a", "c")
    assert "rejected, needs a second image: 1" in capsys.readouterr().out


def test_ultra_edit_scores_are_renamed_and_null_columns_ignored(tmp_path):
    score = datasets.Value("float64")
    features = dict(
        clip_sim_source=score,
        clip_sim_target=score,
        clip_sim_dir=score,
        dinov2_sim=score,
        ssim=score,
        source_caption=TEXT,
        target_caption=TEXT,
        source_image=IMAGE,
        edited_image=IMAGE,
        mask_image=NULL,
        edit_prompt=TEXT,
        edit_object=NULL,
    )
    rows = dict(
        clip_sim_source=[0.3],
        clip_sim_target=[0.2],
        clip_sim_dir=[0.1],
        dinov2_sim=[0.9],
        ssim=[float("nan")],
        source_caption=["a cat"],
        target_caption=["a dog"],
        source_image=stored(image_file(0)),
        mask_image=[None],
        edited_image=stored(image_file(1)),
        edit_prompt=["to dog"],
        edit_object=[None],
    )
    source = save_published(tmp_path / "ultra", features, rows, "FreeForm_0")
    (row,) = run(source, tmp_path / "pairs", "--dataset_split", "FreeForm_0")
    assert row["scores"] == {"clip_sim_0": 0.3, "clip_sim_1": 0.2, "clip_sim_dir": 0.1, "dinov2_sim": 0.9}
    assert (row["original_prompt"], row["edited_prompt"], row["source"]) == ("a cat", "a dog", "FreeForm_0[0]")


def test_magic_brush_turns_share_their_source(tmp_path):
    features = dict(
        img_id=TEXT,
        turn_index=datasets.Value("int32"),
        source_img=IMAGE,
        mask_img=IMAGE,
        instruction=TEXT,
        target_img=IMAGE,
    )
    transparent = Image.new("RGBA", (10, 8), (9, 9, 9, 255))
    transparent.paste((0, 0, 0, 0), (0, 0, 5, 8))
    rows = dict(
        img_id=["242", "242"],
        turn_index=[1, 2],
        source_img=stored(image_file(0), image_file(1)),
        instruction=["a", "b"],
        mask_img=stored(encode(transparent), b"no image"),
        target_img=stored(image_file(1), image_file(2)),
    )
    found = run(save_published(tmp_path / "brush", features, rows), tmp_path / "pairs")
    assert [row["source"] for row in found] == ["242", "242"]
    mask = pixels(found[0]["mask"]["bytes"])  # of the size of the image, white on the left; a damaged one is left out
    assert mask.shape == (40, 48, 3) and found[1]["mask"] is None
    half = mask.shape[1] // 2
    assert mask[:, : half - 2].all() and not mask[:, half + 2 :].any()
    assert [row["settings"] for row in found] == [{"img_id": "242", "turn_index": turn} for turn in (1, 2)]


@pytest.mark.parametrize("size", [(1000, 1503), (1503, 1000), (500, 333), (721, 721)])
def test_photographs_are_cropped_like_their_cartoons(size):
    """A photograph that is only resized and cropped stands in for the cartoon: both must match within a pixel."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    photo = Image.fromarray(
        np.stack([x * 255 // size[1], y * 255 // size[0], (x // 50 + y // 50) % 2 * 255], -1).astype(np.uint8)
    )
    (height, width), (kept_height, kept_width) = cartoonized_size(size)
    cartoon = photo.resize((width, height), Image.Resampling.LANCZOS).crop((0, 0, kept_width, kept_height))
    aligned = resize_like_cartoon(photo, (kept_height, kept_width))
    assert aligned.size == cartoon.size
    squeezed = photo.resize(cartoon.size, Image.Resampling.LANCZOS)  # as training would do without the import
    errors = [np.abs(np.asarray(image).astype(int) - np.asarray(cartoon)).mean() for image in (aligned, squeezed)]
    assert errors[0] < 0.5 and (errors[0] < errors[1] / 2 or (height, width) == (kept_height, kept_width))
    assert resize_like_cartoon(photo, (64, 64)) is photo


def test_cartoonization_crops_only_the_original(tmp_path):
    features = dict(original_image=IMAGE, edit_prompt=TEXT, cartoonized_image=IMAGE)
    rows = dict(
        original_image=stored(image_file(0, size=(47, 61))),
        edit_prompt=["Cartoonize."],
        cartoonized_image=stored(image_file(1, size=(40, 56))),
    )
    (row,) = run(save_published(tmp_path / "cartoons", features, rows), tmp_path / "pairs")
    assert row["edited_image"] == image_file(1, size=(40, 56))
    assert np.array_equal(pixels(row["original_image"]), pixels(image_file(0, size=(47, 61)))[:40, :56])


def test_importing_a_generated_dataset_changes_nothing(tmp_path):
    first = run(seed_folders(tmp_path / "seeds"), tmp_path / "first", "--source_license", "mit")
    again = run(tmp_path / "first", tmp_path / "again")
    assert again == first
    assert check_first_rows([open_source(str(tmp_path / "again"))], Geometry(32)) == []


def test_a_folder_with_a_metadata_file_is_a_dataset(tmp_path):
    source = write(tmp_path / "set", {"original/a.png": image_file(0), "edited/b.png": image_file(1)})
    line = {"original_image": "original/a.png", "edited_image": "edited/b.png", "edit_prompt": "Go."}
    write(source, {"metadata.jsonl": json.dumps(line)})
    (row,) = run(source, tmp_path / "pairs")
    assert row["edit_prompt"] == "Go." and row["source"] == "original/a.png" and row["original_image"] == image_file(0)
    assert str(tmp_path) not in json.dumps({name: value for name, value in row.items() if "image" not in name})


def test_streaming_gives_the_same_rows(tmp_path):
    rows = make_rows(12)
    source = tmp_path / "set"
    source.mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("original_image", IMAGE).cast_column("edited_image", IMAGE)
    table.to_parquet(str(source / "train.parquet"))
    whole = run(source, tmp_path / "whole")
    streamed = run(source, tmp_path / "streamed", "--streaming", "--max_num_samples", 5)
    assert streamed == whole[:5]
    sample = run(source, tmp_path / "sample", "--max_num_samples", 5)
    assert len(sample) == 5 and sample != whole[:5] and all(row in whole for row in sample)
    assert run(source, tmp_path / "fewer", "--max_num_samples", 3) == sample[:3]


@pytest.mark.slow
def test_dataset_on_the_hub_gives_its_id_and_licence(tmp_path):
    features = dict(source_img=IMAGE, instruction=TEXT, target_img=IMAGE)
    rows = dict(source_img=stored(image_file(0)), instruction=["Go."], target_img=stored(image_file(1)))
    folder = save_published(tmp_path / "set", features, rows)
    with hub_server(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "hub-cache", token="write-token") | {"OMP_NUM_THREADS": "1"}
        code = (
            "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('user/MagicBrush', repo_type='dataset');"
            f"api.upload_folder(repo_id='user/MagicBrush', repo_type='dataset', folder_path={str(folder)!r})"
        )
        write(folder, {"README.md": "---\nlicense: cc-by-4.0\n---\n"})
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
        command = [sys.executable, SCRIPT, "--source", "user/MagicBrush", "--data_root", str(tmp_path / "pairs")]
        subprocess.run(command, env=environment, check=True, cwd=REPOSITORY, timeout=600)
    (row,) = read(tmp_path / "pairs")
    assert (row["source_dataset"], row["source_license"]) == ("user/MagicBrush", "cc-by-4.0")
    assert row["edited_image"] == image_file(1)


# --- tables -----------------------------------------------------------------------------------------------------


class ImageServer(BaseHTTPRequestHandler):
    """/N.png is an image; /busy/N.png answers 503 once; /gone 404; /huge is too large; /slow sends single bytes."""

    num_requests: Counter = Counter()

    def do_GET(self) -> None:
        self.num_requests[self.path] += 1
        kind, _, name = self.path.strip("/").rpartition("/")
        if kind == "gone" or (kind == "busy" and self.num_requests[self.path] == 1):
            return self.send_error(404 if kind == "gone" else 503)
        content = b"x" * 300_000 if kind == "huge" else image_file(int(name.split(".")[0]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            for start in range(0, len(content), 1 if kind == "slow" else len(content)):
                self.wfile.write(content[start : start + (1 if kind == "slow" else len(content))])
                self.wfile.flush()
                time.sleep(0.05 if kind == "slow" else 0)
        except OSError:
            pass  # the client closed the connection
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def image_server():
    """URL of an ImageServer."""
    ImageServer.num_requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), ImageServer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_table_of_urls_and_paths(image_server, tmp_path, capsys):
    rows = [
        {
            "original_image_url": f"{image_server}/0.png",
            "edited_image_url": f"{image_server}/1.png",
            "edit_prompt": "one",
        },
        {"original_image_url": f"{image_server}/0.png", "edited_image_url": "local/2.png", "edit_prompt": "two"},
        {
            "original_image_url": f"{image_server}/busy/3.png",
            "edited_image_url": f"{image_server}/4.png",
            "edit_prompt": "three",
        },
        {
            "original_image_url": f"{image_server}/gone/5.png",
            "edited_image_url": f"{image_server}/4.png",
            "edit_prompt": "x",
        },
        {
            "original_image_url": f"{image_server}/6.png",
            "edited_image_url": f"{image_server}/huge/4.png",
            "edit_prompt": "x",
        },
        {
            "original_image_url": f"{image_server}/6.png",
            "edited_image_url": f"{image_server}/slow/4.png",
            "edit_prompt": "x",
        },
        {"original_image_url": f"{image_server}/6.png", "edited_image_url": "local/none.png", "edit_prompt": "x"},
        {"original_image_url": "", "edited_image_url": f"{image_server}/6.png", "edit_prompt": "x"},
        {
            "original_image_url": f"{image_server}/6.png",
            "edited_image_url": f"{image_server}/7.png",
            "edit_prompt": " ",
        },
        {
            "original_image_url": "http://127.0.0.1:1/6.png",
            "edited_image_url": f"{image_server}/7.png",
            "edit_prompt": "x",
        },
    ]
    write(tmp_path, {"local/2.png": image_file(2)})
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    limits = ("--download_mb", 0.1, "--download_timeout", 0.5, "--download_retries", 1)
    found = run(tmp_path / "pairs.csv", tmp_path / "pairs", *limits)
    assert [row["edit_prompt"] for row in found] == ["one", "two", "three"]
    assert found[1]["edited_image"] == image_file(2) and found[2]["original_image"] == image_file(3)
    assert found[0]["source"] == f"{image_server}/0.png"
    assert (
        ImageServer.num_requests["/0.png"] == 1
        and ImageServer.num_requests["/gone/5.png"] == 1
        and ImageServer.num_requests["/busy/3.png"] == 2
    )
    printed = capsys.readouterr().out
    for reason in (
        "original image not downloaded, status 404: 1",
        "edited image too large to download: 1",
        "no instruction: 1",
        "edited image download timed out: 1",
        "edited image no such file: 1",
        "original image none named: 1",
        "original image no server answered: 1",
    ):
        assert f"rejected, {reason}" in printed


def test_unreachable_network_is_an_error(tmp_path, capsys):
    gone = "http://127.0.0.1:1"
    rows = [
        {"input_image": f"{gone}/{i}.png", "edited_image": f"{gone}/x{i}.png", "edit_prompt": "x"} for i in range(320)
    ]
    write(tmp_path, {"pairs.jsonl": "\n".join(map(json.dumps, rows))})
    message = refused(
        capsys, "--source", tmp_path / "pairs.jsonl", "--data_root", tmp_path / "pairs", "--download_retries", 0
    )
    assert "none of 20 images can be downloaded" in message and not (tmp_path / "pairs/data").exists()


def test_a_dead_server_is_given_up(image_server, tmp_path, capsys, caplog):
    """It is tried for three images, not for each of its eighty; the others are imported."""
    connections = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connections.append(self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as dead:
        threading.Thread(target=dead.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        hosts = [f"http://127.0.0.1:{dead.server_address[1]}"] * 40 + [image_server] * 4
        rows = [
            {"input_image": f"{host}/{i}.png", "edited_image": f"{host}/{i + 50}.png"} for i, host in enumerate(hosts)
        ]
        write(tmp_path, {"pairs.jsonl": "\n".join(json.dumps(row | {"edit_prompt": "x"}) for row in rows)})
        flags = ("--download_retries", 0, "--download_threads", 1, "--num_workers", 0)
        imported = run(tmp_path / "pairs.jsonl", tmp_path / "pairs", *flags)
        dead.shutdown()
    assert len(imported) == 4 and len(connections) == 3
    assert "rejected, original image no server answered: 40" in capsys.readouterr().out
    assert caplog.text.count("does not answer: its other images are skipped and counted") == 1


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_table_formats(suffix, tmp_path):
    """SEED-Data-Edit's columns, after its archives were unpacked elsewhere."""
    write(tmp_path / "images", {"a/0.png": image_file(0), "a/1.png": image_file(1)})
    rows = [{"source_image": "a/0.png", "instruction": "Go.", "target_image": "a/1.png", "ssim": "0.5"}]
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        write(tmp_path, {path.name: ",".join(rows[0]) + "\n" + ",".join(rows[0].values()) + "\n"})
    else:
        write(tmp_path, {path.name: json.dumps(rows if suffix == ".json" else rows[0])})
    (row,) = run(path, tmp_path / "pairs", "--image_root", tmp_path / "images")
    assert (row["original_image"], row["edit_prompt"], row["source"]) == (image_file(0), "Go.", "a/0.png")
    assert row["scores"] == {"ssim": 0.5}


def test_img_edit_lists_of_paths(tmp_path, capsys):
    write(tmp_path, {"0.png": image_file(0), "1.png": image_file(1)})
    rows = [
        {"input_images": ["0.png"], "output_images": ["1.png"], "prompt": "Go.", "task": "add"},
        {"input_images": ["0.png", "1.png"], "output_images": ["1.png"], "prompt": "Mix.", "task": "compose"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "imgedit.parquet")
    (row,) = run(tmp_path / "imgedit.parquet", tmp_path / "pairs")
    assert (row["edit_prompt"], row["task"], row["edited_image"]) == ("Go.", "add", image_file(1))
    assert "rejected, original image several: 1" in capsys.readouterr().out


def test_pico_banana_urls_and_relative_paths(image_server, tmp_path):
    line = {
        "open_image_input_url": f"{image_server}/0.png",
        "text": "Go.",
        "output_image": "nb/1.png",
        "edit_type": "add",
    }
    write(tmp_path, {"sft.jsonl": json.dumps(line)})
    (row,) = run(tmp_path / "sft.jsonl", tmp_path / "pairs", "--image_root", image_server)
    assert (row["edit_prompt"], row["task"], row["edited_image"]) == ("Go.", "add", image_file(1))


def test_column_flags(tmp_path):
    write(tmp_path, {"0.png": image_file(0), "1.png": image_file(1), "pairs.csv": "a,b,c\n0.png,Go.,1.png\n"})
    flags = ("--original_image_column", "a", "--edit_prompt_column", "b", "--edited_image_column", "c")
    (row,) = run(tmp_path / "pairs.csv", tmp_path / "pairs", *flags)
    assert (row["original_image"], row["edit_prompt"]) == (image_file(0), "Go.")


# --- input errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        ({}, ["--source", "./nowhere"], ["--source ./nowhere: does not exist"]),
        ({"pairs.zip": "x"}, ["--source", "{0}/pairs.zip"], ["must be a table", "unpack archives first"]),
        (
            {"a.txt": "x", "b/c.png": "x"},
            ["--source", "{0}"],
            ["holds a.txt, b/, which is not a known format", "--edited_dir"],
        ),
        ({"a.csv": "x", "b.jsonl": "x"}, ["--source", "{0}"], ["has a.csv, b.jsonl", "give the path of one table"]),
        (
            {"input/a.png": "x", "target/b.png": "x"},
            ["--source", "{0}", "--edit_prompt", "Go."],
            ["no image of", "files without a partner", "a.png", "b.png"],
        ),
        (
            {"input/a.png": "x", "target/a.png": "x", "before/a.png": "x", "after/a.png": "x"},
            ["--source", "{0}"],
            ["several pairs of folders (before or input, and target or after)", "--edited_dir"],
        ),
        ({"input/a.png": "x", "target/a.png": "x"}, ["--source", "{0}"], ["have no instructions", "prompts.txt"]),
        ({"input/a.png": "x", "target/a.png": "x", "prompts.txt": "b\tGo.\n"}, ["--source", "{0}"], ["names none"]),
        (
            {"input/a.png": "x", "target/a.png": "x", "prompts.txt": "a\tGo.\nGo.\n"},
            ["--source", "{0}"],
            ["has no tab"],
        ),
        (
            {"input/a.png": "x", "target/a.png": "x", "input/b.png": "x", "target/b.png": "x", "prompts.txt": "x\ny\n"},
            ["--source", "{0}"],
            ["as many lines as there are pairs (2), but no names"],
        ),
        ({"input/a.png": "x", "target/a.png": "x", "prompts.csv": "a,b\n1,2\n"}, ["--source", "{0}"], ["columns a, b"]),
        ({"pairs.csv": "a,b\nx.png,y\n"}, ["--source", "{0}/pairs.csv"], ["not known", "a (image), b (string)"]),
        ({"pairs.csv": "a,b\n"}, ["--source", "{0}/pairs.csv"], ["has no rows"]),
        ({"pairs.json": '{"a": 1}'}, ["--source", "{0}/pairs.json"], ["must hold a list of objects"]),
        ({"pairs.json": "{"}, ["--source", "{0}/pairs.json"], ["cannot be read as JSON"]),
        (
            {"seeds.json": "[]"},
            ["--source", "{0}", "--streaming", "--edit_prompt", "Go."],
            ["--edit_prompt: only for --format folders", "--streaming: only for --format dataset"],
        ),
        (
            {},
            [
                "--source",
                "{0}",
                "--edited_dir",
                "{0}/no",
                "--task",
                "none",
                "--edit_prompt",
                "",
                "--seed",
                "-1",
                "--max_num_samples",
                "0",
                "--image_root",
                "{0}/no",
            ],
            [
                "is not a folder",
                "unknown task 'none'",
                "--seed -1",
                "--max_num_samples 0",
                "an instruction is empty",
                "--edit_prompt and --task",
                "--image_root",
            ],
        ),
        ({"a/prompt.json": "{}"}, ["--source", "{0}"], ["names no pair"]),
        ({}, ["--source", "AILab-CVC/SEED-Data-Edit-Part2-3"], ["split tar.gz archives", "--image_root"]),
        ({}, ["--source", "sysuyy/ImgEdit"], ["lists of paths into split tar archives"]),
        ({}, ["--source", "apple/pico-banana-400k"], ["jsonl of URLs"]),
    ],
)
def test_input_errors_are_one_message(files, flags, words, tmp_path, capsys):
    source = write(tmp_path / "source", files)
    source.mkdir(exist_ok=True)
    message = refused(
        capsys, *(flag.format(source) for flag in flags), "--data_root", tmp_path / "pairs", "--download_retries", 0
    )
    assert all(word in message for word in words), message
    assert not (tmp_path / "pairs").exists()


def test_missing_inverse_column_and_split(tmp_path, capsys):
    features = dict(input_image=IMAGE, edit=TEXT, output_image=IMAGE)
    rows = dict(input_image=stored(image_file(0)), edit=["x"], output_image=stored(image_file(1)))
    source = save_published(tmp_path / "set", features, rows)
    message = refused(capsys, "--source", source, "--data_root", tmp_path / "pairs", "--inverse")
    assert "--inverse needs a text column inverse_edit" in message and "edit (string)" in message
    message = refused(capsys, "--source", source, "--data_root", tmp_path / "pairs", "--dataset_split", "test")
    assert "--dataset_split 'test'" in message and "train" in message


def test_different_settings_are_refused(tmp_path, capsys):
    source = two_folders(tmp_path / "images")
    run(source, tmp_path / "pairs", "--edit_prompt", "Go.")
    message = refused(capsys, "--source", source, "--data_root", tmp_path / "pairs", "--edit_prompt", "Stop.")
    assert "pairs" in message
    assert len(run(source, tmp_path / "pairs", "--edit_prompt", "Stop.", "--overwrite")) == 3


# --- as a process -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_rows_with_any_number_of_workers(tmp_path):
    source = two_folders(tmp_path / "images", 400)
    flags = ["--source", str(source), "--task", "cartoonize", "--heldout_phrasings", "3"]
    expected = run(source, tmp_path / "expected", *flags[2:])
    rng = np.random.default_rng(0)
    for data_root, workers in ((tmp_path / "killed", "0"), (tmp_path / "two", "2")):
        command = [sys.executable, SCRIPT, *flags, "--data_root", str(data_root), "--num_workers", workers]
        for _ in range(3):
            process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(1.0, 3.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, check=True, timeout=600)
        assert read(data_root) == expected


def test_help_imports_no_heavy_library(tmp_path):
    code = (
        "import sys; sys.argv = ['x', '--help']; import runpy\n"
        f"try: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('loaded', sorted({'torch', 'datasets', 'numpy', 'PIL', 'cv2', 'pyarrow'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "loaded []" in printed.stdout and "--edited_dir" in printed.stdout


def test_animations_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first frame is imported."""
    frames = [make_image(index) for index in (1, 2, 3)]
    for side in ("original", "edited"):
        (tmp_path / side).mkdir()
        frames[0].save(tmp_path / side / "cat.gif", save_all=True, append_images=frames[1:])
    out = tmp_path / "out"
    import_pairs.main([f"--source={tmp_path}", "--edit_prompt=move", f"--data_root={out}", "--num_workers=0"])
    assert "original image: cat.gif has 3 frames or pages, of which the first is imported" in caplog.text
