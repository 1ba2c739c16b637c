"""Model folders and files as they are found: variants, incomplete parts, older names, pickles."""

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
from tests.edits import make_safety_checker
from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.original_names import write_single_file
from tests.pairs import make_noise
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.models.model_folders import load_tokenizer
from utils.models.stable_diffusion import ModelOptions, load_stable_diffusion, read_configs

UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
TEXT = "text_encoder/model"


@pytest.fixture
def folder(tiny_editor: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_editor, tmp_path / "editor"))


def rename(folder: Path, before: str, after: str) -> None:
    (folder / before).rename(folder / after)


def same_weights(folder: Path, expected: Path, **options: object) -> None:
    """Editing and training load the same weights as from the whole folder."""
    edited, right = load_editor(folder, **options), load_editor(expected)
    trained = load_stable_diffusion(ModelOptions(str(folder), **options))
    for part in ("unet", "vae", "text_encoder"):
        for name, value in getattr(right, part).state_dict().items():
            for loaded in (edited, trained):
                assert torch.equal(getattr(loaded, part).state_dict()[name].float(), value), (part, name)
    assert edited.tokenizer("make it snow").input_ids == right.tokenizer("make it snow").input_ids


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / f"{TEXT}.safetensors"), folder / "text_encoder/pytorch_model.bin")
    (folder / f"{TEXT}.safetensors").unlink()


def list_absent_checker(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))


FOLDERS: dict[str, Callable[[Path], object]] = {
    "only fp16": lambda d: [rename(d, f"{part}.safetensors", f"{part}.fp16.safetensors") for part in (UNET, VAE, TEXT)],
    "fp16 UNet": lambda d: rename(d, f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"),
    "fp16 text encoder": lambda d: rename(d, f"{TEXT}.safetensors", f"{TEXT}.fp16.safetensors"),
    "text encoder as a pickle": to_bin,
    "tokenizer without settings": lambda d: (d / "tokenizer/tokenizer_config.json").unlink(),
    "absent safety checker": list_absent_checker,
}


@pytest.mark.parametrize("case", FOLDERS)
def test_incomplete_folders_load(case: str, folder: Path, tiny_editor: Path, caplog) -> None:
    FOLDERS[case](folder)
    same_weights(folder, tiny_editor)
    assert ("lists safety_checker, feature_extractor, which it does not have" in caplog.text) == ("checker" in case)


def test_a_tokenizer_without_settings_has_the_length_and_padding_of_its_encoder(folder: Path) -> None:
    (folder / "tokenizer/tokenizer_config.json").unlink()
    for width, pad in ((768, "<|endoftext|>"), (1024, "!"), (1280, "!")):
        tokenizer = load_tokenizer(str(folder), "tokenizer", {}, width)
        assert (tokenizer.model_max_length, tokenizer.pad_token) == (77, pad)


def write(name: str, content: bytes | None) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return change


def cut(folder: Path) -> Path:
    path = folder / f"{UNET}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def as_cache(folder: Path) -> Path:
    place = folder.parent / "models--me--mine/snapshots/abc"
    shutil.copytree(folder, place)
    return place.parents[1]


def as_variants(folder: Path) -> Path:
    shutil.copy(folder / f"{UNET}.safetensors", folder / f"{UNET}.fp16.safetensors")
    rename(folder, f"{UNET}.safetensors", f"{UNET}.non_ema.safetensors")
    return folder


WRONG = {
    "LFS pointer": (
        write(f"{UNET}.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "unet/diffusion.*git lfs pull",
    ),
    "web page": (write(f"{VAE}.safetensors", b"<!DOCTYPE html><html></html>"), "vae/diffusion.* is a web page"),
    "empty": (write(f"{TEXT}.safetensors", b""), r"text_encoder/model.safetensors is empty \(0 bytes\)"),
    "cut": (cut, "unet/diffusion.* is truncated"),
    "no weights": (write(f"{VAE}.safetensors", None), r"its vae has no weights \(it has config.json\)"),
    "no shard": (
        write(
            f"{UNET}.safetensors.index.json",
            b'{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}',
        ),
        "its unet is incomplete: missing diffusion_pytorch_model-00001",
    ),
    "two variants": (as_variants, "only the variants fp16, non_ema: give --variant fp16 or --variant non_ema"),
    "cache": (as_cache, "is a folder of the Hub's cache: give .*snapshots/abc"),
    "parent": (lambda folder: folder.parent, "holds a model in a subfolder: give .*editor"),
    "part": (lambda folder: folder / "unet", "is only the unet of a model: give the folder above it"),
    "file beside": (
        lambda folder: write("x/model.safetensors", b"12345678")(folder) / "x",
        "but a file: give .*model.safetensors",
    ),
    "no merges": (
        lambda folder: write("tokenizer/vocab.json", b"{}")(write("tokenizer/tokenizer.json", None)(folder)),
        "its tokenizer is incomplete: missing merges.txt",
    ),
    "adapter": (
        lambda folder: write("a/adapter_config.json", b"{}")(folder) / "a",
        "is an adapter: give its base model, and the adapter with --lora",
    ),
}  # one line each


@pytest.mark.parametrize("case", WRONG)
def test_the_message_names_the_part_and_the_remedy(case: str, folder: Path) -> None:
    change, message = WRONG[case]
    place = change(folder)
    with pytest.raises(InputError, match=message):
        load_editor(place)

    def train() -> None:
        read_configs(ModelOptions(str(place)))
        load_stable_diffusion(ModelOptions(str(place)))

    with pytest.raises(InputError, match=message):
        train()


# ---- single files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_file(tiny_editor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(load_editor(tiny_editor), tmp_path_factory.mktemp("file") / "editor.safetensors")


def save_lightning_checkpoint(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A checkpoint that holds an object of a class of another library, whose code must not run."""
    module = types.ModuleType("not_installed_here")

    class Callback:
        def __reduce__(self) -> tuple:
            return (module.run, (str(path.with_suffix(".executed")),))

    def run(file: str) -> None:
        Path(file).write_text("code of the pickle ran")

    run.__module__, run.__qualname__, module.run = "not_installed_here", "run", run
    sys.modules["not_installed_here"] = module
    try:
        torch.save({"state_dict": tensors, "callbacks": {"x": Callback()}, "global_step": 3}, path)
    finally:
        del sys.modules["not_installed_here"]


FILES: dict[str, Callable[[dict[str, torch.Tensor], Path], Path]] = {
    "older text encoder": lambda t, d: _save(
        {k.replace(".transformer.text_model.", ".transformer."): v for k, v in t.items()}, d
    ),
    "data parallel": lambda t, d: _save({f"module.{key}": value for key, value in t.items()}, d),
    "ckpt": lambda t, d: torch.save({"state_dict": t}, d / "x.ckpt") or d / "x.ckpt",
    "ckpt of Lightning": lambda t, d: save_lightning_checkpoint(t, d / "x.ckpt") or d / "x.ckpt",
    "old pickle": lambda t, d: torch.save(t, d / "x.pt", _use_new_zipfile_serialization=False) or d / "x.pt",
}


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("case", FILES)
def test_older_names_and_pickles(case: str, single_file: Path, tiny_editor: Path, tmp_path: Path) -> None:
    file = FILES[case](load_file(single_file), tmp_path)
    loaded, right = load_editor(file, single_file_config=str(tiny_editor)), load_editor(tiny_editor)
    for part in ("unet", "vae", "text_encoder"):
        for name, value in getattr(right, part).state_dict().items():
            assert torch.equal(getattr(loaded, part).state_dict()[name], value), (part, name)
    assert not list(tmp_path.glob("*.executed"))


@pytest.mark.parametrize("naming", ["original", "whole model", "diffusers", "old diffusers", "pickle"])
def test_a_vae_in_one_file(naming: str, single_file: Path, tiny_editor: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    editor = load_editor(tiny_editor)
    for value in editor.vae.parameters():
        value.data.normal_()
    expected = editor.vae.state_dict()
    whole = load_file(write_single_file(editor, tmp_path / "whole.safetensors"))
    original = {key.removeprefix("first_stage_model."): v for key, v in whole.items() if key.startswith("first_stage")}
    old = {}
    for key, value in expected.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = value[..., None, None].contiguous() if "attentions" in key and value.ndim == 2 else value
    tensors = {
        "original": original,
        "whole model": whole,
        "diffusers": expected,
        "old diffusers": old,
        "pickle": original,
    }
    file = tmp_path / ("vae.ckpt" if naming == "pickle" else "vae.safetensors")
    if naming == "pickle":
        torch.save({"state_dict": tensors[naming]}, file)
    else:
        save_file(tensors[naming], file)
    options = ModelOptions(str(tiny_editor), pretrained_vae_model_name_or_path=str(file))
    for vae in (load_editor(tiny_editor, vae=file).vae, load_stable_diffusion(options).vae):
        assert isinstance(vae, AutoencoderKL)
        assert all(torch.equal(vae.state_dict()[name], value) for name, value in expected.items())


def test_files_that_are_no_model(tiny_editor: Path, tmp_path: Path) -> None:
    def save(name: str, *keys: str) -> Path:
        save_file({key: torch.ones(4, 4) for key in keys}, tmp_path / name)
        return tmp_path / name

    cases = {
        save("lora.safetensors", "lora_unet_x.lora_down.weight"): "is an adapter, not a model",
        save("control.safetensors", "control_model.x"): "is a ControlNet",
        save("flux.safetensors", "double_blocks.0.img_attn.qkv.weight"): "is a transformer",
        save("unet.safetensors", "down_blocks.0.x", "conv_in.weight"): "contains one part of a diffusers pipeline",
        save(
            "vae.safetensors", "encoder.down.0.block.0.conv1.weight"
        ): r"contains an autoencoder \(VAE\) without a UNet",
    }
    for file, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_editor(file)
    with pytest.raises(InputError, match="the VAE .*flux.safetensors is not an autoencoder"):
        load_editor(tiny_editor, vae=tmp_path / "flux.safetensors")
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match="page.safetensors is a web page"):
        load_editor(tmp_path / "page.safetensors")


def test_no_safety_checker_is_neither_loaded_nor_downloaded(tiny_editor: Path, tmp_path: Path) -> None:
    checker, processor = make_safety_checker()
    checked = dict(safety_checker=checker, feature_extractor=processor, requires_safety_checker=True)
    StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor, **checked).save_pretrained(tmp_path / "checked")
    make_noise((40, 60)).save(tmp_path / "photo.png")
    flags = ["--model", "me/editor", "--input", "photo.png", "--edit", "x", "--steps", "1"]
    with hub_server(tmp_path / "hub") as hub:
        serve_folder(hub, "me/editor", tmp_path / "checked")
        client = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, infer.__file__, *flags, "--no_safety_checker"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | client, check=True)
        assert any("unet" in request.path for request in hub.requests)
        assert not any("safety_checker" in request.path for request in hub.requests)


def test_repository_with_fp16_files_alone(folder: Path, tiny_editor: Path, tmp_path: Path, monkeypatch) -> None:
    """It loads without --variant, for editing and for training, and again from the cache without a connection."""
    FOLDERS["only fp16"](folder)
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    shutil.copy(both / f"{UNET}.fp16.safetensors", both / f"{UNET}.bf16.safetensors")
    make_noise((40, 60)).save(tmp_path / "photo.png")
    flags = ["--input", "photo.png", "--edit", "x", "--steps", "1", "--seed", "1"]

    def edit(model: Path | str, output: str, **client: str) -> subprocess.CompletedProcess:
        command = [sys.executable, infer.__file__, *flags, "--model", str(model), "--output", output]
        environment = os.environ | {"HF_HOME": str(tmp_path / "home")} | client
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    with hub_server(tmp_path / "hub") as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        serve_folder(hub, "user/half", folder)
        serve_folder(hub, "user/both", both)
        assert edit("user/half", "a.png", **client).returncode == 0
        refused = edit("user/both", "no.png", **client)
        assert refused.returncode == 2
        assert "only the variants bf16, fp16: give --variant bf16 or --variant fp16" in refused.stderr
        connect_downloads(monkeypatch, hub.url, tmp_path)
        options = ModelOptions("user/half", cache_dir=str(tmp_path / "cache"))
        trained, expected = load_stable_diffusion(options).unet, load_editor(tiny_editor).unet.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in trained.state_dict().items())
        with pytest.raises(InputError, match="has no variant fp8: give --variant fp16"):
            load_editor("user/half", cache_dir=str(tmp_path / "cache"), variant="fp8")
    assert edit("user/half", "b.png", HF_HUB_OFFLINE="1").returncode == 0
    assert edit(tiny_editor, "c.png").returncode == 0
    images = [Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc"]
    assert images[0] == images[1] == images[2]
