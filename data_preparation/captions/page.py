"""The page of prompt_app.py: a caption, and what a language model would make of it."""

from __future__ import annotations

import difflib
import html
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from data_preparation.captions.backend import Backend
from data_preparation.captions.flags import LIMITS
from data_preparation.captions.moderation import Moderator
from data_preparation.captions.prompts import Ask, Sampling, read_examples
from data_preparation.captions.triples import PARSERS, Rejected, Triple, clean
from utils.errors import InputError
from utils.web.page_text import complain, say

Found = Triple | Rejected
MAX_CANDIDATES, MAX_CAPTION, MAX_SEED = 16, 1000, 2**31 - 1
SETTINGS = ("temperature", "top_p", "num_examples")
TITLE = "Captions to edits"
INTRODUCTION = f"""# {TITLE}
Write the caption of a picture, press **Enter**: the language model invents edits, and the caption after each."""
CSS = """
.gradio-container .main.app { max-width: 1100px !important; margin: 0 auto; }
#title h1 { margin: 0; }
#columns { display: grid; align-items: start; grid-template-columns: 1fr 1fr; grid-template-rows: auto 1fr;
  grid-template-areas: "wish result" "settings result"; }
#wish { grid-area: wish; } #result { grid-area: result; } #settings { grid-area: settings; }
#result .html-container { padding: 0; }
#status { min-height: 1.6em; }
#status .error { border-left: 4px solid #d33; padding-left: 10px; overflow-wrap: anywhere; }
.candidate { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px; margin: 0 0 10px; }
.candidate p { margin: 0 0 4px; overflow-wrap: anywhere; }
.candidate .edit { font-weight: 600; }
.candidate .beside, .candidate.rejected p { color: var(--body-text-color-subdued); font-weight: 400; }
.candidate .beside { font-size: 0.85em; }
.candidate mark { background: var(--color-accent-soft); color: inherit; border-radius: 3px; padding: 0 2px;
  text-decoration: underline 2px var(--color-accent); text-underline-offset: 3px; }
@media (max-width: 700px) {
  #columns { grid-template-columns: minmax(0, 1fr); grid-template-areas: "wish" "result" "settings"; }
  .gradio-container .main.app { padding: 12px !important; }
}
"""
APPEARANCE = dict(  # fonts that every system has: Gradio's own would come from another server
    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    css=CSS,
    footer_links=[],
    run_history=False,
    ssr_mode=False,
)
QUIET: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")


class Suggester:
    """One visitor's press of the button, as HTML and as lines of JSON."""

    def __init__(self, backend: Backend, sampling: Sampling, moderator: Moderator) -> None:
        self._backend, self.sampling, self._moderator = backend, sampling, moderator

    def suggest(self, caption: str, count: int, seed: int, **changes: float) -> tuple[list[Found], list[Ask]]:
        """The candidates, and what was asked for each. Raises InputError for what a visitor can mend."""
        caption = check_wish(caption, count, seed, changes)
        if self._moderator([caption])[0]:
            raise InputError("the caption is refused by the moderation of this page")
        asks = [Ask(caption, (seed + number) % (MAX_SEED + 1)) for number in range(count)]
        sampling = replace(self.sampling, **changes)
        found: list[Found] = []
        for answer in self._backend.with_sampling(sampling).answer(asks):
            refusal = Rejected(f"refused by the server ({answer.refusal})") if answer.refusal else None
            found.append(refusal or PARSERS[sampling.format](caption, answer.text, answer.is_finished))
        texts = [f"{each.edit}\n{each.output}" if isinstance(each, Triple) else "" for each in found]
        refused = self._moderator(texts)
        pairs = zip(found, refused, strict=True)
        return [Rejected("refused by moderation") if is_refused else each for each, is_refused in pairs], asks


def check_wish(caption: str, count: int, seed: int, changes: dict[str, float]) -> str:
    """The caption in one line. Raises one InputError with everything that cannot be."""
    try:
        caption = clean(caption or "")
    except UnicodeError:
        caption = ""
    problems = [] if caption else ['The caption is empty: write one, such as "a boat on a lake".']
    if len(caption) > MAX_CAPTION:
        problems.append(f"The caption has {len(caption)} characters, at most {MAX_CAPTION} are taken.")
    limits = {"candidates": (count, 1, MAX_CANDIDATES), "seed": (seed, 0, MAX_SEED)}
    limits |= {name: (value, *LIMITS[name]) for name, value in changes.items()}
    for name, (value, least, most) in limits.items():
        if not isinstance(value, (int, float)) or not least <= value <= most:
            problems.append(f"{name} {value}: must be from {least} to {most}.")
    if problems:
        raise InputError.from_problems(problems)
    return caption


def show(found: list[Found], asks: list[Ask]) -> str:
    """Candidates as HTML; the words that are new in the output are marked."""
    cards = []
    for each, ask in zip(found, asks, strict=True):
        beside = f'<p class="beside">seed {ask.seed}</p>'
        if isinstance(each, Rejected):
            cards.append(f'<div class="candidate rejected"><p>no edit: {html.escape(each.reason)}</p>{beside}</div>')
            continue
        told = f'<p class="edit">{html.escape(each.edit)}</p><p>{mark_changes(each.caption, each.output)}</p>'
        cards.append(f'<div class="candidate">{told}{beside}</div>')
    return "".join(cards)


def mark_changes(before: str, after: str) -> str:
    """`after` as HTML, with what `before` has not marked, word by word."""
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = html.escape(" ".join(new[start:end]))
        if words:
            parts.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return " ".join(parts)


def as_lines(found: list[Found]) -> str:
    return "\n".join(json.dumps(each._asdict(), ensure_ascii=False) for each in found if isinstance(each, Triple))


def make_page(suggester: Suggester, name: str, at_once: int) -> gr.Blocks:
    """at_once: visitors that are answered at one time; the others wait in Gradio's line."""
    parts: dict[str, Any] = {}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION, elem_id="title")
        with gr.Row(elem_id="columns"):  # a grid (CSS): side by side, or one below the other in this order
            with gr.Column(elem_id="wish", min_width=0):
                parts["caption"] = gr.Textbox(
                    label="Caption", lines=1, max_lines=1, placeholder="a boat on a lake", elem_id="caption"
                )
                parts["run"] = gr.Button("Invent edits", variant="primary", elem_id="run")
            with gr.Column(elem_id="result", min_width=0):
                parts["status"] = gr.HTML(say("The candidates will stand here."), elem_id="status", padding=False)
                parts["cards"] = gr.HTML(elem_id="cards", padding=False)
                parts["lines"] = gr.Textbox(
                    label="The same as lines of JSON",
                    interactive=False,
                    lines=2,
                    max_lines=8,
                    buttons=["copy"],
                    elem_id="lines",
                )
            with gr.Column(elem_id="settings", min_width=0):
                _lay_out_settings(parts, suggester.sampling, name)
        _connect(parts, suggester, name, at_once)
    return blocks


def _lay_out_settings(parts: dict[str, Any], best: Sampling, name: str) -> None:
    gr.Examples([[each.caption] for each in read_examples()[:5]], parts["caption"], label="Examples")
    parts["count"] = gr.Slider(1, MAX_CANDIDATES, 4, step=1, label="Candidates", elem_id="candidates")
    with gr.Row():
        parts["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=90)
        parts["new_seed"] = gr.Checkbox(True, label="Randomize seed", elem_id="new_seed", min_width=130)
    with gr.Accordion(f"How {name} is asked", open=False):
        parts["temperature"] = gr.Slider(0, 2, best.temperature, step=0.05, label="Temperature")
        parts["top_p"] = gr.Slider(0.05, 1, best.top_p, step=0.05, label="Top p")
        parts["num_examples"] = gr.Slider(
            0,
            LIMITS["num_examples"][1],
            best.num_examples,
            step=1,
            label="Worked examples",
            visible=best.format == "chat",
        )


def _connect(parts: dict[str, Any], suggester: Suggester, name: str, at_once: int) -> None:
    def suggest(caption: str, count: int, seed: int, is_new: bool, *how: float) -> Iterator[dict]:
        seed = random.randrange(MAX_SEED + 1) if is_new else seed
        yield update(status=say(f"Asking {name} ..."), run=gr.update(interactive=False))
        try:
            settings = dict(zip(SETTINGS, how, strict=True))
            found, asks = suggester.suggest(caption, count, seed, **settings)
        except InputError as error:
            yield update(status=complain(str(error)), run=gr.update(interactive=True))
            return
        good = sum(isinstance(each, Triple) for each in found)
        short = asks[0].caption if len(asks[0].caption) <= 60 else f"{asks[0].caption[:57]}..."
        status = say(f"Done: {good} of {len(found)} answers for “{short}” can be used.")
        yield update(status=status, cards=show(found, asks), lines=as_lines(found), seed=seed)
        yield update(run=gr.update(interactive=True))

    def update(**values: Any) -> dict:
        return {parts[key]: value for key, value in values.items()}

    gr.on(
        [parts["run"].click, parts["caption"].submit],
        suggest,
        [parts[key] for key in ("caption", "count", "seed", "new_seed", *SETTINGS)],
        [parts[key] for key in ("status", "cards", "lines", "seed", "run")],
        concurrency_limit=at_once,
        trigger_mode="once",
        **QUIET,
    )
