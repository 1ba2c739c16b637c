"""The phrasings of the tasks, and files of the user."""

import pytest

from data_preparation.instructions import FOLDER, available_tasks, read_phrasings
from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.toy_edits import EDITS
from utils.errors import InputError

TASKS = ["cartoonize", *DEGRADATIONS]
TOY = [f"toy/{task}" for task in EDITS]


def test_every_task_has_phrasings():
    assert set(available_tasks()) == {*TASKS, *EDITS}
    assert read_phrasings("sepia") == read_phrasings("toy/sepia")
    assert read_phrasings("cartoonize") != read_phrasings("toy/cartoonize")


@pytest.mark.parametrize("task", TASKS + TOY)
def test_number_and_format_of_phrasings(task):
    train, heldout = read_phrasings(task, 10)
    assert len(heldout) == 10
    assert len(train + heldout) >= (15 if task in TOY else 50)
    text = (FOLDER / f"{task}.txt").read_text(encoding="utf-8")
    assert text.isascii()
    assert text.splitlines() == read_phrasings(task, 0)[0], "no empty lines, no surrounding whitespace"
    assert sorted(train + heldout) == sorted(text.splitlines())
    for phrasing in train + heldout:
        assert 1 <= len(phrasing.split()) <= 20


def _letters(phrasing: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in phrasing.casefold()).split())


def test_phrasings_are_unique():
    """Across tasks, and also without punctuation: otherwise training would see a held-out phrasing."""
    seen = {}
    for task in available_tasks():
        for phrasing in read_phrasings(task, 0)[0]:
            assert _letters(phrasing) not in seen, (task, seen[_letters(phrasing)], phrasing)
            seen[_letters(phrasing)] = task


def test_similar_tasks_use_different_words():
    text = {task: " ".join(read_phrasings(task, 0)[0]).casefold() for task in TASKS}
    assert "sharp" not in text["deblur"]
    assert "blur" not in text["sharpen"]
    assert "focus" not in text["sharpen"]
    assert "nois" not in text["low_light"]
    assert "grain" not in text["low_light"]
    assert "dark" not in text["denoise"]
    assert "resol" not in text["sharpen"]
    for phrasing in read_phrasings("raindrop", 0)[0]:
        names_drops = any(
            word in phrasing.casefold() for word in ("drop", "bead", "water", "lens", "glass", "window", "pane", "wind")
        )
        assert names_drops, phrasing
    for word in ("lens", "glass", "window", "droplet"):
        assert word not in text["derain"]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_phrasings_have_other_patterns(task):
    """No training phrasing begins with the same word, or has as many words in common as two variants of a sentence."""
    train, heldout = read_phrasings(task, 10)
    assert len(heldout) == 10
    for one in heldout:
        words = set(_letters(one).split())
        for other in train:
            others = set(_letters(other).split())
            assert _letters(one).split()[0] != _letters(other).split()[0], (one, other)
            assert len(words & others) < 0.6 * len(words | others), (one, other)


def test_a_file_of_one_pattern(tmp_path, caplog):
    path = tmp_path / "snow.txt"
    path.write_text("Make it snow\nMake it winter\nMake it white\nLet there be snow\n")
    assert read_phrasings(str(path), 1) == (["Make it snow", "Make it winter", "Make it white"], ["Let there be snow"])
    assert "too few patterns" not in caplog.text
    assert read_phrasings(str(path), 2) == (["Make it snow", "Make it winter"], ["Make it white", "Let there be snow"])
    assert "too few patterns" in caplog.text


def test_file_of_the_user(tmp_path):
    path = tmp_path / "snow.txt"
    path.write_text("\ufeffLet it snow\n\n  Cover it in snow  \nMake it winter\n", encoding="utf-8")
    assert read_phrasings(str(path), 1) == (["Let it snow", "Cover it in snow"], ["Make it winter"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no phrasings"),
        (b" \n\n", "has no phrasings"),
        (b"Let it snow\nlet it Snow\n", "is repeated"),
        ("Laß es schneien\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_invalid_files_are_refused(tmp_path, content, message):
    path = tmp_path / "snow.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_phrasings(str(path), 0)
    assert str(path) in str(caught.value)


def test_unknown_tasks_and_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="choose from cartoonize, colorize"):
        read_phrasings("snow")
    for name in ("../instructions/derain", "toy/derain", ""):
        with pytest.raises(InputError, match="unknown task"):
            read_phrasings(name)
    with pytest.raises(InputError, match="does not exist"):
        read_phrasings(str(tmp_path / "snow.txt"))


@pytest.mark.parametrize("number", [-1, 52, 100])
def test_training_needs_a_phrasing(number):
    with pytest.raises(InputError, match="from 0 to 51"):
        read_phrasings("derain", number)
