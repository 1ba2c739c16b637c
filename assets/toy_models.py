"""The models of the toy Stable Diffusion: the classes of the real one, very small."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 64
# CLIP has 77. Seventy tokens of padding would hide the five of the caption from a model with so little training.
MAX_TOKENS = 24


def make_tokenizer(texts: list[str], output: Path) -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer in CLIP's format on `texts` and save it in `output`."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(output)
    # The older format too: not every program reads tokenizer.json.
    (output / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (output / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return tokenizer


def make_vae() -> AutoencoderKL:
    """0.4M parameters. 64 pixels become latents 4 x 32 x 32: a factor of 2 keeps reconstructions sharp."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Unlike CLIP's 0.02: with such small embeddings all prompts are alike, and the UNet learns to ignore them.
    text_encoder.get_input_embeddings().weight.data.mul_(50)
    return text_encoder


def make_unet() -> UNet2DConditionModel:
    """About 2M parameters, with cross-attention at 8 x 8 only, where it is cheap.

    The pooled text is added to the time embedding, which scales and shifts every residual block: with cross-attention
    alone, so small a model learned to ignore the text in edits of the tone.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def make_scheduler() -> DDIMScheduler:
    """v prediction with zero terminal SNR: without it a model of this size does not learn to darken whole images.

    steps_offset has no effect with trailing spacing; it is 1 because stock pipelines warn about other values.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
