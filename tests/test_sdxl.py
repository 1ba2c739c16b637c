"""SDXL in train_instruct_pix2pix_sdxl.py and finetune_instruct_pix2pix.py: the differences from SD 1.x/2.x."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file

import finetune_instruct_pix2pix
import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from tests.mistakes import copy_of, fails_early, fails_late
from tests.original_names import write_single_file
from tests.pairs import encode, make_dataset, make_image, save_pairs
from tests.runs import ACCELERATE, WEIGHTS, run, training_flags, weights_of
from tests.tiny import make_vae
from utils.models.conditioning import PromptEncoder
from utils.training import assembly
from utils.training.flags import parse_training_flags
from utils.training.objective import Objective

TRAIN, FINETUNE = train_instruct_pix2pix_sdxl.main, finetune_instruct_pix2pix.main

# The flags that only diffusers' SDXL script has, and some others, with their defaults.
DIFFUSERS_DEFAULTS = {
    "pretrained_vae_model_name_or_path": None,
    "vae_precision": "fp32",
    "validation_steps": 100,
    "resolution": 256,
    "val_image_url": None,
    "train_batch_size": 16,
    "lr_warmup_steps": 500,
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
}
DOCUMENTED = [
    "--use_ema",
    "--enable_xformers_memory_efficient_attention",
    "--resolution=512",
    "--random_flip",
    "--train_batch_size=4",
    "--gradient_accumulation_steps=4",
    "--gradient_checkpointing",
    "--max_train_steps=15000",
    "--checkpointing_steps=5000",
    "--checkpoints_total_limit=1",
    "--learning_rate=5e-05",
    "--lr_warmup_steps=0",
    "--conditioning_dropout_prob=0.05",
    "--seed=42",
    "--val_image_url_or_path=mountain.png",
    "--validation_prompt=make it in japan",
    "--report_to=wandb",
    "--push_to_hub",
    "--max_grad_norm=1",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs of 40x48 pixels."""
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_flags_and_documented_commands_of_diffusers():
    name = ["--pretrained_model_name_or_path=m", "--dataset_name=d"]
    args = vars(parse_training_flags(name, "", "sdxl"))
    assert {flag: args[flag] for flag in DIFFUSERS_DEFAULTS} == DIFFUSERS_DEFAULTS
    args = parse_training_flags([*name, "--validation_epochs=2"], "", "sdxl")
    assert (args.validation_steps, args.validation_epochs) == (None, 2)
    args = parse_training_flags([*name, *DOCUMENTED, "--crops_coords_top_left_h=8", "--vae_precision=bf16"], "", "sdxl")
    assert (args.val_image_url, args.crops_coords_top_left_h) == (["mountain.png"], 8)


@pytest.mark.slow
@pytest.mark.parametrize("workers, accumulation, is_launched", [(0, 1, False), (2, 3, True)])
def test_the_script_trains_a_pipeline_that_loads(tiny_sdxl, pairs, tmp_path, workers, accumulation, is_launched):
    """With a number of rows that is not a multiple of the batch size; once started by `accelerate launch`."""
    image = tmp_path / "image.png"
    make_image(3).save(image)
    flags = (
        f"--dataloader_num_workers={workers}",
        f"--gradient_accumulation_steps={accumulation}",
        "--use_ema",
        f"--val_image_url_or_path={image}",
        "--validation_prompt=red",
        "--validation_steps=2",
        "--num_validation_images=1",
        "--random_flip",
    )
    flags = training_flags(tiny_sdxl, pairs, tmp_path / "out", *flags)
    if is_launched:
        run("train_instruct_pix2pix_sdxl.py", flags, ACCELERATE)
    else:
        assert TRAIN(flags) == 0
    assert {path.name for path in (tmp_path / "out/validation").glob("step-*")} == {"step-2.png", "step-4.png"}
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.in_channels == 8 and pipeline.config.force_zeros_for_empty_prompt
    start, trained = values_of(tiny_sdxl / "unet"), values_of(tmp_path / "out/unet")
    assert any(not torch.equal(trained[name], start[name]) for name in start if name != "conv_in.weight")
    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        files = (tmp_path / "out" / part).glob("*.safetensors")
        assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float32}
    edit = pipeline("red", image=make_image(1, (32, 32)), num_inference_steps=2, height=32, width=32).images[0]
    assert edit.size == (32, 32) and np.asarray(edit).std() > 0
    assert "stable-diffusion-xl" in (tmp_path / "out/README.md").read_text()


def test_training_starts_from_the_base_with_its_bias(tiny_sdxl, pairs, tmp_path):
    assert TRAIN(training_flags(tiny_sdxl, pairs, tmp_path / "out", "--learning_rate=0", "--max_train_steps=1")) == 0
    before, after = values_of(tiny_sdxl / "unet"), values_of(tmp_path / "out/unet")
    weight = after.pop("conv_in.weight")
    assert torch.equal(weight[:, :4], before.pop("conv_in.weight")) and not weight[:, 4:].any()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fine_tuning_detects_sdxl(tiny_sdxl_editor, pairs, tmp_path):
    flags = training_flags(tiny_sdxl_editor, pairs, tmp_path / "out", "--learning_rate=0", "--max_train_steps=2")
    assert FINETUNE(flags) == 0
    before, after = values_of(tiny_sdxl_editor / "unet"), values_of(tmp_path / "out/unet")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "XLInstruct" in json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"]


def test_the_right_script_is_named(tiny_base, tiny_sdxl, tiny_sdxl_editor, pairs, tmp_path):
    def flags(base: Path) -> list[str]:
        return training_flags(base, pairs, tmp_path / "out", "--report_to=none")

    fails_early(flags(tiny_base), "not SDXL", "train_instruct_pix2pix.py", script=TRAIN)
    fails_early(flags(tiny_sdxl), "train_instruct_pix2pix_sdxl.py", script=train_instruct_pix2pix.main)
    fails_early(flags(tiny_sdxl_editor), "finetune_instruct_pix2pix.py", script=TRAIN)
    fails_early(flags(tiny_sdxl), "train_instruct_pix2pix_sdxl.py", script=FINETUNE)
    crops = [*flags(tiny_base), "--crops_coords_top_left_h=0"]
    fails_early(
        [flag for flag in crops if "base" not in flag] + [f"--pretrained_model_name_or_path={tiny_base}"],
        "train_instruct_pix2pix.py",
        script=FINETUNE,
    )


# ---- time ids -------------------------------------------------------------------------------------------------------


def recorded_time_ids(flags: list[str], script, monkeypatch) -> dict[str, list[float]]:
    """Row name -> its time ids."""
    seen = {}
    call = Objective.__call__

    def recording(self, unet, batch):
        def spying_unet(*inputs, added_cond_kwargs, **settings):
            for row, time_ids in zip(batch["rows"], added_cond_kwargs["time_ids"], strict=True):
                seen[row] = time_ids.tolist()
            return unet(*inputs, added_cond_kwargs=added_cond_kwargs, **settings)

        return call(self, spying_unet, batch)

    monkeypatch.setattr(Objective, "__call__", recording)
    assert script(flags) == 0
    return seen


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the sizes (height, width) 40x40, 80x40, 40x80 and 64x64, as a parquet file."""
    images = [make_image(index, size) for index, size in enumerate([(40, 40), (80, 40), (40, 80), (64, 64)])]
    stored = [{"bytes": encode(image), "path": None} for image in images]
    folder = tmp_path_factory.mktemp("data") / "shapes"
    folder.mkdir()
    rows = dict(original_image=stored, edit_prompt=[f"edit {n}" for n in range(4)], edited_image=stored)
    make_dataset(rows).to_parquet(folder / "train.parquet")
    return folder


def test_every_row_has_its_own_time_ids(tiny_sdxl, shapes, tmp_path, monkeypatch):
    """Original height and width, top and left of the crop after resizing to 32 pixels, target height and width."""
    flags = training_flags(tiny_sdxl, shapes, tmp_path / "out", "--center_crop", "--max_train_steps=2")
    expected = {
        0: [40, 40, 0, 0, 32, 32],
        1: [80, 40, 16, 0, 32, 32],
        2: [40, 80, 0, 16, 32, 32],
        3: [64, 64, 0, 0, 32, 32],
    }
    seen = recorded_time_ids(flags, TRAIN, monkeypatch)
    assert {int(row.split("[")[1][:-1]): ids for row, ids in seen.items()} == expected
    cached = [*flags, f"--output_dir={tmp_path / 'cached'}", "--cache_latents"]
    assert recorded_time_ids(cached, TRAIN, monkeypatch) == seen


def test_time_ids_of_buckets_and_of_given_crops(tiny_sdxl, shapes, tmp_path, monkeypatch):
    flags = training_flags(
        tiny_sdxl,
        shapes,
        tmp_path / "out",
        "--resize_mode=bucket",
        "--resolution=64",
        "--crops_coords_top_left_h=5",
        "--max_train_steps=4",
    )
    seen = recorded_time_ids(flags, TRAIN, monkeypatch)
    targets = {tuple(ids[4:]) for ids in seen.values()}
    assert len(targets) == 3 and all(ids[2] == 5 and ids[3] != 5 for ids in seen.values())
    assert all((ids[0] > ids[1]) == (ids[4] > ids[5]) for ids in seen.values())


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_each_prompt_is_encoded_once_before_the_first_step(tiny_sdxl, pairs, tmp_path, monkeypatch):
    """Afterwards the text encoders are not needed and leave the GPU; a second run encodes nothing."""
    encoded, moved, encode_one, store_all = [], [], PromptEncoder.encode, assembly.store_prompts
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, p: encoded.extend(p) or encode_one(self, p))

    def store_before_the_first_step(*arguments) -> bool:
        moved.append(len(encoded))
        has_moved = store_all(*arguments)
        moved.append(len(encoded))
        return has_moved

    monkeypatch.setattr(assembly, "store_prompts", store_before_the_first_step)
    image = tmp_path / "image.png"
    make_image(3).save(image)
    flags = (
        f"--val_image_url_or_path={image}",
        "--validation_prompt=red",
        "--validation_steps=6",
        "--num_validation_images=1",
        "--max_train_steps=12",
        f"--latent_cache_dir={tmp_path / 'cache'}",
    )
    for name in ("out", "again"):
        assert TRAIN(training_flags(tiny_sdxl, pairs, tmp_path / name, *flags)) == 0
    assert weights_of(tmp_path / "out/unet") == weights_of(tmp_path / "again/unet")
    assert sorted(encoded) == sorted(["", "red", *(f"edit number {n}" for n in range(7))])
    assert moved == [0, *[len(encoded)] * 3]  # with the null prompt, and nothing afterwards


# ---- the autoencoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_external_vae_is_used_and_published(tiny_sdxl, pairs, tmp_path, precision):
    make_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae", variant="fp16")
    flags = (
        f"--pretrained_vae_model_name_or_path={tmp_path / 'vae'}",
        "--vae_variant=fp16",
        f"--vae_precision={precision}",
        "--max_train_steps=2",
    )
    assert TRAIN(training_flags(tiny_sdxl, pairs, tmp_path / "out", *flags)) == 0
    published = AutoencoderKL.from_pretrained(tmp_path / "out/vae")
    expected = AutoencoderKL.from_pretrained(tmp_path / "vae", variant="fp16")
    assert published.config.scaling_factor == 0.5 and published.dtype == torch.float32
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in published.state_dict().items())


def test_the_vae_of_a_pipeline_is_used(tiny_sdxl, tiny_sdxl_editor, pairs, tmp_path):
    flags = (f"--pretrained_vae_model_name_or_path={tiny_sdxl_editor}", "--max_train_steps=1")
    assert TRAIN(training_flags(tiny_sdxl, pairs, tmp_path / "out", *flags)) == 0
    published, expected = values_of(tmp_path / "out/vae"), values_of(tiny_sdxl_editor / "vae")
    assert all(torch.equal(published[name], expected[name]) for name in expected)


@pytest.mark.parametrize("more", [(), ("--cache_latents", "--center_crop")])
def test_a_vae_that_overflows_is_reported(tiny_sdxl, pairs, tmp_path, more):
    """Finite in float32, infinite in fp16, like SDXL's own."""
    base = copy_of(tiny_sdxl, tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1e6)
    vae.save_pretrained(base / "vae")
    flags = training_flags(base, pairs, tmp_path / "out", "--max_train_steps=1", "--report_to=none", *more)
    fails_late([*flags, "--vae_precision=fp16"], "sdxl-vae-fp16-fix", "--vae_precision fp32", script=TRAIN)


def test_a_missing_vae_is_reported(tiny_sdxl, pairs, tmp_path):
    flags = training_flags(tiny_sdxl, pairs, tmp_path / "out", "--report_to=none")
    fails_late(
        [*flags, f"--pretrained_vae_model_name_or_path={tmp_path / 'nowhere'}"],
        "--pretrained_vae_model_name_or_path",
        "nowhere",
        script=TRAIN,
    )


def test_a_missing_second_text_encoder_is_reported(tiny_sdxl, pairs, tmp_path):
    base = copy_of(tiny_sdxl, tmp_path / "base")
    (base / "text_encoder_2").rename(tmp_path / "elsewhere")
    fails_early(training_flags(base, pairs, tmp_path / "out", "--report_to=none"), "text_encoder_2", script=TRAIN)


def test_sdxl_trains_in_bf16_with_checkpointing(tiny_sdxl, pairs, tmp_path):
    flags = ("--mixed_precision=bf16", "--gradient_checkpointing", "--resize_mode=bucket", "--snr_gamma=5")
    assert TRAIN(training_flags(tiny_sdxl, pairs, tmp_path / "out", *flags, "--validation_split=0.2")) == 0
    entries = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in entries if "loss" in entry)
    assert Image.open(tmp_path / "out/training_curve.png").width > 100


# ---- CosXL ----------------------------------------------------------------------------------------------------------


def test_fine_tuning_a_single_file_cosxl_editor(tiny_sdxl_editor, pairs, tmp_path):
    """Detected by its keys; published with its scheduler and scaled image latents; the result loads and edits."""
    source = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)
    sigmas = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    file = write_single_file(source, tmp_path / "cosxl.safetensors", sigmas)
    flags = training_flags(file, pairs, tmp_path / "out", f"--single_file_config={tiny_sdxl_editor}", "--use_ema")
    assert FINETUNE([*flags, "--checkpointing_steps=2"]) == 0
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["is_cosxl_edit"] is True and index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.is_cosxl_edit and pipeline.scheduler.config.prediction_type == "v_prediction"
    edit = pipeline("red", image=make_image(1, (32, 32)), num_inference_steps=2, height=32, width=32).images[0]
    assert np.asarray(edit).std() > 0
    again = [*flags, "--resume_from_checkpoint=latest", "--max_train_steps=6"]
    assert FINETUNE(again) == 0
    onward = training_flags(tmp_path / "out", pairs, tmp_path / "onward", "--lora_rank=2", "--max_train_steps=2")
    assert FINETUNE(onward) == 0  # an adapter on what was published
    wrong = [*flags, f"--output_dir={tmp_path / 'wrong'}", "--prediction_type=epsilon", "--report_to=none"]
    fails_early(wrong, "EDM", "--prediction_type", script=FINETUNE)
