"""The texts, the CSS and the JavaScript of the page."""

from __future__ import annotations

import html

TITLE = "Edit images by instruction"
INTRODUCTION = f"""# {TITLE}
Choose an image, describe the change, press **Enter**. **Escape** stops an edit."""

TIPS = """
**The image hardly changes.** Lower *image guidance* in steps of 0.1, down to about 1, or raise *text guidance*.

**It changes too much.** Raise *image guidance* in steps of 0.1, up to about 2, or lower *text guidance*.

**Good, but not good enough.** Set *images* to 4 or more: each has its own seed, and the best one is often far better
than the first. *Randomize guidance* tries values near the recommended ones each time.

**The instruction is not understood.** Phrase it differently: "turn him into a dog" and "make him a dog" give different
edits. Short instructions about visible things work best.

**Details are rough.** Raise *steps*, up to 100. An adapted few-step model gains nothing from more steps.

**Faces look odd.** The model works on blocks of 8 x 8 pixels, too coarse for a small face: crop the image so that the
face is larger.

**Moving, counting, left and right** do not work with most of these models: they restyle, replace and recolour.
"""

CSS = """
.gradio-container .main.app { max-width: 1280px !important; margin: 0 auto; }
#title h1 { margin: 0; }
#columns { display: grid; align-items: start; grid-template-columns: 1fr 1fr; grid-template-rows: auto 1fr;
  grid-template-areas: "request result" "settings result"; }
#request { grid-area: request; } #result { grid-area: result; } #settings { grid-area: settings; }
#status { min-height: 2.9em; }
#status progress { width: 100%; height: 6px; display: block; margin-top: 6px; appearance: none; border: 0; }
#status progress, #status progress::-webkit-progress-bar { background: var(--border-color-primary); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#status .error { border-left: 4px solid #d33; padding-left: 10px; }
#gallery .grid-wrap { min-height: 0; max-height: none; padding-top: 32px; }
/* Also enlarges the edits of a small model. */
#comparison img { width: 100%; height: 100%; object-fit: contain; }
#comparison .outer:focus-visible { outline: 3px solid var(--color-accent); }
#buttons { display: grid; grid-template-columns: 2fr 1fr 1fr 1fr; }
@media (max-width: 1000px) { #buttons { grid-template-columns: 1fr 1fr; } }
@media (max-width: 700px) {
  #columns { grid-template-columns: minmax(0, 1fr); grid-template-areas: "request" "result" "settings"; }
  #comparison { height: 300px !important; }
  .gradio-container .main.app { padding: 12px !important; }
}
"""

# The address bar has the settings of the last edit.
SHOW_LINK = """(query) => {
  if (!query) { history.replaceState(null, "", location.pathname); return ""; }
  const link = location.origin + location.pathname + "?" + query;
  history.replaceState(null, "", link);
  return link;
}"""

# Gradio's slider has no keyboard control: the Tab key focuses its handle, and the arrow keys move it.
HEAD = """<script>
const findHandle = () => document.querySelector("#comparison .slider-wrap .outer");
new MutationObserver(() => {
  const handle = findHandle();
  if (!handle || handle.tabIndex === 0) return;
  handle.tabIndex = 0;
  handle.setAttribute("role", "slider");
  handle.setAttribute("aria-label", "line between before and after; the arrow keys move it");
  handle.setAttribute("aria-valuemin", "0");
  handle.setAttribute("aria-valuemax", "100");
  handle.setAttribute("aria-valuenow", "50");
}).observe(document, { childList: true, subtree: true });

function moveHandle(handle, share) {
  const box = handle.getBoundingClientRect(), whole = handle.parentElement.getBoundingClientRect();
  const x = box.left + box.width / 2, y = box.top + box.height / 2, target = x + share * whole.width;
  const place = { view: window, bubbles: true, cancelable: true, clientY: y };
  const mouse = (type, x) => new MouseEvent(type, { ...place, clientX: x });
  handle.dispatchEvent(mouse("mousedown", x));
  window.dispatchEvent(mouse("mousemove", target));
  window.dispatchEvent(mouse("mouseup", target));
  const now = Math.round(100 * (target - whole.left) / whole.width);
  handle.setAttribute("aria-valuenow", Math.max(0, Math.min(100, now)));
}

document.addEventListener("keydown", (event) => {
  const stop = document.querySelector("#stop"), handle = findHandle();
  if (event.key === "Escape" && stop && !stop.disabled) stop.click();
  if (event.target !== handle || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  moveHandle(handle, event.key === "ArrowLeft" ? -0.05 : 0.05);
});
</script>"""


def status_html(text: str, fraction: float | None = None) -> str:
    """The status line, with a progress bar if `fraction` is given. Screen readers announce it."""
    bar = "" if fraction is None else f'<progress max="1" value="{fraction:.4f}" aria-label="progress"></progress>'
    return f'<div role="status" aria-live="polite"><span>{html.escape(text)}</span>{bar}</div>'


def error_html(text: str) -> str:
    """An error message; line breaks are kept."""
    return f'<div role="alert" class="error">{html.escape(text).replace(chr(10), "<br>")}</div>'
