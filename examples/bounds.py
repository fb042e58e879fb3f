"""Bounds on the log-probability of given solutions, in nats a canvas token: the learned order,
uniform ones, fixed rules, and the best that an order of runs could have.

    python -m examples.bounds                       # embedded problems, out/checkpoint.pt
    python -m examples.bounds --checkpoint out5/checkpoint.pt --data test.jsonl
    python -m examples.bounds --checkpoint out/plain.pt      # before stage 2: can an order win?

A rule that looks at x_s alone has one path to each x_0, so its bound is the log-probability of the
tokens along that path. "spread" is the timetable of examples/spread.py before the search;
"searched" is the one after it, only for a run of --orders spread at the T it was trained for. Both
are measured on the baseline. "best runs" is no bound but a ceiling: each solution is known and cut
where its probability is highest, and the order costs no KL. Runs from the left with sharp borders,
rho 0 or 1, have no more with this denoiser. Intervals: 95%, bootstrap over problems; the last
column is of the differences on the same problems.
"""

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_gsm8k
import mdmvi
from examples import runs
from examples.command_line import (
    Parser,
    UserError,
    add_data,
    add_device,
    aligned,
    positive,
    run_main,
    whole,
)
from examples.spread import canvas_place, equal_parts
from examples.tokenizer import encode_problems

FIXED_RULES = (*mdmvi.CONFIDENCE_RULES, "left_to_right")  # none of them draws
ROWS = (*FIXED_RULES, "spread", "best runs")


@torch.no_grad()
def rule_bound(denoiser, tokens, canvas, strategy, budget):
    """log p of x_0 along the path of a rule, nats [B]: what it reveals at each step is x_0's."""
    masked, total = canvas, torch.zeros(len(tokens), device=tokens.device)
    for s in range(budget):
        hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
        logits = denoiser.logits(hidden[masked]).float()
        if s == budget - 1:
            reveal = masked
        else:
            reveal = mdmvi.choose_by_rule(strategy, logits, masked, budget - s)
        log_p = -F.cross_entropy(logits, tokens[masked], reduction="none")
        placed = masked.to(log_p.dtype).masked_scatter(masked, log_p)
        total += (placed * reveal).sum(1)
        masked = masked & ~reveal
    return total


@torch.no_grad()
def timetable_bound(denoiser, tokens, canvas, timetable):
    """log p of x_0 along a timetable, nats [B]; timetable int64 [L] has the step of each place."""
    step, total = timetable[canvas_place(canvas)], torch.zeros(len(tokens), device=tokens.device)
    for s in range(int(timetable.max()) + 1):
        log_p = mdmvi.token_log_prob(denoiser, tokens, canvas & (step >= s))
        total += (log_p * (step == s)).sum(1)
    return total


def best_runs(denoiser, tokens, canvas, budget):
    """log p of x_0 in its best cut into at most `budget` runs from the left, nats [B]."""
    values = runs.run_log_prob(denoiser, tokens, canvas)
    L = values.shape[1]
    values = values.masked_fill(torch.ones_like(values[0]).tril().bool(), -torch.inf)
    best = F.pad(values[:, :, L], (0, 1))  # from each place on, in one run
    for _ in range(budget - 1):
        best = F.pad((values + best[:, None]).amax(2), (0, 1))
    return best[:, 0]


def interval(nats, draws=2000):
    """Mean and 95% bootstrap interval of a vector, as text."""
    n, generator = len(nats), torch.Generator().manual_seed(0)
    means = [nats[torch.randint(n, (n,), generator=generator)].mean() for _ in range(draws)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(nats.mean()):.4f} [{low:.4f}, {high:.4f}]"


def measure(bound, tokens, canvas, batch, name):
    """bound(tokens, canvas) -> nats [B], batch by batch, as nats a canvas token [M] on the CPU."""
    parts = list(zip(tokens.split(batch), canvas.split(batch)))
    nats = [bound(x, on) for x, on in tqdm(parts, desc=name, unit="batch", mininterval=1.0)]
    return torch.cat(nats).cpu() / canvas.sum(1).cpu()


def print_bounds(models, trained, tokens, canvas, budget, rows=(), samples=4, batch=64, seed=0):
    """Print bounds on given solutions, tokens int [M, N] and canvas bool [M, N], at `budget` steps.

    models: an `eval_gsm8k.Models`; trained: the flags it was trained with, a dict; rows: of ROWS,
    beside learned and uniform orders; samples: paths drawn for each solution.
    """
    name, plain = "baseline", models.baseline
    if plain is None:
        name, plain = "stage 1", models.denoiser
    device = tokens.device
    generator = torch.Generator(device).manual_seed(seed)

    def learned(x, on):
        networks = (models.denoiser, models.policy, models.posterior)
        return mdmvi.order_elbo(*networks, x, on, budget, trained["tau"], samples, generator)

    def uniform(denoiser):
        return lambda x, on: mdmvi.uniform_elbo(denoiser, x, on, budget, samples, generator)

    timetables = {"spread": equal_parts(int(canvas.sum(1).max()), budget).to(device)}
    has_order = models.policy is not None
    if rows and has_order and trained["orders"] == "spread" and trained["budget"] == budget:
        timetables["searched"] = models.posterior.timetable
        rows = [*rows, "searched"]

    def along(rule):
        if rule == "best runs":
            return lambda x, on: best_runs(plain, x, on, budget)
        if rule in timetables:
            return lambda x, on: timetable_bound(plain, x, on, timetables[rule])
        return lambda x, on: rule_bound(plain, x, on, rule, budget)

    bounds = {}
    if has_order:
        bounds = {("learned", "order"): learned, ("uniform", "order"): uniform(models.denoiser)}
    if models.baseline is not None or not has_order:  # a frozen denoiser is there already
        bounds["uniform", name] = uniform(plain)
    bounds |= {(rule, name): along(rule) for rule in rows}
    last = "learned is ahead by" if has_order else ""
    lines, ours = [("order", "model", "nats a token", last)], None
    for (order, model), bound in bounds.items():
        nats = measure(bound, tokens.long(), canvas, batch, order)
        ours = nats if order == "learned" else ours
        ahead = "" if ours is None or ours is nats else interval(ours - nats)
        lines.append((order, model, interval(nats), ahead))
    print(f"\nbounds on log p at T = {budget}, {len(tokens)} problems\n\n{aligned(lines)}")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add_data(parser)
    add("--budget", type=positive, help="steps, T (default: the budget it was trained for)")
    names = {"choices": ROWS, "default": ROWS, "metavar": "ROW"}
    add("--strategies", nargs="+", help="rows beside learned and uniform orders", **names)
    add("--problems", type=positive, help="how many (default: 2000 embedded ones, or the file)")
    add("--samples", type=positive, default=4, help="paths drawn for each problem")
    add("--batch", type=positive, default=64, help="problems scored together")
    add("--seed", type=whole, default=0, help="seed of the draws")
    add_device(parser)
    args = parser.parse_args(argv)
    checkpoint, tokenizer, models = eval_gsm8k.load_checkpoint(args.checkpoint, args.device)
    problems = eval_gsm8k.pick_problems(checkpoint, args.data, args.problems)
    tokens, canvas, fits = encode_problems(problems, tokenizer, models.denoiser.config)
    if not any(fits):
        raise UserError("no problem fits this model's context: give others, or train a longer one")
    if not all(fits):
        print(f"{fits.count(False)} problems do not fit and are left out", file=sys.stderr)
    data = (tokens[fits].to(args.device), canvas[fits].to(args.device))
    settings = (args.strategies, args.samples, args.batch, args.seed)
    budget = args.budget or checkpoint["args"]["budget"]
    print_bounds(models, checkpoint["args"], *data, budget, *settings)


if __name__ == "__main__":
    run_main(main)
