"""Tests that need a GPU; skipped without one."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file

import infer
import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from tests.pairs import make_image, save_pairs
from tests.runs import BIN, REPOSITORY, WEIGHTS, run, training_flags, weights_of
from utils.editing.edit_images import SamplingSettings, edit_pixels
from utils.editing.editor_setup import offload_editor
from utils.editing.loading import load_editor
from utils.runtime import _xformers_problem
from utils.training import loop
from utils.training.objective import Objective
from utils.training.optimizers import restore_paging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
TRAIN = train_instruct_pix2pix.main


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 7)


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision=fp16",),
        ("--mixed_precision=fp16", "--use_ema", "--gradient_checkpointing"),
        ("--mixed_precision=bf16",),
        ("--allow_tf32",),
        ("--no_tf32",),
        ("--use_8bit_adam",),
        ("--cache_latents", "--center_crop"),
        ("--mixed_precision=fp16", "--enable_xformers_memory_efficient_attention"),
        ("--optimizer=paged_adamw8bit",),
        ("--use_ema", "--ema_device=cpu"),
        ("--mixed_precision=bf16", "--weights_dtype=bf16", "--use_ema", "--ema_device=cpu", "--optimizer=adamw8bit"),
        ("--mixed_precision=bf16", "--weights_dtype=bf16", "--fused_backward", "--max_grad_norm=0"),
        ("--optimizer=adafactor", "--fused_backward", "--max_grad_norm=0"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_features_train_a_pipeline_that_loads(tiny_base, pairs, tmp_path, flags):
    if any("xformers" in flag for flag in flags) and (reason := _xformers_problem(True)):
        pytest.skip(reason)
    image = tmp_path / "image.png"
    make_image(3).save(image)
    validation = (f"--val_image_url={image}", "--validation_prompt=red", "--num_validation_images=1")
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags, *validation, "--logging_steps=1")) == 0
    entries = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    assert len(entries) == 4 and all(np.isfinite(entry["loss"]) for entry in entries)
    values = load_file(tmp_path / "out/unet" / WEIGHTS).values()
    assert {value.dtype for value in values} == {torch.float32} and all(value.isfinite().all() for value in values)
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16).to("cuda")
    assert pipeline("red", image=make_image(1, (32, 32)), num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--lora_rank=4", "--merge_adapter"),
        ("--lora_rank=4", "--merge_adapter", "--quantize_base=nf4", "--use_dora"),
        ("--lora_rank=4", "--merge_adapter", "--quantize_base=int8", "--lora_target=all"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_sdxl_and_adapters_in_half_precision(tiny_sdxl, pairs, tmp_path, flags, precision, monkeypatch):
    """Training, validation and publishing; the text encoders leave the GPU before the first step."""
    devices, call = set(), Objective.__call__
    monkeypatch.setattr(
        Objective,
        "__call__",
        lambda self, *inputs: (
            devices.update(encoder.device.type for encoder in self.encode_prompts.text_encoders) or call(self, *inputs)
        ),
    )
    image = tmp_path / "image.png"
    make_image(3).save(image)
    validation = (f"--val_image_url_or_path={image}", "--validation_prompt=red", "--num_validation_images=1")
    more = (*flags, *validation, f"--mixed_precision={precision}", "--gradient_checkpointing", "--validation_split=0.2")
    assert train_instruct_pix2pix_sdxl.main(training_flags(tiny_sdxl, pairs, tmp_path / "out", *more)) == 0
    assert devices == {"cpu"} and (tmp_path / "out/validation/step-4.png").exists()
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16).to(
        "cuda"
    )
    size = dict(height=32, width=32)
    assert pipeline("red", image=make_image(1, (32, 32)), num_inference_steps=2, **size).images[0].size == (32, 32)


@pytest.mark.parametrize(
    "flags",
    [("--use_ema", "--snr_gamma=5"), ("--cache_latents", "--center_crop"), ("--lora_rank=4", "--random_flip")],
    ids=lambda flags: flags[0],
)
def test_steps_do_not_wait_for_the_gpu(tiny_base, pairs, tmp_path, flags, monkeypatch):
    """From the second step on, PyTorch raises at whatever makes the host wait."""
    step, count = loop.train_step, iter(range(9))

    def watched(*inputs: object) -> int:
        torch.cuda.set_sync_debug_mode("error" if next(count) else "default")
        try:
            return step(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", watched)
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", "--mixed_precision=bf16", *flags)) == 0
    assert next(count) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision=bf16", "--use_ema", "--snr_gamma=5"),
        ("--mixed_precision=fp16", "--gradient_accumulation_steps=2"),
        ("--mixed_precision=bf16", "--lora_rank=4", "--lora_dropout=0.2", "--merge_adapter"),
        ("--mixed_precision=bf16", "--gradient_checkpointing"),
        ("--mixed_precision=bf16", "--resize_mode=bucket", "--gradient_accumulation_steps=2"),
        ("--mixed_precision=bf16", "--validation_split=0.2", "--validation_steps=2", "--checkpointing_steps=2"),
    ],
    ids=lambda flags: " ".join(flags),
)
@pytest.mark.parametrize("kind", ["tiny_base", "tiny_sdxl"])
def test_cuda_graphs_train_the_same_weights(kind, flags, pairs, tmp_path, request, caplog):
    """Bit-identical to a run without them, with deterministic kernels."""
    script = train_instruct_pix2pix_sdxl if "sdxl" in kind else train_instruct_pix2pix
    base = request.getfixturevalue(kind)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for graphs in ("no", "yes"):
        more = (*flags, f"--cuda_graphs={graphs}", "--max_train_steps=5")
        assert script.main(training_flags(base, pairs, tmp_path / graphs, *more)) == 0
    torch.use_deterministic_algorithms(False)
    assert "CUDA graphs are not used" not in caplog.text
    assert weights_of(tmp_path / "no/unet") == weights_of(tmp_path / "yes/unet")


def test_fp16_resumes_with_its_scaler(tiny_base, pairs, tmp_path):
    """Bit-identical to an uninterrupted run on the same GPU with deterministic kernels."""
    flags = ("--mixed_precision=fp16", "--use_ema", "--checkpointing_steps=2")
    torch.use_deterministic_algorithms(True, warn_only=True)
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "whole", *flags))
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "parts", *flags, "--max_train_steps=2"))
    TRAIN(training_flags(tiny_base, pairs, tmp_path / "parts", *flags, "--resume_from_checkpoint=latest"))
    assert weights_of(tmp_path / "parts/unet") == weights_of(tmp_path / "whole/unet")


def test_infer_in_half_precision(tiny_editor, tmp_path):
    make_image(2).save(tmp_path / "in.png")
    flags = ["--model", str(tiny_editor), "--input", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png")]
    assert infer.main([*flags, "--edit", "red", "--steps", "3", "--seed", "0", "--dtype", "fp16"]) == 0
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("name", ["tiny_editor", "tiny_sdxl_editor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_offloaded_editors_edit_the_same_in_less_memory(kind, name, dtype, request):
    """Twice, because the hooks move the models back; the memory is measured with the images of a tiny model."""
    folder, image, settings = request.getfixturevalue(name), [make_image(1, (32, 32))], SamplingSettings(2)
    expected = edit_pixels(load_editor(folder, dtype=dtype, device="cuda"), image, ["snow"], [1], settings)[0][0]
    pipeline = load_editor(folder, dtype=dtype)
    offload_editor(pipeline, kind, "cuda")
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        edited = edit_pixels(pipeline, image, ["snow"], [1], settings)[0][0]
        torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)
    weights = sum(value.nbytes for value in load_editor(folder, dtype=dtype).unet.parameters())
    assert torch.cuda.memory_allocated() - before < weights


def test_offload_as_users_run_it(tiny_sdxl_editor, tmp_path, capsys):
    """Both kinds, with the flags of infer.py; a repeated edit without them differs at most in its last bits."""
    make_image(2).save(tmp_path / "in.png")
    flags = ["--model", str(tiny_sdxl_editor), "--input", str(tmp_path / "in.png"), "--edit", "red", "--steps", "3"]
    images = []
    for kind in ("model", "sequential"):
        out = tmp_path / f"{kind}.png"
        assert infer.main([*flags, "--seed", "0", "--dtype", "fp16", "--offload", kind, "--output", str(out)]) == 0
        images.append(np.asarray(Image.open(out), int))
    assert np.abs(images[0] - images[1]).max() <= 3


def test_a_paged_optimizer_is_paged_after_resuming():
    """And its next step is that of the optimizer that was saved."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512, device="cuda")  # states of less than 100,000 values are not paged

    def step(optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        model(torch.randn(4, 512, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = bitsandbytes.optim.PagedAdamW8bit(model.parameters(), lr=1e-2)
    step(first)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    saved = copy.deepcopy(first.state_dict())
    step(first)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    second = bitsandbytes.optim.PagedAdamW8bit(model.parameters(), lr=1e-2)
    second.load_state_dict(saved)
    restore_paging(second)
    states = second.state[model.weight]
    assert all(getattr(states[name], "is_paged", False) for name in ("state1", "state2"))
    step(second)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_skipped_updates_of_fp16_are_logged(tiny_base, pairs, tmp_path):
    """The gradient scaler starts at 65536 and finds its scale in the first steps; the learning rate waits for it."""
    schedule = ("--lr_scheduler=linear", "--lr_warmup_steps=0", "--max_train_steps=6")
    flags = ("--mixed_precision=fp16", "--logging_steps=1", *schedule)
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *flags)) == 0
    entries = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    rates = [entry["lr"] for entry in entries]
    for before, entry, rate in zip([None, *rates], entries, rates, strict=False):
        assert before is None or (rate == before) == bool(entry.get("skipped_updates")), entries


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
@pytest.mark.parametrize("offload", ["false", "true"])
def test_sharding_on_two_gpus(offload, tiny_base, pairs, tmp_path):
    """configs/fsdp2.yaml gives the weights of training without sharding, also with weights in CPU memory."""
    flags = ("--mixed_precision=no", "--use_ema", "--checkpointing_steps=2", "--report_to=none")
    one = training_flags(tiny_base, pairs, tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert TRAIN(one) == 0
    config = (REPOSITORY / "configs/fsdp2.yaml").read_text()
    chosen = tmp_path / "fsdp2.yaml"
    chosen.write_text(config.replace("offload_params: false", f"offload_params: {offload}").replace("bf16", '"no"'))
    launcher = (str(BIN / "accelerate"), "launch", f"--config_file={chosen}", "--num_processes=2")
    run("train_instruct_pix2pix.py", training_flags(tiny_base, pairs, tmp_path / "two", *flags), launcher)
    expected, found = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
