"""The second half of soak.py: scripts killed at random moments, run again, must end with the bytes of a whole run."""

import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PHOTOGRAPHS, BASE = REPOSITORY / "assets/photos", REPOSITORY / "assets/toy-sd"
DATA_IMPORTS = ("datasets", "cv2", "pyarrow.parquet")
TRAINING_IMPORTS = ("torch", "diffusers", "accelerate", "transformers", "datasets")


@dataclass(frozen=True)
class Part:
    """module: of the script; output: its flag for the folder; files: patterns of the results that must be equal."""

    name: str
    module: str
    argv: list[str]
    output: str
    files: tuple[str, ...]
    imports: tuple[str, ...] = field(default=DATA_IMPORTS)


def make_parts(pairs: Path) -> list[Part]:
    """Training, training from a latent cache, generation and export."""
    training = [
        f"--pretrained_model_name_or_path={BASE}",
        f"--dataset_name={pairs}",
        "--resolution=64",
        "--train_batch_size=2",
        "--max_train_steps=12",
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=2",
        "--resume_from_checkpoint=latest",
        "--use_ema",
        "--seed=3",
        "--report_to=none",
    ]
    weights = ("unet/*.safetensors", "model_index.json")
    cached = [*training, "--cache_latents", "--center_crop", "--max_train_steps=2"]
    generation = [f"--dataset_id={PHOTOGRAPHS}", "--task=all", "--max_num_samples=200", "--resolution=128"]
    export = [f"--data_root={pairs}", "--repo_id=user/pairs", "--no_push", "--max_shard_size=40KB", "--license=mit"]
    return [
        Part("training", "train_instruct_pix2pix", training, "--output_dir", weights, TRAINING_IMPORTS),
        Part(
            "latent cache",
            "train_instruct_pix2pix",
            cached,
            "--output_dir",
            (*weights, "latent-cache/**/*.safetensors"),
            TRAINING_IMPORTS,
        ),
        Part("generation", "data_preparation.generate_dataset", generation, "--data_root", ("data/*.parquet",)),
        Part("export", "data_preparation.export_to_hub", export, "--export_dir", ("data/*.parquet", "assets/*")),
    ]


def run_kills(kills: int) -> bool:
    """Kill each part `kills` times, print a table, and return whether all results are equal."""
    from tests.killing import kill_and_resume

    print("| part | kills | finished runs that were killed | files of a run | runs with other bytes | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    num_different = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for part in make_parts(make_pairs(Path(folder, "pairs"))):
            start, place = time.monotonic(), Path(folder, part.name.replace(" ", "-"))
            whole, killed = kill_and_resume(part.module, part.argv, place, kills, part.imports, part.output)
            expected = digests(whole, part.files)
            assert expected, f"{part.name} made no files"
            different = sum(digests(output, part.files) != expected for output in killed)
            num_different += different
            seconds = time.monotonic() - start
            row = (part.name, kills, len(killed), len(expected), different, f"{seconds:.0f}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    return num_different == 0


def make_pairs(folder: Path) -> Path:
    from data_preparation.generate_dataset import main as generate

    generate(
        [
            f"--dataset_id={PHOTOGRAPHS}",
            "--task=all",
            "--max_num_samples=60",
            "--resolution=64",
            f"--data_root={folder}",
        ]
    )
    return folder


def digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Digest of each file by its path below the folder."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    sys.exit("run: python benchmarks/soak.py --only kills")
