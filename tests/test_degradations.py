"""Degradations: physics, parameter ranges, determinism. Also the contact sheet and the benchmark."""

import io
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks import data
from data_preparation.photographs import centre_square, read_photograph, seeded_rng
from data_preparation.tasks import camera, degradations, kernels, weather
from data_preparation.tasks.cartoon import draw_cartoon
from data_preparation.tasks.degradations import DEGRADATIONS, RANGES
from data_preparation.tasks.primitives import Choice, IntegerRange, Range, to_encoded, to_linear
from utils.contact_sheets import LABEL_HEIGHT

REPOSITORY = Path(__file__).parent.parent
RANDOM = [name for name in DEGRADATIONS if name not in ("colorize", "identity")]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """uint8 RGB (128, 160, 3)"""
    image = read_photograph(REPOSITORY / "assets" / "photos" / "coffee.jpg")
    return cv2.resize(image, (160, 128), interpolation=cv2.INTER_AREA)


def find_results(name: str, image: np.ndarray, wanted: dict, count: int = 1) -> list[tuple[np.ndarray, dict]]:
    """Results of the degradation for the first `count` rows whose parameters include `wanted`."""
    found = []
    for row in range(200):
        degraded, parameters = DEGRADATIONS[name](image, seeded_rng(5, row))
        if wanted.items() <= parameters.items():
            found.append((degraded, parameters))
        if len(found) == count:
            return found
    raise AssertionError(f"{wanted} was never drawn")


def exact_linear(image: np.ndarray) -> np.ndarray:
    """float64, by IEC 61966-2-1"""
    encoded = image / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def gray(value: int, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


# ---- all degradations


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_same_generator_gives_the_same_result(name, photograph):
    before = photograph.copy()
    photograph.flags.writeable = False
    degraded, parameters = DEGRADATIONS[name](photograph, seeded_rng(0, 3))
    photograph.flags.writeable = True
    assert np.array_equal(photograph, before)
    assert degraded.shape == photograph.shape and degraded.dtype == np.uint8
    assert degraded.flags.c_contiguous and not np.shares_memory(degraded, photograph)
    again, same = DEGRADATIONS[name](photograph, seeded_rng(0, 3))
    assert np.array_equal(degraded, again) and parameters == same
    other, _ = DEGRADATIONS[name](photograph, seeded_rng(1, 3))
    assert np.array_equal(degraded, other) == (name not in RANDOM)
    assert np.array_equal(degraded, photograph) == (name == "identity")


def is_in_range(entry: Range | IntegerRange | Choice, value: float | int | str) -> bool:
    if isinstance(entry, Choice):
        return value in entry.options
    return entry.low <= value <= entry.high and isinstance(value, int) == isinstance(entry, IntegerRange)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_parameters_are_in_their_ranges(name, photograph):
    small = cv2.resize(photograph, (64, 64), interpolation=cv2.INTER_AREA)
    drawn = set()
    for row in range(40):
        _, parameters = DEGRADATIONS[name](small, seeded_rng(1, row))
        assert json.loads(json.dumps(parameters)) == parameters
        for key, value in parameters.items():
            assert is_in_range(RANGES[name][key], value), (key, value)
            assert not isinstance(value, float) or round(value, 4) == value
        drawn |= parameters.keys()
    assert drawn == RANGES.get(name, {}).keys()


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (300, 100), (64, 700)])
@pytest.mark.parametrize("name", [*DEGRADATIONS, "cartoonize"])
def test_any_shape(name, size, photograph):
    image = cv2.resize(photograph, size[::-1], interpolation=cv2.INTER_AREA)
    for row in range(3):
        result = draw_cartoon(image) if name == "cartoonize" else DEGRADATIONS[name](image, seeded_rng(2, row))[0]
        assert result.shape == image.shape and result.dtype == np.uint8


def test_ranges_draw_all_of_their_values():
    rng = np.random.default_rng(0)
    values = [Range(0.01, 1, "", is_log=True).draw(rng) for _ in range(400)]
    assert min(values) >= 0.01 and max(values) <= 1
    assert 0.35 < np.mean([value < 0.1 for value in values]) < 0.65
    assert {IntegerRange(2, 4, "").draw(rng) for _ in range(50)} == {2, 3, 4}
    chosen = [Choice({"a": 0.9, "b": 0.1}, "").draw(rng) for _ in range(200)]
    assert 150 < chosen.count("a") < 200


def test_table_of_the_ranges(capsys):
    degradations.main([])
    table = capsys.readouterr().out.splitlines()
    assert (
        "| jpeg | quality | 5 to 40 | quality of the JPEG file at 512; its quantization steps scale with the side |"
        in table
    )
    assert "| denoise | photons | 12 to 500, logarithmic |" in "\n".join(table)
    assert len(table) == 2 + sum(map(len, RANGES.values()))


# ---- light


def test_srgb_conversion_and_its_round_trip_are_exact():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.abs(to_linear(every) - exact_linear(every)).max() < 1e-7
    assert np.array_equal(to_encoded(to_linear(every)), every)
    assert to_encoded(np.float32([[-1, 0, 0.5, 1, 7]])).tolist() == [[0, 0, 188, 255, 255]]


def test_variance_of_sensor_noise():
    rng, photons, read_noise = np.random.default_rng(0), 200.0, 0.01
    for light in (0.0, 0.1, 0.4, 0.9):
        noisy = camera.add_sensor_noise(np.full((400, 400), light, np.float32), photons, read_noise, rng)
        assert noisy.mean() == pytest.approx(light, abs=1e-3)
        assert noisy.var() == pytest.approx(light / photons + read_noise**2, rel=0.02)


def test_variance_of_denoise():
    ((degraded, parameters),) = find_results("denoise", gray(160, 512), {"kind": "sensor"})
    light = exact_linear(gray(160))[0, 0, 0]
    expected = light / parameters["photons"] + parameters["read_noise"] ** 2
    assert exact_linear(degraded).var() == pytest.approx(expected, rel=0.1)
    ((degraded, parameters),) = find_results("denoise", gray(128, 512), {"kind": "gaussian"})
    assert degraded.astype(float).std() == pytest.approx(parameters["sigma"], rel=0.05)


def test_low_light_reduces_the_light_by_its_gain(photograph):
    for row in range(4):
        degraded, parameters = DEGRADATIONS["low_light"](gray(220), seeded_rng(0, row))
        light = exact_linear(degraded).mean(axis=(0, 1))
        cast = 1 + parameters["warmth"] * np.array([1, 0, -1])
        assert light == pytest.approx(exact_linear(gray(220))[0, 0] * parameters["gain"] * cast, rel=0.03)
        assert DEGRADATIONS["low_light"](photograph, seeded_rng(0, row))[0].mean() < photograph.mean()


# ---- blur, JPEG, resolution


@pytest.mark.parametrize("kind", ["shake", "linear", "defocus"])
def test_blur_keeps_brightness_and_position(kind):
    points = gray(0)
    points[96:160, 96:160] = 255
    for degraded, _ in find_results("deblur", points, {"kind": kind}, count=3):
        light, before = exact_linear(degraded)[..., 0], exact_linear(points)[..., 0]
        assert light.mean() == pytest.approx(before.mean(), rel=5e-3)
        middle = [(light.sum(axis=1 - axis) * np.arange(256)).sum() / light.sum() for axis in (0, 1)]
        assert middle == pytest.approx([127.5, 127.5], abs=0.3)
        assert light.max() <= 1 and ((light > 0.01) & (light < 0.99)).sum() > 200


def test_shapes_of_kernels():
    disc = kernels.disc_kernel(6.0)
    assert disc.sum() == pytest.approx(1, abs=1e-5)
    assert (disc > 0.5 * disc.max()).sum() == pytest.approx(np.pi * 6**2, rel=0.05)
    line = kernels.path_kernel(np.linspace([-0.5, 0], [0.5, 0], 200), 20.0, 90.0)
    assert line.sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(np.nonzero(line.sum(axis=1) > 1e-3)) == pytest.approx(20, abs=1)
    assert np.ptp(np.nonzero(line.sum(axis=0) > 1e-3)) <= 2
    shake = kernels.shake_path(np.random.default_rng(1))
    assert np.ptp(shake[:, 0]) > np.ptp(shake[:, 1]) > 0
    oval = kernels.anisotropic_kernel(2.0, 0.5, 0.0)
    steps = np.arange(len(oval)) - len(oval) // 2
    assert (oval.sum(axis=0) * steps**2).sum() == pytest.approx(4, rel=0.1)
    assert (oval.sum(axis=1) * steps**2).sum() == pytest.approx(1, rel=0.1)


def test_sinc_is_a_low_pass_filter():
    response = np.abs(np.fft.fft2(np.pad(kernels.sinc_kernel(np.pi / 2), (0, 107))))
    assert response[0, :16].min() > 0.8  # of 128: up to a quarter of the sampling rate at 32
    assert response[0, 44:64].max() < 0.2
    assert kernels.sinc_kernel(1.5).min() < 0, "it rings"


def test_sharpen_is_a_gaussian_blur_in_linear_light(photograph):
    degraded, parameters = DEGRADATIONS["sharpen"](photograph, seeded_rng(0, 0))
    blurred = cv2.GaussianBlur(exact_linear(photograph), (0, 0), parameters["sigma"] / 2)  # sides up to 256
    assert np.abs(exact_linear(degraded) - blurred).max() < 0.006  # half a step of the 8 bits, at white
    assert cv2.Laplacian(degraded, cv2.CV_64F).std() < cv2.Laplacian(photograph, cv2.CV_64F).std()


def test_jpeg_matches_other_encoders(photograph):
    degraded, parameters = DEGRADATIONS["jpeg"](photograph, seeded_rng(0, 0))
    quality = camera.scale_quality(parameters["quality"], 0.5)  # sides up to 256
    _, file = cv2.imencode(".jpg", photograph[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert np.array_equal(degraded, cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1])
    stream = io.BytesIO()
    Image.fromarray(photograph).save(stream, "JPEG", quality=quality)
    difference = np.abs(np.asarray(Image.open(stream)).astype(int) - degraded)
    assert difference.mean() < 1.5, "the file of PIL at that quality, except for rounding"


def test_colorize_leaves_only_luma(photograph):
    degraded, parameters = DEGRADATIONS["colorize"](photograph, seeded_rng(0, 0))
    assert parameters == {}
    assert (degraded == degraded[..., :1]).all()
    luma = photograph @ np.array([0.299, 0.587, 0.114])
    assert np.abs(degraded[..., 0] - luma).max() <= 1


def test_super_resolve_removes_fine_detail():
    """Frequencies above the Nyquist frequency of the reduced image are removed from noise."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for row in range(5):
        degraded, parameters = DEGRADATIONS["super_resolve"](noise, seeded_rng(0, row))
        assert 3 <= parameters["shrink"] <= 5
        spectra = [np.abs(np.fft.fft2(image.mean(axis=2) - image.mean())) ** 2 for image in (noise, degraded)]
        frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
        high = [spectrum[frequency > 0.4].mean() for spectrum in spectra]
        assert high[1] < 0.05 * high[0]


# ---- weather


def test_haze_follows_koschmieders_law(photograph):
    degraded, parameters = DEGRADATIONS["dehaze"](photograph, seeded_rng(0, 1))
    rng = seeded_rng(0, 1)
    [entry.draw(rng) for entry in RANGES["dehaze"].values()]
    depth = weather.pseudo_depth(photograph, rng).astype(np.float64)
    assert depth.min() == pytest.approx(0.2, abs=1e-6) and depth.max() == pytest.approx(1, abs=1e-6)
    transmission = np.exp(-parameters["beta"] * depth)[..., None]
    airlight = parameters["airlight"] * np.array([1 - parameters["tint"], 1, 1 + parameters["tint"]])
    expected = exact_linear(photograph) * transmission + airlight * (1 - transmission)
    encoded = np.where(expected <= 0.0031308, expected * 12.92, 1.055 * np.abs(expected) ** (1 / 2.4) - 0.055)
    assert np.abs(degraded - np.clip(encoded, 0, 1) * 255).max() < 0.56


def test_the_top_of_the_image_is_farther_away(photograph):
    depths = np.mean([weather.pseudo_depth(gray(100), seeded_rng(0, row)) for row in range(8)], axis=0)
    assert depths[:64].mean() > depths[-64:].mean() + 0.2
    degraded, _ = DEGRADATIONS["dehaze"](photograph, seeded_rng(0, 0))
    assert degraded.std() < photograph.std()


def test_rain_streaks_have_their_slant_and_add_light():
    black = gray(0, 512)
    for row in range(3):
        degraded, parameters = DEGRADATIONS["derain"](black, seeded_rng(3, row))
        light = exact_linear(degraded)[..., 0]
        assert light.max() <= parameters["airlight"] + 0.01
        assert 0.005 < (light > light.mean() + 0.1).mean() < 0.2, "streaks, not a uniform veil"
        # The direction of least change of the structure tensor is that of the streaks.
        across, down = cv2.Sobel(light, cv2.CV_64F, 1, 0), cv2.Sobel(light, cv2.CV_64F, 0, 1)
        angle = 0.5 * np.arctan2(2 * (across * down).sum(), (across**2 - down**2).sum())
        assert np.rad2deg(-angle) == pytest.approx(parameters["slant"], abs=4)


def test_range_of_rain_streaks():
    parameters = {name: entry.draw(np.random.default_rng(0)) for name, entry in weather.DERAIN.items()}
    cover = weather.rain_streaks(200, 300, 0.5, parameters, np.random.default_rng(0))
    assert cover.shape == (200, 300) and cover.min() >= 0 and 0.2 < cover.max() <= 1


def test_raindrops_cover_a_part_of_the_image(photograph):
    image = cv2.resize(photograph, (512, 512), interpolation=cv2.INTER_CUBIC)
    for row in range(4):
        degraded, parameters = DEGRADATIONS["raindrop"](image, seeded_rng(0, row))
        changed = cv2.absdiff(degraded, image).max(axis=2) > 3
        assert 0.005 < changed.mean() < 0.5
        spots = cv2.connectedComponents(cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5))))[0]
        assert 3 <= spots <= parameters["drops"] + 3


def test_a_raindrop_shows_the_scene_upside_down():
    parameters = {"drops": 1, "radius": 40.0, "reach": 0.3}
    for seed in range(4):
        cover, shift, shine = weather.drop_maps((512, 512), 1.0, parameters, np.random.default_rng(seed))
        rows, columns = np.nonzero(cover)
        assert len(rows) > 30 and not shift[cover == 0].any() and not shine[cover == 0].any()
        for position, axis in ((columns, 0), (rows, 1)):
            sampled = position + shift[rows, columns, axis]
            assert np.polyfit(position, sampled, 1)[0] < -2, "reversed, and smaller than the scene"
            assert np.ptp(sampled) < 1.5 * 2 * parameters["reach"] * 512


# ---- contact sheet, benchmark


def test_contact_sheet_shows_every_task(tmp_path):
    output = tmp_path / "sheet.jpg"
    photo = str(REPOSITORY / "assets/photos/cat.jpg")
    degradations.main(["--contact_sheet", str(output), "--side", "64", "--photos", photo])
    assert Image.open(output).size == (6 * 64, 2 * (64 + LABEL_HEIGHT))


def test_contact_sheet_of_pairs(tmp_path, capsys):
    photo, output = str(REPOSITORY / "assets/photos/cat.jpg"), tmp_path / "pairs.png"
    flags = ["--contact_sheet", str(output), "--side", "64", "--tasks", "colorize", "cartoonize", "--photos", photo]
    degradations.main([*flags, photo])
    sheet = np.asarray(Image.open(output))[:, :, :3]
    assert sheet.shape == (2 * (64 + LABEL_HEIGHT), 128, 3)
    clean = centre_square(read_photograph(Path(photo)), 64)
    assert np.array_equal(sheet[-64:, :64], clean) and np.array_equal(sheet[LABEL_HEIGHT:][:64, 64:], clean)
    with pytest.raises(SystemExit):
        degradations.main(flags)
    assert "--tasks: 2 tasks need as many --photos, not 1" in capsys.readouterr().err


def test_benchmark_measures_every_task(capsys, tmp_path):
    data.main(["--sides", "64", "--pairs", "1", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    for task in ("cartoonize", *RANDOM, "colorize"):
        assert f"| {task} | " in printed
    assert "| 40,000 | 4 | 10,000 |" in printed and "| 128 | 4 | 32 |" in printed and "312.5 times fewer" in printed
    assert json.loads((tmp_path / "figures.json").read_text())["ours"]["64"]["derain"] > 0


def test_benchmark_skips_missing_albumentations(capsys):
    """The interpreter that runs the tests does not have it."""
    assert data.run_albumentations(Path(sys.executable), [64], 1) is None
    assert "skipped albumentations: ModuleNotFoundError" in capsys.readouterr().err


def test_benchmark_reports_all_invalid_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(["--pairs", "0", "--sides", "7", "--albumentations", "/none"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    for part in ("--pairs 0: must be at least 1", "--sides 7: must be", "--albumentations /none: does not exist"):
        assert part in error
