"""Generate for one prompt and show the order: the canvas after each step; --html: a page too.

    python sample.py "Ben has 52 euros. Hats cost 3, 1, 6 or 2. He buys two. What is left?"
    python sample.py --strategy learned left_to_right top_prob+eos --html order.html < prompt.txt

What a step reveals stands in brackets, "_" is still masked, a dot is EOS.
"""

import sys
from pathlib import Path

import torch

import eval_gsm8k
import mdmvi
from examples import page
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
from examples.tokenizer import SEPARATOR, answer_text, encode_problems


def token_text(tokenizer, token):
    """One token as it is shown: EOS is a dot, a line break an arrow, what is no text a box."""
    if token == tokenizer.eos_id:
        return "·"
    # Behind another token, as LLaMA's tokenizer drops the space at the beginning of a text
    text = tokenizer.decode([*tokenizer.encode("a"), token])[1:]
    text = text.replace("\n", "⏎").replace("\ufffd", "▯")
    return text if text.isprintable() else "▯"  # a control byte could garble the terminal


def show_steps(texts, reveal_step, steps):
    """Lines of text: the canvas after each step with its new tokens in brackets, and the order."""
    lines = []
    for step in range(steps):
        cells = []
        for text, revealed in zip(texts, reveal_step):
            shown = f"[{text}]" if revealed == step else text
            cells.append(shown if revealed <= step else "_")
        lines.append(f"step {step + 1}: {''.join(cells)}")
    order = (f"{text.strip() or '␣'}:{s + 1}" for text, s in zip(texts, reveal_step))
    lines.append("order:  " + " ".join(order))
    return lines


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="the problem (default: read from standard input)")
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    names = {"choices": ["learned", *eval_gsm8k.ALL_RULES], "default": ["learned"]}
    add("--strategy", nargs="+", help="one or several, given after the prompt", **names)
    add("--budget", type=positive, help="steps (default: the budget it was trained for)")
    add("--temperature", type=amount, default=0.0, help="0: the most likely token")
    add("--seed", type=whole, default=0, help="seed of the draws")
    add_device(parser)
    add("--html", type=writable, metavar="FILE", help="write a page that shows the order")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    given = sys.stdin and args.prompt is None  # there may be no standard input
    prompt = (sys.stdin.read() if given else args.prompt or "").strip()
    if not prompt:
        raise UserError("the prompt is empty: give it as an argument or on standard input")
    checkpoint, tokenizer, models = eval_gsm8k.load_checkpoint(args.checkpoint, args.device)
    if models.policy is None and "learned" in args.strategy:
        raise UserError(f"{args.checkpoint} has no learned order: give another --strategy")
    config = models.denoiser.config
    problem = {"question": prompt, "answer": ""}
    tokens, canvas, fits = encode_problems([problem], tokenizer, config)
    if not fits[0]:
        length = len(tokenizer.encode(prompt + SEPARATOR))
        room = config.max_len - config.canvas_len
        raise UserError(f"the prompt has {length} tokens, the context leaves {room}: shorten it")
    data, results = (tokens.long().to(args.device), canvas.to(args.device)), []
    budget = args.budget or checkpoint["args"]["budget"]
    for name in args.strategy:
        generator = torch.Generator(args.device).manual_seed(args.seed)
        settings = (name, budget, models.policy, args.temperature, generator)
        out = mdmvi.generate(models.denoiser, *data, *settings)
        row, on, steps = out.tokens[0].cpu(), canvas[0], int(out.steps[0])
        texts = [token_text(tokenizer, token) for token in row[on].tolist()]
        results.append((name, texts, out.reveal_step[0].cpu()[on].tolist(), steps))
        print(f"{name}, {steps} steps")
        print("\n".join(show_steps(*results[-1][1:])))
        print(f"answer:\n{answer_text(tokenizer, row, on)}\n")
    if args.html:
        text = page.page(prompt, results)
        Path(args.html).write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    run_main(main)
