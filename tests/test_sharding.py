"""Sharded training (FSDP2) in two CPU processes, as users start it, against training with whole weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pairs import make_image, save_pairs
from tests.runs import BIN, TORCHRUN, WEIGHTS, losses_of, run, training_flags, weights_of
from tests.tiny import make_unet
from train_instruct_pix2pix import main as train
from utils.cli import pick
from utils.errors import InputError
from utils.training.flags import parse_training_flags
from utils.training.settings import Settings
from utils.training.sharding_settings import BLOCKS, Sharding, take_sharding

SCRIPT = "train_instruct_pix2pix.py"
CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: "{precision}"
num_machines: 1
num_processes: 2
fsdp_config: {{fsdp_version: 2, fsdp_reshard_after_forward: {reshard}, fsdp_activation_checkpointing: {checkpointing}}}
"""


def launcher(folder: Path, precision: str = "no", reshard: str = "true", checkpointing: str = "false") -> tuple:
    """`accelerate launch` with a configuration of its own."""
    config = folder / "fsdp2.yaml"
    config.write_text(CONFIG.format(precision=precision, reshard=reshard, checkpointing=checkpointing))
    return (str(BIN / "accelerate"), "launch", f"--config_file={config}")


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tiny_base):
    """The flags of a run of four steps with everything that only the main process does; takes the output folder."""
    folder = tmp_path_factory.mktemp("data")
    pairs = save_pairs(folder / "pairs", 7)
    make_image(1).save(folder / "photo.png")
    images = (f"--val_image_url={folder / 'photo.png'}", "--validation_prompt=make it night")
    few = ("--num_validation_images=1", "--validation_num_inference_steps=2", "--validation_steps=2")
    rest = ("--use_ema", "--save_best", "--validation_split=0.3", "--checkpointing_steps=2", "--report_to=none")
    return lambda out, *more: training_flags(tiny_base, pairs, out, *images, *few, *rest, *more)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """What two processes with whole weights write."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(SCRIPT, flags(folder), TORCHRUN)
    return folder


@pytest.fixture(scope="module")
def sharded(flags, tmp_path_factory) -> Path:
    """What two processes with divided weights write."""
    folder = tmp_path_factory.mktemp("sharded")
    printed = run(SCRIPT, flags(folder / "out"), launcher(folder))
    assert "Warning" not in printed
    return folder / "out"


def assert_same_weights(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    first, second = load_file(one / "unet" / WEIGHTS), load_file(other / "unet" / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance)


def assert_same_losses(one: Path, other: Path, tolerance: float) -> None:
    for ours, theirs in zip(losses_of(one), losses_of(other), strict=True):
        assert [value or 0 for value in ours] == pytest.approx([value or 0 for value in theirs], rel=tolerance)


def test_the_published_pipeline_is_that_of_whole_weights(whole, sharded):
    """The same losses, held-out losses, best step, validation image and pipeline, up to rounding."""
    assert_same_weights(whole, sharded)
    assert_same_losses(sharded, whole, 1e-5)
    best = [
        json.loads((folder / "checkpoint-best/best.json").read_text())["global_step"] for folder in (whole, sharded)
    ]
    assert best == [4, 4]
    names = [
        sorted(str(p.relative_to(out)) for p in out.rglob("*") if "checkpoint-" not in str(p))
        for out in (whole, sharded)
    ]
    assert names[0] == names[1] and "validation/step-4.png" in names[0]


def test_each_process_writes_its_half(sharded):
    shards = [load_file(path) for path in sorted((sharded / "checkpoint-4/shards").iterdir())]
    sizes = [sum(value.nbytes for value in shard.values()) for shard in shards]
    assert len(shards) == 2 and max(sizes) < 0.52 * sum(sizes)
    parts = {name.split("/")[0] for shard in shards for name in shard}
    assert parts == {"unet", "unet_ema", "optimizer"}
    assert [path.name for path in (sharded / "checkpoint-4").iterdir() if path.is_dir()] == ["shards"]
    listed = json.loads((sharded / "checkpoint-4/progress.json").read_text())["files"]
    assert sum(name.startswith("shards/") for name in listed) == 2


def resumed(folder: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped after two steps."""
    copied = Path(shutil.copytree(folder, tmp_path / "out"))
    for name in ("checkpoint-4", "unet"):
        shutil.rmtree(copied / name)
    return copied


def test_resume_to_the_bit(sharded, flags, tmp_path):
    out = resumed(sharded, tmp_path)
    assert "from" in run(SCRIPT, flags(out, "--resume_from_checkpoint=latest"), launcher(tmp_path))
    assert weights_of(out / "unet") == weights_of(sharded / "unet") and losses_of(out) == losses_of(sharded)


def test_resume_in_one_process_with_whole_weights(sharded, flags, tmp_path, recwarn):
    out = resumed(sharded, tmp_path)
    assert train(flags(out, "--resume_from_checkpoint=latest", "--gradient_accumulation_steps=2")) == 0
    assert_same_weights(out, sharded)
    assert not [warning for warning in recwarn if "torch.distributed" in str(warning.message)]


def test_resume_a_run_with_whole_weights(whole, sharded, flags, tmp_path):
    """Sharded from now on, with weights gathered until the backward pass, and recomputed activations."""
    out = resumed(whole, tmp_path)
    run(SCRIPT, flags(out, "--resume_from_checkpoint=latest"), launcher(tmp_path, "no", "false", "true"))
    assert_same_weights(out, sharded)


def test_bf16(whole, flags, tmp_path):
    run(SCRIPT, flags(tmp_path / "out"), launcher(tmp_path, "bf16"))
    assert_same_losses(tmp_path / "out", whole, 5e-3)


def test_shards_of_another_model_are_refused(sharded, flags, tiny_base, tmp_path, capsys):
    """Here a base of the same name with one more layer in each block."""
    out = resumed(sharded, tmp_path)
    base = Path(shutil.copytree(tiny_base, tmp_path / tiny_base.name))
    make_unet(4, layers_per_block=2).save_pretrained(base / "unet")
    wrong = (
        "--resume_from_checkpoint=latest",
        "--gradient_accumulation_steps=2",
        f"--pretrained_model_name_or_path={base}",
    )
    with pytest.raises(SystemExit) as stopped:
        train(flags(out, *wrong))
    assert stopped.value.code == 2
    assert "does not fit the model of this command" in capsys.readouterr().err


def settings(*more: str) -> Settings:
    return pick(parse_training_flags(training_flags(Path("base"), Path("pairs"), Path("out"), *more), ""), Settings)


def deepspeed(**values: str) -> dict:
    return {"ACCELERATE_USE_DEEPSPEED": "true"} | {
        f"ACCELERATE_DEEPSPEED_{key}": value for key, value in values.items()
    }


def fsdp(**values: str) -> dict:
    return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | {
        f"FSDP_{key}": value for key, value in values.items()
    }


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false"}, None),
        (fsdp(RESHARD_AFTER_FORWARD="true"), Sharding()),
        (fsdp(RESHARD_AFTER_FORWARD="false", OFFLOAD_PARAMS="true"), Sharding(False, True)),
        (fsdp(AUTO_WRAP_POLICY="NO_WRAP", ACTIVATION_CHECKPOINTING="true"), Sharding(True, False, (), True)),
        (fsdp(TRANSFORMER_CLS_TO_WRAP="Attention, FeedForward"), Sharding(blocks=("Attention", "FeedForward"))),
        (deepspeed(ZERO_STAGE="2"), Sharding(False)),
        (deepspeed(ZERO_STAGE="3", OFFLOAD_OPTIMIZER_DEVICE="cpu"), Sharding(True, True, BLOCKS)),
    ],
)
def test_configurations(environment, expected):
    left = {"PATH": "x"}
    environment |= left
    assert take_sharding(environment, settings()) == expected
    assert not [name for name in environment if name.startswith("ACCELERATE_USE_")]  # accelerate must not do it again


@pytest.mark.parametrize(
    "environment, flags, words",
    [
        (fsdp(VERSION="1"), (), "set fsdp_version: 2"),
        (fsdp(AUTO_WRAP_POLICY="SIZE_BASED_WRAP"), (), "set TRANSFORMER_BASED_WRAP"),
        (fsdp(STATE_DICT_TYPE="FULL_STATE_DICT"), (), "must be SHARDED_STATE_DICT"),
        (deepspeed(ZERO_STAGE="1"), (), "zero_stage is 1; this script supports 2 and 3"),
        (deepspeed(OFFLOAD_PARAM_DEVICE="nvme"), (), "offload device nvme is not supported"),
        (deepspeed(CONFIG_FILE="/no.json"), (), "/no.json cannot be read"),
        (deepspeed() | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, (), "use --max_grad_norm"),
        (fsdp(), ("--lora_rank=4",), "an adapter is small"),
        (fsdp(), ("--optimizer=adafactor",), "--optimizer adafactor does not work with sharding"),
        (fsdp(), ("--use_8bit_adam",), "--use_8bit_adam does not work with sharding"),
        (fsdp(), ("--use_ema", "--ema_device=cpu"), "--ema_device does not work with sharding"),
        (fsdp(), ("--mixed_precision=fp16",), "--mixed_precision fp16 does not work with sharding"),
    ],
)
def test_what_is_not_supported_is_refused(environment, flags, words):
    with pytest.raises(InputError) as raised:
        take_sharding(dict(environment), settings(*flags))
    assert words in str(raised.value)


def test_a_file_of_deepspeed(tmp_path):
    """Its memory settings are used; what this project has flags for must be left open."""
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, "train_batch_size": "auto"}))
    assert take_sharding(deepspeed(CONFIG_FILE=str(path)), settings()) == Sharding(True, True)
    path.write_text(json.dumps({"zero_optimization": zero, "optimizer": {"type": "Lion"}, "train_batch_size": 8}))
    with pytest.raises(InputError, match="sets optimizer, train_batch_size, for which this script has flags"):
        take_sharding(deepspeed(CONFIG_FILE=str(path)), settings())
