"""W* = W + w dW equals plain float32 arithmetic for every source, and for LoRA the result of stock diffusers."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.deltas import (
    TARGETS,
    UNET,
    add_random_lora,
    load_unet,
    lora_delta,
    lora_layers,
    merge,
    save_kohya_lora,
    save_peft_lora,
    weights_in,
)
from tests.original_names import original_weights, unet_weights, write_single_file
from tests.tiny import make_tiny_sd, make_tiny_sdxl
from utils.errors import InputError
from utils.merging.deltas import embed_guidance
from utils.merging.merge import MergeOptions, MergeReport, add_dare, add_ties, make_generator, trim

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def editor(family: str, tiny_editor: Path, tiny_sdxl_editor: Path) -> Path:
    return tiny_editor if family == "sd" else tiny_sdxl_editor


@pytest.fixture(scope="module")
def base(family: str, tiny_base: Path, tiny_sdxl: Path) -> Path:
    return tiny_base if family == "sd" else tiny_sdxl


@pytest.fixture(scope="module")
def distilled(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = make_tiny_sd if family == "sd" else make_tiny_sdxl
    return make(tmp_path_factory.mktemp("models") / "distilled", seed=7)


def plain_sum(editor: Weights, delta: Weights, weight: float) -> Weights:
    """W + w dW; of conv_in only the inputs that the delta has."""
    merged = {name: value.clone() for name, value in editor.items()}
    for name, value in delta.items():
        target = merged[name][:, : value.shape[1]] if name == "conv_in.weight" else merged[name]
        target += weight * value
    return merged


def assert_same(merged: Weights, expected: Weights) -> None:
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            merged[name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def difference(distilled: Path, base: Path) -> Weights:
    other = weights_in(base)
    return {name: value - other[name] for name, value in weights_in(distilled).items()}


def test_full_unets(editor: Path, base: Path, distilled: Path) -> None:
    report = MergeReport()
    merged = merge(editor, MergeOptions(0.5), report, distilled=distilled, base=base)
    assert_same(merged, plain_sum(weights_in(editor), difference(distilled, base), 0.5))
    assert torch.equal(merged["conv_in.weight"][:, 4:], weights_in(editor)["conv_in.weight"][:, 4:])
    assert not report.unchanged and not report.skipped and "4 of its 8 inputs" in report.conv_in


def test_skip_conv_in_equals_the_reference(editor: Path, base: Path, distilled: Path) -> None:
    """instruction-tuned-sd changes every tensor of the UNet except conv_in's weight, whose shape differs."""
    own, fast, slow = weights_in(editor), weights_in(distilled), weights_in(base)
    for name in own:
        if own[name].shape == fast[name].shape:
            own[name] = own[name] + 0.7 * (fast[name] - slow[name])
    report = MergeReport()
    assert_same(merge(editor, MergeOptions(0.7, conv_in="skip"), report, distilled=distilled, base=base), own)
    assert report.unchanged == ["conv_in.weight"] and "skip" in report.conv_in


def test_source_with_eight_channels_changes_all_of_them(editor: Path, family: str, tmp_path: Path) -> None:
    make = make_tiny_sd if family == "sd" else make_tiny_sdxl
    first, second = (make(tmp_path / str(seed), in_channels=8, seed=seed) for seed in (3, 4))
    merged = merge(editor, MergeOptions(1.0), distilled=first, base=second)
    assert_same(merged, plain_sum(weights_in(editor), difference(first, second), 1.0))


def test_stored_difference(editor: Path, base: Path, distilled: Path, tmp_path: Path) -> None:
    save_file(difference(distilled, base), tmp_path / "diffusion_pytorch_model.safetensors")
    merged = merge(editor, MergeOptions(1.0), delta=tmp_path)
    assert_same(merged, plain_sum(weights_in(editor), difference(distilled, base), 1.0))


def test_number_of_rows_does_not_change_the_result(
    tiny_editor: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identical with three rows at a time and files mapped again for each read."""
    editor, base, distilled = tiny_editor, tiny_base, make_tiny_sd(tmp_path / "distilled", seed=7)
    for options in (MergeOptions(0.5), MergeOptions(1.0, method="ties", density=0.3)):
        whole = merge(editor, options, distilled=distilled, base=base)
        with monkeypatch.context() as patch:
            patch.setattr("utils.weight_files.WINDOW", 100)
            patch.setattr(
                "utils.merging.merge.split_rows", lambda shape: (slice(i, i + 3) for i in range(0, shape[0], 3))
            )
            in_parts = merge(editor, options, distilled=distilled, base=base)
        assert all(torch.equal(whole[name], in_parts[name]) for name in whole)


def test_original_names(editor: Path, base: Path, distilled: Path, tmp_path: Path) -> None:
    """Community models in one file: the UNet is used, the other components are skipped."""
    for folder in (base, distilled):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        write_single_file(pipeline, tmp_path / f"{folder.name}.safetensors")
    report = MergeReport()
    files = {
        role: tmp_path / f"{folder.name}.safetensors" for role, folder in (("base", base), ("distilled", distilled))
    }
    merged = merge(editor, MergeOptions(1.0), report, **files)
    assert_same(merged, plain_sum(weights_in(editor), difference(distilled, base), 1.0))
    others = {
        name for name in original_weights(DiffusionPipeline.from_pretrained(distilled)) if "diffusion" not in name
    }
    assert report.skipped.keys() == others


def test_matrices_for_pointwise_convolutions(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    stored = {n: v[..., 0, 0] if "proj_" in n and v.ndim == 4 else v for n, v in weights_in(tiny_base).items()}
    assert any(value.ndim == 2 and "proj_in" in name for name, value in stored.items())
    save_file({name: value.contiguous() * 2 for name, value in stored.items()}, tmp_path / "double.safetensors")
    merged = merge(tiny_editor, MergeOptions(1.0), distilled=tmp_path / "double.safetensors", base=tiny_base)
    assert_same(merged, plain_sum(weights_in(tiny_editor), weights_in(tiny_base), 1.0))


# --- LoRA ---


def stock_fused(editor: Path, file: Path, scale: float) -> Weights:
    """The UNet weights after loading and fusing a LoRA with stock diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(editor)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def lora_deltas(unet: UNet2DConditionModel, alpha: float) -> Weights:
    return {f"{n}.weight": lora_delta(down, up, alpha / len(down)) for n, (down, up) in lora_layers(unet).items()}


@pytest.mark.parametrize("file_format", ["peft", "kohya", "kohya-sgm", "old"])
def test_lora(editor: Path, base: Path, family: str, file_format: str, tmp_path: Path) -> None:
    """Attention and convolutions, alpha 6 with rank 4, in every format: equal to plain arithmetic and to diffusers."""
    unet = load_unet(base)
    add_random_lora(unet)
    layers = lora_layers(unet)
    assert {down.ndim for down, _ in layers.values()} == {2, 4}
    if file_format == "peft":
        file = save_peft_lora(tmp_path, unet)
    elif file_format == "old":
        file = tmp_path / "old.safetensors"
        tensors = {
            f"unet.{n}.lora.{part}.weight": v
            for n, pair in layers.items()
            for part, v in zip(("down", "up"), pair, strict=True)
        }
        save_file(tensors | {f"unet.{n}.alpha": torch.tensor(6.0) for n in layers}, file)
    else:
        names = None
        if file_format == "kohya-sgm":
            kept = load_unet(base)
            pairs = zip(kept.state_dict(), unet_weights(kept), strict=True)
            names = {
                ours.removesuffix(".weight"): theirs.removeprefix("model.diffusion_model.").removesuffix(".weight")
                for ours, theirs in pairs
            }
        file = save_kohya_lora(tmp_path / "kohya.safetensors", layers, 6.0, names)
    report = MergeReport()
    merged = merge(editor, MergeOptions(0.8), report, lora=file)
    assert_same(merged, plain_sum(weights_in(editor), lora_deltas(unet, 6.0), 0.8))
    assert set(report.changed) == {f"{layer}.weight" for layer in layers} and "does not change it" in report.conv_in
    # Stock diffusers loads sgm's names for SDXL only, and ignores alpha in the old format.
    if file_format in ("peft", "kohya"):
        assert_same(merged, stock_fused(editor, file, 0.8))


def test_lora_of_processors(tiny_editor: Path, tmp_path: Path) -> None:
    """The oldest format of diffusers names attention processors; without alpha the scale is 1."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    tensors, expected = {}, {}
    for part in ("to_q", "to_k", "to_v", "to_out"):
        down, up = torch.randn(2, 32), torch.randn(32, 2)
        tensors |= {f"unet.{layer}.processor.{part}_lora.{kind}.weight": v for kind, v in (("down", down), ("up", up))}
        expected[f"{layer}.{part}{'.0' if part == 'to_out' else ''}.weight"] = up @ down
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    merged = merge(tiny_editor, MergeOptions(1.0), lora=tmp_path)
    assert_same(merged, plain_sum(weights_in(tiny_editor), expected, 1.0))


@pytest.mark.parametrize("channels", [4, 8])
def test_lora_with_conv_in(editor: Path, base: Path, channels: int, tmp_path: Path) -> None:
    """The LoRA of a text-to-image model changes the four channels of the noisy latents, an editor's all eight."""
    unet = load_unet(base if channels == 4 else editor)
    add_random_lora(unet, [*TARGETS, "conv_in"])
    file = save_peft_lora(tmp_path, unet)
    report = MergeReport()
    merged = merge(editor, MergeOptions(1.0), report, lora=file)
    assert_same(merged, plain_sum(weights_in(editor), lora_deltas(unet, 6.0), 1.0))
    assert f"{channels} of its 8 inputs" in report.conv_in
    if channels == 4:
        stored = load_file(file)
        stored["unet.conv_in.lora_A.weight"] = torch.nn.functional.pad(
            stored["unet.conv_in.lora_A.weight"], (0, 0, 0, 0, 0, 4)
        )
        file = tmp_path / "padded.safetensors"
        save_file({name: value * (1.5 if "lora_A" in name else 1) for name, value in stored.items()}, file)
    assert_same(merged, stock_fused(editor, file, 1.0))
    skipped = merge(editor, MergeOptions(1.0, conv_in="skip"), lora=tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(skipped["conv_in.weight"], weights_in(editor)["conv_in.weight"])


def test_peft_configuration_is_used(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Rank and alpha patterns, and rank-stabilised scales."""
    from peft import LoraConfig

    unet = load_unet(tiny_base)
    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=2,
            target_modules=["to_q", "conv1"],
            rank_pattern={"conv1": 2},
            alpha_pattern={"mid_block.*to_q": 7.0},
            use_rslora=True,
        )
    )
    for name, value in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    file = save_peft_lora(tmp_path, unet)
    assert_same(merge(tiny_editor, MergeOptions(1.0), lora=file), stock_fused(tiny_editor, file, 1.0))


def test_lora_in_a_pickle(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    """A .bin file under diffusers' old name, without alpha: the scale is 1."""
    unet = load_unet(tiny_base)
    add_random_lora(unet, alpha=4.0)
    layers = lora_layers(unet)
    stored = {
        f"unet.{n}.lora.{part}.weight": v
        for n, ab in layers.items()
        for part, v in zip(("down", "up"), ab, strict=True)
    }
    torch.save(stored, tmp_path / "pytorch_lora_weights.bin")
    merged = merge(tiny_editor, MergeOptions(1.0), lora=tmp_path)
    assert_same(merged, plain_sum(weights_in(tiny_editor), lora_deltas(unet, 4.0), 1.0))


def test_text_encoders_of_a_lora_are_skipped(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    unet = load_unet(tiny_base)
    add_random_lora(unet)
    stored = load_file(save_peft_lora(tmp_path, unet))
    other = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(stored | {other: torch.ones(2, 32)}, tmp_path / "both.safetensors")
    report = MergeReport()
    merge(tiny_editor, MergeOptions(1.0), report, lora=tmp_path / "both.safetensors")
    assert list(report.skipped) == [other] and "text encoder" in report.skipped[other]


# --- the guidance embedding of LCM ---


@pytest.fixture
def lcm(family: str, distilled: Path, tmp_path: Path) -> UNet2DConditionModel:
    """A distilled UNet with a guidance embedding, saved in tmp_path/lcm."""
    plain = load_unet(distilled)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(dict(plain.config), time_cond_proj_dim=256)
    unet.load_state_dict(plain.state_dict(), strict=False)
    unet.save_pretrained(tmp_path / "lcm")
    return unet.eval()


def test_guidance_embedding_equals_the_pipeline() -> None:
    for scale in (0.0, 3.0, 7.5):
        stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale]), 256)[0]
        assert torch.equal(embed_guidance(scale, 256), stock)


def test_folded_guidance(family: str, editor: Path, base: Path, lcm: UNet2DConditionModel, tmp_path: Path) -> None:
    """Merged into its own base, the UNet equals the distilled UNet with `timestep_cond` if the embedding is folded."""
    scale = 8.0
    sample, time = torch.randn(2, 4, 16, 16), torch.tensor([400, 400])
    width = lcm.config.cross_attention_dim
    inputs = dict(encoder_hidden_states=torch.randn(2, 5, width))
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 48), "time_ids": torch.ones(2, 6)}
    condition = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1] * 2), 256)
    with torch.no_grad():
        expected = lcm(sample, time, timestep_cond=condition, **inputs).sample
    make = make_tiny_sd if family == "sd" else make_tiny_sdxl
    same = make(tmp_path / "same", in_channels=8, seed=0)
    own = weights_in(base)
    own["conv_in.weight"] = torch.nn.functional.pad(own["conv_in.weight"], (0, 0, 0, 0, 0, 4))
    save_file(own, same / UNET)

    def run(scale: float | None) -> torch.Tensor:
        report = MergeReport()
        unet = load_unet(same).eval()
        unet.load_state_dict(merge(same, MergeOptions(1.0), report, scale, distilled=tmp_path / "lcm", base=base))
        assert ("folded into" if scale else "do not use") in report.skipped["time_embedding.cond_proj.weight"]
        with torch.no_grad():
            return unet(torch.cat([sample, torch.zeros_like(sample)], dim=1), time, **inputs).sample

    torch.testing.assert_close(run(scale), expected, rtol=0, atol=1e-5)
    assert (run(None) - expected).abs().max() > 1e-3


# --- weights of blocks, methods ---


def test_block_weights(editor: Path, base: Path, distilled: Path) -> None:
    """A factor multiplies the weight; the last match counts; other parameters keep the weight."""
    options = MergeOptions(0.5, block_weights=(("up_blocks", 0.5), (r"up_blocks\.1.*bias$", 0.0)))
    merged = merge(editor, options, distilled=distilled, base=base)
    own, change = weights_in(editor), difference(distilled, base)
    for name in own:
        factor = (
            0.0 if name.startswith("up_blocks.1") and name.endswith("bias") else 0.5 if "up_blocks" in name else 1.0
        )
        expected = plain_sum({name: own[name]}, {name: change[name]}, 0.5 * factor)[name]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=2e-6)
    for pattern, words in (("no_such_block", "matches no parameter"), ("up_blocks[", "not a regular expression")):
        with pytest.raises(InputError, match=words):
            merge(editor, MergeOptions(1.0, block_weights=((pattern, 1.0),)), distilled=distilled, base=base)


def test_ties_by_hand() -> None:
    """Density 1/2 keeps two of four values; of different signs the larger value wins; equal signs are added."""
    base, weight = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 1.5, 1.1])  # deltas 2, -1, .5, .1
    change = torch.tensor([4.0, 2.0, -0.5, 0.2])  # at 0.5: 2, 1, -.25, .1
    # kept of the editor: 2, -1, 0, 0; kept of the delta: 2, 1, 0, 0; the second values conflict and cancel
    assert add_ties(weight, base, change, 0.5, 0.5).tolist() == [5.0, 1.0, 1.0, 1.0]
    # at weight 1: 4, 2, 0, 0; the delta is now larger in the second value
    assert add_ties(weight, base, change, 1.0, 0.5).tolist() == [7.0, 3.0, 1.0, 1.0]
    assert trim(torch.tensor([-3.0, 1.0, 2.0]), 0.34).tolist() == [-3.0, 0.0, 2.0]


def test_ties(editor: Path, base: Path, distilled: Path) -> None:
    """At density 1 it is the sum, except for conflicts; the image channels of conv_in do not change."""
    options = MergeOptions(0.5, method="ties", density=1.0)
    merged = merge(editor, options, distilled=distilled, base=base)
    own, slow, change = weights_in(editor), weights_in(base), difference(distilled, base)
    for name, value in own.items():
        first = value[:, :4] if name == "conv_in.weight" else value
        edit, fast = first - slow[name], 0.5 * change[name]
        expected = torch.where(edit * fast >= 0, edit + fast, torch.where(edit.abs() > fast.abs(), edit, fast))
        result = merged[name][:, :4] if name == "conv_in.weight" else merged[name]
        torch.testing.assert_close(result, slow[name] + expected, rtol=0, atol=2e-6)
    assert torch.equal(merged["conv_in.weight"][:, 4:], own["conv_in.weight"][:, 4:])


def test_dare(editor: Path, base: Path, distilled: Path) -> None:
    """Values are dropped at random by the seed, and the others scaled up, so that the mean does not change."""
    options = MergeOptions(1.0, method="dare", density=0.25, seed=3)
    merged, again = (merge(editor, options, distilled=distilled, base=base) for _ in range(2))
    other = merge(editor, MergeOptions(1.0, method="dare", density=0.25, seed=4), distilled=distilled, base=base)
    own, change = weights_in(editor), difference(distilled, base)
    name = max(change, key=lambda name: change[name].numel())
    made = merged[name] - own[name]
    is_kept = made != 0
    torch.testing.assert_close(made[is_kept], change[name][is_kept] * 4, rtol=0, atol=1e-5)
    assert is_kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    assert not torch.equal(merged[name], other[name])
    ones = torch.ones(1000, 100)
    assert add_dare(ones, ones, 1.0, 0.1, make_generator(0, "x")).mean().item() == pytest.approx(2.0, abs=0.05)


def test_report_sizes(tiny_editor: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The relative change of a block is that of all its parameters."""
    save_file({name: value * 1.5 for name, value in weights_in(tiny_base).items()}, tmp_path / "fast.safetensors")
    report = MergeReport()
    merge(tiny_editor, MergeOptions(0.5), report, distilled=tmp_path / "fast.safetensors", base=tiny_base)
    own, slow = weights_in(tiny_editor), weights_in(tiny_base)

    def norm(weights: Weights) -> float:
        values = [value.square().sum() for name, value in weights.items() if name.startswith("down_blocks.1")]
        return math.sqrt(sum(values))

    assert report.blocks["down_blocks.1"].relative == pytest.approx(0.25 * norm(slow) / norm(own), rel=1e-4)
    assert list(report.as_json()["blocks"]) == list(report.blocks)
    assert "down_blocks.1" in report.describe()


# --- refusals ---


def test_refusals(tiny_editor: Path, tiny_base: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    own = weights_in(tiny_base)

    def save(name: str, tensors: Weights) -> Path:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"unet.{layer}.lora_A.weight": torch.ones(2, 32), f"unet.{layer}.lora_B.weight": torch.ones(32, 2)}
    narrow = lora | {f"unet.{layer}.lora_B.weight": torch.ones(16, 2)}
    no_up = {key: value for key, value in lora.items() if "lora_A" in key}
    foreign = lora | {f"unet.no.such.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    cond = own | {"time_embedding.cond_proj.weight": torch.ones(16, 256)}
    full = [
        (own | {"extra.weight": torch.ones(3)}, "unknown weights: extra.weight"),
        ({key: value for key, value in own.items() if key != "conv_out.bias"}, "missing weights: conv_out.bias"),
        (own | {"conv_out.bias": torch.ones(5)}, r"conv_out.bias has shape \(5,\), in the editor \(4,\)"),
        (lora, "is not a UNet|missing weights"),
    ]
    cases = [
        ({"distilled": save(f"full{i}", weights), "base": tiny_base}, why) for i, (weights, why) in enumerate(full)
    ]
    cases += [
        ({"distilled": tiny_sdxl, "base": tiny_base}, "the same family"),
        ({"distilled": tiny_editor, "base": tiny_base}, "does not match --base .*: conv_in.weight"),
        ({"distilled": tiny_base, "base": save("cond", cond)}, "is distilled .it has time_embedding"),
        ({"delta": tmp_path / "cond.safetensors"}, "not a difference of weights"),
        ({"lora": save("dora", lora | {f"unet.{layer}.lora_magnitude_vector": torch.ones(32)})}, "is a DoRA"),
        ({"lora": save("kohya-dora", {"lora_unet_x.dora_scale": torch.ones(2)})}, "is a DoRA"),
        ({"lora": save("loha", {"lora_unet_x.hada_w1_a": torch.ones(2)})}, "is a LoHa .*, which is not supported"),
        ({"lora": tiny_base / UNET}, "is not a LoRA"),
        ({"lora": save("narrow", narrow)}, "mid_block.* has shape .*, the matrices"),
        ({"lora": save("half", no_up)}, "missing one of two matrices of mid_block"),
        ({"lora": save("foreign", foreign)}, "its UNet has no layers unet.no.such.lora_A.weight"),
        ({"lora": tmp_path / "missing.safetensors"}, "missing.safetensors does not exist"),
        ({"lora": tiny_base}, "has no pytorch_lora_weights.safetensors.*it has .*unet/.*--lora_weight_name"),
        ({"lora": "nobody/nothing"}, "cannot be loaded.*Hub cannot be reached"),
        ({"distilled": "nobody/nothing", "base": tiny_base}, "cannot be loaded.*Hub cannot be reached"),
    ]
    (tmp_path / "cut.safetensors").write_bytes((tiny_base / UNET).read_bytes()[:-50])
    torch.save({"a": print}, tmp_path / "evil.bin")
    (tmp_path / "notes.txt").write_text("x")
    cases += [
        ({"delta": tmp_path / "cut.safetensors"}, "cannot be read.*copy it again"),
        ({"delta": tmp_path / "evil.bin"}, "only plain tensors"),
        ({"delta": tmp_path / "notes.txt"}, "not a weight file"),
    ]
    for sources, why in cases:
        with pytest.raises(InputError, match=why) as error:
            merge(tiny_editor, MergeOptions(1.0), **sources)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no time_embedding.cond_proj.weight to fold"):
        merge(tiny_editor, MergeOptions(1.0), scale=7.5, distilled=tiny_base, base=tiny_base)
    with pytest.raises(InputError, match="text-to-image model .its UNet has 4 channels"):
        merge(tiny_base, MergeOptions(1.0), distilled=tiny_base, base=tiny_base)
