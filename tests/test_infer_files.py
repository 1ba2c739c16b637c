"""infer.py on files as users have them: many inputs, animations, transparency, names, metadata, forged records."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import infer
from tests.colours import DISPLAY_P3, P3_RED, solid
from tests.pairs import make_noise
from utils.editing.inputs import limit_name
from utils.editing.records import KEY, find_record_problems, read_record, require_record
from utils.errors import InputError

QUICK = ("--edit", "x", "--steps", "2", "--seed", "3")


@contextmanager
def serve_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, the requested paths)."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requested
        running.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(editor: Path, *flags: object) -> int:
    return infer.main([str(flag) for flag in ("--model", editor, *QUICK, *flags)])


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_noise((40, 60), seed).save(path)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_several_inputs_patterns_and_subfolders(tiny_editor: Path, here: Path, capsys) -> None:
    """Folders keep their structure; equal names get that of their folder; everything else is named."""
    for place in ("a/1.png", "a/deep/2.png", "b/1.png", "c/x.jpg", "c/y.jpg", "c/z[1].jpg"):
        photo(here / place, seed=len(place))
    (here / "a/notes.docx").write_text("x")
    (here / "a/gone.png").symlink_to(here / "nowhere.png")
    assert edit(tiny_editor, "--input", "a", "--output", "one") == 0
    printed = capsys.readouterr().err
    assert (
        "a: skipped 1 (not an image): notes.docx" in printed and "skipped 1 (not a regular file): gone.png" in printed
    )
    assert "a: skipped 1 (subfolder): deep: --recursive edits their images" in printed
    assert files_below(here / "one") == ["1.png"]
    assert edit(tiny_editor, "--input", "a", "--recursive", "--output", "all") == 0
    assert files_below(here / "all") == ["1.png", "deep/2.png"]
    assert edit(tiny_editor, "--input", "a/1.png", "b/1.png", "c/*.jpg", "c/x.jpg", "a/**/2.png") == 0
    assert files_below(here / "edited") == ["2.png", "a_1.png", "b_1.png", "x.png", "y.png", "z[1].png"]
    np.testing.assert_array_equal(pixels(here / "edited/a_1.png"), pixels(here / "one/1.png"))
    assert edit(tiny_editor, "--input", "c/z[1].jpg", "--output", "brackets.png") == 0  # a file, not a pattern
    capsys.readouterr()
    for flags, message in (
        (["--input", "a/*.gif"], "--input a/*.gif matches no file"),
        (["--input", "a/*.docx"], "matches no image: it matches notes.docx"),
        (["--input", "a/1.png", "b/1.png", "--output", "c/x.jpg"], "--input names 2 images: give a folder"),
    ):
        with pytest.raises(SystemExit):
            edit(tiny_editor, *flags)
        assert message in capsys.readouterr().err
    assert edit(tiny_editor, "--input", "a/1.png", "missing.png") == 1
    assert "skipped missing.png: --input missing.png does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_every_frame_of_an_animation_is_edited(suffix: str, tiny_editor: Path, here: Path, capsys) -> None:
    """With the same seed: each frame equals the edit of the frame alone, with durations and loop of the input."""
    frames = [make_noise((40, 60), seed) for seed in (1, 2, 3)]
    timing = {} if suffix == ".tif" else dict(duration=[50, 70, 90], loop=2)
    lossless = dict(lossless=True) if suffix == ".webp" else {}
    frames[0].save(here / f"moving{suffix}", save_all=True, append_images=frames[1:], **timing, **lossless)
    assert edit(tiny_editor, "--input", f"moving{suffix}", "--keep_size") == 0
    output = here / ("moving-edited.tiff" if suffix == ".tif" else f"moving-edited{suffix}")
    edited = Image.open(output)
    assert edited.n_frames == 3 and edited.size == (60, 40)
    assert read_record(output)["instruction"] == "x"
    for number in range(3):
        edited.seek(number)
        edited.load()
        if suffix != ".tif":
            assert edited.info["duration"] == (50, 70, 90)[number] and edited.info["loop"] == 2
        if suffix in (".png", ".tif"):
            alone = frames[number].save(here / f"{number}.png") or here / f"{number}.png"
            assert edit(tiny_editor, "--input", alone, "--keep_size", "--output", here / f"alone-{number}.png") == 0
            np.testing.assert_array_equal(np.asarray(edited.convert("RGB")), pixels(here / f"alone-{number}.png"))
    capsys.readouterr()
    assert edit(tiny_editor, "--input", f"moving{suffix}", "--keep_size") == 0
    assert "1 already finished" in capsys.readouterr().out
    if suffix == ".gif":
        assert edit(tiny_editor, "--input", "moving.gif", "--first_frame") == 0
        assert "moving.gif has 3 frames or pages: only the first is edited" in capsys.readouterr().err
        assert getattr(Image.open(here / "moving-edited.png"), "n_frames", 1) == 1
        assert edit(tiny_editor, "--input", "moving.gif", "--output", "still.jpg") == 1
        assert "still.jpg cannot hold its 3 frames: name it .gif" in capsys.readouterr().err


def test_transparency_is_restored_or_filled(tiny_editor: Path, here: Path, capsys) -> None:
    image = make_noise((40, 60)).convert("RGBA")
    alpha = Image.linear_gradient("L").resize((60, 40))
    image.putalpha(alpha)
    image.save(here / "logo.png")
    assert edit(tiny_editor, "--input", "logo.png", "--keep_size", "--output", "kept.png") == 0
    assert "logo.png is partly transparent: kept (--background fills it)" in capsys.readouterr().err
    kept = Image.open(here / "kept.png")
    assert kept.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(kept.getchannel("A")), np.asarray(alpha))
    assert edit(tiny_editor, "--input", "logo.png", "--output", "fitted.png") == 0
    fitted = Image.open(here / "fitted.png")
    expected = ImageOps.fit(alpha, fitted.size, method=Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(fitted.getchannel("A")), np.asarray(expected))
    assert edit(tiny_editor, "--input", "logo.png", "--output", "white.jpg") == 0
    assert ".jpg has none, so it is white" in capsys.readouterr().err
    filled = Image.alpha_composite(Image.new("RGBA", image.size, "#1e90ff"), image).convert("RGB")
    filled.save(here / "blue-input.png")
    for name, flags in (("blue", ["logo.png", "--background", "#1e90ff"]), ("same", ["blue-input.png"])):
        assert edit(tiny_editor, "--input", *flags, "--output", f"{name}.png") == 0
    assert Image.open(here / "blue.png").mode == "RGB"
    np.testing.assert_array_equal(pixels(here / "blue.png"), pixels(here / "same.png"))
    with pytest.raises(SystemExit):
        edit(tiny_editor, "--input", "logo.png", "--background", "bluish")
    assert "--background bluish: must be a colour" in capsys.readouterr().err


def test_an_embedded_profile_is_converted_before_the_edit(tiny_editor: Path, here: Path) -> None:
    solid(P3_RED, size=(60, 40)).save(here / "p3.png", icc_profile=DISPLAY_P3)
    solid((255, 0, 0), size=(60, 40)).save(here / "srgb.png")
    for name in ("p3", "srgb"):
        assert edit(tiny_editor, "--input", f"{name}.png", "--output", f"{name}-edited.png") == 0
    np.testing.assert_array_equal(pixels(here / "p3-edited.png"), pixels(here / "srgb-edited.png"))


def test_names_of_any_length_and_script(tiny_editor: Path, here: Path) -> None:
    """As a process whose console only knows ASCII: bytes that are not UTF-8, 250 bytes, "%", "#" and newlines."""
    names = ["n" * 246 + ".png", "文" * 80 + ".png", "фото 😀.png", "50%#1.png", "two\nlines.png", "-dash.png"]
    for number, name in enumerate(names):
        photo(here / "in" / name, number)
    os.rename(photo(here / "in/bad.png", 9), os.fsencode(here / "in") + b"/b\xff\xfe.png")
    (here / "in/broken \udcff.png").write_bytes(b"no image")
    command = [sys.executable, infer.__file__, "--model", str(tiny_editor), "--input", "in", *QUICK, "--grid"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "skipped broken \\udcff.png" in done.stderr and "7 of 8 edited" in done.stdout
    edited = os.listdir(os.fsencode(here / "in-edited"))
    assert len(edited) == 8 and b"b\xff\xfe.png" in edited and all(len(name) <= 255 for name in edited)
    assert limit_name(Path("x" * 300 + ".png")).name.startswith("xxx") and limit_name(Path("a.png")) == Path("a.png")


def test_metadata_is_kept_on_request_alone(tiny_editor: Path, here: Path, capsys) -> None:
    exif = Image.Exif()
    exif[0x0132], exif[0x0112], exif[0x010E] = "2024:05:01 10:00:00", 6, "private words"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 10:00:00"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 30.0)})
    make_noise((40, 60)).save(here / "photo.jpg", exif=exif)
    for suffix in ("png", "jpg", "webp"):
        assert edit(tiny_editor, "--input", "photo.jpg", "--output", f"plain.{suffix}") == 0
        assert not Image.open(here / f"plain.{suffix}").getexif().get_ifd(0x8825)
        assert edit(tiny_editor, "--input", "photo.jpg", "--output", f"kept.{suffix}", "--keep_metadata") == 0
        kept = Image.open(here / f"kept.{suffix}")
        found = kept.getexif()
        assert found[0x0132] == found.get_ifd(0x8769)[0x9003] == "2024:05:01 10:00:00"
        assert tuple(map(float, found.get_ifd(0x8825)[2])) == (48.0, 51.0, 30.0)
        assert 0x0112 not in found and "private words" not in str(dict(found))
        assert read_record(here / f"kept.{suffix}")["instruction"] == "x"
        np.testing.assert_array_equal(pixels(here / f"kept.{suffix}"), pixels(here / f"plain.{suffix}"))
    capsys.readouterr()
    photo(here / "none.png")
    assert edit(tiny_editor, "--input", "none.png", "--keep_metadata") == 0
    assert "none.png has no date or place to keep" in capsys.readouterr().err


GOOD = {
    "format": 1,
    "model": {"name": "editor", "is_local": True, "weights": "w"},
    "instruction": "x",
    "seed": 3,
    "input": {"name": "photo.png", "digest": "d"},
    "settings": {"steps": 2, "scheduler": "ddim", "dtype": "fp32", "keep_size": False},
}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("settings", "scheduler", ["euler"]),
        ("settings", "scheduler", "os.system"),
        ("settings", "dtype", {"a": 1}),
        ("settings", "steps", 2.5),
        ("settings", "steps", True),
        ("settings", "resolution", "512"),
        ("settings", "guidance_scale", float("nan")),
        ("settings", "guidance_interval", [0, [1]]),
        ("settings", "compile", "yes"),
        ("settings", "keep_size", 1),
        ("settings", "background", ["red"]),
        ("model", "name", ["a", "b"]),
        ("model", "revision", {"x": 1}),
        ("adapter", "scale", float("inf")),
        ("adapter", "name", 7),
        ("input", "name", {"x": 1}),
        (None, "machine", "cpu"),
        (None, "seed", -1),
        (None, "seed", 2**70),
        (None, "adapter", "me/mine"),
    ],
)
def test_forged_records_give_one_message(part: str | None, key: str, value: object, tmp_path: Path) -> None:
    record = json.loads(json.dumps(GOOD)) | {"adapter": {"name": "a", "scale": 1.0}}
    assert not find_record_problems(record)
    (record if part is None else record[part])[key] = value
    info = PngInfo()
    info.add_text(KEY, json.dumps(record))
    make_noise((40, 60)).save(tmp_path / "forged.png", pnginfo=info)
    with pytest.raises(InputError, match=r"damaged or forged record|no record of an edit"):
        require_record(tmp_path / "forged.png")


def test_a_record_never_loads_what_it_names(here: Path, capsys) -> None:
    """Neither a Hub id nor a path, unless asked; and then no path outside of the folder."""
    for name, is_local in (("someone/malware", False), ("../../etc", True), ("http://x/y", False), ("", True)):
        info = PngInfo()
        info.add_text(KEY, json.dumps(GOOD | {"model": {"name": name, "is_local": is_local, "weights": "w"}}))
        make_noise((40, 60)).save(here / "forged.png", pnginfo=info)
        with pytest.raises(SystemExit):
            infer.main(["--repeat", "forged.png"])
        assert f"its record names the model {name!r}" in capsys.readouterr().err
        if name != "someone/malware":
            with pytest.raises(SystemExit):
                infer.main(["--repeat", "forged.png", "--trust_record"])
            assert "is not in this folder" in (error := capsys.readouterr().err) or "is not a Hub id" in error


def test_an_address_is_fetched_once(tiny_editor: Path, here: Path, capsys) -> None:
    photo(here / "served/a.png")
    with serve_files(here / "served") as (address, requested):
        lines = [{"image": f"{address}/{name}", "edit": edit} for edit in "xyz" for name in ("a.png", "gone.png")]
        (here / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert infer.main(["--model", str(tiny_editor), "--jobs", "jobs.jsonl", "--steps", "1", "--seed", "1"]) == 1
        assert "3 of 6 edited" in capsys.readouterr().out
    assert sorted(requested) == ["/a.png", "/gone.png"]
