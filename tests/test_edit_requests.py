"""What runs behind the page: requests and their links, the queue, the model cache, and running a request."""

import json
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
import numpy as np
import psutil
import pytest
from PIL import Image

import infer
from tests.pairs import make_noise
from utils.editing.edit_images import OutOfMemory, SamplingSettings, edit_images, fit_to_model
from utils.editing.editor_setup import open_editor
from utils.editing.flags import EditorOptions
from utils.editing.loading import load_editor
from utils.editing.service import EditService
from utils.editing.settings import DEFAULT_SETTINGS, LIMITS, EditSettings
from utils.errors import InputError
from utils.web.edit_requests import (
    PAGE_LIMITS,
    EditRequest,
    PageEdit,
    RequestRunner,
    check_request,
    from_query,
    to_query,
)
from utils.web.handlers import PageHandlers
from utils.web.model_cache import ModelCache, name_models
from utils.web.request_queue import RequestProgress, RequestQueue, Stopped


def load_service(model: str) -> EditService:
    return EditService(open_editor(EditorOptions(model, device="cpu")), batch_size=2)


def make_runner(
    models: list[Path], *, timeout: float = 600, load=load_service, max_pixels: int = 10**6, clock=time.monotonic
) -> RequestRunner:
    cache = ModelCache([str(model) for model in models], load, capacity=2)
    return RequestRunner(
        cache, RequestQueue(timeout, 5, clock), resolution=None, max_pixels=max_pixels, max_bytes=10**6
    )


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    make_noise((40, 44)).save(path)
    return path


def test_queue_is_first_come_first_served():
    requests = RequestQueue(timeout=60, max_waiting=2)
    first, second, third = requests.join(), requests.join(), requests.join()
    assert [requests.wait(slot, 0) for slot in (first, second, third)] == [0, 1, 2]
    with pytest.raises(InputError, match="3 requests are waiting already"):
        requests.join()
    requests.leave(second)
    assert requests.wait(third, 0) == 1
    moved = []
    waiting = threading.Thread(target=lambda: moved.append(requests.wait(third, 60)))
    waiting.start()
    requests.leave(first)
    waiting.join(timeout=600)
    assert moved == [0]


def test_waiting_does_not_count_as_time():
    slot = RequestQueue(timeout=0, max_waiting=1).join()
    slot.check()
    slot.start_clock()
    with pytest.raises(Stopped, match="0 seconds.*fewer steps"):
        slot.check()


def test_models_are_loaded_when_first_used_and_the_last_ones_are_kept():
    loaded = []
    cache = ModelCache(["a", "b", "c"], lambda model: loaded.append(model) or object(), capacity=2)
    assert loaded == []
    first = cache.get("a")
    cache.get("b")
    assert cache.get("a") is first and loaded == ["a", "b"]
    cache.get("c")  # instead of b, which is the least recently used
    assert cache.is_loaded("a") and not cache.is_loaded("b")
    assert cache.get("a") is first
    cache.get("b")
    assert loaded == ["a", "b", "c", "b"]


def test_other_models_make_room_where_the_memory_is_too_small():
    """One of them may fit alone; if not even that, the visitor gets the message."""
    attempts = []

    def load(model: str) -> object:
        attempts.append(model)
        if model == "huge" or (model == "large" and attempts.count("large") == 1):
            raise OutOfMemory(f"loading {model} needs more memory than there is")
        return object()

    cache = ModelCache(["a", "b", "large", "huge"], load, capacity=3)
    cache.get("a"), cache.get("b"), cache.get("large")
    assert attempts == ["a", "b", "large", "large"]
    assert [cache.is_loaded(name) for name in cache.names] == [False, False, True, False]
    for _ in range(2):
        with pytest.raises(InputError, match="loading huge needs more memory"):
            cache.get("huge")
    cache.get("a")
    assert attempts[4:] == ["huge", "huge", "huge", "a"]


def test_only_the_first_frame_of_an_animation_is_edited(tiny_editor, tmp_path):
    """And the page says so."""
    frames = [make_noise((40, 44), seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    handlers = PageHandlers(make_runner([tiny_editor]), [tmp_path / "moving.gif"])
    request = EditRequest("make it snowy", "editor", steps=1)
    updates = list(handlers.edit(str(tmp_path / "moving.gif"), request, False, False, [], "visitor"))
    assert "Only the first frame is edited" in updates[-1]["status"]
    saved = Image.open(next(update["items"] for update in updates if "items" in update)[0].edited)
    assert getattr(saved, "n_frames", 1) == 1 and saved.size != frames[0].size


def test_names_in_the_menu(tmp_path):
    for folder in ("x/editor", "y/editor", "other"):
        (tmp_path / folder).mkdir(parents=True)
    models = [str(tmp_path / folder) for folder in ("x/editor", "y/editor", "other")] + ["timbrooks/instruct-pix2pix"]
    assert list(name_models(models + models[:1])) == [*models[:2], "other", "timbrooks/instruct-pix2pix"]


FEW_STEPS = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "eta": 0.3}


def recommend(folder: Path, settings: dict) -> Path:
    (folder / "adapted.json").write_text(json.dumps({"recommended": settings, "weight": 1.0}))
    return folder


def test_recommended_settings_of_an_adapted_editor(tmp_path):
    recommend(tmp_path, FEW_STEPS | {"scheduler": "TCDScheduler"})
    cache = ModelCache([str(tmp_path), "plain"], None, 1)
    assert cache.settings(tmp_path.name) == DEFAULT_SETTINGS | FEW_STEPS and cache.has_recommended(tmp_path.name)
    assert cache.settings("plain") == DEFAULT_SETTINGS and not cache.has_recommended("plain")
    recommend(tmp_path, {"steps": "few"})
    with pytest.raises(InputError, match="adapted.json"):
        ModelCache([str(tmp_path)], None, 1)


def test_link_restores_the_request():
    request = EditRequest("make it “snowy” & 100% ☃ + cold?", "a", "b", 7, 2**53 - 1, 3, 2.35, 0.0, "euler_a", True)
    restored, ignored = from_query(dict(parse_qsl(to_query(request))), EditRequest(model="b"), ["a", "b"])
    assert restored == request and ignored == []
    assert "scheduler" not in to_query(EditRequest(model="a")) and "keep_size" not in to_query(EditRequest(model="a"))


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
        {"scheduler": "eulr"},
        {"keep_size": "perhaps"},
    ],
)
def test_invalid_values_of_a_link_are_ignored_and_reported(query):
    valid = {"steps": "3"} if "cfg_text" in query else {"cfg_text": "3"}
    restored, ignored = from_query(query | valid, EditRequest(model="a"), ["a"])
    assert restored == EditRequest(model="a", **{name: float(value) for name, value in valid.items()})
    assert len(ignored) == 1 and next(iter(query)) in ignored[0]


def test_all_mistakes_of_a_request_in_one_message():
    request = EditRequest(" ", "none", "", 2.5, None, 0, float("nan"), scheduler="eulr", keep_size="yes")
    with pytest.raises(InputError) as caught:
        check_request(request, ["a"])
    for word in ("empty", "'none'", "steps 2.5", "images 0", "cfg_text nan", "seed None", "'eulr'", "keep_size yes"):
        assert word in str(caught.value)


def test_limits_of_every_number():
    """Those of the page are within those of infer.py."""
    names = dict(images="num_images", cfg_text="guidance_scale", cfg_image="image_guidance_scale")
    for name, (smallest, largest) in PAGE_LIMITS.items():
        bounds = LIMITS[names.get(name, name)]
        assert (bounds[0] <= smallest or name == "resolution") and smallest < largest <= bounds[1]
        for value in (smallest, largest):
            assert getattr(check_request(EditRequest("snow", "a", **{name: value}), ["a"]), name) == value
        with pytest.raises(InputError, match=name):
            check_request(EditRequest("snow", "a", **{name: largest + 1}), ["a"])


# ---- running requests -----------------------------------------------------------------------------------------------


def run(runner: RequestRunner, photo: Path, request: EditRequest, slots: list | None = None) -> list:
    """All events of a request."""
    return list(runner.run(str(photo), request, ([] if slots is None else slots).append))


def test_edits_equal_those_of_infer(tiny_editor, photo):
    """In batches of two; the progress says which images are edited."""
    request = EditRequest("make it snowy", "editor", steps=2, seed=5, images=3, cfg_text=3.0, cfg_image=1.2)
    events = run(make_runner([tiny_editor]), photo, request)
    edits = [event.result for event in events if isinstance(event, PageEdit)]
    assert [edit.record["seed"] for edit in edits] == [5, 6, 7]
    assert [edit.record["batch"] for edit in edits] == [[0, 2], [1, 2], [0, 1]]
    texts = [event.text for event in events if isinstance(event, RequestProgress)]
    assert any("images 1 to 2 of 3" in text for text in texts) or any("image 3 of 3" in text for text in texts)
    pipeline = load_editor(tiny_editor)
    image = fit_to_model(Image.open(photo).convert("RGB"), pipeline)
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, image_guidance_scale=1.2)
    expected = edit_images(pipeline, [image] * 3, ["make it snowy"] * 3, [5, 6, 7], settings)
    for edit, image in zip(edits, expected, strict=True):  # batches of another size: the same but for the last bit
        assert np.abs(np.asarray(edit.image, int) - np.asarray(image, int)).max() <= 1


def test_saved_edits_are_repeated_by_infer(tiny_editor, photo, tmp_path, monkeypatch, capsys):
    """Bit for bit, from the downloaded file and the uploaded image: every image of both models, out of batches."""
    twin = recommend(Path(shutil.copytree(tiny_editor, tmp_path / "twin")), FEW_STEPS | {"steps": 3})
    handlers = PageHandlers(make_runner([tiny_editor, twin]), [photo])
    request = EditRequest("make it snowy", "editor", "twin", 2, 5, 2, 3.0, 1.2, "euler_a", True)
    updates = list(handlers.edit(str(photo), request, False, True, [], "visitor"))
    items = [update["items"] for update in updates if "items" in update][-1]
    assert [(item.model, item.seed) for item in items] == [(m, s) for s in (5, 6) for m in ("editor", "twin")]
    original = tmp_path / "original.png"
    original.write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    for number, item in enumerate(items):
        assert Image.open(item.edited).size == Image.open(item.original).size == (44, 40)  # keep_size
        downloaded = Path(shutil.copy(item.edited, tmp_path / f"download-{number}.png"))
        assert str(photo.parent) not in downloaded.read_bytes().decode("latin-1")  # no folder of the server
        model = {"editor": tiny_editor, "twin": twin}[item.model]
        assert infer.main([f"--repeat={downloaded}", f"--input={original}", f"--model={model}"]) == 0
        assert f"identical to {downloaded}" in capsys.readouterr().out


def test_stops_at_the_next_step(tiny_editor, photo):
    """And the next request runs."""
    runner, calls, slots = make_runner([tiny_editor]), [], []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            slots[0].stop()

    hook = runner.models.get("editor").pipeline.unet.register_forward_hook(count)
    with pytest.raises(Stopped):
        run(runner, photo, EditRequest("snow", "editor", steps=50), slots)
    assert len(calls) == 3
    hook.remove()
    assert isinstance(run(runner, photo, EditRequest("snow", "editor", steps=1))[-1], PageEdit)


def test_waiting_request_can_be_stopped(tiny_editor, photo):
    runner, slots = make_runner([tiny_editor]), []
    before = runner.requests.join()
    events = runner.run(str(photo), EditRequest("snow", "editor", steps=1), slots.append)
    assert next(events) == RequestProgress("Waiting: 1 request before yours")
    slots[0].stop()
    with pytest.raises(Stopped):
        list(events)
    assert runner.requests.wait(runner.requests.join(), 0) == 1
    runner.requests.leave(before)


def test_waiting_requests_hold_no_pixels(tiny_editor, tmp_path):
    """Five images of 49 megapixels would be 1 GB while they wait; nor is one kept after its edit."""
    Image.new("RGB", (7000, 7000)).save(tmp_path / "huge.png")
    runner, slots, process = make_runner([tiny_editor], max_pixels=50 * 10**6), [], psutil.Process()
    request = EditRequest("snow", "editor", steps=1)
    before, used = runner.requests.join(), process.memory_info().rss
    waiting = [runner.run(str(tmp_path / "huge.png"), request, slots.append) for _ in range(5)]
    assert all(isinstance(next(events), RequestProgress) for events in waiting)
    assert process.memory_info().rss - used < 300e6
    runner.requests.leave(before)
    assert all(isinstance(list(events)[-1], PageEdit) for events in waiting)
    assert process.memory_info().rss - used < 300e6


def test_damage_behind_the_header_is_reported_when_the_image_is_edited(tiny_editor, tmp_path):
    make_noise((400, 440)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
    runner = make_runner([tiny_editor])
    assert runner.check_upload(str(tmp_path / "cut.jpg")) == (400, 440)
    with pytest.raises(InputError, match="cannot be edited: cannot be decoded: .*truncated"):
        run(runner, tmp_path / "cut.jpg", EditRequest("snow", "editor", steps=1))


def test_abandoned_request_is_stopped(tiny_editor, photo):
    runner, slots = make_runner([tiny_editor]), []
    events = runner.run(str(photo), EditRequest("snow", "editor", steps=200, images=16), slots.append)
    next(events)
    events.close()
    with pytest.raises(Stopped):
        slots[0].check()
    assert isinstance(run(runner, photo, EditRequest("snow", "editor", steps=1))[-1], PageEdit)


def test_failure_is_reported_and_the_next_request_runs(tiny_editor, photo):
    def fail(model: str) -> None:
        raise RuntimeError("out of order")

    runner = make_runner([tiny_editor], load=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of order"):
            run(runner, photo, EditRequest("snow", "editor"))


def test_impossible_scheduler_is_reported(tiny_editor, photo):
    """In the words of the page, which has no flags."""
    handlers = PageHandlers(make_runner([tiny_editor]), [photo])
    request = EditRequest("snow", "editor", steps=1, scheduler="edm_euler")
    last = list(handlers.edit(str(photo), request, False, False, [], "visitor"))[-1]
    assert ">scheduler edm_euler has other noise levels" in last["status"]


def test_timeout(tiny_editor, photo):
    runner = make_runner([tiny_editor], timeout=0)
    with pytest.raises(Stopped, match="the longest time for one request"):
        run(runner, photo, EditRequest("snow", "editor", steps=200))


def test_loading_a_model_does_not_count_as_time(tiny_editor, photo):
    now = [0.0]

    def load_slowly(model: str) -> EditService:
        now[0] += 1000
        return load_service(model)

    runner = make_runner([tiny_editor], timeout=10, load=load_slowly, clock=lambda: now[0])
    assert isinstance(run(runner, photo, EditRequest("snow", "editor", steps=2))[-1], PageEdit)


def test_client_of_the_api_that_leaves_frees_the_device(tiny_editor, photo):
    runner, calls = make_runner([tiny_editor]), []
    hook = runner.models.get("editor").pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    request = EditRequest("snow", "editor", steps=200, images=16)
    with pytest.raises(gr.Error, match="Stopped"):
        PageHandlers(runner, [photo]).call(str(photo), request, gr.Progress(), lambda: len(calls) < 3)
    assert len(calls) < 100  # of 1600: it leaves at the third step, and the handler may be some steps late
    hook.remove()


def test_resolution_of_a_request(tiny_editor, tmp_path, photo):
    """That of the request, else of the server, else the recommended one, else the model's own."""
    (tmp_path / "adapted").mkdir()
    runner = make_runner([tiny_editor, recommend(tmp_path / "adapted", FEW_STEPS | {"resolution": 96})])
    handlers = PageHandlers(runner, [photo])
    assert handlers.choose_model("adapted")["resolution"] == 96 and handlers.choose_model("editor")["resolution"] == 0
    assert handlers.default_request().resolution == 0
    sizes = {}
    for resolution in (0, 128):
        event = run(runner, photo, EditRequest("snow", "editor", steps=1, resolution=resolution))[-1]
        sizes[resolution] = max(event.result.image.size)
        assert event.result.record["settings"]["resolution"] == (resolution or None)
    assert sizes[0] < sizes[128] < 192
    runner.resolution = 192
    assert handlers.choose_model("adapted")["resolution"] == 192
    assert runner.settings_for(EditRequest("snow", "adapted", "editor"), "editor").resolution == 192


def test_an_edit_is_edited_again(tiny_editor, photo):
    """It is still there when the next edit has removed the files of the one before."""
    handlers = PageHandlers(make_runner([tiny_editor]), [photo])
    request, image, gallery = EditRequest("make it snowy", "editor", steps=1), str(photo), []
    for _ in range(3):
        updates = list(handlers.edit(image, request, False, False, gallery, "visitor"))
        assert updates[-1]["status"].count("Done") == 1
        gallery = [update["items"] for update in updates if "items" in update][-1]
        image = handlers.edit_again(gallery[0].edited)["image"]
    assert Image.open(image).tobytes() == Image.open(gallery[0].edited).tobytes()
    assert "make one first" in handlers.edit_again("")["status"]


def test_settings_of_the_second_model(tiny_editor, tmp_path):
    """Its recommended ones, if one of the two has any; otherwise those of the page."""
    (tmp_path / "adapted").mkdir()
    runner = make_runner([tiny_editor, recommend(tmp_path / "adapted", FEW_STEPS), tmp_path])
    few, plain = EditSettings(**DEFAULT_SETTINGS | FEW_STEPS), EditSettings(**DEFAULT_SETTINGS)
    other, page = tmp_path.name, partial(EditSettings, guidance_rescale=0.0)
    request = EditRequest("snow", "editor", "adapted", steps=30, cfg_text=5.0, scheduler="ddim")
    assert runner.settings_for(request, "editor") == page(30, 5.0, 1.5, scheduler="ddim")
    assert runner.settings_for(request, "adapted") == few
    request = EditRequest("snow", "adapted", "editor", steps=6, cfg_text=1.5, cfg_image=1.0)
    assert runner.settings_for(request, "adapted") == page(6, 1.5, 1.0)  # the service adds the eta
    assert runner.settings_for(request, "editor") == plain
    request = EditRequest("snow", "editor", other, steps=9, cfg_text=4.0)
    assert runner.settings_for(request, other) == runner.settings_for(request, "editor") == page(9, 4.0, 1.5)
