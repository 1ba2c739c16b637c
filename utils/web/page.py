"""The page in the browser: what stands where, and what happens when something is pressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from utils.web.handlers import COMPARISON, WITH_PICTURE, WITH_TWIN, Runs, remove_files
from utils.web.links import LIMITS, Wish
from utils.web.page_text import CSS, HEAD, INTRODUCTION, SHOW_LINK, TIPS, TITLE

SESSION_SECONDS = 3600  # how long the edits of a page that nobody uses are kept
WISH = ("instruction", "model", "compare", "steps", "seed", "images", "cfg_text", "cfg_image")
QUIET: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")  # the page shows progress itself
APPEARANCE = dict(  # fonts that every system has: Gradio's own would come from another server
    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    css=CSS,
    head=HEAD,
    footer_links=["api"],
    run_history=False,
    ssr_mode=False,
)


class Page:
    """The parts of the page by name, so that actions can say what they change without knowing Gradio's objects."""

    def __init__(self, runs: Runs, names: list[str]) -> None:
        self._runs, self._names, self._default = runs, names, runs.default_wish()
        self.parts: dict[str, gr.blocks.Block] = {}
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as self.blocks:
            gr.Markdown(INTRODUCTION, elem_id="title")
            with gr.Row(elem_id="columns"):  # a grid (CSS): side by side, or one below the other in this order
                with gr.Column(elem_id="wish", min_width=0):
                    self._lay_out_wish()
                with gr.Column(elem_id="result", min_width=0):
                    self._lay_out_result()
                with gr.Column(elem_id="settings", min_width=0):
                    self._lay_out_settings()
            with gr.Accordion("Tips", open=False):
                gr.Markdown(TIPS)
            self._lay_out_unseen()
            self._connect_edits()
            self._connect_rest()
            self._connect_api()

    def _add(self, name: str, part: Any) -> Any:
        self.parts[name] = part
        return part

    def _lay_out_wish(self) -> None:
        picture = gr.Image(
            label="Picture",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=320,
            elem_id="picture",
            buttons=["fullscreen"],
        )
        # Unlike Gradio, which decodes the file itself: ours has limits, and says what is wrong in a visitor's words.
        picture.preprocess = lambda payload: payload.path if payload else None
        self._add("picture", picture)
        self._add(
            "instruction",
            gr.Textbox(
                label="Instruction", lines=1, max_lines=1, placeholder="make it a pencil drawing", elem_id="instruction"
            ),
        )
        with gr.Row(elem_id="buttons"):
            self._add("run", gr.Button("Edit", variant="primary", elem_id="run", min_width=80, scale=2))
            self._add("stop", gr.Button("Stop", interactive=False, elem_id="stop", min_width=80))
            self._add("example", gr.Button("Example", elem_id="example", min_width=80))
            self._add("reset", gr.Button("Reset", elem_id="reset", min_width=80))

    def _lay_out_settings(self) -> None:
        best, many = self._default, len(self._names) > 1
        with gr.Row(visible=many):
            self._add(
                "model", gr.Dropdown(self._names, value=best.model, label="Model", elem_id="model", min_width=140)
            )
            self._add(
                "compare",
                gr.Dropdown([("no other model", ""), *self._names], value="", label="Compare with", elem_id="compare"),
            )
        with gr.Row():
            self._slider("images", best.images, 1, "Images", "a seed for each")
            self._slider("steps", best.steps, 1, "Steps", "more take longer")
        with gr.Row():
            self._slider("cfg_text", best.cfg_text, 0.05, "Text guidance", "obeys the words")
            self._slider("cfg_image", best.cfg_image, 0.05, "Image guidance", "keeps the picture")
        with gr.Row():
            self._add(
                "seed",
                gr.Number(
                    best.seed, label="Seed", precision=0, elem_id="seed", min_width=90, maximum=LIMITS["seed"][1]
                ),
            )
            with gr.Column(min_width=130):
                self._add("new_seed", gr.Checkbox(True, label="Randomize seed", elem_id="new_seed"))
                self._add("new_guidance", gr.Checkbox(False, label="Randomize guidance", elem_id="new_guidance"))

    def _slider(self, name: str, value: float, step: float, label: str, info: str) -> None:
        least, most = LIMITS[name]
        self._add(name, gr.Slider(least, most, value, step=step, label=label, info=info, elem_id=name, min_width=200))

    def _lay_out_result(self) -> None:
        self._add(
            "comparison",
            gr.ImageSlider(
                label=COMPARISON,
                type="filepath",
                format="png",
                interactive=False,
                height=420,
                max_height=420,
                elem_id="comparison",
                buttons=["fullscreen"],
            ),
        )
        self._add("status", gr.HTML(elem_id="status"))
        self._add(
            "against",
            gr.Radio(
                [WITH_PICTURE, WITH_TWIN], value=WITH_PICTURE, label="Compare above", visible=False, elem_id="against"
            ),
        )
        self._add(
            "gallery",
            gr.Gallery(
                label="Edits: choose one to compare it above",
                format="png",
                type="filepath",
                interactive=False,
                allow_preview=False,
                columns=4,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                elem_id="gallery",
                buttons=["download", "download_all"],
            ),
        )
        self._add(
            "link",
            gr.Textbox(
                label="Link to this edit, without the picture",
                interactive=False,
                buttons=["copy"],
                elem_id="link",
                max_lines=1,
            ),
        )

    def _lay_out_unseen(self) -> None:
        self._add("shown", gr.State([], time_to_live=SESSION_SECONDS, delete_callback=remove_files))
        self._add("selected", gr.State(""))
        self._add("query", gr.Textbox(visible="hidden"))
        self._add("api_run", gr.Button(visible=False))
        self._add("api_edits", gr.Gallery(visible=False, format="png", label="edits"))
        self._add("api_facts", gr.JSON(visible=False, label="facts"))

    def _named(self, *names: str) -> list[Any]:
        return [self.parts[name] for name in names]

    def _update(self, values: dict[str, Any]) -> dict[Any, Any]:
        """An action's answer as Gradio wants it; the empty one changes nothing."""
        return {self.parts[name]: value for name, value in values.items()} or gr.skip()

    def _connect_edits(self) -> None:
        changed = (
            "status",
            "run",
            "stop",
            "shown",
            "selected",
            "gallery",
            "against",
            "comparison",
            "seed",
            "cfg_text",
            "cfg_image",
            "query",
        )

        def run(request: gr.Request, picture: str | None, *values: Any) -> Iterator[dict]:
            *wish, new_seed, new_guidance, shown = values
            course = self._runs.edit(picture, _wish(wish), new_seed, new_guidance, shown, request.session_hash)
            for update in course:
                yield self._update(update)

        def load_example() -> dict:
            return self._update(self._runs.load_example())

        settings = dict(
            fn=run,
            inputs=self._named("picture", *WISH, "new_seed", "new_guidance", "shown"),
            outputs=self._named(*changed),
            concurrency_limit=None,
            trigger_mode="once",
            **QUIET,
        )
        gr.on([self.parts["run"].click, self.parts["instruction"].submit], **settings)
        loaded = self.parts["example"].click(
            load_example, None, self._named("picture", "instruction"), queue=False, **QUIET
        )
        loaded.success(**settings)

    def _connect_rest(self) -> None:
        runs, parts, now = self._runs, self.parts, dict(queue=False, **QUIET)

        def stop(request: gr.Request) -> None:
            runs.stop(request.session_hash)

        def select(event: gr.SelectData, shown: list, against: str) -> dict:
            return self._update(
                runs.select(shown[event.index].edited, shown, against) if event.index < len(shown) else {}
            )

        def select_again(edited: str, shown: list, against: str) -> dict:
            return self._update(runs.select(edited, shown, against))

        def restore(request: gr.Request) -> dict:
            return self._update(runs.restore(dict(request.query_params)))

        def reset(request: gr.Request) -> dict:
            runs.stop(request.session_hash)
            return self._update(runs.reset())

        everything = self._named(*(name for name in parts if name not in ("example", "reset") and "api" not in name))
        beside = self._named("selected", "comparison")
        parts["stop"].click(stop, **now)
        parts["reset"].click(reset, None, everything, **now)
        parts["gallery"].select(select, self._named("shown", "against"), beside, **now)
        parts["against"].input(select_again, self._named("selected", "shown", "against"), beside, **now)
        parts["picture"].upload(
            lambda picture: self._update(runs.check_picture(picture)),
            parts["picture"],
            self._named("status", "picture"),
            **now,
        )
        parts["model"].input(
            lambda model: self._update(runs.choose_model(model)),
            parts["model"],
            self._named("steps", "cfg_text", "cfg_image"),
            **now,
        )
        parts["query"].change(None, parts["query"], parts["link"], js=SHOW_LINK)
        self.blocks.load(restore, None, self._named("status", "new_seed", *WISH), **now)
        self.blocks.unload(stop)

    def _connect_api(self) -> None:
        def edit(
            picture: str,
            instruction: str,
            model: str,
            compare: str,
            steps: int,
            seed: int,
            images: int,
            cfg_text: float,
            cfg_image: float,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> tuple[list[tuple], dict]:
            """Edit a picture by an instruction: the edits, and with which settings each was made."""
            values = [instruction, model, compare, steps, seed, images, cfg_text, cfg_image]
            return self._runs.call(picture, _wish(values), progress)

        self.parts["api_run"].click(
            edit,
            self._named("picture", *WISH),
            self._named("api_edits", "api_facts"),
            api_name="edit",
            concurrency_limit=None,
            show_progress="hidden",
        )


def _wish(values: list[Any]) -> Wish:
    return Wish(**{name: "" if value is None else value for name, value in zip(WISH, values, strict=True)})
