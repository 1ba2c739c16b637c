"""Training an adapter further on new data: --init_adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune_instruct_pix2pix
import train_instruct_pix2pix
import train_instruct_pix2pix_sdxl
from tests.mistakes import fails_early
from tests.pairs import save_pairs
from tests.runs import ADAPTER, WEIGHTS, training_flags
from tests.test_adapter_formats import CONV, LINEAR, NAMINGS, matrices
from utils.editing.loading import load_editor

TRAIN, FINETUNE = train_instruct_pix2pix.main, finetune_instruct_pix2pix.main
TRAIN_SDXL = train_instruct_pix2pix_sdxl.main
STILL = ("--report_to=none", "--max_train_steps=1", "--learning_rate=0")  # a run that changes nothing
SHORT = ("--report_to=none", "--max_train_steps=2", "--learning_rate=1e-2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs", 6)


def assert_same_unet(folder: Path, base: Path, adapter: Path) -> dict:
    """The published UNet is what `infer.py --model base --lora adapter` edits with."""
    expected, published = load_editor(base, lora=adapter).unet.state_dict(), load_file(folder / "unet" / WEIGHTS)
    assert expected.keys() == published.keys()
    for name, value in published.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    return published


@pytest.mark.parametrize(
    ("script", "model", "flags"),
    [
        (TRAIN, "tiny_base", "--lora_rank=4 --lora_alpha=8"),
        (TRAIN, "tiny_base", "--lora_rank=2 --use_dora --lora_target=all"),
        (FINETUNE, "tiny_editor", "--lora_rank=3"),
        (TRAIN_SDXL, "tiny_sdxl", "--lora_rank=2 --use_dora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_goes_on_from_an_adapter_of_this_suite(request, script, model, flags, pairs, tmp_path):
    """The new run starts as the first one ended, has its rank and layers, trains them, and publishes an adapter."""
    base = request.getfixturevalue(model)
    assert script(training_flags(base, pairs, tmp_path / "first", *SHORT, *flags.split())) == 0
    initial = f"--init_adapter={tmp_path / 'first'}"
    assert script(training_flags(base, pairs, tmp_path / "still", *STILL, initial, "--merge_adapter")) == 0
    assert_same_unet(tmp_path / "still", base, tmp_path / "first")
    assert script(training_flags(base, pairs, tmp_path / "second", *SHORT, initial)) == 0
    first, second = (load_file(tmp_path / name / ADAPTER) for name in ("first", "second"))
    assert {n: v.shape for n, v in first.items()} == {n: v.shape for n, v in second.items()}
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    load_editor(base, lora=tmp_path / "second")
    assert "init_adapter | first" in (tmp_path / "second/README.md").read_text()
    settings = json.loads((tmp_path / "second/args.json").read_text())
    assert settings["init_adapter"] == str(tmp_path / "first") and settings["lora_rank"] is None


@pytest.mark.parametrize("naming", ["kohya", "peft", "old diffusers"])
@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_goes_on_from_an_adapter_of_another_tool(naming, is_dora, pairs, tiny_editor, tmp_path):
    """Layers of different ranks and alphas."""
    weights, tensors = load_editor(tiny_editor).unet.state_dict(), {}
    for rank, name in ((4, LINEAR), (2, CONV), (3, "conv_in")):
        down, up = matrices(weights[f"{name}.weight"], rank)
        names = NAMINGS[naming](name)
        tensors |= {names[0]: down[:rank], names[1]: up[:, :rank] / 10}
        if names[2]:
            tensors[names[2]] = torch.tensor(rank / 2)
        if is_dora:
            norm = weights[f"{name}.weight"].flatten(1).norm(dim=1) * 1.1
            tensors[names[3]] = norm.view(-1, *[1] * (up.ndim - 1)) if "dora_scale" in names[3] else norm
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = folder / ("adapter_model.safetensors" if naming == "peft" else ADAPTER)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    if naming == "peft":
        ranks = {"lora_alpha": 2, "r": 4, "rank_pattern": {CONV: 2, "conv_in": 3}, "alpha_pattern": {CONV: 1}}
        (folder / "adapter_config.json").write_text(json.dumps(ranks | {"peft_type": "LORA", "use_dora": is_dora}))
    flags = training_flags(tiny_editor, pairs, tmp_path / "out", *STILL, f"--init_adapter={folder}", "--merge_adapter")
    assert FINETUNE(flags) == 0
    assert_same_unet(tmp_path / "out", tiny_editor, folder)


def test_a_style_of_a_text_to_image_model_is_a_start(pairs, tiny_base, tmp_path):
    """Its conv_in has 4 channels: those of the image latents start at zero, and conv_in is trained."""
    name, weights = NAMINGS["kohya"], load_file(tiny_base / "unet" / WEIGHTS)
    tensors = {}
    for layer in (LINEAR, "conv_in"):
        down, up = matrices(weights[f"{layer}.weight"], 1)
        tensors |= {name(layer)[0]: down, name(layer)[1]: up / 10, name(layer)[2]: torch.tensor(2.0)}
    save_file(tensors, tmp_path / "style.safetensors")
    initial = f"--init_adapter={tmp_path / 'style.safetensors'}"
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "out", *STILL, initial, "--merge_adapter")) == 0
    published = load_file(tmp_path / "out/unet" / WEIGHTS)
    delta = (tensors[name("conv_in")[1]].flatten(1) @ tensors[name("conv_in")[0]].flatten(1)) * 0.5
    expected = weights["conv_in.weight"] + delta.view_as(weights["conv_in.weight"])
    torch.testing.assert_close(published["conv_in.weight"][:, :4], expected, rtol=1e-5, atol=1e-5)
    assert not published["conv_in.weight"][:, 4:].any()
    assert TRAIN(training_flags(tiny_base, pairs, tmp_path / "more", *SHORT, initial, "--merge_adapter")) == 0
    assert load_file(tmp_path / "more/unet" / WEIGHTS)["conv_in.weight"][:, 4:].any()


def test_resumes_to_the_bit_and_only_with_the_same_adapter(pairs, tiny_editor, tmp_path, capsys):
    assert FINETUNE(training_flags(tiny_editor, pairs, tmp_path / "a", *SHORT, "--lora_rank=2")) == 0
    moved = Path(shutil.copytree(tmp_path / "a", tmp_path / "moved"))
    flags = ("--report_to=none", "--max_train_steps=4", "--checkpointing_steps=2", "--learning_rate=1e-2")
    whole = training_flags(tiny_editor, pairs, tmp_path / "whole", *flags, f"--init_adapter={tmp_path / 'a'}")
    assert FINETUNE(whole) == 0
    parts = training_flags(tiny_editor, pairs, tmp_path / "parts", *flags)
    assert FINETUNE([*parts, f"--init_adapter={tmp_path / 'a'}", "--max_train_steps=2"]) == 0
    resume = [*parts, "--resume_from_checkpoint=latest"]
    capsys.readouterr()
    fails_early([*resume, f"--init_adapter={tmp_path / 'whole'}"], "init_adapter", "other settings", script=FINETUNE)
    assert FINETUNE([*resume, f"--init_adapter={moved}"]) == 0
    parts, whole = (load_file(tmp_path / name / ADAPTER) for name in ("parts", "whole"))
    assert parts.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in parts.items())


def test_adapters_that_cannot_be_trained_further(pairs, tiny_base, tiny_editor, tmp_path):
    """One message with the reason; nothing is trained."""
    weights = load_file(tiny_editor / "unet" / WEIGHTS)
    down, up = matrices(weights[f"{LINEAR}.weight"], 1)
    down_name, up_name, _, norm_name = NAMINGS["kohya"](LINEAR)
    good = {down_name: down, up_name: up}
    cases = {
        "text": (good | {"lora_te_text_model_x.lora_down.weight": down.clone()}, "also changes text encoders"),
        "loha": ({f"lora_unet_{LINEAR.replace('.', '_')}.hada_w1_a": down}, "is a LoHa"),
        "shape": ({down_name: down[:, :3].contiguous(), up_name: up}, "has shape"),
        "inputs": (good | {norm_name: torch.ones(1, down.shape[1])}, "norms of DoRA per input"),
        "other model": ({"lora_unet_no_such_layer.lora_down.weight": down}, "has no layers"),
    }
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        flags = (f"--init_adapter={tmp_path / name}.safetensors", *STILL)
        fails_early(training_flags(tiny_editor, pairs, tmp_path / "out", *flags), message, script=FINETUNE)
    flags = training_flags(tiny_base, pairs, tmp_path / "out", *STILL)
    fails_early([*flags, f"--init_adapter={tmp_path / 'nothing'}"], "nothing", "does not exist")
    fails_early([*flags, "--init_adapter=a/b", "--lora_rank=4", "--use_dora"], "drop --lora_rank, --use_dora")
