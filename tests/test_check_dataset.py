"""check_dataset.py finds each planted fault and nothing else, its cleaned copy is clean, its HTML report is safe."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from data_preparation import check_dataset
from data_preparation.checking import scan
from data_preparation.checking.diagnosis import find_exchanged
from data_preparation.generation.pair_rows import make_pair, pair_features
from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.toy_edits import EDITS
from tests.browser import CHROMIUM, INSTALL, running_chromium
from tests.pairs import save_pairs
from tests.runs import ENVIRONMENT, REPOSITORY, training_flags
from tests.test_pair_checks import encoded, photograph
from train_instruct_pix2pix import main as train
from utils.checks.near_copies import group_similar, hash_distance, near_pairs

NAMES = (
    "coffee",
    "city_1",
    "garden_2",
    "quay_3",
    "cat",
    "apartment_1",
    "hotel_2",
    "meadow_3",
    "park_1",
    "workshop_1",
    "desert_1",
    "palace_1",
    "raccoon",
    "savanna_1",
    "lab_1",
    "courtyard_2",
    "bridge_1",
    "pines_2",
    "arsenal_1",
    "sky_1",
)
HOSTILE = '<script>document.title = "taken over"</script><img src=x onerror="alert(1)">'


def good_rows() -> list[dict]:
    """Row n is photograph n with toy edit or degradation n, and with provenance."""
    tasks, rows = [*EDITS, *DEGRADATIONS], []
    for number, name in enumerate(NAMES):
        task, image = tasks[number], photograph(name)
        original, edited = image, image
        if task in EDITS:
            edited = EDITS[task](image)
        else:
            original = DEGRADATIONS[task](image, np.random.default_rng(number))[0]
        rows.append(
            make_pair(
                original,
                f"apply {task}",
                edited,
                task=task,
                source=f"{name}.jpg",
                seed=number,
                original_prompt="before",
                edited_prompt="after",
                settings={"strength": number},
                scores={"clip_sim_0": 0.5},
            )
        )
    return rows


def save(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=pair_features()).to_parquet(folder / "train-00000.parquet")
    return folder


def plant_faults(rows: list[dict]) -> dict[str, list[int]]:
    """Change rows; returns the expected findings: kind -> rows."""
    shifted = photograph(NAMES[1], (128, 128), (20, 20)), photograph(NAMES[1], (128, 128), (26, 13))
    rows[0]["edited_image"] = {"bytes": rows[0]["edited_image"]["bytes"][:700], "path": None}
    rows[1] |= make_pair(shifted[0], "grey", EDITS["grayscale"](shifted[1]), task="grayscale")
    rows[2]["edited_image"] = rows[2]["original_image"]
    rows[3]["edit_prompt"] = " "
    rows[4]["edited_image"] = encoded(np.zeros((128, 128, 3), np.uint8))
    rows[5]["edited_image"] = encoded(255 - photograph(NAMES[5], (128, 90)))
    rows[6]["edit_prompt"] = HOSTILE
    rows[7]["edit_prompt"] = "a small red boat, " * 30
    rows[9]["edit_prompt"] = "show the left half as a heat camera would"
    for row in (11, 15, 17):  # denoise, raindrop (which has no measure), colorize
        rows[row] |= dict(original_image=rows[row]["edited_image"], edited_image=rows[row]["original_image"])
    small = Image.fromarray(photograph(NAMES[8])).resize((48, 48))
    rows[8] |= make_pair(small, "a mosaic", EDITS["mosaic"](np.asarray(small)), task="mosaic")
    rows.append(dict(rows[10]))
    images = photograph("lobby_1"), EDITS["night"](photograph("lobby_1"))
    rows.append(make_pair(images[0], "exchange day and night", images[1]))
    rows.append(make_pair(images[1], "exchange day and night", images[0]))
    copies = [Image.open(io.BytesIO(rows[12][name]["bytes"])) for name in ("original_image", "edited_image")]
    copies = [np.asarray(image.resize((140, 140), Image.Resampling.BICUBIC)) for image in copies]
    files = [encoded(image, "JPEG", quality=85)["bytes"] for image in copies]
    rows.append(make_pair(files[0], rows[12]["edit_prompt"], files[1], task=rows[12]["task"]))
    return {
        "unreadable": [0],
        "misaligned": [1],
        "identical": [2],
        "no_prompt": [3],
        "blank": [4],
        "aspect": [5],
        "long_prompt": [7],
        "tiny": [8],
        "direction": [9],
        "swapped": [11, 17],
        "duplicate": [20],
        "exchanged": [21, 22],
        "near_duplicate": [23],
        "same_source": [20, 22, 23],
    }


@pytest.fixture(scope="module")
def good_dataset(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("good") / "pairs", good_rows())


@pytest.fixture(scope="module")
def faulty_dataset(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    rows = good_rows()
    faults = plant_faults(rows)
    return save(tmp_path_factory.mktemp("faulty") / "pairs", rows), faults


def check(dataset: Path, report_dir: Path, *flags: str) -> tuple[int, dict]:
    """(exit code, JSON report)."""
    code = check_dataset.main([str(dataset), "--report_dir", str(report_dir), *flags])
    return code, json.loads((report_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def faulty_report(faulty_dataset, tmp_path_factory) -> Path:
    """Folder of the reports of `faulty_dataset`."""
    folder = tmp_path_factory.mktemp("report")
    assert check(faulty_dataset[0], folder)[0] == 1
    return folder


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory) -> Path:
    """Folder of the reports of a dataset whose first row has HTML as its instruction and no edit."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = good_rows()[:3]
    rows[0]["edit_prompt"], rows[0]["edited_image"] = HOSTILE, rows[0]["original_image"]
    check(save(folder / "pairs", rows), folder / "report")
    return folder / "report"


def found_rows(report: dict) -> dict[str, list[int]]:
    return {kind: finding["rows"] for kind, finding in report["findings"].items()}


def test_good_pairs_have_no_findings(good_dataset, tmp_path, capsys):
    code, report = check(good_dataset, tmp_path)
    assert code == 0 and found_rows(report) == {} and report["verdict"] == "fine" and report["rows"] == len(NAMES)
    assert "no problems found" in capsys.readouterr().out
    assert report["different_originals"] == len(NAMES)
    assert sum(report["histograms"]["longer_side"]["series"]["original"]) == len(NAMES)
    assert report["histograms"]["tasks"]["labels"] == [*EDITS, *DEGRADATIONS][: len(NAMES)]


def test_every_planted_fault_is_found_in_its_row_and_nothing_else(faulty_dataset, tmp_path, capsys):
    folder, faults = faulty_dataset
    code, report = check(folder, tmp_path)
    assert code == 1 and report["verdict"] == "error"
    assert found_rows(report) == faults
    assert "shifted by 7 to the right and 6 up (pixels)" in report["findings"]["misaligned"]["details"]["1"]
    assert report["findings"]["near_duplicate"]["details"]["23"] == "as train[12]"
    printed = capsys.readouterr().out
    assert "train[11], train[17]" in printed and "9 rows with errors" in printed


def test_workers_give_the_same_report(faulty_dataset, faulty_report, tmp_path, monkeypatch):
    monkeypatch.setattr("data_preparation.checking.scan.ROWS_PER_JOB", 3)  # several jobs for each worker
    _, report = check(faulty_dataset[0], tmp_path, "--num_workers", "2")
    assert report | {"seconds": 0} == json.loads((faulty_report / "report.json").read_text()) | {"seconds": 0}


def test_max_rows_reports_row_numbers_of_the_dataset(faulty_dataset, tmp_path):
    folder, faults = faulty_dataset
    code, report = check(folder, tmp_path, "--max_rows", "15")
    assert report["rows"] == 15
    found = found_rows(report)
    assert found and all(set(rows) <= set(faults[kind]) for kind, rows in found.items())


def test_html_report_escapes_texts_of_the_dataset(hostile_report):
    page = (hostile_report / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<img src=x" not in page
    assert "http://" not in page and "https://" not in page and page.count("data:image/jpeg;base64,") == 2


def test_overlap_is_found_after_recompression_and_mirroring(good_dataset, tmp_path):
    tests = []
    for name, size, quality in (("cat", 90, 70), ("palace_1", 256, 40)):
        small = Image.fromarray(photograph(name)).resize((size, size), Image.Resampling.BICUBIC)
        file = encoded(np.asarray(small), "JPEG", quality=quality)["bytes"]
        tests.append(make_pair(file, "anything", photograph("rocket")))
    tests.append(make_pair(photograph("quay_1"), "anything", photograph("raccoon")[:, ::-1]))
    tests.append(make_pair(photograph("astronaut"), "anything", EDITS["fog"](photograph("astronaut"))))
    other = save(tmp_path / "other", tests)
    code, report = check(good_dataset, tmp_path / "report", "--against", str(other))
    overlap = report["findings"]["overlap"]
    assert code == 1 and overlap["rows"] == [NAMES.index(name) for name in ("cat", "palace_1", "raccoon")]
    assert "mirrored" in overlap["details"]["12"] and report["compared_with"] == {str(other): 4}


def test_cleaned_copy_is_clean_keeps_provenance_and_can_be_trained_on(faulty_dataset, tiny_base, tmp_path, capsys):
    folder, faults = faulty_dataset
    fixed = tmp_path / "fixed"
    flags = ("--fix", str(fixed), "--fix_swapped", "--fix_shifts")
    check(folder, tmp_path / "before", *flags)
    printed = capsys.readouterr().out
    assert "rejected, duplicate row: 1" in printed and "rejected, same pair in both directions: 2" in printed
    code, report = check(fixed, tmp_path / "after")
    kept = [row for row in range(24) if row not in (0, 2, 3, 4, 5, 20, 21, 22)]
    assert code == 0 and report["rows"] == len(kept)
    assert set(found_rows(report)) == {"long_prompt", "tiny", "direction", "near_duplicate", "same_source"}
    rows = datasets.load_dataset(str(fixed), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features == pair_features() and rows[kept.index(1)]["original_image"].size == (121, 122)
    swapped = rows[kept.index(11)]
    assert (swapped["task"], swapped["seed"], swapped["original_prompt"]) == ("denoise", 11, "after")
    assert json.loads(swapped["settings"]) == {"strength": 11} and swapped["source"] == f"{NAMES[11]}.jpg"
    original, edited = (np.asarray(swapped[name]) for name in ("original_image", "edited_image"))
    assert np.array_equal(edited, photograph(NAMES[11])) and not np.array_equal(original, edited)
    check(folder, tmp_path / "again", *flags)
    assert "already complete" in capsys.readouterr().out
    assert train(training_flags(tiny_base, fixed, tmp_path / "out", "--max_train_steps=1", "--report_to=none")) == 0


def test_fix_alone_drops_swapped_pairs_and_keeps_shifted_pairs(faulty_dataset, tmp_path, capsys):
    folder, faults = faulty_dataset
    check(folder, tmp_path / "before", "--fix", str(tmp_path / "fixed"))
    _, report = check(tmp_path / "fixed", tmp_path / "after")
    assert "swapped" not in report["findings"] and report["findings"]["misaligned"]["count"] == 1
    with pytest.raises(SystemExit):
        check(folder, tmp_path / "again", "--fix", str(tmp_path / "fixed"), "--fix_shifts")
    assert f"--fix {tmp_path / 'fixed'}: holds" in capsys.readouterr().err


def test_dry_run_only_warns(faulty_dataset, tiny_base, tmp_path, capsys):
    folder, _ = faulty_dataset
    flags = training_flags(tiny_base, folder, tmp_path / "out", "--dry_run", "--report_to=none", "--max_bad_rows=1")
    assert train(flags) == 0
    printed = capsys.readouterr().out
    assert "a quick check of 24 rows found" in printed and "nothing edited: 1 row, such as train[2]" in printed


@pytest.mark.parametrize("kind", ["saved", "metadata", "lists"])
def test_other_dataset_layouts(kind, tmp_path):
    image, edited = photograph("cat"), EDITS["negative"](photograph("cat"))
    folder = tmp_path / "pairs"
    if kind == "metadata":
        folder.mkdir()
        for name, pixels in (("a.png", image), ("b.png", edited)):
            Image.fromarray(pixels).save(folder / name)
        line = {"source_img_file_name": "a.png", "target_img_file_name": "b.png", "instruction": "negative"}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"instruction": ""}))
    else:
        prompts = [["negative", "left"], []] if kind == "lists" else ["negative", ""]
        columns = {"src_img": [encoded(image)] * 2, "edited_prompt_list": prompts, "edited_img": [encoded(edited)] * 2}
        rows = datasets.Dataset.from_dict(columns)
        for name in ("src_img", "edited_img"):
            rows = rows.cast_column(name, datasets.Image())
        rows.save_to_disk(str(folder))
    names = ["original_image_column=src_img", "edit_prompt_column=edited_prompt_list", "edited_image_column=edited_img"]
    names = [f"--{name}" for name in names] if kind == "saved" else []
    code, report = check(folder, tmp_path / "report", "--fix", str(tmp_path / "fixed"), *names)
    assert code == 1 and report["findings"]["no_prompt"]["rows"] == [1]
    _, fixed = check(tmp_path / "fixed", tmp_path / "after")
    assert fixed["rows"] == 1 and fixed["columns"]["prompt"] == "edit_prompt"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_rows", "0", "--num_workers", "-1", "--fix_swapped"], ["--max_rows 0", "--num_workers -1", "--fix"]),
        (["--dataset_split", "test"], ["'test' is not in", "train"]),
        (["--edited_image_column", "edit_prompt"], ["holds string, but an image is needed"]),
        (["--against", "/nowhere"], ["the folder /nowhere does not exist"]),
        (["--tokenizer", "/nowhere"], ["--tokenizer /nowhere"]),
    ],
)
def test_input_that_cannot_be_checked_gives_one_message(good_dataset, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        check_dataset.main([str(good_dataset), *flags])
    message = capsys.readouterr().err
    assert error.value.code == 2 and all(word in message for word in words)


def test_unknown_columns_and_a_report_inside_the_dataset_are_refused(tmp_path, capsys):
    folder = save_pairs(tmp_path / "pairs", 2)
    datasets.Dataset.from_dict({"a": [1], "b": ["text"]}).save_to_disk(str(tmp_path / "other"))
    for given in ([str(tmp_path / "other")], [str(folder), "--report_dir", str(folder / "report")]):
        with pytest.raises(SystemExit) as error:
            check_dataset.main(given)
        assert error.value.code == 2
    message = capsys.readouterr().err
    assert "are not known: name them with" in message and "is inside the dataset" in message


def test_tokens_are_counted_by_a_tokenizer(faulty_dataset, tmp_path):
    folder, _ = faulty_dataset
    _, report = check(folder, tmp_path, "--tokenizer", str(REPOSITORY / "assets/toy-sd/tokenizer"))
    detail = report["findings"]["long_prompt"]["details"]["7"]
    assert report["findings"]["long_prompt"]["rows"] == [7] and not detail.startswith("about")


def test_near_pairs_are_complete_and_exchanged_pairs_are_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(1, 2**64, 400, dtype=np.uint64)
    others = hashes[generator.permutation(400)].copy()
    for place in range(400):
        for bit in generator.choice(64, place % 12, replace=False):
            others[place] ^= np.uint64(1) << np.uint64(bit)
    for distance in (3, 7):
        expected = np.argwhere(hash_distance(hashes[:, None], others[None]) <= distance)
        assert np.array_equal(near_pairs(hashes, others, distance), expected) and len(expected) > 100
    assert group_similar(np.array([5, 0, 4, 0, 7 << 40], np.uint64)).tolist() == [0, 1, 0, 3, 4]
    assert find_exchanged(np.array([1, 2, 1]), np.array([9, 9, 8]), np.array([2, 1, 2])) == {0: 1, 1: 0}


def test_script_runs_as_a_process(good_dataset):
    command = [sys.executable, "data_preparation/check_dataset.py", str(good_dataset)]
    result = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "20 rows with 20 different originals" in result.stdout and "Traceback" not in result.stderr
    assert "row/s" in result.stderr


def test_a_check_that_was_killed_goes_on(good_dataset, tmp_path, monkeypatch, capsys):
    """The second run inspects only what is missing, and its report has the same findings."""
    flags = [str(good_dataset), f"--cache_dir={tmp_path / 'cache'}"]
    check_dataset.main([*flags, f"--report_dir={tmp_path / 'whole'}"])
    monkeypatch.setattr(scan, "ROWS_PER_JOB", 4)
    inspected, inspect_row = [], scan.inspect_row

    def inspect(*values):
        inspected.append(values)
        if len(inspected) == 15:
            raise KeyboardInterrupt
        return inspect_row(*values)

    monkeypatch.setattr(scan, "inspect_row", inspect)
    with pytest.raises(SystemExit):
        check_dataset.main([*flags, f"--report_dir={tmp_path / 'again'}"])
    assert "run the same command again to resume" in capsys.readouterr().err
    check_dataset.main([*flags, f"--report_dir={tmp_path / 'again'}"])
    assert len(inspected) == 15 + 20 - 12  # three shards of four rows were finished
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "again")]
    assert [report.pop("seconds") for report in reports] and reports[0] == reports[1]
    assert not list((tmp_path / "cache/checks").iterdir())


def test_two_checks_of_the_same_data_at_once(good_dataset, tmp_path, monkeypatch):
    """One takes the finished scan from under the other, which then makes its own; neither reports less."""
    flags, run = [str(good_dataset), f"--cache_dir={tmp_path / 'cache'}"], scan.run_generation
    check_dataset.main([*flags, f"--report_dir={tmp_path / 'alone'}"])

    def run_and_lose(*arguments, data_root, **settings):
        run(*arguments, data_root=data_root, **settings)
        if data_root.name != "scan":
            shutil.rmtree(data_root)

    monkeypatch.setattr(scan, "run_generation", run_and_lose)
    check_dataset.main([*flags, f"--report_dir={tmp_path / 'both'}"])
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "both")]
    assert [report.pop("seconds") for report in reports] and reports[0] == reports[1]
    assert not list((tmp_path / "cache/checks").iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)
def test_html_report_in_a_browser(faulty_dataset, faulty_report, hostile_report):
    with running_chromium() as chromium:
        for width in (1200, 390):
            page = chromium.new_page(viewport={"width": width, "height": 900})
            requested: list[str] = []
            page.on("request", lambda request, seen=requested: seen.append(request.url))
            page.goto((faulty_report / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert page.locator("section").count() == len(faulty_dataset[1])
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            assert all(url.startswith(("file:", "data:")) for url in requested)
            page.goto((hostile_report / "report.html").as_uri())
            assert page.title().endswith(", train") and HOSTILE in page.inner_text("body")
            page.close()
