"""What can be said of the flags of a training script before anything is looked at or imported."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def find_problems(args: argparse.Namespace) -> list[str]:
    """What cannot work, judged by the flags alone; one sentence each."""
    return [*_find_out_of_range(args), *_find_conflicts(args)]


def _find_out_of_range(args: argparse.Namespace) -> list[str]:
    at_least = {
        1: (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "logging_steps",
            "max_train_samples",
            "num_validation_images",
            "validation_epochs",
            "validation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "lora_rank",
        ),
        0: (
            "learning_rate",
            "lr_warmup_steps",
            "dataloader_num_workers",
            "noise_offset",
            "seed",
            "adam_epsilon",
            "adam_weight_decay",
            "max_bad_rows",
            "max_grad_norm",
            "crops_coords_top_left_h",
            "crops_coords_top_left_w",
        ),
    }
    problems = [f"--{name} is empty: give a value, or leave the flag out" for name in _find_empty(args)]
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} is {value}, and it must be a finite number")
    for lowest, names in at_least.items():
        for name in names:
            value = getattr(args, name, None)
            if value is not None and value < lowest:
                problems.append(f"--{name} is {value}, and the lowest allowed is {lowest}")
    if args.seed is not None and args.seed >= 2**63:
        problems.append(f"--seed is {args.seed}, and it must lie between 0 and 2**63 - 1")
    if args.resolution < 16 or args.resolution % 8:
        problems.append(f"--resolution is {args.resolution}, and it must be a multiple of 8, 16 at least")
    shares = {"conditioning_dropout_prob": 1 / 3, "validation_split": 0.9, "ema_decay": 1.0}
    for name, highest in shares.items():
        if not 0 <= getattr(args, name) <= highest:
            problems.append(f"--{name} is {getattr(args, name)}, and it must lie between 0 and {highest:.3g}")
    for name in ("snr_gamma", "lora_alpha"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            problems.append(f"--{name} is {getattr(args, name)}, and it must be above 0")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            problems.append(f"--{name} is {getattr(args, name)}, and it must lie between 0 and 1 (1 excluded)")
    return problems


def _find_empty(args: argparse.Namespace) -> list[str]:
    """Flags given without a value, as in `--output_dir=$UNSET`: an empty path would be the current folder."""
    return [name for name, value in vars(args).items() if value == "" or (isinstance(value, list) and "" in value)]


def _find_conflicts(args: argparse.Namespace) -> list[str]:
    problems = []
    given = [f"--{n}" for n in ("dataset_name", "train_data_dir", "train_mix") if getattr(args, n) is not None]
    if len(given) != 1:
        problems.append(
            "give the training data by exactly one of --dataset_name, --train_data_dir and --train_mix"
            + (f" (given: {', '.join(given)})" if given else "")
        )
    if args.streaming and args.train_mix:
        problems.append("--train_mix cannot be combined with --streaming")
    if args.streaming and not args.max_train_steps:
        problems.append("--streaming needs --max_train_steps, because a stream does not tell its length")
    if args.streaming and args.resize_mode == "bucket":
        problems.append("--resize_mode bucket needs the size of every image beforehand: drop --streaming")
    if args.streaming and (args.validation_split or args.cache_latents):
        problems.append("--validation_split and --cache_latents need a dataset with a length: drop --streaming")
    if args.save_best and not args.validation_split:
        problems.append("--save_best picks by the held-out loss: give --validation_split too, such as 0.02")
    if args.cache_latents and (args.resize_mode == "bucket" or not (args.center_crop or args.resize_mode == "squash")):
        problems.append("--cache_latents needs --center_crop or --resize_mode squash: a cached latent has one crop")
    if args.train_mix and (args.original_image_column or args.edit_prompt_column or args.edited_image_column):
        problems.append("with --train_mix the columns stand in the YAML file, for each dataset its own")
    problems += _find_validation_conflicts(args)
    problems += _find_adapter_conflicts(args)
    output_dir = Path(args.output_dir)
    if any(place.is_file() for place in (output_dir, *output_dir.parents)):
        problems.append(f"--output_dir {output_dir} is a file, or lies below one: name a folder")
    for name in ("pretrained_model_name_or_path", "dataset_name", "train_data_dir"):
        folder = getattr(args, name)
        if folder and Path(folder).is_dir() and output_dir.resolve() == Path(folder).resolve():
            problems.append(f"--output_dir is the folder of --{name}, which would be written over: name another folder")
    return problems


def _find_validation_conflicts(args: argparse.Namespace) -> list[str]:
    if args.validation_epochs and args.validation_steps:
        return ["--validation_epochs and --validation_steps both say when to validate: give one of them"]
    images, prompts = args.val_image_url or [], args.validation_prompt or []
    if bool(images) != bool(prompts):
        return ["--val_image_url and --validation_prompt belong together: give both, or neither"]
    if images and len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        return [
            f"{len(images)} --val_image_url and {len(prompts)} --validation_prompt do not pair up: "
            "give as many of each, or one of either"
        ]
    return []


def _find_adapter_conflicts(args: argparse.Namespace) -> list[str]:
    problems = []
    given = ("lora_alpha", "lora_dropout", "use_dora", "merge_adapter", "quantize_base")
    given = [f"--{name}" for name in given if getattr(args, name)]
    given += ["--lora_target"] if args.lora_target != "attention" else []
    if args.lora_rank is None and given:
        problems.append(f"{', '.join(given)}: this concerns adapters, so give --lora_rank too, such as 16")
    changes = [f"--{name}" for name in ("prediction_type", "rescale_betas_zero_snr") if getattr(args, name)]
    if args.lora_rank is not None and changes and not args.merge_adapter:
        problems.append(
            f"{' and '.join(changes)}: another scheduler than the base's is needed then, and an adapter carries none: "
            "give --merge_adapter too"
        )
    if args.ema_device and not args.use_ema:
        problems.append("--ema_device says where the moving average is kept: give --use_ema too")
    if (args.vae_revision or args.vae_variant) and not args.pretrained_vae_model_name_or_path:
        problems.append("--vae_revision and --vae_variant belong to --pretrained_vae_model_name_or_path: give it too")
    if args.gradient_checkpointing and args.gradient_checkpointing_blocks:
        problems.append("--gradient_checkpointing recomputes all blocks: drop it or --gradient_checkpointing_blocks")
    if args.single_file_config and not args.pretrained_model_name_or_path.endswith(".safetensors"):
        problems.append("--single_file_config belongs to a model in one .safetensors file: drop it")
    return problems
