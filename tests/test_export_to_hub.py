"""export_to_hub.py: splits, licences, the card, interruptions, and loading the dataset from the Hub again."""

import io
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageEnhance, ImageOps

from data_preparation.export_to_hub import main
from data_preparation.exporting import exports
from data_preparation.exporting.export_shards import DROPPED, RowKeys, assign_splits
from data_preparation.exporting.licensing import choose_licence
from data_preparation.exporting.reading import scrub, scrub_json, scrub_text
from data_preparation.generation.pair_rows import make_pair, pair_features
from tests.hub_server import Hub, Refused
from tests.pairs import make_dataset, make_image, make_rows, write_image_folder
from utils.errors import InputError
from utils.licences import (
    Licence,
    find_dataset_license,
    is_hub_licence,
    licence_conflicts,
    merged_license_fields,
    restrictions_of,
    strictest_licence,
    strictness,
    terms_of,
    to_hub_licence,
)

SCRIPT = str(Path(__file__).parent.parent / "data_preparation" / "export_to_hub.py")
PHOTOS = Path(__file__).parent.parent / "assets/photos"
SECRET = "hf_" + "q" * 34
PROMPTS = {"negative": "invert | the colours", "darker": "make it darker"}


def make_set(folder: Path, num_rows: int = 60, num_sources: int = 20, group: int = 7, **changes) -> Path:
    """A generated dataset: two files, two tasks, and a held-out phrasing in every tenth row.

    changes: column -> function from the row number to its value.
    """
    rows = []
    for index in range(num_rows):
        source = index % num_sources
        pixels = np.asarray(make_image(source, (24, 32)))
        task = list(PROMPTS)[index % 2]
        values = dict(
            task=task,
            phrasing="heldout" if index % 10 == 9 else "train",
            source=f"photo {source}.jpg",
            source_dataset="someone/photos",
            source_license="cc-by-4.0",
            seed=index,
            settings={"gain": index / 10, "kind": "soft"},
            scores={"clip_sim_dir": index / 100},
        )
        values |= {name: value(index) for name, value in changes.items()}
        rows.append(make_pair(pixels, PROMPTS[task], 255 - pixels if index % 2 else pixels // 2, **values))
    (folder / "data").mkdir(parents=True)
    features = pair_features()
    for number, part in enumerate((rows[: num_rows // 3], rows[num_rows // 3 :])):
        table = pa.table({name: [row[name] for row in part] for name in features}, schema=features.arrow_schema)
        pq.write_table(table, folder / "data" / f"train-{number:05d}-of-00002.parquet", row_group_size=group)
    write_manifest(folder, num_rows)
    return folder


def write_manifest(folder: Path, rows: int, **changes) -> None:
    settings = {"tasks": list(PROMPTS), "dataset_id": "/home/anna/photos", "hub_token": SECRET}
    manifest = {"format": 1, "complete": True, "rows": rows, "rejected": {"identical": 3}, "settings": settings}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def run(data_root: Path, *flags: str, repo_id: str = "user/my-pairs") -> Path:
    main(["--data_root", str(data_root), "--repo_id", repo_id, *flags])
    return data_root.with_name(f"{data_root.name}-export")


def refused(capsys: pytest.CaptureFixture, data_root: Path, *flags: str, repo_id: str = "user/my-pairs") -> str:
    with pytest.raises(SystemExit) as stopped:
        run(data_root, *flags, repo_id=repo_id)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def rows_of(folder: Path) -> dict[str, list[dict]]:
    """All rows of an export or a generated dataset by split, with images as bytes."""
    found = defaultdict(list)
    for path in sorted((folder / "data").glob("*.parquet")):
        found[path.name.split("-")[0]] += pq.read_table(path).to_pylist()
    return dict(found)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def by_seed(rows: list[dict]) -> dict[int, dict]:
    return {row["seed"]: row for row in rows}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return make_set(tmp_path / "pairs")


# --- splits and files -----------------------------------------------------------------------------------------------


def test_sources_are_split_and_rows_are_unchanged(tmp_path: Path, capsys):
    """No source is in two splits, shares are near --split, train has no held-out phrasing, rows keep their bytes."""
    pairs = make_set(tmp_path / "pairs", phrasing=lambda row: "heldout" if row % 7 == 6 else "train")
    export = rows_of(run(pairs, "--no_push", "--split=70,15,15", "--max_shard_size=8KB"))
    sources = {split: {row["source"] for row in rows} for split, rows in export.items()}
    assert set(sources) == {"train", "validation", "test"}
    assert sum(map(len, sources.values())) == 20
    assert 6 <= len(export["test"]) <= 12 and 6 <= len(export["validation"]) <= 12
    given = by_seed(rows_of(pairs)["train"])
    for rows in export.values():
        assert all(row == given[row["seed"]] for row in rows)
        assert [row["seed"] for row in rows] == sorted(row["seed"] for row in rows)
    exported = {row["seed"] for rows in export.values() for row in rows}
    assert all(row["phrasing"] == "train" for row in export["train"])
    missing = [given[seed] for seed in given.keys() - exported]
    assert all(row["phrasing"] == "heldout" and row["source"] in sources["train"] for row in missing)
    held_out = [row for split in ("validation", "test") for row in export[split] if row["phrasing"] == "heldout"]
    assert len(held_out) + len(missing) == 8 and held_out and missing
    assert f"dropped: {len(missing)} rows" in capsys.readouterr().err


def test_files_depend_on_the_seed_and_not_on_the_number_of_workers(pairs: Path, tmp_path: Path):
    flags = ("--no_push", "--max_shard_size=8KB", "--split=80,10,10")
    first = files_of(run(pairs, *flags))
    assert len([name for name in first if name.startswith("data/train")]) > 2
    elsewhere = tmp_path / "elsewhere"
    run(pairs, *flags, "--num_workers=2", f"--export_dir={elsewhere}")
    assert files_of(elsewhere) == first
    other = tmp_path / "other"
    run(pairs, *flags, "--seed=1", f"--export_dir={other}")
    first_sources, other_sources = (
        {row["source"] for row in rows_of(folder)["validation"]} for folder in (elsewhere, other)
    )
    assert first_sources != other_sources


def test_rows_without_a_source_are_split_by_their_original(tmp_path: Path):
    pairs = make_set(tmp_path / "pairs", source=lambda row: None)
    export = rows_of(run(pairs, "--no_push", "--split=50,25,25"))
    originals = [{row["original_image"]["bytes"] for row in rows} for rows in export.values()]
    assert len(set.union(*originals)) == sum(map(len, originals)) == 20


@pytest.mark.parametrize("num_sources", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("split", [(1, 0, 0), (0.9, 0.05, 0.05), (0.5, 0.5, 0), (0.34, 0.33, 0.33)])
def test_assign_splits(num_sources: int, split: tuple):
    """Each split with a share gets a source, others get none; too few sources are refused."""
    keys = RowKeys(
        [bytes([i % num_sources]) * 16 for i in range(3 * num_sources)], np.zeros(3 * num_sources, bool), "", {}, {}
    )
    if num_sources < sum(share > 0 for share in split):
        with pytest.raises(InputError, match="100,0,0"):
            assign_splits(keys, split, 0)
        return
    splits = assign_splits(keys, split, 0)
    counts = [int((splits == number).sum()) for number in range(3)]
    assert [count > 0 for count in counts] == [share > 0 for share in split]
    assert sum(counts) == 3 * num_sources
    if num_sources == 100:
        assert np.allclose(np.array(counts) / 300, split, atol=0.02)


def test_sources_with_held_out_phrasings_go_to_test_first():
    keys = RowKeys([bytes([i]) * 16 for i in range(40)], np.arange(40) < 2, "", {}, {})
    splits = assign_splits(keys, (0.9, 0.05, 0.05), 3)
    assert set(splits[:2]) == {2} and DROPPED not in splits
    with pytest.raises(InputError, match="no row to train on"):
        assign_splits(keys._replace(is_held_out=np.ones(40, bool)), (0.9, 0.05, 0.05), 3)


@pytest.mark.parametrize("kind", ["saved", "files", "known", "folder"])
def test_other_kinds_of_datasets(kind: str, tmp_path: Path):
    """What the training scripts accept: a saved dataset, data files, other known columns, a metadata file."""
    folder, rows = tmp_path / "given", make_rows(12)
    if kind == "folder":
        paths = write_image_folder(folder, 12)
        lines = [dict(zip(paths, row, strict=True)) for row in zip(*paths.values(), strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif kind == "known":
        rows = {
            "input_image": rows["original_image"],
            "edit_prompt": rows["edit_prompt"],
            "extra": list(range(12)),
            "edited_image": rows["edited_image"],
        }
        make_dataset(rows, "input_image").save_to_disk(str(folder))
    elif kind == "saved":
        make_dataset(rows).save_to_disk(str(folder))
    else:
        folder.mkdir()
        make_dataset(rows).to_parquet(folder / "train.parquet")
    export = run(folder, "--no_push", "--license=mit", "--accept_unknown_license", "--split=50,25,25")
    found = [row for rows in rows_of(export).values() for row in rows]
    assert list(found[0]) == ["original_image", "edit_prompt", "edited_image"]
    expected = make_rows(12)
    key = lambda row: int(row["edit_prompt"].split()[-1])  # noqa: E731
    for index, row in enumerate(sorted(found, key=key)):
        assert row == {name: expected[name][index] for name in row}
    assert str(tmp_path) not in (export / "README.md").read_text()


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resumes_after_kill(pairs: Path, tmp_path: Path):
    """After SIGKILL at any moment there is no export or a complete one, and the same command completes it."""
    flags = ["--no_push", "--max_shard_size=4KB", "--split=80,10,10"]
    whole = files_of(run(pairs, *flags))
    rng, export, killed = np.random.default_rng(0), tmp_path / "again", 0
    command = [
        sys.executable,
        SCRIPT,
        "--data_root",
        pairs,
        "--repo_id",
        "user/my-pairs",
        *flags,
        "--export_dir",
        export,
    ]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        unfinished = tmp_path / "again.unfinished" / "data"
        start = {path.name for path in unfinished.glob("t*")}
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if {path.name for path in unfinished.glob("t*")} - start:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        assert not export.exists() or files_of(export) == whole
        if export.exists():
            break
    assert killed
    subprocess.run(command, check=True, capture_output=True)
    assert files_of(export) == whole
    assert not (tmp_path / "again.unfinished").exists()


def test_only_missing_and_damaged_shards_are_written_again(pairs: Path, monkeypatch, capsys):
    flags = ("--no_push", "--max_shard_size=8KB")
    export = run(pairs, *flags)
    whole, unfinished = files_of(export), export.with_name("pairs-export.unfinished")
    export.rename(unfinished)
    (unfinished / "README.md").unlink()
    files = sorted((unfinished / "data").iterdir())
    kept = files[0].stat().st_ino
    files[1].write_bytes(files[1].read_bytes()[:-5])
    (unfinished / "data" / f".{files[2].name}.1").write_bytes(b"half")
    run(pairs, *flags)
    assert f"resuming: {len(files) - 1} of {len(files)}" in capsys.readouterr().err
    assert files_of(export) == whole
    assert (export / "data" / files[0].name).stat().st_ino == kept


def test_another_export_is_replaced_only_with_overwrite(pairs: Path, capsys):
    export = run(pairs, "--no_push")
    before = files_of(export)
    assert "other rows or settings" in refused(capsys, pairs, "--no_push", "--seed=5")
    assert files_of(export) == before
    run(pairs, "--no_push", "--license=cc-by-nc-4.0")  # only the card changes
    assert {name for name, content in files_of(export).items() if content != before[name]} == {
        "README.md",
        "export.json",
    }
    run(pairs, "--no_push", "--seed=5", "--overwrite")
    assert files_of(export) != before and not export.with_name("pairs-export.old").exists()
    (export / "export.json").unlink()
    assert "is not an export" in refused(capsys, pairs, "--no_push", "--overwrite")


def test_copies_of_a_photograph_are_in_one_split(tmp_path: Path, capsys):
    """Resized, compressed, mirrored and brighter ones under other names; an image without contrast joins nothing."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))[:12]]
    variants = [
        lambda image: image,
        lambda image: image.resize((image.width // 2, image.height // 2)),
        compress,
        ImageOps.mirror,
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        lambda image: Image.new("RGB", image.size, image.getpixel((0, 0))),
    ]
    rows = []
    for number, photograph in enumerate(photographs):
        for kind, change in enumerate(variants):
            image = np.asarray(change(photograph))
            rows.append(make_pair(image, "invert it", 255 - image, source=f"{kind}-{number}.png", task="negative"))
    folder, features = tmp_path / "pairs", pair_features()
    (folder / "data").mkdir(parents=True)
    table = pa.table({name: [row[name] for row in rows] for name in features}, schema=features.arrow_schema)
    pq.write_table(table, folder / "data/train-00000-of-00001.parquet", row_group_size=7)
    write_manifest(folder, len(rows))
    first = None
    for seed, workers in ((0, 0), (1, 2), (2, 0)):
        flags = ("--no_push", "--split=60,20,20", f"--seed={seed}", "--overwrite", f"--num_workers={workers}")
        export = run(folder, *flags, "--license=mit", "--accept_unknown_license")
        assert f"{4 * len(photographs)} source images are near copies of others" in capsys.readouterr().err
        splits = {row["source"]: split for split, found in rows_of(export).items() for row in found}
        assert len(set(splits.values())) == 3 and len(splits) == len(rows)
        for number in range(len(photographs)):
            assert len({splits[f"{kind}-{number}.png"] for kind in range(5)}) == 1, (seed, number)
        assert splits != first
        first = splits


def compress(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=35)
    return Image.open(buffer).convert("RGB")


# --- licences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("carried", "source", "is_allowed"),
    [
        ("mit", "cc0-1.0", True),
        ("mit", "Public domain", True),
        ("apache-2.0", "mit", True),
        ("mit", "apache-2.0", False),
        ("mit", "cc-by-4.0", False),
        ("cc-by-4.0", "mit", True),
        ("cc0-1.0", "cc-by-4.0", False),
        ("mit", "cc-by-nc-4.0", False),
        ("cc-by-4.0", "cc-by-nc-4.0", False),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", True),
        ("cc-by-nc-4.0", "cc-by-4.0", True),
        ("mit", "cc-by-sa-4.0", False),
        ("cc-by-sa-4.0", "cc-by-sa-3.0", True),
        ("cc-by-sa-3.0", "cc-by-sa-4.0", False),
        ("cc-by-sa-4.0", "CC BY-SA 1.0", False),
        ("cc-by-sa-4.0", "CC BY-SA 2.0", True),
        ("gpl-3.0", "gpl-2.0", False),
        ("gpl-3.0", "gpl-3.0", True),
        ("cc-by-nc-sa-4.0", "cc-by-sa-4.0", False),
        ("cc-by-sa-4.0", "gpl-3.0", False),
        ("mit", "CC BY-NC-ND 4.0", False),
        ("cc-by-nc-4.0", "cc-by-nc-nd-4.0", False),
        ("mit", "creativeml-openrail-m", False),
        ("openrail", "creativeml-openrail-m", True),
        ("openrail++", "llama2", False),
        ("llama3.1", "llama3.1", True),
        ("gpl-2.0", "apache-2.0", False),
        ("gpl-3.0", "apache-2.0", True),
        ("cc-by-4.0", "some research licence", False),
        ("cc-by-nc-4.0", "some research licence", True),
        ("mit", "nobody knows", True),
    ],
)
def test_licence_conflicts(carried: str, source: str, is_allowed: bool):
    problems = licence_conflicts(carried, [Licence("someone/photos", source, ())])
    assert bool(problems) != is_allowed
    assert all("someone/photos" in problem and source in problem for problem in problems)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mit", "cc-by-nc-4.0", "cc0-1.0"], "cc-by-nc-4.0"),
        (["cc-by-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["cc-by-nc-4.0", "cc-by-sa-4.0"], None),
        (["cc-by-nc-4.0", "creativeml-openrail-m"], None),
        (["Public domain"], "cc0-1.0"),
        (["mit", "cc-by-4.0"], "cc-by-4.0"),
        (["zlib", "apache-2.0", "mit"], "apache-2.0"),
        (["cc-by-nc-4.0", "apache-2.0"], "cc-by-nc-4.0"),
        (["unheard of"], None),
        (["cc by 4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
    ],
)
def test_strictest_licence(names: list[str], expected: str | None):
    assert strictest_licence([Licence(name, name, ()) for name in names]) == expected


def test_photographs_that_the_card_does_not_license():
    """The card of Imagenette is about its code; the photographs are ImageNet's."""
    licence = find_dataset_license("frgfm/imagenette")
    assert terms_of(licence) == {"notice", "attribution", "non-commercial"} and not is_hub_licence(licence)
    assert terms_of(find_dataset_license("detection-datasets/coco")) is None


def test_order_of_strictness():
    order = ["cc0-1.0", "mit", "apache-2.0", "cc-by-4.0", "openrail", "cc-by-sa-4.0", "cc-by-nc-4.0"]
    order += ["cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "never heard of"]
    assert sorted(reversed(order), key=strictness) == order


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (["mit", "cc-by-4.0"], {"license": "cc-by-4.0"}),
        (["creativeml-openrail-m"] * 2, {"license": "creativeml-openrail-m"}),
        (["openrail++", "cc-by-nc-4.0"], {"license": "other", "license_name": "see-the-sources"}),
        (["openrail++", "llama2"], {"license": "other", "license_name": "see-the-sources"}),
        (["apache-2.0", "gpl-2.0"], {"license": "other", "license_name": "see-the-sources"}),
        (["mit", ""], {"license": "other", "license_name": "see-the-sources"}),
        (["sai-nc-community"], {"license": "other", "license_name": "sai-nc-community"}),
        (["mit", "CC BY-NC 2.5"], {"license": "other", "license_name": "cc-by-nc-2.5"}),
        ([""], {"license": "other", "license_name": "unknown"}),
    ],
)
def test_licence_of_a_work_made_from_several(names: list[str], fields: dict):
    """The strictest of them, never the alphabetically first; "other" where none meets the terms of all."""
    assert merged_license_fields([Licence(name, name, ()) for name in names]) == fields


def test_names_of_licences():
    names = {"CC BY-SA 4.0": "cc-by-sa-4.0", "CC0": "cc0-1.0", "cc_by_nc": "cc-by-nc-4.0"}
    assert {name: to_hub_licence(name) for name in names} == names
    assert terms_of("other") is None and terms_of(None) is None and terms_of("cc0-1.0") == frozenset()
    assert terms_of("sai-nc-community") == {"notice", "attribution", "non-commercial"}
    assert terms_of("cc-by-nc-2.5") == terms_of("cc-by-nc-4.0") and not is_hub_licence("cc-by-nc-2.5")
    assert all(is_hub_licence(name) for name in ("cc-by-nc-sa-2.0", "llama3.1", "unknown", "openrail++"))
    assert not any(is_hub_licence(name) for name in ("cc-by-1.0", "cc-by-nc-nd-2.5", "sai-nc-community", "proprietary"))
    assert restrictions_of("cc-by-nc-nd-4.0") == ("non-commercial", "no derivatives")


@pytest.mark.parametrize(
    ("licence", "flags", "words"),
    [
        ("cc-by-nc-4.0", ["--license=mit"], ["attribution and non-commercial", "must be cc-by-nc-4.0"]),
        ("cc-by-sa-4.0", ["--license=cc-by-4.0"], ["requires the same licence", "must be cc-by-sa-4.0"]),
        ("cc-by-nd-4.0", [], ["someone/photos", "forbids derived works", "--license cc-by-nd-4.0"]),
        ("cc-by-nd-4.0", ["--license=cc-by-4.0"], ["someone/photos", "no derivatives"]),
        (None, [], ["someone/photos", "not known", "--accept_unknown_license", "--license other"]),
        (None, ["--accept_unknown_license"], ["no source has a known licence", "--license"]),
        ("cc-by-4.0", ["--license=my-own"], ["--license my-own", "cc-by-nc-4.0", "other"]),
    ],
)
def test_licence_that_permits_too_much_is_refused(licence, flags, words, tmp_path: Path, capsys):
    pairs = make_set(tmp_path / "pairs", source_license=lambda row: licence)
    message = refused(capsys, pairs, "--no_push", *flags)
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs"]


@pytest.mark.parametrize(
    ("licence", "flags", "fields"),
    [
        ("cc-by-nc-4.0", [], {"license": "cc-by-nc-4.0"}),
        ("Imagenet research terms", [], {"license": "other", "license_name": "imagenet-research-terms"}),
        ("cc-by-nd-4.0", ["--license=cc-by-nd-4.0"], {"license": "cc-by-nd-4.0"}),
        (None, ["--license=mit", "--accept_unknown_license"], {"license": "mit"}),
        (None, ["--license=other"], {"license": "other", "license_name": "see-each-row"}),
    ],
)
def test_licence_in_the_card(licence, flags, fields, tmp_path: Path):
    pairs = make_set(tmp_path / "pairs", 30, source_license=lambda row: licence)
    front, text = read_card(run(pairs, "--no_push", *flags))
    assert {name: front.get(name) for name in fields} == fields
    assert f"| source | `someone/photos` | {licence or 'not known'}" in text


def test_licences_of_models():
    """A non-commercial model forbids commercial use; the card tells of OpenRAIL; unknown licences are refused."""
    photos = [Licence("someone/photos", "cc-by-4.0", ())]
    turbo = [Licence("stabilityai/sdxl-turbo", "sai-nc-community", ("non-commercial",))]
    with pytest.raises(InputError, match="stabilityai/sdxl-turbo.*cc-by-4.0 drops its non-commercial"):
        choose_licence(photos, turbo, "cc-by-4.0", False)
    assert choose_licence(photos, turbo, None, False).licence == "cc-by-nc-4.0"
    choice = choose_licence(photos, [Licence("some/base", "creativeml-openrail-m", ())], "cc-by-4.0", False)
    assert choice.licence == "cc-by-4.0" and "Attachment A" in choice.notes[0]
    with pytest.raises(InputError, match="some/unknown"):
        choose_licence(photos, [Licence("some/unknown", "", ())], None, False)


# --- the card -------------------------------------------------------------------------------------------------------


def read_card(export: Path) -> tuple[dict, str]:
    _, front, text = (export / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_card(tmp_path: Path):
    models = [{"id": "some/base", "revision": "abc123"}]
    pairs = make_set(tmp_path / "pairs", models=lambda row: models)
    export = run(pairs, "--no_push", "--license=cc-by-4.0", "--accept_unknown_license")
    front, text = read_card(export)
    rows = rows_of(export)
    count = sum(map(len, rows.values()))
    assert front["license"] == "cc-by-4.0" and front["language"] == ["en"] and front["pretty_name"] == "my pairs"
    assert front["task_categories"] == ["image-to-image"] and front["size_categories"] == ["n<1K"]
    assert front["source_datasets"] == ["someone/photos"] and {"negative", "darker"} < set(front["tags"])
    card_rows = {split["name"]: split["num_examples"] for split in front["dataset_info"]["splits"]}
    assert card_rows == {split: len(found) for split, found in rows.items()}
    assert [feature["name"] for feature in front["dataset_info"]["features"]] == list(pair_features())
    for split in front["configs"][0]["data_files"]:
        assert len(list(export.glob(split["path"]))) >= 1
    scores = [json.loads(row["scores"])["clip_sim_dir"] for found in rows.values() for row in found]
    numbers = (np.mean(scores), min(scores), *np.percentile(scores, (5, 50, 95)))
    assert f"| {count} | " + " | ".join(f"{number:.3f}" for number in numbers) in text
    for words in (
        "| identical | 3 |",
        "invert \\| the colours",
        "| `some/base` | `abc123` |",
        "darker | gain | 0.1 to",
        'load_dataset("user/my-pairs"',
        "--dataset_name=user/my-pairs",
        "| dataset_id | `photos` |",
        "assets/grid.jpg",
    ):
        assert words in text, words
    with Image.open(export / "assets" / "grid.jpg") as grid:
        assert grid.width > 900 and grid.height > 700


def test_values_in_the_card_are_inert(tmp_path: Path):
    """Pipes, line breaks, backticks and template code in values change neither the tables nor the template."""
    pairs = make_set(
        tmp_path / "pairs",
        task=lambda row: "a | b\n# {{ 7 * 7 }} {% if %}",
        settings=lambda row: {"kind": "x\n## y {{ card_data }}"},
        models=lambda row: [{"id": "some`\n# {{ 7 * 7 }}", "revision": "r|1"}],
    )
    front, text = read_card(run(pairs, "--no_push", "--license=cc-by-4.0", "--accept_unknown_license"))
    assert "\n# {{" not in text and "\n## y" not in text and "49" not in text
    assert "| a \\| b # {{ 7 * 7 }} {% if %} | kind | x ## y {{ card_data }} |" in text
    assert "| `some' # {{ 7 * 7 }}` | `r\\|1` | 60 |" in text
    assert not set(front["tags"]) - {"instruct-pix2pix", "image-editing", "instruction-tuning"}


def test_nothing_private_is_exported(tmp_path: Path):
    """Paths of this machine, the user name and tokens are in none of the files."""
    pairs = make_set(
        tmp_path / "pairs",
        source=lambda row: f"/home/anna/photos/{row % 20}.jpg",
        source_license=lambda row: "mit",
        source_dataset=lambda row: "/home/anna/photos",
        settings=lambda row: {"file": "C:\\Users\\anna\\lut.cube", "n": row},
        models=lambda row: [{"id": "/home/anna/models/editor", "revision": SECRET}],
    )
    for content in files_of(run(pairs, "--no_push", "--license=mit", "--accept_unknown_license")).values():
        assert not [word for word in (b"anna", SECRET.encode(), str(tmp_path).encode()) if word in content]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/anna/a b.jpg", "a b.jpg"),
        ("~/x/y.png", "y.png"),
        ("photos/1.jpg", "photos/1.jpg"),
        ("a/b", "a/b"),
        ("file:///srv/x/y", "y"),
        ("https://site.org/a/b.jpg", "https://site.org/a/b.jpg"),
        ("and/or", "and/or"),
        ("C:\\Users\\anna\\a.png", "a.png"),
        ("read from /srv/data/x.csv, then", "read from x.csv, then"),
        ("", ""),
    ],
)
def test_scrubbing(text: str, clean: str):
    assert scrub_text(text) == clean
    assert scrub({"a": [text], "my_token": "x"}) == {"a": [clean], "my_token": "HIDDEN"}
    assert scrub_json(json.dumps({"b": 1, "a": "x/y"})) == '{"b": 1, "a": "x/y"}'  # untouched to the byte


# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split=80,10"], ["--split 80,10", "sum to 100"]),
        (["--split=0,50,50"], ["no rows for train"]),
        (["--max_shard_size=big"], ["--max_shard_size big", "500MB"]),
        (["--seed=-1"], ["--seed -1"]),
        (["--num_workers=-2"], ["--num_workers -2"]),
        (["--language=english please"], ["--language"]),
        (["--private"], ["--private", "--no_push"]),
        (["--repo_id=a/b/c"], ["--repo_id a/b/c", "owner/name"]),
        (["--data_root=nowhere"], ["--data_root nowhere", "no such folder"]),
        (["--split=1", "--seed=-1", "--max_shard_size=1"], ["--split 1", "--seed -1", "--max_shard_size 1"]),
    ],
)
def test_all_wrong_flags_are_reported_together(flags, words, pairs: Path, capsys):
    message = refused(capsys, pairs, "--no_push", *flags)
    assert all(word in message for word in words), message


def test_wrong_folders_are_refused(pairs: Path, tmp_path: Path, capsys):
    assert "every row twice" in refused(capsys, pairs, "--no_push", f"--export_dir={pairs / 'export'}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "is not an export" in refused(capsys, pairs, "--no_push", f"--export_dir={tmp_path / 'mine'}")
    captions = tmp_path / "captions"
    (captions / "data").mkdir(parents=True)
    pq.write_table(pa.table({"edit_prompt": ["make it darker"]}), captions / "data" / "train-00000-of-00001.parquet")
    write_manifest(captions, 1)
    assert "columns of captions are not known" in refused(capsys, captions, "--no_push")
    write_manifest(pairs, 60, complete=False)
    assert "not complete" in refused(capsys, pairs, "--no_push")
    write_manifest(pairs, 60)
    (pairs / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    assert "not a complete parquet file" in refused(capsys, pairs, "--no_push")


def test_flag_errors_import_nothing_heavy():
    code = (
        f"import sys, runpy; sys.argv = ['export_to_hub.py', '--split=1', '--data_root=x', '--repo_id=y']\n"
        f"try: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "heavy = {'torch', 'datasets', 'numpy', 'pyarrow', 'PIL', 'huggingface_hub', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- the Hub --------------------------------------------------------------------------------------------------------

LOAD_BACK = """
import datasets, json, sys
for split in ("train", "validation", "test"):
    rows = datasets.load_dataset(sys.argv[1], split=split)
    assert isinstance(rows.features["original_image"], datasets.Image)
    rows[0]["edited_image"].convert("RGB")
    for name in ("original_image", "edited_image"):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows.to_parquet(f"{split}-00000-of-00001.parquet")
first = next(iter(datasets.load_dataset(sys.argv[1], split="test", streaming=True)))
assert first["original_image"].size == (32, 24)
"""


def load_back(hub: Hub, tmp_path: Path, repo_id: str) -> dict[str, list[dict]]:
    """The rows as another user loads them, in a process with an empty cache."""
    work = tmp_path / f"elsewhere-{len(hub.requests)}"
    (work / "data").mkdir(parents=True)
    environment = hub.environment(work / "cache", token="read-token")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_BACK, repo_id], cwd=work / "data", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return rows_of(work)


@pytest.mark.slow
@pytest.mark.parametrize("xet", [True, False])
def test_private_dataset_is_uploaded_and_loaded_again(xet: bool, hub: Hub, pairs: Path, tmp_path: Path):
    """As a process, with Xet storage and with plain HTTP: rows keep their bytes, and no file has the token."""
    environment = hub.environment(tmp_path / "cache", token="write-token", xet=xet)
    command = [
        sys.executable,
        SCRIPT,
        "--data_root",
        str(pairs),
        "--repo_id",
        "my-pairs",
        "--private",
        "--max_shard_size=8KB",
        "--split=80,10,10",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"published: {hub.url}/datasets/user/my-pairs" in result.stdout
    export = pairs.with_name("pairs-export")
    repo = hub.repos["datasets/user/my-pairs"]
    assert repo.private and repo.messages == ["initial commit", "Add pairs", "Card"]
    assert {name: repo.read(name) for name in repo.files if name != ".gitattributes"} == files_of(export)
    assert not [content for content in files_of(tmp_path / "hub").values() if b"write-token" in content]
    assert any(request.path.startswith("/xet/") for request in hub.requests) == xet
    if xet:  # both repositories have the same files
        assert load_back(hub, tmp_path, "user/my-pairs") == rows_of(export)


@pytest.mark.parametrize(
    ("token", "repo_id", "flags", "words"),
    [
        (None, "my-pairs", [], ["--repo_id needs a login", "hf auth login"]),
        ("wrong-token", "my-pairs", [], ["wrong or expired"]),
        ("read-token", "my-pairs", [], ["may only read", "role 'write'"]),
        ("write-token", "other/pairs", [], ["belongs to user", "--repo_id under user or team"]),
        ("write-token", "user/public", ["--private"], ["--private was given", "public"]),
    ],
)
def test_missing_right_to_push_is_reported_first(token, repo_id, flags, words, client: Hub, pairs: Path, capsys):
    huggingface_hub.HfApi(token="write-token").create_repo("user/public", repo_type="dataset")
    login = [f"--hub_token={token}"] if token else []
    message = refused(capsys, pairs, *login, *flags, repo_id=repo_id)
    assert all(word in message for word in words) and "hub_model_id" not in message, message
    assert not pairs.with_name("pairs-export").exists()
    client.stop()
    assert "cannot be reached" in refused(capsys, pairs, "--hub_token=write-token")


def test_card_that_the_hub_refuses_is_reported_before_anything_is_sent(client: Hub, pairs: Path, capsys, monkeypatch):
    monkeypatch.setattr(exports, "make_card", lambda *_: "---\nlicense: nonsense\n---\n")
    assert '"license" must be one of the ids' in refused(capsys, pairs, "--hub_token=write-token")
    assert client.repos["datasets/user/my-pairs"].messages == ["initial commit"]
    assert not any(request.method == "PUT" for request in client.requests)


def test_upload_resumes_after_the_network_fails(client: Hub, pairs: Path, capsys):
    """The server hangs up after two files: the message says what to do, and the files are not uploaded again."""
    puts = []

    def hang_up(method: str, path: str) -> None:
        if method == "PUT":
            puts.append(path)
            if len(puts) > 2:
                raise ConnectionError

    client.hook = hang_up
    flags = ("--hub_token=write-token", "--max_shard_size=8KB")
    message = refused(capsys, pairs, *flags)
    assert "complete export is in" in message and "Run the same command again" in message
    assert "write-token" not in message
    repo = client.repos["datasets/user/my-pairs"]
    assert repo.messages == ["initial commit"]
    arrived, sent = {path.name for path in client.blobs.iterdir()}, len(client.requests)
    assert len(arrived) >= 3  # .gitattributes too
    client.hook = lambda method, path: None
    export = run(pairs, *flags)
    again = [request.path.removeprefix("/lfs/") for request in client.requests[sent:] if request.method == "PUT"]
    assert again and not arrived & set(again)
    assert {name: repo.read(name) for name in repo.files if name != ".gitattributes"} == files_of(export)


def test_temporary_errors_are_retried_and_refusals_are_not(client: Hub, pairs: Path, capsys, caplog):
    faults = [Refused(503, "come back later")] * 12

    def fail(method: str, path: str) -> None:
        if path.endswith("/preupload/main") and faults:
            raise faults.pop()

    client.hook = fail
    run(pairs, "--hub_token=write-token")
    assert "retrying in" in caplog.text and not faults
    commits = []

    def refuse(method: str, path: str) -> None:
        if path.endswith("/commit/main"):
            commits.append(path)
            raise Refused(403, "You have used up your storage")

    client.hook = refuse
    message = refused(capsys, pairs, "--hub_token=write-token", "--seed=4", "--overwrite")
    assert "used up your storage" in message and len(commits) == 1


def test_second_version_replaces_the_first(client: Hub, pairs: Path, tmp_path: Path):
    """The commit of the new card deletes the files of the first; uploading the same again makes no commit."""
    flags = ("--hub_token=write-token",)
    run(pairs, *flags, "--max_shard_size=8KB")
    repo = client.repos["datasets/user/my-pairs"]
    first = set(repo.files)
    (pairs.with_name("pairs-export") / ".cache").mkdir()
    (pairs.with_name("pairs-export") / ".cache" / "x").write_text("the client's own")
    export = run(pairs, *flags, "--overwrite")
    assert {name for name in repo.files if name.startswith("data/")} == {
        f"data/{p.name}" for p in (export / "data").iterdir()
    }
    assert len(first) > len(repo.files)
    count = len(repo.commits)
    run(pairs, *flags)
    assert len(repo.commits) == count
    middle = repo.commits[-2][2]  # before the commit of the card, files of both versions exist
    assert {name for name in first if name.startswith("data/")} <= set(middle)


def run_until_killed(hub: Hub, command: list[str], environment: dict[str, str], part: str, count: int) -> None:
    """Run the command, and send it SIGKILL at request number `count` whose path contains `part`."""
    seen = []

    def kill(method: str, path: str) -> None:
        if part in path:
            seen.append(path)
            if len(seen) == count:
                process.send_signal(signal.SIGKILL)

    hub.hook = kill
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait() == -signal.SIGKILL
    hub.hook = lambda method, path: None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "xet"), [([("/lfs/", 3)], False), ([("/xet/v1/shards", 1), ("/commit/", 2)], True)], ids=["http", "xet"]
)
def test_upload_resumes_after_kill(kills, xet, hub: Hub, pairs: Path, tmp_path: Path):
    environment = hub.environment(tmp_path / "cache", token="write-token", xet=xet)
    command = [sys.executable, SCRIPT, "--data_root", str(pairs), "--repo_id", "my-pairs", "--max_shard_size=8KB"]
    for part, count in kills:
        run_until_killed(hub, command, environment, part, count)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    repo = hub.repos["datasets/user/my-pairs"]
    export = pairs.with_name("pairs-export")
    assert {name: repo.read(name) for name in repo.files if name != ".gitattributes"} == files_of(export)
