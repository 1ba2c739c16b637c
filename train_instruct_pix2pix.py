"""Train an InstructPix2Pix editor from a Stable Diffusion 1.x/2.x text-to-image model.

The text-to-image UNet gets four more input channels for the image to be edited, and is trained on original images, edit
prompts and edited images (Brooks, Holynski and Efros, 2211.09800). The result is a complete
StableDiffusionInstructPix2PixPipeline in --output_dir.

    accelerate launch train_instruct_pix2pix.py \\
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name=fusing/instructpix2pix-1000-samples --resolution=256 --train_batch_size=4 --max_train_steps=15000
"""

import sys
from functools import partial

from utils.cli import pick
from utils.errors import exit_on_input_error
from utils.training.flags import parse_training_flags
from utils.training.launcher import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_training_flags(argv, "Train an InstructPix2Pix editor from a Stable Diffusion text-to-image model.")
    with exit_on_input_error():
        prepare_process()
        from utils.models.stable_diffusion import require_text_to_image
        from utils.training.assembly import train_editor
        from utils.training.settings import Settings

        return train_editor(pick(args, Settings), check_base=partial(require_text_to_image, is_sdxl=False))


if __name__ == "__main__":
    sys.exit(main())
