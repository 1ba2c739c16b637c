"""evaluation/benchmark.py as its user runs it, on a tiny editor."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from evaluation import benchmark
from tests.encoders import save_clip, save_dino
from tests.pairs import make_image
from tests.runs import TORCHRUN, run
from tests.test_metrics import save_samples


@pytest.fixture(scope="module")
def flags(tiny_editor, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All flags but --dataset_name and --output_dir."""
    folder = tmp_path_factory.mktemp("benchmark")
    encoders = [f"--clip_model={save_clip(folder / 'clip')}", f"--dino_model={save_dino(folder / 'dino')}"]
    return [f"--model={tiny_editor}", *encoders, "--steps=2", "--resolution=32", "--batch_size=3"]


def results_of(folder: Path) -> dict:
    return {name: value for name, value in json.loads((folder / "results.json").read_text()).items() if name != "flags"}


def save_turns(folder: Path) -> Path:
    """MagicBrush's columns: two sessions of two turns and one; the source of a turn is the target of the one before."""
    images = [make_image(index, (40, 40)) for index in range(5)]
    rows = {"img_id": ["7", "7", "8"], "turn_index": [1, 2, 1], "instruction": ["a", "b", "c"]}
    rows |= {"source_img": [images[0], images[1], images[3]], "target_img": [images[1], images[2], images[4]]}
    dataset = datasets.Dataset.from_dict(rows)
    for column in ("source_img", "target_img"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(str(folder))
    return folder


def test_a_table_beside_the_input_and_the_vae(flags, tiny_editor, tmp_path):
    """The same from two processes; a second editor with the same name has rows of its own."""
    data = save_samples(tmp_path / "data")
    other = shutil.copytree(tiny_editor, tmp_path / "other" / Path(tiny_editor).name)
    more = [f"--dataset_name={data}", "--vae_round_trip", f"--model={other}"]
    assert benchmark.main([*flags, *more, f"--output_dir={tmp_path / 'one'}"]) == 0
    run("evaluation/benchmark.py", [*flags, *more, f"--output_dir={tmp_path / 'two'}"], TORCHRUN)
    results = results_of(tmp_path / "one")
    assert results == results_of(tmp_path / "two")
    names = list(results["rows"])
    assert names[:2] == ["input, not edited", "target through the VAE"] and len(names) == 4
    assert results["rows"][names[2]] == results["rows"][names[3]]  # the same weights
    assert results["rows"]["input, not edited"]["source_l1"]["mean"] == 0
    edits = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "one/edits" / names[2]).glob("*.png"))]
    targets = [np.asarray(image) for image in datasets.load_from_disk(str(data))["edited_image"]]
    l1 = np.mean([np.abs(edit / 255 - target / 255).mean() for edit, target in zip(edits, targets, strict=True)])
    assert results["rows"][names[2]]["l1"]["mean"] == pytest.approx(l1)
    table = (tmp_path / "one/results.md").read_text()
    assert "| input, not edited |" in table and "psnr ↑" in table and "l1 ↓" in table and "4 samples" in table


def test_the_turns_of_magicbrush(flags, tmp_path):
    """Single: from the true input of each turn. Multi: from the edit of the turn before, and only the last counts."""
    data = f"--dataset_name={save_turns(tmp_path / 'data')}"
    tables = {}
    for name in ("magicbrush", "magicbrush_multi"):
        more = [data, f"--benchmark={name}", "--dataset_split=train", "--batch_size=1"]
        more.append(f"--output_dir={tmp_path / name}")
        assert benchmark.main([*flags, *more]) == 0
        tables[name] = results_of(tmp_path / name)
        assert "published" in (tmp_path / name / "results.md").read_text()
    counts = [table["rows"]["input, not edited"]["l1"]["count"] for table in tables.values()]
    assert counts == [3, 2]
    single, multi = (
        {path.name: Image.open(path).tobytes() for path in (tmp_path / name / "edits").rglob("*.png")}
        for name in tables
    )
    assert single.keys() == multi.keys()
    assert [single[name] == multi[name] for name in sorted(single)] == [True, False, True]


def test_without_target_images(flags, tmp_path):
    """Emu Edit's columns: only captions and the input are compared."""
    rows = {"image": [make_image(index) for index in range(2)], "instruction": ["a", "b"]}
    rows |= {"input_caption": ["one", "two"], "output_caption": ["uno", "two"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "data"))
    more = ["--benchmark=emu_edit", f"--dataset_name={tmp_path / 'data'}", "--dataset_split=train"]
    assert benchmark.main([*flags, *more, f"--output_dir={tmp_path / 'out'}"]) == 0
    scores = results_of(tmp_path / "out")["rows"]["input, not edited"]
    assert scores["clip_direction"] == {"mean": 0, "low": 0, "high": 0, "count": 1}  # the other captions are equal
    assert scores["source_l1"]["mean"] == 0 and "l1" not in scores
    assert "Emu Edit, published" in (tmp_path / "out/results.md").read_text()


def make_official(name: str, folder: Path) -> tuple[Path, list[str]]:
    """(input of a benchmark with two images, files that its scorer expects)."""
    images = [make_image(index, (40, 40)) for index in range(2)]
    if name == "gedit":
        rows = {"task_type": ["style", "add"], "instruction_language": ["en", "cn"], "key": ["a1", "b2"]}
        rows |= {"input_image": images, "input_image_raw": images, "instruction": ["be red", "be blue"]}
        dataset = datasets.Dataset.from_dict(rows)
        for column in ("input_image", "input_image_raw"):
            dataset = dataset.cast_column(column, datasets.Image())
        dataset.save_to_disk(str(folder))
        files = [f"fullset/{place}{end}.png" for place in ("style/en/a1", "add/cn/b2") for end in ("", "_SRCIMG")]
        return folder, [f"editor/{file}" for file in files]
    if name == "imgedit":
        entries = {str(i): {"id": f"animal/{i}.jpg", "prompt": "be red", "edit_type": "adjust"} for i in range(2)}
        (folder / "original_images/animal").mkdir(parents=True)
        for index, image in enumerate(images):
            image.save(folder / f"original_images/animal/{index}.jpg")
        (folder / "basic_edit.json").write_text(json.dumps(entries))
        return folder, ["editor/0.png", "editor/1.png"]
    (folder / "count_change").mkdir(parents=True)
    images[0].save(folder / "count_change/1.png")
    entries = {"1": {"ori_img": "1.png", "ins_en": "be red"}, "2": {"ori_img": ["1.png", "3.png"], "ins_en": "join"}}
    (folder / "count_change/annotation.json").write_text(json.dumps(entries))
    return folder, ["results/editor/count_change/1.jpg"]


@pytest.mark.parametrize("name", ["gedit", "imgedit", "kris"])
def test_layouts_of_official_scorers(name, flags, tmp_path, capsys):
    data, files = make_official(name, tmp_path / "data")
    more = [f"--benchmark={name}", f"--dataset_name={data}", "--clip_model=none", "--dino_model=none"]
    assert benchmark.main([*flags, *more, f"--output_dir={tmp_path / 'out'}"]) == 0
    found = [
        path.relative_to(tmp_path / "out/official").as_posix() for path in (tmp_path / "out/official").rglob("*.*")
    ]
    assert sorted(found) == sorted(files)
    assert all(Image.open(tmp_path / "out/official" / file).size == (40, 40) for file in files)


OUTSIDE = ("imgedit", '{"x": {"id": "../../a.jpg", "prompt": "b"}}')


def test_damaged_inputs_of_official_scorers(flags, tmp_path, capsys):
    for name, content in (
        ("imgedit", '{"../x": {"id": "a.jpg", "prompt": "b"}}'),
        ("imgedit", "["),
        ("kris", None),
        OUTSIDE,
    ):
        if content:
            (tmp_path / "basic_edit.json").write_text(content)
        with pytest.raises(SystemExit):
            benchmark.main(
                [*flags, f"--benchmark={name}", f"--dataset_name={tmp_path}", f"--output_dir={tmp_path / 'o'}"]
            )
        assert "--dataset_name" in (message := capsys.readouterr().err) and "Traceback" not in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--dataset_name is missing"),
        (
            ["--dataset_name=x", "--edited_image_column=none", "--vae_round_trip"],
            "--vae_round_trip needs target images",
        ),
        (["--dataset_name=x", "--guidance_scale=-1"], "--guidance_scale -1.0: must be"),
    ],
)
def test_mistakes_are_named(more, message, flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*flags, *more, f"--output_dir={tmp_path}"])
    assert message in capsys.readouterr().err
