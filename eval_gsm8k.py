"""How orders are scored: reading checkpoints, generating, the table.

    python eval_gsm8k.py --checkpoint out/checkpoint.pt --budget 5 10 15
    python eval_gsm8k.py --checkpoint out_gsm5/checkpoint.pt --data test.jsonl     # real GSM8K
    python eval_gsm8k.py --sweep 1 2 3 4 5 8 --json rows.json     # for python -m examples.plot

A problem is a dict {question, answer}; its answer ends in "#### N". One of an embedded task lists
all its right solutions; others are judged by their <<...>> equations, against the reference
(examples/gsm8k.py).
"""

import functools
import json
import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import mdmvi
from examples import runs, spread
from examples.arithmetic import TASKS
from examples.command_line import (
    Parser,
    UserError,
    add_data,
    add_device,
    aligned,
    positive,
    run_main,
    whole,
    writable,
)
from examples.gsm8k import final_number, load_gsm8k, solves_equations
from examples.smdm import LlamaTokenizer
from examples.tokenizer import Tokenizer, answer_text, encode_problems

VERSION = 9  # of the checkpoints
# Of a run, each with the network without which it cannot go on
STAGES = {"plain": "denoiser", "baseline": "baseline", "order": "policy", "done": "denoiser"}
ALL_RULES = [*mdmvi.RULES, *mdmvi.EOS_RULES]


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


class Models(NamedTuple):
    """The networks of a run; the orders are None before stage 2, and a baseline may be."""

    denoiser: mdmvi.Denoiser
    policy: torch.nn.Module
    posterior: torch.nn.Module
    baseline: mdmvi.Denoiser


def make_orders(kind, config, budget):
    """A new (policy, posterior): "runs" from the left, "spread" over the text, or "paper", its own
    networks (R) with one score for each position."""
    if kind == "runs":
        return runs.RunPolicy(config), runs.RunPosterior(config)
    if kind == "spread":
        posterior = spread.SpreadPosterior(config, budget)
        return spread.SpreadPolicy(config, posterior.timetable), posterior
    return mdmvi.UnmaskPolicy(config), mdmvi.OrderPosterior(config)


def check_resumable(checkpoint, models):
    """Raises KeyError, TypeError or ValueError where no run could go on from this checkpoint."""
    for key, kind in {"step": int, "logged": int, "optimizers": list}.items():
        if type(checkpoint[key]) is not kind:
            raise TypeError
    if min(checkpoint["step"], checkpoint["logged"]) < 0:
        raise ValueError
    needed = getattr(models, STAGES[checkpoint["stage"]])
    if checkpoint["step"] > 0 and needed is None:
        raise ValueError
    if checkpoint["generator"].dtype is not torch.uint8:
        raise TypeError


def load_checkpoint(path, device="cpu"):
    """What train.py wrote: (the dict, see train.Run.save; its tokenizer; its Models, on `device`).

    Raises UserError if it cannot be used.
    """
    advice = "give the checkpoint.pt that train.py wrote"
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: {advice}, or run python train.py first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint.get("version", VERSION) != VERSION:
            raise UserError(f"checkpoint {path} was written by an older version: train again")
        args, config = checkpoint["args"], mdmvi.ModelConfig(**checkpoint["config"])
        pieces = checkpoint["tokenizer"]  # or the text of a tokenizer.json
        tokenizer = LlamaTokenizer(pieces) if isinstance(pieces, str) else Tokenizer(pieces)
        if tokenizer.vocab_size != config.vocab_size or not 0 < args["tau"] < math.inf:
            raise ValueError
        if not isinstance(args["data"], str) or not isinstance(args["answers"], str):
            raise TypeError
        if not all(type(getattr(config, field.name)) is field.type for field in fields(config)):
            raise TypeError
        budget = positive(str(args["budget"]))  # raises for what the flag would not take
        orders = make_orders(args["orders"], config, budget)
        networks = (mdmvi.Denoiser(config), *orders, mdmvi.Denoiser(config))
        states = [checkpoint[name] for name in Models._fields]
        if states[0] is None or (states[1] is None) != (states[2] is None):
            raise ValueError
        for network, state in zip(networks, states):
            if state is not None:
                network.to(device).load_state_dict(state)
        models = Models(*(state and network for network, state in zip(networks, states)))
        check_resumable(checkpoint, models)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        why = type(error).__name__
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({why}): {advice}")
    return checkpoint, tokenizer, models


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------


def wilson(right, n):
    """95% Wilson interval of a share, in percent."""
    z = 1.96
    p, middle = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def mcnemar(first, second):
    """Exact two-sided McNemar p-value of two lists of bools on the same problems."""
    wins = sum(a and not b for a, b in zip(first, second))
    losses = sum(b and not a for a, b in zip(first, second))
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def judge(text, problem):
    """(Is what stands after #### right, is all of it?), by the solutions or by the reference."""
    if "solutions" in problem:
        endings = [solution.rpartition("####")[2].strip() for solution in problem["solutions"]]
        _, mark, ending = text.rpartition("####")
        return mark != "" and ending.strip() in endings, text in problem["solutions"]
    reference = problem["answer"]
    return final_number(text) == final_number(reference), solves_equations(text, reference)


def attempt(denoiser, policy, problems, tokenizer, tokens, canvas, rule, budget, batch, seed):
    """Generate a solution for every problem with one rule; an empty canvas stays unsolved.

    tokens, canvas: as from `encode_problems`, on the denoiser's device. Returns a dict of lists:
    answered, solved (bools), steps (numbers).
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    texts, steps = [], []
    for x, on in zip(tokens.split(batch), canvas.split(batch)):
        out = mdmvi.generate(denoiser, x.long(), on, rule, budget, policy, generator=generator)
        rows = zip(out.tokens.cpu(), on.cpu())
        texts += [answer_text(tokenizer, row, place) for row, place in rows]
        steps += out.steps.tolist()
    answered, solved = map(list, zip(*map(judge, texts, problems)))
    return {"answered": answered, "solved": solved, "steps": steps}


def score(run, models, budgets, rules, sweep):
    """Yield (row, attempt) for the table: the learned order, then every rule at its average steps,
    rounded up, and at its largest number; without a policy, every rule at the budgets; then every
    rule at the steps of `sweep`.

    run(rule, budget, denoiser) is an attempt. Each rule runs on the order-trained denoiser and on
    the baseline, and keeps the one with more right answers.
    """
    tries = [("stage 1" if models.policy is None else "order", models.denoiser)]
    tries += [] if models.baseline is None else [("baseline", models.baseline)]

    @functools.cache
    def best_model(rule, steps):
        results = [(name, run(rule, steps, denoiser)) for name, denoiser in tries]
        return max(results, key=lambda r: (sum(r[1]["answered"]), sum(r[1]["solved"])))

    def rule_rows(budget, match, steps, ours=None):
        for rule in rules:
            model, result = best_model(rule, steps)
            yield make_row(rule, budget, match, model, result, ours), result

    for budget in budgets:
        if models.policy is None:
            yield from rule_rows(budget, "", budget)
            continue
        ours = run("learned", budget, models.denoiser)
        row = make_row("learned", budget, "", "order", ours, None)
        yield row, ours
        yield from rule_rows(budget, "@Avg", max(1, math.ceil(row["average_steps"] - 1e-9)), ours)
        yield from rule_rows(budget, "@Max", max(1, max(ours["steps"])), ours)
    for steps in sweep:
        yield from rule_rows(steps, "sweep", steps)


def make_row(name, budget, match, model, result, ours):
    """One row as --json writes it; p-values are of `ours`, the learned order, against it."""
    n, steps = len(result["steps"]), [s for s in result["steps"] if s] or [0]  # 0: did not fit
    row = {
        "method": name,
        "budget": budget,
        "match": match,
        "model": model,
        "problems": n,
        "average_steps": sum(steps) / len(steps),
        "min_steps": min(steps),
        "max_steps": max(steps),
    }
    for key in ("answered", "solved"):
        row[key] = sum(result[key]) / n
        row["p_" + key] = None if ours is None else mcnemar(ours[key], result[key])
    return row


def p_text(p):
    if p is None:
        return ""
    return "< 1e-10" if p < 1e-10 else f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def table(rows):
    """The rows as plain text."""
    lines = [("method", "T", "model", "steps", "[min, max]", "answer %", "p", "solved %", "p")]
    for row in rows:
        cells = [f"{row['method']} {row['match']}".strip(), str(row["budget"]), row["model"]]
        cells += [f"{row['average_steps']:.2f}", f"[{row['min_steps']}, {row['max_steps']}]"]
        for key in ("answered", "solved"):
            low, high = wilson(round(row[key] * row["problems"]), row["problems"])
            cells += [f"{100 * row[key]:.1f} [{low:.1f}, {high:.1f}]", p_text(row["p_" + key])]
        lines.append(cells)
    return aligned(lines)


def by_length(problems, result):
    """The learned order by number of equations in the reference, as plain text."""
    lines = [("equations", "problems", "average steps", "answer %", "solved %")]
    answers = [problem["answer"] for problem in problems]
    lengths = [answer.count("<<") or answer.count("=") for answer in answers]  # prose has = too
    for n in sorted(set(lengths)):
        chosen = [i for i, length in enumerate(lengths) if length == n]
        steps = [result["steps"][i] for i in chosen if result["steps"][i]] or [0]
        cells = [str(n), str(len(chosen)), f"{sum(steps) / len(steps):.2f}"]
        for key in ("answered", "solved"):
            cells.append(f"{100 * sum(result[key][i] for i in chosen) / len(chosen):.1f}")
        lines.append(cells)
    return aligned(lines)


def print_scores(
    problems, tokenizer, models, budgets, rules=ALL_RULES, sweep=(), batch=128, seed=0, file=None
):
    """Score, print the table and the learned order by length, write the rows as JSON to `file`."""
    config = models.denoiser.config
    tokens, canvas, fits = encode_problems(problems, tokenizer, config, with_answers=False)
    if not all(fits):
        print(f"{fits.count(False)} prompts do not fit and count as wrong", file=sys.stderr)
    device = next(models.denoiser.parameters()).device
    data, results = (problems, tokenizer, tokens.to(device), canvas.to(device)), []

    def run(rule, budget, denoiser):
        return attempt(denoiser, models.policy, *data, rule, budget, batch, seed)

    with tqdm(score(run, models, budgets, rules, sweep), "scoring", unit="row") as bar:
        for row, result in bar:
            results.append((row, result))
            bar.set_postfix_str(f"{row['method']} {100 * row['answered']:.1f}%", refresh=False)
    rows = [row for row, _ in results]
    if file:  # first, as nobody may read the table
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")
    precision = "TF32" if device.type == "cuda" else "fp32"
    note = f"{precision}; p: exact McNemar test, learned against a rule"
    print(f"\n{len(problems)} problems, {note}\n\n{table(rows)}")
    for row, result in results:
        if row["method"] == "learned":
            print(f"\nlearned order, T={row['budget']}, by number of equations\n")
            print(by_length(problems, result))


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def pick_problems(checkpoint, data, n):
    """The first n problems of --data, or of the held-out stream that the checkpoint goes with."""
    if data:
        return load_gsm8k(data, checkpoint["args"]["answers"], "test")[:n]
    if checkpoint["args"]["data"] in TASKS:
        return TASKS[checkpoint["args"]["data"]](n or 2000, 1, True)
    raise UserError("this checkpoint was trained on --data: give other problems as --data here")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add_data(parser)
    add("--budget", type=positive, nargs="+", help="budgets T (default: the one trained for)")
    names = {"choices": ALL_RULES, "default": ALL_RULES, "metavar": "RULE"}
    add("--strategies", nargs="+", help="rules to compare with", **names)
    add("--sweep", type=positive, nargs="+", default=(), help="score the rules at these steps too")
    add("--problems", type=positive, help="how many (default: 2000 embedded ones, or the file)")
    add("--batch", type=positive, default=128, help="problems generated together")
    add("--seed", type=whole, default=0, help="seed of the draws")
    add_device(parser)
    add("--json", type=writable, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(argv)
    checkpoint, tokenizer, models = load_checkpoint(args.checkpoint, args.device)
    problems = pick_problems(checkpoint, args.data, args.problems)
    _, _, fits = encode_problems(problems, tokenizer, models.denoiser.config, with_answers=False)
    if not any(fits):
        raise UserError("no prompt fits this model's context: give others, or another --checkpoint")
    data = (problems, tokenizer, models, args.budget or [checkpoint["args"]["budget"]])
    print_scores(*data, args.strategies, args.sweep, args.batch, args.seed, args.json)


if __name__ == "__main__":
    run_main(main)
