"""Train an InstructPix2Pix editor from a Stable Diffusion XL text-to-image model.

Like train_instruct_pix2pix.py, with SDXL's two text encoders and its time ids, the size and crop of each image (Podell
et al., 2307.01952). The result is a complete StableDiffusionXLInstructPix2PixPipeline in --output_dir.

    accelerate launch train_instruct_pix2pix_sdxl.py \\
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
        --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --vae_precision=fp16 --mixed_precision=fp16 \\
        --dataset_name=fusing/instructpix2pix-1000-samples --resolution=512 --train_batch_size=4 --max_train_steps=15000
"""

import sys
from functools import partial

from utils.cli import pick
from utils.errors import exit_on_input_error
from utils.training.flags import parse_training_flags
from utils.training.launcher import prepare_process


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_training_flags(
        argv, "Train an InstructPix2Pix editor from a Stable Diffusion XL text-to-image model.", "sdxl"
    )
    with exit_on_input_error():
        prepare_process()
        from utils.models.stable_diffusion import require_text_to_image
        from utils.training.assembly import train_editor
        from utils.training.settings import Settings

        return train_editor(pick(args, Settings), check_base=partial(require_text_to_image, is_sdxl=True))


if __name__ == "__main__":
    sys.exit(main())
