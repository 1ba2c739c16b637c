"""The parser of a model's answers: what it accepts, what it rejects, and that no answer makes it fail."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_preparation.captions.prompts import (
    PARSERS,
    PROMPT_END,
    SEPARATOR,
    STOP,
    Question,
    Rejected,
    Triple,
    chat_messages,
    check_triple,
    comparable_text,
    draw_examples,
    parse_chat_answer,
    parse_legacy_answer,
    plain_prompt,
    read_examples,
)
from utils.checks.prompt_checks import MAX_TOKENS, estimate_tokens

BOAT = "a boat on a lake"
GOOD = Triple(BOAT, "make it winter", "a boat on a frozen lake")
ANSWER = json.dumps({"edit": GOOD.edit, "output": GOOD.output})
REASONS = {
    "empty",
    "no JSON",
    "cut off",
    "missing key",
    "not text",
    "output equal to caption",
    "edit too long",
    "output too long",
    "no delimiter",
}


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        f"```json\n{ANSWER}\n```",
        f"<think>first {{of all}}, hm</think>\n{ANSWER}",
        f"Sure! {ANSWER} I hope that helps.",
        json.dumps({"output": f" {GOOD.output}\n", "edit": "make  it\twinter", "why": 1}),
    ],
)
def test_json_is_found_in_an_answer(text):
    assert parse_chat_answer(BOAT, text) == GOOD


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"),
        ("make it winter", "no JSON"),
        ('{"edit": "make it', "no JSON"),
        ("[" * 100_000 + "{" * 100_000, "no JSON"),
        ('{"edit": ' + "9" * 5000 + "}", "no JSON"),
        ('{"edit": "make it winter"}', "missing key"),
        ('{"edit": "make it winter", "output": 3}', "not text"),
        ('{"edit": "make it winter", "output": "\\ud83d"}', "not text"),
        ('{"edit": "", "output": "a frozen lake"}', "empty"),
        ('{"edit": "...", "output": "a frozen lake"}', "empty"),
        ('{"edit": "keep it", "output": "A boat, on a LAKE."}', "output equal to caption"),
        (json.dumps({"edit": "very " * 31, "output": "x"}), "edit too long"),
        (json.dumps({"edit": "add wind", "output": "wind " * 76}), "output too long"),
    ],
)
def test_rejected_answers_have_a_reason(text, reason):
    assert parse_chat_answer(BOAT, text) == Rejected(reason)


def test_cut_answers():
    assert parse_chat_answer(BOAT, ANSWER[:-5], is_finished=False) == Rejected("cut off")
    assert parse_chat_answer(BOAT, ANSWER, is_finished=False) == GOOD  # both keys are complete
    assert parse_legacy_answer(BOAT, f"{GOOD.edit}{SEPARATOR}{GOOD.output}", is_finished=False) == Rejected("cut off")


def test_legacy_format_of_the_original():
    text = f"{GOOD.edit}{SEPARATOR}{GOOD.output}"
    assert (
        parse_legacy_answer(BOAT, text) == parse_legacy_answer(BOAT, f"{text}{STOP} and on", is_finished=False) == GOOD
    )
    assert (PROMPT_END, SEPARATOR, STOP) == ("\n##\n", "\n%%\n", "\nEND")
    for wrong in (GOOD.edit, f"{text}{SEPARATOR}more", f"{text}{PROMPT_END}", "a %% b"):
        assert parse_legacy_answer(BOAT, wrong) == Rejected("no delimiter")


def check_result(caption: str, result: Triple | Rejected) -> None:
    """The properties of every result."""
    if isinstance(result, Rejected):
        assert result.reason in REASONS
        return
    for text in result:
        assert text and text == " ".join(text.split()) and "\n" not in text
        text.encode()
    assert comparable_text(result.output) != comparable_text(caption)
    assert len(result.edit.split()) <= 30 and estimate_tokens(result.output) <= MAX_TOKENS
    assert check_triple(*result) == result  # accepted again


jsonlike = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["edit", "output", "x", ""]), inner),
    max_leaves=8,
)
texts = st.text(st.characters() | st.sampled_from(list('{}[]":,\\\n%#`<>END ')))
answers = st.one_of(
    texts,
    st.builds(json.dumps, jsonlike),
    st.builds(lambda edit, output: json.dumps({"edit": edit, "output": output}), texts, texts),
    st.builds(lambda edit, output: f"{edit}{SEPARATOR}{output}{STOP}", texts, texts),
    st.builds(lambda text, start, end: text[start:end], st.just(ANSWER), st.integers(0, 60), st.integers(0, 60)),
)


@settings(max_examples=500, deadline=None)
@given(caption=texts, answer=answers, is_finished=st.booleans(), name=st.sampled_from(sorted(PARSERS)))
def test_the_parser_accepts_any_text(caption, answer, is_finished, name):
    check_result(caption, PARSERS[name](caption, answer, is_finished))


@settings(max_examples=200, deadline=None)
@given(edit=texts, output=texts)
def test_both_formats_accept_the_same_triples(edit, output):
    """A triple parsed from JSON survives the legacy format, unless its output starts with the stop word."""
    triple = parse_chat_answer(BOAT, json.dumps({"edit": edit, "output": output}))
    if isinstance(triple, Triple) and not triple.output.startswith("END"):
        assert parse_legacy_answer(BOAT, f"{triple.edit}{SEPARATOR}{triple.output}{STOP}") == triple


def test_the_worked_examples_are_valid_and_varied():
    examples = read_examples()
    assert len(examples) >= 20
    assert all(check_triple(*example) == example for example in examples)
    for index in range(3):
        assert len({comparable_text(example[index]) for example in examples}) == len(examples)
    assert len({example.edit.split()[0].lower() for example in examples}) >= 15
    assert not any(word in example.edit.split() for example in examples for word in ("left", "right"))


def test_the_seed_draws_the_examples():
    assert draw_examples(1, 8) == draw_examples(1, 8) != draw_examples(2, 8)
    messages = chat_messages(Question(BOAT, 1), 3)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert messages[-1]["content"] == f"Caption: {BOAT}"
    examples = [parse_chat_answer(BOAT, message["content"]) for message in messages if message["role"] == "assistant"]
    assert all(isinstance(triple, Triple) for triple in examples)
    assert plain_prompt(Question(BOAT, 1), 0).count("Caption:") == 2  # at least one example
