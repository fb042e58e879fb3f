"""The order of generation as a page of HTML with a slider, for sample.py --html."""

import html

STYLES = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
.canvas { font-family: ui-monospace, monospace; line-height: 2.4 }
.canvas span { display: inline-block; min-width: 1ch; padding: .1rem .25rem; margin: 1px;
  border-radius: 4px; text-align: center; white-space: pre }
.canvas sub { font-size: .6em; opacity: .7 }
.hidden { background: #eee !important; color: transparent !important }
.hidden sub { color: #999 }
.new { outline: 2px solid #d33 }
input { width: 20rem; vertical-align: middle }
"""

SCRIPT = """
const bar = document.getElementById("step"), at = document.getElementById("at");
function draw() {
  at.textContent = bar.value;
  for (const e of document.querySelectorAll("[data-step]")) {
    e.classList.toggle("hidden", +e.dataset.step >= +bar.value);
    e.classList.toggle("new", +e.dataset.step == +bar.value - 1);
  }
}
bar.oninput = draw;
document.onkeydown = (e) => {
  if (e.target == bar) return;
  if (e.key == "ArrowRight") { bar.stepUp(); draw(); }
  if (e.key == "ArrowLeft") { bar.stepDown(); draw(); }
};
draw();
"""


def shade(step, steps):
    """Background of a token revealed at `step`: dark early, light late."""
    return f"hsl(215 70% {45 + 45 * step / max(1, steps - 1):.0f}%)"


def page(prompt, results):
    """One self-contained HTML page for [(title, texts of the tokens, reveal_step, steps)]."""
    most = max(steps for _, _, _, steps in results)
    slider = f"<input id=step type=range min=0 max={most} value={most}> <b id=at></b>"
    parts = [f"<h1>Order of generation</h1><p>{html.escape(prompt)}</p>"]
    parts.append(f"<p><label>after step {slider}</label> (arrow keys work too)</p>")
    for title, texts, reveal_step, steps in results:
        cells = []
        for text, step in zip(texts, reveal_step):
            color = "#fff" if step < steps / 2 else "#222"
            style = f"background:{shade(step, steps)};color:{color}"
            cell = f"{html.escape(text)}<sub>{step + 1}</sub>"
            cells.append(f'<span data-step={step} style="{style}">{cell}</span>')
        parts.append(f"<h2>{html.escape(title)}</h2><div class=canvas>{''.join(cells)}</div>")
    head = "<meta charset=utf-8><title>Order of generation</title>"
    body = f"<body>{''.join(parts)}<script>{SCRIPT}</script></body>"
    return f"<!doctype html><html lang=en>{head}<style>{STYLES}</style>{body}</html>\n"
