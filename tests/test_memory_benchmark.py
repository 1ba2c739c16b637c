"""Gradient checkpointing of blocks, and benchmarks/memory.py: its counts equal the memory of real tensors."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import memory, memory_models
from benchmarks.memory_configurations import (
    CACHED,
    CONFIGURATIONS,
    Configuration,
    OtherModels,
    count_optimizer,
    estimate,
)
from benchmarks.memory_count import count_saved
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


# ---- gradient checkpointing of blocks -------------------------------------------------------------------------------


def test_blocks_are_listed_from_the_configuration() -> None:
    for config in (TINY, {}, *UNETS.values(), {"mid_block_type": None}):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        names = {name for name, module in unet.named_modules() if hasattr(module, "gradient_checkpointing")}
        assert list_blocks(config) == list_blocks(unet.config)
        assert set(list_blocks(config)) == {name for name in names if ".attentions" not in name}
    assert list_blocks(TINY) == BLOCKS


def test_an_unknown_block_is_refused() -> None:
    assert find_block_problems(["mid_block", "all", *BLOCKS], TINY) == []
    problems = find_block_problems(["down_blocks.2", "middle", "middle"], TINY)
    assert len(problems) == 2 and "'down_blocks.2'" in problems[0] and ", ".join(BLOCKS) in problems[1]
    with pytest.raises(InputError, match="--gradient_checkpointing_blocks: this UNet has no block 'middle'"):
        checkpoint_blocks(make_tiny(), ["middle"])


def test_only_the_named_blocks_are_checkpointed() -> None:
    for chosen, expected in ((None, BLOCKS), (["all", "mid_block"], BLOCKS), (["mid_block"], ["mid_block"]), ([], [])):
        unet = make_tiny()
        checkpoint_blocks(unet, chosen)
        on = {name for name, m in unet.named_modules() if getattr(m, "gradient_checkpointing", False)}
        assert {name for name in on if ".attentions" not in name} == set(expected)
        assert {".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in on} == set(expected)


def loss_and_gradients(blocks: list[str] | None) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """(loss, gradients, saved bytes) of a training step in float32 on real numbers."""
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


def test_checkpointing_is_bit_identical_and_every_block_saves_memory() -> None:
    loss, gradients, saved = loss_and_gradients(None)
    saved_with = {}
    for blocks in ([name] for name in (*BLOCKS, "all")):
        other_loss, other_gradients, saved_with[blocks[0]] = loss_and_gradients(blocks)
        assert torch.equal(other_loss, loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))
        assert saved_with[blocks[0]] < saved
    assert saved_with["all"] < min(saved_with[name] for name in BLOCKS)
    freed = sum(saved - saved_with[name] for name in BLOCKS)
    assert saved - saved_with["all"] == pytest.approx(freed, rel=0.1)  # adjacent blocks share a boundary


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind", "blocks"),
    [
        *((TINY, kind, None) for kind in KINDS),
        *((TINY_XL, kind, ["all"]) for kind in KINDS),
        (TINY, "fp32", ["up_blocks.0"]),
    ],
)
def test_counts_with_fake_tensors_equal_those_with_real_tensors(
    config: dict, kind: str, blocks: list[str] | None
) -> None:
    """All six counts."""
    fake, real = (count_unet(config, kind, 128, 2, blocks, is_fake=is_fake) for is_fake in (True, False))
    assert fake == real
    assert 0 < fake.saved <= fake.bare_peak <= min(fake.peak, fake.fused_peak)


def test_saved_bytes_equal_the_tensors_in_the_graph() -> None:
    """Counted in another way: by following the autograd graph to its saved tensors."""
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
                    if torch.is_tensor(tensor) and tensor.ndim:  # the others are Python numbers
                        storage = tensor.untyped_storage()
                        sizes[storage.data_ptr()] = storage.nbytes()
    assert sum(size for place, size in sizes.items() if place not in parameters) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("blocks", [None, ["all"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_the_memory_of_a_gpu(kind: str, blocks: list[str] | None) -> None:
    """A step of Stable Diffusion 1.5 at 512 pixels without update, up to rounding of allocations and workspaces."""
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
def test_counted_optimizer_states(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((512, 300), (64, 128, 3, 3), (4095,), (7, 5))]
    weights = Weights(0, 0, 0, trained=tuple((parameter.shape, 4) for parameter in parameters))
    optimizer = make_optimizer(parameters, OptimizationOptions(optimizer=name), samples_per_step=1)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert count_state_bytes(optimizer) == pytest.approx(count_optimizer(name, weights), rel=0.02)


def test_counted_nf4_weights() -> None:
    import bitsandbytes

    for shape in ((64, 64), (1280, 320), (7, 100)):
        weight = bitsandbytes.nn.Params4bit(torch.randn(shape), requires_grad=False, quant_type="nf4").to("cpu")
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert sum(part.nbytes for part in parts) == count_nf4(shape[0] * shape[1])


def test_published_sizes() -> None:
    """Parameters of the widened UNets and their adapters: rank 16 in the attention, and conv_in."""
    sizes = {(model, kind): weigh(UNETS[model], kind) for model in UNETS for kind in KINDS}
    assert sizes["sd15", "fp32"].parameters == 859_520_964 + 4 * 320 * 9
    assert sizes["sdxl", "fp32"].parameters == 2_567_463_684 + 4 * 320 * 9
    conv_in_update = 320 * 8 * 9
    assert sizes["sd15", "lora"].num_trained == 3_188_736 + conv_in_update
    assert sizes["sdxl", "lora"].num_trained == 23_224_320 + conv_in_update
    for model in UNETS:
        assert sizes[model, "bf16"].bytes * 2 == sizes[model, "fp32"].bytes
        assert sizes[model, "lora"].nf4_bytes < sizes[model, "lora"].bytes < sizes[model, "fp32"].bytes / 1.9


def test_each_configuration_needs_less_memory_than_the_one_it_improves() -> None:
    weights = {kind: weigh(TINY, kind) for kind in KINDS}
    counts = {kind: count_unet(TINY, kind, 64, 1, ["all"]) for kind in KINDS}
    others = OtherModels("nothing", 0)
    totals = {c.name: estimate(c, weights[c.kind], counts[c.kind], others).total for c in CONFIGURATIONS}
    example, *ours = [totals[c.name] for c in CONFIGURATIONS]
    assert max(ours) < example
    assert totals["full, bf16, 8-bit Adam"] < totals["full, float32, 8-bit Adam"]
    assert totals["LoRA r16, nf4 base"] < totals["LoRA r16, bf16 base"]


def test_accumulation_keeps_all_gradients_during_the_forward_pass() -> None:
    configuration = Configuration("full", "", "fp32", "adamw")
    weights, count = weigh(TINY, "fp32"), count_unet(TINY, "fp32", 256)
    once, often = (estimate(configuration, weights, count, OtherModels("", 0), flag) for flag in (False, True))
    assert often.gradients == count.gradients == 4 * weights.num_trained
    assert often.activations == count.bare_peak and often.total > once.total
    encoding = estimate(configuration, weights, count, OtherModels("VAE", 0, encoding=10**10))
    assert encoding.moment == "encoding" and encoding.activations == 10**10 and encoding.gradients == 0


def test_a_card_needs_the_total_and_the_margin() -> None:
    configuration = Configuration("full", "", "fp32", "adamw")
    weights, count = weigh(TINY, "fp32"), count_unet(TINY, "fp32", 64)

    def row(gigabytes: float, resolution: int, is_checkpointed: bool) -> Row:
        bare = estimate(configuration, weights, count, OtherModels("", 0)).total
        memory_ = estimate(configuration, weights, count, OtherModels("", int(gigabytes * 1e9) - bare))
        return Row("tiny", configuration, is_checkpointed, "", resolution, memory_)

    rows = [row(6.9, 256, False), row(6.0, 256, True), row(7.1, 512, True), row(23.5, 1024, True)]
    assert [largest_fit(rows, card) for card in (4, 7, 8, 12, 80)] == ["-", "256 r", "256", "512 r", "1024 r"]
    bare = [Row("tiny", configuration, False, CACHED, 64, estimate(configuration, weights, count, OtherModels("", 0)))]
    assert "tiny" in fits_table(bare, markdown=True)


@pytest.mark.parametrize("place", [0, 2, 5, 6], ids=lambda place: CONFIGURATIONS[place].name)
def test_the_measured_step_runs(place: int) -> None:
    """On the CPU, where PyTorch does not count memory."""
    frozen = 400_000_000 if CONFIGURATIONS[place].is_peer else 0
    others = OtherModels("", frozen)
    assert measure_peak(TINY, CONFIGURATIONS[place], 64, 1, ["all"], others, torch.bfloat16, device="cpu") is None


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The script counts tiny models instead of Stable Diffusion."""
    one_block = dict(block_out_channels=(32,), attention_head_dim=(2,))
    one_block |= dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    monkeypatch.setitem(memory.UNETS, "sd15", TINY | one_block)
    monkeypatch.setitem(memory.UNETS, "sdxl", TINY_XL | one_block | dict(transformer_layers_per_block=(1,)))
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        monkeypatch.setitem(memory_models.VAE, name, memory_models.VAE[name][:1])
    for function in (memory.weigh_vae, memory.count_vae_encoding):
        function.cache_clear()
    yield
    for function in (memory.weigh_vae, memory.count_vae_encoding):
        function.cache_clear()


def test_the_script_prints_its_tables(tiny_models, tmp_path, capsys):
    image = tmp_path / "images/memory.png"
    flags = ["--resolution", "64", "--no-measure"]
    assert memory.main([*flags, "--model", "sd15", "--blocks", "--plot", str(image)]) == 0
    printed = capsys.readouterr().out
    for expected in ("SD 1.5, batch 1", "mid_block", "64 counted", "80 GB", "Assumed, not counted"):
        assert expected in printed
    assert "measured" not in printed and all(configuration.name in printed for configuration in CONFIGURATIONS)
    assert image.stat().st_size > 10_000
    assert memory.main([*flags, "--model", "sdxl", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 20 and not any("sd15" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "500"], "--resolution is 500; it must be a multiple of 64"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
    ],
)
def test_wrong_flags_are_reported(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
