"""Generate for one prompt and show the order: the canvas after each step, or a page to step through.

    python sample.py "Ann has 52 pens. She finds 2 and buys 5. How many pens does she have now?"
    python sample.py --strategy learned left_to_right top_prob+eos --html order.html < prompt.txt
"""

import html
import math
import sys

import torch

import eval_gsm8k
import mdmvi
from eval_gsm8k import UserError

STYLES = """body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
.canvas{font-family:ui-monospace,monospace;line-height:2.4}.canvas span{display:inline-block;min-width:1ch;
padding:.1rem .25rem;margin:1px;border-radius:4px;text-align:center;white-space:pre}.canvas sub{font-size:.6em;
opacity:.7}.hidden{background:#eee!important;color:transparent!important}.hidden sub{color:#999}
.new{outline:2px solid #d33}input{width:20rem;vertical-align:middle}"""

SCRIPT = """const bar=document.getElementById('step'),show=document.getElementById('at');
function draw(){show.textContent=bar.value;document.querySelectorAll('[data-step]').forEach(e=>{
const s=+e.dataset.step;e.classList.toggle('hidden',s>=+bar.value);e.classList.toggle('new',s==bar.value-1)})}
bar.oninput=draw;document.onkeydown=e=>{if(e.target!=bar&&(e.key=='ArrowRight'||e.key=='ArrowLeft'))
{bar.value=+bar.value+(e.key=='ArrowRight'?1:-1);draw()}};draw();"""


def token_text(tokenizer, token):
    """One token as it is shown: EOS as a dot, a line break as an arrow, a byte that is no text as a box."""
    if token == tokenizer.eos_id:
        return "·"
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\ufffd", "▯")


def show_steps(tokenizer, tokens, reveal_step, steps, color):
    """Lines of text: the canvas after each step, newly revealed tokens highlighted, and who came when."""
    texts = [token_text(tokenizer, t) for t in tokens]
    lines = []
    for step in range(steps):
        cells = []
        for text, revealed in zip(texts, reveal_step):
            if revealed > step:
                cells.append("_")
            elif revealed == step:
                cells.append(f"\033[1;32m{text}\033[0m" if color else f"[{text}]")
            else:
                cells.append(text)
        lines.append(f"step {step + 1}: {''.join(cells)}")
    lines.append("order:  " + " ".join(f"{text.strip() or '␣'}:{s + 1}" for text, s in zip(texts, reveal_step)))
    return lines


def shade(step, steps):
    """Background of a token revealed at `step`: dark early, light late."""
    return f"hsl(215 70% {45 + 45 * step / max(1, steps - 1):.0f}%)"


def page(prompt, results, tokenizer):
    """One self-contained HTML page for [(title, tokens, reveal_step, steps)]."""
    most = max(steps for _, _, _, steps in results)
    parts = [f"<h1>Order of generation</h1><p>{html.escape(prompt)}</p>"]
    parts.append(f"<p><label>after step <input id=step type=range min=0 max={most} value={most}> <b id=at></b></label> (arrow keys work too)</p>")
    for title, tokens, reveal_step, steps in results:
        cells = "".join(
            f'<span data-step={s} style="background:{shade(s, steps)};color:{"#fff" if s < steps / 2 else "#222"}">{html.escape(token_text(tokenizer, t))}<sub>{s + 1}</sub></span>'
            for t, s in zip(tokens, reveal_step)
        )
        parts.append(f"<h2>{html.escape(title)}</h2><div class=canvas>{cells}</div>")
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>Order of generation</title><style>{STYLES}</style><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"


def main(argv=None):
    parser = eval_gsm8k.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="the problem (default: read from standard input)")
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add("--strategy", nargs="+", default=["learned"], help="one or several to compare; +eos for eos_aware rules")
    add("--budget", type=int, help="steps (default: the budget it was trained for)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--html", metavar="FILE", help="write a page that shades each token by the step that revealed it")
    args = parser.parse_args(argv)
    eval_gsm8k.check_device(args.device)
    chosen = [("learned", False) if name == "learned" else eval_gsm8k.parse_rules([name])[0] for name in args.strategy]
    checkpoint = eval_gsm8k.load_checkpoint(args.checkpoint, args.device)
    budget = checkpoint["budget"] if args.budget is None else args.budget
    if budget < 1:
        raise UserError(f"--budget is {budget}: it must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature}: it must be at least 0")
    prompt = (sys.stdin.read() if args.prompt is None else args.prompt).strip()
    if not prompt and checkpoint["task"] != "pairs":
        raise UserError("the prompt is empty: give it as an argument or on standard input")
    denoiser, policy, _, _ = eval_gsm8k.build_models(checkpoint, args.device)
    if policy is None and ("learned", False) in chosen:
        raise UserError(f"{args.checkpoint} has no learned order (stage 1 only): give another --strategy")
    tokenizer = eval_gsm8k.tokenizer_of(checkpoint["tokenizer"])
    max_len, canvas_len = checkpoint["config"]["max_len"], checkpoint["canvas_len"]
    problem = {"question": prompt, "answer": ""}
    if checkpoint["task"] == "sudoku":
        side = math.isqrt(canvas_len)
        if [len(row) for row in prompt.split("\n")] != [side] * side or not set(prompt) <= set(".\n123456789"[: side + 2]):
            raise UserError(f"a puzzle has {side} rows of {side} characters, 1 to {side} or . for a blank: mend the prompt")
        problem["box"] = checkpoint["box"]
    tokens, canvas, fits = eval_gsm8k.encode_problems([problem], tokenizer, max_len, canvas_len)
    if not fits[0]:
        length = len(tokenizer.encode(prompt + eval_gsm8k.SEPARATOR))
        raise UserError(f"the prompt has {length} tokens, the model's context leaves {max_len - canvas_len}: shorten it")
    results = []
    for strategy, eos_aware in chosen:
        generator = torch.Generator(args.device).manual_seed(args.seed)
        out = mdmvi.generate(
            denoiser, tokens.long().to(args.device), canvas.to(args.device), strategy, budget,
            policy=policy, temperature=args.temperature, generator=generator, eos_aware=eos_aware,
        )  # fmt: skip
        on, title = canvas[0], strategy + (" eos_aware" if eos_aware else "")
        results.append((title, out.tokens[0].cpu()[on].tolist(), out.reveal_step[0].cpu()[on].tolist(), int(out.steps[0])))
        print(f"{title}, {results[-1][3]} steps")
        print("\n".join(show_steps(tokenizer, *results[-1][1:], color=sys.stdout.isatty())))
        whole = torch.arange(max_len) > 0 if "box" in problem else on
        print(f"answer:\n{eval_gsm8k.answer_text(tokenizer, out.tokens[0].cpu(), whole)}\n")
    if args.html:
        eval_gsm8k.write_file(args.html, page(prompt, results, tokenizer))


if __name__ == "__main__":
    eval_gsm8k.run_main(main)
