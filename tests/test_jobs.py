"""Settings, files of jobs, records and previews."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.edits import edit_jobs, make_photos, make_service
from utils.editing.jobs import list_variants, make_slug, plan_input, plan_job_file
from utils.editing.previews import save_animations, save_sheets
from utils.editing.records import find_differences, read_record, record_for_pillow
from utils.editing.settings import (
    DEFAULT_SETTINGS,
    INSTRUCTIONS,
    SCALES,
    EditSettings,
    draw_instruction,
    draw_scales,
    find_setting_problems,
)
from utils.errors import InputError

QUICK = EditSettings(steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two wide photographs, a tall one and a broken file."""
    return make_photos(tmp_path / "photos")


# ---- names and settings ---------------------------------------------------------------------------------------------


def test_names_of_outputs() -> None:
    assert list(list_variants(["x"], 1)) == [("", "x", 0)]
    assert list(list_variants(["x"], 2)) == [("-1", "x", 0), ("-2", "x", 1)]
    named = [suffix for suffix, _, _ in list_variants(["Make it WINTER!", "日本", "?!", "a b", "a/b"], 1)]
    assert named == ["-make-it-winter", "-日本", "-3", "-a-b-4", "-a-b-5"]
    assert make_slug("../../etc/passwd") == "etc-passwd" and len(make_slug("very " * 50)) <= 40


def test_setting_problems() -> None:
    assert find_setting_problems({"steps": 4, "eta": 0.3, "guidance_interval": (0, 0.5), "seed": None}) == []
    for values, message in (
        ({"eta": 1.5}, "--eta 1.5: must be from 0 to 1"),
        ({"eta": True}, "--eta True"),
        ({"steps": "4"}, "--steps 4: must be"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan"),
        ({"guidance_interval": (0.5, 0.5)}, "--guidance_interval 0.5 0.5: must be two fractions"),
        ({"guidance_interval": [0, "1"]}, "two fractions"),
        ({"guidance_interval": 0.5}, "two fractions"),
        ({"randomize_cfg": True, "guidance_scale": 2.0}, "--randomize_cfg draws both"),
        ({"num_images": 0}, "--num_images 0"),
    ):
        problems = find_setting_problems(values)
        assert len(problems) == 1 and message in problems[0]


def test_seed_decides_what_is_drawn() -> None:
    drawn = {draw_instruction(seed, "a.jpg") for seed in range(200)}
    assert drawn <= set(INSTRUCTIONS) and len(drawn) > len(INSTRUCTIONS) / 2
    assert draw_instruction(5, "a.jpg") == draw_instruction(5, "a.jpg")
    assert any(draw_instruction(seed, "a.jpg") != draw_instruction(seed, "b.jpg") for seed in range(5))
    around = tuple(DEFAULT_SETTINGS[name] for name in SCALES)
    scales = [draw_scales(seed, around) for seed in range(200)]
    assert scales[3] == draw_scales(3, around) and len(set(scales)) > 150
    text, image = zip(*scales, strict=True)  # as edit_app.py draws them
    assert 6 <= min(text) < 6.2 and 8.8 < max(text) <= 9 and 1.2 <= min(image) < 1.25 and 1.75 < max(image) <= 1.8
    assert len({draw_scales(None, around) for _ in range(20)}) > 1  # without a seed not repeatable


# ---- a file of jobs -------------------------------------------------------------------------------------------------


def write_lines(folder: Path, *lines: dict | str) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "jobs.jsonl").write_text(text + "\n")
    return folder / "jobs.jsonl"


def test_lines_override_flags(photos: Path, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path,
        {"image": "photos/a.png", "edit": ["x", "y"], "seed": 5, "steps": 3, "guidance_interval": [0, 0.5]},
        "",
        {"image": "photos/b.png", "num_images": 2, "output": "named.jpg"},
        {"image": "https://example.org/photos/a.png?size=2", "edit": "z"},
    )
    jobs = plan_job_file(file, None, ["from the flag"], EditSettings(steps=7, eta=0.5))
    folder = tmp_path / "jobs-edited"
    assert [job.output.relative_to(folder).name for job in jobs] == [
        "a-1-x.png",
        "a-1-y.png",
        "named-1.jpg",
        "named-2.jpg",
        "a-4.png",
    ]
    assert [job.instruction for job in jobs] == ["x", "y", "from the flag", "from the flag", "z"]
    assert [(job.seed, job.offset) for job in jobs] == [(5, 0), (5, 0), (None, 0), (None, 1), (None, 0)]
    assert jobs[0].settings == EditSettings(steps=3, eta=0.5, guidance_interval=(0, 0.5))
    assert jobs[2].settings == EditSettings(steps=7, eta=0.5)
    assert jobs[0].read() == (photos / "a.png").read_bytes()


def test_mistakes_in_lines(photos: Path, tmp_path: Path) -> None:
    cases = {
        "{": "is not JSON",
        "[1]": "is not a JSON object",
        '{"edit": "x"}': '"image" is missing',
        '{"image": "a.png"}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": " "}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": []}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": ["x", 3]}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": "x", "stepz": 3}': "unknown key 'stepz': did you mean 'steps'?",
        '{"image": "a.png", "edit": "x", "steps": 2.5}': "steps 2.5: must be a whole number",
        '{"image": "a.png", "edit": "x", "steps": 0}': "steps 0: must be from 1",
        '{"image": "a.png", "edit": "x", "eta": NaN}': "eta nan",
        '{"image": "a.png", "edit": "x", "seed": -1}': "seed -1",
        '{"image": "a.png", "edit": "x", "keep_size": 1}': "keep_size 1: must be true or false",
        '{"image": "a.png", "edit": "x", "scheduler": "eulr"}': "scheduler 'eulr': choose one of ddim",
        '{"image": "a.png", "edit": "x", "output": "../b.png"}': "\"output\" '../b.png' must be a file name",
        '{"image": "a.png", "edit": "x", "output": "b.xyz"}': "\"output\" 'b.xyz' must be a file name",
    }
    for line, message in cases.items():
        file = write_lines(tmp_path, {"image": "a.png", "edit": "x"}, line)
        with pytest.raises(InputError) as caught:
            plan_job_file(file, None, [], QUICK)
        assert f"jobs.jsonl, line 2 {message}" in str(caught.value).replace("line 2:", "line 2"), line
    with pytest.raises(InputError, match="is empty"):
        plan_job_file(write_lines(tmp_path, ""), None, [], QUICK)
    with pytest.raises(InputError, match="and 90 more"):
        plan_job_file(write_lines(tmp_path, *["{"] * 100), None, [], QUICK)
    with pytest.raises(InputError, match="cannot be read"):
        plan_job_file(tmp_path / "nothing.jsonl", None, [], QUICK)
    line = {"image": "photos/a.png", "edit": "x", "output": "a.png"}
    with pytest.raises(InputError, match="two edits would be saved as"):
        plan_job_file(write_lines(tmp_path, line, line), None, [], QUICK)
    with pytest.raises(InputError, match="would overwrite its own image"):
        plan_job_file(write_lines(tmp_path, line), str(photos), [], QUICK)


def test_invalid_records(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    for name, text in (("json", "{"), ("list", "[1]"), ("old", '{"format": 0}')):
        path = tmp_path / f"{name}.png"
        settings = record_for_pillow(path, {})
        settings["pnginfo"].add_text("instruct_pix2pix", text)
        image.save(path, **settings)
        assert read_record(path) is None
    (tmp_path / "text.png").write_text("hello")
    assert read_record(tmp_path / "text.png") is None and read_record(tmp_path / "missing.png") is None
    assert record_for_pillow(tmp_path / "a.bmp", {"x": 1}) == {}
    assert find_differences({"batch": [0, 1], "seed": 1}, {"batch": [2, 4], "machine": {}, "seed": 1}) == []


# ---- previews -----------------------------------------------------------------------------------------------------


def test_animation_and_contact_sheet(editor, photos: Path, tmp_path: Path) -> None:
    jobs = plan_input(str(photos), str(tmp_path / "out"), ["x", "y"], EditSettings(steps=1))
    edit_jobs(make_service(editor), jobs, 0)
    for name, colour in (("a-x", "red"), ("a-y", "blue")):  # Pillow merges equal frames
        Image.new("RGB", (36, 24), colour).save(tmp_path / f"out/{name}.png")
    animations = save_animations(jobs)
    assert [path.name for path in animations] == ["a.gif", "b.gif", "tall.gif"]  # broken.png has none
    with Image.open(animations[0]) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (15, (256, 171), 0)
        stills = {}
        for index in range(15):
            animation.seek(index)
            stills[index] = animation.convert("RGB"), animation.info["duration"]
    for index, path in ((0, photos / "a.png"), (5, tmp_path / "out/a-x.png"), (10, tmp_path / "out/a-y.png")):
        shown, duration = stills[index]
        expected = np.asarray(Image.open(path).resize((256, 171), Image.Resampling.LANCZOS)).astype(int)
        assert duration == 1200 and np.abs(np.asarray(shown).astype(int) - expected).mean() < 25
    assert stills[1][1] == 80
    (sheet,) = save_sheets(jobs)
    assert sheet.name == "contact-sheet.png"
    with Image.open(sheet) as image:
        assert image.size == (3 * 256, 2 * (16 + 171) + 16 + 256)
    alone = plan_input(str(photos / "a.png"), str(tmp_path / "alone.png"), ["x"], EditSettings(steps=1))
    edit_jobs(make_service(editor), alone, 0)
    assert [path.name for path in (*save_animations(alone), *save_sheets(alone))] == ["alone.gif", "alone-grid.png"]
    missing = plan_input(str(photos / "a.png"), str(tmp_path / "none.png"), ["x"], QUICK)
    assert save_animations(missing) == [] and save_sheets(missing) == []
