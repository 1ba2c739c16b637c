"""The flags of the data scripts of instruction-tuned-sd and of the original InstructPix2Pix, which ours accept too.

Dashes and underscores are the same in every flag. docs/data.md shows which command stands for which.
"""

from utils.errors import InputError
from utils.flag_aliases import FlagAliases

TEACHER_KINDS = ("onnx:", "torchhub:", "diffusers:", "python:")


def _teacher_of(model_id: str) -> list[str]:
    """--teacher for the --model_id of instruction-tuned-sd, a SavedModel of TensorFlow, which cannot be run here."""
    if model_id.startswith(TEACHER_KINDS) or model_id == "opencv":
        return [f"--teacher={model_id}"]
    if model_id.endswith(".onnx"):
        return [f"--teacher=onnx:{model_id}"]
    raise InputError(
        f"--model_id {model_id}: TensorFlow models are not run here. Convert it once (pip install tf2onnx; python -m "
        "tf2onnx.convert --saved-model FOLDER --output cartoonizer.onnx) and give --model_id cartoonizer.onnx; for a "
        f"diffusers model give --teacher diffusers:{model_id}; without the flag, cartoons are drawn by OpenCV"
    )


GENERATE_DATASET = FlagAliases(
    project="instruction-tuned-sd's generate_dataset.py",
    renamed={"model_id": _teacher_of, "instructions_path": "task", "n_partitions": "num_partitions"},
)
EXPORT_TO_HUB = FlagAliases(
    project="instruction-tuned-sd's export_to_hub.py",
    refused={
        "instructions_path": "each row has its instruction already; choose them when the pairs are generated, with "
        "generate_dataset.py --task FILE, or imported, with import_pairs.py --task FILE (one instruction per line)"
    },
)
GENERATE_PAIRS = FlagAliases(
    project="the original's generate_img_dataset.py",
    renamed={
        "out_dir": "data_root",
        "prompts_file": "prompts",
        "ckpt": "model",
        "vae_ckpt": "vae",
        "steps": "num_inference_steps",
        "n_samples": "num_samples",
        "n_partitions": "num_partitions",
        "clip_threshold": "min_clip_text",
        "clip_dir_threshold": "min_clip_dir",
        "clip_img_threshold": "min_clip_image",
    },
    ranges={
        "share_range": (("min_p2p", 0.1), ("max_p2p", 0.9)),
        "guidance_range": (("min_cfg", 7.5), ("max_cfg", 15.0)),
    },
    implied={"prompts_file": ("--preset=ip2p",)},
)
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_SERVER = ("--format=legacy", f"--base_url={OPENAI_URL}")
AESTHETICS = "ChristophSchuhmann/improved_aesthetics_6.5plus"  # Hub id of the captions that the original uses
GENERATE_CAPTIONS = FlagAliases(
    project="the original's generate_txt_dataset.py",
    renamed={"openai_model": "model", "n_partitions": "num_partitions", "partitions": "num_partitions"},
    implied={
        "openai_model": (
            *OPENAI_SERVER,
            f"--captions={AESTHETICS}",
            "--num_samples=10000",
            "--data_root=data/generated-prompts",
        )
    },
)
PROMPT_APP = FlagAliases(
    project="the original's prompt_app.py", renamed={"openai_model": "model"}, implied={"openai_model": OPENAI_SERVER}
)
PREPARE_FOR_FINETUNING = FlagAliases(
    project="the original's prepare_for_gpt.py",
    renamed={"input_path": "input", "output_path": "output"},
    implied={"input_path": ("--format=legacy",)},
)
