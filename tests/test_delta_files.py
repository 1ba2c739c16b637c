"""Weight files in every published form, read and written a few rows at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.deltas import load_unet, merge, weights_in
from tests.hub_files import connect_downloads, serve_folder
from tests.hub_server import hub_server
from tests.runs import ENVIRONMENT, REPOSITORY
from utils.errors import InputError
from utils.merging.merge import MergeOptions
from utils.merging.weight_sources import WeightSource, find_source_files
from utils.weight_files import TensorFiles, split_rows, write_safetensors

SHA = 40


def save_form(unet: UNet2DConditionModel, folder: Path, form: str) -> WeightSource:
    """Save the UNet in a published form; returns the flags for it."""
    flags = {}
    if form == "whole":
        unet.save_pretrained(folder / "unet")
    elif form == "root":
        unet.save_pretrained(folder)
    elif form == "subfolder":
        unet.save_pretrained(folder / "deep" / "inside")
        flags["subfolder"] = "deep/inside"
    elif form == "sharded":
        unet.save_pretrained(folder / "unet", max_shard_size="200KB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    elif form == "variant":
        unet.save_pretrained(folder / "unet", variant="fp16")
        flags["variant"] = "fp16"
    elif form == "sharded variant":
        unet.save_pretrained(folder, variant="fp16", max_shard_size="200KB")
        flags["variant"] = "fp16"
    elif form == "bin":
        unet.save_pretrained(folder / "unet", safe_serialization=False)
    elif form == "sharded bin":
        unet.save_pretrained(folder, safe_serialization=False, max_shard_size="200KB")
    elif form == "named":
        folder.mkdir()
        save_file(unet.state_dict(), folder / "dmd2_unet.safetensors")
        flags["weight_name"] = "dmd2_unet.safetensors"
    elif form == "old bin":  # cannot be memory-mapped
        folder.mkdir()
        torch.save({"state_dict": unet.state_dict()}, folder / "x.bin", _use_new_zipfile_serialization=False)
        flags["weight_name"] = "x.bin"
    return WeightSource("--distilled", str(folder), **flags)


FORMS = [
    "whole",
    "root",
    "subfolder",
    "sharded",
    "variant",
    "sharded variant",
    "bin",
    "sharded bin",
    "named",
    "old bin",
]


@pytest.mark.parametrize("form", FORMS)
def test_forms(tiny_editor: Path, tiny_base: Path, form: str, tmp_path: Path) -> None:
    source = save_form(load_unet(tiny_base), tmp_path / "source", form)
    expected = merge(tiny_editor, MergeOptions(1.0), delta=tiny_base)
    merged = merge(tiny_editor, MergeOptions(1.0), delta=source)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert find_source_files(source, "unet").revision is None


@pytest.mark.parametrize("form", ["whole", "root", "sharded", "variant", "named", "bin"])
def test_forms_on_the_hub(
    tiny_editor: Path, tiny_base: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_form(load_unet(tiny_base), tmp_path / "source", form)
    flags = {"subfolder": source.subfolder, "variant": source.variant, "weight_name": source.weight_name}
    expected = merge(tiny_editor, MergeOptions(1.0), delta=tiny_base)
    with hub_server(tmp_path / "hub") as hub:
        serve_folder(hub, "user/fast", tmp_path / "source")
        connect_downloads(monkeypatch, hub.url, tmp_path)
        cache = str(tmp_path / "cache")
        found = find_source_files(WeightSource("--distilled", "user/fast", **flags), "unet", cache)
        assert len(found.revision) == SHA and {path.is_file() for path in found.files} == {True}
        file = TensorFiles(found.files, "it")
        assert all(torch.equal(file.read(name), value) for name, value in weights_in(tiny_base).items())
        with pytest.raises(InputError, match="--lora user/fast has no pytorch_lora_weights.safetensors.*it has "):
            find_source_files(WeightSource("--lora", "user/fast"), "lora", cache)
        with pytest.raises(InputError, match="--lora user/none cannot be loaded"):
            find_source_files(WeightSource("--lora", "user/none"), "lora", cache)
    assert expected.keys() == file.shapes.keys()


def test_missing_shard_is_named(tiny_base: Path, tmp_path: Path) -> None:
    source = save_form(load_unet(tiny_base), tmp_path / "source", "sharded")
    lost = sorted((tmp_path / "source" / "unet").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"is incomplete: missing {lost.name}"):
        find_source_files(source, "unet")
    (tmp_path / "source" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="not an index of shards"):
        find_source_files(source, "unet")


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    """Several dtypes, a few rows at a time, with an empty and a zero-dimensional tensor."""
    tensors = {
        "a.weight": torch.randn(7, 3, 2),
        "b": torch.randn(5).half(),
        "c": torch.tensor(3.0).bfloat16(),
        "d": torch.zeros(0, 4),
        "e": torch.arange(6),
    }
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    pieces = [
        (name, value if rows == slice(None) else value[rows])
        for name, value in tensors.items()
        for rows in split_rows(value.shape, 12)
    ]
    assert len(pieces) > len(tensors)
    path = tmp_path / "made.safetensors"
    write_safetensors(path, kinds, pieces)
    read = load_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], value) for name, value in tensors.items())
    assert TensorFiles([path], "it").metadata == {"format": "pt"}
    for wrong in (pieces[:-1], pieces[::-1], [(name, value.float()) for name, value in pieces]):
        with pytest.raises(ValueError, match="out of order|rows are missing"):
            write_safetensors(tmp_path / "wrong.safetensors", kinds, wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_split_rows() -> None:
    assert list(split_rows((10, 4), 12)) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert list(split_rows((2, 100), 12)) == [slice(0, 1), slice(1, 2)]
    assert list(split_rows((3, 4), 12)) == [slice(None)] == list(split_rows((), 12))


MEASURE = """
import sys
from pathlib import Path
import torch
from utils.merging.editor_writer import write_unet
from utils.merging.merge import MergeOptions, MergeReport
from utils.merging.recipe import MergeRecipe, open_recipe
from utils.merging.weight_sources import WeightSource

def peak():  # of this process; resource's ru_maxrss includes the parent's memory at the fork
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0])

folder, before = Path(sys.argv[1]), None
cases = [{"distilled": f"distilled.{suffix}", "base": f"base.{suffix}"} for suffix in ("safetensors", "bin")]
for sources in [*cases, {"lora": "lora.safetensors"}]:
    named = {role: WeightSource(f"--{role}", str(folder / name)) for role, name in sources.items()}
    recipe = MergeRecipe(WeightSource("--model", str(folder / "editor")), folder, named, MergeOptions(0.5))
    opened = open_recipe(recipe)
    before = before or peak()
    write_unet(folder / "merged.safetensors", recipe, opened, MergeReport())
    print(peak() - before)
"""


def test_memory(tiny_editor: Path, tmp_path: Path) -> None:
    """Merging three UNets of 210 MB needs the memory of a few rows; loaded, they would need 630 MB."""
    config = UNet2DConditionModel.load_config(tiny_editor, subfolder="unet")
    config |= {"block_out_channels": (128, 512), "norm_num_groups": 8}
    editor = tmp_path / "editor"
    (editor / "scheduler").mkdir(parents=True)
    config_file = "scheduler/scheduler_config.json"
    (editor / config_file).write_text((tiny_editor / config_file).read_text())
    (editor / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(editor / "unet")
    state = unet.state_dict()
    total, largest = (call(value.nbytes for value in state.values()) for call in (sum, max))
    assert total > 200e6 and largest < 20e6
    for name in ("distilled", "base"):
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save(state, tmp_path / f"{name}.bin")
    tensors = {}
    for layer in [name.removesuffix(".weight") for name, value in state.items() if value.ndim == 4 and "conv1" in name]:
        outputs, inputs = state[f"{layer}.weight"].shape[:2]
        tensors[f"{layer}.lora_A.weight"] = torch.ones(8, inputs, 3, 3)
        tensors[f"{layer}.lora_B.weight"] = torch.ones(outputs, 8, 1, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    del unet, state
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    output = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, check=True).stdout
    growths = [int(line) * 1024 for line in output.split()]
    # Windows of 32 MiB of up to three files, some rows of each, and the part of a tensor beyond a window.
    assert len(growths) == 3 and max(growths) < 180e6, growths
    assert (tmp_path / "merged.safetensors").stat().st_size > total
    for file in tmp_path.rglob("*.*"):
        if file.is_file() and file.stat().st_size > 1e8:
            file.unlink()  # 1.3 GB, which pytest would keep
