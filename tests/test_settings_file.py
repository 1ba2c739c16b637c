"""`--config FILE`, paths with "~" and variables, and no Unix-only import."""

import ast
import json
from pathlib import Path

import pytest

from utils.training.flags import parse_training_flags

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = {"pretrained_model_name_or_path": "me/base", "dataset_name": "me/pairs"}


def parse(*flags: str):
    return parse_training_flags(list(flags), "x")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_sets_flags_and_the_command_line_overrides_it(suffix: str, tmp_path: Path) -> None:
    values = NEEDED | {"learning_rate": 1e-5, "use_ema": True, "use_dora": False, "train_batch_size": 3, "seed": None}
    values |= {"validation_prompt": ["a, b", "it's $5"], "val_image_url": ["x.png"], "prodigy_safeguard_warmup": False}
    text = json.dumps(values) if suffix == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items())
    file = write(tmp_path / f"run.{suffix}", text.replace("1e-05", "1e-5"))
    args = parse("--config", file, "--train_batch_size=7", "--val_image_url", "y.png")
    assert (args.learning_rate, args.use_ema, args.use_dora, args.train_batch_size) == (1e-5, True, False, 7)
    assert args.validation_prompt == ["a, b", "it's $5"] and args.val_image_url == ["y.png"] and args.seed is None
    assert args.prodigy_safeguard_warmup is False and args.dataset_name == "me/pairs"


def test_args_json_of_an_earlier_run_gives_the_same_settings(tmp_path: Path) -> None:
    from utils.cli import pick
    from utils.training.settings import Settings

    flags = [f"--{name}={value}" for name, value in NEEDED.items()]
    first = pick(parse(*flags, "--lora_rank=4", "--snr_gamma=5", "--gradient_checkpointing"), Settings)
    file = write(tmp_path / "args.json", json.dumps(first.by_flag() | {"hub_token": "secret"}))
    assert pick(parse(f"--config={file}"), Settings) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "'learning_rat' is not a flag: did you mean learning_rate?"),
        ("learning_rate: fast", "learning_rate is 'fast'; it must be a number"),
        ("use_ema: 1", "use_ema is 1; it must be true or false"),
        ("lr_scheduler: wavy", "lr_scheduler is 'wavy'; it must be one of linear, cosine"),
        ("seed: [1, 2]", "seed is [1, 2]; it must be a whole number"),
        ("- a", "must map flags to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file_are_one_message(text: str, message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--config", write(tmp_path / "run.yaml", text))
    error = capsys.readouterr().err
    assert message in error and "run.yaml" in error and "Traceback" not in error


def test_paths_may_have_a_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOTHING", raising=False)
    flags = ("--pretrained_model_name_or_path=~/base", "--dataset_name=$DATA/pairs")
    prompt = ("--validation_prompt=~ for $5", "--val_image_url=${DATA}/x.png")
    args = parse(*flags, *prompt, "--output_dir=~/out")
    assert args.pretrained_model_name_or_path == f"{tmp_path}/base" and args.dataset_name == "/data/pairs"
    assert args.output_dir == f"{tmp_path}/out"
    assert args.validation_prompt == ["~ for $5"] and args.val_image_url == ["/data/x.png"]
    with pytest.raises(SystemExit):
        parse(*flags, "--output_dir=$NOTHING/out")
    assert "--output_dir $NOTHING/out: the environment variable NOTHING is not set" in capsys.readouterr().err


def test_nothing_that_only_unix_has_is_imported_at_module_level() -> None:
    unix = {"resource", "fcntl", "pwd", "grp", "termios", "posix", "pty"}
    for path in [
        *REPOSITORY.glob("*.py"),
        *REPOSITORY.glob("utils/**/*.py"),
        *REPOSITORY.glob("data_preparation/**/*.py"),
    ]:
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not unix & set(names), path
