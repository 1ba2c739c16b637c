"""generate_pairs.py: captions with edits -> pairs, with tiny models and the toy model of assets/."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, HeunDiscreteScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from data_preparation.generate_pairs import main
from data_preparation.generation.inputs import Captions
from data_preparation.generation.pair_rows import pair_features
from data_preparation.pairs.candidates import (
    Candidate,
    CaptionJob,
    count_candidates,
    find_image_name,
    open_prompts,
    plan_batches,
    trim_passed,
)
from data_preparation.pairs.caption_pairs import require_supported
from data_preparation.pairs.filters import find_violated_bound
from data_preparation.pairs.models import ModelChoice, load_clip, load_image_processor, load_pipeline, resolve_models
from data_preparation.pairs.sampling import PairDraw
from data_preparation.pairs.settings import PRESETS
from tests.killing import kill_and_resume, rows_of
from tests.original_names import write_single_file
from tests.tiny import make_tiny_sd, make_tokenizer
from utils.errors import InputError
from utils.runtime import choose_device

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "data_preparation" / "generate_pairs.py"
TOY = REPOSITORY / "assets" / "toy-sd"
# Scores of a random CLIP mean nothing: without bounds every candidate passes.
NO_BOUNDS = [f"--{name}=none" for name in ("min_clip_image", "min_clip_dir", "min_clip_text", "max_clip_image")]
NO_BOUNDS += ["--min_change=none"]


def make_clip(folder: Path, side: int = 32) -> Path:
    """A random CLIP with 16 dimensions and the preprocessing of the real one, at `side` pixels."""
    torch.manual_seed(2)
    tokenizer = make_tokenizer(folder / "tokenizer-source")
    tower = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1)
    text = CLIPTextConfig(**tower, **ids, vocab_size=len(tokenizer), projection_dim=16)
    vision = CLIPVisionConfig(**tower, image_size=side, patch_size=8, projection_dim=16)
    config = dict(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(CLIPConfig(**config)).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_preprocessing(folder, side)
    return folder


def save_preprocessing(folder: Path, side: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        image_processor_type="CLIPImageProcessor",
        size={"shortest_edge": side},
        do_resize=True,
        do_rescale=True,
        crop_size={"height": side, "width": side},
        do_center_crop=True,
        do_normalize=True,
        do_convert_rgb=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """Five captions of the toy world; the edit leaves number 3 unchanged."""
    names = ("a green meadow under a blue sky", "the face of a tabby cat", "a red house", "a tree", "a hill")
    rows = [
        {
            "caption": f"a photograph of {name}",
            "edit": f"make it a pencil sketch {number}",
            "output": f"a photograph of {name}" if number == 3 else f"a pencil sketch of {name}",
            "url": f"https://example.org/{number}",
        }
        for number, name in enumerate(names)
    ]
    file = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def flags(captions, clip, tiny_base, tmp_path) -> list[str]:
    return [
        f"--prompts={captions}",
        f"--data_root={tmp_path / 'pairs'}",
        f"--model={tiny_base}",
        f"--clip_model={clip}",
        "--device=cpu",
    ]


def read(root: Path) -> list[dict]:
    files = sorted((root / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def rejected_of(root: Path) -> Counter:
    return Counter(json.loads((root / "manifest.json").read_text())["rejected"])


def pixels(image: dict) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(image["bytes"])))


def test_fast_preset_on_the_toy(flags, tmp_path, capsys):
    root = tmp_path / "pairs"
    main([*flags, f"--model={TOY}", *NO_BOUNDS])
    rows = read(root)
    assert len(rows) == 4 * 4  # four captions, max_out_samples each: an early stop at the fourth candidate
    loaded = datasets.load_dataset(str(root / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == pair_features()
    for row in rows:
        settings, scores = json.loads(row["settings"]), json.loads(row["scores"])
        assert settings["steps"] == 4 and settings["share_steps"] in (1, 2, 3) and settings["p2p_threshold"] is None
        assert settings["candidates"] == 4 and settings["unet_rows"] == 4 * 4 * 2
        assert set(scores) == {"clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image", "change"}
        assert pixels(row["original_image"]).shape == pixels(row["edited_image"]).shape == (64, 64, 3)
        models = json.loads(row["models"])
        assert [model["id"] for model in models] == ["toy-sd", "clip"] and all(model["revision"] for model in models)
        assert row["edited_prompt"].startswith("a pencil sketch") and row["original_prompt"].startswith("a photograph")
    by_caption = [rows[start : start + 4] for start in range(0, 16, 4)]
    for group in by_caption:
        directions = [json.loads(row["scores"])["clip_sim_dir"] for row in group]
        assert directions == sorted(directions, reverse=True)
        assert len({row["source"] for row in group}) == 1 and len({row["seed"] for row in group}) == 4
    assert rejected_of(root) == {"caption: the edited caption is the caption": 1}
    assert "16 candidates, 8 UNet rows each: 128, or 8 per kept pair" in capsys.readouterr().out


def test_ip2p_preset_on_the_toy(flags, tmp_path, capsys):
    """The settings of the paper, except for one candidate instead of a hundred."""
    main([*flags, f"--model={TOY}", "--preset=ip2p", "--num_samples=1", "--max_captions=1", *NO_BOUNDS])
    (row,) = read(tmp_path / "pairs")
    settings = json.loads(row["settings"])
    assert settings["steps"] == 100 and settings["candidates"] == 1
    assert settings["unet_rows"] == 100 * 4  # no early stop, and two images with two branches of guidance
    assert 0.1 <= settings["p2p_threshold"] <= 0.9 and 7.5 <= settings["guidance"] <= 15
    assert settings["share_steps"] == sum(settings["p2p_threshold"] > step / 99 for step in range(100))
    assert "1 candidates, 400 UNet rows each: 400, or 400 per kept pair" in capsys.readouterr().out


def test_commands_of_the_original_in_two_partitions(captions, clip, tmp_path, capsys):
    """With the flags of its generate_img_dataset.py, and with ours."""
    both = [f"--clip_model={clip}", "--device=cpu", "--captions_per_file=1", "--max_clip_image=none"]
    words = f"--prompts_file {captions} --ckpt {TOY} --steps 3 --n-samples 2 --max-out-samples 1 --clip-threshold -1"
    words += " --clip-dir-threshold=-1 --clip-img-threshold=-1 --min-cfg 2 --max-cfg 3 --n-partitions 2"
    for partition in (1, 0):
        main([*words.split(), *both, f"--out_dir={tmp_path / 'theirs'}", "--partition", str(partition)])
    assert "theirs waits for the partitions 0" in capsys.readouterr().out
    ours = f"--preset=ip2p --prompts={captions} --model={TOY} --num_inference_steps=3 --num_samples=2"
    ours += " --max_out_samples=1 --min_clip_text=-1 --min_clip_dir=-1 --min_clip_image=-1 --guidance_range 2 3"
    main([*ours.split(), *both, f"--data_root={tmp_path / 'ours'}"])
    assert rows_of(tmp_path / "theirs") == rows_of(tmp_path / "ours") and len(read(tmp_path / "ours")) == 4
    tensors = AutoencoderKL.from_pretrained(TOY, subfolder="vae").state_dict()
    torch.save({"state_dict": {f"first_stage_model.{name}": tensors[name] for name in tensors}}, tmp_path / "vae.ckpt")
    one = [f"--vae-ckpt={tmp_path / 'vae.ckpt'}", f"--data_root={tmp_path / 'vae'}", "--max_captions=1"]
    main([*ours.split(), *both, *one])
    assert read(tmp_path / "vae")[0]["edited_image"] == read(tmp_path / "ours")[0]["edited_image"]


def test_every_candidate_is_counted(flags, tmp_path):
    """As a row or under one reason; the UNet rows are those that it really evaluated."""
    main([*flags, *NO_BOUNDS, "--min_clip_dir=0.0", "--num_samples=6", "--max_out_samples=2", "--no-early_stop"])
    rows, rejected = read(tmp_path / "pairs"), rejected_of(tmp_path / "pairs")
    assert count_candidates(len(rows), rejected) == 4 * 6
    assert rejected["clip_sim_dir below 0.0"] > 0
    assert all(json.loads(row["scores"])["clip_sim_dir"] >= 0 for row in rows)
    assert all(json.loads(row["settings"])["unet_rows"] == 6 * 8 for row in rows)
    assert {row["original_prompt"] for row in rows}.isdisjoint({"a photograph of a tree"})


def test_an_early_stop_keeps_the_same_pairs_for_any_batch_size(flags, tmp_path):
    kept, bounds = [], [*NO_BOUNDS, "--min_clip_dir=0.0"]
    for batch_size in (1, 3, 50):
        root = tmp_path / f"batch{batch_size}"
        main([*flags, *bounds, f"--data_root={root}", f"--batch_size={batch_size}", "--max_out_samples=2"])
        rows = read(root)
        kept.append([(row["source"], row["seed"], json.loads(row["settings"])["sample"]) for row in rows])
        images = np.stack([pixels(row["edited_image"]) for row in rows]).astype(int)
        if batch_size == 1:
            first = images
            fewest = sum({row["source"]: json.loads(row["settings"])["candidates"] for row in rows}.values())
            assert fewest < 4 * 16  # it stopped early
        assert np.abs(images - first).max() <= 2  # rounding depends on the batch size
    assert kept[0] == kept[1] == kept[2]


def test_running_again(flags, tmp_path, capsys):
    flags = [*flags, *NO_BOUNDS, "--max_captions=2", "--captions_per_file=1"]
    main(flags)
    rows = read(tmp_path / "pairs")
    main(flags)
    assert "already complete" in capsys.readouterr().out
    main([*flags, f"--data_root={tmp_path / 'again'}"])
    assert read(tmp_path / "again") == rows
    with pytest.raises(SystemExit):
        main([*flags, "--num_inference_steps=5"])
    assert "num_inference_steps was 4 and is now 5" in capsys.readouterr().err
    main([*flags, f"--data_root={tmp_path / 'other'}", "--seed=1"])
    assert {row["seed"] for row in read(tmp_path / "other")}.isdisjoint({row["seed"] for row in rows})


def test_sdxl(flags, tiny_sdxl, tmp_path):
    sampling = ["--scheduler=euler_a", "--timestep_spacing=trailing", "--max_captions=1"]
    main([*flags, f"--model={tiny_sdxl}", *sampling, *NO_BOUNDS])
    assert len(read(tmp_path / "pairs")) == 4


def test_clip_scores_are_cosines_of_clip_features(clip, tmp_path):
    scorer = load_clip(ModelChoice("none", clip_model=str(clip)), "cpu")
    rng = np.random.default_rng(0)
    wide = [rng.integers(0, 255, (40, 90, 3), dtype=np.uint8) for _ in range(4)]
    texts = [("a dog", "a cat"), ("trees", "a very long caption " * 30)]
    features = [scorer.encode_captions(*pair) for pair in texts]
    scores = scorer.score(wide[:2], wide[2:], features)

    def features_of(image: np.ndarray, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """By hand: bicubic resize of the shorter side to 32, centre crop, mean and deviation of CLIP."""
        small = np.asarray(Image.fromarray(image).resize((72, 32), Image.Resampling.BICUBIC))[:, 20:52]
        mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        normalised = torch.tensor((small / 255 - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]
        inputs = scorer.encoder.tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            output = scorer.encoder.model(pixel_values=normalised, **inputs)
        return output.image_embeds[0].double(), output.text_embeds[0].double()

    for pair in range(2):
        image_0, text_0 = features_of(wide[pair], texts[pair][0])
        image_1, text_1 = features_of(wide[2 + pair], texts[pair][1])
        cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
        assert scores[pair]["clip_sim_0"] == pytest.approx(cosine(image_0, text_0), abs=1e-3)
        assert scores[pair]["clip_sim_1"] == pytest.approx(cosine(image_1, text_1), abs=1e-3)
        assert scores[pair]["clip_sim_image"] == pytest.approx(cosine(image_0, image_1), abs=1e-3)
        expected = cosine(image_1 - image_0, text_1 - text_0)
        assert scores[pair]["clip_sim_dir"] == pytest.approx(expected, abs=0.02)
        difference = np.abs(wide[pair].astype(float) - wide[2 + pair]).mean() / 255
        assert scores[pair]["change"] == pytest.approx(difference)
    assert features[0].similarity == pytest.approx(float(features[0].original @ features[0].edited))
    same = scorer.score(wide[:1], wide[:1], features[:1])[0]
    assert same["clip_sim_dir"] == 0 and same["clip_sim_image"] == pytest.approx(1) and same["change"] == 0


def test_bounds():
    good = {"clip_sim_image": 0.8, "clip_sim_dir": 0.3, "clip_sim_0": 0.25, "clip_sim_1": 0.25, "change": 0.2}
    for preset, bounds in (("ip2p", (0.7, 0.2, 0.2, 0.2)), ("fast", (0.75, 0.22, 0.2, 0.2))):
        settings = PRESETS[preset].settings
        assert find_violated_bound(good, settings) is None
        for name, least in zip(("clip_sim_image", "clip_sim_dir", "clip_sim_0", "clip_sim_1"), bounds, strict=True):
            assert find_violated_bound(good | {name: least}, settings) is None
            assert find_violated_bound(good | {name: least - 0.001}, settings) == f"{name} below {least}"
            assert find_violated_bound(good | {name: float("nan")}, settings) == f"{name} below {least}"
    assert (
        find_violated_bound(good | {"clip_sim_image": 0.995}, PRESETS["fast"].settings) == "clip_sim_image above 0.99"
    )
    assert find_violated_bound(good | {"change": 0.001}, PRESETS["fast"].settings) == "change below 0.01"
    assert find_violated_bound(good | {"change": 0.0, "clip_sim_image": 1.0}, PRESETS["ip2p"].settings) is None


def make_job(item: int) -> CaptionJob:
    return CaptionJob(item, "", "", "", "", None)


def test_batches_and_kept_candidates():
    jobs = [make_job(item) for item in range(3)]
    batches = plan_batches(jobs, 3, 2)
    assert [[(job.item, sample) for job, sample in next(batches)] for _ in range(2)] == [
        [(0, 0), (1, 0)],
        [(2, 0), (0, 1)],
    ]
    jobs[0].is_done = True
    assert [[(job.item, sample) for job, sample in batch] for batch in batches] == [[(1, 1), (2, 1)], [(1, 2), (2, 2)]]

    def passed(directions: list[float]) -> list[Candidate]:
        draw = PairDraw(0, 1)
        return [Candidate(n, draw, {"clip_sim_dir": value}, None, None) for n, value in enumerate(directions)]

    best, first, rejected = make_job(0), make_job(1), Counter()
    best.passed, first.passed = passed([0.1, 0.4, 0.3, 0.4, 0.2]), passed([0.1, 0.4, 0.3, 0.4, 0.2])
    trim_passed(best, replace(PRESETS["ip2p"].settings, max_out_samples=3), rejected)
    trim_passed(first, replace(PRESETS["fast"].settings, max_out_samples=3), rejected)
    assert [kept.index for kept in best.passed] == [1, 3, 2] and not best.is_done
    assert [kept.index for kept in first.passed] == [0, 1, 2] and first.is_done
    assert rejected == {"more than --max_out_samples": 4}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("meadow_1.jpg", "cat.jpg"):
        Image.open(REPOSITORY / "assets" / "photos" / name).save(folder / name)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "cat.jpg", "license": "CC0"}) + "\n")
    return folder


@pytest.mark.parametrize("original", ["real", "generated"])
def test_pairs_from_photographs(flags, photographs, tmp_path, original):
    rows = [
        {"caption": "a photo", "edit": "make it a sketch", "output": "a sketch", "file_name": name}
        for name in ("cat.jpg", "meadow_1.jpg", "missing.jpg")
    ]
    prompts = tmp_path / "named.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ["--strength=0.5", "--num_inference_steps=8", "--max_out_samples=1", "--image_format=png"]
    inputs = [f"--prompts={prompts}", f"--init_images={photographs}", f"--original={original}"]
    main([*flags, *inputs, f"--model={TOY}", *sampling, *NO_BOUNDS])
    rows = read(tmp_path / "pairs")
    assert [row["source"] for row in rows] == ["cat.jpg", "meadow_1.jpg"]
    assert [row["source_license"] for row in rows] == ["CC0", None]
    assert rejected_of(tmp_path / "pairs")["caption: its photograph is not in --init_images"] == 1
    for row in rows:
        settings = json.loads(row["settings"])
        assert (settings["steps"], settings["strength"], settings["original"]) == (4, 0.5, original)
        assert 1 <= settings["share_steps"] <= 3
        photograph = Image.open(photographs / row["source"]).convert("RGB")
        side = min(photograph.size)
        left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
        square = photograph.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BOX)
        difference = np.abs(np.asarray(square, int) - pixels(row["original_image"])).mean()
        assert (difference < 3) == (original == "real")  # area resampling, and box for comparison


def test_pairs_from_images_in_the_dataset_of_the_captions(flags, tmp_path, photographs):
    paths = sorted(map(str, photographs.glob("*.jpg")))
    rows = {
        "photo": paths,
        "caption": ["a cat", "a meadow"],
        "edit": ["make it night"] * 2,
        "output": ["a cat at night", "a meadow at night"],
    }
    saved = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    inputs = [f"--prompts={tmp_path / 'saved'}", f"--init_images={tmp_path / 'saved'}"]
    main([*flags, *inputs, "--num_inference_steps=8", "--max_out_samples=1", *NO_BOUNDS])
    assert [row["original_prompt"] for row in read(tmp_path / "pairs")] == ["a cat", "a meadow"]


@pytest.fixture(scope="module")
def safety_checker(tmp_path_factory) -> Path:
    """A safety checker with random weights, which flags nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checker") / "checker"
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16)).save_pretrained(folder)
    save_preprocessing(folder, 32)
    return folder


NONE_KEPT = "{}: 2; caption: no candidate passed: 1"


def test_safety_checker(flags, safety_checker, tmp_path, capsys):
    flags = [*flags, *NO_BOUNDS, "--max_captions=1", "--num_samples=2"]
    main([*flags, f"--safety_checker={safety_checker}"])  # no cosine exceeds its thresholds of 1
    assert len(read(tmp_path / "pairs")) == 2
    checker = StableDiffusionSafetyChecker.from_pretrained(safety_checker)
    checker.concept_embeds_weights.data.fill_(-2.0)
    checker.save_pretrained(tmp_path / "strict")
    save_preprocessing(tmp_path / "strict", 32)
    with pytest.raises(SystemExit):
        main([*flags, f"--safety_checker={tmp_path / 'strict'}", f"--data_root={tmp_path / 'none'}"])
    assert NONE_KEPT.format("flagged by the safety checker") in capsys.readouterr().err


def test_safety_checker_of_the_model(flags, safety_checker, tiny_base, tmp_path, capsys):
    pipeline = load_pipeline(ModelChoice(str(tiny_base)), torch.float32, "cpu")
    checker = StableDiffusionSafetyChecker.from_pretrained(safety_checker)
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipeline.register_modules(safety_checker=checker, feature_extractor=load_image_processor(str(safety_checker)))
    pipeline.save_pretrained(tmp_path / "model")
    flags = [*flags, f"--model={tmp_path / 'model'}", *NO_BOUNDS, "--max_captions=1", "--num_samples=2"]
    with pytest.raises(SystemExit):
        main(flags)
    assert NONE_KEPT.format("flagged by the safety checker") in capsys.readouterr().err
    main([*flags, "--no_safety_checker", f"--data_root={tmp_path / 'unchecked'}"])
    assert len(read(tmp_path / "unchecked")) == 2


def test_image_check(flags, tmp_path, capsys):
    file = tmp_path / "check.py"
    file.write_text(
        "def bright(images):\n    return [image.mean() > 0 for image in images]\n"
        "def short(images):\n    return [False]\n"
    )
    flags = [*flags, *NO_BOUNDS, "--max_captions=1", "--num_samples=2"]
    with pytest.raises(SystemExit):
        main([*flags, f"--image_check=python:{file}:bright"])
    assert NONE_KEPT.format("flagged by --image_check") in capsys.readouterr().err
    for function, message in (("none", "has no attribute 'none'"), ("short", "returned 1 values for 2 images")):
        with pytest.raises(SystemExit):
            main([*flags, f"--image_check=python:{file}:{function}", f"--data_root={tmp_path / function}"])
        assert message in capsys.readouterr().err


def test_lora_and_vae(tiny_base, tmp_path):
    from peft import LoraConfig

    plain = load_pipeline(ModelChoice(str(tiny_base)), torch.float32, "cpu")
    trained = load_pipeline(ModelChoice(str(tiny_base)), torch.float32, "cpu")
    torch.manual_seed(0)
    trained.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    trained.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    other = make_tiny_sd(tmp_path / "other", seed=9)
    choice, models = resolve_models(
        ModelChoice(str(tiny_base), lora=str(tmp_path / "lora"), vae=str(other), clip_model=str(other))
    )
    assert [model["id"] for model in models] == ["base", "other", "other", "lora"]
    assert len({model["revision"] for model in models}) == 3
    merged = load_pipeline(choice, torch.float32, "cpu")
    inputs = (torch.ones(1, 4, 16, 16), 3, torch.ones(1, 77, 32))
    with torch.no_grad():
        outputs = [pipeline.unet(*inputs)[0] for pipeline in (plain, trained, merged)]
    assert (outputs[1] - outputs[2]).abs().max() < 1e-5 and (outputs[0] - outputs[2]).abs().max() > 1e-3
    vae = load_pipeline(ModelChoice(str(other)), torch.float32, "cpu").vae
    assert torch.equal(merged.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    with pytest.raises(InputError, match="--vae .*nowhere"):
        load_pipeline(replace(choice, vae=str(tmp_path / "nowhere")), torch.float32, "cpu")


def test_invalid_flags_are_reported_together(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        flags = "--prompts=x --num_inference_steps=1 --guidance_range 0 3 --share_steps 1 9 --share_range 0.1 0.9"
        flags += " --batch_size=0 --strength=0.5 --max_clip_text=7 --original=real --image_check=check.py --seed=-1"
        main([f"--data_root={tmp_path}", *flags.split(), "--safety_checker=x", "--no_safety_checker"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: fix these problems")
    for flag in (
        "num_inference_steps 1",
        "guidance_range 0.0 3.0",
        "share_steps 1 9",
        "batch_size 0",
        "strength",
        "max_clip_text 7",
        "original real",
        "image_check check.py",
        "seed -1",
        "safety_checker and",
        "share_range and",
    ):
        assert f"--{flag}" in message, flag


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model=/nowhere/at/all", "cannot be loaded"),
        ("--model={editor}", "a text-to-image model of Stable Diffusion"),
        ("--clip_model={base}", "CLIPModel"),
        ("--resolution=34", "must be a multiple of 4"),
        ("--prompts={bare}", "no text column edit and output"),
        ("--scheduler=edm_euler", "has other noise levels"),
    ],
)
def test_input_errors_are_one_message(flags, tiny_base, tiny_editor, tmp_path, capsys, change, message):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"caption": "a dog"}\n')
    with pytest.raises(SystemExit) as stopped:
        main([*flags, change.format(editor=tiny_editor, base=tiny_base, bare=bare), "--max_captions=1"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_a_model_that_overflows(flags, tiny_base, tmp_path, capsys):
    """As the autoencoder of SDXL does in fp16."""
    pipeline = load_pipeline(ModelChoice(str(tiny_base)), torch.float32, "cpu")
    pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main([*flags, f"--model={tmp_path / 'model'}"])
    assert "values that are not finite in all images: give --dtype fp32" in capsys.readouterr().err


def test_unsupported_schedulers():
    with pytest.raises(InputError, match="HeunDiscreteScheduler, the scheduler of the model, runs the UNet twice"):
        require_supported(HeunDiscreteScheduler(), "generated")
    with pytest.raises(InputError, match="give --original generated"):
        require_supported(EDMEulerScheduler(), "real")
    require_supported(EDMEulerScheduler(), "generated")


def test_half_precision(flags, tiny_sdxl, tmp_path):
    """The noise is that of full precision, so the images are similar."""
    flags = [*flags, f"--model={tiny_sdxl}", *NO_BOUNDS, "--max_captions=1", "--num_samples=1", "--image_format=png"]
    images = []
    for dtype in ("fp32", "bf16"):
        main([*flags, f"--dtype={dtype}", f"--data_root={tmp_path / dtype}"])
        images.append(pixels(read(tmp_path / dtype)[0]["edited_image"]).astype(int))
    assert np.abs(images[0] - images[1]).mean() < 4


@pytest.mark.parametrize("family", ["tiny_base", "tiny_sdxl"])
def test_a_model_in_one_file(flags, family, tmp_path, request):
    folder = request.getfixturevalue(family)
    pipeline = load_pipeline(ModelChoice(str(folder)), torch.float32, "cpu")
    file = write_single_file(pipeline, tmp_path / "model.safetensors")
    flags = [*flags, *NO_BOUNDS, "--max_captions=1", "--num_samples=1", "--image_format=png"]
    main([*flags, f"--model={file}", f"--single_file_config={folder}"])
    main([*flags, f"--model={folder}", f"--data_root={tmp_path / 'folder'}"])
    one, other = read(tmp_path / "pairs"), read(tmp_path / "folder")
    assert [row["edited_image"] for row in one] == [row["edited_image"] for row in other]


def test_captions_of_generate_captions_and_of_the_paper(tmp_path):
    texts = {"edit": ["make it night"], "output": ["a dog at night"], "url": ["https://example.org/dog"]}
    (tmp_path / "captions" / "data").mkdir(parents=True)
    file = tmp_path / "captions" / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"caption": ["a dog"], **texts}).to_parquet(file)
    published = tmp_path / "prompts.jsonl"
    published.write_text(json.dumps({"input": "a dog"} | {name: value[0] for name, value in texts.items()}) + "\n")
    for source in (tmp_path / "captions", published):
        opened = open_prompts(Captions(str(source)))
        assert opened.row(0)[opened.column] == "a dog" and opened.row(0)["edit"] == "make it night"
    assert find_image_name({"source": "cat.jpg", "other": "dog.jpg"}, None) == "cat.jpg"
    assert find_image_name({"source": "cat.jpg", "other": "dog.jpg"}, "other") == "dog.jpg"


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank=rank)[0] for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert choose_device("cuda:1", rank=0)[0] == "cuda:1" and choose_device("cpu", rank=5)[0] == "cpu"


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert "--preset" in output and "--share_range" in output and "generate_captions.py" in output


@pytest.mark.slow
def test_killed_runs_and_two_workers_give_the_same_pairs(flags, tmp_path):
    """Kills while models are loaded, pairs are sampled and files are written."""
    flags = [*flags, *NO_BOUNDS, "--captions_per_file=1", "--num_samples=3", "--batch_size=2"]
    imports = ("torch", "diffusers", "transformers")
    uninterrupted, outputs = kill_and_resume("data_preparation.generate_pairs", flags, tmp_path, 20, imports)
    main([*flags, f"--data_root={tmp_path / 'two'}", "--num_workers=2"])
    assert len(read(uninterrupted)) == 4 * 3
    assert all(rows_of(output) == rows_of(uninterrupted) for output in (*outputs, tmp_path / "two"))
