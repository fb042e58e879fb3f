"""Generate for one prompt and show the order: the canvas after each step, or a page of it.

    python sample.py "Ben has 52 euros. Hats cost 3, 1, 6 or 2. He buys two. What is left?"
    python sample.py --strategy learned left_to_right top_prob+eos --html order.html < prompt.txt

What a step reveals stands in brackets, "_" is still masked, a dot is EOS.
"""

import html
import sys
from pathlib import Path

import torch

import eval_gsm8k
import mdmvi
from examples.command_line import (
    Parser,
    UserError,
    add_device,
    amount,
    positive,
    run_main,
    whole,
    writable,
)

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


def token_text(tokenizer, token):
    """One token as it is shown: EOS is a dot, a line break an arrow, a stray byte a box."""
    if token == tokenizer.eos_id:
        return "·"
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\ufffd", "▯")


def show_steps(tokenizer, tokens, reveal_step, steps):
    """Lines of text: the canvas after each step with its new tokens in brackets, and the order."""
    texts = [token_text(tokenizer, t) for t in tokens]
    lines = []
    for step in range(steps):
        cells = []
        for text, revealed in zip(texts, reveal_step):
            if revealed > step:
                cells.append("_")
            elif revealed == step:
                cells.append(f"[{text}]")
            else:
                cells.append(text)
        lines.append(f"step {step + 1}: {''.join(cells)}")
    order = (f"{text.strip() or '␣'}:{s + 1}" for text, s in zip(texts, reveal_step))
    lines.append("order:  " + " ".join(order))
    return lines


def shade(step, steps):
    """Background of a token revealed at `step`: dark early, light late."""
    return f"hsl(215 70% {45 + 45 * step / max(1, steps - 1):.0f}%)"


def page(prompt, results, tokenizer):
    """One self-contained HTML page for [(title, tokens, reveal_step, steps)]."""
    most = max(steps for _, _, _, steps in results)
    slider = f"<input id=step type=range min=0 max={most} value={most}> <b id=at></b>"
    parts = [f"<h1>Order of generation</h1><p>{html.escape(prompt)}</p>"]
    parts.append(f"<p><label>after step {slider}</label> (arrow keys work too)</p>")
    for title, tokens, reveal_step, steps in results:
        cells = []
        for token, step in zip(tokens, reveal_step):
            color = "#fff" if step < steps / 2 else "#222"
            style = f"background:{shade(step, steps)};color:{color}"
            text = html.escape(token_text(tokenizer, token))
            cell = f"{text}<sub>{step + 1}</sub>"
            cells.append(f'<span data-step={step} style="{style}">{cell}</span>')
        parts.append(f"<h2>{html.escape(title)}</h2><div class=canvas>{''.join(cells)}</div>")
    head = "<meta charset=utf-8><title>Order of generation</title>"
    body = f"<body>{''.join(parts)}<script>{SCRIPT}</script></body>"
    return f"<!doctype html><html lang=en>{head}<style>{STYLES}</style>{body}</html>\n"


def read_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="the problem (default: read from standard input)")
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    names = {"choices": ["learned", *eval_gsm8k.RULES], "default": ["learned"]}
    add("--strategy", nargs="+", help="one or several, given after the prompt", **names)
    add("--budget", type=positive, help="steps (default: the budget it was trained for)")
    add("--temperature", type=amount, default=0.0, help="0: the most likely token")
    add("--seed", type=whole, default=0, help="seed of the draws")
    add_device(parser)
    add("--html", type=writable, metavar="FILE", help="write a page that shows the order")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_args(argv)
    given = sys.stdin and args.prompt is None  # there may be no standard input
    prompt = (sys.stdin.read() if given else args.prompt or "").strip()
    if not prompt:
        raise UserError("the prompt is empty: give it as an argument or on standard input")
    checkpoint, tokenizer, models = eval_gsm8k.load_checkpoint(args.checkpoint, args.device)
    if models.policy is None and "learned" in args.strategy:
        raise UserError(f"{args.checkpoint} has no learned order: give another --strategy")
    config = models.denoiser.config
    problem = {"question": prompt, "answer": ""}
    tokens, canvas, fits = eval_gsm8k.encode_problems([problem], tokenizer, config)
    if not fits[0]:
        length = len(tokenizer.encode(prompt + eval_gsm8k.SEPARATOR))
        room = config.max_len - config.canvas_len
        raise UserError(f"the prompt has {length} tokens, the context leaves {room}: shorten it")
    data, results = (tokens.long().to(args.device), canvas.to(args.device)), []
    budget = args.budget or checkpoint["args"]["budget"]
    for name in args.strategy:
        options = {
            "policy": models.policy,
            "temperature": args.temperature,
            "generator": torch.Generator(args.device).manual_seed(args.seed),
        }
        out = mdmvi.generate(models.denoiser, *data, name, budget, **options)
        row, on, steps = out.tokens[0].cpu(), canvas[0], int(out.steps[0])
        results.append((name, row[on].tolist(), out.reveal_step[0].cpu()[on].tolist(), steps))
        print(f"{name}, {steps} steps")
        print("\n".join(show_steps(tokenizer, *results[-1][1:])))
        print(f"answer:\n{eval_gsm8k.answer_text(tokenizer, row, on)}\n")
    if args.html:
        text = page(prompt, results, tokenizer)
        Path(args.html).write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    run_main(main)
