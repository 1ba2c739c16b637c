"""The words, the style and the little JavaScript of the page in the browser."""

from __future__ import annotations

import html

TITLE = "Edit pictures by instruction"
INTRODUCTION = f"""# {TITLE}
Choose a picture, say what to change, press **Enter**. **Escape** stops an edit."""

TIPS = """
**The picture hardly changes.** *Image guidance* holds on to it: lower it in steps of 0.1, down to about 1.
Or raise *text guidance*, which pulls towards the instruction. An edit that changes much needs both.

**It changes too much.** The other way round: *image guidance* up in steps of 0.1, to 2 or so, or *text guidance* down.

**Good, but not good enough.** Ask for several *images*: each has a seed of its own, and the best of four is often far
better than the first. *Randomize guidance* tries a setting near the recommended one at each press.

**The instruction is not understood.** Say it another way: "turn him into a dog", "make him a dog" and "as a dog" give
different edits. Short orders about things that can be seen work best.

**Details are rough.** Raise *steps*, up to 100. An adapted few-step model is made for few, and gains nothing from more.

**Faces look odd.** The model works on squares of 8 pixels, which is coarse for a small face: crop the picture so that
the face fills more of it.

**Moving, counting, left and right** are beyond most of these models: they restyle, replace and recolour.
"""

CSS = """
.gradio-container .main.app { max-width: 1280px !important; margin: 0 auto; }
#title h1 { margin: 0; }
#columns { display: grid; align-items: start; grid-template-columns: 1fr 1fr; grid-template-rows: auto 1fr;
  grid-template-areas: "wish result" "settings result"; }
#wish { grid-area: wish; } #result { grid-area: result; } #settings { grid-area: settings; }
#status { min-height: 2.9em; }
#status progress { width: 100%; height: 6px; display: block; margin-top: 6px; appearance: none; border: 0; }
#status progress, #status progress::-webkit-progress-bar { background: var(--border-color-primary); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#status .error { border-left: 4px solid #d33; padding-left: 10px; }
#gallery .grid-wrap { min-height: 0; max-height: none; padding-top: 32px; }
/* A small model's edit is shown as large as a large one's. */
#comparison img { width: 100%; height: 100%; object-fit: contain; }
#comparison .outer:focus-visible { outline: 3px solid var(--color-accent); }
#buttons { display: grid; grid-template-columns: 2fr 1fr 1fr 1fr; }
@media (max-width: 1000px) { #buttons { grid-template-columns: 1fr 1fr; } }
@media (max-width: 700px) {
  #columns { grid-template-columns: minmax(0, 1fr); grid-template-areas: "wish" "result" "settings"; }
  #comparison { height: 300px !important; }
  .gradio-container .main.app { padding: 12px !important; }
}
"""

# The address bar always holds the settings of the last edit, and nothing that the visitor has only typed.
SHOW_LINK = """(query) => {
  if (!query) { history.replaceState(null, "", location.pathname); return ""; }
  const link = location.origin + location.pathname + "?" + query;
  history.replaceState(null, "", link);
  return link;
}"""

# Gradio's slider obeys the mouse alone: its handle gets a place in the tab order, and the arrow keys move it as the
# mouse would.
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


def say(text: str, share: float | None = None) -> str:
    """The status line as HTML, with a bar where a share of the work is given. A screen reader reads it out."""
    bar = "" if share is None else f'<progress max="1" value="{share:.4f}" aria-label="progress"></progress>'
    return f'<div role="status" aria-live="polite"><span>{html.escape(text)}</span>{bar}</div>'


def complain(text: str) -> str:
    """A mistake or a failure as HTML; several lines stay several."""
    return f'<div role="alert" class="error">{html.escape(text).replace(chr(10), "<br>")}</div>'
