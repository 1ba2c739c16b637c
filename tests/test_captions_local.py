"""Phase one by a model on this machine: a tiny Llama that learns the lines of prepare_for_finetuning.py by heart."""

from __future__ import annotations

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
from data_preparation.captions.backend import LocalModel
from data_preparation.captions.local import Draw, LoadedModel
from data_preparation.captions.prompts import TASK, Ask, Sampling, read_examples
from tests.runs import ENVIRONMENT, REPOSITORY

TRIPLES = read_examples()[:3]
ROLES = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<pad>")


def learn_by_heart(texts: list[str], tokenizer: PreTrainedTokenizerFast, steps: int = 160) -> LlamaForCausalLM:
    """A Llama of 2 layers that continues each text as it goes on."""
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
    """captions.txt, triples.jsonl, and the folder of a model that knows them in both formats."""
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
    learn_by_heart(texts, tokenizer).save_pretrained(folder / "model")
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
    """What the model was taught in a format comes out of the script in that format."""
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
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "holds 2 triples" in ended.stdout and "Warning" not in ended.stderr


def test_an_answer_depends_on_its_own_seed_alone(folder):
    """Not on the batch around it; and the seed matters."""
    sampling = Sampling(format="legacy", temperature=5.0, max_tokens=24)
    asks = [Ask(triple.caption, seed) for seed, triple in enumerate(TRIPLES)]
    alone, together = (
        LoadedModel(LocalModel(str(folder / "model"), device="cpu", batch_size=size), sampling).answer(asks)
        for size in (1, 5)
    )
    assert alone == together
    backend = LoadedModel(LocalModel(str(folder / "model"), device="cpu"), sampling)
    same = backend.answer([Ask("a boat", seed) for seed in (1, 1, 2)])
    assert same[0] == same[1] != same[2]
    assert backend.usage.take()["tokens_out"] <= 3 * 24
    cold = backend.with_sampling(Sampling(format="legacy", temperature=0, max_tokens=8))
    answers = cold.answer([Ask("a boat", seed) for seed in (1, 2)])
    assert answers[0] == answers[1] and len(answers[0].text) <= 8


def test_draws_follow_softmax():
    """Gumbel noise on logits gives the shares of softmax, also within the nucleus of top_p."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    no_tokens = torch.zeros(4000, 0, dtype=torch.long)
    for sampling in (Sampling(temperature=0.7, frequency_penalty=0), Sampling(top_p=0.8, frequency_penalty=0)):
        draw = Draw(range(4000), 0, sampling)
        drawn = torch.bincount(draw(no_tokens, logits.repeat(4000, 1)).argmax(1), minlength=5) / 4000
        shares = (logits / sampling.temperature).softmax(0)
        kept = shares.cumsum(0) - shares < sampling.top_p
        expected = shares * kept / (shares * kept).sum()
        assert (drawn - expected).abs().max() < 0.03
        assert drawn[~kept].sum() == 0


def test_frequency_penalty_counts_the_answer_alone():
    draw = Draw([0], 2, Sampling(temperature=0, frequency_penalty=0.5))
    scores = draw(torch.tensor([[3, 3, 1, 1, 0]]), torch.zeros(1, 4))
    assert scores.tolist() == [[-0.5, -1.0, 0.0, 0.0]]


def test_without_roles_it_is_asked_by_example(folder, tmp_path):
    """A tokenizer without chat template: a plain prompt, and an answer that ends where the next caption begins."""
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "plain")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    sampling = Sampling(max_tokens=12, num_examples=1)
    backend = LoadedModel(LocalModel(str(tmp_path / "plain"), device="cpu"), sampling)
    assert backend.style == {"prompt": "plain"} and len(backend.answer([Ask("a boat", 1)])) == 1
    answer = backend._read(tokenizer(' {"edit": 1}\n\nCaption: more').input_ids, 3)
    assert answer.text == ' {"edit": 1}\n' and answer.is_finished


def test_a_template_without_a_system_role_gets_the_task_from_the_user(folder, tmp_path):
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "strict")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(tmp_path / "strict")
    backend = LoadedModel(LocalModel(str(tmp_path / "strict"), device="cpu"), Sampling(num_examples=0))
    assert backend._prompt(Ask("a boat", 1)) == f"{TASK}\n\nCaption: a boat"


def test_what_cannot_be_loaded_is_said(folder, tmp_path, capsys):
    for flags, complaint in (
        ([f"--model={folder}/nowhere"], "cannot be loaded as a language model"),
        (["--device=cuda:9"], "--device cuda:9 is not there"),
        (["--concurrency=3"], "--concurrency is for a model behind a server"),
        (["--max_tokens=8192"], "give fewer --num_examples"),
    ):
        template = ["--format=legacy"] if complaint.startswith("cannot") else []
        with pytest.raises(SystemExit):
            generate_captions.main([*flags_of(folder, tmp_path / "out"), *template, *flags])
        assert complaint in capsys.readouterr().err
