"""What is edited in a run, in which batches, what is recorded, and what a second run does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pairs import make_noise
from utils.editing.edit_images import OutOfMemory, edit_images, fit_to_model
from utils.editing.job_files import plan_lines
from utils.editing.jobs import Recommended, Settings, find_setting_problems, list_variants, make_slug, plan_jobs
from utils.editing.previews import save_animations, save_sheets
from utils.editing.random_edits import INSTRUCTIONS, draw_instruction, draw_scales
from utils.editing.records import find_differences, read_record, record_settings
from utils.editing.service import EditRun
from utils.errors import InputError

QUICK = Settings(steps=2)
ORIGIN = {"model": {"name": "m", "weights": "w"}, "machine": {"device": "cpu"}, "settings": {"dtype": "fp32"}}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two wide photographs, a tall one and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a", (60, 40)), ("b", (60, 40)), ("tall", (40, 60))):
        make_noise(size[::-1], seed=len(name) + ord(name[0])).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


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
        ({"guidance_interval": (0.5, 0.5)}, "--guidance_interval 0.5 0.5: must be two shares"),
        ({"guidance_interval": [0, "1"]}, "two shares"),
        ({"guidance_interval": 0.5}, "two shares"),
        ({"randomize_cfg": True, "guidance_scale": 2.0}, "--randomize_cfg draws the two"),
        ({"num_images": 0}, "--num_images 0"),
    ):
        problems = find_setting_problems(values)
        assert len(problems) == 1 and message in problems[0]


def test_draws_are_by_the_seed() -> None:
    drawn = {draw_instruction(seed, "a.jpg") for seed in range(200)}
    assert drawn <= set(INSTRUCTIONS) and len(drawn) > len(INSTRUCTIONS) / 2
    assert draw_instruction(5, "a.jpg") == draw_instruction(5, "a.jpg")
    assert any(draw_instruction(seed, "a.jpg") != draw_instruction(seed, "b.jpg") for seed in range(5))
    own = Recommended()
    around = (own.guidance_scale, own.image_guidance_scale)
    scales = [draw_scales(seed, around) for seed in range(200)]
    assert scales[3] == draw_scales(3, around) and len(set(scales)) > 150
    text, image = zip(*scales, strict=True)  # as edit_app.py draws them
    assert 6 <= min(text) < 6.2 and 8.8 < max(text) <= 9 and 1.2 <= min(image) < 1.25 and 1.75 < max(image) <= 1.8
    assert len({draw_scales(None, around) for _ in range(20)}) > 1  # without a seed anew


# ---- a file of jobs -------------------------------------------------------------------------------------------------


def write_lines(folder: Path, *lines: dict | str) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "jobs.jsonl").write_text(text + "\n")
    return folder / "jobs.jsonl"


def test_lines_win_over_flags(photos: Path, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path,
        {"image": "photos/a.png", "edit": ["x", "y"], "seed": 5, "steps": 3, "guidance_interval": [0, 0.5]},
        "",
        {"image": "photos/b.png", "num_images": 2, "output": "named.jpg"},
        {"image": "https://example.org/photos/a.png?size=2", "edit": "z"},
    )
    jobs = plan_lines(file, None, ["from the flag"], Settings(steps=7, eta=0.5))
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
    assert jobs[0].settings == Settings(steps=3, eta=0.5, guidance_interval=(0, 0.5))
    assert jobs[2].settings == Settings(steps=7, eta=0.5)
    assert jobs[0].read() == (photos / "a.png").read_bytes()


def test_mistakes_in_lines(photos: Path, tmp_path: Path) -> None:
    cases = {
        "{": "is no JSON",
        "[1]": "is no JSON object",
        '{"edit": "x"}': '"image" is missing',
        '{"image": "a.png"}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": " "}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": []}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": ["x", 3]}': '"edit" is missing or empty',
        '{"image": "a.png", "edit": "x", "stepz": 3}': "'stepz' is not known: did you mean 'steps'?",
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
            plan_lines(file, None, [], QUICK)
        assert f"jobs.jsonl: line 2: {message}" in str(caught.value), line
    with pytest.raises(InputError, match="is empty"):
        plan_lines(write_lines(tmp_path, ""), None, [], QUICK)
    with pytest.raises(InputError, match="and 90 more"):
        plan_lines(write_lines(tmp_path, *["{"] * 100), None, [], QUICK)
    with pytest.raises(InputError, match="cannot be read"):
        plan_lines(tmp_path / "nothing.jsonl", None, [], QUICK)
    line = {"image": "photos/a.png", "edit": "x", "output": "a.png"}
    with pytest.raises(InputError, match="two edits would be saved as"):
        plan_lines(write_lines(tmp_path, line, line), None, [], QUICK)
    with pytest.raises(InputError, match="would overwrite its own image"):
        plan_lines(write_lines(tmp_path, line), str(photos), [], QUICK)


# ---- runs -----------------------------------------------------------------------------------------------------------


def make_run(editor, said: list[str] | None = None, **settings) -> EditRun:
    return EditRun(editor, ORIGIN, say=(said if said is not None else []).append, **settings)


def test_each_image_and_prompt_is_encoded_once_in_a_run(editor, photos: Path, tmp_path: Path) -> None:
    """Three images by two instructions with two seeds, in batches of four of a size."""
    counts, rows = {"texts": 0, "images": 0}, []

    def count(name: str):
        def hook(module, inputs, output) -> None:
            counts[name] += inputs[0].shape[0]

        return hook

    hooks = [
        editor.text_encoder.register_forward_hook(count("texts")),
        editor.vae.encoder.register_forward_hook(count("images")),
        editor.unet.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0])),
    ]
    jobs = plan_jobs(str(photos), str(tmp_path / "out"), ["x", "y"], Settings(steps=1, image_guidance_scale=1.0), 2)
    done = []
    try:
        outcome = make_run(editor, batch_size=4, on_edits=done.append).edit(jobs, seed=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {"texts": 3, "images": 3}  # with the null prompt
    assert rows == [8, 8, 8]  # two branches of four, for twelve edits
    assert (outcome.edited, outcome.finished, len(outcome.problems)) == (12, 0, 4)
    assert all("broken.png: not an image" in problem for problem in outcome.problems)
    assert sum(done) == len(jobs) == 16
    expected = edit_images(
        editor,
        [fit_to_model(Image.open(photos / "b.png"), editor)],
        ["y"],
        seeds=[4],
        num_inference_steps=1,
        image_guidance_scale=1.0,
    )[0]
    assert np.abs(pixels_of(tmp_path / "out/b-y-2.png") - np.asarray(expected).astype(int)).max() <= 1


def test_second_run_skips_what_is_finished(editor, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").unlink()
    out, said = tmp_path / "out", []
    jobs = plan_jobs(str(photos), str(out), ["x"], QUICK)
    first = make_run(editor, said).edit(jobs)  # no seed: drawn
    assert (first.edited, said) == (3, [])
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    (out / "tall.png").unlink()
    second = make_run(editor, said).edit(jobs)
    assert (second.edited, second.finished, second.seed, said) == (1, 2, first.seed, [])
    assert (out / "tall.png").read_bytes() == before["tall.png"][1]  # gone on with the seed of the first run
    assert (out / "a.png").stat().st_mtime_ns == before["a.png"][0]

    other = plan_jobs(str(photos), str(out), ["x"], Settings(steps=3, eta=1.0))
    third = make_run(editor, said).edit(other, first.seed)
    assert (third.edited, third.finished) == (3, 0)
    assert said == [
        f"{out / name} was replaced: the one that stood there had eta none, not 1.0; steps 2, not 3"
        for name in ("a.png", "b.png", "tall.png")
    ]
    said.clear()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    Image.new("RGB", (8, 8)).save(out / "b.png")
    fourth = make_run(editor, said).edit(other, first.seed)
    assert (fourth.edited, fourth.finished) == (2, 1)
    assert "input digest" in said[0] and "no record of an edit in it" in said[1]
    trained = ORIGIN | {"model": {"name": "m", "weights": "others"}}
    fifth = EditRun(editor, trained, say=said.append).edit(other, first.seed)
    assert fifth.edited == 3 and "model weights w, not others" in said[-1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_records_are_kept_by_the_formats(editor, photos: Path, tmp_path: Path, suffix: str) -> None:
    """And hold no folder of this machine."""
    output = tmp_path / f"edited.{suffix}"
    jobs = plan_jobs(str(photos / "a.png"), str(output), ['日本 "x" ü'], QUICK)
    assert make_run(editor).edit(jobs, 3).edited == 1
    record = read_record(output)
    assert (record["instruction"], record["seed"], record["input"]["name"]) == ('日本 "x" ü', 3, "a.png")
    assert record["settings"]["scheduler"] == "DDIMScheduler" and record["settings"]["steps"] == 2
    assert record["model"] == ORIGIN["model"] and record["batch"] == [0, 1]
    assert str(tmp_path) not in json.dumps(record) and str(tmp_path).encode() not in output.read_bytes()
    assert make_run(editor).edit(jobs, 3).finished == 1
    assert make_run(editor).edit(jobs, 4).edited == 1


def test_what_is_no_record(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    for name, text in (("json", "{"), ("list", "[1]"), ("old", '{"format": 0}')):
        path = tmp_path / f"{name}.png"
        settings = record_settings(path, {})
        settings["pnginfo"].add_text("instruct_pix2pix", text)
        picture.save(path, **settings)
        assert read_record(path) is None
    (tmp_path / "text.png").write_text("hello")
    assert read_record(tmp_path / "text.png") is None and read_record(tmp_path / "missing.png") is None
    assert record_settings(tmp_path / "a.bmp", {"x": 1}) == {}
    assert find_differences({"batch": [0, 1], "seed": 1}, {"batch": [2, 4], "machine": {}, "seed": 1}) == []


def test_batch_is_halved_where_the_memory_is_too_small(editor, photos: Path, tmp_path: Path, monkeypatch) -> None:
    """The edits are those of a large memory; what does not fit alone is told, and the others go on."""
    sizes, said = [], []

    def limited(pipeline, images, prompts, **settings):
        sizes.append(len(images))
        if len(images) > 2 or "huge" in prompts:
            raise OutOfMemory("out of memory: take fewer images at once")
        return edit_images(pipeline, images, prompts, **settings)

    monkeypatch.setattr("utils.editing.service.edit_images", limited)
    jobs = plan_jobs(str(photos / "a.png"), str(tmp_path / "out.png"), ["x"], QUICK, 8)
    run = make_run(editor, said, batch_size=8)
    assert run.edit(jobs, 0).edited == 8
    assert sizes == [8, 4, 2, 2, 2, 2] and run.batch_size == 2
    assert said == [f"out of memory with {n} images at once: going on with {n // 2}" for n in (8, 4)]
    expected = edit_images(
        editor, [fit_to_model(Image.open(photos / "a.png"), editor)], ["x"], seeds=[7], num_inference_steps=2
    )[0]
    assert np.abs(pixels_of(tmp_path / "out-8.png") - np.asarray(expected).astype(int)).max() <= 1
    outcome = make_run(editor, said).edit(plan_jobs(str(photos / "a.png"), str(tmp_path / "o.png"), ["huge"], QUICK), 0)
    assert outcome.edited == 0 and outcome.problems == ["a.png: out of memory: take fewer images at once"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_recognized(editor, photos: Path, monkeypatch, error: RuntimeError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(editor.unet, "forward", fail)
    with pytest.raises(OutOfMemory, match="fewer images at once"):
        edit_images(editor, [Image.open(photos / "a.png").resize((32, 24))], ["x"], num_inference_steps=1)


def test_defaults_of_an_editor(editor, photos: Path, tmp_path: Path) -> None:
    """Its own are taken where nothing is given; its eta goes with its own scheduler alone."""
    recommended = {"steps": 1, "guidance_scale": 2.0, "image_guidance_scale": 1.0, "eta": 0.3}

    def settings_of(given: Settings) -> dict:
        jobs = plan_jobs(str(photos / "a.png"), str(tmp_path / "out.png"), ["x"], given)
        make_run(editor, defaults=recommended).edit(jobs, 0)
        return {name: read_record(jobs[0].output)["settings"][name] for name in recommended}

    assert settings_of(Settings()) == recommended
    assert settings_of(Settings(steps=2, eta=0.0, guidance_scale=3.0)) == recommended | {
        "steps": 2,
        "eta": 0.0,
        "guidance_scale": 3.0,
    }
    assert settings_of(Settings(scheduler="euler"))["eta"] is None
    drawn = settings_of(Settings(randomize_cfg=True))
    assert (drawn["guidance_scale"], drawn["image_guidance_scale"]) == draw_scales(0, (2.0, 1.0))


def test_steps_that_no_scheduler_can_do(editor, photos: Path, tmp_path: Path) -> None:
    """Told before the first edit."""
    jobs = plan_jobs(str(photos), str(tmp_path / "out"), ["x"], Settings(steps=60, scheduler="lcm"))
    with pytest.raises(InputError, match="60 steps cannot be done by this model's LCMScheduler"):
        make_run(editor).edit(jobs, 0)
    jobs = plan_jobs(str(photos), str(tmp_path / "out"), ["x"], Settings(scheduler="lcm", timestep_spacing="trailing"))
    with pytest.raises(InputError, match="no effect on LCMScheduler"):
        make_run(editor).edit(jobs, 0)
    assert not list((tmp_path / "out").iterdir())


def test_keep_size(editor, photos: Path, tmp_path: Path) -> None:
    """The edit has the input's size and lies on it: nothing of the input was cut off."""
    seen = []
    hook = editor.vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    try:
        for keep_size, name in ((True, "kept.png"), (False, "cut.png")):
            settings = Settings(steps=1, keep_size=keep_size, resolution=48)
            make_run(editor).edit(plan_jobs(str(photos / "tall.png"), str(tmp_path / name), ["x"], settings), 0)
    finally:
        hook.remove()
    assert Image.open(tmp_path / "kept.png").size == (40, 60) and Image.open(tmp_path / "cut.png").size == (32, 48)
    squeezed = Image.open(photos / "tall.png").resize((32, 48), Image.Resampling.LANCZOS)
    as_seen = torch.from_numpy(np.array(squeezed)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(seen[0], as_seen, rtol=0, atol=1e-2)


# ---- what shows the edits -------------------------------------------------------------------------------------------


def test_animation_and_contact_sheet(editor, photos: Path, tmp_path: Path) -> None:
    jobs = plan_jobs(str(photos), str(tmp_path / "out"), ["x", "y"], Settings(steps=1))
    make_run(editor).edit(jobs, 0)
    for name, colour in (("a-x", "red"), ("a-y", "blue")):  # Pillow joins frames that are the same
        Image.new("RGB", (36, 24), colour).save(tmp_path / f"out/{name}.png")
    animations = save_animations(jobs)
    assert [path.name for path in animations] == ["a.gif", "b.gif", "tall.gif"]  # none of what could not be edited
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
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 256, 2 * (16 + 171) + 16 + 256)
    alone = plan_jobs(str(photos / "a.png"), str(tmp_path / "alone.png"), ["x"], Settings(steps=1))
    make_run(editor).edit(alone, 0)
    assert [path.name for path in (*save_animations(alone), *save_sheets(alone))] == ["alone.gif", "alone-grid.png"]
    missing = plan_jobs(str(photos / "a.png"), str(tmp_path / "none.png"), ["x"], QUICK)
    assert save_animations(missing) == [] and save_sheets(missing) == []
