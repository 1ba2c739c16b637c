"""What runs behind the page: the line before the device, the models kept, links, and the course of an edit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from tests.pairs import make_noise
from utils.editing.edit_images import edit_images, fit_to_model
from utils.editing.editor_setup import OpenedEditor, open_editor
from utils.editing.flags import EditorOptions
from utils.editing.jobs import Recommended
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.web.handlers import Runs
from utils.web.links import LIMITS, Wish, check_wish, from_query, to_query
from utils.web.model_cache import Shelf, name_models
from utils.web.request_queue import Stopped, Turns
from utils.web.studio import Edit, Progress, Studio


def open_model(model: str) -> OpenedEditor:
    return open_editor(EditorOptions(model, device="cpu"))


def make_studio(models: list[Path], *, timeout: float = 600, most_waiting: int = 5, load=open_model) -> Studio:
    shelf = Shelf([str(model) for model in models], load, capacity=2)
    return Studio(shelf, Turns(timeout, most_waiting), resolution=None, max_pixels=10**6, max_bytes=10**6)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    make_noise((40, 40)).save(path)
    return path


def test_the_line_is_first_come_first_served():
    turns = Turns(timeout=60, most_waiting=2)
    first, second, third = turns.join(), turns.join(), turns.join()
    assert [turns.wait(ticket, 0) for ticket in (first, second, third)] == [0, 1, 2]
    with pytest.raises(InputError, match="3 edits are waiting already"):
        turns.join()
    with turns.leaving(second):
        pass
    assert turns.wait(third, 0) == 1
    moved = []
    waiting = threading.Thread(target=lambda: moved.append(turns.wait(third, 60)))
    waiting.start()
    with turns.leaving(first):
        pass
    waiting.join(timeout=60)
    assert moved == [0]


def test_the_clock_starts_with_the_turn():
    ticket = Turns(timeout=0, most_waiting=1).join()
    ticket.check()
    ticket.start_clock()
    with pytest.raises(Stopped, match="0 seconds.*fewer steps"):
        ticket.check()


def test_models_are_loaded_when_first_used_and_the_last_ones_kept():
    loaded = []
    shelf = Shelf(["a", "b", "c"], lambda model: loaded.append(model) or object(), capacity=2)
    assert loaded == []
    first = shelf.take("a")
    shelf.take("b")
    assert shelf.take("a") is first and loaded == ["a", "b"]
    shelf.take("c")  # in place of b, which was not used for longest
    assert shelf.is_loaded("a") and not shelf.is_loaded("b")
    assert shelf.take("a") is first
    shelf.take("b")
    assert loaded == ["a", "b", "c", "b"]


def test_names_in_the_menu(tmp_path):
    for folder in ("x/editor", "y/editor", "other"):
        (tmp_path / folder).mkdir(parents=True)
    models = [str(tmp_path / folder) for folder in ("x/editor", "y/editor", "other")] + ["timbrooks/instruct-pix2pix"]
    assert list(name_models(models + models[:1])) == [*models[:2], "other", "timbrooks/instruct-pix2pix"]


def test_an_adapted_editor_brings_its_settings(tmp_path):
    recommended = {
        "steps": 4,
        "guidance_scale": 1,
        "image_guidance_scale": 1.0,
        "eta": 0.3,
        "scheduler": "TCDScheduler",
    }
    (tmp_path / "adapted.json").write_text(json.dumps({"recommended": recommended, "weight": 1.0}))
    shelf = Shelf([str(tmp_path), "plain"], None, 1)
    assert shelf.recommended(tmp_path.name) == Recommended(4, 1.0, 1.0, 0.3)
    assert shelf.recommended("plain") == Recommended() and not shelf.has_its_own("plain")
    (tmp_path / "adapted.json").write_text('{"recommended": {"steps": "few"}}')
    with pytest.raises(InputError, match="adapted.json"):
        Shelf([str(tmp_path)], None, 1)


def test_a_link_asks_for_the_same_again():
    wish = Wish("make it “snowy” & 100% ☃ + cold?", "a", "b", 7, 2**53 - 1, 3, 2.35, 0.0)
    query = dict(pair.split("=", 1) for pair in to_query(wish).split("&"))
    from urllib.parse import unquote_plus

    restored, ignored = from_query({k: unquote_plus(v) for k, v in query.items()}, Wish(model="b"), ["a", "b"])
    assert restored == wish and ignored == []


@pytest.mark.parametrize(
    "query",
    [
        {"steps": "0"},
        {"steps": "many"},
        {"seed": "-1"},
        {"cfg_text": "nan"},
        {"cfg_image": "inf"},
        {"model": "/etc"},
        {"images": "1e9"},
        {"seed": str(10**30)},
        {"instruction": "x" * 5000},
    ],
)
def test_a_link_with_nonsense_leaves_it_out_and_says_so(query):
    default = Wish(model="a")
    restored, ignored = from_query({**query, "cfg_text" if "cfg_text" not in query else "steps": "3"}, default, ["a"])
    changed = {"cfg_text": 3.0} if "cfg_text" not in query else {"steps": 3}
    assert restored == Wish(**({"model": "a"} | changed))
    assert len(ignored) == 1 and next(iter(query)) in ignored[0]


def test_all_mistakes_of_a_wish_in_one_message():
    with pytest.raises(InputError) as caught:
        check_wish(Wish(" ", "none", steps=2.5, images=0, cfg_text=float("nan"), seed=None), ["a"])
    for word in ("empty", "'none'", "steps 2.5", "images 0", "cfg_text nan", "seed None"):
        assert word in str(caught.value)


def test_a_wish_gives_the_edits_of_infer(tiny_editor, photo):
    studio = make_studio([tiny_editor])
    wish = Wish("make it snowy", "editor", steps=2, seed=5, images=2, cfg_text=3.0, cfg_image=1.2)
    events = list(studio.run(str(photo), wish, lambda ticket: None))
    edits = [event for event in events if isinstance(event, Edit)]
    pipeline = load_editor(tiny_editor)
    image = fit_to_model(Image.open(photo).convert("RGB"), pipeline)
    expected = edit_images(
        pipeline,
        [image] * 2,
        ["make it snowy"] * 2,
        seeds=[5, 6],
        num_inference_steps=2,
        guidance_scale=3.0,
        image_guidance_scale=1.2,
    )
    assert [edit.seed for edit in edits] == [5, 6]
    for edit, image in zip(edits, expected, strict=True):  # batched or not: the same but for the last bit
        assert np.abs(np.asarray(edit.edited, int) - np.asarray(image, int)).max() <= 1


def test_what_the_page_gives_is_repeated_by_infer(tiny_editor, photo, tmp_path, monkeypatch, capsys):
    """To the bit, from the downloaded file and the picture that was uploaded: every image, and of both models."""
    twin = Path(shutil.copytree(tiny_editor, tmp_path / "twin"))
    recommended = {"steps": 3, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "eta": 0.3}
    (twin / "adapted.json").write_text(json.dumps({"recommended": recommended}))
    runs = Runs(make_studio([tiny_editor, twin]), [photo])
    wish = Wish("make it snowy", "editor", "twin", steps=2, seed=5, images=2, cfg_text=3.0, cfg_image=1.2)
    shown = [update["shown"] for update in runs.edit(str(photo), wish, False, True, [], "visitor") if "shown" in update]
    assert [(item.model, item.seed) for item in shown[-1]] == [(m, s) for s in (5, 6) for m in ("editor", "twin")]
    original = tmp_path / "original.png"
    original.write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    for number, item in enumerate(shown[-1]):
        downloaded = Path(shutil.copy(item.edited, tmp_path / f"download-{number}.png"))
        assert str(photo.parent) not in downloaded.read_bytes().decode("latin-1")  # a visitor's folders are nobody's
        model = {"editor": tiny_editor, "twin": twin}[item.model]
        flags = [f"--repeat={downloaded}", f"--input={original}", f"--model={model}"]
        assert infer.main(flags) == 0
        assert f"equal to {downloaded} to the bit" in capsys.readouterr().out


def test_stopped_at_the_next_step_and_the_line_moves_on(tiny_editor, photo):
    studio = make_studio([tiny_editor])
    pipeline = studio.shelf.take("editor").pipeline
    calls, tickets = [], []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            tickets[0].stop()

    hook = pipeline.unet.register_forward_hook(count)
    with pytest.raises(Stopped):
        list(studio.run(str(photo), Wish("snow", "editor", steps=50), tickets.append))
    assert len(calls) == 3
    hook.remove()
    assert any(
        isinstance(event, Edit) for event in studio.run(str(photo), Wish("snow", "editor", steps=1), tickets.append)
    )


def test_one_who_waits_may_leave(tiny_editor, photo):
    studio, tickets = make_studio([tiny_editor]), []
    before = studio.turns.join()
    course = studio.run(str(photo), Wish("snow", "editor", steps=1), tickets.append)
    assert next(course) == Progress("Waiting: 1 edit before yours")
    tickets[0].stop()
    with pytest.raises(Stopped):
        list(course)
    with studio.turns.leaving(before):
        assert studio.turns.wait(studio.turns.join(), 0) == 1


def test_an_abandoned_course_stops_its_edit(tiny_editor, photo):
    studio, tickets = make_studio([tiny_editor]), []
    course = studio.run(str(photo), Wish("snow", "editor", steps=200, images=16), tickets.append)
    next(course)
    course.close()
    with pytest.raises(Stopped):
        tickets[0].check()
    following = studio.run(str(photo), Wish("snow", "editor", steps=1), tickets.append)
    assert isinstance(list(following)[-1], Edit)


def test_a_failure_is_told_and_the_line_moves_on(tiny_editor, photo):
    def fail(model: str) -> None:
        raise RuntimeError("out of order")

    studio = make_studio([tiny_editor], load=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of order"):
            list(studio.run(str(photo), Wish("snow", "editor"), lambda ticket: None))


def test_the_longest_time_is_kept(tiny_editor, photo):
    studio = make_studio([tiny_editor], timeout=0)
    with pytest.raises(Stopped, match="the most that an edit may take here"):
        list(studio.run(str(photo), Wish("snow", "editor", steps=200), lambda ticket: None))


def test_the_second_model_edits_with_its_own_settings(tiny_editor, tmp_path):
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    recommended = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    (adapted / "adapted.json").write_text(json.dumps({"recommended": recommended}))
    studio = make_studio([tiny_editor, adapted, tmp_path])
    few, plain, other = Recommended(4, 1.0, 1.0), Recommended(), tmp_path.name
    wish = Wish("snow", "editor", "adapted", steps=30, cfg_text=5.0)
    assert studio.settings_for(wish, "editor") == Recommended(30, 5.0, 1.5)
    assert studio.settings_for(wish, "adapted") == few
    wish = Wish("snow", "adapted", "editor", steps=6, cfg_text=1.5, cfg_image=1.0)
    assert studio.settings_for(wish, "adapted") == Recommended(6, 1.5, 1.0)
    assert studio.settings_for(wish, "editor") == plain
    wish = Wish("snow", "editor", other, steps=9, cfg_text=4.0)  # neither has its own: one setting for both
    assert studio.settings_for(wish, other) == studio.settings_for(wish, "editor") == Recommended(9, 4.0, 1.5)


def test_limits_hold_for_every_number():
    for name, (least, most) in LIMITS.items():
        for value in (least, most):
            assert getattr(check_wish(Wish("snow", "a", **{name: value}), ["a"]), name) == value
        with pytest.raises(InputError, match=name):
            check_wish(Wish("snow", "a", **{name: most + 1}), ["a"])
