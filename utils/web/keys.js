// Gradio's slider has no keyboard control: the Tab key focuses its handle, and the arrow keys move it.
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
  const handle = findHandle();
  if (event.target !== handle || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  moveHandle(handle, event.key === "ArrowLeft" ? -0.05 : 0.05);
});

// Escape stops the edit, unless it closes something. In the capture phase, before Gradio has closed it.
const closedByEscape = '[role="combobox"][aria-expanded="true"], .block.fullscreen, .api-docs';
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.fullscreenElement || document.querySelector(closedByEscape)) return;
  const stop = document.querySelector("#stop");
  if (stop && !stop.disabled) stop.click();
}, true);
