"""The endless stream of micro-batches: reproducibility, randomness and bad rows."""

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.pairs import encode, make_image, make_rows, make_source
from tests.runs import ENVIRONMENT, REPOSITORY
from utils.data.batches import _prepare_worker, make_loader
from utils.data.columns import DEFAULT_COLUMNS
from utils.data.draws import DrawOrder, sample_draws
from utils.data.geometry import Geometry
from utils.data.samples import BadRowLimit, check_first_rows, choose_prompt
from utils.data.sources import Source
from utils.errors import InputError

GEOMETRY = Geometry(32, random_flip=True)
EMPTY, TEXT = {"bytes": b"", "path": None}, {"bytes": b"a line of text", "path": None}


def batches(sources: list[Source], num_batches: int, geometry: Geometry = GEOMETRY, **settings: object) -> list[dict]:
    settings = dict(seed=7, batch_size=3, num_train_timesteps=1000) | settings
    return list(islice(make_loader(sources, geometry, **settings), num_batches))


def stream_of(rows: dict[str, list]) -> Source:
    dataset = datasets.Dataset.from_dict(rows)
    for column in ("original_image", "edited_image"):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    rows = dataset.to_iterable_dataset(num_shards=min(3, len(dataset)))
    return Source(rows, DEFAULT_COLUMNS, "train", is_streaming=True)


def assert_equal(left: list[dict], right: list[dict]) -> None:
    """The batches are bit-identical."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if torch.is_tensor(value):
                assert value.dtype == other[name].dtype
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


def mixed_sizes() -> Source:
    """Twelve rows of three shapes, for buckets."""
    files = [
        {"bytes": encode(make_image(index, [(40, 40), (40, 70), (70, 40)][index % 3])), "path": None}
        for index in range(12)
    ]
    return make_source(12, original_image=dict(enumerate(files)), edited_image=dict(enumerate(files)))


SOURCES = {
    "map": lambda: [make_source(10, edited_image={4: EMPTY, 5: TEXT})],
    "mix": lambda: [make_source(10, weight=2.0), make_source(3, name="b:train")],
    "bucket": lambda: [mixed_sizes()],
    "stream": lambda: [stream_of(make_rows(10) | dict(edit_prompt=["a", None, *"cdefghij"]))],
}


def geometry_of(kind: str) -> Geometry:
    return Geometry(32, "bucket", random_flip=True) if kind == "bucket" else GEOMETRY


# ---- reproducibility ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_the_number_of_workers_does_not_matter(kind: str) -> None:
    inline = batches(SOURCES[kind](), 9, geometry_of(kind))
    assert_equal(inline, batches(SOURCES[kind](), 9, geometry_of(kind), num_workers=2))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("start", [1, 5])  # within the first epoch, and after it
def test_resuming_equals_an_uninterrupted_run(kind: str, start: int) -> None:
    whole = batches(SOURCES[kind](), 9, geometry_of(kind))
    assert_equal(whole[start:], batches(SOURCES[kind](), 9 - start, geometry_of(kind), start_batch=start))


@pytest.mark.parametrize("kind", ["map", "mix", "stream"])
def test_two_processes_equal_one_with_two_accumulation_steps(kind: str) -> None:
    one = batches(SOURCES[kind](), 8)
    first, second = (batches(SOURCES[kind](), 4, rank=rank, world_size=2) for rank in range(2))
    for index in range(4):
        together = torch.cat([first[index]["noise"], second[index]["noise"]])
        alone = torch.cat([one[2 * index]["noise"], one[2 * index + 1]["noise"]])
        assert sorted(together[:, 0, 0, 0].tolist()) == sorted(alone[:, 0, 0, 0].tolist())
        assert torch.equal(together[:3], alone[0::2])
        for name in ("rows", "prompts"):
            alone_names = one[2 * index][name] + one[2 * index + 1][name]
            assert first[index][name] == alone_names[0::2]
            assert second[index][name] == alone_names[1::2]
        alone_pixels = torch.cat([one[2 * index]["edited_pixels"], one[2 * index + 1]["edited_pixels"]])
        assert torch.equal(second[index]["edited_pixels"], alone_pixels[1::2])


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_each_epoch_visits_every_row_once(kind: str) -> None:
    """Ten rows in batches of three: no batch is partial, and the thirtieth draw ends the third epoch."""
    source = make_source(10) if kind == "map" else stream_of(make_rows(10))
    drawn = [prompt for batch in batches([source], 10) for prompt in batch["prompts"]]
    assert len(drawn) == 30
    epochs = [drawn[index : index + 10] for index in (0, 10, 20)]
    for epoch in epochs:
        assert sorted(epoch) == [f"edit number {index}" for index in range(10)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_dataset_smaller_than_a_batch() -> None:
    (batch,) = batches([make_source(2)], 1, batch_size=5)
    assert batch["original_pixels"].shape == (5, 3, 32, 32)
    assert set(Counter(batch["rows"]).values()) <= {2, 3}
    assert len(batch["noise"].unique(dim=0)) == 5  # the same row has different noise


def test_buckets_give_one_shape_per_batch_and_drop_no_row() -> None:
    made = batches([mixed_sizes()], 40, Geometry(32, "bucket"), vae_scale_factor=2)
    shapes = Counter(tuple(batch["original_pixels"].shape[2:]) for batch in made)
    assert set(shapes) == {(32, 32), (24, 40), (40, 24)}
    for batch in made:
        height, width = batch["original_pixels"].shape[2:]
        assert batch["noise"].shape == (3, 4, height // 2, width // 2)
        assert (batch["target_sizes"] == torch.tensor([height, width])).all()
    counts = Counter(row for batch in made for row in batch["rows"])
    assert len(counts) == 12
    assert set(counts.values()) <= {9, 10, 11}  # 120 draws: at most two of a shape are still queued, or came early


def test_buckets_of_unreadable_rows() -> None:
    made = batches([make_source(6, original_image={0: EMPTY, 3: None})], 6, Geometry(32, "bucket"))
    assert {row for batch in made for row, _ in batch["bad_rows"]} == {"train[0]", "train[3]"}


def test_another_seed_gives_another_stream() -> None:
    one, other = batches([make_source(10)], 4), batches([make_source(10)], 4, seed=8)
    assert [batch["rows"] for batch in one] != [batch["rows"] for batch in other]
    assert not torch.equal(one[0]["noise"], other[0]["noise"])
    with pytest.raises(ValueError, match="--seed is -1"):
        batches([make_source(2)], 1, seed=-1)


def test_the_global_torch_generator_is_not_used() -> None:
    state = torch.get_rng_state()
    batches([make_source(4)], 2)
    assert torch.equal(torch.get_rng_state(), state)


STOPPED_RUN = """
import signal
from tests.pairs import make_source
from utils.data.batches import make_loader
from utils.data.geometry import Geometry

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
settings = dict(seed=0, batch_size=2, num_train_timesteps=9, num_workers=2)
batches = iter(make_loader([make_source(4)], Geometry(16), **settings))
next(batches), next(batches)  # one of each worker: both have started
print("ready", flush=True)
input()
print(sum(len(next(batches)["rows"]) for _ in range(20)))
"""


def test_workers_survive_signals_to_the_process_group_and_exit_with_their_parent() -> None:
    """A launcher signals the whole process group; the current step still needs its batch. No process remains."""
    run = subprocess.Popen(
        [sys.executable, "-c", STOPPED_RUN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout.readline() == "ready\n"
    os.killpg(run.pid, signal.SIGTERM)
    os.killpg(run.pid, signal.SIGINT)
    output, errors = run.communicate("\n", timeout=600)
    assert (run.returncode, output) == (0, "40\n"), errors


# ---- contents -------------------------------------------------------------------------------------------------------


def test_batch_contents() -> None:
    (batch,) = batches([make_source(5)], 1, Geometry(32, center_crop=True), latent_channels=16, vae_scale_factor=2)
    assert batch["original_pixels"].dtype == batch["edited_pixels"].dtype == torch.uint8
    assert batch["noise"].shape == batch["posterior_noise"].shape == (3, 16, 16, 16)
    assert batch["offset_noise"].shape == (3, 16, 1, 1)
    assert batch["noise"].dtype == batch["offset_noise"].dtype == batch["dropout"].dtype == torch.float32
    assert batch["timesteps"].dtype == torch.int64
    assert batch["timesteps"].shape == batch["dropout"].shape == (3,)
    assert batch["original_sizes"].tolist() == [[40, 48]] * 3
    assert batch["crop_top_lefts"].tolist() == [[0, 3]] * 3
    assert batch["bad_rows"] == []
    # The edited image is the negative of the original, also after resizing and cropping.
    assert ((batch["original_pixels"].int() + batch["edited_pixels"].int()) - 255).abs().max() <= 1
    for row, prompt in zip(batch["rows"], batch["prompts"], strict=True):
        assert prompt == f"edit number {row[6:-1]}"


def test_held_out_rows_keep_their_numbers() -> None:
    source = make_source(10).select(np.array([2, 5, 9]))
    rows = {row for batch in batches([source], 3) for row in batch["rows"]}
    assert rows == {"train[2]", "train[5]", "train[9]"}


def test_draws_are_uniform_and_normal() -> None:
    draws = [sample_draws(3, draw, (4, 2, 2), 1000) for draw in range(4000)]
    for name in ("u_flip", "u_dropout", "u_prompt"):
        values = np.array([draw[name] for draw in draws])
        assert 0 <= values.min() < values.max() < 1
        assert np.abs(np.histogram(values, 10, (0, 1))[0] - 400).max() < 5 * 19  # 5 standard deviations
    crops = np.array([draw["u_crop"] for draw in draws])
    assert abs(np.corrcoef(crops.T)[0, 1]) < 0.06
    timesteps = np.array([draw["timestep"] for draw in draws])
    assert (timesteps.min(), timesteps.max()) >= (0, 990)
    assert timesteps.max() < 1000
    assert abs(timesteps.mean() - 499.5) < 5 * 288.7 / 4000**0.5
    noise = np.stack([draw["noise"] for draw in draws])
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.std() - 1) < 0.01
    posterior = np.stack([draw["posterior_noise"] for draw in draws])
    assert abs(np.corrcoef(noise.ravel(), posterior.ravel())[0, 1]) < 0.02


def test_scalar_draws_do_not_depend_on_the_latent_shape() -> None:
    small, large = sample_draws(3, 5, (4, 8, 8), 1000), sample_draws(3, 5, (4, 64, 64), 1000)
    for name in ("u_flip", "u_dropout", "u_prompt", "timestep"):
        assert small[name] == large[name]
    np.testing.assert_array_equal(small["u_crop"], large["u_crop"])
    np.testing.assert_array_equal(small["offset_noise"], large["offset_noise"])
    largest_seed = sample_draws(2**63 - 1, 5, (4, 8, 8), 1000)
    assert largest_seed["u_flip"] != small["u_flip"]


def test_prompts_with_left_or_right_are_not_mirrored() -> None:
    prompts = {row: "the man on the left" if row % 2 else "make it red" for row in range(8)}
    made = batches([make_source(8, edit_prompt=prompts)], 16, Geometry(32, center_crop=True, random_flip=True))
    upright = {
        row: batch["original_pixels"][index]
        for batch in batches([make_source(8)], 3, Geometry(32, center_crop=True))
        for index, row in enumerate(batch["rows"])
    }
    flips: dict[str, list[bool]] = {"the man on the left": [], "make it red": []}
    for batch in made:
        for row, prompt, pixels in zip(batch["rows"], batch["prompts"], batch["original_pixels"], strict=True):
            is_flipped = not torch.equal(pixels, upright[row])
            assert torch.equal(pixels, upright[row].flip(-1) if is_flipped else upright[row])
            flips[prompt].append(is_flipped)
    assert not any(flips["the man on the left"])
    assert 0.2 < np.mean(flips["make it red"]) < 0.8


def test_one_prompt_of_a_list_is_drawn() -> None:
    assert choose_prompt(["a", "b"], 0.49) == "a"
    assert choose_prompt(["a", "b"], 0.5) == "b"
    assert choose_prompt([None, " ", "c"], 0.1) == "c"
    source = make_source(4)
    rows = source.rows.remove_columns("edit_prompt").add_column("edit_prompt", [["a", "b"]] * 4)
    drawn = {prompt for batch in batches([Source(rows, DEFAULT_COLUMNS, "train")], 6) for prompt in batch["prompts"]}
    assert drawn == {"a", "b"}


# ---- order of draws -------------------------------------------------------------------------------------------------


def test_mix_weights_hold_exactly() -> None:
    order = DrawOrder([90, 10], [1.0, 3.0], seed=5)
    for epoch in range(3):
        located = [order.locate(epoch * 100 + position) for position in range(100)]
        assert Counter(source for source, _ in located) == {0: 25, 1: 75}
    visits: dict[int, list[int]] = {0: [], 1: []}
    for draw in range(700):
        source, row = order.locate(draw)
        visits[source].append(row)
    for source, length in ((0, 90), (1, 10)):  # every row once before any twice
        for start in range(0, len(visits[source]) - length + 1, length):
            assert sorted(visits[source][start : start + length]) == list(range(length))


def test_order_does_not_depend_on_earlier_draws() -> None:
    one, other = DrawOrder([7, 30], [2.0, 1.0], seed=5), DrawOrder([7, 30], [2.0, 1.0], seed=5)
    late = [one.locate(draw) for draw in range(370, 400)]
    assert [other.locate(draw) for draw in range(400)][370:] == late
    assert other._epoch.cache_info().currsize <= 2
    assert other._permutation.cache_info().currsize <= 4


# ---- bad rows -------------------------------------------------------------------------------------------------------

BAD = {
    "null prompt": ("edit_prompt", None, "no prompt"),
    "empty prompt": ("edit_prompt", "  ", "empty prompt"),
    "null image": ("original_image", None, "original image: no image"),
    "zero-byte image": ("edited_image", EMPTY, "edited image: empty file"),
    "text in an image column": ("original_image", TEXT, "not an image in a format"),
    "one pixel": ("edited_image", {"bytes": encode(Image.new("RGB", (1, 1))), "path": None}, "too small: 1x1"),
    "truncated": ("original_image", {"bytes": encode(make_image(0))[:60], "path": None}, "cannot be decoded"),
    "missing file": ("original_image", {"bytes": None, "path": "/gone.png"}, "no such file: /gone.png"),
    "other aspect": ("edited_image", {"bytes": encode(make_image(0, (90, 48))), "path": None}, "aspect ratios"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_next_row_replaces_a_bad_one_under_the_same_draw(case: str) -> None:
    column, value, reason = BAD[case]
    good, spoilt = batches([make_source(6)], 4), batches([make_source(6, **{column: {5: value}})], 4)
    num_bad = 0
    for one, other in zip(good, spoilt, strict=True):
        num_bad += len(other["bad_rows"])
        for name in ("noise", "posterior_noise", "timesteps", "dropout", "offset_noise"):
            assert torch.equal(one[name], other[name])
        assert other["rows"] == [row.replace("train[5]", "train[0]") for row in one["rows"]]
        assert all(row == "train[5]" and reason in why for row, why in other["bad_rows"])
    assert num_bad == 2


def test_the_next_row_of_a_stream_replaces_a_bad_one() -> None:
    prompts = [None if index in (3, 4) else str(index) for index in range(9)]
    good = [prompt for batch in batches([stream_of(make_rows(9))], 3) for prompt in batch["prompts"]]
    made = batches([stream_of(make_rows(9) | dict(edit_prompt=prompts))], 3)
    assert [len(batch["prompts"]) for batch in made] == [3, 3, 3]
    assert sum(len(batch["bad_rows"]) for batch in made) >= 2
    drawn = [prompt for batch in made for prompt in batch["prompts"]]
    for one, other in zip(good, drawn, strict=True):
        assert other == one.removeprefix("edit number ") or one in ("edit number 3", "edit number 4")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "stream", "many"])
def test_only_bad_rows_stop_the_run_with_one_message(kind: str, num_workers: int) -> None:
    num_rows = 150 if kind == "many" else 4
    rows = make_rows(1)
    rows = {name: values * num_rows for name, values in rows.items()} | dict(edit_prompt=[None] * (num_rows - 1) + [""])
    source = (
        stream_of(rows) if kind == "stream" else make_source(num_rows, edit_prompt=dict(enumerate(rows["edit_prompt"])))
    )
    with pytest.raises(InputError, match=r"^(4|100) consecutive rows cannot be used.*\n  - train\[") as caught:
        batches([source], 1, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_options_that_streams_do_not_support() -> None:
    with pytest.raises(InputError, match="(?s)--streaming reads one dataset.*--resize_mode bucket"):
        make_loader(
            [stream_of(make_rows(2))] * 2, Geometry(32, "bucket"), seed=0, batch_size=1, num_train_timesteps=1000
        )
    with pytest.raises(InputError, match="has no rows"):
        empty = datasets.IterableDataset.from_generator(lambda: iter(()))
        batches([Source(empty, DEFAULT_COLUMNS, "train", is_streaming=True)], 1)


def test_first_rows_are_checked() -> None:
    assert check_first_rows([make_source(20)], GEOMETRY) == []
    bad = check_first_rows([make_source(20, edit_prompt={3: None, 12: None})], GEOMETRY)
    assert bad == [("train[3]", "no prompt")]
    assert len(check_first_rows([stream_of(make_rows(9) | dict(edit_prompt=[None, *"abcdefgh"]))], GEOMETRY)) == 1
    with pytest.raises(InputError, match=r"2 consecutive rows cannot be used.*\n  - b\[0\]: edited image: empty file"):
        check_first_rows([make_source(3), make_source(2, name="b", edited_image={0: EMPTY, 1: EMPTY})], GEOMETRY)


def test_bad_rows_are_counted_once_and_stop_the_run_over_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        limit = BadRowLimit(0.02, num_rows=100)
        limit.add([("train[1]", "no prompt"), ("train[2]", "empty file")])
        limit.add([("train[1]", "no prompt")])
    assert len(caplog.records) == 2
    assert "train[2]: empty file" in caplog.text
    with pytest.raises(InputError, match=r"--max_bad_rows 0.02 allows 2 of 100 rows, but 3 (?s:.*)train\[7\]"):
        limit.add([("train[7]", "too small")])
    count = BadRowLimit(1, num_rows=100)
    count.add([("train[1]", "x")])
    with pytest.raises(InputError):
        count.add([("train[2]", "x")])
    with pytest.raises(InputError):
        BadRowLimit(0, num_rows=100).add([("train[2]", "x")])
    stream = BadRowLimit(0.01, num_rows=None)
    stream.add([(f"train[stream {index}]", "x") for index in range(20)], num_drawn=2000)
    with pytest.raises(InputError, match="--max_bad_rows is -1"):
        BadRowLimit(-1, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_workers_end_with_a_killed_process(tmp_path):
    """Also those that had not started yet, which PyTorch's own watch does not notice."""
    code = (
        "import psutil, time\n"
        "from tests.pairs import make_source\n"
        "from utils.data.geometry import Geometry\n"
        "from utils.data.batches import make_loader\n"
        "sizes = dict(latent_channels=4, vae_scale_factor=8, num_train_timesteps=10, rank=0, world_size=1)\n"
        "sizes |= dict(seed=0, batch_size=2, num_workers=2)\n"
        "batches = iter(make_loader([make_source(8)], Geometry(resolution=32), **sizes))\n"
        "next(batches)\n"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE)
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    child = os.fork()
    if child == 0:
        _prepare_worker(-1, 0)  # a worker that starts when the process that made it is gone
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
