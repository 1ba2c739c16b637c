"""Recomputation by blocks changes no bit and keeps less; the ladder's counts equal what real tensors take."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import memory
from benchmarks.memory_count import count_saved
from benchmarks.memory_ladder import CACHED, LADDER, Configuration, Surroundings, count_optimizer, estimate
from benchmarks.memory_measure import measure_peak
from benchmarks.memory_models import KINDS, UNETS, Weights, count_nf4, count_unet, make_step, weigh
from benchmarks.memory_tables import Row, fits_table, largest_fit
from utils.errors import InputError
from utils.training.memory_saving import checkpoint_blocks, find_block_problems, list_blocks
from utils.training.optimizers import OptimizationOptions, count_state_bytes, make_optimizer

TINY = dict(
    in_channels=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_num_groups=8,
    attention_head_dim=(2, 4),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
TINY_XL = TINY | dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
)
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def make_tiny() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY)


# ---- recomputation by blocks ----------------------------------------------------------------------------------------


def test_blocks_are_told_by_the_configuration_alone() -> None:
    for config in (TINY, {}, *UNETS.values(), {"mid_block_type": None}):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        names = {name for name, module in unet.named_modules() if hasattr(module, "gradient_checkpointing")}
        assert list_blocks(config) == list_blocks(unet.config)
        assert set(list_blocks(config)) == {name for name in names if ".attentions" not in name}
    assert list_blocks(TINY) == BLOCKS


def test_a_wrong_block_is_refused_with_those_there_are() -> None:
    assert find_block_problems(["mid_block", "all", *BLOCKS], TINY) == []
    problems = find_block_problems(["down_blocks.2", "middle", "middle"], TINY)
    assert len(problems) == 2 and "'down_blocks.2'" in problems[0] and ", ".join(BLOCKS) in problems[1]
    with pytest.raises(InputError, match="--gradient_checkpointing_blocks names 'middle'"):
        checkpoint_blocks(make_tiny(), ["middle"])


def test_only_the_named_blocks_are_recomputed() -> None:
    for chosen, expected in ((None, BLOCKS), (["all", "mid_block"], BLOCKS), (["mid_block"], ["mid_block"]), ([], [])):
        unet = make_tiny()
        checkpoint_blocks(unet, chosen)
        on = {name for name, m in unet.named_modules() if getattr(m, "gradient_checkpointing", False)}
        assert {name for name in on if ".attentions" not in name} == set(expected)
        assert {".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in on} == set(expected)


def loss_and_gradients(blocks: list[str] | None) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Of a training step in float32 on real numbers, with the bytes that it saved."""
    unet = make_tiny()
    if blocks is not None:
        checkpoint_blocks(unet, blocks)
    numbers = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(2, channels, 16, 16, generator=numbers) for channels in (8, 4))
    prompts = torch.randn(2, 7, 32, generator=numbers)
    losses = []

    def forward() -> torch.Tensor:
        prediction = unet(latents, torch.tensor([3, 700]), prompts, return_dict=False)[0]
        losses.append((prediction - target).square().mean())
        return losses[0]

    saved = count_saved(unet, forward)
    losses[0].backward()
    return losses[0].detach(), [parameter.grad for parameter in unet.parameters()], saved


def test_recomputation_changes_no_bit_and_every_block_keeps_less() -> None:
    loss, gradients, saved = loss_and_gradients(None)
    of_each = {}
    for blocks in ([name] for name in (*BLOCKS, "all")):
        other_loss, other_gradients, of_each[blocks[0]] = loss_and_gradients(blocks)
        assert torch.equal(other_loss, loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))
        assert of_each[blocks[0]] < saved
    assert of_each["all"] < min(of_each[name] for name in BLOCKS)
    freed = sum(saved - of_each[name] for name in BLOCKS)
    assert saved - of_each["all"] == pytest.approx(freed, rel=0.1)  # neighbours share a boundary


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind", "blocks"),
    [
        *((TINY, kind, None) for kind in KINDS),
        *((TINY_XL, kind, ["all"]) for kind in KINDS),
        (TINY, "fp32", ["up_blocks.0"]),
    ],
)
def test_counts_without_data_equal_those_of_real_tensors(config: dict, kind: str, blocks: list[str] | None) -> None:
    """Saved bytes, gradients and peaks, all six. The real ones are stored, used, and freed by autograd as always."""
    fake, real = (count_unet(config, kind, 128, 2, blocks, is_fake=is_fake) for is_fake in (True, False))
    assert fake == real
    assert 0 < fake.saved <= fake.bare_peak <= min(fake.peak, fake.fused_peak)


def test_saved_bytes_equal_the_growth_of_a_graph_that_is_held() -> None:
    """Another way to count: sizes of the tensors that are alive because the graph holds them, found by following it."""
    unet = make_tiny()
    forward = make_step(unet, 128, 1)
    expected = count_saved(unet, forward)
    loss, sizes, todo, seen = forward(), {}, [], set()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    todo.append(loss.grad_fn)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if torch.is_tensor(tensor) and tensor.ndim:  # the others are numbers of Python
                        storage = tensor.untyped_storage()
                        sizes[storage.data_ptr()] = storage.nbytes()
    assert sum(size for place, size in sizes.items() if place not in parameters) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("blocks", [None, ["all"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_what_a_gpu_takes(kind: str, blocks: list[str] | None) -> None:
    """Within the rounding of allocations and cuDNN's workspaces: Stable Diffusion 1.5 at 512, a step without update."""
    from benchmarks.memory_models import make_unet

    count = count_unet(UNETS["sd15"], kind, 512, 1, blocks)
    with torch.device("cuda"):
        unet = make_unet(UNETS["sd15"], kind)
    if blocks:
        checkpoint_blocks(unet, blocks)
    forward = make_step(unet, 512, 1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(count.peak, rel=0.1, abs=200e6)


# ---- the ladder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_optimizer_states_are_as_large_as_counted(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((512, 300), (64, 128, 3, 3), (4095,), (7, 5))]
    weights = Weights(0, 0, 0, trained=tuple((parameter.shape, 4) for parameter in parameters))
    optimizer = make_optimizer(parameters, OptimizationOptions(optimizer=name), samples_per_step=1)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert count_state_bytes(optimizer) == pytest.approx(count_optimizer(name, weights), rel=0.02)


def test_quantised_weights_are_as_large_as_counted() -> None:
    import bitsandbytes

    for shape in ((64, 64), (1280, 320), (7, 100)):
        weight = bitsandbytes.nn.Params4bit(torch.randn(shape), requires_grad=False, quant_type="nf4").to("cpu")
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert sum(part.nbytes for part in parts) == count_nf4(shape[0] * shape[1])


def test_published_sizes() -> None:
    """Parameters of the widened UNets and of their adapters: rank 16 in the attention, and conv_in's change."""
    sizes = {(model, kind): weigh(UNETS[model], kind) for model in UNETS for kind in KINDS}
    assert sizes["sd15", "fp32"].parameters == 859_520_964 + 4 * 320 * 9
    assert sizes["sdxl", "fp32"].parameters == 2_567_463_684 + 4 * 320 * 9
    change_of_conv_in = 320 * 8 * 9
    assert sizes["sd15", "lora"].num_trained == 3_188_736 + change_of_conv_in
    assert sizes["sdxl", "lora"].num_trained == 23_224_320 + change_of_conv_in
    for model in UNETS:
        assert sizes[model, "bf16"].bytes * 2 == sizes[model, "fp32"].bytes
        assert sizes[model, "lora"].nf4_bytes < sizes[model, "lora"].bytes < sizes[model, "fp32"].bytes / 1.9


def test_each_rung_takes_less_than_the_one_that_it_improves() -> None:
    weights = {kind: weigh(TINY, kind) for kind in KINDS}
    counts = {kind: count_unet(TINY, kind, 64, 1, ["all"]) for kind in KINDS}
    around = Surroundings("nothing", 0)
    totals = {c.name: estimate(c, weights[c.kind], counts[c.kind], around).total for c in LADDER}
    example, *ours = [totals[c.name] for c in LADDER]
    assert max(ours) < example
    assert totals["full, bf16, 8-bit Adam"] < totals["full, float32, 8-bit Adam"]
    assert totals["LoRA r16, nf4 base"] < totals["LoRA r16, bf16 base"]


def test_accumulation_keeps_every_gradient_through_the_forward_pass() -> None:
    configuration = Configuration("full", "", "fp32", "adamw")
    weights, count = weigh(TINY, "fp32"), count_unet(TINY, "fp32", 256)
    once, often = (estimate(configuration, weights, count, Surroundings("", 0), flag) for flag in (False, True))
    assert often.gradients == count.gradients == 4 * weights.num_trained
    assert often.activations == count.bare_peak and often.total > once.total
    encoding = estimate(configuration, weights, count, Surroundings("VAE", 0, encoding=10**10))
    assert encoding.moment == "encoding" and encoding.activations == 10**10 and encoding.gradients == 0


def test_a_card_must_hold_the_sum_and_the_margin() -> None:
    configuration = Configuration("full", "", "fp32", "adamw")
    weights, count = weigh(TINY, "fp32"), count_unet(TINY, "fp32", 64)

    def row(gigabytes: float, resolution: int, is_recomputed: bool) -> Row:
        bare = estimate(configuration, weights, count, Surroundings("", 0)).total
        memory_ = estimate(configuration, weights, count, Surroundings("", int(gigabytes * 1e9) - bare))
        return Row("tiny", configuration, is_recomputed, "", resolution, memory_)

    rows = [row(6.9, 256, False), row(6.0, 256, True), row(7.1, 512, True), row(23.5, 1024, True)]
    assert [largest_fit(rows, card) for card in (4, 7, 8, 12, 80)] == ["-", "256 r", "256", "512 r", "1024 r"]
    bare = [Row("tiny", configuration, False, CACHED, 64, estimate(configuration, weights, count, Surroundings("", 0)))]
    assert "tiny" in fits_table(bare, markdown=True)


@pytest.mark.parametrize("place", [0, 2, 5, 6], ids=lambda place: LADDER[place].name)
def test_the_measured_step_is_one_that_runs(place: int) -> None:
    """On the CPU, where PyTorch keeps no account; a GPU's is read after the same steps."""
    frozen = 400_000_000 if LADDER[place].is_peer else 0
    around = Surroundings("", frozen)
    assert measure_peak(TINY, LADDER[place], 64, 1, ["all"], around, torch.bfloat16, device="cpu") is None


@pytest.fixture
def tiny_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.UNETS, "sd15", TINY)
    monkeypatch.setitem(memory.UNETS, "sdxl", TINY_XL)


def test_the_script_prints_the_ladder(tiny_ladder, tmp_path, capsys):
    picture = tmp_path / "pictures/memory.png"
    flags = ["--resolution", "64", "--no-measure"]
    assert memory.main([*flags, "--model", "sd15", "--blocks", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for expected in ("SD 1.5, batch 1", "mid_block", "64 counted", "80 GB", "Assumed, not counted"):
        assert expected in printed
    assert "measured" not in printed and all(configuration.name in printed for configuration in LADDER)
    assert picture.stat().st_size > 10_000
    assert memory.main([*flags, "--model", "sdxl", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 20 and not any("sd15" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "500"], "--resolution is 500, and it must be a multiple of 64"),
        (["--batch_size", "0"], "--batch_size is 0, and the lowest allowed is 1"),
    ],
)
def test_mistakes_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
