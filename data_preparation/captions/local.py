"""A language model on this machine, through transformers: batched generation with a separate seed for each answer."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from data_preparation.captions.backends import Answer, LocalModelOptions, UsageCounter
from data_preparation.captions.prompts import (
    STOP,
    Question,
    SamplingOptions,
    chat_messages,
    legacy_prompt,
    plain_prompt,
)
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import public_name
from utils.runtime import choose_device

NEXT_CAPTION = "\nCaption:"  # a base model continues with another caption after its answer


class LocalBackend:
    """A `Backend`."""

    def __init__(self, options: LocalModelOptions, sampling: SamplingOptions, rank: int = 0) -> None:
        self.usage, self._options = UsageCounter(), options
        self._tokenizer, self._model = load_language_model(options, rank)
        has_template = bool(self._tokenizer.chat_template)
        self._prompt_style = "legacy" if sampling.format == "legacy" else "chat" if has_template else "plain"
        self._stops = {"legacy": [STOP], "plain": [NEXT_CAPTION], "chat": []}[self._prompt_style]
        ends = self._model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id} - {None}
        revision = getattr(self._model.config, "_commit_hash", None) or options.revision
        self.model = {"id": public_name(options.model), "revision": revision}
        self.style = {"prompt": self._prompt_style}

    def answer(self, questions: Sequence[Question], sampling: SamplingOptions) -> list[Answer]:
        size = self._options.batch_size
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        return [answer for batch in batches for answer in self._answer_batch(batch, sampling)]

    def _answer_batch(self, questions: Sequence[Question], sampling: SamplingOptions) -> list[Answer]:
        encoded = self._tokenizer(
            [self._prompt(question, sampling.num_examples) for question in questions],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=self._prompt_style != "chat",  # the chat template has added them
        ).to(self._model.device)
        length = encoded["input_ids"].shape[1]
        context = getattr(self._model.config, "max_position_embeddings", None) or 10**9
        if length + sampling.max_tokens > context:
            raise InputError(
                f"--model {self._options.model} has a context of {context} tokens, but prompt and answer need "
                f"{length + sampling.max_tokens}: reduce --num_examples or --max_tokens"
            )
        config = GenerationConfig(  # the model's own may sample in its own way
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
            stop_strings=self._stops or None,
        )
        sampler = SeededSampler([question.seed for question in questions], length, sampling)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    generation_config=config,
                    logits_processor=LogitsProcessorList([sampler]),
                    tokenizer=self._tokenizer,  # for the stop strings
                )[:, length:]
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch_size {len(questions)}: out of memory; use a smaller one") from error
        prompt_lengths = encoded["attention_mask"].sum(1).tolist()
        return [self._decode(row, tokens_in) for row, tokens_in in zip(tokens.tolist(), prompt_lengths, strict=True)]

    def _prompt(self, question: Question, num_examples: int) -> str:
        if self._prompt_style == "legacy":
            return legacy_prompt(question.caption)
        if self._prompt_style == "plain":
            return plain_prompt(question, num_examples)
        messages = chat_messages(question, num_examples)
        render = self._tokenizer.apply_chat_template
        try:
            return render(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # Jinja's own types: some templates refuse the system role
            task, first, *rest = messages
            first = {"role": "user", "content": f"{task['content']}\n\n{first['content']}"}
            return render([first, *rest], tokenize=False, add_generation_prompt=True)

    def _decode(self, tokens: list[int], tokens_in: int) -> Answer:
        """The text up to the end-of-sequence token or a stop string. tokens_in: length of the prompt, to be counted."""
        count = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._tokenizer.decode(tokens[:count], skip_special_tokens=True)
        cuts = [text.index(stop) for stop in self._stops if stop in text]
        self.usage.add(tokens_in, count)
        return Answer(text[: min(cuts)] if cuts else text, is_finished=count < len(tokens) or bool(cuts))


class SeededSampler(LogitsProcessor):
    """Samples with one generator per row, by inverting the cumulative distribution: the argmax is the drawn token.

    Unlike transformers' sampling, whose single generator makes each row depend on the other rows of the batch.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, sampling: SamplingOptions) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._prompt_length, self._sampling = prompt_length, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (rows, tokens); scores: (rows, vocabulary) logits -> 0 for the drawn token, -inf for others."""
        sampling, scores = self._sampling, scores.float()
        if sampling.frequency_penalty:
            answer = input_ids[:, self._prompt_length :]
            counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
            scores = scores - sampling.frequency_penalty * counts
        if sampling.temperature == 0:
            return scores
        probs, order = (scores / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
        mass = probs.cumsum(-1)
        if sampling.top_p < 1:
            kept = mass - probs < sampling.top_p  # the first tokens that together have this share
            mass = torch.where(kept, mass, (probs * kept).sum(-1, keepdim=True))
        # One number per row from the CPU, whose generators give the same ones on every machine; the rest on the device.
        draws = torch.cat([torch.rand(1, generator=generator) for generator in self._generators])
        places = torch.searchsorted(mass, draws[:, None].to(scores.device) * mass[:, -1:])  # the first that reaches it
        chosen = order.gather(1, places)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def load_language_model(options: LocalModelOptions, rank: int) -> tuple:
    """(tokenizer, model on its device). Custom code of the model is not run. Raises InputError."""
    device, dtype = choose_device(options.device, options.dtype, rank=rank)
    if options.dtype is None and device.startswith("cuda") and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16  # fp16, the default for images, overflows in some language models
    transformers_logging.disable_progress_bar()  # the script's own bar counts captions
    advice = "give a folder or Hub id of a causal language model in transformers' format, or --base_url for a server"
    with explaining_load_errors(f"--model {options.model}", advice):
        tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
        model = AutoModelForCausalLM.from_pretrained(options.model, revision=options.revision, dtype=dtype)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval()
