"""infer.py: as a process where that matters, otherwise through main(argv)."""

import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from tests.edits import make_safety_checker
from tests.pairs import make_noise

SCRIPT = Path(infer.__file__)


def make_photo(size: tuple[int, int] = (60, 40), seed: int = 0) -> Image.Image:
    """size: (width, height)."""
    return make_noise(size[::-1], seed)


def run_script(*flags: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    make_photo().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_one_image_equals_stock(tiny_editor: Path, photo: Path) -> None:
    """As a user runs it: the edit equals that of diffusers' pipeline, and no library prints anything."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from utils.editing.edit_images import fit_image

    flags = ["--edit", "make it snow", "--seed", 11, "--steps", 6, "--cfg-text", 4, "--cfg-image", 1.25]
    result = run_script("--model", tiny_editor, "--input", photo.name, *flags, cwd=photo.parent)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("1 of 1 edited in ") and result.stdout.endswith("seed 11: photo-edited.png\n")

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    edited = Image.open(photo.parent / "photo-edited.png")
    assert edited.size == (36, 24)  # 60x40 at 32 is 32 x 21.3: the shorter side goes up to 24, the longer with it
    settings = dict(num_inference_steps=6, guidance_scale=4.0, image_guidance_scale=1.25)
    fitted, generator = fit_image(Image.open(photo), 32, 4), torch.Generator().manual_seed(11)
    expected = pipeline("make it snow", image=fitted, generator=generator, **settings).images[0]
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert sorted(path.name for path in photo.parent.iterdir()) == ["photo-edited.png", "photo.png"]


def test_sdxl_adapter_equals_stock(tiny_sdxl: Path, photo: Path) -> None:
    """An adapter of a text-to-image SDXL edits as stock diffusers does after widening the UNet."""
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    from tests.adapters import DORA, load_trained
    from utils.editing.edit_images import fit_image
    from utils.models.adapters import save_adapter

    trained = load_trained(tiny_sdxl, DORA)
    save_adapter(photo.parent / "adapter", trained.unet)
    flags = ["--edit", "make it snow", "--seed", 11, "--steps", 4, "--cfg-text", 4, "--cfg-image", 1.25]
    result = run_script("--model", tiny_sdxl, "--lora", "adapter", "--input", photo.name, *flags, cwd=photo.parent)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert isinstance(trained, StableDiffusionXLInstructPix2PixPipeline)
    fitted, generator = fit_image(Image.open(photo), 32, 4), torch.Generator().manual_seed(11)
    expected = trained(
        "make it snow",
        image=fitted,
        height=24,
        width=36,
        generator=generator,
        num_inference_steps=4,
        guidance_scale=4.0,
        image_guidance_scale=1.25,
    ).images[0]
    edited = Image.open(photo.parent / "photo-edited.png")
    assert edited.size == (36, 24)
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_single_file(tiny_sdxl_editor: Path, photo: Path, capsys) -> None:
    """A file of CosXL with the configuration of a folder: the edit is that of the folder with CosXL's scheduler."""
    from diffusers import DiffusionPipeline

    from tests.original_names import write_single_file
    from utils.editing.edit_images import SamplingSettings, edit_images, fit_to_model
    from utils.editing.loading import load_editor

    sigmas = {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    file = write_single_file(
        DiffusionPipeline.from_pretrained(tiny_sdxl_editor), photo.parent / "cosxl.safetensors", sigmas
    )
    flags = ["--input", photo, "--edit", "x", "--steps", 2, "--seed", 1, "--output", photo.with_name("out.png")]
    assert infer.main([str(flag) for flag in ("--model", file, "--config", tiny_sdxl_editor, *flags)]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 edited in ")
    editor = load_editor(file, single_file_config=str(tiny_sdxl_editor))
    assert editor.scheduler.config.sigma_max == 80.0 and editor.is_cosxl_edit
    fitted = fit_to_model(Image.open(photo), editor)
    expected = edit_images(editor, [fitted], ["x"], [1], SamplingSettings(num_inference_steps=2))[0]
    difference = np.asarray(Image.open(photo.with_name("out.png"))).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


def test_folder_with_bad_images(tiny_editor: Path, tmp_path: Path, capsys) -> None:
    """Bad files are named and the exit code is 1, but the others are edited, in any size and format."""
    photos = tmp_path / "photos"
    photos.mkdir()
    make_photo().save(photos / "a.jpg")
    make_photo().save(photos / "a.png")
    make_photo((40, 60)).convert("RGBA").save(photos / "upright.webp")
    make_photo((4000, 9)).save(photos / "strip.png")
    (photos / "broken.png").write_bytes(b"not an image")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "notes.txt").write_text("ignored")
    (photos / ".hidden.png").write_bytes(b"ignored")

    flags = ["--edit", "x", "--steps", 2, "--batch_size", 4, "--output", tmp_path / "out" / "deep"]
    assert infer.main([str(flag) for flag in ("--model", tiny_editor, "--input", photos, *flags)]) == 1
    printed = capsys.readouterr()
    edited = {path.name: Image.open(path).size for path in (tmp_path / "out" / "deep").iterdir()}
    assert edited == {"a_jpg.png": (36, 24), "a_png.png": (36, 24), "upright.png": (24, 36)}
    assert [line.split(":")[0] for line in printed.err.splitlines()] == [
        str(photos),
        "skipped broken.png",
        "skipped empty.jpg",
        "skipped strip.png",
    ]
    assert f"{photos}: skipped 1 (not an image): notes.txt" in printed.err
    assert printed.out.startswith("3 of 6 edited in ")


def test_stops_with_ctrl_c(tiny_editor: Path, photo: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "edit_jobs", interrupt)
    assert infer.main(["--model", str(tiny_editor), "--input", str(photo), "--edit", "x", "--output", "o.png"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_printed_seed_repeats_the_edit(tiny_editor: Path, photo: Path, capsys) -> None:
    """Without --seed a random one is printed; in a folder each image has the same edit as alone."""
    make_photo(seed=1).save(photo.with_name("second.png"))
    common = ["--model", str(tiny_editor), "--edit", "x", "--steps", "1"]
    out = photo.parent / "out"
    assert infer.main([*common, "--input", str(photo.parent), "--output", str(out), "--batch_size", "2"]) == 0
    seed = capsys.readouterr().out.split("seed ")[1].split(":")[0]
    alone = photo.parent / "alone.png"
    assert infer.main([*common, "--input", str(photo), "--output", str(alone), "--seed", seed]) == 0
    difference = np.asarray(Image.open(alone)).astype(int) - np.asarray(Image.open(out / "photo.png"))
    assert np.abs(difference).max() <= 1


@pytest.fixture
def server() -> Iterator[str]:
    """A web server with /photo.jpg, which has an EXIF orientation, and /page.html."""
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: 60x40 stored, 40x60 shown
    make_photo().save(stored, "JPEG", exif=exif)
    pages = {"/photo.jpg": stored.getvalue(), "/page.html": b"<html>hello</html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pages.get(self.path)
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_url_and_exif_orientation(tiny_editor: Path, tmp_path: Path, server: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_editor), "--edit", "x", "--steps", "1", "--dtype", "bf16", "--resolution", "48"]
    assert infer.main([*flags, "--input", f"{server}/photo.jpg"]) == 0
    assert Image.open(tmp_path / "photo-edited.png").size == (32, 48)
    (tmp_path / "folder").mkdir()
    assert infer.main([*flags, "--input", f"{server}/photo.jpg", "--output", "folder"]) == 0
    assert (tmp_path / "folder" / "photo.png").is_file()


def expect_error(capsys, *flags: object) -> str:
    """The message on stderr; the exit code is 2 and stdout is empty."""
    with pytest.raises(SystemExit) as exit_info:
        infer.main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


def test_mistakes_in_the_flags(capsys, photo: Path, tmp_path: Path) -> None:
    """Reported before torch is imported, several in one message."""
    right = ["--model", "a/b", "--input", photo, "--edit", "x"]
    cases = {
        ("--steps", "0"): "--steps 0: must be from 1",
        ("--steps", "many"): "invalid int value: 'many'",
        ("--guidance_scale", "-1"): "--guidance_scale -1.0: must be from 0",
        ("--cfg-image", "nan"): "--image_guidance_scale nan",
        ("--resolution", "0"): "--resolution 0: must be from 8 to 4096",
        ("--resolution", "100000"): "--resolution 100000",
        ("--batch_size", "0"): "--batch_size 0",
        ("--seed", "-3"): "--seed -3",
        ("--edit", "  "): "--edit is empty",
        ("--ckpt", "old.ckpt"): "the model old.ckpt does not exist",
        ("--config", "generate.yaml"): "--config generate.yaml cannot be read",
        ("--dtype", "int4"): "invalid choice: 'int4'",
        ("--stpes", "4"): "--stpes is not a flag: did you mean --steps?",
        ("--model", "/no/such/model"): "--model /no/such/model is not a folder or file that exists",
        ("--lora", "/no/such/lora"): "--lora /no/such/lora is not a folder or file that exists",
        ("--lora_scale", "0.5"): "--lora_scale 0.5 has no effect without --lora",
        ("--lora", "a/b", "--lora_scale", "11"): "--lora_scale 11.0: must be from -10 to 10",
        ("--model", tmp_path, "--config", "a/b"): "--config is for a --model in one file",
        ("--input", tmp_path / "missing.png"): "missing.png does not exist",
        ("--input", "ftp://somewhere/a.png"): "ftp://somewhere/a.png",
        ("--num_images", "0"): "--num_images 0: must be from 1",
        ("--eta", "2"): "--eta 2.0: must be from 0 to 1",
        ("--guidance_interval", "0.6", "0.2"): "--guidance_interval 0.6 0.2: must be two fractions",
        ("--scheduler", "eulr"): "invalid choice: 'eulr'",
        ("--surprise_me",): "--surprise_me draws the instruction: remove --edit",
        ("--randomize_cfg", "--cfg-text", "3"): "--randomize_cfg draws both guidance scales",
        ("--jobs", "jobs.jsonl"): "--jobs names its images itself: remove --input",
        ("--repeat", photo): "remove --edit",
        ("--output", photo): "is the input itself",
        ("--output", "edited.xyz"): "must end in one of .png",
        ("--output", photo / "edited.png"): "cannot be written",
    }
    for flags, message in cases.items():
        error = expect_error(capsys, *right, *flags)
        assert message in error and error.count("\n") == 1, flags
    assert "--input, --edit" in expect_error(capsys)
    assert "--model is missing" in expect_error(capsys, *right[2:])
    several = expect_error(capsys, *right, "--steps", "0", "--edit", "")
    assert "--steps 0" in several and "--edit is empty" in several


def test_mistakes_in_files(capsys, photo: Path, tmp_path: Path, server: str) -> None:
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:2000])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "full").mkdir()
    make_photo().save(tmp_path / "full" / "a.png")
    cases = [
        (tmp_path / "zero.png", None, "empty file"),
        (tmp_path / "text.png", None, "not an image"),
        (tmp_path / "cut.png", None, "cannot be decoded"),
        (tmp_path / "nothing", None, "has no images"),
        (tmp_path / "full", photo, "is a file, and --input"),
        (tmp_path / "full", tmp_path / "full", "the input folder itself"),
        (tmp_path / "full", photo / "inside", "cannot be written"),
        (f"{server}/page.html", None, "not an image"),
        (f"{server}/missing.jpg", None, "cannot be fetched"),
        ("http://127.0.0.1:9/photo.jpg", None, "cannot be fetched"),
    ]
    for source, output, message in cases:
        output = output or tmp_path / "out.png"
        error = expect_error(capsys, "--model", "a/b", "--edit", "x", "--input", source, "--output", output)
        assert message in error and error.count("\n") == 1, source
    assert not (tmp_path / "out.png").exists()


def test_mistakes_in_model_and_machine(capsys, tiny_base: Path, tiny_editor: Path, photo: Path) -> None:
    right = ["--input", photo, "--edit", "x", "--output", photo.with_name("out.png")]
    assert "4 channels" in expect_error(capsys, "--model", tiny_base, *right)
    assert "Hub cannot be reached" in expect_error(capsys, "--model", "somebody/some-model", *right)
    missing = expect_error(capsys, "--model", "some/model.safetensors", *right)
    assert "model some/model.safetensors does not exist" in missing
    assert "missing pytorch_lora" in expect_error(capsys, "--model", tiny_base, "--lora", photo.parent, *right)
    editor = ["--model", tiny_editor, *right]
    assert "fp16 does not work on the CPU" in expect_error(capsys, *editor, "--device", "cpu", "--dtype", "fp16")
    assert "--device tpu is not available" in expect_error(capsys, *editor, "--device", "tpu")
    assert "--device cuda:99 is not available" in expect_error(capsys, *editor, "--device", "cuda:99")


def test_full_disk(capsys, tiny_editor: Path, photo: Path, monkeypatch) -> None:
    """An image that cannot be saved leaves no file behind, and an older file is kept."""
    target = photo.with_name("out.png")
    target.write_bytes(b"older")

    def fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    flags = ["--model", tiny_editor, "--input", photo, "--edit", "x", "--output", target, "--steps", "1"]
    assert "No space left on device" in expect_error(capsys, *flags)
    assert target.read_bytes() == b"older"
    assert sorted(path.name for path in photo.parent.iterdir()) == ["out.png", "photo.png"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_several_edits_seeds_and_previews(tiny_editor: Path, photo: Path, capsys) -> None:
    """Files named by instruction and number, an animation and a contact sheet; the second run has nothing to do."""
    flags = [
        "--model",
        tiny_editor,
        "--input",
        photo,
        "--edit",
        "snow",
        "--edit",
        "at night",
        "--num_images",
        2,
        "--steps",
        2,
    ]
    flags += ["--batch_size", 4, "--seed", 5, "--gif", "--grid", "--output", photo.parent / "out/p.png"]
    assert infer.main([str(flag) for flag in flags]) == 0
    names = [f"p-{name}-{number}.png" for name in ("at-night", "snow") for number in (1, 2)]
    assert names_in(photo.parent / "out") == sorted([*names, "p-grid.png", "p.gif"])
    printed = capsys.readouterr()
    assert (
        printed.out.startswith("4 of 4 edited in ") and ", 2 seeds from 5 to 6: " in printed.out and printed.err == ""
    )
    alone = photo.with_name("alone.png")
    single = ["--model", tiny_editor, "--input", photo, "--edit", "at night", "--steps", 2, "--seed", 6]
    assert infer.main([*map(str, single), "--output", str(alone)]) == 0
    difference = np.asarray(Image.open(alone)).astype(int) - np.asarray(Image.open(photo.parent / "out" / names[1]))
    assert np.abs(difference).max() <= 1
    capsys.readouterr()
    assert infer.main([str(flag) for flag in flags]) == 0
    assert ", 4 already finished, " in capsys.readouterr().out


def test_repeat(tiny_editor: Path, photo: Path, capsys, monkeypatch) -> None:
    """Bit for bit, from a batch, with drawn instruction and scales; the record contains no folder."""
    flags = [
        "--model",
        tiny_editor,
        "--input",
        photo,
        "--surprise_me",
        "--num_images",
        3,
        "--steps",
        3,
        "--batch_size",
        3,
    ]
    flags += [
        "--scheduler",
        "euler_a",
        "--timestep_spacing",
        "trailing",
        "--dtype",
        "bf16",
        "--guidance_interval",
        0,
        0.7,
    ]
    flags += ["--keep_size", "--vae_slicing", "--vae_tiling", "--randomize_cfg"]
    monkeypatch.chdir(photo.parent)
    assert infer.main([str(flag) for flag in flags]) == 0
    drawn = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in drawn] == [f"photo-edited-{number}.png" for number in (1, 2, 3)]
    made = photo.with_name("photo-edited-2.png")
    assert json.loads(Image.open(made).info["instruct_pix2pix"])["batch"] == [1, 3]
    assert Image.open(made).size == (60, 40)
    for folder in (photo.parent, tiny_editor.parent):
        assert str(folder).encode() not in made.read_bytes()

    error = expect_error(capsys, "--repeat", made)
    assert "its record names the model 'editor'. Give --model with the one to load, or --trust_record" in error
    error = expect_error(capsys, "--repeat", made, "--trust_record")
    assert "its model editor is not in this folder. Give its path with --model" in error
    shutil.copytree(tiny_editor, photo.parent / "editor")
    assert infer.main(["--repeat", str(made), "--trust_record"]) == 0
    assert f"identical to {made}" in capsys.readouterr().out
    repeated = photo.with_name("photo-edited-2-repeated.png")
    assert repeated.read_bytes() == made.read_bytes()
    assert infer.main(["--repeat", str(made), "--model", str(tiny_editor)]) == 0
    assert ", 1 already finished, " in capsys.readouterr().out


def test_mistakes_in_repeats(capsys, tiny_base: Path, tiny_editor: Path, photo: Path) -> None:
    made = photo.with_name("made.png")
    flags = ["--model", tiny_editor, "--input", photo, "--edit", "x", "--steps", 1, "--output", made]
    assert infer.main([str(flag) for flag in flags]) == 0
    capsys.readouterr()
    elsewhere = photo.parent / "elsewhere"
    elsewhere.mkdir()
    make_photo(seed=9).save(elsewhere / "photo.png")
    from tests.tiny import make_tiny_sd

    other = make_tiny_sd(photo.parent / "other", in_channels=8, seed=5)
    right = ["--repeat", made, "--model", tiny_editor]
    for flags, message in (
        (["--repeat", photo], "has no record of an edit"),
        (["--repeat", photo.with_name("none.png")], "none.png does not exist"),
        ([*right, "--steps", 3], "remove --steps"),
        ([*right, "--input", elsewhere], "is not the file that"),
        ([*right, "--input", tiny_base], "its input photo.png is not in"),
        ([*right, "--output", made], "must be a new file"),
        (["--repeat", made, "--model", other], "is not the model that made"),
    ):
        error = expect_error(capsys, *flags)
        assert message in error and error.count("\n") == 1, flags


def test_jobs_file(tiny_editor: Path, photo: Path, capsys) -> None:
    """A missing image does not stop the others; the exit code and the summary report it."""
    lines = [
        {"image": "photo.png", "edit": "x", "steps": 2, "seed": 3},
        {"image": "missing.png"},
        {"image": "photo.png", "output": "named.jpg", "guidance_scale": 2, "image_guidance_scale": 1},
    ]
    jobs = photo.with_name("jobs.jsonl")
    jobs.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", tiny_editor, "--jobs", jobs, "--edit", "y", "--steps", 1, "--seed", 1]
    assert infer.main([str(flag) for flag in flags]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("skipped missing.png: line 2: ") and printed.err.count("\n") == 1
    assert printed.out.startswith("2 of 3 edited in ")
    assert names_in(photo.parent / "jobs-edited") == ["named.jpg", "photo.png"]
    jobs.write_text('{"image": "photo.png", "stepz": 2}')
    assert "line 1: unknown key 'stepz': did you mean 'steps'?" in expect_error(capsys, *flags)


def test_defaults_of_an_adapted_editor(tiny_editor: Path, photo: Path, capsys) -> None:
    """Those of adapted.json are used and printed; flags override them; a damaged file is named."""
    from utils.editing.records import read_record

    editor = shutil.copytree(tiny_editor, photo.parent / "fast")
    recommended = {"steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 1.0, "eta": 0.3, "scheduler": "tcd"}
    (editor / "adapted.json").write_text(json.dumps({"weight": 1.0, "recommended": recommended}))
    output = photo.with_name("out.png")
    flags = ["--model", editor, "--input", photo, "--edit", "x", "--seed", 1, "--output", output, "--cfg-text", 3]
    assert infer.main([str(flag) for flag in flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "recommended by this editor: steps 2, image_guidance_scale 1.0, eta 0.3\n1 of 1 edited in "
    )
    settings = read_record(output)["settings"]
    assert {name: settings[name] for name in recommended} == recommended | {
        "guidance_scale": 3.0,
        "scheduler": "DDIMScheduler",
    }
    (editor / "adapted.json").write_text('{"recommended": {"steps": "four"}}')
    assert "adapted.json: steps four: must be from 1 to 1000" in expect_error(capsys, *flags)
    (editor / "adapted.json").write_text("[]")
    assert "adapted.json is damaged" in expect_error(capsys, *flags)


def test_safety_checker_can_be_dropped(tiny_editor: Path, photo: Path, capsys) -> None:
    """The safety checker of a pipeline runs; here it flags everything."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    checker, processor = make_safety_checker()
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tiny_editor, safety_checker=checker, feature_extractor=processor, requires_safety_checker=True
    )
    pipeline.save_pretrained(photo.parent / "checked")
    output = photo.with_name("out.png")
    flags = ["--model", photo.parent / "checked", "--input", photo, "--edit", "x", "--steps", 1, "--seed", 1]
    flags = [str(flag) for flag in (*flags, "--output", output)]
    assert infer.main(flags) == 0
    assert "is black: flagged by the model's safety checker" in capsys.readouterr().err
    assert not np.asarray(Image.open(output)).any()
    assert infer.main([*flags, "--no_safety_checker"]) == 0
    assert "no_safety_checker False, not True" in capsys.readouterr().err
    assert np.asarray(Image.open(output)).any()


def test_compile_without_a_compiler(tiny_editor: Path, photo: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(photo.parent)
    flags = ["--model", tiny_editor, "--input", photo, "--edit", "x", "--steps", 1, "--compile"]
    assert infer.main([str(flag) for flag in flags]) == 0
    assert (
        capsys.readouterr().err == "--compile is ignored: it needs a C++ compiler such as g++, which is not installed\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_compiled_edit_is_the_same(tiny_editor: Path, photo: Path, monkeypatch) -> None:
    """With a UNet of one block, because compiling takes a while."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    blocks = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    config = {name: pipeline.unet.config[name] for name in ("in_channels", "out_channels", "cross_attention_dim")}
    sizes = dict(layers_per_block=1, norm_num_groups=8, attention_head_dim=8, sample_size=16)
    pipeline.register_modules(unet=UNet2DConditionModel(**config, **blocks, **sizes))
    pipeline.save_pretrained(photo.parent / "small")
    flags = ["--model", "small", "--input", photo, "--edit", "x", "--steps", 2, "--seed", 1, "--resolution", 32]
    result = run_script(*flags, "--output", "compiled.png", "--compile", cwd=photo.parent)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(photo.parent)
    assert infer.main([str(flag) for flag in (*flags, "--output", "plain.png")]) == 0
    images = [np.asarray(Image.open(photo.with_name(f"{name}.png"))).astype(int) for name in ("plain", "compiled")]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_help_needs_no_heavy_import() -> None:
    """Slow imports come after the check of the flags."""
    code = (
        "import sys, infer\n"
        "try: infer.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, capture_output=True)
