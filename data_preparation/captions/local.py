"""A language model on this machine, through transformers: asked in batches, with a seed for each answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from data_preparation.captions.backend import Answer, LocalModel, Usage
from data_preparation.captions.prompts import Ask, Sampling, chat_messages, legacy_prompt, plain_prompt
from utils.errors import InputError
from utils.runtime import choose_device

NEXT_CAPTION = "\nCaption:"  # with which a model that only continues texts goes on after its answer
TAIL = 12  # last tokens among which the stop words are looked for


class LoadedModel:
    """A `Backend`."""

    def __init__(self, local: LocalModel, sampling: Sampling, rank: int = 0) -> None:
        self.usage, self._local, self._sampling = Usage(), local, sampling
        self._tokenizer, self._model = load(local, rank)
        has_roles = bool(self._tokenizer.chat_template)
        self._style = "legacy" if sampling.format == "legacy" else "chat" if has_roles else "plain"
        self._stops = [NEXT_CAPTION] if self._style == "plain" else sampling.stop
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        # Not the model's own, which may sample, and in its own way.
        self._config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        revision = getattr(self._model.config, "_commit_hash", None) or local.revision
        self.model = {"id": public_name(local.model), "revision": revision}
        self.style = {"prompt": self._style}

    def with_sampling(self, sampling: Sampling) -> LoadedModel:
        """The same model, asked in another way; of the same format."""
        other = copy.copy(self)
        other._sampling, other._config = sampling, copy.deepcopy(self._config)
        other._config.max_new_tokens = sampling.max_tokens
        return other

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        size = self._local.batch_size
        return [answer for start in range(0, len(asks), size) for answer in self._batch(asks[start : start + size])]

    def _batch(self, asks: Sequence[Ask]) -> list[Answer]:
        encoded = self._tokenizer(
            [self._prompt(ask) for ask in asks],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=self._style != "chat",  # a chat template has written them already
        ).to(self._model.device)
        length = encoded["input_ids"].shape[1]
        room = getattr(self._model.config, "max_position_embeddings", None) or 10**9
        if length + self._sampling.max_tokens > room:
            raise InputError(
                f"--model {self._local.model} reads {room} tokens, and examples, caption and answer take "
                f"{length + self._sampling.max_tokens}: give fewer --num_examples or --max_tokens"
            )
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    generation_config=self._config,
                    logits_processor=LogitsProcessorList([Draw([ask.seed for ask in asks], length, self._sampling)]),
                    stopping_criteria=StoppingCriteriaList([StopWords(self._tokenizer, self._stops, length)]),
                )[:, length:]
        except torch.OutOfMemoryError as error:
            raise InputError(f"the memory is too small for --batch_size {len(asks)}: give a smaller one") from error
        inside = encoded["attention_mask"].sum(1).tolist()
        return [self._read(answer, tokens_in) for answer, tokens_in in zip(tokens.tolist(), inside, strict=True)]

    def _prompt(self, ask: Ask) -> str:
        if self._style == "legacy":
            return legacy_prompt(ask)
        if self._style == "plain":
            return plain_prompt(ask, self._sampling.num_examples)
        messages = chat_messages(ask, self._sampling.num_examples)
        render = self._tokenizer.apply_chat_template
        try:
            return render(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # Jinja's own: some templates know no system role
            task, first, *rest = messages
            first = {"role": "user", "content": f"{task['content']}\n\n{first['content']}"}
            return render([first, *rest], tokenize=False, add_generation_prompt=True)

    def _read(self, tokens: list[int], tokens_in: int) -> Answer:
        """The text up to the end that the model has set, or to a stop word."""
        count = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._tokenizer.decode(tokens[:count], skip_special_tokens=True)
        cuts = [text.index(stop) for stop in self._stops if stop in text]
        self.usage.add(tokens_in, count)
        return Answer(text[: min(cuts)] if cuts else text, is_finished=count < len(tokens) or bool(cuts))


class Draw(LogitsProcessor):
    """Sampling with a generator for each row: adds Gumbel noise, so that the largest logit is a draw from softmax.

    Unlike transformers' own sampling, whose one generator makes a row depend on the rows beside it in the batch.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, sampling: Sampling) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._prompt_length, self._sampling = prompt_length, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (rows, tokens); scores: (rows, vocabulary) logits -> the same with noise."""
        sampling, scores = self._sampling, scores.float()
        if sampling.frequency_penalty:
            said = input_ids[:, self._prompt_length :]
            counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
            scores = scores - sampling.frequency_penalty * counts
        if sampling.temperature == 0:
            return scores
        scores = scores / sampling.temperature
        if sampling.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            shares = ordered.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= sampling.top_p  # what comes before a token is enough
            scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        # On the CPU, whose generators give the same on every machine.
        draws = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self._generators])
        return scores - torch.log(-torch.log(draws.clamp(1e-20, 1 - 1e-7))).to(scores.device)


class StopWords(StoppingCriteria):
    """Ends each row when one of the words stands among its last tokens."""

    def __init__(self, tokenizer: object, words: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._words, self._prompt_length = tokenizer, words, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        start = max(self._prompt_length, input_ids.shape[1] - TAIL)
        tails = self._tokenizer.batch_decode(input_ids[:, start:]) if self._words else [""] * len(input_ids)
        found = [any(word in tail for word in self._words) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def load(local: LocalModel, rank: int) -> tuple:
    """(tokenizer, model on its device). Raises InputError; code that comes with a model is not run."""
    device, dtype = choose_device(_share_out(local.device, rank), local.dtype)
    if local.dtype is None and device.startswith("cuda") and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16  # fp16, the default for images, overflows in some language models
    transformers_logging.disable_progress_bar()  # ours counts captions
    try:
        tokenizer = AutoTokenizer.from_pretrained(local.model, revision=local.revision)
        model = AutoModelForCausalLM.from_pretrained(local.model, revision=local.revision, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"--model {local.model} cannot be loaded as a language model: {reason}. Give a folder or a Hub id of a "
            "causal language model in transformers' format, or --base_url for a server"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval()


def public_name(model: str) -> str:
    """A Hub id as it is; of a folder the last part alone, as the rest is the user's own."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _share_out(device: str, rank: int) -> str:
    if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return f"cuda:{rank % torch.cuda.device_count()}"
    return device
