"""Adapters in the formats and kinds of other tools: applied as float64 arithmetic says, or refused by their kind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_api
from safetensors.torch import save_file

from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.original_names import unet_weights
from utils.editing.flags import find_missing_path
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.hub_names import public_name, split_hub_file

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
RANK, ALPHA = 4, 2.0
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unet(tiny_editor: Path) -> Tensors:
    return load_editor(tiny_editor).unet.state_dict()


def matrices(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down (rank, inputs, ...), up (outputs, rank, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator)
    return down, up


def expected_weight(weight: torch.Tensor, layer: Tensors, strength: float = 1.0, scale: float = ALPHA / RANK):
    """In float64, from the formulas of LoRA and DoRA."""
    down, up = layer["down"].double(), layer["up"].double()
    delta = torch.einsum("or,ri...->oi...", up.flatten(1), down)
    changed = weight.double() + strength * scale * delta.view_as(weight)
    if "norm" not in layer:
        return changed
    axes = [axis for axis in range(weight.ndim) if axis != layer["axis"]]
    norm = changed.pow(2).sum(dim=axes, keepdim=True).sqrt()
    return changed / norm * layer["norm"].double().view(norm.shape)


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def sgm(name: str, unet: Tensors, editor: Path) -> str:
    model = load_editor(editor).unet
    for ours, theirs in zip(model.state_dict(), unet_weights(model), strict=True):
        if ours == f"{name}.weight":
            return kohya(theirs.removeprefix("model.diffusion_model.").removesuffix(".weight"))
    raise AssertionError(name)


# how a file names the layer -> (down, up, alpha, magnitudes)
# Long names, one per line.
NAMINGS: dict[str, Callable[[str], tuple[str, str, str | None, str]]] = {
    "diffusers": lambda n: (
        f"unet.{n}.lora_A.weight",
        f"unet.{n}.lora_B.weight",
        f"unet.{n}.alpha",
        f"unet.{n}.lora_magnitude_vector",
    ),
    "diffusers with weight": lambda n: (
        f"unet.{n}.lora_A.weight",
        f"unet.{n}.lora_B.weight",
        f"unet.{n}.alpha",
        f"unet.{n}.lora_magnitude_vector.weight",
    ),
    "adapter name": lambda n: (
        f"unet.{n}.lora_A.default.weight",
        f"unet.{n}.lora_B.default.weight",
        f"unet.{n}.alpha",
        f"unet.{n}.lora_magnitude_vector.default.weight",
    ),
    "no prefix": lambda n: (
        f"{n}.lora_A.weight",
        f"{n}.lora_B.weight",
        f"{n}.alpha",
        f"{n}.lora_magnitude_vector.weight",
    ),
    "peft": lambda n: (
        f"base_model.model.{n}.lora_A.weight",
        f"base_model.model.{n}.lora_B.weight",
        None,
        f"base_model.model.{n}.lora_magnitude_vector",
    ),
    "old diffusers": lambda n: (
        f"unet.{n}.lora.down.weight",
        f"unet.{n}.lora.up.weight",
        f"unet.{n}.alpha",
        f"unet.{n}.dora_scale",
    ),
    "linear layer": lambda n: (
        f"unet.{n}.lora_linear_layer.down.weight",
        f"unet.{n}.lora_linear_layer.up.weight",
        f"unet.{n}.alpha",
        f"unet.{n}.dora_scale",
    ),
    "kohya": lambda n: (
        f"{kohya(n)}.lora_down.weight",
        f"{kohya(n)}.lora_up.weight",
        f"{kohya(n)}.alpha",
        f"{kohya(n)}.dora_scale",
    ),
}


@pytest.mark.parametrize("norms", [None, "outputs", "inputs"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_applied(
    naming: str, norms: str | None, unet: Tensors, tiny_editor: Path, tmp_path: Path
) -> None:
    """LoRA, and DoRA with norms per output (peft) or per input (older LyCORIS), of a linear and a convolution."""
    if norms == "inputs" and "dora_scale" not in NAMINGS[naming]("x")[3]:
        pytest.skip("only LyCORIS stores norms per input")
    tensors, expected = {}, {}
    for seed, name in enumerate((LINEAR, CONV)):
        weight = unet[f"{name}.weight"]
        down, up = matrices(weight, seed)
        names = NAMINGS[naming](name)
        tensors |= {names[0]: down, names[1]: up}
        if names[2]:
            tensors[names[2]] = torch.tensor(ALPHA)
        layer = {"down": down, "up": up}
        if norms:
            axis = 0 if norms == "outputs" else 1
            norm = torch.rand(weight.shape[axis], generator=torch.Generator().manual_seed(seed)) + 0.5
            shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
            is_peft_conv = weight.ndim == 4 and "magnitude" in names[3]
            tensors[names[3]] = (
                norm.view(1, -1, 1, 1) if is_peft_conv else norm.view(shape) if "dora" in names[3] else norm
            )
            layer |= {"norm": norm, "axis": axis}
        expected[f"{name}.weight"] = expected_weight(weight, layer, 0.7)
    file = tmp_path / ("adapter_model.safetensors" if naming == "peft" else "any_name.safetensors")
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    if naming == "peft":
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": bool(norms)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fused = load_editor(tiny_editor, lora=tmp_path, lora_scale=0.7).unet.state_dict()
    for name, value in fused.items():
        torch.testing.assert_close(value.double(), expected.get(name, unet[name]).double(), rtol=1e-5, atol=1e-5)


def test_original_names_and_tucker_decomposition(unet: Tensors, tiny_editor: Path, tmp_path: Path) -> None:
    weight, generator = unet[f"{CONV}.weight"], torch.Generator().manual_seed(0)
    up, mid, down = (
        torch.randn(shape, generator=generator)
        for shape in ((weight.shape[0], RANK, 1, 1), (RANK, RANK, 3, 3), (RANK, weight.shape[1], 1, 1))
    )
    name = sgm(CONV, unet, tiny_editor)
    tensors = {f"{name}.lora_{part}.weight": value for part, value in (("up", up), ("mid", mid), ("down", down))}
    save_file(tensors | {f"{name}.alpha": torch.tensor(ALPHA)}, tmp_path / "locon.safetensors")
    fused = load_editor(tiny_editor, lora=tmp_path / "locon.safetensors").unet.state_dict()[f"{CONV}.weight"]
    product = torch.einsum("or,rskl,si->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double())
    torch.testing.assert_close(fused.double(), weight.double() + ALPHA / RANK * product, rtol=1e-5, atol=1e-5)


def test_adapters_add_up_each_with_its_scale(unet: Tensors, tiny_editor: Path, tmp_path: Path) -> None:
    """An editor's, and one of a 4-channel model, which changes the channels of the noisy latents alone."""
    deltas = []
    for number, (name, inputs) in enumerate(((LINEAR, None), ("conv_in", 4))):
        weight = unet[f"{name}.weight"] if inputs is None else unet[f"{name}.weight"][:, :inputs]
        down, up = matrices(weight, number)
        save_file(
            {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / f"{number}.safetensors"
        )
        deltas.append(torch.einsum("or,ri...->oi...", up.flatten(1), down))
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    fused = load_editor(tiny_editor, lora=files, lora_scale=[0.5, -2.0]).unet.state_dict()
    torch.testing.assert_close(fused[f"{LINEAR}.weight"], unet[f"{LINEAR}.weight"] + 0.5 * deltas[0])
    torch.testing.assert_close(fused["conv_in.weight"][:, :4], unet["conv_in.weight"][:, :4] - 2.0 * deltas[1])
    assert torch.equal(fused["conv_in.weight"][:, 4:], unet["conv_in.weight"][:, 4:])


def test_whole_weights_of_peft_and_embeddings(
    unet: Tensors, tiny_base: Path, tiny_editor: Path, tmp_path: Path, caplog
) -> None:
    """modules_to_save replaces conv_in, which turns a text-to-image model into an editor; embeddings are reported."""
    whole = torch.randn_like(unet["conv_in.weight"])
    down, up = matrices(unet[f"{LINEAR}.weight"], 0)
    tensors = {f"base_model.model.{LINEAR}.lora_{part}.weight": value for part, value in (("A", down), ("B", up))}
    tensors |= {"base_model.model.conv_in.weight": whole, "bundle_emb.my-style.string_to_param.*": torch.ones(1, 32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    editor = load_editor(tiny_base, lora=tmp_path)
    assert editor.unet.config.in_channels == 8 and torch.equal(editor.unet.conv_in.weight, whole)
    assert "its embeddings are not used: my-style" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{kohya(LINEAR)}.hada_w1_a", "a LoHa"),
        (f"{kohya(LINEAR)}.lokr_w1", "a LoKr"),
        (f"{kohya(LINEAR)}.oft_blocks", "an OFT or BOFT"),
        (f"{kohya(LINEAR)}.diff", "a full difference"),
        (f"{kohya(LINEAR)}.diff_b", "a full difference"),
        (f"{kohya(LINEAR)}.on_input", r"an \(IA\)3"),
        (f"{kohya(LINEAR)}.w_norm", "trained norms"),
    ],
)
def test_other_kinds_are_refused_by_name(name: str, kind: str, tiny_editor: Path, tmp_path: Path) -> None:
    down, up = torch.ones(4, 32), torch.ones(32, 4)
    lora = {f"{kohya(LINEAR)}.lora_down.weight": down, f"{kohya(LINEAR)}.lora_up.weight": up}
    save_file(lora | {name: torch.ones(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=rf"other.safetensors is {kind}.*not supported: merge it"):
        load_editor(tiny_editor, lora=tmp_path / "other.safetensors")


def test_folders_that_are_no_lora(tiny_editor: Path, tmp_path: Path) -> None:
    save_file({"base_model.model.x.vera_lambda_b": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))
    with pytest.raises(InputError, match="a VeRA"):
        load_editor(tiny_editor, lora=tmp_path)
    save_file({"unet.x.lora_A.weight": torch.ones(4, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="describes a VERA adapter"):
        load_editor(tiny_editor, lora=tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"unet.x.lora_A.weight": torch.ones(4, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="it has a.safetensors, b.safetensors: give one"):
        load_editor(tiny_editor, lora=tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_of_tensors_are_read_and_run_no_code(suffix: str, unet: Tensors, tiny_editor: Path, tmp_path) -> None:
    down, up = matrices(unet[f"{LINEAR}.weight"], 0)
    names = NAMINGS["kohya"](LINEAR)
    tensors = {names[0]: down, names[1]: up, names[2]: torch.tensor(ALPHA)}
    torch.save(tensors, tmp_path / f"style{suffix}")
    fused = load_editor(tiny_editor, lora=tmp_path / f"style{suffix}").unet.state_dict()[f"{LINEAR}.weight"]
    expected = expected_weight(unet[f"{LINEAR}.weight"], {"down": down, "up": up})
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)
    torch.save(tensors | {"hook": Touch(tmp_path / "ran")}, tmp_path / f"evil{suffix}")
    with pytest.raises(InputError, match="evil"):
        load_editor(tiny_editor, lora=tmp_path / f"evil{suffix}")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Unpickled by ordinary means, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_shapes_of_whole_weights_and_norms_are_checked(unet: Tensors, tiny_editor: Path, tmp_path: Path) -> None:
    """Before the model is loaded, by name and with both shapes; a bias in modules_to_save is applied."""
    down, up = matrices(unet[f"{LINEAR}.weight"], 0)
    lora = {f"base_model.model.{LINEAR}.lora_{part}.weight": value for part, value in (("A", down), ("B", up))}
    file, name = tmp_path / "adapter_model.safetensors", "base_model.model.conv_in.modules_to_save.default"
    cases = {
        f"{name}.weight": (torch.zeros(16, 9, 3, 3), "a UNet with 9 input channels"),
        f"{name}.bias": (torch.zeros(15), r"conv_in.bias has shape \(16,\), that of the adapter \(15,\)"),
        f"base_model.model.{LINEAR}.lora_magnitude_vector": (torch.zeros(31), r"the norms of DoRA \(31,\)"),
        "base_model.model.no_such.bias": (torch.zeros(16), "has no layers"),
    }
    for key, (value, message) in cases.items():
        save_file(lora | {key: value}, file)
        with pytest.raises(InputError, match=message):
            load_editor(tiny_editor, lora=file)
    bias = torch.arange(16.0)
    save_file(lora | {f"{name}.bias": bias}, file)
    fused = load_editor(tiny_editor, lora=file, lora_scale=0.5).unet.state_dict()["conv_in.bias"]
    torch.testing.assert_close(fused, 0.5 * unet["conv_in.bias"] + 0.5 * bias)


def test_one_of_several_files_of_a_repository(unet: Tensors, tiny_editor: Path, tmp_path: Path, monkeypatch) -> None:
    """OWNER/NAME/FILE; the message for the repository alone says so; peft's configuration is found beside the file."""
    down, up = matrices(unet[f"{LINEAR}.weight"], 0)
    repository = tmp_path / "repository"
    for name in ("a", "b"):
        (repository / name).mkdir(parents=True)
        scaled = {f"base_model.model.{LINEAR}.lora_A.weight": down, f"base_model.model.{LINEAR}.lora_B.weight": up}
        save_file(scaled, repository / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": {"a": 2.0, "b": 8.0}[name]}
        (repository / name / "adapter_config.json").write_text(json.dumps(config))
    with hub_server(tmp_path / "hub") as hub:
        serve_folder(hub, "user/styles", repository)
        connect_downloads(monkeypatch, hub.url, tmp_path)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        with pytest.raises(InputError, match="give one, such as user/styles/a/adapter_model.safetensors"):
            load_editor(tiny_editor, lora="user/styles", cache_dir=tmp_path / "cache")
        for name, scale in (("a", 0.5), ("b", 2.0)):
            file = f"user/styles/{name}/adapter_model.safetensors"
            assert find_missing_path("lora", file) == []
            fused = load_editor(tiny_editor, lora=file, cache_dir=tmp_path / "cache").unet.state_dict()
            expected = expected_weight(unet[f"{LINEAR}.weight"], {"down": down, "up": up}, scale=scale)
            torch.testing.assert_close(fused[f"{LINEAR}.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert public_name("user/styles/a/x.safetensors") == "user/styles/a/x.safetensors"
    assert split_hub_file("a/b.safetensors") is None and split_hub_file("./a/b/c.safetensors") is None
