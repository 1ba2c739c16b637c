"""What the original InstructPix2Pix publishes, by name: its prompt files, and its datasets of images."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from data_preparation import import_pairs, prepare_for_finetuning, published_prompts
from data_preparation.generation.inputs import Captions
from data_preparation.pairs.candidates import open_prompts
from tests.pairs import make_dataset, make_rows
from tests.test_infer_files import serve_files
from tests.test_pair_layouts import PROMPTS, check_pairs, seeds
from utils.data.sources import open_source
from utils.errors import InputError

HUMAN, GENERATED = published_prompts.FILES
TRIPLE = {"input": "a photo of a cat", "edit": "make it a dog", "output": "a photo of a dog"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The published files on localhost; yields the requested paths."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / HUMAN).write_text(json.dumps(TRIPLE) + "\n")
    (folder / GENERATED).write_text(json.dumps(TRIPLE | {"url": "http://x/1.jpg"}) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with serve_files(folder) as (address, requested):
        monkeypatch.setattr(published_prompts, "SITE", address)
        yield requested


@pytest.mark.parametrize("name", [HUMAN, "human-written-prompts", GENERATED, "gpt-generated-prompts"])
def test_published_prompts_are_read_by_name_and_downloaded_once(name: str, site: list[str]) -> None:
    for _ in range(2):
        opened = open_prompts(Captions(name))
        row = opened.row(0)
        assert (opened.column, opened.dataset, opened.license) == ("input", name, None)
        assert {key: row[key] for key in TRIPLE} == TRIPLE and ("url" in row) == (name.startswith("gpt"))
    assert site == [f"/{name.removesuffix('.jsonl')}.jsonl"]


def test_prepare_for_finetuning_reads_the_published_file(site: list[str], tmp_path: Path) -> None:
    prepare_for_finetuning.main(["--input=human-written-prompts", f"--output={tmp_path / 'out.jsonl'}"])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_an_existing_file_of_that_name_is_the_input(site: list[str], tmp_path: Path) -> None:
    Path(HUMAN).write_text(json.dumps(TRIPLE | {"edit": "mine"}) + "\n")
    assert open_prompts(Captions(HUMAN)).row(0)["edit"] == "mine" and not site


def test_without_network_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(published_prompts, "SITE", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/gpt-generated-prompts.jsonl cannot be downloaded .*path"):
        Captions("gpt-generated-prompts").open()
    assert not list((tmp_path / "cache").rglob("*prompts*"))


def test_the_captions_of_a_dataset_of_pairs_are_prompts(tmp_path: Path) -> None:
    """The columns of timbrooks/instructpix2pix-clip-filtered, and of what generate_pairs.py writes."""
    rows = make_rows(2) | {"original_prompt": ["a cat", "a dog"], "edited_prompt": ["a red cat", "a red dog"]}
    (tmp_path / "pairs").mkdir()
    make_dataset(rows).to_parquet(tmp_path / "pairs/train-0.parquet")
    opened = open_prompts(Captions(str(tmp_path / "pairs")))
    row = opened.row(1)
    assert (row[opened.column], row["edit"], row["output"]) == ("a dog", "edit number 1", "a red dog")


@pytest.mark.parametrize("name", ["random-sample-dataset", "clip-filtered-dataset"])
def test_the_datasets_of_the_original_are_named_and_read_where_they_are(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"it is not on the Hub: download .*berkeley.edu/{name}/.* unpack them"):
        open_source(name)
    with pytest.raises(SystemExit):
        import_pairs.main(["--source", name, "--data_root", "pairs"])
    assert "it is not on the Hub" in capsys.readouterr().err
    seeds(Path(name))
    source = open_source(name)
    assert sorted(source.rows["edit_prompt"]) == sorted(PROMPTS)
    check_pairs([(row["original_image"], row["edit_prompt"], row["edited_image"]) for row in source.rows])


def test_a_part_of_the_download_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """seeds.json lists the folders of all zip files (timothybrooks/instruct-pix2pix#120)."""
    seeds(tmp_path / "data")
    listed = json.loads((tmp_path / "data/seeds.json").read_text())
    (tmp_path / "data/seeds.json").write_text(json.dumps([*listed, *([f"00{i}", [5]] for i in range(90, 97))]))
    rows = open_source(str(tmp_path / "data")).rows
    check_pairs([(row["original_image"], row["edit_prompt"], row["edited_image"]) for row in rows])
    assert "7 of the 10 folders that" in caplog.text and "not used: 0090, 0091, 0092, 0093, 0094, ..." in caplog.text
    for path in (tmp_path / "data").glob("000*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(InputError, match="10 of the 10 folders .* do not exist: give the folder in which they are"):
        open_source(str(tmp_path / "data"))


def test_a_page_instead_of_the_file_is_refused(site: list[str], tmp_path: Path) -> None:
    (tmp_path / "site" / HUMAN).write_text("<html>log in to the network</html>")
    with pytest.raises(InputError, match="is not a file of prompts"):
        Captions("human-written-prompts").open()
    assert not list((tmp_path / "cache").rglob("*prompts*"))


def test_zip_files_of_the_download_must_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "shard-00.zip").write_bytes(b"PK")
    (tmp_path / "seeds.json").write_text('[["0000001", [1]]]')
    with pytest.raises(InputError, match="zip files that are not unpacked: run unzip"):
        open_source(str(tmp_path))
