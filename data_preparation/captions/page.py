"""The web page of prompt_app.py: candidates of edits for a caption."""

import difflib
import html
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from data_preparation.captions.backends import Backend, ask_model
from data_preparation.captions.model_flags import LIMITS, Moderator
from data_preparation.captions.prompts import (
    NUM_SEEDS,
    Question,
    Rejected,
    SamplingOptions,
    Triple,
    clean_text,
    read_examples,
)
from utils.errors import InputError
from utils.web.page_text import CSS as PAGE_CSS
from utils.web.page_text import error_html, status_html

Candidate = Triple | Rejected
MAX_CANDIDATES, MAX_CAPTION = 16, 1000
SAMPLING_FIELDS = ("temperature", "top_p", "num_examples")  # that the page can change
TITLE = "Captions to edits"
INTRODUCTION = f"""# {TITLE}
Write the caption of an image and press **Enter**: the language model invents edits, and the caption after each edit."""
CANDIDATES_CSS = Path(__file__).with_name("candidates.css").read_text("utf-8")
LAUNCH_OPTIONS = dict(  # system fonts, because Gradio's own would be loaded from another server
    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    css=PAGE_CSS + CANDIDATES_CSS,
    footer_links=[],
    run_history=False,
    ssr_mode=False,
)


class CandidateService:
    """Generates and checks the candidates of one request of the page."""

    def __init__(self, backend: Backend, sampling: SamplingOptions, moderator: Moderator) -> None:
        self._backend, self.sampling, self._moderator = backend, sampling, moderator

    def generate(self, caption: str, count: int, seed: int, **changes: float) -> tuple[list[Candidate], list[Question]]:
        """The candidates and their questions. changes: of the sampling. Raises InputError with a message to show."""
        caption = check_caption_request(caption, count, seed, changes)
        if self._moderator([caption])[0]:
            raise InputError("The moderation of this page refuses the caption.")
        questions = [Question(caption, (seed + number) % NUM_SEEDS) for number in range(count)]
        candidates = ask_model(self._backend, questions, replace(self.sampling, **changes))
        texts = [f"{each.edit}\n{each.output}" if isinstance(each, Triple) else "" for each in candidates]
        pairs = zip(candidates, self._moderator(texts), strict=True)
        return [Rejected("refused by moderation") if is_refused else each for each, is_refused in pairs], questions


def check_caption_request(caption: str, count: int, seed: int, changes: dict[str, float]) -> str:
    """The caption in one line. Raises one InputError with all problems."""
    try:
        caption = clean_text(caption or "")
    except UnicodeError:
        caption = ""
    problems = [] if caption else ['The caption is empty: write one, such as "a boat on a lake".']
    if len(caption) > MAX_CAPTION:
        problems.append(f"The caption has {len(caption)} characters; at most {MAX_CAPTION} are allowed.")
    limits = {"candidates": (count, 1, MAX_CANDIDATES), "seed": (seed, 0, NUM_SEEDS - 1)}
    limits |= {name: (value, *LIMITS[name]) for name, value in changes.items()}
    for name, (value, lowest, highest) in limits.items():
        if not isinstance(value, (int, float)) or not lowest <= value <= highest:
            problems.append(f"{name} {value}: must be from {lowest} to {highest}.")
    if problems:
        raise InputError.from_problems(problems)
    return caption


def render_candidates(candidates: list[Candidate], questions: list[Question]) -> str:
    """Candidates as HTML. Words of the output that are not in the caption are marked."""
    cards = []
    for candidate, question in zip(candidates, questions, strict=True):
        seed = f'<p class="seed">seed {question.seed}</p>'
        if isinstance(candidate, Rejected):
            reason = html.escape(f"{candidate.reason} {candidate.detail}")
            cards.append(f'<div class="candidate rejected"><p>rejected: {reason}</p>{seed}</div>')
        else:
            edit, output = html.escape(candidate.edit), mark_changes(candidate.caption, candidate.output)
            cards.append(f'<div class="candidate"><p class="edit">{edit}</p><p>{output}</p>{seed}</div>')
    return "".join(cards)


def mark_changes(before: str, after: str) -> str:
    """`after` as HTML, with <mark> around the words that `before` does not have."""
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = html.escape(" ".join(new[start:end]))
        if words:
            parts.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return " ".join(parts)


def make_page(service: CandidateService, model: str, concurrency: int) -> gr.Blocks:
    """The page. model: name to display; concurrency: requests that run at a time, the others wait in Gradio's queue."""
    parts: dict[str, Any] = {}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION, elem_id="title")
        with gr.Row(elem_id="columns"):  # a CSS grid: two columns, or on narrow screens one in this order
            with gr.Column(elem_id="request", min_width=0):
                box = dict(lines=1, max_lines=1, placeholder="a boat on a lake", elem_id="caption")
                parts["caption"] = gr.Textbox(label="Caption", **box)
                parts["run"] = gr.Button("Invent edits", variant="primary", elem_id="run")
            with gr.Column(elem_id="result", min_width=0):
                parts["status"] = gr.HTML(status_html("The candidates appear here."), elem_id="status", padding=False)
                parts["cards"] = gr.HTML(elem_id="cards", padding=False)
                box = dict(interactive=False, lines=2, max_lines=8, buttons=["copy"], elem_id="lines")
                parts["lines"] = gr.Textbox(label="As JSON lines", **box)
            with gr.Column(elem_id="settings", min_width=0):
                _add_settings(parts, service.sampling, model)
        _connect(parts, service, model, concurrency)
    return blocks


def _add_settings(parts: dict[str, Any], sampling: SamplingOptions, model: str) -> None:
    gr.Examples([[example.caption] for example in read_examples()[:5]], parts["caption"], label="Examples")
    parts["count"] = gr.Slider(1, MAX_CANDIDATES, 4, step=1, label="Candidates", elem_id="candidates")
    with gr.Row():
        parts["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=90)
        parts["new_seed"] = gr.Checkbox(True, label="Randomize seed", elem_id="new_seed", min_width=130)
    with gr.Accordion(f"Sampling of {model}", open=False):
        parts["temperature"] = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature")
        parts["top_p"] = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top p")
        slider = dict(step=1, label="Worked examples", visible=sampling.format == "chat")
        parts["num_examples"] = gr.Slider(0, LIMITS["num_examples"][1], sampling.num_examples, **slider)


def _connect(parts: dict[str, Any], service: CandidateService, model: str, concurrency: int) -> None:
    def update(**values: Any) -> dict:
        return {parts[name]: value for name, value in values.items()}

    def respond(caption: str, count: int, seed: int, is_random: bool, *sampling: float) -> Iterator[dict]:
        seed = random.randrange(NUM_SEEDS) if is_random else seed
        yield update(status=status_html(f"Asking {model} ..."), run=gr.update(interactive=False))
        try:
            changes = dict(zip(SAMPLING_FIELDS, sampling, strict=True))
            candidates, questions = service.generate(caption, count, seed, **changes)
        except InputError as error:
            yield update(status=error_html(str(error)))
            return
        usable = [candidate for candidate in candidates if isinstance(candidate, Triple)]
        caption = questions[0].caption if len(questions[0].caption) <= 60 else f"{questions[0].caption[:57]}..."
        status = status_html(f"Done: {len(usable)} of {len(candidates)} answers for “{caption}” are usable.")
        lines = "\n".join(json.dumps(triple._asdict(), ensure_ascii=False) for triple in usable)
        yield update(status=status, cards=render_candidates(candidates, questions), lines=lines, seed=seed)

    asked = gr.on(
        [parts["run"].click, parts["caption"].submit],
        respond,
        [parts[name] for name in ("caption", "count", "seed", "new_seed", *SAMPLING_FIELDS)],
        [parts[name] for name in ("status", "cards", "lines", "seed", "run")],
        concurrency_limit=concurrency,
        trigger_mode="once",
        show_progress="hidden",
        api_visibility="private",
    )
    # A step of its own: Gradio ignores a press before the last request has ended, which is later than its answer.
    ready = dict(show_progress="hidden", api_visibility="private")
    asked.then(lambda: gr.update(interactive=True), None, parts["run"], **ready)
