"""Checks of the training flags that need nothing but their values."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from utils.editing.settings import LIMITS, find_setting_problems

MAY_BE_ZERO = (
    "dataloader_num_workers",
    "lr_warmup_steps",
    "seed",
    "crops_coords_top_left_h",
    "crops_coords_top_left_w",
)
NOT_NEGATIVE = ("learning_rate", "noise_offset", "adam_epsilon", "adam_weight_decay", "max_bad_rows", "max_grad_norm")


def find_flag_problems(args: argparse.Namespace) -> list[str]:
    """Values that are out of range and flags that exclude each other; one sentence each."""
    return [
        *_out_of_range(args),
        *_data_conflicts(args),
        *_validation_conflicts(args),
        *_model_conflicts(args),
        *_output_dir_conflicts(args),
    ]


def _out_of_range(args: argparse.Namespace) -> Iterator[str]:
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):  # an empty path would be the current folder
            yield f"--{name} is empty; give a value, or drop the flag"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"--{name} is {value}; it must be a finite number"
        elif isinstance(value, float) and name in NOT_NEGATIVE and value < 0:
            yield f"--{name} is {value}; it must be at least 0"
        elif isinstance(value, int) and not isinstance(value, bool) and name not in ("resolution", "local_rank"):
            minimum = 0 if name in MAY_BE_ZERO else 1
            if value < minimum:
                yield f"--{name} is {value}; it must be at least {minimum}"
    if args.seed is not None and args.seed >= 2**63:
        yield f"--seed is {args.seed}; it must be between 0 and 2**63 - 1"
    if args.resolution < 16 or args.resolution % 8:
        yield f"--resolution is {args.resolution}; it must be a multiple of 8, at least 16"
    for name, maximum in {"conditioning_dropout_prob": 1 / 3, "validation_split": 0.9, "ema_decay": 1.0}.items():
        if not 0 <= getattr(args, name) <= maximum:
            yield f"--{name} is {getattr(args, name)}; it must be between 0 and {maximum:.3g}"
    for name in ("snr_gamma", "lora_alpha"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            yield f"--{name} is {getattr(args, name)}; it must be above 0"
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            yield f"--{name} is {getattr(args, name)}; it must be at least 0 and below 1"


def _data_conflicts(args: argparse.Namespace) -> Iterator[str]:
    given = [f"--{n}" for n in ("dataset_name", "train_data_dir", "train_mix") if getattr(args, n) is not None]
    if len(given) != 1:
        yield (
            "give exactly one of --dataset_name, --train_data_dir and --train_mix"
            + (f" (given: {', '.join(given)})" if given else " (none was given)")
        )
    if args.streaming and args.train_mix:
        yield "--streaming does not work with --train_mix; drop one of them"
    if args.streaming and not args.max_train_steps:
        yield "--streaming needs --max_train_steps, because the length of a stream is unknown"
    if args.streaming and args.resize_mode == "bucket":
        yield "--resize_mode bucket needs the size of every image in advance; drop --streaming"
    if args.streaming and args.cache_latents:
        yield "--cache_latents needs a dataset of known length; drop --streaming"
    if args.streaming and args.validation_split:
        yield "--validation_split needs a dataset of known length; give --validation_samples N for its first N rows"
    if args.validation_samples and not (args.validation_split or args.streaming):
        yield "--validation_samples limits --validation_split and the held-out rows of --streaming; give one of them"
    has_fixed_crop = args.center_crop or args.resize_mode == "squash"
    if args.cache_latents and not has_fixed_crop and args.cache_crops == 1:
        yield (
            "--cache_latents keeps fixed crops: give --center_crop, --cache_crops N for N random crops of each pair, "
            "or --resize_mode squash too"
        )
    if args.cache_crops > 1 and (has_fixed_crop or not args.cache_latents):
        yield (
            "--cache_crops keeps random crops in the cache of --cache_latents: give that flag, and drop --center_crop "
            "or --resize_mode squash"
        )
    if args.train_mix and (args.original_image_column or args.edit_prompt_column or args.edited_image_column):
        yield "--train_mix names the columns of each dataset in the YAML file; drop the column flags"


def _validation_conflicts(args: argparse.Namespace) -> Iterator[str]:
    if args.save_best == "loss" and not (args.validation_split or args.validation_samples):
        yield "--save_best compares held-out losses; give --validation_split too, such as 0.02"
    if args.save_best not in (None, "loss") and not args.eval_steps:
        yield f"--save_best {args.save_best} is a score of --eval_steps; give it too, such as 500"
    if args.eval_steps and not args.eval_dataset and (args.streaming or not args.validation_split):
        yield "--eval_steps needs rows that are not trained on; give --eval_dataset, or --validation_split such as 0.02"
    if args.eval_dataset and not args.eval_steps:
        yield "--eval_dataset has the rows of --eval_steps; give it too, such as 500"
    if args.validation_epochs and args.validation_steps:
        yield "--validation_epochs and --validation_steps exclude each other; give one of them"
    names = ("guidance_scale", "image_guidance_scale", "guidance_rescale", "negative_prompt")
    values = {name: getattr(args, f"validation_{name}") for name in names}
    yield from find_setting_problems(values, prefix="--validation_")
    if args.validation_num_inference_steps > LIMITS["steps"][1]:
        yield (
            f"--validation_num_inference_steps is {args.validation_num_inference_steps}; "
            f"it must be at most {LIMITS['steps'][1]}"
        )
    images, prompts = args.val_image_url or [], args.validation_prompt or []
    if bool(images) != bool(prompts):
        yield "--val_image_url and --validation_prompt need each other; give both or neither"
    elif images and len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        yield (
            f"--val_image_url is given {len(images)} times and --validation_prompt {len(prompts)} times; "
            "give as many of each, or one of either"
        )


def _model_conflicts(args: argparse.Namespace) -> Iterator[str]:
    names = ("lora_alpha", "lora_dropout", "use_dora", "merge_adapter", "quantize_base")
    given = [f"--{name}" for name in names if getattr(args, name)]
    given += ["--lora_target"] if args.lora_target != "attention" else []
    is_adapter = args.lora_rank is not None or args.init_adapter is not None
    if not is_adapter and given:
        yield f"{', '.join(given)} only works for adapters; give --lora_rank too, such as 16"
    own = [f"--{name}" for name in ("lora_rank", "lora_alpha", "use_dora") if getattr(args, name)]
    own += ["--lora_target"] if args.lora_target != "attention" else []
    if args.init_adapter and own:
        yield f"--init_adapter {args.init_adapter} has its own rank, alpha, kind and layers; drop {', '.join(own)}"
    changes = [f"--{name}" for name in ("prediction_type", "rescale_betas_zero_snr") if getattr(args, name)]
    if is_adapter and changes and not args.merge_adapter:
        yield (
            f"{' and '.join(changes)} changes the scheduler, which an adapter does not contain; give --merge_adapter "
            "too, which publishes the whole pipeline"
        )
    ema = [
        flag
        for flag, given in (("--ema_device", args.ema_device), ("--ema_update_interval", args.ema_update_interval > 1))
        if given
    ]
    if ema and not args.use_ema:
        yield f"{' and '.join(ema)} needs --use_ema; give both or neither"
    if (args.vae_revision or args.vae_variant) and not args.pretrained_vae_model_name_or_path:
        yield "--vae_revision and --vae_variant need --pretrained_vae_model_name_or_path; give it too"
    if args.gradient_checkpointing and args.gradient_checkpointing_blocks:
        yield "--gradient_checkpointing recomputes all blocks; drop it or --gradient_checkpointing_blocks"
    if args.auto_batch_size and args.fused_backward:
        yield "--auto_batch_size tries a backward pass, in which --fused_backward changes weights; drop one of them"
    if args.compile and args.resize_mode == "bucket":
        yield "--compile compiles for one shape, and --resize_mode bucket has many; drop one of them"
    if args.single_file_config and not args.pretrained_model_name_or_path.endswith((".safetensors", ".ckpt")):
        yield "--single_file_config needs a model in one .safetensors or .ckpt file; drop it"


def _output_dir_conflicts(args: argparse.Namespace) -> Iterator[str]:
    output_dir = Path(args.output_dir)
    if any(path.is_file() for path in (output_dir, *output_dir.parents)):
        yield f"--output_dir {output_dir} is a file or inside one; name a folder"
    for name in ("pretrained_model_name_or_path", "dataset_name", "train_data_dir"):
        folder = getattr(args, name)
        if folder and Path(folder).is_dir() and output_dir.resolve() == Path(folder).resolve():
            yield f"--output_dir is the folder of --{name} and would be overwritten; name another folder"
