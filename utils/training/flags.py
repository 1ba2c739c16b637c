"""The command line of the training scripts.

Flags of diffusers' own InstructPix2Pix examples keep their names, meanings and defaults. Where such a default trains a
wrong model, ours differs and the help says so. Nothing heavy is imported here.
"""

import argparse
from collections.abc import Callable

from utils.cli import DefaultsHelpFormatter, FlagParser
from utils.errors import InputError
from utils.settings_file import add_config_flag
from utils.training.flag_checks import find_flag_problems

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy", "schedulefree_adamw")
BEST = ("loss", "psnr", "ssim", "l1")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "all", "none")


def parse_training_flags(
    argv: list[str] | None,
    description: str,
    family: str = "sd",
    add_own_flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Parse and check the flags of a training script; exits with code 2 and one message when they cannot work.

    family: the models that the script trains: "sd", "sdxl" or "any". The last two have SDXL's own flags.
    add_own_flags: adds flags of another script that accepts those of a training.
    """
    usage = "accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --dataset_name PAIRS [flags below]"
    parser = FlagParser(usage=usage, description=description, formatter_class=DefaultsHelpFormatter, allow_abbrev=False)
    sections = (_add_model, _add_data, _add_objective, _add_optimization, _add_adapter, _add_precision, _add_run)
    for add_flags in (*sections, _add_validation, _add_checkpoints, _add_publishing):
        add_flags(parser)
    if family != "sd":
        _add_sdxl(parser)
    if add_own_flags:
        add_own_flags(parser)
    if family == "sdxl":
        parser.set_defaults(vae_precision="fp32")  # as in diffusers' SDXL script
    args, unknown = parser.parse_known_args(argv)
    if args.validation_epochs is None and args.validation_steps is None and family == "sdxl":
        args.validation_steps = 100  # as in diffusers' SDXL script
    problems = [*map(parser.describe_unknown, unknown), *find_flag_problems(args)]
    if problems:
        parser.exit(2, f"error: {InputError.from_problems(problems)}\n")
    args.validation_epochs = args.validation_epochs or 1
    return args


# ---- the flags ------------------------------------------------------------------------------------------------------


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    model = "folder, Hub id or .safetensors file of the base model"
    group.add_argument("--pretrained_model_name_or_path", required=True, help=model)
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--variant", help="variant of the weight files, such as fp16")
    group.add_argument("--non_ema_revision", help="revision of the UNet alone, for its non-EMA weights")
    group.add_argument("--pretrained_vae_model_name_or_path", help="folder or Hub id of another VAE")
    group.add_argument("--vae_revision", help="branch, tag or commit of that VAE")
    group.add_argument("--vae_variant", help="variant of that VAE's weight files")
    config = "folder or Hub id of a pipeline with the configuration of a single-file model (default: found on the Hub)"
    group.add_argument("--single_file_config", help=config)
    group.add_argument("--cache_dir", help="folder of downloaded models and datasets")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id or folder of the dataset")
    group.add_argument("--dataset_config_name", help="configuration of the dataset, if it has several")
    group.add_argument(
        "--train_data_dir", help="image folder with a metadata.jsonl or .csv that names two images a row"
    )
    group.add_argument("--train_mix", help="YAML file that lists several datasets and their weights")
    group.add_argument("--dataset_split", default="train", help="split to train on")
    group.add_argument("--streaming", action="store_true", help="stream the dataset instead of storing it")
    column = "column of the {} (default: known for published datasets; unlike diffusers, never the column's position)"
    group.add_argument("--original_image_column", help=column.format("original images"))
    group.add_argument("--edit_prompt_column", help=column.format("edit prompts"))
    group.add_argument("--edited_image_column", help=column.format("edited images"))
    group.add_argument("--max_train_samples", type=int, help="use at most this many rows")
    bad_rows = "stop when more than this share (below 1) or this number of rows cannot be read; others are skipped"
    group.add_argument("--max_bad_rows", type=float, default=0.01, help=bad_rows)
    group.add_argument("--resolution", type=int, default=256, help="shorter side of the training images in pixels")
    modes = (
        "crop: resize the shorter side, then crop a square; squash: resize both sides, as diffusers does; "
        "bucket: keep the aspect ratio and batch by shape"
    )
    group.add_argument("--resize_mode", choices=("crop", "squash", "bucket"), default="crop", help=modes)
    aspects = "skip pairs whose aspect ratios differ by more than this share (squash: none)"
    group.add_argument("--max_aspect_difference", type=float, default=0.02, metavar="SHARE", help=aspects)
    group.add_argument("--center_crop", action="store_true", help="crop the centre instead of a random position")
    group.add_argument(
        "--random_flip", action="store_true", help="mirror half of the pairs, never 'left'/'right' edits"
    )
    workers = "number of data loading processes (default: one for each core, at most 8, on a GPU; none on the CPU)"
    group.add_argument("--dataloader_num_workers", type=int, metavar="N", help=workers)
    cache = (
        "encode all images once and keep their latents in output_dir/latent-cache; needs --center_crop, --cache_crops "
        "or --resize_mode squash"
    )
    group.add_argument("--cache_latents", action="store_true", help=cache)
    crops = "keep the latents of this many random crops of each pair, of which each epoch takes one"
    group.add_argument("--cache_crops", type=int, default=1, metavar="N", help=crops)
    shared = (
        "keep prompt embeddings and the latents of --cache_latents here, for further runs with the same data and model"
    )
    group.add_argument("--latent_cache_dir", metavar="DIR", help=shared)


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    dropout = (
        "probability of dropping the prompt alone, the image alone, and both, each; 0.05 as in the paper (without "
        "dropout, diffusers' default, guidance does not work)"
    )
    group.add_argument("--conditioning_dropout_prob", type=float, default=0.05, help=dropout)
    prediction = "prediction type (default: that of the base model)"
    group.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), help=prediction)
    group.add_argument("--snr_gamma", type=float, help="gamma of min-SNR loss weights (2303.09556); 5.0 is recommended")
    group.add_argument("--noise_offset", type=float, default=0.0, help="scale of the noise offset, such as 0.05")
    zero_snr = "rescale the noise schedule to zero terminal SNR (2305.08891); needs v_prediction"
    group.add_argument("--rescale_betas_zero_snr", action="store_true", help=zero_snr)


def _add_optimization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=16, help="samples per process and micro-batch")
    auto = "divide --train_batch_size so that a step fits into the memory, and accumulate as many more micro-batches"
    group.add_argument("--auto_batch_size", action="store_true", help=auto)
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    group.add_argument("--num_train_epochs", type=int, default=100, help="number of training epochs")
    group.add_argument("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    group.add_argument("--scale_lr", action="store_true", help="multiply it by accumulation x batch size x processes")
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    group.add_argument("--lr_warmup_steps", type=int, default=500, help="warm-up in optimizer steps")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer")
    group.add_argument("--use_8bit_adam", action="store_true", help="same as --optimizer adamw8bit")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW's beta 1")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's beta 2")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    scaled = "scale Adafactor's updates by the size of the weights"
    group.add_argument("--adafactor_scale_parameter", action="store_true", help=scaled)
    group.add_argument("--prodigy_d_coef", type=float, default=1.0, help="factor on Prodigy's step size estimate")
    group.add_argument("--prodigy_beta3", type=float, help="decay of that estimate (default: square root of beta 2)")
    yes_no = argparse.BooleanOptionalAction
    correction = "use Adam's bias correction in Prodigy"
    group.add_argument("--prodigy_use_bias_correction", action=yes_no, default=True, help=correction)
    safeguard = "ignore the warm-up in Prodigy's estimate"
    group.add_argument("--prodigy_safeguard_warmup", action=yes_no, default=True, help=safeguard)
    group.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="clip the gradient norm to this; 0: no clipping"
    )
    group.add_argument("--use_ema", action="store_true", help="average the weights (EMA) and publish the average")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="decay of the EMA; warms up as (1+n)/(10+n)")
    interval = "update the EMA after every N-th step, with the decay to the power of N"
    group.add_argument("--ema_update_interval", type=int, default=1, metavar="N", help=interval)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter (LoRA) instead of all weights")
    group.add_argument("--lora_rank", type=int, help="train an adapter of this rank, such as 16 (default: no adapter)")
    initial = (
        "go on training this LoRA or DoRA (folder, file or Hub id, any format that infer.py reads); it has its own "
        "rank, alpha and layers"
    )
    group.add_argument("--init_adapter", metavar="ADAPTER", help=initial)
    group.add_argument("--lora_alpha", type=float, help="scale of the adapter is alpha / rank (default: the rank)")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="dropout of the adapter's inputs")
    group.add_argument("--use_dora", action="store_true", help="use DoRA, weight-decomposed adaptation (2402.09353)")
    target = (
        "adapt the attention projections, or all linear and convolution layers; conv_in of a text-to-image base is "
        "always trained and saved with the adapter"
    )
    group.add_argument("--lora_target", choices=("attention", "all"), default="attention", help=target)
    group.add_argument(
        "--merge_adapter", action="store_true", help="publish the merged pipeline, not the adapter alone"
    )
    group.add_argument("--quantize_base", choices=("nf4", "int8"), help="quantize the frozen base to 4 or 8 bits")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision and memory")
    precision = "mixed precision (default: accelerate's setting)"
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help=precision)
    group.add_argument("--allow_tf32", action="store_true", help="use TF32 on Ampere and newer GPUs: the default")
    group.add_argument("--no_tf32", action="store_true", help="multiply float32 matrices exactly on those GPUs")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    blocks = "recompute only these blocks, such as down_blocks.0 up_blocks.3"
    group.add_argument("--gradient_checkpointing_blocks", nargs="+", metavar="BLOCK", help=blocks)
    compiled = "compile the UNet's blocks, which takes minutes; measure whether it helps (docs/performance.md)"
    group.add_argument("--compile", action="store_true", help=compiled)
    graphs = "replay recorded GPU work in place of starting each kernel (auto: without --gradient_checkpointing)"
    group.add_argument("--cuda_graphs", choices=("auto", "yes", "no"), default="auto", help=graphs)
    dtype = "dtype of the trained weights; bf16 halves their memory and rounds updates stochastically"
    group.add_argument("--weights_dtype", choices=("fp32", "bf16"), default="fp32", help=dtype)
    fused = "update each weight in the backward pass and free its gradient at once; needs --max_grad_norm 0"
    group.add_argument("--fused_backward", action="store_true", help=fused)
    group.add_argument("--ema_device", choices=("cpu",), help="keep the EMA in CPU memory")
    vae = "dtype of the VAE (default: fp32 for SDXL, whose VAE overflows in fp16; otherwise that of --mixed_precision)"
    group.add_argument("--vae_precision", choices=("fp32", "fp16", "bf16"), help=vae)
    xformers = "use xformers attention (PyTorch's own is as fast in current versions)"
    group.add_argument("--enable_xformers_memory_efficient_attention", action="store_true", help=xformers)


def _add_sdxl(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SDXL")
    crop = "{} of the crop in every row's time ids (default: the row's actual crop; diffusers uses 0)"
    group.add_argument("--crops_coords_top_left_h", type=int, help=crop.format("top"))
    group.add_argument("--crops_coords_top_left_w", type=int, help=crop.format("left"))


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    add_config_flag(parser, group)
    group.add_argument("--output_dir", default="instruct-pix2pix-model", help="output folder")
    profile = "write a trace of three steps here, after the first ten, and a table of their operations"
    group.add_argument("--profile", metavar="DIR", help=profile)
    group.add_argument("--seed", type=int, help="random seed (default: drawn and written to args.json)")
    group.add_argument("--dry_run", action="store_true", help="check everything and take one step, without saving")
    group.add_argument("--logging_dir", default="logs", help="folder of the tracker's files inside output_dir")
    group.add_argument("--logging_steps", type=int, default=10, help="log every this many optimizer steps")
    group.add_argument("--report_to", choices=TRACKERS, default="tensorboard", help="tracker to log to")
    project = "project of the tracker (default: WANDB_PROJECT, else instruct-pix2pix)"
    group.add_argument("--tracker_project_name", metavar="NAME", help=project)
    run = "name of the run in wandb (default: WANDB_NAME, else drawn by wandb)"
    group.add_argument("--tracker_run_name", metavar="NAME", help=run)
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # passed by old launchers


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    names, image = ("--val_image_url", "--val_image_url_or_path"), "validation image; repeatable, one for each prompt"
    group.add_argument(*names, action="append", metavar="URL_OR_PATH", help=image)
    group.add_argument("--validation_prompt", action="append", help="edit prompt for the validation image; repeatable")
    group.add_argument("--num_validation_images", type=int, default=4, help="edits of each validation image")
    group.add_argument("--validation_num_inference_steps", type=int, default=20, metavar="N", help="denoising steps")
    scale = "guidance scale of the instruction in validation images"
    group.add_argument("--validation_guidance_scale", type=float, default=7.0, metavar="S", help=scale)
    scale = "image guidance scale in validation images"
    group.add_argument("--validation_image_guidance_scale", type=float, default=1.5, metavar="S", help=scale)
    rescaled = "guidance rescale of the validation images, 0 to 1 (0.7 for zero terminal SNR)"
    group.add_argument("--validation_guidance_rescale", type=float, default=0.0, metavar="R", help=rescaled)
    negative = "negative prompt of the validation images"
    group.add_argument("--validation_negative_prompt", metavar="TEXT", help=negative)
    group.add_argument("--validation_epochs", type=int, help="validate every this many epochs (default: 1)")
    steps = "validate every this many optimizer steps instead (default of the SDXL script: 100)"
    group.add_argument("--validation_steps", type=int, help=steps)
    group.add_argument("--validation_split", type=float, default=0.0, help="share of the rows to hold out for a loss")
    samples = "at most so many held-out rows (default: 512); with --streaming, the number of its first rows to hold out"
    group.add_argument("--validation_samples", type=int, metavar="N", help=samples)
    best = "publish the weights with the best of this: held-out loss (the default), or a score of --eval_steps"
    group.add_argument("--save_best", nargs="?", const="loss", choices=BEST, help=best)
    edits = "edit held-out rows every this many steps, and log how close the edits are to their targets"
    group.add_argument("--eval_steps", type=int, metavar="N", help=edits)
    group.add_argument(
        "--eval_dataset", metavar="DATASET", help="rows of --eval_steps (default: of --validation_split)"
    )
    group.add_argument("--eval_split", default="train", metavar="SPLIT", help="split of --eval_dataset")
    group.add_argument("--eval_samples", type=int, default=16, metavar="N", help="number of rows of --eval_steps")


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    every = "save a checkpoint every this many optimizer steps"
    group.add_argument("--checkpointing_steps", type=int, default=500, help=every)
    group.add_argument("--checkpoints_total_limit", type=int, help="keep at most this many checkpoints")
    group.add_argument("--resume_from_checkpoint", help="'latest', a name such as checkpoint-500, or a path")
    changed = "settings that may differ from the checkpoint's, such as learning_rate adam_weight_decay"
    group.add_argument("--allow_changed", nargs="+", metavar="NAME", help=changed)


def _add_publishing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    group.add_argument("--hub_model_id", help="repository to upload to (default: the output folder's name)")
    dtype = "dtype of the published weights; 16 bits halve the files"
    group.add_argument("--publish_dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help=dtype)
    group.add_argument("--hub_private_repo", action="store_true", help="create a private repository")
    group.add_argument("--hub_token", help="access token; `hf auth login` or HF_TOKEN are safer")
