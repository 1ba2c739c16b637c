"""Fine-tune an InstructPix2Pix editor of Stable Diffusion 1.x/2.x or SDXL on your own pairs.

The base is a UNet with 8 input channels, such as timbrooks/instruct-pix2pix. Its family is detected from the model's
files; a CosXL editor in one .safetensors file works too.

    accelerate launch finetune_instruct_pix2pix.py --pretrained_model_name_or_path=timbrooks/instruct-pix2pix \\
        --dataset_name=instruction-tuning-sd/cartoonization --train_batch_size=2 --max_train_steps=15000
"""

import sys

from utils.cli import pick
from utils.errors import exit_on_input_error
from utils.training.flags import parse_training_flags
from utils.training.launcher import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_training_flags(argv, "Fine-tune an InstructPix2Pix editor on your own pairs.", "any")
    with exit_on_input_error():
        prepare_process()
        from utils.models.stable_diffusion import require_editor
        from utils.training.assembly import train_editor
        from utils.training.settings import Settings

        return train_editor(pick(args, Settings), check_base=require_editor)


if __name__ == "__main__":
    sys.exit(main())
