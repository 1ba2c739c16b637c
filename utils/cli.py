"""The flags that the training scripts share, and the checks that need nothing but the flags.

Only this module, flag_checks.py and the scripts see `args`. Everything else takes plain values: `pick(args, Options)`
cuts the fields of a small dataclass out of `args`, so that a flag and the field it fills have one name.

The flags of diffusers' own InstructPix2Pix example keep their names, meanings and defaults; where a default of theirs
trains a wrong model, ours differs and the help text says so. Nothing heavy is imported here: `--help` and every error
in the flags answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from typing import NoReturn, TypeVar, get_type_hints

from utils.errors import InputError
from utils.training.flag_checks import find_problems

Options = TypeVar("Options")

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy", "schedulefree_adamw")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "all", "none")


def pick(args: argparse.Namespace, options_class: type[Options]) -> Options:
    """The fields of `options_class` that are flags, with their values; a field that is such a class is filled too.

    A field that is neither keeps its default.
    """
    values = {}
    for name, field_type in get_type_hints(options_class).items():
        if dataclasses.is_dataclass(field_type):
            values[name] = pick(args, field_type)
        elif hasattr(args, name):
            values[name] = getattr(args, name)
    return options_class(**values)


def parse_training_flags(argv: list[str] | None, description: str, family: str = "sd") -> argparse.Namespace:
    """Parse and check the flags of a training script; exits with 2 and one message when they cannot work.

    family: what the script trains, "sd", "sdxl" or "any". SDXL's own flags belong to the last two.
    """
    usage = "accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --dataset_name PAIRS [flags below]"
    parser = FlagParser(usage=usage, description=description, formatter_class=_Help, allow_abbrev=False)
    sections = (_add_model, _add_data, _add_objective, _add_optimization, _add_adapter, _add_precision, _add_run)
    for add in (*sections, _add_validation, _add_checkpoints, _add_publishing):
        add(parser)
    if family != "sd":
        _add_sdxl(parser)
    if family == "sdxl":
        parser.set_defaults(vae_precision="fp32")  # as diffusers' SDXL script
    args, unknown = parser.parse_known_args(argv)
    if args.validation_epochs is None and args.validation_steps is None and family == "sdxl":
        args.validation_steps = 100  # as diffusers' SDXL script
    problems = [*map(parser.describe_unknown, unknown), *find_problems(args)]
    if problems:
        parser.exit(2, f"error: {InputError.from_problems(problems)}\n")
    args.validation_epochs = args.validation_epochs or 1
    return args


class FlagParser(argparse.ArgumentParser):
    """Answers to a mistake with one message, and not with the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")

    def describe_unknown(self, word: str) -> str:
        """What to say of a word of the command line that no flag took, with the flag that it resembles."""
        name = word.partition("=")[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        similar = difflib.get_close_matches(name, flags, n=1)
        return f"{name} is not a flag" + (f": did you mean {similar[0]}?" if similar else " (see --help)")


class _Help(argparse.HelpFormatter):
    """Shows the default behind each flag that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_plain = action.default in (None, False, argparse.SUPPRESS) or "%(default)" in (action.help or "")
        return action.help or "" if is_plain else f"{action.help} (default: %(default)s)"


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="folder, Hub id or .safetensors file of the model to train",
    )
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--variant", help="variant of the weight files, such as fp16")
    group.add_argument("--non_ema_revision", help="revision to take the UNet alone from (its non-EMA weights)")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", help="folder or Hub id of another autoencoder, such as one made for fp16"
    )
    group.add_argument("--vae_revision", help="branch, tag or commit of that autoencoder")
    group.add_argument("--vae_variant", help="variant of its weight files")
    group.add_argument(
        "--single_file_config",
        help="with a model in one .safetensors file: folder or Hub id of a pipeline of the same family, for its "
        "configuration and tokenizers (default: found on the Hub)",
    )
    group.add_argument("--cache_dir", help="where downloaded models and datasets are kept")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id or folder of a dataset")
    group.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    group.add_argument(
        "--train_data_dir", help="folder of images with a metadata.jsonl or .csv naming two images a row"
    )
    group.add_argument("--train_mix", help="YAML file that lists several datasets with weights")
    group.add_argument("--dataset_split", default="train", help="split to train on")
    group.add_argument("--streaming", action="store_true", help="read the dataset as a stream, without storing it")
    column = "column of the {} (default: known for published datasets; unlike diffusers never guessed by position)"
    group.add_argument("--original_image_column", help=column.format("image before the edit"))
    group.add_argument("--edit_prompt_column", help=column.format("instruction"))
    group.add_argument("--edited_image_column", help=column.format("image after the edit"))
    group.add_argument("--max_train_samples", type=int, help="use at most so many rows")
    group.add_argument(
        "--max_bad_rows",
        type=float,
        default=0.01,
        help="unreadable rows are skipped; stop when more than this share of the rows (below 1) or this many are bad",
    )
    group.add_argument("--resolution", type=int, default=256, help="shorter side in pixels that images are brought to")
    group.add_argument(
        "--resize_mode",
        choices=("crop", "squash", "bucket"),
        default="crop",
        help="crop: shorter side to the resolution, then a square crop; squash: both sides (what diffusers does); "
        "bucket: keep the aspect ratio, batches by shape",
    )
    group.add_argument("--center_crop", action="store_true", help="crop the middle instead of a random place")
    group.add_argument(
        "--random_flip", action="store_true", help="mirror half of the pairs (never 'left'/'right' edits)"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that decode images")
    group.add_argument(
        "--cache_latents",
        action="store_true",
        help="encode every pair once before training and keep its latents in output_dir/latent-cache "
        "(needs --center_crop or --resize_mode squash: a cached latent has one crop)",
    )


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--conditioning_dropout_prob",
        type=float,
        default=0.05,
        help="share of samples without the prompt alone, without the image alone, and without both, each "
        "(the paper's 0.05; diffusers' default of none leaves guidance untrained)",
    )
    group.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), help="default: what the base predicts")
    group.add_argument("--snr_gamma", type=float, help="min-SNR weighting of the loss, 5.0 recommended (2303.09556)")
    group.add_argument(
        "--noise_offset", type=float, default=0.0, help="strength of noise added per channel, such as 0.05"
    )
    group.add_argument(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="rescale the noise schedule to zero terminal SNR (2305.08891), for very dark and bright edits; "
        "needs v_prediction",
    )


def _add_optimization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=16, help="samples per process and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    group.add_argument("--num_train_epochs", type=int, default=100, help="passes over the data")
    group.add_argument("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    group.add_argument("--scale_lr", action="store_true", help="multiply it by accumulation x batch size x processes")
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="course of the learning rate")
    group.add_argument("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="what updates the weights")
    group.add_argument("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW's beta 1")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's beta 2")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    group.add_argument(
        "--adafactor_scale_parameter", action="store_true", help="scale Adafactor's rate by the size of the weights"
    )
    group.add_argument("--prodigy_d_coef", type=float, default=1.0, help="factor on the rate that prodigy finds")
    group.add_argument("--prodigy_beta3", type=float, help="decay of that search (default: root of beta 2)")
    group.add_argument(
        "--prodigy_use_bias_correction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Adam's bias correction in prodigy",
    )
    group.add_argument(
        "--prodigy_safeguard_warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the warm-up out of prodigy's search",
    )
    group.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm to this; 0: not at all"
    )
    group.add_argument("--use_ema", action="store_true", help="keep a moving average of the weights and publish that")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="its decay, after a warm-up of (1+n)/(10+n)")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter (LoRA), in place of training all weights")
    group.add_argument("--lora_rank", type=int, help="train an adapter of this rank, such as 16 (default: none)")
    group.add_argument("--lora_alpha", type=float, help="its weight is alpha / rank (default: the rank)")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="share of the adapter's inputs dropped")
    group.add_argument("--use_dora", action="store_true", help="train magnitude and direction apart (2402.09353)")
    group.add_argument(
        "--lora_target",
        choices=("attention", "all"),
        default="attention",
        help="the layers: attention's projections, or every linear and convolution layer. The first convolution of a "
        "text-to-image base is trained too, and saved with the adapter",
    )
    group.add_argument("--merge_adapter", action="store_true", help="publish the whole editor, not the adapter alone")
    group.add_argument(
        "--quantize_base", choices=("nf4", "int8"), help="hold the frozen base's linear layers in 4 or 8 bits"
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision and memory")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer GPUs")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    group.add_argument(
        "--gradient_checkpointing_blocks",
        nargs="+",
        metavar="BLOCK",
        help="recompute those of some blocks alone, such as down_blocks.0 up_blocks.3: less memory for less time",
    )
    group.add_argument(
        "--weights_dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 halves weights and gradients; updates are rounded at random, so that small ones are not lost",
    )
    group.add_argument(
        "--fused_backward",
        action="store_true",
        help="update each weight during the backward pass and free its gradient at once; needs --max_grad_norm 0",
    )
    group.add_argument("--ema_device", choices=("cpu",), help="keep the moving average in main memory")
    group.add_argument(
        "--vae_precision",
        choices=("fp32", "fp16", "bf16"),
        help="default: fp32 for SDXL, whose own VAE runs over in fp16, and that of --mixed_precision else",
    )
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="attention by xformers (PyTorch's own is as good on current versions)",
    )


def _add_sdxl(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SDXL")
    text = "tell the UNet this {} of the crop for every row (default: where the row was cut; diffusers' 0 is untrue)"
    group.add_argument("--crops_coords_top_left_h", type=int, help=text.format("top"))
    group.add_argument("--crops_coords_top_left_w", type=int, help=text.format("left"))


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--output_dir", default="instruct-pix2pix-model", help="folder of the result")
    group.add_argument("--seed", type=int, help="seed of everything random (default: drawn, and kept in args.json)")
    group.add_argument("--dry_run", action="store_true", help="check everything, draw the first batches, take one step")
    group.add_argument("--logging_dir", default="logs", help="folder of the trackers' files, inside output_dir")
    group.add_argument("--logging_steps", type=int, default=10, help="optimizer steps between two log entries")
    group.add_argument("--report_to", choices=TRACKERS, default="tensorboard", help="where to log to")
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # launchers of old pass it


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--val_image_url",
        "--val_image_url_or_path",
        action="append",
        default=None,
        metavar="URL_OR_PATH",
        help="picture to edit for validation; may repeat, one for each --validation_prompt",
    )
    group.add_argument("--validation_prompt", action="append", default=None, help="instruction for it; may repeat")
    group.add_argument("--num_validation_images", type=int, default=4, help="edits of each picture")
    group.add_argument("--validation_epochs", type=int, help="epochs between two validations (default: 1)")
    group.add_argument(
        "--validation_steps",
        type=int,
        help="optimizer steps between two validations, instead of epochs (SDXL's script: default 100)",
    )
    group.add_argument("--validation_split", type=float, default=0.0, help="share of the rows kept out for a loss")
    group.add_argument("--save_best", action="store_true", help="publish the weights with the best held-out loss")


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="optimizer steps between two checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep at most so many")
    group.add_argument("--resume_from_checkpoint", help="'latest', a name such as checkpoint-500, or a path")


def _add_publishing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    group.add_argument("--hub_model_id", help="repository to upload to (default: the output folder's name)")
    group.add_argument("--hub_private_repo", action="store_true", help="create it as a private repository")
    group.add_argument("--hub_token", help="better: `hf auth login` or HF_TOKEN, which leave no trace in the shell")
