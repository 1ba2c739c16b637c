"""Teachers of generate_dataset.py: each is loaded by the real code, generates edited images, and reports mistakes."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from data_preparation.tasks.cartoon import draw_cartoon
from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.tasks.plan import DEGRADATION_TASKS, plan_tasks
from data_preparation.tasks.teachers import describe_models
from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import Hub
from tests.test_generate_dataset import generate

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture
def phrasings(tmp_path) -> Path:
    path = tmp_path / "invert.txt"
    path.write_text("\n".join(f"invert the colours, phrasing {number}" for number in range(12)))
    return path


def save_negation(path: Path, shape: list, scale: float = -1.0, shift: float = 0.0) -> Path:
    """Save a network that returns scale * x + shift, as an exporter would."""
    value = onnx.helper.make_tensor_value_info
    constants = [
        onnx.numpy_helper.from_array(np.float32(number), name) for number, name in ((scale, "a"), (shift, "b"))
    ]
    nodes = [onnx.helper.make_node("Mul", ["x", "a"], ["m"]), onnx.helper.make_node("Add", ["m", "b"], ["y"])]
    graph = onnx.helper.make_graph(
        nodes, "negation", [value("x", 1, shape)], [value("y", 1, shape)], initializer=constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def invert(tmp_path: Path, phrasings: Path, teacher: str, *flags: str) -> list[dict]:
    return generate(
        tmp_path / "pairs", "--task", str(phrasings), "--teacher", teacher, "--max_num_samples", "6", *flags
    )


def test_degradation_tasks_have_degradations():
    assert set(DEGRADATION_TASKS) == set(DEGRADATIONS)


@pytest.mark.parametrize(
    ("shape", "flags", "scale", "shift"),
    [
        (["n", 3, "h", "w"], [], -1, 0),
        (["n", "h", "w", 3], ["--teacher_range", "0,255"], -1, 255),
        ([1, 3, "h", "w"], ["--teacher_range", "0,1", "--teacher_channels", "bgr", "--batch_size", "4"], -1, 1),
        (["n", 3, "h", "w"], ["--teacher_multiple", "32", "--crop", "none", "--resolution", "72"], -1, 0),
        (["n", 3, "h", "w"], ["--teacher_range", "0,1", "--teacher_output_range=-1,1"], -2, 1),
    ],
)
def test_onnx_ranges_layouts_and_sizes(shape, flags, scale, shift, tmp_path, phrasings):
    network = save_negation(tmp_path / "negation.onnx", shape, scale, shift)
    rows = invert(tmp_path, phrasings, f"onnx:{network}", *flags)
    assert len(rows) == 6
    for row in rows:
        assert np.abs(row["edited_image"].astype(int) - (255 - row["original_image"])).max() <= 1
        assert row["task"] == "invert" and row["edit_prompt"].startswith("invert the colours")
        assert '"id": "negation.onnx"' in row["models"] and str(tmp_path) not in str(row)


def test_onnx_network_with_a_fixed_size_returns_the_size_of_the_photograph(tmp_path, phrasings):
    network = save_negation(tmp_path / "fixed.onnx", [1, 3, 128, 128])
    rows = invert(tmp_path, phrasings, f"onnx:{network}", "--crop", "none")
    for row in rows:
        assert row["edited_image"].shape == row["original_image"].shape
        assert np.abs(row["edited_image"].astype(int) - (255 - row["original_image"])).mean() < 8


def test_python_function(tmp_path, phrasings):
    (tmp_path / "mine.py").write_text(
        "def invert(image):\n    return 255 - image\n"
        "def noisy(image, generator):\n"
        "    return image // 2 + generator.integers(0, 99, image.shape, dtype='uint8')\n"
    )
    for row in invert(tmp_path, phrasings, f"python:{tmp_path}/mine.py:invert"):
        assert np.array_equal(row["edited_image"], 255 - row["original_image"])
    noisy = [
        generate(tmp_path / name, "--task", str(phrasings), "--teacher", f"python:{tmp_path}/mine.py:noisy", *workers)
        for name, workers in (("a", ()), ("b", ("--num_workers", "2")))
    ]
    assert all(np.array_equal(one["edited_image"], two["edited_image"]) for one, two in zip(*noisy, strict=True))


@pytest.mark.parametrize(
    ("function", "message"), [("small", "same size"), ("absent", "cannot be loaded"), ("bad", "ZeroDiv")]
)
def test_python_function_errors(function, message, tmp_path, phrasings, capsys):
    (tmp_path / "mine.py").write_text("def small(image):\n    return image[::2]\ndef bad(image):\n    return 1 / 0\n")
    with pytest.raises(SystemExit):
        invert(tmp_path, phrasings, f"python:{tmp_path}/mine.py:{function}")
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_torchhub_needs_trust_remote_code(tmp_path, phrasings, capsys):
    repository = tmp_path / "zoo"
    repository.mkdir()
    (repository / "hubconf.py").write_text(
        "import torch\nclass Invert(torch.nn.Module):\n    def __init__(self, by):\n        super().__init__()\n"
        "        self.by = by\n    def forward(self, x):\n        return x * self.by\n"
        "def generator(by=1.0):\n    open(__file__ + '.ran', 'w').close()\n    return Invert(by)\n"
    )
    with pytest.raises(SystemExit):
        invert(tmp_path, phrasings, f"torchhub:{repository}:generator")
    assert "--trust_remote_code" in capsys.readouterr().err and not list(repository.glob("*.ran"))
    rows = invert(
        tmp_path,
        phrasings,
        f"torchhub:{repository}:generator",
        "--trust_remote_code",
        "--teacher_settings",
        '{"by": -1.0}',
    )
    for row in rows:
        assert np.abs(row["edited_image"].astype(int) - (255 - row["original_image"])).max() <= 1
        assert str(tmp_path) not in str(row)  # private


def test_revisions_of_code_change_with_all_of_it(tmp_path, monkeypatch):
    """Of a function: with the files beside it that it imports; of torch.hub: with any file of the repository."""
    mine, helper, deeper, other = (tmp_path / name for name in ("mine.py", "helper.py", "deep/er.py", "other.py"))
    deeper.parent.mkdir()
    mine.write_text("import numpy\nfrom helper import shade\ndef paint(image):\n    return image\n")
    helper.write_text("import deep.er\n")
    deeper.write_text("x = 1\n")
    other.write_text("x = 1\n")
    repository = tmp_path / "torch/hub/owner_zoo_v1"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text("from net_of_zoo import generator\n")
    (repository / "net_of_zoo.py").write_text("def generator():\n    return None\n")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def revisions() -> list[str]:
        teachers = (f"python:{mine}:paint", "torchhub:owner/zoo:v1:generator", f"torchhub:{repository}:generator")
        return [describe_models(teacher)[0]["revision"] for teacher in teachers]

    before = revisions()
    assert before[1] == before[2] and all(before)
    other.write_text("x = 2\n")
    assert revisions() == before
    deeper.write_text("x = 2\n")
    (repository / "net_of_zoo.py").write_text("def generator():\n    return 1\n")
    assert not set(revisions()) & set(before)


def test_diffusers_editor(tiny_editor, tmp_path, phrasings):
    """The edited images equal those of the stock pipeline for the instruction and the seed of the row."""
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    settings = '{"num_inference_steps": 2, "image_guidance_scale": 1.2}'
    rows = invert(tmp_path, phrasings, f"diffusers:{tiny_editor}", "--teacher_settings", settings, "--crop", "square")
    pipeline = DiffusionPipeline.from_pretrained(tiny_editor)
    for row in rows[:2]:
        generator = torch.Generator().manual_seed(row["settings"]["teacher_seed"])
        expected = pipeline(
            row["edit_prompt"],
            Image.fromarray(row["original_image"]),
            generator=generator,
            num_inference_steps=2,
            image_guidance_scale=1.2,
        ).images[0]
        expected = np.asarray(expected.resize(row["original_image"].shape[1::-1]))
        assert np.abs(row["edited_image"].astype(int) - expected).max() <= 1


def test_text_to_image_model_is_used_for_image_to_image(tiny_base, tmp_path, phrasings):
    rows = invert(
        tmp_path,
        phrasings,
        f"diffusers:{tiny_base}",
        "--teacher_prompt",
        "a painting",
        "--crop",
        "square",
        "--teacher_settings",
        '{"strength": 0.5, "num_inference_steps": 4}',
    )
    assert len(rows) == 6 and all(row["edited_image"].shape == row["original_image"].shape for row in rows)


def test_diffusers_model_from_the_hub(hub: Hub, tiny_base, tmp_path, phrasings, capsys, monkeypatch):
    """The first run downloads the model, the second finds it in the cache: both record and load the same commit."""
    connect_downloads(monkeypatch, hub.url, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # of the client that diffusers uses
    serve_folder(hub, "user/model", tiny_base)
    commit = hub.repos["models/user/model"].commits[-1][0]
    settings = '{"strength": 0.5, "num_inference_steps": 4}'
    flags = ["diffusers:user/model", "--crop", "square", "--teacher_settings", settings]
    rows = invert(tmp_path, phrasings, *flags)
    models = [{"id": "user/model", "revision": commit}]
    assert all(json.loads(row["models"]) == models for row in rows)
    assert json.loads((tmp_path / "pairs/manifest.json").read_text())["settings"]["tasks"]["invert"][2] == models
    assert len(invert(tmp_path, phrasings, *flags)) == len(rows)
    assert "already complete" in capsys.readouterr().out
    repo = hub.repos["models/user/model"]
    repo.commit("changed", dict(repo.files))
    with pytest.raises(SystemExit):  # the branch has moved, so the rows might differ
        invert(tmp_path, phrasings, *flags)
    assert "different settings" in capsys.readouterr().err


def test_diffusers_errors(tiny_base, tmp_path, phrasings, capsys):
    for teacher, flags, message in (
        ("diffusers:/nowhere", [], "cannot be loaded"),
        (f"diffusers:{tiny_base}", ["--teacher_settings", '{"colour": 1}'], "does not accept colour"),
    ):
        with pytest.raises(SystemExit):
            invert(tmp_path, phrasings, teacher, *flags)
        assert message in capsys.readouterr().err


def test_cartoon_keeps_the_size_and_draws_ink():
    generator = np.random.default_rng(0)
    image = np.full((96, 128, 3), 200, np.uint8)
    image[:, 64:] = 60
    image = np.clip(image + generator.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    cartoon = draw_cartoon(image)
    assert cartoon.shape == image.shape and cartoon.dtype == np.uint8
    assert cartoon[:, 10:40].std() < image[:, 10:40].std()  # flat where the image is
    assert cartoon[:, 60:68].min() < 60  # ink between light and dark


def test_teachers_of_tasks():
    tasks, problems = plan_tasks(["cartoonize", "fog", "derain=2"], ["cartoonize=python:x.py:f"])
    assert [task.teacher for task in tasks] == ["python:x.py:f", "exact", "degradation"] and tasks[2].weight == 2
    assert problems == ["--teacher python:x.py:f: the file x.py does not exist"]
    assert "did you mean cartoonize" in plan_tasks(["cartonize"], [])[1][0]
    assert "needs no teacher" in plan_tasks(["jpeg"], ["jpeg=opencv"])[1][0]
    assert "only draws cartoons" in plan_tasks(["fog"], ["opencv"])[1][0]
