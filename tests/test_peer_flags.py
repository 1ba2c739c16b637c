"""Flags of instruction-tuned-sd and of the original's data scripts, misspelled flags, --config and paths."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_preparation import (
    check_dataset,
    export_pairs,
    export_to_hub,
    generate_captions,
    generate_dataset,
    generate_pairs,
    import_pairs,
    peer_flags,
    prepare_for_finetuning,
    prompt_app,
)
from data_preparation.pairs.settings import PRESETS, choose_settings
from utils.flag_aliases import FlagAliases

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = {
    check_dataset: ["pairs"],
    export_pairs: ["--dataset_name=a", "--output_dir=b", "--layout=seeds"],
    export_to_hub: [],
    generate_captions: ["--captions=c.txt", "--data_root=out", "--model=m"],
    generate_dataset: [],
    generate_pairs: ["--prompts=p.jsonl", "--data_root=out"],
    import_pairs: ["--source=s", "--data_root=out"],
    prepare_for_finetuning: ["--input=a", "--output=b"],
    prompt_app: ["--model=m"],
}
ORIGINAL_DATASET = "--out_dir data/pairs --prompts_file prompts.jsonl"


def refusal(parse: Callable, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        parse(flags)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


@pytest.mark.parametrize("flag", ["--n-samples", "--n_samples"])
def test_a_command_of_generate_img_dataset_means_the_same(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = generate_pairs.parse_flags(ORIGINAL_DATASET.split())
    assert choose_settings(args) == PRESETS["ip2p"].settings and args.preset == "ip2p"
    assert (str(args.data_root), args.prompts) == ("data/pairs", "prompts.jsonl")
    assert "--preset=ip2p (where not given)" in capsys.readouterr().err
    more = (
        f"{flag} 4 --max-out-samples=2 --steps 25 --clip-threshold 0 --clip-dir-threshold 0.1 --clip-img-threshold=0.3"
    )
    more += " --min-p2p 0.2 --max-cfg=12 --n-partitions 100 --partition 3 --ckpt sd.ckpt --vae-ckpt vae.ckpt"
    args = generate_pairs.parse_flags(f"{ORIGINAL_DATASET} {more}".split())
    settings = choose_settings(args)
    assert (settings.num_samples, settings.max_out_samples, settings.num_inference_steps) == (4, 2, 25)
    assert (settings.min_clip_text, settings.min_clip_dir, settings.min_clip_image) == (0, 0.1, 0.3)
    assert (settings.share_range, settings.guidance_range) == ((0.2, 0.9), (7.5, 12))
    assert (args.num_partitions, args.partition, args.model, args.vae) == (100, 3, "sd.ckpt", "vae.ckpt")
    assert generate_pairs.parse_flags([*ORIGINAL_DATASET.split(), "--preset=fast"]).preset == "fast"


def test_a_command_of_generate_txt_dataset_means_the_same(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    flags = [
        "--openai-api-key",
        "sk-1",
        "--openai-model",
        "davinci:ft",
        "--num-partitions",
        "10",
        "--partition=9",
        "--seed",
        "3",
    ]
    args = generate_captions.parse_flags(flags)
    generate_captions.check_flags(args)
    assert (args.model, args.format, args.base_url) == ("davinci:ft", "legacy", peer_flags.OPENAI_URL)
    assert (args.captions, args.num_samples, args.moderation) == (peer_flags.AESTHETICS, 10_000, "server")
    assert (args.num_partitions, args.partition, args.seed) == (10, 9, 3)
    assert "sk-1" not in str(args) and generate_captions.os.environ["OPENAI_API_KEY"] == "sk-1"
    printed = capsys.readouterr().err
    assert "other users can see a key" in printed and "sk-1" not in printed
    own = ["--base_url=http://127.0.0.1:1/v1", "--num-samples", "5", "--partitions", "2", "--data-root=x"]
    args = generate_captions.parse_flags(["--openai-model=m", *own])
    assert (args.base_url, args.num_samples, args.num_partitions, args.moderation) == (own[0][11:], 5, 2, None)
    assert prompt_app.parse_flags(["--openai-api-key", "k", "--openai-model", "m"]).format == "legacy"


def test_a_command_of_prepare_for_gpt_writes_its_format(tmp_path: Path) -> None:
    triple = {"input": "a photo of a cat", "edit": "make it a dog", "output": "a photo of a dog"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(triple))
    output = tmp_path / "for-gpt.jsonl"
    prepare_for_finetuning.main(["--input-path", str(tmp_path / "prompts.jsonl"), "--output-path", str(output)])
    line = {"prompt": "a photo of a cat\n##\n", "completion": "make it a dog\n%%\na photo of a dog\nEND"}
    assert json.loads(output.read_text()) == line


def test_commands_of_instruction_tuned_sd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse = generate_dataset.parse_flags
    args = parse(
        ["--model_id", "toon.onnx", "--dataset-id", "imagenette/320px-v2", "--max_num_samples", "7", "--data-root", "x"]
    )
    assert (args.teacher, args.max_num_samples, args.data_root) == (["onnx:toon.onnx"], 7, Path("x"))
    assert generate_dataset.IMAGENETTE.fullmatch(args.dataset_id)
    assert not generate_dataset.IMAGENETTE.fullmatch("imagenet")
    assert parse(["--instructions_path=mine.txt"]).task == ["mine.txt"]
    assert parse(["--model_id", "diffusers:me/editor"]).teacher == ["diffusers:me/editor"]
    message = refusal(parse, ["--model_id", "sayakpaul/whitebox-cartoonizer"], capsys)
    assert "TensorFlow models are not run here" in message and "--teacher diffusers:" in message
    message = refusal(export_to_hub.parse_flags, ["--instructions_path", "instructions.txt"], capsys)
    assert "generate_dataset.py --task FILE" in message and "each row has its instruction" in message
    assert "--model_id: give a value" in refusal(parse, ["--model_id"], capsys)


def test_every_alias_stands_for_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    tables = {
        generate_dataset: peer_flags.GENERATE_DATASET,
        generate_pairs: peer_flags.GENERATE_PAIRS,
        generate_captions: peer_flags.GENERATE_CAPTIONS,
        prompt_app: peer_flags.PROMPT_APP,
        prepare_for_finetuning: peer_flags.PREPARE_FOR_FINETUNING,
        export_to_hub: peer_flags.EXPORT_TO_HUB,
    }
    found = [value for value in vars(peer_flags).values() if isinstance(value, FlagAliases)]
    assert {id(table) for table in tables.values()} == {id(table) for table in found}
    for script, table in tables.items():
        known = vars(script.parse_flags(SCRIPTS[script])).keys()
        assert {ours for ours in table.renamed.values() if isinstance(ours, str)} | table.ranges.keys() <= known
        with pytest.raises(SystemExit):
            script.parse_flags(["--help"])
        shown = capsys.readouterr().out
        assert not [name for name in table.renamed if re.search(rf"--{name}\b", shown)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_misspelled_flags_and_settings_files_in_every_data_script(script, tmp_path, monkeypatch, capsys) -> None:
    assert "--confg is not a flag: did you mean --config?" in refusal(
        script.parse_flags, [*SCRIPTS[script], "--confg=x"], capsys
    )
    flag = {
        check_dataset: "cache_dir",
        export_pairs: "cache_dir",
        prepare_for_finetuning: "output",
        prompt_app: "moderation",
    }.get(script, "data_root")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "flags.yaml"
    value = "blocklist:~/a" if flag == "moderation" else "$PLACE/a"
    file.write_text(f"{flag}: '{value}'\n")
    needed = [word for word in SCRIPTS[script] if not word.startswith(f"--{flag}")]
    expected = f"blocklist:{tmp_path}/a" if flag == "moderation" else f"{tmp_path}/a"
    assert str(getattr(script.parse_flags([*needed, "--config", "~/flags.yaml"]), flag)) == expected
    overridden = script.parse_flags([*needed, f"--{flag}=~/b", f"--config={file}"])
    assert str(getattr(overridden, flag)) == f"{tmp_path}/b"


def test_a_misspelled_required_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(generate_pairs.parse_flags, ["--promts", "p.jsonl", "--data_root", "out"], capsys)
    assert "--promts is not a flag: did you mean --prompts?" in message


def test_no_script_has_a_parser_of_its_own() -> None:
    """The one of utils/cli.py suggests the flag that a misspelled one resembles."""
    folders = ("assets", "benchmarks", "data_preparation", "evaluation", "utils")
    files = [*REPOSITORY.glob("*.py"), *(path for name in folders for path in (REPOSITORY / name).rglob("*.py"))]
    own = [path for path in files if re.search(r"\bArgumentParser\(\w", path.read_text())]
    assert len(files) > 100 and not own


def test_paths_and_configurations(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    args = generate_pairs.parse_flags(["--prompts=$PLACE/p.jsonl", "--data_root=~/out", "--init_images=~/photos"])
    assert (args.prompts, args.init_images) == (f"{tmp_path}/p.jsonl", f"{tmp_path}/photos")
    args = generate_dataset.parse_flags(["--task", "~/night.txt", "--teacher", "night=onnx:~/n.onnx"])
    assert (args.task, args.teacher) == ([f"{tmp_path}/night.txt"], [f"night=onnx:{tmp_path}/n.onnx"])
    args = import_pairs.parse_flags(["--source=s", "--data_root=o", "--prompts=~/p.csv", "--edit_prompt=~ $5"])
    assert (str(args.prompts), args.edit_prompt) == (f"{tmp_path}/p.csv", ["~ $5"])
    assert generate_dataset.parse_flags(["--config", "320px"]).dataset_config_name == "320px"
    (tmp_path / "flags").write_text("seed: 1")
    assert "must end in .yaml, .yml, .json" in refusal(
        generate_dataset.parse_flags, [f"--config={tmp_path / 'flags'}"], capsys
    )
    (tmp_path / "c.json").write_text('{"dataset_config_name": "160px", "max_num_samples": 3}')
    args = generate_dataset.parse_flags(["--config", "~/c.json"])
    assert (args.dataset_config_name, args.max_num_samples) == ("160px", 3)
    (tmp_path / "p.yaml").write_text(
        "guidance_range: [2, 3]\nmin_clip_text: none\nearly_stop: false\nmin-change: 0.1\n"
    )
    given = ["--prompts=p", "--data_root=o", f"--config={tmp_path / 'p.yaml'}", "--min_change=0.2"]
    settings = choose_settings(generate_pairs.parse_flags(given))
    assert (settings.guidance_range, settings.min_clip_text, settings.min_change) == ((2, 3), None, 0.2)
    assert settings.early_stop is False
    message = refusal(generate_dataset.parse_flags, ["--data_root", "$NOT_SET_HERE/x"], capsys)
    assert "the environment variable NOT_SET_HERE is not set" in message
