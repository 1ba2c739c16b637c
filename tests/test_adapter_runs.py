"""Adapters, optimizers and memory saving in the training scripts: what is published and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file

import finetune_instruct_pix2pix
import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from tests.mistakes import fails_early
from tests.pairs import make_image, save_pairs
from tests.runs import ADAPTER, WEIGHTS, training_flags, weights_of

TRAIN, TRAIN_SDXL = train_instruct_pix2pix.main, train_instruct_pix2pix_sdxl.main
FINETUNE = finetune_instruct_pix2pix.main
SMALL = ("--report_to=none", "--max_train_steps=2", "--learning_rate=1e-2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


def run_the_card(adapter: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the unchanged example of the card in a folder with the adapter and the base; returns the pipeline."""
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    folder.mkdir()
    for target in (adapter, base):
        (folder / target.name).symlink_to(target)
    make_image(1, (40, 30)).save(folder / "photograph.jpg")
    monkeypatch.chdir(folder)
    namespace = {}
    exec(code, namespace)
    width, height = namespace["image"].size
    assert Image.open("edited.png").size == (width // 8 * 8, height // 8 * 8)
    return namespace["pipeline"]


def edit_with(pipeline) -> np.ndarray:
    size = dict(height=32, width=32) if isinstance(pipeline, StableDiffusionXLInstructPix2PixPipeline) else {}
    return pipeline(
        "red",
        image=make_image(1, (32, 32)),
        num_inference_steps=3,
        generator=torch.manual_seed(0),
        output_type="np",
        **size,
    ).images[0]


PLAIN = "--lora_rank=4"
DORA = "--lora_rank=4 --lora_alpha=8 --use_dora --lora_target=all --use_ema"
NF4 = "--lora_rank=2 --quantize_base=nf4 --lora_dropout=0.1"
INT8 = "--lora_rank=2 --quantize_base=int8"


@pytest.mark.parametrize(
    ("script", "model", "flags"),
    [
        *((TRAIN, "tiny_base", flags) for flags in (PLAIN, DORA, NF4, INT8)),
        *((FINETUNE, "tiny_editor", flags) for flags in (PLAIN, DORA)),
        *((TRAIN_SDXL, "tiny_sdxl", flags) for flags in (DORA, NF4)),
        *((FINETUNE, "tiny_sdxl_editor", flags) for flags in (PLAIN, INT8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_card_loads_the_trained_adapter(request, script, model, flags, pairs, tmp_path, monkeypatch):
    """The card's example, with stock diffusers, makes the same edits as the merged pipeline of the same run."""
    base = request.getfixturevalue(model)
    flags = (*SMALL, *flags.split())
    assert script(training_flags(base, pairs, tmp_path / "adapter", *flags)) == 0
    assert script(training_flags(base, pairs, tmp_path / "merged", *flags, "--merge_adapter")) == 0
    assert not {"unet", "model_index.json"} & {path.name for path in (tmp_path / "adapter").iterdir()}
    editor = StableDiffusionXLInstructPix2PixPipeline if "sdxl" in model else StableDiffusionInstructPix2PixPipeline
    loaded = run_the_card(tmp_path / "adapter", base, tmp_path / "elsewhere", monkeypatch)
    assert type(loaded) is editor
    merged = editor.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(edit_with(loaded), edit_with(merged), atol=1e-4)
    start = load_file(base / "unet" / WEIGHTS)
    trained = load_file(tmp_path / "merged/unet" / WEIGHTS)
    changed = {name for name in trained if name != "conv_in.weight" and not torch.equal(trained[name], start[name])}
    assert "conv_in.bias" not in changed and any("to_q" in name for name in changed)
    has_conv_in = any("conv_in" in name for name in load_file(tmp_path / "adapter" / ADAPTER))
    assert has_conv_in == (model in ("tiny_base", "tiny_sdxl") or "--lora_target=all" in flags)


def test_the_averaged_or_the_best_adapter_is_published(tiny_base, pairs, tmp_path):
    flags = ("--lora_rank=4", "--use_ema", "--checkpointing_steps=2", *SMALL)
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags)) == 0
    checkpoint = tmp_path / "out/checkpoint-2"
    assert weights_of(tmp_path / "out") == weights_of(checkpoint / "unet_ema") != weights_of(checkpoint / "unet")
    assert (checkpoint / "unet" / ADAPTER).stat().st_size < (tiny_base / "unet" / WEIGHTS).stat().st_size
    image = tmp_path / "image.png"
    make_image(3).save(image)
    flags = (
        "--lora_rank=4",
        "--validation_split=0.3",
        "--save_best",
        "--validation_steps=1",
        "--validation_prompt=r",
        f"--val_image_url={image}",
        "--num_validation_images=1",
        *SMALL,
    )
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "best", *flags)) == 0
    assert weights_of(tmp_path / "best") == weights_of(tmp_path / "best/checkpoint-best/unet")
    assert (tmp_path / "best/validation/step-2.png").exists()


def test_an_adapter_is_pushed_alone(tiny_sdxl, pairs, client, tmp_path):
    flags = training_flags(
        tiny_sdxl,
        pairs,
        tmp_path / "my-lora",
        "--lora_rank=4",
        "--push_to_hub",
        "--hub_token=write-token",
        "--max_train_steps=2",
        "--checkpointing_steps=1",
    )
    assert TRAIN_SDXL(flags) == 0
    repo = client.repos["models/user/my-lora"]
    assert {ADAPTER, "README.md", "training_curve.png"} <= set(repo.files)
    assert not [name for name in repo.files if "checkpoint" in name or name.startswith("unet")]
    card = repo.read("README.md").decode()
    assert "- lora" in card and b"write-token" not in b"".join(repo.read(name) for name in repo.files)


@pytest.mark.parametrize("adapter", [(), ("--lora_rank=4",)], ids=["full", "adapter"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer=adamw8bit",),
        ("--optimizer=adafactor", "--adafactor_scale_parameter"),
        ("--optimizer=prodigy", "--learning_rate=1"),
        ("--optimizer=schedulefree_adamw", "--validation_split=0.2"),
        ("--fused_backward", "--max_grad_norm=0", "--optimizer=adafactor"),
        ("--use_ema", "--ema_device=cpu"),
        ("--gradient_checkpointing_blocks", "mid_block", "up_blocks.0"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_optimizers_and_memory_saving_train_a_pipeline_that_loads(tiny_base, pairs, tmp_path, flags, adapter):
    merged = ("--merge_adapter",) if adapter else ()
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *SMALL, *adapter, *merged, *flags)) == 0
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    start = load_file(tiny_base / "unet" / WEIGHTS)
    trained = pipeline.unet.state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start if name != "conv_in.weight")
    assert all(value.isfinite().all() for value in trained.values())
    entry = json.loads((tmp_path / "out/training_log.jsonl").read_text().splitlines()[0])
    assert entry["grad_norm"] > 0 and edit_with(pipeline).shape == (32, 32, 3)


def test_fused_training_ends_with_the_same_weights(tiny_base, pairs, tmp_path):
    for name, more in (("plain", ()), ("fused", ("--fused_backward", "--gradient_checkpointing"))):
        flags = ("--max_grad_norm=0", "--max_train_steps=4", "--use_ema", "--learning_rate=1e-3", *more)
        assert TRAIN(training_flags(tiny_base, pairs, tmp_path / name, *flags)) == 0
    assert weights_of(tmp_path / "plain/unet") == weights_of(tmp_path / "fused/unet")
    logs = [(tmp_path / name / "training_log.jsonl").read_text() for name in ("plain", "fused")]
    norms = [[json.loads(line)["grad_norm"] for line in log.splitlines()] for log in logs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--use_dora",), ("--use_dora", "--lora_rank")),
        (("--quantize_base=nf4", "--merge_adapter"), ("--merge_adapter, --quantize_base", "--lora_rank")),
        (("--lora_target=all",), ("--lora_target", "--lora_rank")),
        (("--lora_rank=0",), ("--lora_rank is 0",)),
        (("--lora_rank=4", "--lora_dropout=1"), ("--lora_dropout is 1.0", "below 1")),
        (("--lora_rank=4", "--lora_alpha=0"), ("--lora_alpha is 0", "above 0")),
        (("--lora_rank=4", "--prediction_type=v_prediction"), ("--prediction_type", "--merge_adapter")),
        (("--ema_device=cpu",), ("--ema_device", "--use_ema")),
        (("--vae_variant=fp16",), ("--vae_variant",)),
        (("--fused_backward",), ("--fused_backward", "--max_grad_norm 0")),
        (("--fused_backward", "--max_grad_norm=0", "--gradient_accumulation_steps=2"), ("accumulation_steps is 2",)),
        (("--weights_dtype=bf16",), ("--weights_dtype bf16 needs --mixed_precision bf16",)),
        (("--weights_dtype=bf16", "--mixed_precision=bf16", "--lora_rank=4"), ("--weights_dtype bf16", "adapter")),
        (("--optimizer=prodigy",), ("--learning_rate 1",)),
        (("--optimizer=paged_adamw8bit",), ("needs a GPU",)),
        (("--optimizer=schedulefree_adamw", "--use_ema"), ("drop --use_ema",)),
        (("--optimizer=adafactor", "--use_8bit_adam"), ("--use_8bit_adam",)),
        (("--gradient_checkpointing_blocks", "down_blocks.7"), ("down_blocks.7", "mid_block")),
        (("--gradient_checkpointing", "--gradient_checkpointing_blocks", "mid_block"), ("recomputes all",)),
        (("--single_file_config=somewhere",), ("--single_file_config", ".safetensors")),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_invalid_combinations_are_refused(flags, words, tiny_base, pairs, tmp_path):
    fails_early(training_flags(tiny_base, pairs, tmp_path / "out", "--report_to=none", *flags), *words)


def test_a_pipeline_and_an_adapter_do_not_share_a_folder(tiny_base, pairs, tmp_path):
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *SMALL)
    assert TRAIN([*flags, "--lora_rank=4"]) == 0
    fails_early(flags, ADAPTER, "name another folder")
    (tmp_path / "out" / ADAPTER).unlink()
    assert TRAIN(flags) == 0
    fails_early([*flags, "--lora_rank=4"], "model_index.json", "name another folder")


def test_an_adapter_of_another_rank_is_not_resumed(tiny_base, pairs, tmp_path):
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *SMALL, "--checkpointing_steps=1")
    assert TRAIN([*flags, "--lora_rank=4"]) == 0
    fails_early([*flags, "--lora_rank=8", "--resume_from_checkpoint=latest"], "lora_rank", "4", "8")
