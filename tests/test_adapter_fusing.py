"""Adapters fused when an editor is loaded: the edit equals that of the model with the adapter in training."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.adapters import DORA, EDITORS, PLAIN, load_trained
from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.original_names import write_single_file
from tests.pairs import make_noise
from utils.editing.edit_images import SamplingSettings, edit_pixels
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.models.adapters import AdapterOptions, save_adapter

FILE = "pytorch_lora_weights.safetensors"


def edit(pipeline: DiffusionPipeline) -> torch.Tensor:
    photo = make_noise()
    return edit_pixels(pipeline, [photo], ["make it red"], [3], SamplingSettings(num_inference_steps=3))[0][0]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tiny_base: Path, tiny_sdxl: Path) -> Path:
    return tiny_base if family == "sd" else tiny_sdxl


@pytest.fixture(scope="module")
def editor(family: str, tiny_editor: Path, tiny_sdxl_editor: Path) -> Path:
    return tiny_editor if family == "sd" else tiny_sdxl_editor


def assert_no_adapter_left(pipeline: DiffusionPipeline) -> None:
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    assert not getattr(pipeline.unet, "peft_config", None)


@pytest.mark.parametrize("options", [PLAIN, DORA, AdapterOptions(lora_rank=2, lora_target="all")], ids=str)
@pytest.mark.parametrize("kind", ["base", "editor"])
def test_edits_as_trained(base: Path, editor: Path, kind: str, options: AdapterOptions, tmp_path: Path) -> None:
    """On a text-to-image model, whose UNet is widened, and on an editor; from a folder and from a file."""
    model = base if kind == "base" else editor
    trained = load_trained(model, options)
    file = save_adapter(tmp_path, trained.unet)
    expected = edit(trained)
    fused = load_editor(model, lora=tmp_path if kind == "base" else file)
    assert type(fused) is type(trained) and fused.unet.config.in_channels == 8
    assert_no_adapter_left(fused)
    torch.testing.assert_close(edit(fused), expected, rtol=0, atol=1e-4)
    if kind == "editor":
        assert (edit(load_editor(model)) - expected).abs().max() > 1e-3


def test_scale(editor: Path, tmp_path: Path) -> None:
    """Each change is multiplied by it; 0 is the editor itself."""
    save_adapter(tmp_path, load_trained(editor, PLAIN).unet)
    weights = [load_editor(editor, lora=tmp_path, lora_scale=scale).unet.state_dict() for scale in (0.0, 0.5, 1.0)]
    plain = load_editor(editor).unet.state_dict()
    assert weights[0].keys() == plain.keys()
    changed = [name for name in plain if not torch.equal(weights[2][name], plain[name])]
    assert changed and all("to_" in name for name in changed)
    for name, value in plain.items():
        assert torch.equal(weights[0][name], value)
        torch.testing.assert_close(weights[1][name] - value, (weights[2][name] - value) / 2)


def test_fused_editor_can_be_saved(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", load_trained(base, PLAIN).unet)
    fused = load_editor(base, lora=tmp_path / "adapter")
    fused.save_pretrained(tmp_path / "editor")
    assert torch.equal(edit(load_editor(tmp_path / "editor")), edit(fused))


def test_half_precision(editor: Path, tmp_path: Path) -> None:
    """In bfloat16 the edit is close to that in float32."""
    save_adapter(tmp_path, load_trained(editor, PLAIN).unet)
    fused = load_editor(editor, lora=tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in fused.unet.parameters()} == {torch.bfloat16}
    assert (edit(fused) - edit(load_editor(editor, lora=tmp_path))).abs().mean() < 0.02


def test_on_a_single_file(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path, load_trained(base, PLAIN).unet)
    file = write_single_file(DiffusionPipeline.from_pretrained(base), tmp_path / "base.safetensors")
    fused = load_editor(file, single_file_config=str(base), lora=tmp_path)
    torch.testing.assert_close(edit(fused), edit(load_editor(base, lora=tmp_path)), rtol=0, atol=1e-5)


def test_text_encoder(editor: Path, tmp_path: Path) -> None:
    """An adapter may change only a text encoder."""
    trained = EDITORS["sdxl" if (editor / "text_encoder_2").exists() else "sd"].from_pretrained(editor)
    trained.text_encoder.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(trained.text_encoder, adapter_name="default")
    trained.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    fused = edit(load_editor(editor, lora=tmp_path))
    torch.testing.assert_close(fused, edit(trained), rtol=0, atol=1e-4)
    assert (fused - edit(load_editor(editor))).abs().max() > 1e-4


def test_from_the_hub(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path / "adapter", load_trained(editor, PLAIN).unet)
    with hub_server(tmp_path / "hub") as hub:
        connect_downloads(monkeypatch, hub.url, tmp_path)
        serve_folder(hub, "user/adapter", tmp_path / "adapter")
        fused = load_editor(editor, lora="user/adapter", cache_dir=tmp_path / "cache")
        with pytest.raises(InputError, match="adapter user/nothing cannot be loaded"):
            load_editor(editor, lora="user/nothing", cache_dir=tmp_path / "cache")
    huggingface_hub.close_session()
    torch.testing.assert_close(edit(fused), edit(load_editor(editor, lora=tmp_path / "adapter")), rtol=0, atol=1e-5)


def test_on_another_base_of_the_family(editor: Path, base: Path, tmp_path: Path) -> None:
    """The adapter of a text-to-image model has conv_in, and works on an editor as well."""
    save_adapter(tmp_path, load_trained(base, PLAIN).unet)
    assert edit(load_editor(editor, lora=tmp_path)).isfinite().all()


def test_refusals(base: Path, editor: Path, family: str, tiny_editor, tiny_sdxl_editor, tmp_path: Path) -> None:
    """One line that names the adapter and the problem."""
    on_editor, on_base = tmp_path / "on-editor", tmp_path / "on-base"
    save_adapter(on_editor, load_trained(editor, PLAIN).unet)
    save_adapter(on_base, load_trained(base, PLAIN).unet)
    stored = load_file(on_base / FILE)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    (tmp_path / "cut.safetensors").write_bytes((on_base / FILE).read_bytes()[:-100])
    (tmp_path / "nothing").mkdir()
    torch.save({}, tmp_path / "weights.bin")
    other = tiny_sdxl_editor if family == "sd" else tiny_editor
    foreign = save("foreign.safetensors", {f"unet.no.such.layer.lora_{part}.weight": torch.ones(4, 4) for part in "AB"})
    narrow = stored | {"unet.conv_in.lora_A.weight": torch.ones(36, 4, 3, 3)}
    broken = {name: value * torch.nan for name, value in load_file(on_editor / FILE).items()}
    text_only = {f"text_encoder_9.x.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    cases = [
        (base, None, "UNet has 4 channels.*train_instruct_pix2pix"),
        (base, on_editor, "on-editor cannot turn the text-to-image model .*no conv_in for 8 channels"),
        (editor, tmp_path / "missing", "adapter .*missing does not exist"),
        (editor, "somebody/some-adapter", "adapter somebody/some-adapter cannot be loaded.*Hub cannot be reached"),
        (editor, tmp_path / "nothing", "nothing is incomplete: missing pytorch_lora_weights"),
        (editor, tmp_path / "weights.bin", "has no LoRA weights"),
        (editor, tmp_path / "cut.safetensors", "cut.safetensors cannot be read"),
        (editor, editor / "unet" / "diffusion_pytorch_model.safetensors", "has no LoRA weights"),
        (other, on_editor, "does not match .*: (its UNet has no layers|.* has shape .*, the matrices)"),
        (other, on_base, "does not match"),
        (editor, foreign, "does not match .*: its UNet has no layers unet.no.such.layer"),
        (base, save("narrow.safetensors", narrow), "no conv_in for 8 channels"),
        (editor, save("broken.safetensors", broken), "adapter .*broken.safetensors cannot be loaded.*NaN"),
        (editor, save("text.safetensors", text_only), "does not match .* text_encoder_9"),
    ]
    for model, adapter, message in cases:
        with pytest.raises(InputError, match=message) as error:
            load_editor(model, lora=adapter)
        assert "\n" not in str(error.value), adapter


def test_refuses_an_inpainting_model(tiny_editor: Path, tmp_path: Path) -> None:
    """An adapter does not turn an inpainting model into an editor."""
    save_adapter(tmp_path / "adapter", load_trained(tiny_editor, PLAIN).unet)
    folder = shutil.copytree(tiny_editor, tmp_path / "inpainting")
    config = (folder / "unet" / "config.json").read_text()
    (folder / "unet" / "config.json").write_text(config.replace('"in_channels": 8', '"in_channels": 9'))
    with pytest.raises(InputError, match="its UNet has 9 channels; give an InstructPix2Pix editor, which has 8"):
        load_editor(folder, lora=tmp_path / "adapter")
