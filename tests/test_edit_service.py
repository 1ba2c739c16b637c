"""The edit service: which jobs are batched, what is recorded, and what a second run does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.edits import ORIGIN, counting, edit_jobs, make_photos, make_service
from utils.editing.edit_images import OutOfMemory, SamplingSettings, edit_images, fit_to_model
from utils.editing.jobs import Job, plan_input
from utils.editing.records import read_record
from utils.editing.settings import EditSettings, draw_scales
from utils.errors import InputError

QUICK = EditSettings(steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def edit_alone(editor, path: Path, instruction: str, seed: int, **settings) -> np.ndarray:
    """The edit of one image without the service."""
    fitted = fit_to_model(Image.open(path), editor)
    return np.asarray(edit_images(editor, [fitted], [instruction], [seed], SamplingSettings(**settings))[0]).astype(int)


def test_each_image_and_prompt_is_encoded_once(editor, photos: Path, tmp_path: Path, capsys) -> None:
    """Three images with two instructions and two seeds, in batches of four of one size."""
    settings = EditSettings(steps=1, image_guidance_scale=1.0)
    jobs = plan_input(str(photos), str(tmp_path / "out"), ["x", "y"], settings, 2)
    with counting(editor) as counts:
        outcome = edit_jobs(make_service(editor, batch_size=4), jobs, 3)
    assert (counts["texts"], counts["images"]) == (3, 3)  # with the null prompt
    assert counts["rows"] == [8, 8, 8]  # two branches of four, for twelve edits
    assert outcome == {"edited": 12, "failed": 4} and len(jobs) == 16
    skipped = capsys.readouterr().err
    assert skipped.startswith("skipped broken.png: not an image") and skipped.count("\n") == 1
    expected = edit_alone(editor, photos / "b.png", "y", 4, num_inference_steps=1, image_guidance_scale=1.0)
    assert np.abs(pixels_of(tmp_path / "out/b-y-2.png") - expected).max() <= 1


def test_jobs_without_an_output(editor, photos: Path) -> None:
    """As the page makes them: the results have the images, the records with the batch places, and what was edited."""
    content = (photos / "tall.png").read_bytes()
    jobs = [Job("tall.png", lambda: content, "x", QUICK, seed=seed) for seed in (5, 6, 7)]
    steps, service = [], make_service(editor, batch_size=2)
    results = list(service.edit(jobs, on_step=lambda *step: steps.append(step)))
    assert [result.record["seed"] for result in results] == [5, 6, 7]
    assert [result.record["batch"] for result in results] == [[0, 2], [1, 2], [0, 1]]
    assert steps == [(1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 1)]
    assert results[0].original == fit_to_model(Image.open(photos / "tall.png"), editor)
    with pytest.raises(KeyboardInterrupt):  # what on_step raises ends the run
        list(service.edit(jobs, on_step=lambda *step: (_ for _ in ()).throw(KeyboardInterrupt)))


def test_second_run_skips_finished_edits(editor, photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "broken.png").unlink()
    out = tmp_path / "out"
    jobs, service = plan_input(str(photos), str(out), ["x"], QUICK), make_service(editor)
    seed = service.choose_seed(jobs)
    assert edit_jobs(service, jobs, seed) == {"edited": 3}
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    (out / "tall.png").unlink()
    assert service.choose_seed(jobs) == seed  # that of the outputs
    assert edit_jobs(service, jobs) == {"edited": 1, "finished": 2}
    assert (out / "tall.png").read_bytes() == before["tall.png"][1]
    assert (out / "a.png").stat().st_mtime_ns == before["a.png"][0]
    assert capsys.readouterr().err == ""

    other = plan_input(str(photos), str(out), ["x"], EditSettings(steps=3, eta=1.0))
    assert edit_jobs(service, other, seed) == {"edited": 3}
    assert capsys.readouterr().err.splitlines() == [
        f"replaced {out / name}, which had eta none, not 1.0; steps 2, not 3" for name in ("a.png", "b.png", "tall.png")
    ]
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    Image.new("RGB", (8, 8)).save(out / "b.png")
    assert edit_jobs(service, other, seed) == {"edited": 2, "finished": 1}
    replaced = capsys.readouterr().err.splitlines()
    assert "input digest" in replaced[0] and "no record of an edit" in replaced[1]
    trained = ORIGIN | {"model": {"name": "m", "weights": "others"}}
    assert edit_jobs(make_service(editor, origin=trained), other, seed) == {"edited": 3}
    assert "model weights w, not others" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_records_in_every_format(editor, photos: Path, tmp_path: Path, suffix: str) -> None:
    """They contain no folder of this machine."""
    output, service = tmp_path / f"edited.{suffix}", make_service(editor)
    jobs = plan_input(str(photos / "a.png"), str(output), ['日本 "x" ü'], QUICK)
    assert edit_jobs(service, jobs, 3) == {"edited": 1}
    record = read_record(output)
    assert (record["instruction"], record["seed"], record["input"]["name"]) == ('日本 "x" ü', 3, "a.png")
    assert record["settings"]["scheduler"] == "DDIMScheduler" and record["settings"]["steps"] == 2
    assert record["model"] == ORIGIN["model"] and record["batch"] == [0, 1]
    assert str(tmp_path) not in json.dumps(record) and str(tmp_path).encode() not in output.read_bytes()
    assert edit_jobs(service, jobs, 3) == {"finished": 1}
    assert edit_jobs(service, jobs, 4) == {"edited": 1}


def test_batch_is_halved_if_out_of_memory(editor, photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The edits are the same; an image that does not fit alone is reported."""
    sizes, messages = [], []

    def limited(pipeline, images, prompts, *settings, **callbacks):
        sizes.append(len(images))
        if len(images) > 2 or "huge" in prompts:
            raise OutOfMemory("out of memory: use fewer images at once")
        return edit_images(pipeline, images, prompts, *settings, **callbacks)

    monkeypatch.setattr("utils.editing.service.edit_images", limited)
    jobs = plan_input(str(photos / "a.png"), str(tmp_path / "out.png"), ["x"], QUICK, 8)
    service = make_service(editor, batch_size=8, messages=messages)
    assert edit_jobs(service, jobs, 0) == {"edited": 8}
    assert sizes == [8, 4, 2, 2, 2, 2] and service.batch_size == 2
    assert messages == [f"out of memory with {n} images at once: continuing with {n // 2}" for n in (8, 4)]
    expected = edit_alone(editor, photos / "a.png", "x", 7, num_inference_steps=2)
    assert np.abs(pixels_of(tmp_path / "out-8.png") - expected).max() <= 1
    huge = plan_input(str(photos / "a.png"), str(tmp_path / "o.png"), ["huge"], QUICK)
    assert edit_jobs(service, huge, 0) == {"failed": 1}
    assert capsys.readouterr().err == "skipped a.png: out of memory: use fewer images at once\n"
    content = (photos / "a.png").read_bytes()
    repeated = Job("a.png", lambda: content, "x", QUICK, seed=7, batch_place=(1, 3))  # of a larger memory
    assert [result.record["batch"] for result in service.edit([repeated])] == [[0, 1]]
    assert messages[-1].startswith("out of memory with the recorded batch: editing the image alone")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_recognized(editor, photos: Path, monkeypatch, error: RuntimeError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(editor.unet, "forward", fail)
    with pytest.raises(OutOfMemory, match="fewer images at once"):
        edit_alone(editor, photos / "a.png", "x", 0, num_inference_steps=1)


def test_recommended_settings(editor, photos: Path, tmp_path: Path) -> None:
    """They are used if nothing else is given; the recommended eta only with the editor's own scheduler."""
    recommended = {"steps": 1, "guidance_scale": 2.0, "image_guidance_scale": 1.0, "eta": 0.3}

    def settings_of(given: EditSettings) -> dict:
        jobs = plan_input(str(photos / "a.png"), str(tmp_path / "out.png"), ["x"], given)
        edit_jobs(make_service(editor, recommended), jobs, 0)
        return {name: read_record(jobs[0].output)["settings"][name] for name in recommended}

    assert settings_of(EditSettings()) == recommended
    given = {"steps": 2, "eta": 0.0, "guidance_scale": 3.0}
    assert settings_of(EditSettings(**given)) == recommended | given
    assert settings_of(EditSettings(scheduler="euler"))["eta"] is None
    drawn = settings_of(EditSettings(randomize_cfg=True))
    assert (drawn["guidance_scale"], drawn["image_guidance_scale"]) == draw_scales(0, (2.0, 1.0))


def test_impossible_schedulers(editor, photos: Path, tmp_path: Path) -> None:
    """Reported before the first edit."""
    for settings, message in (
        (EditSettings(steps=60, scheduler="lcm"), "60 steps are not possible with the scheduler LCMScheduler"),
        (EditSettings(scheduler="lcm", timestep_spacing="trailing"), "no effect on LCMScheduler"),
    ):
        jobs = plan_input(str(photos), str(tmp_path / "out"), ["x"], settings)
        with pytest.raises(InputError, match=message):
            edit_jobs(make_service(editor), jobs, 0)
    assert not list((tmp_path / "out").iterdir())


def test_keep_size(editor, photos: Path, tmp_path: Path) -> None:
    """The edit has the size of the input, of which nothing was cropped."""
    seen = []
    hook = editor.vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    try:
        for keep_size, name in ((True, "kept.png"), (False, "cropped.png")):
            settings = EditSettings(steps=1, keep_size=keep_size, resolution=48)
            jobs = plan_input(str(photos / "tall.png"), str(tmp_path / name), ["x"], settings)
            edit_jobs(make_service(editor), jobs, 0)
    finally:
        hook.remove()
    assert Image.open(tmp_path / "kept.png").size == (40, 60) and Image.open(tmp_path / "cropped.png").size == (32, 48)
    squeezed = Image.open(photos / "tall.png").resize((32, 48), Image.Resampling.LANCZOS)
    as_seen = torch.from_numpy(np.array(squeezed)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(seen[0], as_seen, rtol=0, atol=1e-2)
