"""prompt_app.py as a process, and its page in Chromium; prepare_for_finetuning.py."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_preparation import prepare_for_finetuning, prompt_app
from data_preparation.captions.prompts import PARSERS, Triple
from data_preparation.prepare_for_finetuning import read_triples, split_triples
from tests.browser import CHROMIUM, INSTALL, PATIENCE, STATUS, running_chromium
from tests.chat_server import Fault, chat_server
from tests.runs import ENVIRONMENT, REPOSITORY

SCRIPT = "data_preparation/prompt_app.py"
KEY = "sk-test-0123456789abcdefghij"


def row(caption: str, edit: str = "make it winter", output: str = "snow", key: str = "caption") -> str:
    return json.dumps({key: caption, "edit": edit, "output": output})


@pytest.fixture
def triples(tmp_path: Path) -> Path:
    """Valid lines, and lines for each reason to leave one out."""
    good = [row(f"caption {number}", key=("caption", "input")[number % 2]) for number in range(40)]
    bad = [
        "nonsense",
        "[1]",
        json.dumps({"caption": "a", "edit": "b"}),
        row("x", edit=""),
        row("snow", output="Snow!"),
        row("a\n##\nb"),
        row("a", edit="b %% c"),
        row("a", output="b\nEND of it"),
        row("CAPTION 1."),
        row("a", edit="b " * 40),
        json.dumps({"caption": "a", "edit": 1, "output": "b"}),
        "",
    ]
    path = tmp_path / "triples.jsonl"
    path.write_text("\n".join(good + bad))
    return path


def test_lines_for_finetuning(triples, tmp_path, capsys):
    flags = [f"--input={triples}", f"--output={tmp_path}/out.jsonl", "--validation_split=0.25"]
    assert prepare_for_finetuning.main([*flags, "--format=legacy"]) == 0
    message = capsys.readouterr().out
    for reason, lines in (
        ("delimiter inside the text", "46, 47, 48"),
        ("no JSON object", "41, 42"),
        ("missing key", "43"),
        ("empty", "44"),
        ("output equal to caption", "45"),
        ("duplicate", "49"),
        ("edit too long", "50"),
        ("not text", "51"),
    ):
        assert re.search(rf"left out, {reason}: \d+ \(line {lines}\)", message), reason
    parts = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "out-validation.jsonl")
    ]
    assert len(parts[0]) + len(parts[1]) == 40 and 4 <= len(parts[1]) <= 18
    for line in parts[0]:
        caption = line["prompt"].removesuffix("\n##\n")
        triple = PARSERS["legacy"](caption, line["completion"], is_finished=False)
        assert triple == Triple(caption, "make it winter", "snow") and line["completion"].endswith("\nEND")
    with pytest.raises(SystemExit):
        prepare_for_finetuning.main(flags)
    assert capsys.readouterr().err.count("already exists") == 2
    assert prepare_for_finetuning.main([*flags, "--overwrite"]) == 0
    messages = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert isinstance(PARSERS["chat"]("caption", messages[2]["content"]), Triple)


def test_all_edits_of_a_caption_are_in_one_part(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text("\n".join(row(f"caption {n // 4}", edit=f"edit {n}", output=f"output {n}") for n in range(200)))
    triples = read_triples(path, is_legacy=False)[0]
    training, held = split_triples(triples, 0.3, seed=1)
    assert len(training) + len(held) == 200 and held
    assert not {triple.caption for triple in training} & {triple.caption for triple in held}
    assert split_triples(triples, 0.3, seed=1) == (training, held) != split_triples(triples, 0.3, seed=2)


def test_finetuning_file_as_a_process(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no\n")
    command = [sys.executable, "data_preparation/prepare_for_finetuning.py", f"--input={tmp_path}/bad.jsonl"]
    ended = subprocess.run(
        [*command, f"--output={tmp_path}/out.jsonl"], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (
        ended.returncode == 2
        and "contains no usable triple" in ended.stderr
        and "no JSON object: 1 (line 1)" in ended.stderr
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_invalid_flags(capsys):
    with pytest.raises(SystemExit):
        prompt_app.main(["--model=m", "--base_url=nothing", "--server_port=0", "--device=cpu"])
    message = capsys.readouterr().err
    assert "--base_url" in message and "--server_port 0" in message and "--device works only" in message


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """(chat server, address of the page)."""
    log = tmp_path_factory.mktemp("page") / "log"
    with socket.socket() as free, chat_server(key=KEY) as server:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        flags = [f"--base_url={server.url}", "--model=echo", f"--server_port={port}", "--retry_wait=0.01"]
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags],
            cwd=REPOSITORY,
            env=ENVIRONMENT | {"OPENAI_API_KEY": KEY},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}/"
        for _ in range(PATIENCE // 200):
            if f"open {url}" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield server, url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE / 1000) == 0, log.read_text()
        assert KEY not in log.read_text()


@pytest.fixture(scope="module")
def chromium():
    with running_chromium() as browser:
        yield browser


class Visitor:
    def __init__(self, chromium, url: str, width: int = 1280) -> None:
        self.page = chromium.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requested: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector(STATUS)

    def ask(self, caption: str) -> str:
        """The final status, once the page takes the next request."""
        self.page.locator("#caption").locator("input, textarea").fill(caption)
        before = self.page.inner_text(STATUS)
        self.page.locator("#caption").locator("input, textarea").press("Enter")
        self.page.wait_for_function(
            "([words, before]) => { const text = document.querySelector(words)?.innerText ?? '';"
            " return text && text !== before && !text.startsWith('Asking'); }",
            arg=[STATUS, before],
        )
        self.page.wait_for_selector("button#run:not([disabled])")
        return self.page.inner_text(STATUS)


in_chromium = pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)


@in_chromium
@pytest.mark.parametrize("width", [320, 700, 1280])
def test_candidates_at_all_widths(page, chromium, width):
    visitor = Visitor(chromium, page[1], width)
    message = visitor.ask("a <script>boat</script> on " + "a very long and winding river " * 4)
    assert message.startswith("Done: 4 of 4 answers for “a <script>boat</script> on a very")
    cards = visitor.page.locator(".candidate")
    visitor.page.wait_for_function("document.querySelectorAll('.candidate').length === 4")
    assert all("<script>boat</script>" in text for text in cards.all_inner_texts())
    assert cards.first.locator("mark").count() >= 1
    lines = visitor.page.locator("#lines textarea").input_value().splitlines()
    assert [json.loads(line).keys() for line in lines] == [{"caption", "edit", "output"}] * 4
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [visitor.page.locator(f"#{name}").bounding_box() for name in ("request", "result", "settings")]
    if width < 700:  # the candidates are right below the button
        assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    assert all(url.startswith((page[1], "data:", "blob:")) for url in visitor.requested)


@in_chromium
def test_errors_are_shown_and_the_next_request_works(page, chromium):
    server, url = page
    visitor = Visitor(chromium, url)
    assert "The caption is empty" in visitor.ask("  ")
    assert "at most 1000" in visitor.ask("word " * 300)
    server.faults.extend([Fault("status", 503)] * 100)
    assert "no answer after 3 attempts" in visitor.ask("a boat")
    server.faults.clear()
    server.reply = lambda caption, body: "no"
    assert visitor.ask("a boat") == "Done: 0 of 4 answers for “a boat” are usable."
    assert "rejected: no JSON" in visitor.page.inner_text("#cards")
    server.reply = None
    assert visitor.ask("a boat") == "Done: 4 of 4 answers for “a boat” are usable."


@in_chromium
def test_the_same_seed_gives_the_same_candidates(page, chromium):
    visitor = Visitor(chromium, page[1])
    visitor.ask("a boat")
    first = visitor.page.locator("#lines textarea").input_value()
    visitor.page.uncheck("#new_seed input")
    visitor.ask("a cat")
    assert visitor.page.locator("#lines textarea").input_value() != first
    visitor.ask("a boat")
    visitor.page.wait_for_function("first => document.querySelector('#lines textarea').value === first", arg=first)
