"""adapt_distill.py from flags to folder: weights, settings, card, presets, calibration, mistakes, interruptions."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from huggingface_hub import hf_api
from PIL import Image
from safetensors.torch import load_file, save_file

import adapt_distill
from tests.adapters import load_trained
from tests.deltas import LORA, add_random_lora, load_unet, merge, save_peft_lora, weights_in
from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.mistakes import read_files
from tests.original_names import write_single_file
from tests.pairs import make_noise
from tests.runs import ENVIRONMENT, REPOSITORY
from tests.tiny import make_tiny_sd, make_tiny_sdxl
from utils.editing.loading import load_editor
from utils.editing.schedulers import choose_scheduler
from utils.errors import InputError
from utils.licences import restrictions_of
from utils.merging import calibration
from utils.merging.calibration import Calibration, WeightScores, choose_weight
from utils.merging.merge import MergeOptions
from utils.merging.presets import PRESETS, describe_presets
from utils.merging.recipe import make_recipe
from utils.models.adapters import AdapterOptions, save_adapter
from utils.models.single_file import MODEL_SUFFIXES

BASES = {"sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}


def run(*flags: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = adapt_distill.main([str(flag) for flag in flags])
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def succeeds(*flags: str | Path) -> str:
    code, out, err = run(*flags)
    assert code == 0, err
    return out + err


def fails(*flags: str | Path) -> str:
    """The error message of a run that fails without a traceback."""
    code, out, err = run(*flags)
    assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err, (code, out, err)
    return err[err.index("error: ") :]


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a LoRA of the tiny base."""
    folder = tmp_path_factory.mktemp("models") / "lora"
    unet = load_unet(tiny_base)
    add_random_lora(unet)
    save_peft_lora(folder, unet)
    return folder


def edit(folder: Path, **settings: float) -> np.ndarray:
    """One edit by stock diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = make_noise((32, 32))
    settings |= {"height": 32, "width": 32} if "XL" in type(pipeline).__name__ else {}
    return pipeline("make it red", image=image, generator=torch.manual_seed(0), output_type="np", **settings).images


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_result_is_a_complete_editor(
    family: str, tiny_editor: Path, tiny_sdxl_editor: Path, tiny_base: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """Stock diffusers loads it and edits; unchanged components are hard links; report and card are written."""
    editor, base = (tiny_editor, tiny_base) if family == "sd" else (tiny_sdxl_editor, tiny_sdxl)
    make = make_tiny_sd if family == "sd" else make_tiny_sdxl
    distilled, out = make(tmp_path / "distilled", seed=7), tmp_path / "fast"
    output = succeeds(
        "--model", editor, "--distilled", distilled, "--base", base, "--output_dir", out, "--scheduler=lcm", "--steps=5"
    )
    weight = 1.0 if family == "sd" else 0.5  # instruction-tuned-sd's recommendation for SDXL UNets
    merged, expected = weights_in(out), merge(editor, MergeOptions(weight), distilled=distilled, base=base)
    assert all(torch.equal(merged[name], value) for name, value in expected.items()) and len(merged) == len(expected)
    stock = StableDiffusionInstructPix2PixPipeline if family == "sd" else StableDiffusionXLInstructPix2PixPipeline
    pipeline = stock.from_pretrained(out)
    assert type(pipeline.scheduler) is LCMScheduler and pipeline.unet.config.in_channels == 8
    adapted = json.loads((out / "adapted.json").read_text())
    recommended = adapted["recommended"]
    assert recommended["steps"] == 5 and recommended["scheduler"] == "LCMScheduler" and adapted["weight"] == weight
    assert [(source["role"], source["name"]) for source in adapted["sources"]] == [
        ("editor", editor.name),
        ("distilled", "distilled"),
        ("base", base.name),
    ]
    edited = edit(out, num_inference_steps=recommended["steps"], guidance_scale=recommended["guidance_scale"])
    assert np.isfinite(edited).all()
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / file).samefile(editor / file)
    report = json.loads((out / "report.json").read_text())
    assert set(report["blocks"]) >= {"conv_in", "mid_block", "up_blocks.1"} and "4 of its 8" in report["conv_in"]
    assert "conv_in: changed on 4 of its 8 inputs" in output and "up_blocks.1" in output
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card + json.dumps(adapted), "local paths are private"
    assert f"{stock.__name__}.from_pretrained" in card and "num_inference_steps=5" in card
    assert {path.name for path in out.iterdir()} <= {
        "README.md",
        "adapted.json",
        "report.json",
        "model_index.json",
        "scheduler",
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    }


def test_snippet_of_the_card_runs(
    tiny_editor: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeds("--model", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "fast", "--scheduler=tcd")
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "eta=0.3" in card and "in place of TCD's own" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (32, 32), "green").save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})
    assert Image.open(tmp_path / "edited.png").size == (32, 32)


def test_style_keeps_scheduler_and_default_settings(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    """A fine-tune minus its base, without --scheduler."""
    style = make_tiny_sd(tmp_path / "style", seed=9)
    succeeds("--model", tiny_editor, "--distilled", style, "--base", tiny_base, "--output_dir", tmp_path / "out")
    recommended = json.loads((tmp_path / "out" / "adapted.json").read_text())["recommended"]
    assert recommended == {
        "steps": 20,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "eta": 0.0,
        "scheduler": "DDIMScheduler",
        "scheduler_settings": {},
    }
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").samefile(
        tiny_editor / "scheduler" / "scheduler_config.json"
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtypes(tiny_editor: Path, lora: Path, dtype: str, tmp_path: Path) -> None:
    output = succeeds("--model", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "out", f"--dtype={dtype}")
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    expected = merge(tiny_editor, MergeOptions(1.0), lora=lora)
    assert all(torch.equal(value, expected[name].to(kind)) for name, value in weights_in(tmp_path / "out").items())
    assert ("warning: --dtype bf16 rounds" in output) == (dtype == "bf16")


def test_result_has_no_variant(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    """An editor with fp16 files only gives a result that loads without a variant."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    flags = ("--lora", lora, "--output_dir", tmp_path / "out")
    assert "--model_variant" in fails("--model", tmp_path / "half", *flags)
    succeeds("--model", tmp_path / "half", "--model_variant=fp16", *flags)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "out"), StableDiffusionInstructPix2PixPipeline)
    names = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert names == {"model.safetensors", "diffusion_pytorch_model.safetensors"}


# --- presets ---


def test_presets_are_consistent() -> None:
    """Ids, files, bases and schedulers fit together; each preset gives a recipe, which flags override."""
    editor = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="epsilon", steps_offset=1)
    for name, preset in PRESETS.items():
        assert preset.family in BASES and preset.kind in ("lora", "distilled"), name
        assert (preset.base is None) == (preset.kind == "lora"), name
        assert preset.weight in (0.5, 1.0) and (preset.kind == "lora" or preset.weight == 0.5 or "sd1.5" in name), name
        assert preset.id.count("/") == 1 and (preset.weight_name or "x.bin").endswith(MODEL_SUFFIXES), name
        assert 1 <= preset.steps <= 16 and preset.guidance_scale >= 1 and preset.image_guidance_scale == 1, name
        scheduler = choose_scheduler(editor, preset.scheduler)
        scheduler = type(scheduler).from_config(dict(scheduler.config), **preset.scheduler_settings)
        scheduler.set_timesteps(preset.steps)
        assert len(scheduler.timesteps) == preset.steps and scheduler.timesteps[0] > 700, name
        recipe = make_recipe(vars(adapt_distill.parse_flags([f"--preset={name}", "--model=a", "--output_dir=b"])))
        assert recipe.merge.weight == preset.weight and recipe.recommended["steps"] == preset.steps, name
        assert set(recipe.sources) == ({"lora"} if preset.kind == "lora" else {"distilled", "base"}), name
        assert recipe.sources[preset.kind].weight_name == preset.weight_name, name
    for width in (90, 100):
        table = describe_presets(width)
        words = " ".join(table.split())
        assert max(map(len, table.splitlines())) <= width
        assert all(preset.id in words and f"{name} " in words for name, preset in PRESETS.items())
        assert words.count("not tried on an editor") == sum(not preset.is_reported for preset in PRESETS.values())
    flags = ["--preset=turbo-sdxl", "--weight=0.3", "--base=my/own", "--steps=2", "--distilled_revision=abc"]
    given = adapt_distill.parse_flags([*flags, "--scheduler=euler", "--model=a", "--output_dir=b"])
    adapt_distill.check_flags(given)
    recipe = make_recipe(vars(given))
    assert (recipe.merge.weight, recipe.recommended["steps"]) == (0.3, 2)
    assert recipe.sources["base"].name == "my/own" and recipe.sources["distilled"].revision == "abc"
    assert recipe.scheduler == ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})


def test_presets_follow_their_notes() -> None:
    """One weight for a distillation, as a UNet or as a LoRA; what is reported only at 768 pixels recommends them."""
    weights: dict[str, set[float]] = {}
    for name, preset in PRESETS.items():
        weights.setdefault(f"{preset.id} {preset.family}", set()).add(preset.weight)
        assert ("768" in preset.note) == (preset.resolution == 768), name
        assert preset.is_reported == ("reported" in preset.note), name
        assert (preset.licence is None) == ("licence" in preset.unverified.split(", ")), name
        recipe = make_recipe(vars(adapt_distill.parse_flags([f"--preset={name}", "--model=a", "--output_dir=b"])))
        assert recipe.recommended.get("resolution") == preset.resolution, name
    assert all(len(found) == 1 for found in weights.values()), weights
    turbo = PRESETS["turbo-sdxl"]
    assert (turbo.scheduler, turbo.steps, turbo.guidance_scale, turbo.weight) == ("LCMScheduler", 5, 2.0, 0.5)


@pytest.mark.parametrize(
    "command",
    [
        ["adapt_distill.py", "--list_presets"],
        ["infer.py", "--help"],
        ["train_instruct_pix2pix.py", "--help"],
        ["data_preparation/check_dataset.py", "--help"],
    ],
    ids=" ".join,
)
def test_a_reader_that_has_seen_enough_is_no_error(command: list[str]) -> None:
    """As `script --help | head -1`."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # before anything is written
    assert process.wait(timeout=600) in (0, 141) and process.stderr.read() == b""
    process.stderr.close()


def test_timesteps_of_presets() -> None:
    """Lightning starts at the last timestep; DMD2 uses the four timesteps of its training."""
    config = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1)
    found = {}
    for name in ("lightning-sdxl-4", "dmd2-sdxl-4"):
        scheduler = choose_scheduler(config, PRESETS[name].scheduler)
        scheduler = type(scheduler).from_config(dict(scheduler.config), **PRESETS[name].scheduler_settings)
        scheduler.set_timesteps(4)
        found[name] = [int(step) for step in scheduler.timesteps]
    assert found == {"lightning-sdxl-4": [999, 749, 499, 249], "dmd2-sdxl-4": [999, 749, 499, 249]}


def test_list_presets_without_heavy_imports() -> None:
    output = succeeds("--list_presets")
    assert "lcm-lora-sd1.5" in output and "not verified" in output and "768 pixels" in output
    code = "import sys, adapt_distill\nadapt_distill.parse_flags(['--list_presets'])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=ENVIRONMENT, check=True)


def test_preset_from_the_hub(tiny_editor: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editor and LoRA are downloaded; commits and licences are recorded; components are not symbolic links."""
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / LORA).write_bytes((lora / LORA).read_bytes())
    (tmp_path / "card" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    out = tmp_path / "out"
    with hub_server(tmp_path / "hub") as hub:
        serve_folder(hub, "latent-consistency/lcm-lora-sdv1-5", tmp_path / "card")
        serve_folder(hub, "user/editor", tiny_editor)
        connect_downloads(monkeypatch, hub.url, tmp_path)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of diffusers' calls of `model_info`
        cache = f"--cache_dir={tmp_path / 'cache'}"
        succeeds("--model=user/editor", "--preset=lcm-lora-sd1.5", f"--output_dir={out}", cache)
    adapted = json.loads((out / "adapted.json").read_text())
    assert [len(source["revision"]) for source in adapted["sources"]] == [40, 40]
    assert adapted["sources"][1]["licence"] == "openrail++"
    assert adapted["preset"] == "lcm-lora-sd1.5" and adapted["recommended"]["scheduler"] == "LCMScheduler"
    expected = merge(tiny_editor, MergeOptions(1.0), lora=lora)
    assert all(torch.equal(value, expected[name]) for name, value in weights_in(out).items())
    assert not (out / "vae" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert np.isfinite(edit(out, num_inference_steps=4)).all()


# --- licences and publishing ---


def test_restrictions() -> None:
    assert restrictions_of("cc-by-nc-4.0") == ("non-commercial",)
    assert restrictions_of("cc-by-nc-nd-4.0") == ("non-commercial", "no derivatives")
    assert restrictions_of("sai-nc-community") == ("non-commercial",)
    assert restrictions_of("stabilityai-ai-community") == restrictions_of("openrail++") == restrictions_of("mit") == ()


def test_restricted_licences_need_accept_license(
    tiny_editor: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restricted = tmp_path / "restricted"
    restricted.mkdir()
    (restricted / LORA).write_bytes((lora / LORA).read_bytes())
    (restricted / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    flags = [
        "--model",
        tiny_editor,
        "--lora",
        restricted,
        "--output_dir",
        tmp_path / "out",
        "--push_to_hub",
        "--hub_model_id=user/fast",
    ]
    assert "needs a login" in fails(*flags)
    with hub_server(tmp_path / "hub") as hub:
        connect_downloads(monkeypatch, hub.url, tmp_path)
        flags.append("--hub_token=write-token")
        message = fails(*flags)
        assert "non-commercial and no derivatives (cc-by-nc-nd-4.0)" in message and "--accept_license" in message
        assert f"the licence of {tiny_editor} is unknown" in message
        assert not (tmp_path / "out" / "model_index.json").exists()
        output = succeeds(*flags, "--accept_license")
        assert "pushed to" in output and "no derivatives" in output
        repo = hub.repos["models/user/fast"]
        assert {"model_index.json", "adapted.json", "README.md", "unet/config.json"} <= set(repo.files)
        card = repo.read("README.md").decode()
    assert (
        "license: other\nlicense_name: see-the-sources" in card
        and "it is **non-commercial and no derivatives**" in card
    )
    sources = json.loads((tmp_path / "out" / "adapted.json").read_text())["sources"]
    assert sources[1]["restrictions"] == ["non-commercial", "no derivatives"]


# --- the output folder ---


def test_other_folders_are_not_replaced(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    flags = ("--model", tiny_editor, "--lora", lora, "--output_dir")
    assert "contains other files (thesis.txt)" in fails(*flags, out)
    assert read_files(out) == {"thesis.txt": b"years of work"}
    assert "is a file" in fails(*flags, out / "thesis.txt")
    assert "contains the input" in fails(*flags, tiny_editor) and "contains the input" in fails(*flags, lora.parent)


def test_earlier_result_is_replaced(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    """Also one that an interruption left incomplete; the input editor does not change."""
    before = read_files(tiny_editor)
    flags = ("--model", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "out")
    succeeds(*flags, "--weight=0.5")
    for name in ("calibration.json", "my notes.txt"):
        (tmp_path / "out" / name).write_text("of the earlier run")
    succeeds(*flags, "--weight=0.75")
    assert {path.name for path in (tmp_path / "out").glob("*.*")} == {
        "README.md",
        "adapted.json",
        "model_index.json",
        "report.json",
        "my notes.txt",
    }
    (tmp_path / "out" / "model_index.json").unlink()
    (tmp_path / "out" / ".unfinished-editor").mkdir()
    assert "will be replaced" in succeeds(*flags, "--weight=0.25")
    assert json.loads((tmp_path / "out" / "adapted.json").read_text())["weight"] == 0.25
    assert not (tmp_path / "out" / ".unfinished-editor").exists()
    assert read_files(tiny_editor) == before


SLOW = """
import sys, time, utils.merging.merge, adapt_distill
merge = utils.merging.merge._merge
def slow_merge(*args):
    time.sleep(0.02)
    return merge(*args)
utils.merging.merge._merge = slow_merge
adapt_distill.main(sys.argv[1:])
"""


def test_kill_leaves_no_incomplete_editor(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    """kill -9 while the weights are written; the same command then succeeds."""
    out = tmp_path / "out"
    flags = ["--model", str(tiny_editor), "--lora", str(lora), "--output_dir", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list(out.glob(".unfinished-editor/unet/.*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]
    succeeds(*flags)
    assert np.isfinite(edit(out, num_inference_steps=2)).all()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_full_disk(tiny_editor: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detected before writing; if the disk fills up later, incomplete files are removed."""
    flags = ("--model", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: os.statvfs_result((0,) * 10) and type("", (), {"free": 5})())
        assert "make room" in fails(*flags)

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.merging.editor_writer.write_safetensors", refuse)
    assert "could not be written (a full disk?)" in fails(*flags)
    assert read_files(tmp_path / "out") == {}


# --- choosing the weight ---


def test_calibrate(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The best weight of the grid is used; scores, plot and contact sheet are saved with the editor."""
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = [{"image": "a.png", "edit": "make it red"}, {"image": "b.png", "edit": "make it blue"}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    distilled, out = make_tiny_sd(tmp_path / "distilled", seed=7), tmp_path / "out"
    flags = ("--model", tiny_editor, "--distilled", distilled, "--base", tiny_base, "--scheduler=lcm", "--device=cpu")
    output = succeeds(*flags, "--output_dir", out, "--calibrate", pairs, "--calibrate_weights", "0.2", "0.6", "1.0")
    content = json.loads((out / "calibration.json").read_text())
    assert [row["weight"] for row in content["scores"]] == [0.2, 0.6, 1.0] and "<- chosen" in output
    weight = json.loads((out / "adapted.json").read_text())["weight"]
    assert weight == content["chosen"] and f"weight {weight:g}" in output
    expected = merge(tiny_editor, MergeOptions(weight), distilled=distilled, base=tiny_base)
    assert all(torch.equal(value, expected[name]) for name, value in weights_in(out).items())
    sheet = Image.open(out / "calibration_sheet.png")
    assert sheet.width > sheet.height  # two rows of five images
    assert Image.open(out / "calibration.png").size[0] > 500
    for text, words in (("", "is empty"), ("{}", "line 1"), ('{"image": "no.png", "edit": "x"}', "does not exist")):
        pairs.write_text(text)
        assert words in fails(*flags, "--output_dir", tmp_path / "other", "--calibrate", pairs)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def overflowing_sdxl(tiny_sdxl_editor: Path, tmp_path: Path) -> Path:
    """An SDXL editor whose VAE overflows in float16, as that of SDXL 1.0 does."""
    pipeline = load_editor(tiny_sdxl_editor)
    for part in (pipeline.vae.encoder, pipeline.vae.decoder):
        weight = part.conv_in.weight.data  # the norm after it makes large values harmless in float32
        weight *= 6e4 / weight.abs().max()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_calibrate_in_half_precision(overflowing_sdxl: Path, tmp_path: Path, monkeypatch) -> None:
    """The VAE of SDXL runs in its own precision, and the pairs in batches of a few images."""
    make_noise((32, 40)).save(tmp_path / "a.png")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"image": "a.png", "edit": f"edit {n}"}) + "\n" for n in range(6)))
    lora = save_adapter(tmp_path / "lora", load_trained(overflowing_sdxl, AdapterOptions(lora_rank=2)).unet)
    flags = ("--model", overflowing_sdxl, "--lora", lora, "--scheduler=lcm", "--output_dir", tmp_path / "out")
    monkeypatch.setattr(calibration, "choose_device", lambda device: ("cpu", torch.float16))  # as on a GPU
    sizes, decode = set(), AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z, **more: sizes.add((len(z), z.dtype)) or decode(self, z, **more)
    )
    succeeds(*flags, "--calibrate", pairs, "--calibrate_weights", "0.5", "1.0")
    content = json.loads((tmp_path / "out/calibration.json").read_text())
    values = [value for row in content["scores"] for value in row.values()]
    assert np.isfinite(values).all() and all(row["latent_distance"] > 0 for row in content["scores"])
    assert sizes == {(4, torch.float32), (2, torch.float32)}


def test_weights_that_overflow_are_not_chosen(tmp_path: Path) -> None:
    """Nor is the first one silently taken, as `min` does with NaN; the teacher's NaN ends the calibration."""
    good, nan = WeightScores(0.5, 1.0, 0.3, 0.9, 0.6), float("nan")
    assert choose_weight([WeightScores(0.3, nan, nan, nan, nan), good, WeightScores(1.0, nan, nan, 0.1, 1.0)]) == 0.5
    files = Calibration([WeightScores(0.3, nan, nan, nan, nan), good], 0.5, Image.new("RGB", (8, 8))).files()
    files["calibration.json"](tmp_path / "calibration.json")
    content = json.loads((tmp_path / "calibration.json").read_text(), parse_constant=pytest.fail)
    assert content["scores"][0]["pixel_distance"] is None and content["scores"][1]["pixel_distance"] == 0.3
    with pytest.raises(InputError, match="NaN values at every weight"):
        choose_weight([WeightScores(0.3, nan, nan, nan, nan)])


def test_an_editor_that_overflows_cannot_be_calibrated(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    broken = load_editor(tiny_editor)
    broken.unet.conv_out.bias.data[0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    make_noise((32, 40)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "edit": "x"}')
    flags = ("--model", tmp_path / "broken", "--lora", lora, "--output_dir", tmp_path / "out", "--device=cpu")
    message = fails(*flags, "--calibrate", tmp_path / "pairs.jsonl")
    assert "edits of the editor itself have NaN values" in message
    assert not (tmp_path / "out/model_index.json").exists()


def test_choose_weight() -> None:
    """The smallest distance from a perfect score; of equal ones the smallest weight."""
    scores = [
        WeightScores(0.3, 1.0, 0.3, 0.9, 0.6),
        WeightScores(0.5, 0.5, 0.2, 0.8, 1.0),
        WeightScores(0.7, 0.45, 0.2, 0.4, 1.1),
        WeightScores(1.0, 0.9, 0.3, 0.1, 1.9),
    ]
    assert choose_weight(scores) == 0.5
    assert choose_weight([WeightScores(weight, 1.0, 1.0, 0.5, 1.0) for weight in (0.6, 0.4, 0.8)]) == 0.4


# --- mistakes ---


def test_mistakes_in_the_flags(tmp_path: Path) -> None:
    """All problems that the flags alone show, in one message, before a library is loaded."""
    cases = [
        ([], ["--model is missing", "--output_dir is missing", "give one of --preset"]),
        (["--preset=nope"], ["--preset nope is unknown"]),
        (["--lora=x", "--delta=y"], ["(given: --lora, --delta)"]),
        (["--distilled=x"], ["--distilled needs --base"]),
        (["--lora=x", "--base=y"], ["--base is used with --distilled or"]),
        (["--lora=x", "--method=ties"], ["--method ties needs --base"]),
        (["--lora=x", "--density=0.5"], ["--density needs"]),
        (["--lora=x", "--method=dare", "--density=0"], ["--density 0.0: must be above 0"]),
        (["--lora=x", "--block_weights", "up=much", "=1"], ["--block_weights up=much", "--block_weights =1"]),
        (["--lora=x", "--weight=nan"], ["--weight nan"]),
        (["--lora=x", "--steps=0", "--eta=2"], ["--steps 0", "--eta 2.0: must be from 0 to 1"]),
        (["--lora=x", "--lcm_guidance=4"], ["--lcm_guidance needs --distilled"]),
        (["--lora=x", "--distilled_variant=fp16"], ["--distilled_variant needs --distilled"]),
        (["--lora=x", "--calibrate=p.jsonl", "--weight=1"], ["--calibrate chooses the weight"]),
        (["--lora=x", "--timestep_spacing=trailing"], ["--timestep_spacing needs --scheduler"]),
        (["--lora=x", "--seed=-1"], ["--seed -1"]),
        (["--lora=x", "--dtype=int8"], ["invalid choice: 'int8'"]),
        (["--no_such_flag"], ["no_such_flag"]),
    ]
    for flags, words in cases:
        message = fails(*flags)
        assert not [word for word in words if word not in message], message
    assert not list(tmp_path.iterdir())


def test_mistakes_in_the_models(
    tiny_editor: Path, tiny_base: Path, tiny_sdxl_editor: Path, lora: Path, tmp_path: Path
) -> None:
    out = ("--output_dir", tmp_path / "out")
    v_editor = make_tiny_sd(tmp_path / "v", in_channels=8, prediction_type="v_prediction")
    cases = [
        (("--model", tmp_path / "none", "--lora", lora), "is not a folder"),
        (("--model", tiny_editor / "vae", "--lora", lora), "is not a complete editor in diffusers' format"),
        (("--model", tiny_base, "--lora", lora), "its UNet has 4 channels"),
        (("--model", "nobody/nothing", "--lora", lora), "cannot be loaded"),
        (("--model", tiny_sdxl_editor, "--lora", lora), "does not match the editor"),
        (("--model", tiny_sdxl_editor, "--preset", "tcd-sd1.5"), "--preset tcd-sd1.5 is for sd1.5"),
        (("--model", tiny_editor, "--preset", "turbo-sdxl"), "--preset turbo-sdxl is for sdxl"),
        (("--model", v_editor, "--preset", "tcd-sd1.5"), "is for epsilon prediction"),
        (("--model", tiny_editor, "--lora", lora, "--block_weights", "x(=1"), "not a regular expression"),
        (("--model", tiny_editor, "--lora", lora, "--dtype=fp16", "--block_weights", "mid=1e9"), "overflow in float16"),
        (("--model", tiny_editor, "--lora", lora, "--scheduler=edm_euler"), "other noise levels"),
        (("--model", tiny_editor, "--lora", lora, "--calibrate", tmp_path / "no.jsonl"), "does not exist"),
    ]
    for flags, words in cases:
        message = fails(*flags, *out)
        assert words in message and message.count("\n") == 1, message
        assert read_files(tmp_path / "out") == {}


def test_editor_in_one_file(tiny_editor: Path, lora: Path, tmp_path: Path) -> None:
    """Equal to the result for the same editor as a folder; the temporary folder is removed."""
    file = write_single_file(load_editor(tiny_editor), tmp_path / "editor.safetensors")
    succeeds("--model", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "from-folder")
    out = tmp_path / "from-file"
    succeeds("--model", file, "--single_file_config", tiny_editor, "--lora", lora, "--output_dir", out)
    merged, expected = weights_in(out), weights_in(tmp_path / "from-folder")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    assert np.array_equal(edit(out, num_inference_steps=2), edit(tmp_path / "from-folder", num_inference_steps=2))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    source = json.loads((out / "adapted.json").read_text())["sources"][0]
    assert (source["role"], source["name"]) == ("editor", "editor.safetensors")
    assert "--single_file_config is for a --model in one file" in fails(
        "--model", tiny_editor, "--single_file_config", tiny_editor, "--lora", lora, "--output_dir", tmp_path / "x"
    )
    assert "contains a UNet without" in fails(
        "--model",
        keep_unet(file, tmp_path),
        "--single_file_config",
        tiny_editor,
        "--lora",
        lora,
        "--output_dir",
        tmp_path / "y",
    )


def keep_unet(file: Path, folder: Path) -> Path:
    """A file with the UNet only."""
    kept = {name: value for name, value in load_file(file).items() if name.startswith("model.diffusion_model.")}
    save_file(kept, folder / "unet-alone.safetensors")
    return folder / "unet-alone.safetensors"
