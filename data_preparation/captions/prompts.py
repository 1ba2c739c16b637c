"""What a language model is asked.

Instructions and worked examples for one that takes instructions; the caption alone for one that was fine-tuned on such
triples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_preparation.captions.triples import PROMPT_END, STOP, Triple

EXAMPLES = Path(__file__).with_name("examples.jsonl")
TASK = (
    "You write training data for a model that edits pictures by instruction. For each caption of a picture, invent one "
    "change that can be seen and say it as a short instruction (edit), in the way of someone who talks to a picture "
    "editor; then give the caption of the changed picture (output). Keep in the output whatever the edit does not "
    "concern, the style and the medium too. Vary: replace, add or remove a thing, change a material, colour, age, "
    "season, weather, time of day, place, mood or artistic style. Be inventive, but let the edit fit the picture. Name "
    "neither left nor right. The edit has at most 12 words. Answer with one JSON object with the keys edit and output, "
    "and nothing else."
)
SCHEMA = {
    "type": "object",
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
    "required": ["edit", "output"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Sampling:
    """How a model is asked. The fields are flags and decide the triples.

    format: chat (a JSON object is asked for) or legacy (the original's delimiters); num_examples: worked examples shown
    with each caption, drawn by the seed.
    """

    format: str = "chat"
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256
    frequency_penalty: float = 0.1
    num_examples: int = 8

    @property
    def stop(self) -> list[str]:
        return [STOP] if self.format == "legacy" else []


@dataclass(frozen=True)
class Ask:
    """One question to a model. seed: 0 to 2**31 - 1, of the sampling and of the drawn examples."""

    caption: str
    seed: int


@cache
def read_examples() -> tuple[Triple, ...]:
    """The worked examples, written by us."""
    return tuple(Triple(**json.loads(line)) for line in EXAMPLES.read_text(encoding="utf-8").splitlines())


def digest_prompts() -> str:
    """Changes with the words of the task and with the examples."""
    words = json.dumps([TASK, read_examples()], ensure_ascii=False)
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


def draw_examples(seed: int, count: int) -> list[Triple]:
    """Other examples in another order for each seed: a model repeats what it is shown, and so repeats itself less."""
    from data_preparation.photographs import seeded_rng

    examples = read_examples()
    return [examples[index] for index in seeded_rng(seed, 0).permutation(len(examples))[:count]]


def chat_messages(ask: Ask, num_examples: int) -> list[dict[str, str]]:
    """For a model with roles: the task, the examples as turns that have been, and the caption."""
    messages = [{"role": "system", "content": TASK}]
    for example in draw_examples(ask.seed, num_examples):
        messages += [
            {"role": "user", "content": f"Caption: {example.caption}"},
            {"role": "assistant", "content": _answer(example)},
        ]
    return [*messages, {"role": "user", "content": f"Caption: {ask.caption}"}]


def plain_prompt(ask: Ask, num_examples: int) -> str:
    """The same for a model that only continues a text. Its answer ends where the next caption begins."""
    examples = draw_examples(ask.seed, max(num_examples, 1))  # without any it could not know what to do
    shown = "".join(f"Caption: {example.caption}\nAnswer: {_answer(example)}\n\n" for example in examples)
    return f"{TASK}\n\n{shown}Caption: {ask.caption}\nAnswer:"


def legacy_prompt(ask: Ask) -> str:
    return f"{ask.caption}{PROMPT_END}"


def _answer(example: Triple) -> str:
    return json.dumps({"edit": example.edit, "output": example.output}, ensure_ascii=False)
