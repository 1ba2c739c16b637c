"""app.py: its flags, its API, and the page in Chromium."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app
import demo
import infer
from tests.adapters import load_trained
from tests.browser import CHROMIUM, INSTALL, PATIENCE, Server, Visitor, running_chromium
from tests.original_names import write_single_file
from tests.runs import REPOSITORY
from utils.editing.edit_images import SamplingSettings, edit_images, fit_to_model
from utils.editing.loading import load_editor
from utils.editing.records import read_record
from utils.models.adapters import AdapterOptions, save_adapter

PHOTOS = REPOSITORY / "assets/photos"
NODE = shutil.which("node")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)


def error_of(capsys: pytest.CaptureFixture, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        app.main(list(flags))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def upload(server: Server, path: Path, *options: str) -> str:
    """What the server answers to an upload by curl."""
    command = ["curl", "-s", *options, "-F", f"files=@{path}", f"{server.url}gradio_api/upload"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE / 1000).stdout


def assert_repeats(downloaded: Path, original: Path, model: Path, *options: str) -> None:
    """infer.py repeats a download bit for bit, from the file and the uploaded image alone."""
    repeated = downloaded.with_name("repeated.png")
    flags = [f"--repeat={downloaded}", f"--input={original}", f"--model={model}", f"--output={repeated}"]
    assert infer.main([*flags, *options]) == 0
    assert (np.asarray(Image.open(repeated)) == np.asarray(Image.open(downloaded))).all()


@pytest.fixture(scope="module")
def server(tiny_editor: Path, tmp_path_factory: pytest.TempPathFactory):
    """A server with an editor and a twin that recommends its own settings."""
    folder = tmp_path_factory.mktemp("app")
    twin = Path(shutil.copytree(tiny_editor, folder / "twin"))
    settings = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "eta": 0.0}
    (twin / "adapted.json").write_text(json.dumps({"recommended": settings}))
    limits = ("--max_upload_mb=2", "--max_megapixels=2")
    server = Server(
        folder / "log", f"--model={tiny_editor}", f"--model={twin}", "--keep_models=1", "--batch_size=2", *limits
    )
    yield server
    assert server.end() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def chromium():
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def visit(server, chromium):
    """Opens pages and closes them after the test."""
    visitors = []

    def open_page(query: str = "", **window: int) -> Visitor:
        visitors.append(Visitor(chromium, server.url, query, **window))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.close()


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    photo = (PHOTOS / "raccoon.jpg").read_bytes()
    (folder / "text.png").write_text("this is not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(photo[: len(photo) // 3])
    (folder / "heavy.jpg").write_bytes(photo + bytes(3 * 2**20))
    Image.new("L", (2000, 2000)).save(folder / "wide.png")
    return folder


def test_message_without_a_toy_editor(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(app, "REPOSITORY", tmp_path)
    monkeypatch.setattr(app, "TOY", tmp_path / "demo-output/editor")
    message = error_of(capsys)
    assert "there is no demo-output/editor" in message and "make demo" in message and "--model" in message


def test_all_mistakes_in_the_flags_in_one_message(capsys):
    flags = "--model=./nowhere --model=b --timeout=0 --max_upload_mb=nan --server_port=70000 --lora=./x --vae=./y"
    flags += " --revision=main --single_file_config=./z"
    message = error_of(capsys, *flags.split(), "--lora_scale=11", "--offload=model", "--device=cpu")
    for word in ("./nowhere", "--timeout 0", "--max_upload_mb nan", "--server_port 70000", "--lora ./x", "--vae ./y"):
        assert word in message
    one_model = [f"--{flag} is for one --model" for flag in ("lora", "revision", "single_file_config")]
    for word in (*one_model, "--lora_scale 11", "--offload model needs a GPU"):
        assert word in message


def test_port_that_is_taken(server, tiny_editor):
    port = server.url.rstrip("/").rsplit(":", 1)[1]
    command = [app.sys.executable, "app.py", f"--model={tiny_editor}", f"--server_port={port}"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE / 1000)
    assert ended.returncode == 2 and f"--server_port {port} cannot be used" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_toy_settings_are_those_of_the_demo():
    assert app.TOY == REPOSITORY / "demo-output/editor"
    assert {name: demo.EDITING[name] for name in app.TOY_SETTINGS} == app.TOY_SETTINGS
    assert all(path.is_file() for path in app.EXAMPLES)


@in_chromium
def test_upload_edit_and_slider(visit, tiny_editor):
    """The edit on the page is that of `edit_images`, and the handle of the slider moves."""
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    assert "640 x 480 pixels" in visitor.status()
    visitor.page.uncheck("#new_seed input")
    visitor.set("seed", 7)
    visitor.set("steps", 3)
    visitor.edit("make it night")
    assert "3 steps, seed 7, text guidance 7.5, image guidance 1.5" in visitor.status()

    before, after = (Image.open(io.BytesIO(visitor.bytes_of(url))) for url in visitor.compared_images)
    pipeline = load_editor(tiny_editor)
    original = fit_to_model(Image.open(PHOTOS / "raccoon.jpg"), pipeline)
    edited = edit_images(pipeline, [original], ["make it night"], [7], SamplingSettings(num_inference_steps=3))[0]
    assert (np.asarray(before) == np.asarray(original)).all() and (np.asarray(after) == np.asarray(edited)).all()

    handle = visitor.page.locator("#comparison .outer")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.page.mouse.move(x, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x + 100, y, steps=5)
    visitor.page.mouse.up()
    dragged = handle.bounding_box()["x"]
    assert abs(dragged - box["x"] - 100) < 2
    handle.focus()
    visitor.page.keyboard.press("ArrowLeft")
    assert handle.bounding_box()["x"] < dragged - 5


@in_chromium
def test_enter_key_and_gallery(visit, tiny_editor, tmp_path):
    visitor = visit()
    visitor.upload(PHOTOS / "coffee.jpg")
    visitor.set("images", 3)
    visitor.set("steps", 2)
    visitor.instruction.fill("make it foggy")
    visitor.instruction.press("Enter")
    visitor.wait_until_done()
    seed = int(visitor.number("seed"))
    visitor.wait_for_edits(3)
    captions = visitor.page.inner_text("#gallery")
    assert all(f"seed {seed + number}" in captions for number in range(3))
    shown = [visitor.page.locator("#gallery .thumbnail-item img").nth(n).get_attribute("src") for n in range(3)]
    assert len({visitor.bytes_of(url) for url in shown}) == 3
    visitor.edits.nth(2).focus()
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_text(f"image | seed {seed + 2}").wait_for()
    assert visitor.bytes_of(visitor.compared_images[1]) == visitor.bytes_of(shown[2])
    downloaded = tmp_path / "download.png"
    downloaded.write_bytes(visitor.bytes_of(shown[2]))
    assert_repeats(downloaded, PHOTOS / "coffee.jpg", tiny_editor)
    visitor.edit("make it foggy")  # again, with another seed
    assert visitor.number("seed") != seed
    edited = visitor.bytes_of(visitor.compared_images[1])
    visitor.forget_status()
    visitor.page.click("#again")
    visitor.wait_for_status("The edit is the image now", "it is not the image")
    assert visitor.bytes_of(visitor.page.locator("#image img").first.get_attribute("src")) == edited


@in_chromium
def test_bad_files(visit, bad_files):
    """Each gets a message, and the next file is edited."""
    visitor = visit()
    visitor.set("steps", 2)
    problems = {"text.png": "not an image", "empty.png": "0 bytes", "wide.png": "2000x2000"}
    for name, problem in problems.items():
        visitor.upload(bad_files / name)
        assert problem in visitor.status() and "cannot be used" in visitor.status()
        visitor.page.wait_for_function("!document.querySelector('#image img')")
    visitor.upload(PHOTOS / "rocket.jpg")
    visitor.edit("make it night")
    visitor.wait_for_edits(1)


@in_chromium
def test_file_that_is_too_large_is_not_sent(visit, bad_files):
    visitor = visit()
    visitor.page.locator("#image input[type=file]").set_input_files(bad_files / "heavy.jpg")
    visitor.page.get_by_text(re.compile("exceed the maximum allowed size of 2.0 Mb")).wait_for()
    visitor.upload(PHOTOS / "rocket.jpg")
    visitor.set("steps", 2)
    visitor.edit("make it night")


@in_chromium
def test_missing_inputs(visit):
    visitor = visit()
    visitor.page.click("#run")
    visitor.wait_for_status("The instruction is empty", "no error")
    visitor.instruction.fill("make it night")
    visitor.page.click("#run")
    visitor.wait_for_status("The image is missing", "no error")


@in_chromium
def test_two_visitors(visit):
    """Both start at once; one waits for the other, and neither sees the edits of the other."""
    visitors = [visit(), visit()]
    for visitor, photo, seed in zip(visitors, ("raccoon", "rocket"), (100, 200), strict=True):
        visitor.upload(PHOTOS / f"{photo}.jpg")
        visitor.page.uncheck("#new_seed input")
        visitor.set("seed", seed)
        visitor.set("steps", 40)
        visitor.set("images", 2)
        visitor.instruction.fill(f"for {photo}")
    for visitor in visitors:
        visitor.page.click("#run")
    for visitor, photo, seed in zip(visitors, ("raccoon", "rocket"), (100, 200), strict=True):
        visitor.wait_until_done()
        assert f"seed {seed}" in visitor.page.inner_text("#gallery")
        visitor.wait_for_edits(2)
        assert f"instruction=for+{photo}&" in visitor.page.url
    first, second = (visitor.bytes_of(visitor.compared_images[0]) for visitor in visitors)
    assert first != second


@in_chromium
@pytest.mark.parametrize("by_key", [False, True], ids=["button", "escape"])
def test_stop(visit, by_key):
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.set("steps", 200)
    visitor.set("images", 16)
    visitor.instruction.fill("make it night")
    visitor.page.click("#run")
    visitor.wait_for_status(r"^Step \d+ of 200 · images \d+ to \d+ of 16", "no progress")
    assert visitor.page.locator("#run").is_disabled()
    if by_key:  # what is open is closed first, and the edit goes on
        visitor.page.locator("#scheduler input").click()
        visitor.page.wait_for_selector("#scheduler input[aria-expanded=true]")
        visitor.page.keyboard.press("Escape")
        visitor.page.wait_for_selector("#scheduler input[aria-expanded=false]")
        visitor.page.locator("#image button[aria-label=Fullscreen]").click()
        visitor.page.wait_for_selector(".block.fullscreen")
        visitor.page.keyboard.press("Escape")
        visitor.page.wait_for_selector(".fullscreen", state="detached")
        visitor.forget_status()
        visitor.wait_for_status(r"^Step \d+ of 200", "it was stopped")
    visitor.page.keyboard.press("Escape") if by_key else visitor.page.click("#stop")
    status = visitor.wait_for_status("^Stopped", "it does not stop")
    assert int(re.search(r"(\d+) of 16 images", status)[1]) < 16
    visitor.set("steps", 2)
    visitor.set("images", 1)
    visitor.edit("make it night")
    visitor.page.wait_for_selector("button#stop[disabled]")


@in_chromium
def test_link_restores_the_edit(visit):
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.page.check("#new_guidance input")
    visitor.page.check("#keep_size input")
    visitor.open_more_settings()
    visitor.set("resolution", 96)
    visitor.choose("scheduler", "euler_a")
    visitor.set("steps", 3)
    visitor.edit("give it a sepia tone & more")
    visitor.page.wait_for_function("document.querySelector('#link').querySelector('input, textarea').value")
    edited = visitor.bytes_of(visitor.compared_images[1])
    assert visitor.page.locator("#link").locator("input, textarea").input_value() == visitor.page.url

    other = visit("?" + visitor.page.url.split("?", 1)[1])
    assert other.instruction.input_value() == "give it a sepia tone & more"
    other.open_more_settings()
    names = ("seed", "steps", "images", "cfg_text", "cfg_image", "resolution")
    assert "resolution=96" in visitor.page.url
    assert [other.number(name) for name in names] == [visitor.number(name) for name in names]
    assert not other.page.is_checked("#new_seed input") and other.page.is_checked("#keep_size input")
    assert other.page.locator("#scheduler input").input_value() == "euler_a"
    assert Image.open(io.BytesIO(edited)).size == (640, 480)
    other.upload(PHOTOS / "raccoon.jpg")
    other.page.click("#run")
    other.wait_until_done()
    assert other.bytes_of(other.compared_images[1]) == edited


@in_chromium
def test_damaged_link(visit):
    visitor = visit("?steps=many&seed=5&model=none&instruction=<b>make it night</b>")
    assert "steps 'many'" in visitor.status() and "'none'" in visitor.status()
    assert visitor.number("seed") == 5 and visitor.instruction.input_value() == "<b>make it night</b>"


@in_chromium
def test_two_models_side_by_side(visit):
    """Each with its own settings; the slider compares both, and choosing the adapted one sets the sliders."""
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.page.uncheck("#new_seed input")
    visitor.choose("compare", "twin")
    visitor.set("steps", 3)
    visitor.set("seed", 1)
    visitor.set("images", 2)
    visitor.edit("make it night")
    visitor.wait_for_edits(4)
    captions = re.findall(r"\w+ · \d steps · seed \d", visitor.page.inner_text("#gallery"))
    assert captions == [f"{model} · seed {seed}" for seed in (1, 2) for model in ("editor · 3 steps", "twin · 4 steps")]
    visitor.edits.nth(3).click()
    visitor.page.get_by_text(f"image | {captions[3]}").wait_for()
    visitor.page.get_by_text("the two models").click()
    visitor.page.get_by_text(f"{captions[2]} | {captions[3]}").wait_for()

    visitor.choose("model", "twin")
    visitor.page.wait_for_function("document.querySelector('#steps input[type=number]').value === '4'")
    assert (visitor.number("cfg_text"), visitor.number("cfg_image")) == (1, 1)


@in_chromium
def test_example_and_reset(visit):
    visitor = visit("?seed=5")
    visitor.set("steps", 2)
    visitor.page.click("#example")
    visitor.wait_until_done()
    visitor.wait_for_edits(1)
    assert visitor.instruction.input_value()
    visitor.page.click("#reset")
    visitor.page.wait_for_function("document.querySelector('#steps input[type=number]').value === '20'")
    assert visitor.instruction.input_value() == "" and visitor.edits.count() == 0
    visitor.page.wait_for_function("location.search === ''")
    assert visitor.number("seed") == 1371 and visitor.page.is_checked("#new_seed input")


@in_chromium
def test_nothing_is_fetched_from_other_servers(visit, server):
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.set("steps", 1)
    visitor.edit("make it night")
    elsewhere = [url for url in visitor.requested if not url.startswith((server.url, "data:", "blob:"))]
    assert visitor.requested and elsewhere == []


@in_chromium
def test_tab_key_reaches_everything(visit):
    visitor = visit()
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.set("steps", 1)
    visitor.edit("make it night")
    visitor.instruction.focus()
    reached = []
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        reached.append(
            visitor.page.evaluate(
                "['run', 'stop', 'example', 'reset', 'comparison', 'gallery', 'again', 'link', 'images', 'steps',"
                " 'cfg_text', 'cfg_image', 'seed', 'new_seed', 'new_guidance', 'scheduler', 'keep_size']"
                ".find(id => document.getElementById(id)?.contains(document.activeElement))"
            )
        )
    order = list(dict.fromkeys(name for name in reached if name))
    assert order[:4] == ["run", "example", "reset", "comparison"]  # the stop button is disabled
    assert order[4:] == [
        "gallery",
        "again",
        "link",
        "images",
        "steps",
        "cfg_text",
        "cfg_image",
        "seed",
        "new_seed",
        "new_guidance",
        "scheduler",
        "keep_size",
    ]


@in_chromium
def test_no_horizontal_scrolling(visit):
    visitor = visit("?compare=twin&images=2&steps=1&seed=1")
    visitor.upload(PHOTOS / "raccoon.jpg")
    visitor.edit("a long instruction " * 12)
    for width in (320, 390, 690, 1000, 1920):
        visitor.page.set_viewport_size({"width": width, "height": 800})
        visitor.page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
        request, result, settings = (
            visitor.page.locator(f"#{name}").bounding_box() for name in ("request", "result", "settings")
        )
        if width < 700:  # one column, the result below the button
            assert request["y"] + request["height"] <= result["y"] and result["y"] + result["height"] <= settings["y"]
        else:
            assert request["x"] + request["width"] <= result["x"] and settings["x"] == request["x"]


def test_api_examples_of_the_docs(server, tmp_path):
    """The Python, curl and JavaScript code of docs/app.md, with another port; curl does not know the last values."""
    blocks = dict(
        re.findall(r"```(python|bash|js)\n((?:from|api=|import).*?)```", (REPOSITORY / "docs/app.md").read_text(), re.S)
    )
    shutil.copy(PHOTOS / "raccoon.jpg", tmp_path / "photo.jpg")
    printed = {}
    commands = {"python": [app.sys.executable, "-c"], "bash": ["bash", "-c"]}
    if NODE:
        commands["js"] = [NODE, "--input-type=module", "-e"]
    for language, command in commands.items():
        code = blocks[language].replace("http://127.0.0.1:7860", server.url.rstrip("/"))
        ended = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE / 1000)
        assert ended.returncode == 0, ended.stderr
        printed[language] = ended.stdout
    assert printed["python"].count(".png") == 2
    assert "'seed': 3" in printed["python"] and "'seed': 4" in printed["python"]
    assert "event: complete" in printed["bash"]
    if NODE:
        url, seeds = printed["js"].split(maxsplit=1)
        assert url.startswith(server.url) and Image.open(io.BytesIO(httpx.get(url).content)).format == "PNG"
        assert json.loads(seeds) == [3, 4]
    edits, facts = json.loads(printed["bash"].rsplit("data: ", 1)[1])
    assert facts["edits"][0]["seed"] == 3 and edits[0]["image"]["url"].startswith(server.url)


def test_api_with_two_models_and_mistakes(server, bad_files, tiny_editor, tmp_path):
    client = Client(server.url, verbose=False)
    settings = dict(instruction="make it snowy", model="editor", compare="twin", steps=2, seed=3, images=2)
    photo = handle_file(PHOTOS / "raccoon.jpg")
    edits, facts = client.predict(photo, **settings, api_name="/edit")
    assert [Path(edit["image"]).suffix for edit in edits] == [".png"] * 4
    assert [(fact["model"], fact["seed"], fact["steps"]) for fact in facts["edits"]] == [
        ("editor", 3, 2),
        ("editor", 4, 2),
        ("twin", 3, 4),
        ("twin", 4, 4),
    ]
    downloaded = Path(shutil.copy(edits[1]["image"], tmp_path / "download.png"))
    assert_repeats(downloaded, PHOTOS / "raccoon.jpg", tiny_editor)
    assert "instruction=make+it+snowy&model=editor&compare=twin&steps=2&seed=3" in facts["link"]
    for changes in ({"steps": 0}, {"instruction": ""}, {"model": "x"}, {"images": 17}):
        with pytest.raises(AppError):
            client.predict(photo, **(settings | changes), api_name="/edit")
    for changes, words in (({"cfg_text": "much"}, "Text guidance is 'much'"), ({"seed": [1]}, r"Seed is \[1\]")):
        with pytest.raises(AppError, match=f"{words}; it must be a number from "):
            client.predict(photo, **(settings | changes), api_name="/edit")
    assert client.predict(photo, **(settings | {"steps": "2"}), api_name="/edit")[1] == facts
    with pytest.raises(AppError, match="not an image"):
        client.predict(handle_file(bad_files / "text.png"), **settings, api_name="/edit")
    assert "exceeded" in upload(server, bad_files / "heavy.jpg")
    assert "Traceback" not in server.log.read_text()
    assert client.predict(photo, **settings, api_name="/edit")[1] == facts


def test_addresses_in_place_of_uploads_are_not_fetched(server):
    """Neither by the API nor by the events of the page. Gradio would fetch those of public servers."""
    client, log = Client(server.url, verbose=False), server.log.read_text()
    file = {"path": "http://127.0.0.1:1/private.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError, match="fetches no addresses"):
        client.predict(file, instruction="make it snowy", api_name="/edit")
    at_once = [event for event in client.config["dependencies"] if event["inputs"] and not event["queue"]]
    assert len(at_once) >= 3
    for event in at_once:
        body = {"data": [[file]] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "visitor"}
        answer = httpx.post(f"{server.url}gradio_api/run/predict", json=body)
        assert "fetches no addresses" in answer.text, event
    assert server.log.read_text() == log


def test_clients_that_leave_or_cancel_free_the_device(tiny_editor):
    """Of benchmarks/soak.py: four of ten clients ask for 3200 steps and are gone at once; the others are served."""
    command = [
        app.sys.executable,
        "benchmarks/soak.py",
        "--only=page",
        "--clients=10",
        "--at_once=8",
        f"--model={tiny_editor}",
    ]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE / 1000)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| edit | edited | 5 |" in ended.stdout and " 0 requests lost" in ended.stdout


def test_passwords_are_not_repeated(capsys, tmp_path, monkeypatch):
    """A message about --auth never has what was given."""
    (tmp_path / "logins").write_text("anna:first\nsecret-without-name\n")
    assert "line 2" in (message := error_of(capsys, "--model=a", f"--auth={tmp_path / 'logins'}"))
    assert "secret-without-name" not in message
    assert "put it into a file" in (message := error_of(capsys, "--model=a", "--auth=anna:s3cret"))
    assert "s3cret" not in message
    monkeypatch.setenv("EDITOR_AUTH", "s3cret")
    assert "EDITOR_AUTH" in (message := error_of(capsys, "--model=a")) and "s3cret" not in message
    assert "--root_path editor" in error_of(capsys, "--model=a", "--root_path=editor")


def test_flags_without_effect_on_a_local_folder(capsys, tiny_editor):
    message = error_of(capsys, f"--model={tiny_editor}", "--revision=main", "--single_file_config=owner/name")
    assert "--revision is for a --model on the Hub" in message
    assert "--single_file_config is for a --model in one file" in message


def test_login(guarded, chromium):
    """Without one nothing can be read, uploaded or edited, and the page works with it."""
    address = guarded.url.rstrip("/")
    for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x"):
        assert httpx.get(f"{address}/{path}").status_code == 401
    assert "Not authenticated" in upload(guarded, PHOTOS / "rocket.jpg")
    assert httpx.post(f"{address}/login", data={"username": "anna", "password": "wrong"}).status_code == 400
    client = Client(guarded.url, auth=("anna", "pass:word"), verbose=False)
    photo = handle_file(PHOTOS / "rocket.jpg")
    assert client.predict(photo, instruction="snow", steps=1, api_name="/edit")[0]
    assert "pass:word" not in guarded.log.read_text()
    command = Path(f"/proc/{guarded.process.pid}/cmdline")
    assert not command.exists() or b"pass:word" not in command.read_bytes()


def test_root_path(guarded):
    """The addresses that the server gives to clients are those of the proxy before it."""
    with httpx.Client() as client:
        login = client.post(f"{guarded.url}login", data={"username": "anna", "password": "pass:word"})
        assert login.status_code == 200
        config = client.get(f"{guarded.url}config").json()
    assert config["root"].endswith("/editor")


@pytest.fixture(scope="module")
def guarded(tiny_editor, tmp_path_factory):
    """A server with a login, behind a path of another server, with room for few files."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "logins").write_text("# who may edit\nanna:pass:word\n")
    flags = (f"--auth={folder / 'logins'}", "--root_path=/editor")
    server = Server(folder / "log", f"--model={tiny_editor}", *flags)
    yield server
    assert server.end() == 0, server.log.read_text()


def test_stored_files_have_a_total_limit(tiny_editor, tmp_path):
    """Refused before they are read; the other requests go on. The editor is one file."""
    model = write_single_file(load_editor(tiny_editor), tmp_path / "editor.safetensors")
    flags = (f"--model={model}", f"--single_file_config={tiny_editor}")
    server = Server(tmp_path / "log", *flags, "--max_stored_mb=0.5")
    try:
        assert upload(server, PHOTOS / "raccoon.jpg").startswith("[")
        (tmp_path / "large.png").write_bytes(bytes(600_000))
        assert "0.5 MB together, and there is no room" in upload(server, tmp_path / "large.png")
        assert "needs a Content-Length" in upload(server, PHOTOS / "rocket.jpg", "-H", "Transfer-Encoding: chunked")
        client, photo = Client(server.url, verbose=False), handle_file(PHOTOS / "raccoon.jpg")
        assert client.predict(photo, instruction="snow", steps=1, api_name="/edit")[0]
        several = [option for _ in range(20) for option in ("-F", f"files=@{PHOTOS / 'rocket.jpg'}")]
        assert "there is no room" in upload(server, PHOTOS / "rocket.jpg", *several)
    finally:
        assert server.end() == 0, server.log.read_text()


def test_adapter_and_vae_of_the_page(tiny_base, tiny_editor, tmp_path):
    """An adapter turns a text-to-image model into the editor; `infer.py --repeat` with the same flags agrees."""
    save_adapter(tmp_path / "adapter", load_trained(tiny_base, AdapterOptions(lora_rank=2)).unet)
    options = [f"--lora={tmp_path / 'adapter'}", f"--vae={tiny_editor / 'vae'}"]
    server = Server(tmp_path / "log", f"--model={tiny_base}", *options, "--lora_scale=0.5", "--no_safety_checker")
    try:
        settings = dict(instruction="snow", steps=2, negative_prompt="dark", guidance_rescale=0.5, api_name="/edit")
        client, photo = Client(server.url, verbose=False), handle_file(PHOTOS / "raccoon.jpg")
        edits, facts = client.predict(photo, scheduler="euler", karras_sigmas=True, **settings)
        assert facts["edits"][0]["guidance_rescale"] == 0.5 and "negative_prompt=dark" in facts["link"]
        downloaded = Path(shutil.copy(edits[0]["image"], tmp_path / "download.png"))
    finally:
        assert server.end() == 0, server.log.read_text()
    record = read_record(downloaded)
    assert record["adapter"]["scale"] == 0.5 and record["settings"]["no_safety_checker"] is True
    assert record["settings"]["karras_sigmas"] is True and record["settings"]["negative_prompt"] == "dark"
    assert_repeats(downloaded, PHOTOS / "raccoon.jpg", tiny_base, *options)
