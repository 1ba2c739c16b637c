"""generate_captions.py with a local model: a tiny Llama that memorizes the lines of prepare_for_finetuning.py."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_preparation import generate_captions, prepare_for_finetuning
from data_preparation.captions.backends import LocalModelOptions
from data_preparation.captions.local import LocalBackend, SeededSampler
from data_preparation.captions.prompts import TASK, Question, SamplingOptions, read_examples
from tests.runs import ENVIRONMENT, REPOSITORY

TRIPLES = read_examples()[:3]
ROLES = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<pad>")


def memorize(texts: list[str], tokenizer: PreTrainedTokenizerFast, steps: int = 160) -> LlamaForCausalLM:
    """A Llama with 2 layers, trained until it reproduces each text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captions.txt, triples.jsonl, and a model that has memorized them in both formats."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "captions.txt").write_text("\n".join(triple.caption for triple in TRIPLES))
    rows = [{"input": triple.caption, "edit": triple.edit, "output": triple.output} for triple in TRIPLES]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("legacy", "chat"):
        prepare_for_finetuning.main(
            [f"--input={folder}/triples.jsonl", f"--output={folder}/{kind}.jsonl", f"--format={kind}"]
        )
    legacy, chat = (
        [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("legacy", "chat")
    )
    texts = [row["prompt"] + row["completion"] for row in legacy]
    texts += [f"{row['messages'][1]['content']}\n{row['messages'][2]['content']}" for row in chat]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ROLES
    tokenizer.save_pretrained(folder / "model")
    memorize(texts, tokenizer).save_pretrained(folder / "model")
    return folder


def flags_of(folder: Path, data_root: Path, *flags: str) -> list[str]:
    return [
        f"--captions={folder}/captions.txt",
        f"--data_root={data_root}",
        f"--model={folder}/model",
        "--device=cpu",
        "--num_examples=0",
        "--items_per_shard=2",
        "--max_tokens=160",
        "--temperature=0.2",
        *flags,
    ]


def rows_of(data_root: Path) -> list[dict]:
    return [row for path in sorted(data_root.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("kind", ["legacy", "chat"])
def test_from_finetuning_file_to_triples(folder, tmp_path, kind):
    """The script outputs the triples that the model was trained on."""
    assert generate_captions.main(flags_of(folder, tmp_path / "out", f"--format={kind}", "--frequency_penalty=0")) == 0
    rows = rows_of(tmp_path / "out")
    assert {(row["caption"], row["edit"], row["output"]) for row in rows} == {tuple(triple) for triple in TRIPLES}
    assert json.loads(rows[0]["model"]) == {"id": "model", "revision": None}
    assert json.loads(rows[0]["settings"])["prompt"] == kind


def test_as_a_process(folder, tmp_path):
    command = [sys.executable, "data_preparation/generate_captions.py", *flags_of(folder, tmp_path / "out")]
    ended = subprocess.run(
        [*command, "--format=legacy", "--num_samples=2"],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert "holds 2 triples" in ended.stdout and "Warning" not in ended.stderr


def test_an_answer_depends_only_on_its_own_seed(folder):
    """Not on the rest of its batch."""
    sampling = SamplingOptions(format="legacy", temperature=5.0, max_tokens=24)
    questions = [Question(triple.caption, seed) for seed, triple in enumerate(TRIPLES)]
    alone, together = (
        LocalBackend(LocalModelOptions(str(folder / "model"), device="cpu", batch_size=size), sampling).answer(
            questions, sampling
        )
        for size in (1, 5)
    )
    assert alone == together
    backend = LocalBackend(LocalModelOptions(str(folder / "model"), device="cpu"), sampling)
    same = backend.answer([Question("a boat", seed) for seed in (1, 1, 2)], sampling)
    assert same[0] == same[1] != same[2]
    assert backend.usage.take()["tokens_out"] <= 3 * 24
    greedy = SamplingOptions(format="legacy", temperature=0, max_tokens=8)
    answers = backend.answer([Question("a boat", seed) for seed in (1, 2)], greedy)
    assert answers[0] == answers[1] and len(answers[0].text) <= 8


def test_samples_follow_the_softmax():
    """Also within the nucleus of top_p."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    no_tokens = torch.zeros(4000, 0, dtype=torch.long)
    for sampling in (
        SamplingOptions(temperature=0.7, frequency_penalty=0),
        SamplingOptions(top_p=0.8, frequency_penalty=0),
    ):
        sampler = SeededSampler(range(4000), 0, sampling)
        drawn = torch.bincount(sampler(no_tokens, logits.repeat(4000, 1)).argmax(1), minlength=5) / 4000
        shares = (logits / sampling.temperature).softmax(0)
        kept = shares.cumsum(0) - shares < sampling.top_p
        expected = shares * kept / (shares * kept).sum()
        assert (drawn - expected).abs().max() < 0.03
        assert drawn[~kept].sum() == 0


def test_frequency_penalty_counts_only_the_answer():
    sampler = SeededSampler([0], 2, SamplingOptions(temperature=0, frequency_penalty=0.5))
    scores = sampler(torch.tensor([[3, 3, 1, 1, 0]]), torch.zeros(1, 4))
    assert scores.tolist() == [[-0.5, -1.0, 0.0, 0.0]]


def test_plain_prompt_without_a_chat_template(folder, tmp_path):
    """The answer ends where the next caption begins."""
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "plain")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    sampling = SamplingOptions(max_tokens=12, num_examples=1)
    backend = LocalBackend(LocalModelOptions(str(tmp_path / "plain"), device="cpu"), sampling)
    assert backend.style == {"prompt": "plain"} and len(backend.answer([Question("a boat", 1)], sampling)) == 1
    answer = backend._decode(tokenizer(' {"edit": 1}\n\nCaption: more').input_ids, 3)
    assert answer.text == ' {"edit": 1}\n' and answer.is_finished


def test_chat_template_without_a_system_role(folder, tmp_path):
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "strict")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(tmp_path / "strict")
    backend = LocalBackend(LocalModelOptions(str(tmp_path / "strict"), device="cpu"), SamplingOptions(num_examples=0))
    assert backend._prompt(Question("a boat", 1), 0) == f"{TASK}\n\nCaption: a boat"


def test_invalid_flags_and_models(folder, tmp_path, capsys):
    for flags, message in (
        ([f"--model={folder}/nowhere"], "cannot be loaded"),
        (["--device=cuda:9"], "--device cuda:9 is not available"),
        (["--concurrency=3"], "--concurrency works only with --base_url"),
        (["--max_tokens=8192"], "reduce --num_examples"),
    ):
        template = ["--format=legacy"] if message.startswith("cannot") else []
        with pytest.raises(SystemExit):
            generate_captions.main([*flags_of(folder, tmp_path / "out"), *template, *flags])
        assert message in capsys.readouterr().err
