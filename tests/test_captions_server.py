"""generate_captions.py with a server that has OpenAI's API, over real connections, with many kinds of failures."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_preparation import generate_captions
from data_preparation.captions.model_flags import find_url_problem
from data_preparation.captions.prompts import PROMPT_END
from data_preparation.captions.server import read_retry_after
from tests.chat_server import Fault, chat_server, default_reply
from tests.killing import kill_and_resume
from tests.killing import rows_of as files_of
from tests.runs import ENVIRONMENT, REPOSITORY

CAPTIONS = [
    f"{thing} {place}"
    for thing in ("a boat", "a cat", "an old man", "two trees")
    for place in ("on a lake", "in a street", "at the harbour", "under a bridge", "in a garden")
]
KEY = "sk-test-0123456789abcdefghij"
SCRIPT = "data_preparation/generate_captions.py"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as served:
        yield served


def flags_of(captions: Path, url: str, data_root: Path, *flags: str) -> list[str]:
    return [
        f"--captions={captions}",
        f"--data_root={data_root}",
        f"--base_url={url}",
        "--model=echo",
        "--items_per_shard=4",
        "--retry_wait=0.01",
        "--timeout=5",
        *flags,
    ]


def generate(captions: Path, server, data_root: Path, *flags: str) -> list[dict]:
    """Run the script in this process; returns its rows."""
    assert generate_captions.main(flags_of(captions, server.url, data_root, *flags)) == 0
    return rows_of(data_root)


def rows_of(data_root: Path) -> list[dict]:
    return [row for path in sorted(data_root.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def error_message(capsys: pytest.CaptureFixture, *flags: str) -> str:
    """Run the script with flags that fail; returns its message."""
    with pytest.raises(SystemExit) as stopped:
        generate_captions.main(list(flags))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_rows_and_prompts(captions, server, tmp_path, capsys):
    rows = generate(captions, server, tmp_path / "out", "--price_in=0.5", "--price_out=2")
    assert sorted(row["caption"] for row in rows) == sorted(CAPTIONS)
    assert [row["caption"] for row in rows] != CAPTIONS  # shuffled by the seed
    for row in rows:
        assert json.loads(default_reply(row["caption"], {"seed": row["seed"]})) == {
            "edit": row["edit"],
            "output": row["output"],
        }
        assert CAPTIONS[int(row["source"])] == row["caption"] and row["source_dataset"] == "captions.txt"
        assert json.loads(row["model"]) == {"id": "echo", "revision": "echo-2026-01"}
        assert json.loads(row["settings"])["structure"] == "json_schema"
    lines = [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == [line["caption"] for line in lines] == [r["caption"] for r in rows]
    assert all(line.keys() == {"caption", "input", "edit", "output", "url"} for line in lines)
    body = server.bodies()[1]
    assert body["response_format"]["json_schema"]["strict"] and 0 <= body["seed"] < 2**31
    output = capsys.readouterr().out
    tokens = [
        sum(json.loads(line)[name] for line in (tmp_path / "out/usage.jsonl").read_text().splitlines())
        for name in ("requests", "tokens_in", "tokens_out")
    ]
    assert tokens[0] == len(server.requests) == 21
    assert (
        f"{tokens[1]:,} tokens in and {tokens[2]:,} out, cost {(tokens[1] * 0.5 + tokens[2] * 2) / 1e6:.4f}" in output
    )
    assert generate(captions, server, tmp_path / "out") == rows and len(server.requests) == 21  # no further request


@pytest.mark.parametrize("limit", [(), ("--num_samples=7",)])
def test_partitions_give_the_rows_of_one_run(limit, captions, server, tmp_path, capsys):
    rows = generate(captions, server, tmp_path / "one", *limit)
    for partition in (1, 0):
        assert not (tmp_path / "two/prompts.jsonl").exists() and not rows_of(tmp_path / "two")
        parts = ("--num-partitions=2", f"--partition={partition}")
        generate(captions, server, tmp_path / "two", *parts, *limit)
        if partition == 1:
            assert "waits for the partitions 0" in capsys.readouterr().out
    assert rows_of(tmp_path / "two") == rows and len(rows) == (7 if limit else len(CAPTIONS))
    assert (tmp_path / "two/prompts.jsonl").read_text() == (tmp_path / "one/prompts.jsonl").read_text()
    assert "must be from 0 to 1" in error_message(
        capsys, *flags_of(captions, server.url, tmp_path / "x", "--num_partitions=2", "--partition=2")
    )


def test_rows_do_not_depend_on_concurrency(captions, server, tmp_path):
    rows = generate(captions, server, tmp_path / "one", "--concurrency=1", "--edits_per_caption=2")
    server.delay = 0.02
    server.max_concurrency = 0
    assert generate(captions, server, tmp_path / "eight", "--concurrency=8", "--edits_per_caption=2") == rows
    assert 1 < server.max_concurrency <= 8
    assert generate(captions, server, tmp_path / "other", "--edits_per_caption=2", "--seed=1") != rows


@pytest.mark.slow
def test_workers_give_the_same_rows(captions, server, tmp_path):
    rows = generate(captions, server, tmp_path / "one")
    assert generate(captions, server, tmp_path / "two", "--num_workers=2") == rows


def test_failures_do_not_change_the_rows(captions, server, tmp_path):
    rows = generate(captions, server, tmp_path / "calm")
    num_requests = len(server.requests)
    faults = [
        Fault("status", 429, {"Retry-After": "0.3"}),
        Fault("status", 500),
        Fault("status", 503),
        Fault("garbage"),
        Fault("garbage", body=b"<html>busy</html>"),
        Fault("garbage", body=b'{"choices": [{}]}'),
        Fault("no choices"),
        Fault("cut"),
        Fault("disconnect"),
        Fault("slow", body=0.8),
        Fault("status", 429),
        Fault("garbage", body=b"[1]"),
    ]

    def reply(caption: str, body: dict) -> str:
        if len(server.requests) == num_requests + 1:  # after the first request, which is sent alone
            server.faults.extend(faults)
        return default_reply(caption, body)

    server.reply = reply
    assert generate(captions, server, tmp_path / "storm", "--timeout=0.5", "--retries=12") == rows
    assert not server.faults and len(server.requests) - num_requests == 21 + len(faults)


def test_retry_after_delays_all_requests(captions, server, tmp_path):
    server.faults.append(Fault("status", 429, {"Retry-After": "1.5"}))
    generate(captions, server, tmp_path / "out", "--num_samples=1")
    assert server.requests[1].time - server.requests[0].time >= 1.5


def test_retry_after_0_does_not_end_a_run(captions, server, tmp_path):
    """It says nothing about the time: the attempts are spread as without it."""
    server.faults.extend([Fault("status", 429, {"Retry-After": "0"})] * 4)
    flags = ("--retries=5", "--retry_wait=0.05", "--concurrency=1")
    assert generate(captions, server, tmp_path / "out", "--num_samples=1", *flags)
    times = [request.time for request in server.requests][:5]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert all(gap >= 0.5 * wait for gap, wait in zip(gaps, (0.05, 0.1, 0.2, 0.4), strict=True)), gaps


def test_a_model_whose_answers_are_all_useless_is_given_up(server, tmp_path, capsys):
    """With an answer to look at, long before all captions are paid for."""
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"a boat number {index}\n" for index in range(900)))
    server.reply = lambda caption, body: "As a language model, I would rather not."
    try:
        with pytest.raises(SystemExit):
            generate(captions, server, tmp_path / "out", "--num_samples=3000", "--tries=1")
    finally:
        server.reply = None
    message = capsys.readouterr().err
    assert "answers of the model is usable, mostly because: no JSON" in message
    assert "One answer: 'As a language model, I would rather not." in message
    assert len(server.requests) < 600


def test_retry_after_as_number_or_date():
    assert read_retry_after("2") == 2 and read_retry_after("-1") == 0 and read_retry_after("1e9") == 600
    assert 0 < read_retry_after("Fri, 31 Dec 2100 23:59:59 GMT") <= 600
    assert all(read_retry_after(text) is None for text in (None, "", "soon", "nan", "Fri, 99 Foo 2100"))


def test_requests_per_minute(captions, server, tmp_path):
    generate(captions, server, tmp_path / "out", "--requests_per_minute=1200", "--num_samples=8")
    times = [request.time for request in server.requests]
    assert len(times) == 9 and times[-1] - times[0] >= 8 * 60 / 1200 * 0.95


@pytest.mark.parametrize(
    "structures, structure", [({"json_object"}, "json_object"), (set(), "text")], ids=["object", "text"]
)
def test_a_server_without_structured_output(captions, server, tmp_path, structures, structure):
    server.structures = structures
    server.reply = lambda caption, body: f"Here it is:\n{default_reply(caption, body)}"
    rows = generate(captions, server, tmp_path / "out")
    assert len(rows) == 20 and {json.loads(row["settings"])["structure"] for row in rows} == {structure}
    assert len(server.requests) == 20 + (2 if structures else 3)  # negotiated with one request before all others


def test_a_server_that_supports_fewer_parameters(captions, server, tmp_path):
    server.unsupported = {"max_tokens", "temperature", "frequency_penalty"}
    rows = generate(captions, server, tmp_path / "out")
    assert json.loads(rows[0]["settings"])["left_out"] == ["frequency_penalty", "temperature"]
    assert server.bodies()[-1]["max_completion_tokens"] == 256 and "seed" in server.bodies()[-1]


def test_rejected_answers_are_retried_and_counted(captions, server, tmp_path, capsys):
    seen: dict[str, int] = {}

    def reply(caption: str, body: dict) -> str:
        seen[caption] = seen.get(caption, 0) + 1
        if caption == CAPTIONS[2]:
            return "I cannot do that"
        if caption == CAPTIONS[1] and seen[caption] < 3:
            return json.dumps({"edit": "keep it", "output": f"{caption.upper()}!"})
        return default_reply(caption, body)

    server.reply = reply
    rows = generate(captions, server, tmp_path / "out")
    assert len(rows) == 19 and seen[CAPTIONS[2]] == seen[CAPTIONS[1]] == 3
    assert next(json.loads(row["settings"])["try"] for row in rows if row["caption"] == CAPTIONS[1]) == 3
    assert "rejected, no JSON: 1" in capsys.readouterr().out


def test_legacy_format_sends_the_request_of_the_original(captions, server, tmp_path):
    rows = generate(captions, server, tmp_path / "out", "--format=legacy")
    body = server.bodies("/v1/completions")[-1]
    wanted = dict(temperature=0.7, max_tokens=256, top_p=1.0, frequency_penalty=0.1, presence_penalty=0, stop=["\nEND"])
    assert len(rows) == 20 and {name: body[name] for name in wanted} == wanted
    assert body["prompt"].endswith(PROMPT_END) and body["prompt"].removesuffix(PROMPT_END) in [
        "a boat on a lake",
        *CAPTIONS,
    ]
    assert "messages" not in body and "response_format" not in body
    server.finish_reason = "length"
    with pytest.raises(SystemExit):  # every answer is cut off
        generate(captions, server, tmp_path / "cut", "--format=legacy", "--tries=1")


def test_duplicates_by_words_and_by_url(server, tmp_path, capsys):
    rows = [
        {"TEXT": "A boat, on a lake!", "URL": "http://a/1.jpg"},
        {"TEXT": "a boat on a lake", "URL": "http://a/2.jpg"},
        {"TEXT": "a cat", "URL": "http://a/3.jpg"},
        {"TEXT": "a sleeping cat", "URL": "http://a/3.jpg"},
        {"TEXT": " ", "URL": "http://a/4.jpg"},
        {"TEXT": "word " * 100, "URL": "http://a/5.jpg"},
        {"TEXT": "a dog", "URL": None},
    ]
    source = tmp_path / "captions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = generate(source, server, tmp_path / "out", "--caption_column=TEXT")
    output = capsys.readouterr().out
    assert len(made) == 3 and sum(row["url"] is not None for row in made) == 2
    for reason, count in (("a duplicate", 2), ("empty", 1), ("too long", 1)):
        assert f"rejected, caption {reason}: {count}" in output


def test_captions_from_all_kinds_of_sources(server, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"TEXT": CAPTIONS[:3], "note": ["x"] * 3, "URL": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    rows.to_parquet(str(tmp_path / "files/part.parquet"))
    rows.to_csv(str(tmp_path / "rows.csv"))
    for source in ("saved", "files", "rows.csv"):
        made = generate(tmp_path / source, server, tmp_path / f"out-{source}", "--caption_column=TEXT")
        assert {(row["caption"], row["url"]) for row in made} == set(zip(CAPTIONS[:3], "abc", strict=True)), source


def test_num_samples_counts_triples(captions, server, tmp_path):
    server.reply = lambda caption, body: default_reply(caption, body) if "boat" not in caption else "no"
    every = generate(captions, server, tmp_path / "all")
    some = generate(captions, server, tmp_path / "some", "--num_samples=6")
    assert len(every) == 15 and some == every[:6]


def test_edits_of_one_caption_differ(captions, server, tmp_path):
    rows = generate(captions, server, tmp_path / "out", "--edits_per_caption=4")
    assert len(rows) > 40 and len({(row["caption"], row["edit"]) for row in rows}) == len(rows)


def test_moderation_by_words_function_and_server(captions, server, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("# comment\nthunder clouds\nCAT\nsnow\n")
    (tmp_path / "mine.py").write_text("def no_cats(text):\n    return 'cat' in text or 'snow' in text\n")
    server.flagged = {"cat", "snow"}
    kinds = (f"blocklist:{tmp_path}/words.txt", f"python:{tmp_path}/mine.py:no_cats", "server")
    found = [generate(captions, server, tmp_path / kind[:6], f"--moderation={kind}") for kind in kinds]
    assert found[0] == found[1] == found[2] and 0 < len(found[0]) < 15
    assert not any(word in f"{row['caption']} {row['output']}" for row in found[0] for word in ("cat", "snow"))
    output = capsys.readouterr().out
    assert (
        output.count("rejected, caption refused by moderation: 5") == 3 and "rejected, refused by moderation:" in output
    )


def test_the_key_is_sent_but_never_printed_or_written(captions, server, tmp_path, monkeypatch, capsys):
    server.key = KEY
    monkeypatch.setenv("MY_KEY", KEY)
    generate(captions, server, tmp_path / "out", "--api_key_env=MY_KEY")
    assert {request.authorization for request in server.requests} == {f"Bearer {KEY}"}
    monkeypatch.setenv("MY_KEY", "sk-wrong-0123456789abcdefghij")
    flags = flags_of(captions, server.url, tmp_path / "wrong", "--api_key_env=MY_KEY")
    message = error_message(capsys, *flags)  # the server's message contains the key
    assert "--api_key_env MY_KEY" in message and "rejects the key" in message and "sk-wrong" not in message
    monkeypatch.delenv("MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # not read, because --api_key_env names another variable
    assert "needs a key, and the variable is not set" in error_message(capsys, *flags)
    assert server.requests[-1].authorization is None
    monkeypatch.setenv("MY_KEY", f"{KEY}\u00e4")
    message = error_message(capsys, *flags)
    assert "--api_key_env MY_KEY: the key contains characters" in message and KEY not in message
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written and b"sk-wrong" not in written


def test_resume_after_the_server_was_lost(captions, server, tmp_path, capsys):
    rows = generate(captions, server, tmp_path / "calm")
    num_requests = len(server.requests)
    count = 0

    def reply(caption: str, body: dict) -> str:
        nonlocal count
        count += 1
        if count == 10:
            server.faults.extend([Fault("status", 502)] * 1000)
        return default_reply(caption, body)

    server.reply = reply
    flags = flags_of(captions, server.url, tmp_path / "out", "--retries=2", "--concurrency=1")
    message = error_message(capsys, *flags)
    assert "no answer after 3 attempts" in message and "502" in message and "to resume" in message
    shards = sorted((tmp_path / "out/.making").glob("shard-*"))
    assert len(shards) == 2
    server.faults.clear()
    server.reply = None
    assert generate_captions.main(flags) == 0 and rows_of(tmp_path / "out") == rows
    assert len(server.requests) - num_requests == (10 + 3) + (1 + 12)  # none for the finished shards


def test_permanent_errors_end_the_run(captions, server, tmp_path, capsys):
    flags = flags_of(captions, server.url, tmp_path / "out")
    message = error_message(capsys, *flags, "--model=unknown")
    assert "--model unknown" in message and "does not exist" in message
    quota = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    server.faults.append(Fault("status", 429, body=quota))
    assert "exceeded your quota" in error_message(capsys, *flags)
    nowhere = flags_of(captions, "http://127.0.0.1:9/v1", tmp_path / "out", "--retries=1")
    assert "no answer after 2 attempts" in error_message(capsys, *nowhere)
    server.reply = lambda caption, body: "no"
    assert "no rows were generated (no JSON: 20)" in error_message(capsys, *flags)
    server.reply = lambda caption, body: default_reply(caption, body)
    assert "different settings" in error_message(capsys, *flags, "--seed=1")


def test_all_invalid_flags_are_reported_together(tmp_path, capsys):
    message = error_message(
        capsys,
        "--captions=./nowhere.txt",
        f"--data_root={tmp_path}/out",
        "--model=m",
        "--base_url=ftp://x",
        "--num_samples=0",
        "--temperature=nan",
        "--batch_size=4",
        "--moderation=python:x",
        "--concurrency=0",
        "--format=legacy",
        "--structure=json_object",
    )
    for word in (
        "--captions ./nowhere.txt",
        "ftp://x",
        "--num_samples 0",
        "--temperature nan",
        "--batch_size works only without --base_url",
        "--moderation python:x",
        "--concurrency 0",
        "--structure json_object",
    ):
        assert word in message
    assert not (tmp_path / "out").exists()
    secret = find_url_problem("https://user:secret@host/v1")
    assert "environment" in secret and "secret" not in secret
    assert "--moderation server" in error_message(
        capsys, "--captions=x", f"--data_root={tmp_path}/out", "--model=m", "--moderation=server", "--timeout=3"
    )


def test_another_sampling_is_refused(captions, server, tmp_path, capsys):
    generate(captions, server, tmp_path / "out")
    message = error_message(capsys, *flags_of(captions, server.url, tmp_path / "out", "--temperature=1"))
    assert "different settings" in message and "sampling" in message


def test_no_heavy_imports_for_a_server(captions, server, tmp_path):
    """A run with a server imports neither torch nor transformers."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, *{'torch', 'transformers', 'gradio'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, SCRIPT, *flags_of(captions, server.url, tmp_path / "out")]
    ended = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "0", ended.stderr
    assert "20 triples" in ended.stderr and "tokens in" in ended.stderr  # in the progress bar


@pytest.mark.slow
def test_killed_runs_resume_with_the_same_rows(captions, server, tmp_path):
    server.delay = 0.03
    flags = flags_of(captions, server.url, tmp_path, "--items_per_shard=1", "--concurrency=1")
    flags = [flag for flag in flags if not flag.startswith("--data_root")]
    imports = ("openai", "data_preparation.captions.triple_generation", "data_preparation.captions.server")
    uninterrupted, outputs = kill_and_resume("data_preparation.generate_captions", flags, tmp_path, 20, imports)
    for output in outputs:
        assert files_of(output) == files_of(uninterrupted)
        assert (output / "prompts.jsonl").read_bytes() == (uninterrupted / "prompts.jsonl").read_bytes()
        names = {path.name for path in output.iterdir()}
        assert names == {"data", "manifest.json", "prompts.jsonl", "usage.jsonl"}
