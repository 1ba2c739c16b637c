"""compare_models.py as its user runs it: the page and the votes in a real browser, the ratings against likelihoods."""

import json
import shutil
import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from evaluation import compare_models
from evaluation.ratings import Vote, rate
from evaluation.vote_server import make_vote_server
from evaluation.votes import Ballot, read_votes
from tests.browser import CHROMIUM, INSTALL, open_page
from tests.encoders import save_clip
from tests.test_metrics import save_samples
from utils.errors import InputError

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)


@pytest.fixture(scope="module")
def compared(tiny_editor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two editors."""
    folder = tmp_path_factory.mktemp("comparison")
    other = shutil.copytree(tiny_editor, folder / "other")
    flags = [f"--model={tiny_editor}", f"--model={other}", f"--dataset_name={save_samples(folder / 'data')}"]
    flags += [f"--clip_model={save_clip(folder / 'clip')}", "--dino_model=none", "--steps=2", "--resolution=32"]
    assert compare_models.main([*flags, f"--output_dir={folder / 'out'}"]) == 0
    return folder / "out"


@in_chromium
def test_the_page_in_a_browser(compared):
    """Grid, scores, filter, order and slider."""
    assert Image.open(compared / "sheet-1.png").height > 4 * 48
    names = [row["name"] for row in json.loads((compared / "results.json").read_text())["rows"]]
    assert names == ["editor", "other", "input, not edited"]
    with open_page() as page:
        page.goto((compared / "index.html").as_uri())
        assert page.locator("#table tr").count() == 4 and page.locator("#rows h2").count() == 4
        assert page.locator("#rows figure").count() == 4 * 4
        page.wait_for_function("[...document.images].slice(0, 4).every(image => image.complete && image.naturalWidth)")
        page.fill("#filter", "nothing like this")
        assert page.locator("#rows h2").count() == 0 and "0 of 4" in page.inner_text("#count")
        page.fill("#filter", "RED")
        page.select_option("#score", "psnr")
        shown = page.locator("#rows figcaption", has_text="editor, psnr").all_inner_texts()
        values = [float(text.rpartition(" ")[2]) for text in shown]
        assert len(values) == 4 and values == sorted(values)
        page.check("#slide")
        page.locator(".slider input").first.fill("60")
        assert page.locator(".slider .after").first.evaluate("node => node.style.getPropertyValue('--cut')") == "60%"


@pytest.fixture
def server(compared, tmp_path):
    """(address, ballot) of a page of votes."""
    numbers = range(4)
    images = {(None, n): compared / f"inputs/{n:06d}.png" for n in numbers}
    images |= {(label, n): compared / f"edits/{label}/{n:06d}.png" for label in ("editor", "other") for n in numbers}
    ballot = Ballot(list(numbers), ["editor", "other"], tmp_path, seed=0)
    served = make_vote_server(ballot, images, dict.fromkeys(numbers, "add <b>red</b>"), 0)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", ballot
    served.shutdown()
    served.server_close()
    thread.join()


@in_chromium
def test_votes_in_a_browser(server, tmp_path):
    """By buttons and keys; names are not shown before the ratings; a restarted page continues."""
    address, ballot = server
    with open_page() as page:
        page.goto(address)
        page.wait_for_function("document.images[2].naturalWidth > 0")
        assert page.inner_text("#instruction") == "add <b>red</b>"
        assert "other" not in page.content()
        for count, vote in enumerate((lambda: page.click("#vote-first"), lambda: page.keyboard.press("ArrowDown")), 1):
            vote()
            page.wait_for_function(f"parseInt(document.querySelector('#count').textContent) == {count}")
        page.click("#show")
        page.wait_for_selector("#ratings td")
        assert page.locator("#ratings tr").count() == 3
    assert [vote.winner for vote in ballot.votes] == ["first", "tie"]
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write('{"first": "edi')  # as after a kill
    assert read_votes(tmp_path / "votes.jsonl", ["editor", "other"]) == ballot.votes


def test_requests_that_are_refused(server):
    address, ballot = server

    def status(path: str, body: bytes | None = None, **headers: str) -> int:
        try:
            return urllib.request.urlopen(urllib.request.Request(address + path, body, headers)).status
        except HTTPError as error:
            assert "error" in json.loads(error.read())
            return error.code

    number = json.loads(urllib.request.urlopen(address + "/question").read())["id"]
    assert status("/question", Host="evil.example") == status("/vote", b"{}", Host="evil.example:80") == 403
    assert status(f"/image/{number}/first") == 200
    assert status(f"/image/{number}/third") == status("/image/99/first") == status("/../secret") == 404
    for body in (
        b"",
        b"[",
        b"{}",
        b'{"id": 99, "winner": "first"}',
        json.dumps({"id": number, "winner": "all"}).encode(),
    ):
        assert status("/vote", body) == 400
    assert status("/vote", b"x" * 2000) == 400 and ballot.votes == []
    vote = json.dumps({"id": number, "winner": "second"}).encode()
    assert [status("/vote", vote), status("/vote", vote)] == [200, 400] and len(ballot.votes) == 1


def test_ratings_have_the_greatest_likelihood():
    """No rating near them explains the votes (and the prior) better; more wins, a higher rating; ties are half."""
    rng, strengths = np.random.default_rng(0), {"a": 1.0, "b": 2.0, "c": 4.0}
    votes = []
    for _ in range(200):
        first, second = rng.choice(list(strengths), 2, replace=False).tolist()
        share = strengths[first] / (strengths[first] + strengths[second])
        votes.append(
            Vote(first, second, "tie" if rng.random() < 0.1 else "first" if rng.random() < share else "second")
        )
    found = rate(votes, list(strengths))
    assert [one.name for one in found] == ["c", "b", "a"] and all(one.low < one.rating < one.high for one in found)

    def log_likelihood(ratings: dict[str, float]) -> float:
        pairs = [(vote.first, vote.second, {"first": 1, "second": 0, "tie": 0.5}[vote.winner]) for vote in votes]
        pairs += [(x, y, 0.5) for x in ratings for y in ratings if x < y]
        odds = [(10 ** ((ratings[x] - ratings[y]) / 400), share) for x, y, share in pairs]
        return sum(share * np.log(o / (1 + o)) + (1 - share) * np.log(1 / (1 + o)) for o, share in odds)

    best = {one.name: one.rating for one in found}
    for name in best:
        for step in (-5, 5):
            assert log_likelihood(best | {name: best[name] + step}) < log_likelihood(best)
    assert [one.rating for one in rate([], ["a", "b"])] == pytest.approx([1500, 1500])
    assert rate([Vote("a", "b", "first")] * 5, ["a", "b"])[0].rating < 2500  # not infinite
    assert [one.rating for one in rate([Vote("a", "b", "tie")] * 3, ["a", "b"])] == pytest.approx([1500, 1500])


def test_a_port_that_is_taken(server, tmp_path):
    port = int(server[0].rpartition(":")[2])
    with pytest.raises(InputError, match=f"--port {port} cannot be used"):
        make_vote_server(Ballot([0], ["a", "b"], tmp_path), {}, {}, port)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vote"], "give --model at least twice"),
        (["--port=70000"], "--port 70000: must be"),
        (["--model=a/b+./no"], "./no"),
    ],
)
def test_mistakes_are_named(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_models.main(["--model=me/editor", "--dataset_name=x", f"--output_dir={tmp_path}", *more])
    assert message in capsys.readouterr().err
