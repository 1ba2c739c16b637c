"""The file of prompt embeddings: the bits of direct encoding, for every process and run, after a kill, at any size."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from tests.pairs import make_rows, save_pairs
from tests.runs import TORCHRUN, losses_of, run, start, training_flags, weights_of
from tests.test_conditioning import are_equal
from tests.test_processes import Rank
from tests.tiny import make_tokenizer, text_config
from train_instruct_pix2pix import main as train
from utils.data import prompt_cache
from utils.data.prompt_cache import store_prompts
from utils.models.conditioning import PromptEmbeds, PromptEncoder, concatenate, make_prompt_encoder

PROMPTS = ["make it red", "", "a word " * 250, "ünïcödé 🙂 <|endoftext|>", "make it red", *map(str, range(9))]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "PROMPTS_PER_SHARD", 4)


def store(folder: Path, encoder: PromptEncoder, prompts: list[str] = PROMPTS) -> list[str]:
    """Store the prompts; returns those that were encoded."""
    encoded, encode = [], encoder.encode
    encoder.encode = lambda prompts: encoded.extend(prompts) or encode(prompts)
    assert store_prompts(Accelerator(cpu=True), folder, lambda: prompts, encoder)
    return encoded


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tiny_editor", "tiny_sdxl_editor"])
def test_stored_embeddings_are_those_of_the_encoder(
    kind, dtype, is_resident, small_shards, tmp_path, monkeypatch, request
):
    """SDXL's pooled embeddings and zero null prompt too; a second run encodes nothing."""
    if not is_resident:
        monkeypatch.setattr(prompt_cache, "RESIDENT_BYTES", 0)
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(kind), torch_dtype=dtype)
    live, first, second = (make_prompt_encoder(pipeline) for _ in range(3))
    assert sorted(store(tmp_path, first)) == sorted(["", *set(PROMPTS)])  # the null prompt has its own file
    assert store(tmp_path, second) == []
    batch = [PROMPTS[place] for place in (7, 0, 2, 2, 11, 1)]
    expected = live(batch)
    assert expected.hidden.dtype == dtype
    for encoder in (first, second):
        assert are_equal(encoder(batch), expected) and are_equal(encoder.null_embeds, live.null_embeds)
        assert encoder.truncated == {PROMPTS[2]} and not encoder._cache
        assert are_equal(encoder(["unknown", PROMPTS[0]]), live(["unknown", PROMPTS[0]]))


def test_batches_of_one_shape_do_not_depend_on_the_run(tiny_editor, small_shards, tmp_path):
    """As on a GPU: a file that one more prompt left as it is, is used; it has the bits that it would have now."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    found = []
    prompts = list(map(str, range(10)))
    for folder, listed in (("a", prompts), ("a", [*prompts, "new"]), ("b", [*prompts, "new"])):
        encoder = make_prompt_encoder(pipeline)
        encoder.batch_size = 2
        encoded = store(tmp_path / folder, encoder, listed)
        found.append((encoder([*prompts]), encoded))
    assert found[1][1] == ["8", "9", "new"]
    assert are_equal(found[0][0], found[1][0]) and are_equal(found[0][0], found[2][0])


def test_another_encoder_has_another_file(tiny_editor, tmp_path):
    """Changed by one weight, a token, the dtype, a setting or the batch size."""
    folders = set()

    def check(change) -> None:
        pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
        changed = make_prompt_encoder(change(pipeline) or pipeline)
        changed.batch_size = 2 if change is two_at_once else 1
        assert store(tmp_path, changed, ["one"]) == ["one", ""]
        assert store(tmp_path, changed, ["one"]) == []
        folders.add(len(list(tmp_path.iterdir())))

    def weight(pipeline) -> None:
        next(pipeline.text_encoder.parameters()).data.flatten()[-1] += 1e-3

    def setting(pipeline) -> None:
        pipeline.text_encoder.config.hidden_act = "gelu"

    def token(pipeline) -> None:
        pipeline.tokenizer.add_tokens(["one"])

    def dtype(pipeline) -> None:
        pipeline.text_encoder.to(torch.bfloat16)

    def two_at_once(pipeline) -> None:
        """Nothing of the models."""

    changes = [lambda pipeline: None, weight, setting, dtype, two_at_once]
    for change in changes:
        check(change)
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    token(pipeline)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    assert store(tmp_path, make_prompt_encoder(pipeline), ["one"]) == ["one", ""]
    assert len(list(tmp_path.iterdir())) == len(changes) + 1


def test_processes_and_runs_share_the_work(tiny_editor, small_shards, tmp_path):
    """Two processes of one run divide it; two runs at once lose nothing."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    prompts, problems, counts = list(map(str, range(42))), [], {}
    expected = make_prompt_encoder(pipeline)(prompts)

    def build(folder: str, rank: int, barrier: threading.Barrier) -> None:
        encoder, encoded = make_prompt_encoder(pipeline), []
        encode = encoder.encode
        encoder.encode = lambda prompts: encoded.extend(prompts) or encode(prompts)
        try:
            assert store_prompts(Rank(rank, barrier), tmp_path / folder, lambda: prompts, encoder)
            counts[folder, rank, barrier] = len(set(encoded) - {""})
            assert are_equal(encoder(prompts), expected)
        except (Exception, threading.BrokenBarrierError) as error:
            problems.append(error)
            barrier.abort()

    together, alone = threading.Barrier(2), [threading.Barrier(1), threading.Barrier(1)]
    jobs = [("one", 0, together), ("one", 1, together), *(("two", 0, barrier) for barrier in alone)]
    threads = [threading.Thread(target=build, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert counts["one", 0, together] + counts["one", 1, together] == 42
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_a_killed_build_goes_on(tiny_editor, small_shards, tmp_path):
    """What was written stays; a half-written file is not taken for a whole one."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    killed, prompts = make_prompt_encoder(pipeline), list(map(str, range(12)))
    encode = killed.encode

    def fail_at_six(batch: list[str]) -> PromptEmbeds:
        if batch == ["6"]:
            raise KeyboardInterrupt
        return encode(batch)

    killed.encode = fail_at_six
    with pytest.raises(KeyboardInterrupt):
        store_prompts(Accelerator(cpu=True), tmp_path, lambda: prompts, killed)
    (folder,) = tmp_path.iterdir()
    (folder / ".unfinished-1-x.safetensors").write_bytes(b"half")
    resumed = make_prompt_encoder(pipeline)
    assert store(tmp_path, resumed, prompts) == [*prompts[4:], ""]
    assert are_equal(resumed(prompts), make_prompt_encoder(pipeline)(prompts))


def test_a_hundred_thousand_prompts(tmp_path, monkeypatch):
    """None is lost, and the embeddings are mapped."""
    monkeypatch.setattr(prompt_cache, "RESIDENT_BYTES", 0)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    tokenizer.model_max_length = 8
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    config = text_config(tokenizer, max_position_embeddings=8, **sizes)
    encoder, live = (PromptEncoder([tokenizer], [CLIPTextModel(config)]) for _ in range(2))
    live.text_encoders = encoder.text_encoders
    encoder.batch_size = live.batch_size = 512
    count = 100_000
    assert store_prompts(Accelerator(cpu=True), tmp_path, lambda: map(str, range(count)), encoder)
    assert len(list(tmp_path.glob("prompts-*/*"))) == -(-count // prompt_cache.PROMPTS_PER_SHARD) + 1
    for start_at in (0, 1024 * 50, 1024 * 97):
        batch = [str(number) for number in range(start_at, min(start_at + 512, count))]
        assert are_equal(encoder(batch), live.encode(batch))
    every = concatenate([encoder([str(n) for n in range(at, at + 1000)]) for at in range(0, count, 1000)])
    assert len(every.hidden) == count and bool((every.hidden[1:] != every.hidden[:-1]).any(dim=(1, 2)).all())
    encoder.encode = None  # the reader needs no encoder
    assert not encoder._cache and len(encoder([str(count - 1)]).hidden) == 1


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_runs_with_and_without_the_file_are_equal(tiny_base, tmp_path, monkeypatch, caplog):
    """Also a run that maps the file, one whose disk has no room, two processes, and one that was killed and resumed."""
    pairs = save_pairs(tmp_path / "pairs", rows=make_rows(7))
    flags = ("--max_train_steps=4", "--checkpointing_steps=2", "--conditioning_dropout_prob=0.2")
    assert train(training_flags(tiny_base, pairs, tmp_path / "stored", *flags)) == 0
    assert len(list((tmp_path / "stored/prompt-cache").glob("prompts-*/*.safetensors"))) == 2
    monkeypatch.setattr(prompt_cache, "RESIDENT_BYTES", 0)
    assert train(training_flags(tiny_base, pairs, tmp_path / "mapped", *flags, "--max_train_steps=2")) == 0
    assert train(training_flags(tiny_base, pairs, tmp_path / "mapped", *flags, "--resume_from_checkpoint=latest")) == 0
    monkeypatch.setattr(prompt_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert train(training_flags(tiny_base, pairs, tmp_path / "live", *flags)) == 0
    assert "--latent_cache_dir on another disk" in caplog.text
    assert not list((tmp_path / "live/prompt-cache").rglob("*.safetensors"))
    for name in ("mapped", "live"):
        assert weights_of(tmp_path / name / "unet") == weights_of(tmp_path / "stored/unet")
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "stored")


def test_two_processes_share_a_file_that_a_killed_run_began(tiny_base, tmp_path):
    """SIGKILL while the prompts are encoded; two processes finish what it began, and train."""
    rows = make_rows(7)
    rows["edit_prompt"] = [[f"{row} and {number}" for number in range(400)] for row in range(7)]
    pairs = save_pairs(tmp_path / "pairs", rows=rows)
    shared = ("--max_train_steps=2", f"--latent_cache_dir={tmp_path / 'cache'}", "--mixed_precision=no")
    flags = training_flags(tiny_base, pairs, tmp_path / "killed", *shared)
    process = start("train_instruct_pix2pix.py", flags)
    complete = "prompts-*/[!.]*.safetensors"  # without the file that is being written, which a kill leaves
    while not (written := list((tmp_path / "cache").glob(complete))) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {path: path.stat().st_mtime_ns for path in written}
    assert written
    run("train_instruct_pix2pix.py", training_flags(tiny_base, pairs, tmp_path / "two", *shared), TORCHRUN)
    assert len(list((tmp_path / "cache").glob(complete))) == 4  # 2800 prompts, and the null prompt
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
