"""The judge of edits, against a server that speaks the API of vision models and answers by a rule."""

import base64
import io
import json
import re
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_preparation.toy_edits import EDITS
from evaluation import benchmark, compare_models
from evaluation.judge import CHECKED, Judge, JudgeOptions, read_choice, read_marks
from evaluation.samples import Sample
from evaluation.votes import read_votes
from tests.chat_server import Fault, chat_server
from tests.pairs import make_image
from tests.test_metrics import save_samples
from utils.errors import InputError

TASKS = {instruction: task for task, instruction in CHECKED.items()}


def seen(parts: list[dict]) -> tuple[str, list[np.ndarray]]:
    """The instruction and the images of a question."""
    instruction = re.search(r"Instruction of .*?: (.*)\n", parts[0]["text"])[1]
    urls = [part["image_url"]["url"] for part in parts[1:]]
    return instruction, [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def quality(instruction: str, original: np.ndarray, edit: np.ndarray) -> float:
    """From 0 to 10: how close an edit is to the exact one, or else how much it changed."""
    if instruction in TASKS:
        exact = EDITS[TASKS[instruction]](original)
        return round(10 * max(0.0, 1 - np.abs(exact.astype(float) - edit).mean() / 64), 2)
    return round(min(10.0, np.abs(original.astype(float) - edit).mean()), 2)


def honest(parts: list[dict], body: dict) -> str:
    instruction, (original, *edits) = seen(parts)
    values = [quality(instruction, original, edit) for edit in edits]
    if len(values) == 2:
        return "```json\n" + json.dumps({"better": "B" if values[1] > values[0] else "A"}) + "\n```"
    marks = dict.fromkeys(("success", "overediting"), values[0]) | dict.fromkeys(("naturalness", "artefacts"), 9)
    return f"My marks: {json.dumps(marks)}"


def open_judge(url: str, folder: Path, **more: object) -> Judge:
    return Judge(JudgeOptions(url, "echo", **more), folder)


def test_marks_are_kept_and_asked_again_where_malformed(tmp_path, monkeypatch):
    monkeypatch.setattr("data_preparation.captions.server._sleep", lambda seconds, cancelled: None)
    samples = [Sample(index, make_image(index), "invert the colours") for index in range(3)]
    edits = [Image.fromarray(255 - np.asarray(sample.original)) for sample in samples]
    answers = deque(
        ["no marks", '{"success": 11, "overediting": 1, "naturalness": 1, "artefacts": 1}', '{"success": true}']
    )

    def reply(parts: list[dict], body: dict) -> str:
        return answers.popleft() if answers else honest(parts, body)

    with chat_server(reply=reply, faults=deque([Fault("status", 503), Fault("garbage")])) as server:
        judge = open_judge(server.url, tmp_path, judge_concurrency=1, judge_retries=6)
        marks = judge.mark(samples, edits)
        assert marks == [{"judge_sc": 10, "judge_pq": 9, "judge_o": pytest.approx(90**0.5)}] * 3
        assert judge.num_malformed >= 3 and judge.num_refused == 0
        with (tmp_path / "judgements.jsonl").open("a") as file:
            file.write('{"key": "half')  # as after a kill
        count = len(server.requests)
        again = open_judge(server.url, tmp_path)
        assert again.mark(samples, edits) == marks and len(server.requests) == count
        assert again.mark(samples[:1], [samples[0].original])[0]["judge_sc"] < 10 and len(server.requests) == count + 1
        assert len(open_judge(server.url, tmp_path)._known) == 4


def test_the_check_of_itself(tmp_path):
    with chat_server(reply=honest) as server:
        assert "exact edits above" in open_judge(server.url, tmp_path / "honest").check_itself()
    flattering = json.dumps(dict.fromkeys(("success", "overediting", "naturalness", "artefacts"), 8))
    problem = "fails the check of itself in 3 of 3"
    with chat_server(reply=lambda parts, body: flattering) as server, pytest.raises(InputError, match=problem):
        open_judge(server.url, tmp_path / "flattering").check_itself()
    with pytest.raises(InputError, match="--judge http://127.0.0.1:9.*: no answer after 1 attempts.*Answers are kept"):
        open_judge("http://127.0.0.1:9", tmp_path / "none", judge_retries=0).check_itself()


def test_pairs_are_judged_in_both_orders(tmp_path):
    """A judge that always prefers the first one it sees gives ties."""
    sample = Sample(7, make_image(1), "invert the colours")
    good, bad = Image.fromarray(255 - np.asarray(sample.original)), sample.original
    with chat_server(reply=honest) as server:
        votes = open_judge(server.url, tmp_path / "a").compare([sample] * 2, ("x", "y"), [good, bad], [bad, good])
        assert [(vote.winner, vote.sample, vote.voter) for vote in votes] == [
            ("first", 7, "judge echo"),
            ("second", 7, "judge echo"),
        ]
    with chat_server(reply=lambda parts, body: '{"better": "A"}') as server:
        votes = open_judge(server.url, tmp_path / "b").compare([sample], ("x", "y"), [good], [bad])
        assert [vote.winner for vote in votes] == ["tie"]


@pytest.mark.parametrize("text", ["", None, "[]", "{}", '{"better": "C"}', "{broken", '{"success": 5}', "{" * 50])
def test_answers_that_are_no_judgement(text):
    for read in (read_marks, read_choice):
        with pytest.raises(ValueError):  # noqa: PT011
            read(text)


def test_the_scripts_use_the_judge(tiny_editor, tmp_path, capsys):
    """A column of the table, and votes beside those of people, each asked once."""
    data = [f"--dataset_name={save_samples(tmp_path / 'data')}", "--clip_model=none", "--dino_model=none"]
    data += ["--steps=1", "--resolution=32", f"--model={tiny_editor}"]
    with chat_server(reply=honest) as server:
        judge = [f"--judge={server.url}", "--judge_model=echo"]
        assert benchmark.main([*data, *judge, f"--output_dir={tmp_path / 'table'}"]) == 0
        assert "judge_o" in (tmp_path / "table/results.md").read_text()
        rows = json.loads((tmp_path / "table/results.json").read_text())["rows"]
        assert rows["input, not edited"]["judge_o"]["mean"] == 0 < rows[Path(tiny_editor).name]["judge_o"]["mean"]
        other = tmp_path / "other"
        other.symlink_to(tiny_editor)
        flags = [*data, f"--model={other}", *judge, f"--output_dir={tmp_path / 'pairs'}"]
        assert compare_models.main(flags) == 0
        names = [Path(tiny_editor).name, "other"]
        votes = read_votes(tmp_path / "pairs/votes.jsonl", names)
        assert [vote.winner for vote in votes] == ["tie"] * 4  # the same editor twice
        count = len(server.requests)
        assert compare_models.main(flags) == 0 and len(server.requests) == count
        assert read_votes(tmp_path / "pairs/votes.jsonl", names) == votes
    assert "1500 (1500 to 1500), 4 votes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge=http://localhost:1"], "--judge and --judge_model belong together"),
        (["--judge=http://localhost:1", "--judge_model=x", "--judge_concurrency=0"], "--judge_concurrency 0: must be"),
    ],
)
def test_mistakes_are_named(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--model=me/editor", "--dataset_name=x", f"--output_dir={tmp_path}", *more])
    assert message in capsys.readouterr().err
