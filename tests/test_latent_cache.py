"""The latent cache with random crops, buckets and other choices of rows; cache_latents.py."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import train_instruct_pix2pix
from tests.pairs import make_image, save_pairs
from tests.runs import TORCHRUN, losses_of, run, training_flags, weights_of
from utils.data import bucket_table
from utils.data.geometry import Geometry, prepare_pair
from utils.data.latent_cache import crop_positions
from utils.data.latent_encoding import Encoder, make_latent_cache
from utils.data.sources import open_source
from utils.models.latents import encode_moments
from utils.pixels import BadRow

TRAIN = train_instruct_pix2pix.main


class Alone:
    """One process."""

    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture(scope="module")
def wide_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pairs of three shapes, one of which is damaged."""
    sizes = [(48, 32), (32, 32), (32, 48)] * 3
    images = [make_image(index, size) for index, size in enumerate(sizes)]
    edited = [Image.fromarray(255 - np.asarray(image)) for image in images]
    rows = {"original_image": images, "edit_prompt": ["invert it"] * 9, "edited_image": edited}
    return save_pairs(tmp_path_factory.mktemp("wide") / "pairs", rows=rows)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each call of the VAE's encoder."""
    calls, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda self, x, **more: calls.append(len(x)) or encode(self, x, **more)
    )
    return calls


@pytest.mark.parametrize(
    "geometry",
    [Geometry(32, random_flip=True), Geometry(32, "bucket", max_aspect_difference=0.1)],
    ids=["crop", "bucket"],
)
def test_every_variant_equals_encoding_it(geometry, tiny_base, wide_pairs, tmp_path):
    source, vae = open_source(str(wide_pairs)), AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    cache = make_latent_cache(Alone(), tmp_path, [source], Encoder(geometry, vae, num_crops=3))
    shapes = set()
    for row, values in enumerate(source.rows):
        for crop, u in enumerate(crop_positions(row, 3, geometry)):
            for is_flipped in (False, True)[: 1 + geometry.random_flip]:
                found, sizes = cache.read(0, row, is_flipped, (crop + 0.5) / 3)
                images = values["original_image"], values["edited_image"]
                pair = prepare_pair(*images, geometry, u, 0.0 if is_flipped else 1.0)
                both = encode_moments(vae, torch.from_numpy(np.stack([pair.original, pair.edited])))
                expected = torch.cat([both[0].chunk(2)[0], both[1]])
                torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1 / 1024, atol=1e-4)
                assert sizes.tolist() == [
                    list(size) for size in (pair.original_size, pair.crop_top_left, pair.target_size)
                ]
                shapes.add(found.shape)
    assert len(shapes) == (3 if geometry.resize_mode == "bucket" else 1)


@pytest.mark.parametrize("mode", ["crop", "bucket"])
def test_training_from_random_crops_resumes(mode, tiny_base, wide_pairs, tmp_path):
    """To the bit; and each epoch takes one of the crops of a pair."""
    latents = f"--latent_cache_dir={tmp_path / 'latents'}"
    flags = (
        "--cache_latents",
        "--cache_crops=2",
        f"--resize_mode={mode}",
        latents,
        "--random_flip",
        "--logging_steps=1",
    )
    for name, *more in (
        ("whole", "--max_train_steps=4"),
        ("parts", "--max_train_steps=2", "--checkpointing_steps=2"),
        ("parts", "--max_train_steps=4", "--resume_from_checkpoint=latest"),
    ):
        assert TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / name, *flags, *more)) == 0
    assert weights_of(tmp_path / "parts/unet") == weights_of(tmp_path / "whole/unet")


def test_buckets_from_a_cache_train_as_live(tiny_base, wide_pairs, tmp_path, monkeypatch):
    """The second run reads no image's size again."""
    flags = ("--resize_mode=bucket", "--center_crop", "--logging_steps=1")
    assert TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / "live", *flags)) == 0
    monkeypatch.setattr(bucket_table, "peek_size", None)
    assert TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / "cached", *flags, "--cache_latents")) == 0
    live, cached = ([entry[1] for entry in losses_of(tmp_path / name)] for name in ("live", "cached"))
    np.testing.assert_allclose(cached, live, rtol=2e-3)


def test_only_missing_rows_are_encoded(tiny_base, wide_pairs, tmp_path, encoded):
    """Of a larger part of the dataset, another split, and a damaged file."""
    latents = tmp_path / "latents"
    flags = ("--cache_latents", "--center_crop", f"--latent_cache_dir={latents}", "--max_train_steps=1")
    counts = []
    for index, more in enumerate((["--max_train_samples=4"], [], ["--validation_split=0.3"])):
        assert TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / str(index), *flags, *more)) == 0
        counts.append(sum(encoded))
        encoded.clear()
    assert counts == [2 * 4, 2 * 5, 0]
    smallest = min(latents.glob("*/rows-*.safetensors"), key=lambda path: path.stat().st_size)
    for path in (smallest, *latents.glob("prompts-*/*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1])
    assert TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / "repaired", *flags)) == 0
    assert sum(encoded) == 2 * 4


def test_bad_rows_are_named_and_replaced(tiny_base, tmp_path):
    folder = save_pairs(tmp_path / "pairs", 7)
    source, vae = open_source(str(folder)), AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    damaged = source.rows.to_list()
    damaged[2]["original_image"] = {"bytes": b"no image", "path": None}
    source = replace(source, rows=datasets.Dataset.from_list(damaged, features=source.rows.features))
    cache = make_latent_cache(Alone(), tmp_path / "latents", [source], Encoder(Geometry(32, center_crop=True), vae))
    with pytest.raises(BadRow, match="original image"):
        cache.read(0, 2, False)
    assert cache.read(0, 3, False)[0].shape == (12, 16, 16)


@pytest.mark.parametrize("how", ["two processes", "ray"])
def test_cache_latents_prepares_a_training(how, tiny_base, wide_pairs, tmp_path, encoded):
    """With the flags of the training, which then encodes no image."""
    flags = ("--cache_crops=2", "--validation_split=0.2", "--random_flip", f"--latent_cache_dir={tmp_path / 'latents'}")
    flags = training_flags(tiny_base, wide_pairs, tmp_path / "out", *flags)
    if how == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    more, launcher = (["--ray=local", "--num_workers=2"], ()) if how == "ray" else ([], TORCHRUN)
    printed = run("data_preparation/cache_latents.py", flags + more, launcher)
    assert "--cache_latents --latent_cache_dir" in printed and not (tmp_path / "out").exists()
    assert TRAIN([*flags, "--cache_latents", "--max_train_steps=1"]) == 0
    assert encoded == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_latents"], "--cache_crops N"),
        (["--cache_crops=2"], "--cache_crops keeps random crops"),
        (["--cache_latents", "--cache_crops=2", "--center_crop"], "drop --center_crop"),
        (["--cache_latents", "--cache_crops=0"], "--cache_crops is 0; it must be at least 1"),
    ],
)
def test_wrong_flags(flags, message, tiny_base, wide_pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        TRAIN(training_flags(tiny_base, wide_pairs, tmp_path / "out", *flags))
    assert message in capsys.readouterr().err
