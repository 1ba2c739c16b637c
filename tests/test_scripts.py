"""The training scripts: the flags of diffusers' examples, and every feature."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune_instruct_pix2pix
import train_instruct_pix2pix
from tests.hub_server import hub_server
from tests.pairs import make_dataset, make_image, make_rows, save_pairs
from tests.runs import ENVIRONMENT, REPOSITORY, WEIGHTS, losses_of, run, training_flags, weights_of
from utils.data import latent_encoding
from utils.data.geometry import Geometry, prepare_pair
from utils.data.latent_encoding import encode_variants
from utils.training.checkpoints import list_checkpoints
from utils.training.flags import parse_training_flags
from utils.training.objective import Objective

TRAIN, FINETUNE = train_instruct_pix2pix.main, finetune_instruct_pix2pix.main

# The flags of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py with their defaults there.
DIFFUSERS_DEFAULTS = {
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "original_image_column": "input_image",
    "edited_image_column": "edited_image",
    "edit_prompt_column": "edit_prompt",
    "val_image_url": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 1,
    "max_train_samples": None,
    "output_dir": "instruct-pix2pix-model",
    "cache_dir": None,
    "seed": None,
    "resolution": 256,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "conditioning_dropout_prob": None,
    "use_8bit_adam": False,
    "allow_tf32": False,
    "use_ema": False,
    "non_ema_revision": None,
    "dataloader_num_workers": None,  # chosen for the machine
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "mixed_precision": None,
    "report_to": "tensorboard",
    "local_rank": -1,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False,
}
# Defaults that would train a wrong model or guess: docs/decisions/0002.
OTHER_DEFAULTS = {
    "original_image_column": None,
    "edited_image_column": None,
    "edit_prompt_column": None,
    "conditioning_dropout_prob": 0.05,
}

DOCUMENTED = [
    "--enable_xformers_memory_efficient_attention",
    "--resolution=256",
    "--random_flip",
    "--train_batch_size=4",
    "--gradient_accumulation_steps=4",
    "--gradient_checkpointing",
    "--max_train_steps=15000",
    "--checkpointing_steps=5000",
    "--checkpoints_total_limit=1",
    "--learning_rate=5e-05",
    "--max_grad_norm=1",
    "--lr_warmup_steps=0",
    "--conditioning_dropout_prob=0.05",
    "--mixed_precision=fp16",
    "--use_ema",
    "--seed=42",
    "--report_to=wandb",
    "--push_to_hub",
    "--val_image_url=mountain.png",
    "--validation_prompt=snowy",
    "--original_image_column=input_image",
    "--edit_prompt_column=instruction",
    "--edited_image_column=ground_truth_image",
    "--output_dir=low-level",
]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.png"
    make_image(3, (48, 40)).save(path)
    return path


def config_of(output_dir: Path, part: str) -> dict:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads((output_dir / part / name).read_text())


def test_every_flag_of_diffusers_exists_with_its_default():
    args = vars(parse_training_flags(["--pretrained_model_name_or_path=m", "--dataset_name=d"], ""))
    given = {"dataset_name": "d"}
    expected = DIFFUSERS_DEFAULTS | OTHER_DEFAULTS | given
    assert {name: args[name] for name in expected} == expected


def test_documented_flags_are_accepted():
    args = parse_training_flags(["--pretrained_model_name_or_path=m", "--dataset_name=d", *DOCUMENTED], "")
    assert args.lr_warmup_steps == 0 and args.val_image_url == ["mountain.png"]


@pytest.mark.slow
def test_the_documented_command_trains_and_publishes(tiny_base, pairs, image_file, tmp_path):
    """The command of diffusers' and instruction-tuned-sd's READMEs, without GPU flags; pushed to a local Hub."""
    flags = [flag for flag in DOCUMENTED if "xformers" not in flag and "mixed_precision" not in flag]
    output_dir = tmp_path / "low-level"
    flags += [
        f"--pretrained_model_name_or_path={tiny_base}",
        f"--dataset_name={pairs}",
        f"--output_dir={output_dir}",
        "--original_image_column=original_image",
        "--edit_prompt_column=edit_prompt",
        "--resolution=32",
        "--edited_image_column=edited_image",
        "--max_train_steps=2",
        f"--val_image_url={image_file}",
        "--max_bad_rows=0",
        "--num_validation_images=1",
        "--hub_token=write-token",
    ]
    flags.remove("--val_image_url=mountain.png")
    with hub_server(tmp_path / "hub") as hub:
        environment = ENVIRONMENT | hub.environment(tmp_path / "home") | {"WANDB_MODE": "offline"}
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--mixed_precision", "no"]
        run = subprocess.run(
            [*launch, "train_instruct_pix2pix.py", *flags], cwd=REPOSITORY, env=environment, capture_output=True
        )
        assert run.returncode == 0, run.stderr.decode()
        repo = hub.repos["models/user/low-level"]
        assert "model_index.json" in repo.files and not any("checkpoint" in name for name in repo.files)
        assert {"README.md", "training_curve.png", "validation/step-2.png"} <= set(repo.files)
        everything = b"".join(repo.read(name) for name in repo.files)
        assert b"write-token" not in everything
        load = (
            "import sys, torch; from PIL import Image\n"
            "from diffusers import StableDiffusionInstructPix2PixPipeline as P\n"
            "pipeline = P.from_pretrained('user/low-level'); image = Image.open(sys.argv[1]).resize((32, 32))\n"
            "edit = pipeline('snowy', image=image, num_inference_steps=2, generator=torch.manual_seed(0), "
            "output_type='np').images[0]\nimport numpy; numpy.save(sys.argv[2], edit)"
        )
        subprocess.run(
            [sys.executable, "-c", load, str(image_file), str(tmp_path / "edit.npy")], env=environment, check=True
        )
    local = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
    image = Image.open(image_file).resize((32, 32))
    expected = local(
        "snowy", image=image, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np"
    ).images[0]
    np.testing.assert_allclose(np.load(tmp_path / "edit.npy"), expected, atol=1e-5)
    assert list((output_dir / "wandb").iterdir())
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if b"write-token" in path.read_bytes()]


def test_the_published_pipeline_is_complete_and_in_float32(tiny_base, pairs, tmp_path):
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--use_ema", "--mixed_precision=bf16")) == 0
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.in_channels == 8 and pipeline.safety_checker is None
    for part in ("unet", "vae", "text_encoder"):
        files = list((tmp_path / "out" / part).glob("*.safetensors"))
        assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float32}
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*/*.safetensors")} == {0o666 & ~umask}
    base_vae = load_file(tiny_base / "vae" / WEIGHTS)
    assert all(torch.equal(value, base_vae[name]) for name, value in load_file(tmp_path / "out/vae" / WEIGHTS).items())


def test_the_ema_weights_are_published(tiny_base, pairs, tmp_path):
    flags = ("--use_ema", "--checkpointing_steps=4", "--learning_rate=1e-3")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags)) == 0
    checkpoint = tmp_path / "out/checkpoint-4"
    published, averaged, live = (
        load_file(folder / WEIGHTS) for folder in (tmp_path / "out/unet", checkpoint / "unet_ema", checkpoint / "unet")
    )
    assert all(torch.equal(published[name], averaged[name]) for name in published)
    assert any(not torch.equal(live[name], averaged[name]) for name in published)
    UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema")


def test_validation_does_not_change_training(tiny_base, pairs, image_file, tmp_path):
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "without", "--use_ema"))
    flags = (
        f"--val_image_url={image_file}",
        "--validation_prompt=make it red",
        "--validation_prompt=make it blue",
        "--validation_steps=1",
        "--num_validation_images=2",
    )
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "with", "--use_ema", *flags))
    assert weights_of(tmp_path / "with/unet") == weights_of(tmp_path / "without/unet")
    sheets = sorted(path.name for path in (tmp_path / "with/validation").glob("step-*.png"))
    assert sheets == [f"step-{step}.png" for step in (1, 2, 3, 4)]
    sheet = Image.open(tmp_path / "with/validation/step-4.png")
    assert sheet.width == 3 * 128  # the image and two edits


def test_each_held_out_image_is_encoded_once_per_validation(tiny_base, pairs, tmp_path, monkeypatch):
    """Not for each quarter of the timesteps; the loss is that of encoding them each time, also from a cache."""
    encoded, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, **m: encoded.append(len(x)) or encode(self, x, **m))
    shared = ("--validation_split=0.3", "--validation_steps=1", "--max_train_steps=1", "--report_to=none")
    flags = (*shared, "--center_crop", "--learning_rate=0", "--train_batch_size=1", "--validation_samples=2")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags)) == 0
    assert sum(encoded) == 2 * (1 + 2)  # the pair of the step, and two held-out pairs
    losses = [losses_of(tmp_path / "out")[-1]]
    monkeypatch.setattr(Objective, "encode", lambda self, batch: batch)
    for folder, more in (("each", ()), ("cache", ("--cache_latents", "--dataloader_num_workers=1"))):
        assert TRAIN(training_flags(tiny_base, pairs, tmp_path / folder, *flags, *more)) == 0
        losses.append(losses_of(tmp_path / folder)[-1])
    assert losses[0][-1] is not None and losses[0] == losses[1]
    assert losses[2][-1] == pytest.approx(losses[0][-1], rel=1e-4)


def test_a_stream_has_a_held_out_loss(tiny_base, pairs, tmp_path):
    flags = ("--streaming", "--validation_samples=2", "--validation_steps=2", "--save_best", "--report_to=none")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags)) == 0
    assert [loss for *_, loss in losses_of(tmp_path / "out") if loss is not None]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_ends_while_a_parquet_file_is_open(workers: int, tiny_base: Path, tmp_path: Path):
    """A stream that is left in the middle must not hang or abort Python after the run (apache/arrow#45214)."""
    (tmp_path / "data").mkdir()
    rows = make_dataset(make_rows(8)).with_format("arrow")[:]
    pq.write_table(pa.concat_tables([rows] * 400), tmp_path / "data/train.parquet", row_group_size=50)
    flags = ("--streaming", f"--dataloader_num_workers={workers}", "--max_train_steps=2", "--report_to=none")
    printed = run("train_instruct_pix2pix.py", training_flags(tiny_base, tmp_path / "data", tmp_path / "out", *flags))
    assert "terminate called" not in printed and (tmp_path / "out/model_index.json").is_file()


def test_trackers_get_metrics_and_images(tiny_base, pairs, image_file, tmp_path):
    flags = (
        "--report_to=tensorboard",
        "--logging_steps=2",
        f"--val_image_url={image_file}",
        "--validation_prompt=red",
        "--num_validation_images=1",
        "--validation_split=0.3",
    )
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags))
    events = EventAccumulator(str(tmp_path / "out/logs/instruct-pix2pix"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert {"lr", "grad_norm", "samples_per_second", "peak_memory_gb", "held_out_loss"} <= set(events.Tags()["scalars"])
    assert {f"held_out_loss_q{quarter}" for quarter in (1, 2, 3, 4)} <= set(events.Tags()["scalars"])
    assert any("red" in tag for tag in events.Tags()["images"])


def test_best_weights_are_published(tiny_base, pairs, tmp_path):
    flags = (
        "--validation_split=0.3",
        "--validation_steps=1",
        "--save_best",
        "--checkpointing_steps=1",
        "--learning_rate=0.05",
        "--max_train_steps=5",
    )
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags))
    entries = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["held_out_loss"] for entry in entries if "held_out_loss" in entry}
    best = min(losses, key=losses.get)
    assert len(set(losses.values())) == 5
    assert json.loads((tmp_path / "out/checkpoint-best/best.json").read_text())["global_step"] == best
    published, kept = (load_file(tmp_path / "out" / folder / WEIGHTS) for folder in ("unet", f"checkpoint-{best}/unet"))
    assert all(torch.equal(published[name], kept[name]) for name in published)


def test_training_with_cached_latents(tiny_base, pairs, tmp_path):
    shared = ("--center_crop", "--random_flip", "--max_train_steps=8")
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "live", *shared))
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "cached", *shared, "--cache_latents"))
    live, cached = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("live", "cached"))
    start = load_file(tiny_base / "unet" / WEIGHTS)
    names = [name for name in live if "conv_in" not in name]
    moved, apart = (sum((live[n] - other[n]).abs().sum() for n in names) for other in (start, cached))
    assert apart < 0.01 * moved  # AdamW's first steps have full length even where a gradient is only rounding
    losses = [[loss for _, loss, *_ in losses_of(tmp_path / name) if loss] for name in ("live", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert list((tmp_path / "cached/latent-cache").glob("*/rows-00000-*.safetensors"))


def test_a_latent_cache_for_several_runs(tiny_base, pairs, tmp_path, monkeypatch, capsys):
    """A second run with other settings and prompts encodes no image; a disk without room is noticed before."""
    encoded, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, **m: encoded.append(len(x)) or encode(self, x, **m))
    shared = ("--center_crop", "--random_flip", "--cache_latents", f"--latent_cache_dir={tmp_path / 'latents'}")
    other = save_pairs(tmp_path / "other", rows=make_rows(7) | {"edit_prompt": ["make it green"] * 7})
    changed = ("--learning_rate=0.01", "--train_batch_size=3", f"--dataset_name={other}")
    for name, more in (("one", ()), ("two", changed)):
        for folder in (tmp_path / "latents").glob("*"):
            for age, left in ((48 * 3600, "killed"), (60, "beside")):
                (folder / f".unfinished-{left}").write_text("")
                os.utime(folder / f".unfinished-{left}", (time.time() - age,) * 2)
        assert TRAIN(training_flags(tiny_base, pairs, tmp_path / name, *shared, "--report_to=none", *more)) == 0
        assert sum(encoded) == 2 * 2 * 7  # seven pairs, plain and mirrored
        assert not (tmp_path / name / "latent-cache").exists()
    assert {path.name for path in (tmp_path / "latents").glob("*/.unfinished-*")} == {".unfinished-beside"}
    monkeypatch.setattr(latent_encoding.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(SystemExit):
        TRAIN(training_flags(tiny_base, pairs, tmp_path / "full", *shared, "--latent_cache_dir", str(tmp_path / "new")))
    assert "GB for 7 rows" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *shared, f"--latent_cache_dir={tmp_path / 'file'}"))
    assert "--latent_cache_dir" in (message := capsys.readouterr().err) and "Traceback" not in message


@pytest.mark.parametrize("width", [40, 41])
def test_cached_pairs(tiny_base, width):
    """The mirrored pair is what decoding it mirrored gives; several pairs at a time have the moments of one."""
    geometry = Geometry(32, center_crop=True, random_flip=True)
    images = [make_image(index, (width, 33 + index)) for index in range(3)]
    pairs = [prepare_pair(image, image, geometry) for image in images]
    for image, pair in zip(images, pairs, strict=True):
        mirrored, expected = pair.mirrored(), prepare_pair(image, image, geometry, u_flip=0.0)
        assert mirrored.crop_top_left == expected.crop_top_left and mirrored.is_flipped and expected.is_flipped
        assert np.array_equal(mirrored.original, expected.original) and np.array_equal(mirrored.edited, expected.edited)
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    rows = [[pair, pair.mirrored()] for pair in pairs]
    together, alone = encode_variants(rows, vae), [encode_variants([row], vae)[0] for row in rows]
    for (moments, sizes), (expected, expected_sizes) in zip(together, alone, strict=True):
        assert torch.equal(sizes, expected_sizes)
        torch.testing.assert_close(moments, expected, rtol=0, atol=1e-4)


def test_a_dry_run_saves_only_the_first_pairs(tiny_base, pairs, tmp_path, capsys):
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--dry_run", "--report_to=none")) == 0
    printed = capsys.readouterr().out
    assert "one step of 2 samples" in printed and "GB optimizer" in printed and "for 4 steps" in printed
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == ["dry_run.png"]
    assert Image.open(tmp_path / "out/dry_run.png").width == 2 * 192


@pytest.mark.parametrize(
    "flags",
    [
        ("--streaming",),
        ("--streaming", "--dataloader_num_workers=1"),
        ("--resize_mode=bucket",),
        ("--resize_mode=squash",),
        ("--use_8bit_adam",),
        ("--gradient_checkpointing",),
        ("--mixed_precision=bf16",),
        ("--snr_gamma=5", "--noise_offset=0.1", "--prediction_type=v_prediction", "--rescale_betas_zero_snr"),
        ("--scale_lr", "--max_train_samples=3"),
        ("--num_train_epochs=2", "--max_train_steps=4"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_features_train_a_pipeline_that_loads(tiny_base, pairs, tmp_path, flags):
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags, "--report_to=none")) == 0
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    start = load_file(tiny_base / "unet" / WEIGHTS)
    trained = pipeline.unet.state_dict()
    assert not trained.keys() ^ start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start if name != "conv_in.weight")
    image = pipeline("red", image=make_image(1, (32, 32)), num_inference_steps=2).images[0]
    assert image.size == (32, 32)


def test_zero_terminal_snr_is_published_with_trailing_timesteps(tiny_base, pairs, tmp_path):
    flags = ("--prediction_type=v_prediction", "--rescale_betas_zero_snr", "--max_train_steps=1")
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags))
    config = config_of(tmp_path / "out", "scheduler")
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
    assert config["prediction_type"] == "v_prediction"
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out/scheduler")
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_an_epoch_is_a_number_of_rows(tiny_base, pairs, tmp_path):
    flags = [flag for flag in training_flags(tiny_base, pairs, tmp_path / "out") if "max_train_steps" not in flag]
    TRAIN([*flags, "--num_train_epochs=2", "--gradient_accumulation_steps=2", "--checkpointing_steps=1"])
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def test_training_on_a_mix_of_datasets(tiny_base, tmp_path):
    for name, first in (("one", 0), ("two", 100)):
        save_pairs(tmp_path / name, rows=make_rows(6, first))
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n  - {name: one, weight: 3}\n  - {name: two, weight: 1, edit_prompt_column: edit_prompt}\n"
    )
    flags = [flag for flag in training_flags(tiny_base, tmp_path, tmp_path / "out") if "dataset_name" not in flag]
    assert TRAIN([*flags, f"--train_mix={tmp_path / 'mix.yaml'}", "--validation_split=0.2"]) == 0
    assert "one" in (tmp_path / "out/README.md").read_text()


def test_fine_tuning_starts_from_the_editor(tiny_editor, pairs, tmp_path):
    """With a learning rate of zero the weights do not change, also those of the eight input channels."""
    assert (
        FINETUNE(training_flags(tiny_editor, pairs, tmp_path / "out", "--learning_rate=0", "--max_train_steps=2")) == 0
    )
    before, after = (load_file(folder / "unet" / WEIGHTS) for folder in (tiny_editor, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_training_starts_from_the_base_with_its_bias(tiny_base, pairs, tmp_path):
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--learning_rate=0", "--max_train_steps=1"))
    before, after = (load_file(folder / "unet" / WEIGHTS) for folder in (tiny_base, tmp_path / "out"))
    weight = after.pop("conv_in.weight")
    assert torch.equal(weight[:, :4], before.pop("conv_in.weight")) and not weight[:, 4:].any()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_a_finished_run_publishes_again(tiny_base, pairs, tmp_path):
    flags = training_flags(tiny_base, pairs, tmp_path / "out", "--checkpointing_steps=4")
    TRAIN(flags)
    expected = weights_of(tmp_path / "out/unet")
    (tmp_path / "out/model_index.json").unlink()
    assert TRAIN([*flags, "--resume_from_checkpoint=latest"]) == 0
    assert weights_of(tmp_path / "out/unet") == expected and (tmp_path / "out/model_index.json").exists()


@pytest.mark.parametrize("script", ["train_instruct_pix2pix.py", "finetune_instruct_pix2pix.py"])
def test_help_imports_nothing_heavy(script):
    listing = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    listing += "\nexcept SystemExit: print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", listing, script], cwd=REPOSITORY, capture_output=True, check=True)
    help_text, modules = run.stdout.decode().rsplit("\n", 2)[0], run.stdout.decode().split("\n")[-2].split()
    assert not {"torch", "diffusers", "transformers", "datasets", "numpy", "accelerate"} & set(modules)
    for group in ("model:", "data:", "objective:", "optimization:", "validation:", "checkpoints:", "publishing:"):
        assert group in help_text


def test_without_a_seed_one_is_drawn_and_stored(tiny_base, pairs, tmp_path):
    flags = [flag for flag in training_flags(tiny_base, pairs, tmp_path / "out") if "--seed" not in flag]
    flags += ["--checkpointing_steps=2"]
    assert TRAIN([*flags, "--max_train_steps=2"]) == 0
    seed = json.loads((tmp_path / "out/args.json").read_text())["seed"]
    assert TRAIN([*flags, "--resume_from_checkpoint=latest"]) == 0
    assert isinstance(seed, int) and json.loads((tmp_path / "out/args.json").read_text())["seed"] == seed
