"""Adapters merged into editors at loading: the edit is that of the model they were trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.adapters import DORA, EDITORS, PLAIN, load_trained
from tests.hub_files import serve_folder, turn_downloads
from tests.hub_server import hub_server
from tests.original_names import write_single_file
from tests.pairs import make_noise
from utils.editing.edit_images import edit_pixels
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.models.adapters import AdapterOptions, save_adapter

FILE = "pytorch_lora_weights.safetensors"


def edit(pipeline: DiffusionPipeline) -> torch.Tensor:
    photo = make_noise()
    return edit_pixels(pipeline, [photo], ["make it red"], seeds=[3], num_inference_steps=3)[0][0]


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
    """On a text-to-image model, whose UNet is widened, and on an editor; by folder and by file."""
    model = base if kind == "base" else editor
    trained = load_trained(model, options)
    file = save_adapter(tmp_path, trained.unet)
    expected = edit(trained)
    for adapter in (tmp_path, file):
        merged = load_editor(model, lora=adapter)
        assert type(merged) is type(trained) and merged.unet.config.in_channels == 8
        assert_no_adapter_left(merged)
        torch.testing.assert_close(edit(merged), expected, rtol=0, atol=1e-4)
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


def test_a_merged_editor_is_saved_as_an_ordinary_one(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", load_trained(base, PLAIN).unet)
    merged = load_editor(base, lora=tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "editor")
    assert torch.equal(edit(load_editor(tmp_path / "editor")), edit(merged))


def test_half_precision(editor: Path, tmp_path: Path) -> None:
    """The model in bfloat16: the edit is near that of float32."""
    save_adapter(tmp_path, load_trained(editor, PLAIN).unet)
    merged = load_editor(editor, lora=tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in merged.unet.parameters()} == {torch.bfloat16}
    assert (edit(merged) - edit(load_editor(editor, lora=tmp_path))).abs().mean() < 0.02


def test_on_a_single_file(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path, load_trained(base, PLAIN).unet)
    file = write_single_file(DiffusionPipeline.from_pretrained(base), tmp_path / "base.safetensors")
    merged = load_editor(file, single_file_config=str(base), lora=tmp_path)
    torch.testing.assert_close(edit(merged), edit(load_editor(base, lora=tmp_path)), rtol=0, atol=1e-5)


def test_text_encoder(editor: Path, tmp_path: Path) -> None:
    """An adapter of others may change a text encoder alone."""
    trained = EDITORS["sdxl" if (editor / "text_encoder_2").exists() else "sd"].from_pretrained(editor)
    trained.text_encoder.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(trained.text_encoder, adapter_name="default")
    trained.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    merged = edit(load_editor(editor, lora=tmp_path))
    torch.testing.assert_close(merged, edit(trained), rtol=0, atol=1e-4)
    assert (merged - edit(load_editor(editor))).abs().max() > 1e-4


def test_from_the_hub(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path / "adapter", load_trained(editor, PLAIN).unet)
    with hub_server(tmp_path / "hub") as hub:
        turn_downloads(monkeypatch, hub.url, tmp_path)
        serve_folder(hub, "user/adapter", tmp_path / "adapter")
        merged = load_editor(editor, lora="user/adapter", cache_dir=tmp_path / "cache")
        with pytest.raises(InputError, match="adapter user/nothing cannot be loaded"):
            load_editor(editor, lora="user/nothing", cache_dir=tmp_path / "cache")
    huggingface_hub.close_session()
    torch.testing.assert_close(edit(merged), edit(load_editor(editor, lora=tmp_path / "adapter")), rtol=0, atol=1e-5)


def test_on_another_base_of_the_family(editor: Path, base: Path, tmp_path: Path) -> None:
    """The adapter of a text-to-image model has conv_in, which fits an editor as well."""
    save_adapter(tmp_path, load_trained(base, PLAIN).unet)
    assert edit(load_editor(editor, lora=tmp_path)).isfinite().all()


def test_refusals(base: Path, editor: Path, family: str, tiny_editor, tiny_sdxl_editor, tmp_path: Path) -> None:
    """One line each that names the adapter and what is wrong."""
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
        (base, None, "takes 4 channels.*train_instruct_pix2pix"),
        (base, on_editor, "on-editor makes no editor of the text-to-image model .*no conv_in for 8 channels"),
        (editor, tmp_path / "missing", "adapter .*missing does not exist"),
        (editor, "somebody/some-adapter", "adapter somebody/some-adapter cannot be loaded.*Hub cannot be reached"),
        (editor, tmp_path / "nothing", "nothing is no adapter's: it lacks pytorch_lora_weights"),
        (editor, tmp_path / "weights.bin", "no .safetensors file"),
        (editor, tmp_path / "cut.safetensors", "not a whole safetensors file"),
        (editor, editor / "unet" / "diffusion_pytorch_model.safetensors", "is no adapter"),
        (other, on_editor, "made for another model than .*: its .* has .* inputs, and that one's|layer .* has not"),
        (other, on_base, "made for another model than"),
        (editor, foreign, "it changes the layer no.such.layer, which that one has not"),
        (base, save("narrow.safetensors", narrow), "for a UNet of 4 channels"),
        (editor, save("broken.safetensors", broken), "adapter .*broken.safetensors cannot be loaded.*NaN"),
        (editor, save("text.safetensors", text_only), "changes nothing"),
    ]
    for model, adapter, message in cases:
        with pytest.raises(InputError, match=message) as error:
            load_editor(model, lora=adapter)
        assert "\n" not in str(error.value), adapter


def test_refuses_a_model_that_is_no_editor_even_so(tiny_editor: Path, tmp_path: Path) -> None:
    """An adapter makes an editor of a text-to-image model alone, and not of an inpainting one."""
    save_adapter(tmp_path / "adapter", load_trained(tiny_editor, PLAIN).unet)
    folder = shutil.copytree(tiny_editor, tmp_path / "inpainting")
    config = (folder / "unet" / "config.json").read_text()
    (folder / "unet" / "config.json").write_text(config.replace('"in_channels": 8', '"in_channels": 9'))
    with pytest.raises(InputError, match="takes 9 channels, and an InstructPix2Pix editor takes 8"):
        load_editor(folder, lora=tmp_path / "adapter")
