"""app.py --publish_space: the files of the Space on a local Hub, and the page that they start."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from gradio_client import Client, handle_file

import app
from tests.adapters import load_trained
from tests.hub_server import Hub, Repo
from tests.runs import ENVIRONMENT, REPOSITORY
from utils.models.adapters import AdapterOptions, save_adapter
from utils.web import space

PAGE = "user/my-page"
BLOCKED = """
import sys
class Installed:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Installed, sys.meta_path)
"""
NOT_INSTALLED = ("datasets", "bitsandbytes", "wandb", "tensorboard", "openai", "xformers", "torchao", "matplotlib")


def publish(*flags: object) -> int:
    return app.main(["--publish_space=my-page", "--hub_token=write-token", *map(str, flags)])


def refused(capsys: pytest.CaptureFixture, *flags: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        publish(*flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def download(repo: Repo, folder: Path) -> Path:
    for name in repo.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(repo.read(name))
    return folder


def edit_in(folder: Path, log: Path) -> list:
    """Start the Space as the Hub does, with the packages that it installs there, and edit an image."""
    (folder.parent / "site").mkdir()
    (folder.parent / "site/sitecustomize.py").write_text(BLOCKED.format(names=NOT_INSTALLED))
    env = ENVIRONMENT | {"PYTHONPATH": str(folder.parent / "site")}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "space.py"], cwd=folder, env=env, stdout=output, stderr=output)
    try:
        while not (found := re.search(r"open http://[^:]+:(\d+)/", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        client = Client(f"http://127.0.0.1:{found[1]}/", verbose=False)
        photo = handle_file(REPOSITORY / "assets/photos/raccoon.jpg")
        return client.predict(photo, instruction="make it snowy", steps=1, api_name="/edit")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, log.read_text()


def test_space_with_a_local_editor_and_an_adapter(client: Hub, tiny_editor: Path, tmp_path: Path, monkeypatch, capsys):
    adapter = save_adapter(tmp_path / "style", load_trained(tiny_editor, AdapterOptions(lora_rank=2)).unet)
    flags = (f"--model={tiny_editor}", f"--lora={adapter}", "--lora_scale=0.5", "--resolution=64")
    assert publish(*flags, "--private", "--space_hardware=t4-small") == 0
    assert f"{client.url}/spaces/{PAGE}" in capsys.readouterr().out
    repo = client.repos[f"spaces/{PAGE}"]
    assert repo.private and repo.messages == ["initial commit", "Page of the editor"]
    assert not [name for name in repo.files if "__pycache__" in name or name.startswith((".venv", "tests/", "data"))]
    assert "write-token" not in "".join(repo.read(name).decode() for name in ("README.md", "space.py"))
    card = yaml.safe_load(repo.read("README.md").decode().split("---")[1])
    assert card["app_file"] == "space.py" and card["sdk"] == "gradio" and card["title"] == "My page"
    pins = repo.read("requirements.txt").decode().split()
    assert f"gradio=={card['sdk_version']}" in pins and not [pin for pin in pins if pin.startswith(NOT_INSTALLED)]
    assert [r.path for r in client.requests if r.path.endswith("/hardware")] == [f"/api/spaces/{PAGE}/hardware"]
    edits, facts = edit_in(download(repo, tmp_path / "space"), tmp_path / "log")
    assert Path(edits[0]["image"]).stat().st_size and facts["edits"][0]["model"] == tiny_editor.name
    # A new version replaces the files of the former one.
    serve_flags = ["--model=someone/editor", "--lora=someone/style", "--keep_models=1"]
    assert publish(*serve_flags) == 0
    assert not [name for name in repo.files if name.startswith("models/")]
    started = json.loads(re.search(r"main\((.*)\)\)", repo.read("space.py").decode())[1])
    assert started == ["--server_name=0.0.0.0", "--model=someone/editor", "--lora", "someone/style", "--keep_models=1"]
    card = yaml.safe_load(repo.read("README.md").decode().split("---")[1])
    assert card["models"] == ["someone/editor", "someone/style"]


def test_mistakes_are_reported_before_anything_is_sent(client: Hub, tiny_editor, tmp_path, monkeypatch, capsys):
    model = f"--model={tiny_editor}"
    assert "--server_port is for a server on this machine" in refused(capsys, model, "--server_port=8000")
    (tmp_path / "users").write_text("me:secret")
    message = refused(capsys, model, f"--auth={tmp_path / 'users'}")
    assert "add the secret EDITOR_AUTH=USER:PASSWORD in the settings" in message
    twin = tmp_path / "twin" / tiny_editor.name
    twin.parent.mkdir()
    os.symlink(tiny_editor, twin)
    other = tmp_path / "other" / tiny_editor.name
    other.mkdir(parents=True)
    (other / "model_index.json").write_text("{}")
    assert "have the same name" in refused(capsys, model, f"--model={other}")
    monkeypatch.setattr(space, "MAX_BYTES", 1000)
    assert "a Space may have 1e-06 GB: publish them as models" in refused(capsys, model)
    assert not client.requests
    with pytest.raises(SystemExit):
        app.main([model, "--private"])
    assert "--private is for --publish_space" in capsys.readouterr().err


def test_refusals_of_the_hub(client: Hub, capsys, monkeypatch):
    model = "--model=someone/editor"
    assert "may only read" in refused(capsys, model, "--hub_token=read-token")
    message = refused(capsys, model, "--space_hardware=a100-large")
    assert "is published, but the Hub refused --space_hardware a100-large" in message and "payment" in message.lower()
    monkeypatch.setattr(space, "make_space_card", lambda *_: "---\nsdk: gradio\ncolorFrom: beige\n---\n")
    message = refused(capsys, model)
    assert "the Hub refuses the front matter of the Space" in message and '"colorFrom" is not valid' in message
    assert client.repos[f"spaces/{PAGE}"].messages == ["initial commit", "Page of the editor"]
