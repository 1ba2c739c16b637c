"""Wrong flags, models, machines, folders and tokens: one clear message, exit code 2, and existing files are kept.

Every case calls a script's `main`. Problems that can be found before a model is loaded are reported before. For bad
rows see test_bad_rows.py, for failures during the run test_bad_luck.py.
"""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import finetune_instruct_pix2pix
from tests.hub_server import Hub, Refused, connect_client, hub_server
from tests.mistakes import copy_of, cut, fails_early, fails_late, of_model
from tests.runs import WEIGHTS
from utils import runtime

FINETUNE = finetune_instruct_pix2pix.main


# ---- flags ----------------------------------------------------------------------------------------------------------

FLAG_MISTAKES = {
    "resolution not a multiple of 8": ("--resolution=33", "--resolution is 33", "multiple of 8"),
    "resolution 0": ("--resolution=0", "--resolution is 0", "at least 16"),
    "resolution in words": ("--resolution=big", "--resolution", "'big'"),
    "unknown scheduler": ("--lr_scheduler=cosinus", "--lr_scheduler", "'cosinus'", "cosine_with_restarts"),
    "unknown flag": ("--resolutoin=32", "--resolutoin", "--resolution"),
    "unknown tracker": ("--report_to=mlflow", "--report_to", "'mlflow'", "tensorboard", "none"),
    "unknown precision": ("--mixed_precision=fp8", "--mixed_precision", "'fp8'", "bf16"),
    "batch of none": ("--train_batch_size=0", "--train_batch_size is 0", "1"),
    "negative batch": ("--train_batch_size=-2", "--train_batch_size is -2", "1"),
    "no steps": ("--max_train_steps=0", "--max_train_steps is 0", "1"),
    "half an epoch": ("--num_train_epochs=0.5", "--num_train_epochs", "'0.5'"),
    "negative learning rate": ("--learning_rate=-1e-4", "--learning_rate is -0.0001", "0"),
    "infinite learning rate": ("--learning_rate=inf", "--learning_rate is inf", "finite"),
    "learning rate nan": ("--learning_rate=nan", "--learning_rate is nan"),
    "negative warm-up": ("--lr_warmup_steps=-1", "--lr_warmup_steps is -1", "0"),
    "dropout above a third": ("--conditioning_dropout_prob=0.5", "--conditioning_dropout_prob is 0.5", "0.333"),
    "beta of 1": ("--adam_beta1=1", "--adam_beta1 is 1.0", "below 1"),
    "negative limit of checkpoints": ("--checkpoints_total_limit=-1", "--checkpoints_total_limit is -1", "1"),
    "negative seed": ("--seed=-1", "--seed is -1", "0"),
    "seed too large": (f"--seed={2**63}", "--seed is 9223372036854775808", "between 0"),
    "empty value": ("--hub_model_id=", "--hub_model_id is empty"),
    "best without held-out rows": ("--save_best", "--save_best", "--validation_split"),
    "zero SNR of an epsilon base": (
        "--rescale_betas_zero_snr",
        "--rescale_betas_zero_snr needs",
        "--prediction_type v_prediction",
    ),
    "prompt without image": ("--validation_prompt=sepia", "--val_image_url", "--validation_prompt", "both"),
    "two images, three prompts": (
        "--val_image_url=a --val_image_url=b --validation_prompt=1 --validation_prompt=2 --validation_prompt=3",
        "--val_image_url is given 2 times",
        "--validation_prompt 3 times",
    ),
    "validation without steps": ("--validation_num_inference_steps=0", "--validation_num_inference_steps is 0", "1"),
    "too many validation steps": ("--validation_num_inference_steps=1001", "must be at most 1000"),
    "validation scale": ("--validation_guidance_scale=-1", "--validation_guidance_scale -1.0: must be from 0"),
    "validation rescale": ("--validation_guidance_rescale=2", "--validation_guidance_rescale 2.0: must be from 0 to 1"),
    "two datasets": ("--train_data_dir=a", "--dataset_name", "--train_data_dir", "exactly one"),
}


@pytest.mark.parametrize("mistake", FLAG_MISTAKES.values(), ids=FLAG_MISTAKES)
def test_flags(flags: list[str], mistake: tuple[str, ...]) -> None:
    extra, *words = mistake
    fails_early([*flags, *extra.split()], *words)


def test_all_mistakes_in_flags_are_reported_together(flags: list[str]) -> None:
    fails_early([*flags, "--resolution=33", "--train_batch_size=0"], "--resolution is 33", "--train_batch_size is 0")


def test_streaming_without_steps(flags: list[str]) -> None:
    without = [flag for flag in flags if not flag.startswith("--max_train_steps")]
    fails_early([*without, "--streaming"], "--streaming needs --max_train_steps")


def test_no_dataset(flags: list[str]) -> None:
    fails_early([flag for flag in flags if not flag.startswith("--dataset_name")], "--dataset_name", "--train_data_dir")


def test_no_model(flags: list[str]) -> None:
    fails_early(flags[1:], "--pretrained_model_name_or_path")


# ---- the model ------------------------------------------------------------------------------------------------------


def test_missing_model_folder(flags: list[str], tmp_path: Path) -> None:
    fails_early(of_model(flags, tmp_path / "nothing"), "--pretrained_model_name_or_path", "nothing", "cannot be loaded")


def test_model_of_the_hub_while_offline(flags: list[str]) -> None:
    fails_early(of_model(flags, "someone/model"), "--pretrained_model_name_or_path someone/model", "Hub")


def test_model_folder_without_a_unet(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    for part in ("unet", "tokenizer"):
        shutil.rmtree(base / part)
    fails_early(of_model(flags, base), str(base), "complete diffusers pipeline", "missing tokenizer, unet")


def test_tokenizer_without_its_files(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """transformers would load an empty tokenizer, for which all prompts are the same."""
    base = copy_of(tiny_base, tmp_path / "base")
    (base / "tokenizer/tokenizer.json").unlink()
    fails_late(of_model(flags, base), f"{base}: its tokenizer is incomplete")


def test_damaged_config_of_the_unet(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    cut(base / "unet/config.json")
    fails_early(of_model(flags, base), str(base), "unet/config.json")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_weights_of_the_base(flags: list[str], tiny_base: Path, tmp_path: Path, part: str) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    weights = base / part / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:5000])
    fails_late(of_model(flags, base), str(base), "again")


def test_weights_of_another_shape(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    config = json.loads((base / "unet/config.json").read_text())
    (base / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 64}))
    fails_late(of_model(flags, base), str(base), "cannot be loaded")


def test_the_right_script_for_an_editor_is_named(flags: list[str], tiny_editor: Path) -> None:
    fails_early(of_model(flags, tiny_editor), "8 input channels", "finetune_instruct_pix2pix.py")


def test_the_right_script_for_a_base_is_named(flags: list[str]) -> None:
    fails_early(flags, "4 channels", "train_instruct_pix2pix.py", script=FINETUNE)


def test_an_inpainting_model_is_refused(flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    config = json.loads((base / "unet/config.json").read_text())
    (base / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    fails_early(of_model(flags, base), "9 channels")
    fails_early(of_model(flags, base), "9 channels", script=FINETUNE)


# ---- the machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--mixed_precision=fp16", ("fp16", "no GPU", "--mixed_precision=no")),
        ("--enable_xformers_memory_efficient_attention", ("xformers", "no GPU", "drop the flag")),
        ("--allow_tf32", ("--allow_tf32", "drop the flag")),
    ],
)
def test_without_a_gpu(flags: list[str], no_gpu: None, extra: str, words: tuple[str, ...]) -> None:
    fails_early([*flags, extra], *words)


@pytest.mark.parametrize("precision, words", [("fp16", ("no GPU", "accelerate")), ("fp8", ("fp8", "bf16"))])
def test_the_launchers_precision(
    flags: list[str], no_gpu: None, monkeypatch: pytest.MonkeyPatch, precision: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("utils.training.launcher.follow_launcher", lambda: None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    fails_early(flags, *words)


def test_several_cpu_processes_need_torchrun(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `accelerate launch --cpu --num_processes 2` sets without MPI."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fails_early(flags, "accelerate launch --cpu --num_processes", "torchrun --nproc_per_node")


def test_tracker_that_is_not_installed(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtime.TRACKER_PACKAGES, "trackio", "no_such_package")
    fails_early([*flags, "--report_to=trackio"], "--report_to trackio", "pip install no_such_package")


@pytest.mark.parametrize(
    "key, words", [(None, ("not logged in", "wandb login", "WANDB_MODE=offline")), ("short", ("wandb", "invalid"))]
)
def test_wandb_without_login(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None, words: tuple[str, ...]
) -> None:
    """The script neither asks nor waits."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a key"))
    wandb.teardown()
    fails_early([*flags, "--report_to=wandb"], "--report_to wandb", *words)
    wandb.teardown()


# ---- the output folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/below", "/proc/nowhere", "/dev/null/out"])
def test_output_dir_that_cannot_be_created(flags: list[str], tmp_path: Path, place: str) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    fails_early([*flags, f"--output_dir={tmp_path / place}"], "--output_dir", place)
    assert (tmp_path / "notes.txt").read_text() == "notes"


def test_empty_output_dir(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path would be the current folder."""
    monkeypatch.chdir(tmp_path)
    fails_early([*flags, "--output_dir="], "--output_dir is empty")


def test_output_dir_that_is_the_model(flags: list[str], tiny_editor: Path, tmp_path: Path) -> None:
    """Publishing would overwrite the base model."""
    model = copy_of(tiny_editor, tmp_path / "editor")
    own = [*of_model(flags, model), f"--output_dir={tmp_path}/./editor"]
    fails_early(own, "--output_dir", "--pretrained_model_name_or_path", "name another folder", script=FINETUNE)


def test_logging_dir_that_is_a_file(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "out/logs").write_text("a file")
    fails_early([*flags, "--report_to=tensorboard"], "--logging_dir", "logs")


# ---- validation images ----------------------------------------------------------------------------------------------


def test_missing_validation_image(flags: list[str], tmp_path: Path) -> None:
    extra = [f"--val_image_url={tmp_path / 'none.png'}", "--validation_prompt=sepia"]
    fails_early([*flags, *extra], "--val_image_url", "none.png", "does not exist")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n cut"], ids=["0 bytes", "text", "cut"])
def test_validation_file_that_is_not_an_image(flags: list[str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    extra = [f"--val_image_url={tmp_path / 'image.png'}", "--validation_prompt=sepia"]
    fails_early([*flags, *extra], "--val_image_url", "image.png", "cannot be used as an image")


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}/cat.png", "http:///cat.png", "http://no.such.host.invalid/a"]
)
def test_validation_image_that_cannot_be_fetched(flags: list[str], address: str) -> None:
    url = address.format(port=closed_port())
    fails_early([*flags, f"--val_image_url={url}", "--validation_prompt=sepia"], url, "cannot be fetched", "its path")


def closed_port() -> int:
    """A local port without a server."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client of this process uses a local server, without a token."""
    with hub_server(tmp_path / "hub") as served:
        connect_client(monkeypatch, served.url, tmp_path)
        yield served
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "extra, words",
    [
        ("", ("--push_to_hub needs a login", "hf auth login")),
        ("--hub_token=read-token", ("may only read", "role 'write'")),
        ("--hub_token=wrong-token", ("--hub_token", "wrong or expired")),
        ("--hub_token=write-token --hub_model_id=other/editor", ("other/editor", "user or team")),
    ],
    ids=["no token", "read token", "wrong token", "another's name"],
)
def test_no_right_to_push(flags: list[str], hub: Hub, extra: str, words: tuple[str, ...]) -> None:
    assert "-token" not in fails_early([*flags, "--push_to_hub", *extra.split()], *words)


def test_push_while_offline(flags: list[str]) -> None:
    fails_early([*flags, "--push_to_hub", "--hub_token=hf_some"], "--push_to_hub", "HF_HUB_OFFLINE")


def test_push_to_an_unreachable_hub(flags: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    fails_early([*flags, "--push_to_hub", "--hub_token=hf_some"], "cannot be reached", "drop --push_to_hub")


def test_upload_that_is_refused_after_training(flags: list[str], hub: Hub, tmp_path: Path) -> None:
    """The pipeline is complete, and the message has a command that uploads it later."""

    def refuse_the_commit(method: str, path: str) -> None:
        if "/commit/" in path:
            raise Refused(403, "storage limit reached")

    hub.hook = refuse_the_commit
    push = ("--push_to_hub", "--hub_token=write-token", "--hub_model_id=editor", f"--output_dir={tmp_path / 'fresh'}")
    assert "write-token" not in fails_late(
        [*flags, *push], "user/editor", "storage limit", "is complete in", "hf upload"
    )
    assert (tmp_path / "fresh/model_index.json").is_file()
