"""Publishing: the real huggingface_hub client with the server of tests/hub_server.py."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image

from tests.hub_server import Hub, Refused, hub_server
from utils.errors import InputError
from utils.hub import check_push_rights, files_to_publish, redact, upload, upload_command
from utils.licences import read_license_fields
from utils.model_cards import TrainedModel, write_trained_card

SECRET = "hf_" + "q" * 34

# Run in a process with an empty cache: compare the pipelines from the Hub and the folder, then run the card's example.
LOAD_BACK = """
import sys
import numpy, torch
from PIL import Image
from diffusers import StableDiffusionInstructPix2PixPipeline
from huggingface_hub import hf_hub_download

repo_id, folder = sys.argv[1:]
image = Image.open(f"{folder}/validation/input.png")

def edit(source):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("sepia", image=image, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np")
    return output.images

published, local = edit(repo_id), edit(folder)
assert published.tobytes() == local.tobytes(), abs(published - local).max()
card = open(hf_hub_download(repo_id, "README.md"), encoding="utf-8").read()
snippet = card.split("```python\\n")[1].split("```")[0]
assert repo_id in snippet and folder not in snippet
exec(snippet)
assert Image.open("edited.png").size == (32, 26) and numpy.isfinite(local).all()
"""


@pytest.fixture
def trained(tiny_editor: Path, tmp_path: Path) -> Path:
    """The output folder of a run: the pipeline, its images, and files that must not be published."""
    folder = tmp_path / "my editor"
    shutil.copytree(tiny_editor, folder)
    unpublished = (
        "checkpoint-5/optimizer.bin",
        "checkpoint-5/unet/weights.safetensors",
        "checkpoint-6.tmp-1/half.bin",
        "logs/events.out.tfevents.1",
        "tracker/events.out.tfevents.2",
        "wandb/run/x.json",
        "trackio/x.db",
        "latent-cache/0.safetensors",
        "prompt-cache/0.safetensors",
        ".cache/x",
        "unet/.lock",
        "run.log",
        "validation/x.tmp",
    )
    for name in unpublished:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not published " + SECRET.encode())
    (folder / "validation").mkdir(exist_ok=True)
    for name in ("validation/input.png", "validation/step-5.png", "training_curve.png"):
        Image.effect_noise((40, 32), 60).convert("RGB").save(folder / name)
    (folder / "args.json").write_text(json.dumps({"hub_token": SECRET, "note": "write-token", "seed": 1}))
    return folder


def describe(repo_id: str | None = None, **changes) -> TrainedModel:
    command = ["accelerate", "launch", "train.py", "--hub_token", "other-secret", f"--hub_token={SECRET}", "--seed=1"]
    values = dict(
        base_model="someone/base",
        command=command,
        repo_id=repo_id,
        datasets=["someone/pairs", "/data/our pairs"],
        hyperparameters={"learning_rate": 5e-5, "note": "a|b", "hub_token": SECRET},
        results={"held-out loss": 0.25},
        widget=[("validation/input.png", 'make it "sepia": now')],
        samples=["validation/step-5.png"],
        curve="training_curve.png",
        resolution=32,
    )
    return TrainedModel(**{**values, **changes})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- from check to reload -------------------------------------------------------------------------------------------


def test_private_push_loads_back_and_edits_as_the_local_pipeline(client: Hub, trained: Path, tmp_path: Path):
    """Rights, card and upload; the downloaded pipeline edits like the local one; no token is published."""
    repo_id = check_push_rights(None, "write-token", trained, private=True)
    assert repo_id == "user/my-editor"
    write_trained_card(trained, describe(repo_id), token="write-token")
    before = snapshot(trained)
    assert upload(trained, repo_id, token="write-token", private=True) == f"{client.url}/user/my-editor"

    repo = client.repos["models/user/my-editor"]
    assert repo.private and repo.messages == ["initial commit", "End of training"]
    assert set(repo.files) == {".gitattributes", *files_to_publish(trained)}
    assert {"model_index.json", "README.md", "args.json", "validation/step-5.png"} <= set(repo.files)
    assert not [path for path in repo.files if b"not published" in repo.read(path)]
    stored = [path.read_bytes() for path in client.blobs.iterdir()]
    assert not [content for content in stored if any(word in content for word in (SECRET.encode(), b"write-token"))]
    assert json.loads(repo.read("args.json")) == {"hub_token": "HIDDEN", "note": "HIDDEN", "seed": 1}
    assert snapshot(trained) == before
    assert {request.token for request in client.requests if repo_id in request.path} == {"write-token"}

    # A second push of the same files does not make another commit.
    upload(trained, repo_id, token="write-token", private=True)
    assert len(repo.commits) == 2

    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(token=False).model_info(repo_id)
    run_in_fresh_cache(client, tmp_path, repo_id, trained)


def run_in_fresh_cache(hub: Hub, tmp_path: Path, repo_id: str, folder: Path) -> None:
    work = tmp_path / "elsewhere"
    work.mkdir()
    environment = hub.environment(tmp_path / "cache", token="read-token")
    command = [sys.executable, "-c", LOAD_BACK, repo_id, str(folder)]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert any("/resolve/" in request.path and request.status == 200 for request in hub.requests)


# --- the right to push ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("user/editor", None, ["hf auth login", "HF_TOKEN", "--hub_token"]),
        ("user/editor", "wrong-token", ["--hub_token", "wrong or expired", "settings/tokens"]),
        ("user/editor", "read-token", ["may only read", "user/editor", "role 'write'"]),
        ("user/existing", "read-token", ["may only read", "user/existing"]),
        ("other/editor", "write-token", ["other/editor", "choose a --hub_model_id under user or team"]),
        ("other/existing", "write-token", ["may not write to other/existing"]),
        ("user/a b", "write-token", ["--hub_model_id", "user/a b"]),
    ],
)
@pytest.mark.parametrize("create", [True, False])
def test_a_missing_right_is_reported_before_training(client: Hub, repo_id, token, words, create: bool):
    """Also for an existing repository that can be read, for which create_repo alone would pass."""
    HfApi(token="write-token").create_repo("user/existing")
    HfApi(token="other-token").create_repo("other/existing")
    with pytest.raises(InputError) as caught:
        check_push_rights(repo_id, token, "out", private=False, create=create)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert "-token" not in str(caught.value)
    assert set(client.repos) == {"models/user/existing", "models/other/existing"}


def test_sufficient_rights(client: Hub, monkeypatch: pytest.MonkeyPatch):
    """A name without namespace, an organization, an existing repository, a token in the environment, a dry run."""
    assert check_push_rights("editor", "write-token", "out", create=False) == "user/editor"
    assert not client.repos
    assert check_push_rights("editor", "write-token", "out") == "user/editor"
    assert check_push_rights("editor", "write-token", "out") == "user/editor"
    monkeypatch.setenv("HF_TOKEN", "write-token")
    assert check_push_rights("team/editor", None, "out", private=True) == "team/editor"
    assert not client.repos["models/user/editor"].private and client.repos["models/team/editor"].private


def test_private_is_not_published_into_a_public_repository(client: Hub):
    check_push_rights("editor", "write-token", "out")
    with pytest.raises(InputError, match="exists and is public"):
        check_push_rights("editor", "write-token", "out", private=True)


@pytest.mark.parametrize("create", [True, False])
def test_private_repository_of_another_user_is_refused(client: Hub, create: bool):
    HfApi(token="other-token").create_repo("other/hidden", private=True)
    with pytest.raises(InputError, match="may not write to other/hidden"):
        check_push_rights("other/hidden", "write-token", "out", create=create)


def test_unreachable_hub(client: Hub, monkeypatch: pytest.MonkeyPatch):
    """A server that hangs up, answers 500, or is not running, and offline mode."""
    client.hook = lambda method, path: (_ for _ in ()).throw(ConnectionError())
    with pytest.raises(InputError, match="cannot be reached"):
        check_push_rights("editor", SECRET, "out")
    client.hook = lambda method, path: (_ for _ in ()).throw(Refused(500, f"oops {SECRET}"))
    with pytest.raises(InputError, match="500") as caught:
        check_push_rights("editor", SECRET, "out")
    assert SECRET not in str(caught.value)
    client.stop()
    with pytest.raises(InputError, match="cannot be reached"):
        check_push_rights("editor", SECRET, "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        check_push_rights("editor", SECRET, "out")


# --- failures of the upload -----------------------------------------------------------------------------------------


def test_server_that_dies_during_the_upload(client: Hub, trained: Path, tmp_path: Path):
    """The message names the folder and a command, which then works; the Hub has no partial model."""
    repo_id = check_push_rights("user/editor", "write-token", trained)
    before = snapshot(trained)
    puts = []

    def die_at_the_second_file(method: str, path: str) -> None:
        if method == "PUT":
            puts.append(path)
        if len(puts) >= 2:
            client.stop()
            raise ConnectionError

    client.hook = die_at_the_second_file
    with pytest.raises(InputError) as caught:
        upload(trained, repo_id, token="write-token", private=True, waits=(0, 0))
    message = str(caught.value)
    assert f"complete in {trained}" in message and upload_command(trained, repo_id, True) in message
    assert "write-token" not in message and snapshot(trained) == before
    assert client.repos[f"models/{repo_id}"].messages == ["initial commit"]

    client.hook = lambda method, path: None
    client.start()
    hf = Path(sys.executable).with_name("hf")
    environment = client.environment(tmp_path / "cache", token="write-token")
    command = message.splitlines()[-1].replace("hf upload", f"{hf} upload", 1)
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(client.repos[f"models/{repo_id}"].files) == {".gitattributes", *files_to_publish(trained)}


def test_a_temporary_failure_is_retried(client: Hub, trained: Path):
    """A connection that breaks and a server error: the third attempt succeeds, with one commit."""
    repo_id = check_push_rights("user/editor", "write-token", trained)
    failures = [ConnectionError(), Refused(503, "busy")]

    def fail_twice(method: str, path: str) -> None:
        if "/commit/" in path and failures:
            raise failures.pop(0)

    client.hook = fail_twice
    upload(trained, repo_id, token="write-token")
    assert not failures and client.repos[f"models/{repo_id}"].messages == ["initial commit", "End of training"]


def test_a_refusal_is_not_retried(client: Hub, trained: Path):
    """A token revoked during training: one attempt, and the command to upload later."""
    check_push_rights("user/editor", "write-token", trained)
    with pytest.raises(InputError, match="hf upload user/editor"):
        upload(trained, "user/editor", token="read-token")
    assert [request.status for request in client.requests if "preupload" in request.path] == [403]


# --- the model card -------------------------------------------------------------------------------------------------


def test_the_card_has_every_field(trained: Path):
    (trained / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    )
    data = ModelCard.load(write_trained_card(trained, describe("user/editor"))).data.to_dict()
    assert data["base_model"] == "someone/base" and data["datasets"] == ["someone/pairs"]
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("diffusers", "image-to-image", "other")
    kinds = ["stable-diffusion", "stable-diffusion-diffusers", "instruct-pix2pix", "image-to-image"]
    assert data["tags"] == [*kinds, "diffusers", "diffusers-training"]
    source = f"{constants.ENDPOINT}/user/editor/resolve/main/validation/input.png"
    assert data["widget"] == [{"src": source, "prompt": 'make it "sepia": now'}]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    text = (trained / "README.md").read_text("utf-8")
    wanted = (
        "fill in `license`",
        "accelerate launch train.py --hub_token HIDDEN --hub_token=HIDDEN --seed=1",
        "](training_curve.png)",
        "](validation/step-5.png)",
        "| learning_rate | 5e-05 |",
        "| note | a\\|b |",
        "`our pairs`",
        "v_prediction",
        "rescale_betas_zero_snr=True",
        "Limitations and bias",
        "from_pretrained(model",
    )
    assert not [words for words in wanted if words not in text]
    assert SECRET not in text and "other-secret" not in text and "/data/" not in text
    assert not (trained / ".README.md").exists()


def test_the_card_has_the_licence_of_a_local_base(trained: Path, tmp_path: Path):
    """Local paths are not in the metadata, because the Hub only accepts ids."""
    base = tmp_path / "toy base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Base\n")
    write_trained_card(
        trained, describe(None, base_model=str(base), datasets=[str(tmp_path)], widget=(), results={"x": float("nan")})
    )
    card = ModelCard.load(trained / "README.md")
    assert card.data.license == "creativeml-openrail-m" and "OpenRAIL" in card.text and "`toy base`" in card.text
    assert not {"base_model", "datasets", "widget", "model-index"} & set(card.data.to_dict())
    assert "## Samples" in card.text and "## Results" in card.text
    assert str(tmp_path) not in card.content


def test_the_licence_of_a_hub_base(client: Hub):
    content = "---\nlicense: other\nlicense_name: sd-licence\nlicense_link: LICENSE.md\n---\n"
    api = HfApi(token="write-token")
    api.create_repo("user/base", private=True)
    api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="user/base")
    known = {"license": "other", "license_name": "sd-licence", "license_link": "LICENSE.md"}
    assert read_license_fields("user/base", "write-token") == known
    assert read_license_fields("user/base") == {} and read_license_fields("user/none", "write-token") == {}


def test_user_values_cannot_change_the_card(trained: Path):
    """Template syntax, code fences and table cells in prompts, names and values are plain text in the card."""
    hostile = "{{ 6007 * 7 }} {% if x %} ```\n## Injected | `"
    model = describe(
        None,
        base_model=f"/models/{hostile}",
        datasets=[f"/data/{hostile}"],
        hyperparameters={"note": hostile},
        command=["train.py", hostile],
        widget=[("validation/input.png", hostile)],
    )
    card = ModelCard.load(write_trained_card(trained, model))
    assert "42049" not in card.content and card.text.count("{{ 6007 * 7 }}") == 7
    assert card.data.to_dict()["widget"][0]["prompt"] == hostile
    fences = [line for line in card.text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "````bash", "````"]
    assert not re.search("^## Injected", re.sub(r"(?s)````bash.*?````", "", card.text), re.MULTILINE)


def test_redact_hides_only_tokens():
    command = redact(["--hub_token", "abc", "--hub_tok=x", "--seed", "1"])
    assert command == ["--hub_token", "HIDDEN", "--hub_tok=HIDDEN", "--seed", "1"]
    assert redact(f"x --hub_token 'a b' {SECRET} https://me:pw@host/x.png", "pw2") == (
        "x --hub_token 'HIDDEN' HIDDEN https://HIDDEN@host/x.png"
    )
    assert (
        redact("{'hub_token': 'abc', 'hub_model_id': 'user/x'}") == "{'hub_token': 'HIDDEN', 'hub_model_id': 'user/x'}"
    )
    assert json.loads(redact('{"hub_token": null, "a": "s3cret"}', "s3cret")) == {"hub_token": None, "a": "HIDDEN"}
    harmless = "hf_hub_download(model, 'x') --hub_model_id user/hf_xet --push_to_hub https://huggingface.co/a@b"
    assert redact(harmless) == harmless


def test_dataset_from_the_server(hub: Hub, tmp_path: Path):
    """The server also supports `load_dataset` and `push_to_hub` (used by the data tests)."""
    program = (
        "import datasets\n"
        "rows = datasets.Dataset.from_dict({'prompt': ['a', 'b', 'c']})\n"
        "rows.push_to_hub('user/pairs', private=True)\n"
        "for streaming in (False, True):\n"
        "    loaded = datasets.load_dataset('user/pairs', split='train', streaming=streaming)\n"
        "    assert [row['prompt'] for row in loaded] == ['a', 'b', 'c']\n"
    )
    environment = hub.environment(tmp_path / "cache", token="write-token")
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_stopped_server_frees_its_port(tmp_path: Path):
    with hub_server(tmp_path) as served, socket.create_connection(("127.0.0.1", served.port)):
        served.stop()
        served.start()
        assert served.url.endswith(str(served.port))
