"""Models in one file: what the header tells, and that every weight is loaded."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.original_names import open_clip_weights, original_weights, unet_weights, vae_weights, write_single_file
from tests.pairs import make_noise
from tests.tiny import make_tiny_sd, make_tiny_sdxl
from utils.editing.edit_images import SamplingSettings, edit_pixels
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.models.single_file import is_single_file, load_single_file, read_single_file
from utils.models.stable_diffusion import ModelOptions, load_stable_diffusion, make_editor, read_configs, require_editor

SIGMAS = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
MODELS = ("text_encoder", "text_encoder_2", "vae", "unet")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tiny_editor: Path, tiny_sdxl_editor: Path) -> Path:
    return tiny_editor if request.param == "sd" else tiny_sdxl_editor


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def file(pipeline: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(pipeline, tmp_path_factory.mktemp("files") / "editor.safetensors")


@pytest.fixture(scope="module")
def cosxl(tiny_sdxl_editor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)
    return write_single_file(source, tmp_path_factory.mktemp("files") / "cosxl_edit.safetensors", SIGMAS)


def assert_same_weights(components: dict, source: DiffusionPipeline) -> None:
    for name in MODELS:
        model = getattr(source, name, None)
        assert (model is None) == (name not in components)
        if model is None:
            continue
        expected, loaded = model.state_dict(), components[name].state_dict()
        assert expected.keys() == loaded.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, expected[k]) for k, value in loaded.items())
        assert not components[name].training


def test_every_weight_is_loaded(file: Path, folder: Path, pipeline) -> None:
    components = load_single_file(str(file), str(folder), None)
    assert_same_weights(components, pipeline)
    assert components["tokenizer"]("a word").input_ids == pipeline.tokenizer("a word").input_ids
    assert isinstance(components["scheduler"], DDIMScheduler)
    assert dict(components["scheduler"].config) == dict(pipeline.scheduler.config)
    assert not components.get("is_cosxl_edit", False)
    assert components.get("force_zeros_for_empty_prompt", True)


def test_configurations_without_weights(file: Path, folder: Path, pipeline) -> None:
    """The number of channels is that of the file, not of the configuration."""
    unet, vae, scheduler = read_single_file(str(file), str(folder), None)
    assert unet["in_channels"] == 8 and unet["block_out_channels"] == [16, 32]
    assert vae["scaling_factor"] == pipeline.vae.config.scaling_factor
    assert scheduler["_class_name"] == "DDIMScheduler"


def test_configuration_of_a_text_to_image_pipeline(file: Path, folder: Path, pipeline, tmp_path: Path) -> None:
    """It is enough for an editor, and its weights are not necessary."""
    make = make_tiny_sd if hasattr(pipeline, "safety_checker") else make_tiny_sdxl
    base = make(tmp_path / "base", in_channels=4)
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    components = load_single_file(str(file), str(base), None)
    assert components["unet"].config.in_channels == 8
    assert_same_weights(components, pipeline)


def test_edits_equal_those_of_the_folder(file: Path, folder: Path) -> None:
    photo = make_noise()
    settings = SamplingSettings(num_inference_steps=3)
    expected = edit_pixels(load_editor(folder), [photo], ["make it red"], [3], settings)[0][0]
    editor = load_editor(file, single_file_config=str(folder))
    edited = edit_pixels(editor, [photo], ["make it red"], [3], settings)[0][0]
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)


def test_16_bits_become_float32(file: Path, folder: Path, pipeline, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    kept = load_single_file(str(tmp_path / "half.safetensors"), str(folder), None, torch.float16)
    kept_dtypes = {value.dtype for name in ("unet", "vae", "text_encoder") for value in kept[name].parameters()}
    assert kept_dtypes == {torch.float16}
    components = load_single_file(str(tmp_path / "half.safetensors"), str(folder), None)
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, name).state_dict()
        for key, value in components[name].state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, expected[key].half().float())


def test_sd2_text_encoder(tiny_editor: Path, tmp_path: Path) -> None:
    """SD 2.x has that of open_clip, with one unused layer."""
    source = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    weights = original_weights(source)
    prefix = "cond_stage_model."
    weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    weights |= open_clip_weights(source.text_encoder, f"{prefix}model.")
    last = [name for name in weights if "resblocks.1." in name]
    weights |= {name.replace("resblocks.1.", "resblocks.2."): torch.rand_like(weights[name]) for name in last}
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, tmp_path / "sd2.safetensors")
    assert_same_weights(load_single_file(str(tmp_path / "sd2.safetensors"), str(tiny_editor), None), source)


def test_ema_weights_are_preferred(tiny_editor: Path, tmp_path: Path) -> None:
    """The file of the original InstructPix2Pix has both, and its script uses the EMA weights."""
    source = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    averaged = unet_weights(make_other_unet(tmp_path))
    extra = {"model_ema." + name.removeprefix("model.").replace(".", ""): value for name, value in averaged.items()}
    assert len(extra) > 100  # diffusers looks at the number
    path = write_single_file(source, tmp_path / "both.safetensors", extra)
    loaded = load_single_file(str(path), str(tiny_editor), None)["unet"]
    assert all(torch.equal(value, averaged[name]) for name, value in unet_weights(loaded).items())


def make_other_unet(tmp_path: Path) -> torch.nn.Module:
    other = make_tiny_sd(tmp_path / "other", in_channels=8, seed=7)
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(other).unet


# ---- CosXL ----------------------------------------------------------------------------------------------------------


def test_cosxl_editor(cosxl: Path, tiny_sdxl_editor: Path) -> None:
    """As in ComfyUI: the sigmas are in the file, and the model predicts v for continuous noise levels."""
    source = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)
    components = load_single_file(str(cosxl), str(tiny_sdxl_editor), None)
    assert_same_weights(components, source)
    assert components["is_cosxl_edit"]
    scheduler = components["scheduler"]
    assert isinstance(scheduler, EDMEulerScheduler)
    expected = dict(
        sigma_min=pytest.approx(0.002),
        sigma_max=120.0,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )
    assert {name: scheduler.config[name] for name in expected} == expected
    config = read_single_file(str(cosxl), str(tiny_sdxl_editor), None)[2]
    assert config["_class_name"] == "EDMEulerScheduler" and config["sigma_max"] == 120.0


def test_cosxl_edits_equal_stock(cosxl: Path, tiny_sdxl_editor: Path, tmp_path: Path) -> None:
    """From the file and from a saved folder, equal to stock diffusers with `is_cosxl_edit`."""
    stock = StableDiffusionXLInstructPix2PixPipeline.from_single_file(
        str(cosxl), config=str(tiny_sdxl_editor), num_in_channels=8, is_cosxl_edit=True, add_watermarker=False
    )
    stock.scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    )
    photo = make_noise((32, 32))
    settings = dict(num_inference_steps=4, guidance_scale=5.0, image_guidance_scale=1.5)
    expected = stock(
        "make it red",
        image=photo,
        height=32,
        width=32,
        output_type="np",
        generator=torch.Generator().manual_seed(3),
        **settings,
    ).images[0]
    editor = load_editor(cosxl, single_file_config=str(tiny_sdxl_editor))
    editor.save_pretrained(tmp_path / "saved")
    load_editor(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for pipeline in (editor, load_editor(tmp_path / "saved"), load_editor(tmp_path / "again")):
        edited = edit_pixels(pipeline, [photo], ["make it red"], [3], SamplingSettings(**settings))[0][0]
        torch.testing.assert_close(edited, torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-4)


def test_cosxl_base_is_not_an_editor(tmp_path: Path) -> None:
    """Four channels: CosXL's scheduler without `is_cosxl_edit`."""
    base = make_tiny_sdxl(tmp_path / "base", in_channels=4)
    path = write_single_file(DiffusionPipeline.from_pretrained(base), tmp_path / "cosxl.safetensors", SIGMAS)
    components = load_single_file(str(path), str(base), None)
    assert isinstance(components["scheduler"], EDMEulerScheduler) and not components["is_cosxl_edit"]
    with pytest.raises(InputError, match="UNet has 4 channels"):
        load_editor(path, single_file_config=str(base))


def test_v_prediction_is_read_from_the_file(pipeline, folder: Path, tmp_path: Path) -> None:
    """As in ComfyUI: a key v_pred, and ztsnr for zero terminal SNR."""
    path = write_single_file(
        pipeline, tmp_path / "v.safetensors", {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    )
    scheduler = load_single_file(str(path), str(folder), None)["scheduler"]
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"


# ---- the training scripts -------------------------------------------------------------------------------------------


def test_training_scripts_load_it(file: Path, folder: Path, pipeline) -> None:
    options = ModelOptions(str(file), single_file_config=str(folder))
    configs = read_configs(options)
    require_editor(configs, str(file))
    parts = load_stable_diffusion(options)
    assert parts.is_sdxl == configs.is_sdxl == isinstance(pipeline, StableDiffusionXLInstructPix2PixPipeline)
    assert_same_weights({name: model for name in MODELS if (model := getattr(parts, name)) is not None}, pipeline)
    assert type(make_editor(parts, parts.scheduler)) is type(pipeline)


# ---- from the Hub ---------------------------------------------------------------------------------------------------


def test_configuration_from_the_hub(
    cosxl: Path, tiny_editor: Path, tiny_sdxl_editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detected or the given pipeline is downloaded once, without weights."""
    sd = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    sdxl = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)
    mark = {
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.ones(2)
    }  # diffusers recognises SDXL by it
    files = {
        write_single_file(sd, tmp_path / "sd.safetensors"): ("timbrooks/instruct-pix2pix", tiny_editor, sd),
        write_single_file(sdxl, tmp_path / "xl.safetensors", mark): (
            "stabilityai/stable-diffusion-xl-base-1.0",
            tiny_sdxl_editor,
            sdxl,
        ),
    }
    cache = str(tmp_path / "cache")
    with hub_server(tmp_path / "hub") as hub:
        connect_downloads(monkeypatch, hub.url, tmp_path)
        for file, (repo_id, folder, source) in files.items():
            serve_folder(hub, repo_id, folder)
            assert_same_weights(load_single_file(str(file), None, cache), source)
        serve_folder(hub, "user/cosxl", tiny_sdxl_editor)
        assert_same_weights(load_single_file(str(cosxl), "user/cosxl", cache), sdxl)
        with pytest.raises(InputError, match="user/nothing, which was not found"):
            load_single_file(str(cosxl), "user/nothing", cache)
        assert not any(".safetensors" in request.path and "resolve" in request.path for request in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for file, (_, _, source) in files.items():
        assert_same_weights(load_single_file(str(file), None, cache), source)
    huggingface_hub.close_session()


# ---- refusals ------------------------------------------------------------------------------------------


def test_refusals(file: Path, folder: Path, pipeline, tmp_path: Path, tiny_editor, tiny_sdxl_editor) -> None:
    """One line that says what the file contains, or what is wrong with it."""
    weights = load_file(file)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    text = ("cond_stage_model.", "conditioner.")
    first = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    extra = {"model.diffusion_model.input_blocks.99.0.in_layers.0.weight": torch.ones(3)}
    other_family = tiny_editor if folder == tiny_sdxl_editor else tiny_sdxl_editor
    right, unet = str(folder), unet_weights(pipeline.unet)
    cases = [
        (str(tmp_path / "none.safetensors"), right, "does not exist"),
        (str(tmp_path / "model.ckpt"), right, "is a model of another or an unknown family"),
        (str(tmp_path / "cut.safetensors"), right, "cut.safetensors is truncated .*copy it again"),
        (str(tmp_path / "empty.safetensors"), right, "empty.safetensors is empty"),
        (str(tmp_path / "page.safetensors"), right, "page.safetensors is "),
        (save("lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2)}), right, "is an adapter"),
        (save("peft.safetensors", {"unet.x.lora_A.weight": torch.ones(2)}), right, "is an adapter"),
        (save("vae.safetensors", vae_weights(pipeline.vae)), right, "autoencoder .VAE. without a UNet"),
        (save("vae2.safetensors", pipeline.vae.state_dict()), right, "autoencoder .VAE. without a UNet"),
        (save("flux.safetensors", {"double_blocks.0.x": torch.ones(2)}), right, "is a transformer"),
        (save("unet.safetensors", unet), right, "without its text encoder"),
        (
            save("no-vae.safetensors", {k: v for k, v in weights.items() if k.startswith((*text, "model."))}),
            right,
            "contains no autoencoder",
        ),
        (
            save("incomplete.safetensors", {k: v for k, v in weights.items() if k != first}),
            right,
            "cannot be loaded|incomplete",
        ),
        (save("more.safetensors", weights | extra), right, "weights, expected|cannot be loaded"),
        (str(file), str(other_family), "does not match|another family"),
        (str(file), str(tmp_path / "nowhere"), "was not found|not cached"),
        (str(file), None, "--single_file_config FOLDER"),
    ]
    for name, config, message in cases:
        with pytest.raises(InputError, match=message) as error:
            load_single_file(name, config, None)
        assert "\n" not in str(error.value), name


def test_missing_weight_of_the_text_encoder(file: Path, folder: Path, tmp_path: Path) -> None:
    """diffusers would leave it without a value."""
    weights = load_file(file)
    missing = next(key for key in weights if key.endswith("layers.1.mlp.fc1.weight"))
    del weights[missing]
    save_file(weights, tmp_path / "incomplete.safetensors")
    with pytest.raises(InputError, match="text_encoder has no .*layers.1.mlp.fc1.weight"):
        load_single_file(str(tmp_path / "incomplete.safetensors"), str(folder), None)


def test_configuration_of_other_sizes(file: Path, folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((changed / "unet" / "config.json").read_text())
    (changed / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 64]}))
    with pytest.raises(InputError, match="--single_file_config must be a pipeline of the same family"):
        load_single_file(str(file), str(changed), None)


def test_is_single_file(file: Path, folder: Path, tmp_path: Path) -> None:
    assert is_single_file(str(file)) and is_single_file("not/there.safetensors") and is_single_file("old.ckpt")
    assert not is_single_file(str(folder)) and not is_single_file("timbrooks/instruct-pix2pix")
    (tmp_path / "folder.pt").mkdir()
    assert not is_single_file(str(tmp_path / "folder.pt"))


def test_original_names_cover_every_weight(pipeline) -> None:
    """Of tests/original_names.py: each weight is written once."""
    count = sum(value.numel() for value in original_weights(pipeline).values())
    models = [getattr(pipeline, name) for name in MODELS if getattr(pipeline, name, None) is not None]
    scales = 1 if len(models) == 4 else 0  # open_clip's logit_scale
    assert count == sum(value.numel() for model in models for value in model.state_dict().values()) + scales
