"""The page in the browser: its components, and which handler each event calls."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import gradio as gr

from utils.editing.schedulers import SCHEDULERS
from utils.web import gradio_events
from utils.web.edit_requests import PAGE_LIMITS, EditRequest
from utils.web.handlers import COMPARISON, IMAGE_AND_EDIT, TWO_MODELS, PageHandlers, remove_files
from utils.web.page_text import CSS, HEAD, INTRODUCTION, SHOW_LINK, TIPS, TITLE

SESSION_SECONDS = 3600  # how long the edits of an unused page are kept
REQUEST = tuple(field.name for field in fields(EditRequest))
NOT_RESET = ("example", "reset", "api_run", "api_edits", "api_facts")
QUIET: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")  # the page shows its own progress
AT_ONCE: dict[str, Any] = dict(queue=False, **QUIET)
APPEARANCE = dict(  # system fonts: those of Gradio are loaded from another server
    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    css=CSS,
    head=HEAD,
    footer_links=["api"],
    run_history=False,
    ssr_mode=False,
)


class Page:
    """The components by name, so that handlers can update them without knowing Gradio's objects."""

    def __init__(self, handlers: PageHandlers, models: list[str]) -> None:
        self._handlers, self._models, self._default = handlers, models, handlers.default_request()
        self.parts: dict[str, gr.blocks.Block] = {}
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as self.blocks:
            gr.Markdown(INTRODUCTION, elem_id="title")
            with gr.Row(elem_id="columns"):  # a grid (CSS): side by side, or one below the other in this order
                with gr.Column(elem_id="request", min_width=0):
                    self._add_request()
                with gr.Column(elem_id="result", min_width=0):
                    self._add_result()
                with gr.Column(elem_id="settings", min_width=0):
                    self._add_settings()
            with gr.Accordion("Tips", open=False):
                gr.Markdown(TIPS)
            self._add_hidden()
            self._connect_edits()
            self._connect_buttons()
            self._connect_other_events()
            self._connect_api()

    def _add(self, name: str, kind: type, *values: Any, **options: Any) -> Any:
        self.parts[name] = kind(*values, elem_id=name, **options)
        return self.parts[name]

    def _add_request(self) -> None:
        upload = dict(type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=["fullscreen"])
        image = self._add("image", gr.Image, label="Image", height=320, **upload)
        # Gradio would decode the file itself; `check_upload` has limits and better messages.
        image.preprocess = lambda payload: payload.path if payload else None
        one_line = dict(lines=1, max_lines=1)
        self._add("instruction", gr.Textbox, label="Instruction", placeholder="make it a pencil drawing", **one_line)
        with gr.Row(elem_id="buttons"):
            self._add("run", gr.Button, "Edit", variant="primary", min_width=80, scale=2)
            self._add("stop", gr.Button, "Stop", interactive=False, min_width=80)
            self._add("example", gr.Button, "Example", min_width=80)
            self._add("reset", gr.Button, "Reset", min_width=80)

    def _add_settings(self) -> None:
        default = self._default
        with gr.Row(visible=len(self._models) > 1):
            self._add("model", gr.Dropdown, self._models, value=default.model, label="Model", min_width=140)
            others = [("no other model", ""), *self._models]
            self._add("compare", gr.Dropdown, others, value="", label="Compare with", min_width=140)
        with gr.Row():
            self._add_slider("images", 1, "Images", "each with its own seed")
            self._add_slider("steps", 1, "Steps", "more take longer")
        with gr.Row():
            self._add_slider("cfg_text", 0.05, "Text guidance", "follows the instruction")
            self._add_slider("cfg_image", 0.05, "Image guidance", "keeps the image")
        with gr.Row():
            largest = PAGE_LIMITS["seed"][1]
            self._add("seed", gr.Number, default.seed, label="Seed", precision=0, min_width=90, maximum=largest)
            with gr.Column(min_width=130):
                self._add("new_seed", gr.Checkbox, True, label="Randomize seed")
                self._add("new_guidance", gr.Checkbox, False, label="Randomize guidance")
        with gr.Row():
            schedulers = [("default", ""), *SCHEDULERS]
            self._add("scheduler", gr.Dropdown, schedulers, value="", label="Scheduler", min_width=90)
            with gr.Column(min_width=130):
                self._add("keep_size", gr.Checkbox, False, label="Keep size", info="edits as large as the image")
        with gr.Accordion("More settings", open=False):
            shown = dict(lines=1, max_lines=2, placeholder="blurry, text")
            self._add("negative_prompt", gr.Textbox, "", label="Negative prompt", info="what not to show", **shown)
            own = dict(
                precision=0, minimum=0, maximum=PAGE_LIMITS["resolution"][1], info="longer side, 0: the model's own"
            )
            self._add("resolution", gr.Number, default.resolution, label="Resolution", **own)
            self._add_slider("guidance_rescale", 0.05, "Guidance rescale", "against overexposure by guidance")
            noise = "noise levels of euler, heun, dpm++ and unipc"
            self._add("karras_sigmas", gr.Checkbox, False, label="Karras sigmas", info=noise)

    def _add_slider(self, name: str, step: float, label: str, info: str) -> None:
        smallest, largest = PAGE_LIMITS[name]
        value = getattr(self._default, name)
        self._add(name, gr.Slider, smallest, largest, value, step=step, label=label, info=info, min_width=200)

    def _add_result(self) -> None:
        shown = dict(type="filepath", format="png", interactive=False)
        height = dict(height=420, max_height=420)
        self._add("comparison", gr.ImageSlider, label=COMPARISON, **shown, **height, buttons=["fullscreen"])
        self._add("status", gr.HTML)
        choices = [IMAGE_AND_EDIT, TWO_MODELS]
        self._add("against", gr.Radio, choices, value=IMAGE_AND_EDIT, label="Compare above", visible=False)
        layout = dict(columns=4, fit_columns=False, height="auto", object_fit="contain", allow_preview=False)
        saving = dict(buttons=["download", "download_all"])
        self._add("gallery", gr.Gallery, label="Edits: choose one to compare it above", **shown, **layout, **saving)
        self._add("again", gr.Button, "Edit this result again", min_width=80, size="sm", interactive=False)
        link = "Link to this edit, without the image"
        self._add("link", gr.Textbox, label=link, interactive=False, buttons=["copy"], max_lines=1)

    def _add_hidden(self) -> None:
        self.parts["items"] = gr.State([], time_to_live=SESSION_SECONDS, delete_callback=remove_files)
        self.parts["selected"] = gr.State("")
        self.parts["query"] = gr.Textbox(visible="hidden")
        self.parts["api_run"] = gr.Button(visible=False)
        self.parts["api_edits"] = gr.Gallery(visible=False, format="png", label="edits")
        self.parts["api_facts"] = gr.JSON(visible=False, label="facts")

    def _named(self, *names: str) -> list[Any]:
        return [self.parts[name] for name in names]

    def _update(self, values: dict[str, Any]) -> dict[Any, Any]:
        """A handler's answer as Gradio needs it; an empty one changes nothing."""
        return {self.parts[name]: value for name, value in values.items()} or gr.skip()

    def _updating(self, handler: Callable[..., dict[str, Any]]) -> Callable[..., dict]:
        return lambda *values: self._update(handler(*values))

    def _connect_edits(self) -> None:
        progress = self._named(
            "status", "run", "stop", "items", "selected", "gallery", "against", "comparison", "again"
        )
        used = self._named("seed", "cfg_text", "cfg_image", "query")

        def run(session: gr.Request, image: str | None, *values: Any) -> Iterator[dict]:
            *values, new_seed, new_guidance, items = values
            request = _make_request(values)
            for update in self._handlers.edit(image, request, new_seed, new_guidance, items, session.session_hash):
                yield self._update(update)

        inputs = self._named("image", *REQUEST, "new_seed", "new_guidance", "items")
        event = dict(
            fn=run, inputs=inputs, outputs=progress + used, concurrency_limit=None, trigger_mode="once", **QUIET
        )
        started = gr.on([self.parts["run"].click, self.parts["instruction"].submit], **event)
        loaded = self.parts["example"].click(
            self._updating(self._handlers.load_example), None, self._named("image", "instruction"), **AT_ONCE
        )
        for edited in (started, loaded.success(**event)):
            edited.then(self._updating(self._handlers.ready), None, self._named("run", "stop"), **AT_ONCE)

    def _connect_buttons(self) -> None:
        def stop(session: gr.Request) -> None:
            self._handlers.stop(session.session_hash)

        def reset(session: gr.Request) -> dict:
            self._handlers.stop(session.session_hash)
            return self._update(self._handlers.reset())

        everything = self._named(*(name for name in self.parts if name not in NOT_RESET))
        self.parts["stop"].click(stop, **AT_ONCE)
        self.parts["reset"].click(reset, None, everything, **AT_ONCE)
        self.blocks.unload(stop)

    def _connect_other_events(self) -> None:
        handlers, parts = self._handlers, self.parts

        def select(event: gr.SelectData, items: list, against: str) -> dict:
            is_there = event.index < len(items)
            return self._update(handlers.select(items[event.index].edited, items, against) if is_there else {})

        def restore(session: gr.Request) -> dict:
            return self._update(handlers.restore(dict(session.query_params)))

        compared = self._named("selected", "comparison")
        parts["gallery"].select(select, self._named("items", "against"), compared, **AT_ONCE)
        parts["against"].input(
            self._updating(handlers.select), self._named("selected", "items", "against"), compared, **AT_ONCE
        )
        parts["image"].upload(
            self._updating(handlers.check_image), parts["image"], self._named("status", "image"), **AT_ONCE
        )
        parts["again"].click(
            self._updating(handlers.edit_again), parts["selected"], self._named("image", "status"), **AT_ONCE
        )
        sliders = self._named("steps", "cfg_text", "cfg_image", "guidance_rescale", "resolution")
        parts["model"].input(self._updating(handlers.choose_model), parts["model"], sliders, **AT_ONCE)
        parts["query"].change(None, parts["query"], parts["link"], js=SHOW_LINK)
        self.blocks.load(restore, None, self._named("status", "new_seed", *REQUEST), **AT_ONCE)

    def _connect_api(self) -> None:
        def edit(
            image: str,
            instruction: str,
            model: str,
            compare: str,
            steps: int,
            seed: int,
            images: int,
            cfg_text: float,
            cfg_image: float,
            scheduler: str = "",
            keep_size: bool = False,
            negative_prompt: str = "",
            guidance_rescale: float = 0.0,
            karras_sigmas: bool = False,
            resolution: int = 0,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> tuple[list[tuple], dict]:
            """Edit an image by an instruction: the edits, and the settings of each."""
            values = [instruction, model, compare, steps, seed, images, cfg_text, cfg_image, scheduler, keep_size]
            values += [negative_prompt, guidance_rescale, karras_sigmas, resolution]
            return self._handlers.call(
                image, _make_request(values), progress, gradio_events.make_connection_check(self.blocks)
            )

        inputs, outputs = self._named("image", *REQUEST), self._named("api_edits", "api_facts")
        options = dict(api_name="edit", concurrency_limit=None, show_progress="hidden")
        self.parts["api_run"].click(edit, inputs, outputs, **options)
        gradio_events.check_inputs_early(self.blocks, accepts_fewer="edit")


def _make_request(values: list[Any]) -> EditRequest:
    """The request with the values of `REQUEST`; an emptied component has the value None."""
    given = dict(zip(REQUEST, values, strict=True))
    return EditRequest(**{name: "" if value is None else value for name, value in given.items()})
