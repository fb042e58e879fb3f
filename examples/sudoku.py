"""Sudoku: easy cells first (Kim et al., arXiv 2502.06768), and a learned order beside fixed rules.

    python -m examples.sudoku                         # 6x6 grids, boxes of 2 x 3, on a CPU
    python -m examples.sudoku --budget 6 --seed 1     # fewer steps, other grids, other weights
    python -m examples.sudoku --box 3x3 --size 6m --batch 256 --steps 50000     # 9x9, on a GPU

The clues are the prompt, the blanks the canvas. A denoiser is trained on solved grids, then frozen,
so all rows of the table are samplers of one network. Which cell follows from which is more than a
small posterior can tell from a solution. So q is a search here, with nothing learned in it: the
order in which the denoiser becomes sure of the cells of the solved grid. The policy, which sees the
puzzle only, learns to foresee it.
"""

import json
import math
import random
import statistics
import zlib
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import mdmvi
import train
from eval_gsm8k import mcnemar, p_text, wilson
from examples.command_line import (
    Parser,
    UserError,
    add_device,
    aligned,
    positive,
    run_main,
    whole,
    writable,
)
from examples.muon import make_optimizers

# --------------------------------------------------------------------------------------------------
# Puzzles. A grid is a list of side * side numbers, row by row, 0 for a blank; `box` is (rows,
# columns) of a box, and side = rows * columns.
# --------------------------------------------------------------------------------------------------

HELD_OUT = 8  # one solved grid in eight is kept for testing


def units(box):
    """For each cell its row, its column and its box, as three numbers below 3 * side."""
    (rows, columns), side = box, box[0] * box[1]
    places = [divmod(i, side) for i in range(side * side)]
    return [(y, side + x, 2 * side + y // rows * rows + x // columns) for y, x in places]


def solutions(grid, box, limit, rng=None):
    """Up to `limit` solutions of a grid, by backtracking on the cell with the fewest choices.

    rng: a random.Random that picks the order in which a cell's values are tried.
    """
    side, unit_of = box[0] * box[1], units(box)
    row, column, square = zip(*unit_of)
    free = [(1 << side) - 1] * (3 * side)  # bit v of a unit is set while v + 1 is not in it
    grid, found = list(grid), []
    for i, value in enumerate(grid):
        if value:
            for unit in unit_of[i]:
                free[unit] &= ~(1 << (value - 1))

    def search(blanks):
        if not blanks:
            found.append(list(grid))
            return
        choices = [free[row[j]] & free[column[j]] & free[square[j]] for j in blanks]
        fewest = min(choices, key=int.bit_count)
        i = blanks[choices.index(fewest)]
        values = [v for v in range(side) if fewest >> v & 1]
        for v in rng.sample(values, len(values)) if rng else values:
            grid[i] = v + 1
            for unit in unit_of[i]:
                free[unit] ^= 1 << v
            search([j for j in blanks if j != i])
            for unit in unit_of[i]:
                free[unit] ^= 1 << v
            if len(found) >= limit:
                return

    search([i for i, value in enumerate(grid) if not value])
    return found


def dig(solution, box, rng):
    """A puzzle with this one solution and no clue to spare: cells blanked in random order."""
    puzzle = list(solution)
    for i in rng.sample(range(len(puzzle)), len(puzzle)):
        puzzle[i] = 0
        if len(solutions(puzzle, box, 2)) > 1:
            puzzle[i] = solution[i]
    return puzzle


def shuffled_lines(size, side, rng):
    """A permutation of `side` lines that keeps neighbourhoods of `size` lines together."""
    starts = rng.sample(range(0, side, size), side // size)
    return [start + i for start in starts for i in rng.sample(range(size), size)]


def shuffled(grids, box, rng):
    """The same permutation of digits, bands, stacks and lines for each of `grids`.

    A puzzle stays as hard as it is, and keeps its one solution.
    """
    side = box[0] * box[1]
    rows, columns = (shuffled_lines(size, side, rng) for size in box)
    digit = [0, *rng.sample(range(1, side + 1), side)]
    cells = [row * side + column for row in rows for column in columns]
    return [[digit[grid[i]] for i in cells] for grid in grids]


def as_text(grid, side):
    """Rows of digits, "." for a blank."""
    rows = ("".join(map(str, grid[i : i + side])) for i in range(0, len(grid), side))
    return "\n".join(rows).replace("0", ".")


def problems(n, seed, held_out, box, base=400):
    """n dicts {question, answer, box} from a seeded stream: puzzle and solution as text.

    `base` puzzles are dug from random grids, all others are permutations of these. held_out picks
    the side of the split: the two sides share no solved grid, whatever the seeds.
    """
    rng, side, found = random.Random(seed), box[0] * box[1], []
    grids = [solutions([0] * side * side, box, 1, rng)[0] for _ in range(base)]
    puzzles = [(dig(grid, box, rng), grid) for grid in grids]
    while len(found) < n:
        puzzle, solution = (as_text(g, side) for g in shuffled(rng.choice(puzzles), box, rng))
        if (zlib.crc32(solution.encode()) % HELD_OUT == 0) == held_out:
            found.append({"question": puzzle, "answer": solution, "box": box})
    return found


def solves(text, problem):
    """Does `text` keep every clue and have each digit once in each row, column and box?"""
    question, box = problem["question"], problem["box"]
    if len(text) != len(question) or any(q not in (".", t) for q, t in zip(question, text)):
        return False
    cells, side = text.replace("\n", ""), box[0] * box[1]
    filled = {(unit, value) for value, three in zip(cells, units(box)) for unit in three}
    return set(cells) == set("123456789"[:side]) and len(filled) == 3 * side * side


def encode(problems, with_answers=True):
    """(tokens int64 [M, N], canvas bool [M, N]) of problems of one size, N = side * (side + 1).

    A row is 0, then the grid's text: a digit is its own token, a line break is side + 1, and a
    blank is 0, or its digit with_answers. The canvas is the blanks.
    """
    side = problems[0]["box"][0] * problems[0]["box"][1]
    ids = {".": 0, "\n": side + 1, **{str(v): v for v in range(1, side + 1)}}
    key = "answer" if with_answers else "question"
    tokens = torch.tensor([[0, *map(ids.get, problem[key])] for problem in problems])
    canvas = [[False, *(char == "." for char in problem["question"])] for problem in problems]
    return tokens, torch.tensor(canvas)


def grid_text(row):
    """The text of one row of tokens (a list), as `encode` lays it out."""
    side = math.isqrt(len(row))
    return "".join("." if t == 0 else "\n" if t > side else str(t) for t in row[1:])


# --------------------------------------------------------------------------------------------------
# Orders
# --------------------------------------------------------------------------------------------------

SURE = 0.95


@torch.no_grad()
def sure_first_steps(denoiser, tokens, canvas, budget):
    """The order in which the denoiser becomes sure of known tokens, step by step.

    A step reveals all masked places whose most likely token has a probability above SURE, and the
    surest one where there is none; the last step, not told here, all that is left. Yields T - 1
    times (hidden [B, N, D], masked bool [B, N], reveal bool [B, N]).
    """
    masked = canvas
    for _ in range(budget - 1):
        hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
        p = mdmvi.confidence("top_prob", denoiser.logits(hidden[masked]))
        p = masked.float().masked_scatter(masked, p)
        reveal = masked & (p > SURE) | mdmvi.top_k(p, masked, 1)
        yield hidden, masked, reveal
        masked = masked & ~reveal


def sure_first_order(denoiser, tokens, canvas, budget):
    """The order of `sure_first_steps`: step int64 [B, N], -1 off the canvas."""
    step = torch.where(canvas, budget - 1, -1)
    for s, (_, _, reveal) in enumerate(sure_first_steps(denoiser, tokens, canvas, budget)):
        step = step.masked_fill(reveal, s)
    return step


def states_on_the_way(denoiser, tokens, canvas, budget):
    """What the policy sees in `sure_first_steps`, and what it should do.

    Returns (hidden [M, D], reveal float [M]) of the cells that are masked, of all steps together.
    """
    steps = sure_first_steps(denoiser, tokens, canvas, budget)
    found = [(hidden[masked], reveal[masked]) for hidden, masked, reveal in steps]
    return [torch.cat(parts).float() for parts in zip(*found)]


def search_posterior(denoiser, budget, tau):
    """The search as a posterior: (tokens, canvas) -> log_alpha [B, N]. Its rho is about 0 or 1."""

    def log_alpha(tokens, canvas):
        return -10 * tau * (sure_first_order(denoiser, tokens, canvas, budget) + 1.0)

    return log_alpha


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

TRAINING = 60_000  # puzzles to train on
TAU = 0.1
LR, POLICY_LR, BOUND_LR = 6e-3, 1e-2, 1e-3  # peaks: denoiser; policy on states; policy by the bound
SEARCHED = 4096  # puzzles whose states on the way the policy learns first
STATE_STEPS, STATES = 3000, 1024  # steps of that, and cells in each
BOUND_STEPS, BOUND_BATCH = 300, 32  # steps by the bound, and puzzles in each


def minimise(groups, loss_of, steps, label):
    """Minimise loss_of() over `groups` of parameters. Raises UserError where it is no number."""
    optimizers = make_optimizers(groups, "muon")
    total, bar = 0.0, tqdm(range(steps), desc=label, unit="step", mininterval=1.0)
    for step in bar:
        loss = loss_of()
        loss.backward()
        mdmvi.update(optimizers, step, steps)
        total = total + loss.detach()
        if step % 20 == 19 or step == steps - 1:  # the only place that waits for the device
            mean = float(total) / (step % 20 + 1)
            if not math.isfinite(mean):
                bar.close()
                raise UserError(f"loss is {mean} at step {step + 1}: try another --seed")
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            total = 0.0


def make_networks(box, size, seed, device):
    """A new denoiser and policy for grids of this box."""
    side, shape = box[0] * box[1], train.SIZES[size]
    vocab_size, length = side + 2, side * (side + 1)
    config = mdmvi.ModelConfig(
        vocab_size, length, *shape, mask_id=vocab_size, eos_id=0, canvas_len=side * side
    )
    torch.manual_seed(seed)
    denoiser = mdmvi.Denoiser(config).to(device)
    return denoiser, mdmvi.UnmaskPolicy(config, depth=2).to(device)


def train_denoiser(denoiser, data, steps, batch, generator, compile=False):
    """Stage 1: the plain loss on data = (tokens, canvas); the denoiser is frozen after it."""
    model = denoiser
    if compile:
        # A GPU would wait for the host to launch the operations of a small model one by one
        model = torch.compile(denoiser)
        try:
            with train.autocast(generator.device):  # as below, or it would be compiled twice
                mdmvi.token_log_prob(model, *(x[:batch] for x in data))
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, say
            why = f"torch.compile does not work here ({type(error).__name__})"
            raise UserError(f"{why}: pass --no-compile")

    def loss_of():
        with train.autocast(generator.device):
            return mdmvi.mdm_loss(model, *train.pick(data, batch, generator), generator)

    minimise(mdmvi.parameter_groups(denoiser, None, None, LR), loss_of, steps, "denoiser")
    denoiser.eval().requires_grad_(False)


def train_policy(denoiser, policy, data, budget, generator):
    """Stage 2: the policy learns the states on the way of some puzzles, then the bound on all."""
    tokens, canvas = train.pick(data, SEARCHED, generator)
    found = []
    for x, on in tqdm(list(zip(tokens.split(64), canvas.split(64))), desc="search", unit="batch"):
        with train.autocast(generator.device):
            found.append(states_on_the_way(denoiser, x, on, budget))
    states = [torch.cat(parts) for parts in zip(*found)]

    def state_loss():
        hidden, reveal = train.pick(states, STATES, generator)
        return F.binary_cross_entropy_with_logits(policy(hidden, None), reveal)

    def bound_loss():
        rows = train.pick(data, BOUND_BATCH, generator)
        with train.autocast(generator.device):
            posterior = search_posterior(denoiser, budget, TAU)
            return mdmvi.importance_order_loss(
                denoiser, policy, posterior, *rows, budget, TAU, paths=1, generator=generator
            )[0]

    for loss_of, lr, steps, label in (
        (state_loss, POLICY_LR, STATE_STEPS, "policy, states"),
        (bound_loss, BOUND_LR, BOUND_STEPS, "policy, bound"),
    ):
        groups = mdmvi.parameter_groups(None, policy, None, policy_lr=lr)
        minimise(groups, loss_of, steps, label)
    policy.eval()


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------

CELL_BY_CELL = ("random", "top_prob", "top_prob_margin")  # compared by Kim et al., one cell a step


def bounds(denoiser, policy, tokens, canvas, budget, seed):
    """Bounds of the learned and of uniformly random orders, nats per blank."""
    posterior = search_posterior(denoiser, budget, TAU)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    data, networks = (tokens, canvas, budget), (denoiser, policy, posterior)
    learned = mdmvi.order_elbo(*networks, *data, TAU, 4, generator)
    uniform = mdmvi.uniform_elbo(denoiser, *data, 4, generator)
    return [float(nats.sum() / canvas.sum()) for nats in (learned, uniform)]


def attempt(denoiser, policy, puzzles, blank, strategy, budget, seed):
    """Solve every puzzle with one strategy: (solved: list of bools, steps: list of ints)."""
    generator = torch.Generator(blank[0].device).manual_seed(seed)
    texts, steps = [], []
    for x, on in zip(*(part.split(256) for part in blank)):
        out = mdmvi.generate(denoiser, x, on, strategy, budget, policy, generator=generator)
        texts += [grid_text(row) for row in out.tokens.tolist()]
        steps += out.steps.tolist()
    return [solves(text, puzzle) for text, puzzle in zip(texts, puzzles)], steps


def score(denoiser, policy, puzzles, blank, budget, seed):
    """Rows of the table, as --json writes them.

    The learned order; every rule in as many steps as it takes on average, rounded up, and at most;
    some rules cell by cell. p is of the learned order against a rule.
    """
    rows, (ours, taken) = [], attempt(denoiser, policy, puzzles, blank, "learned", budget, seed)

    def add(method, match, solved, steps, p=None):
        row = {"method": method, "match": match, "problems": len(solved), "p": p}
        row["solved"] = statistics.fmean(solved)
        row |= {"average_steps": statistics.fmean(steps), "min_steps": min(steps)}
        rows.append({**row, "max_steps": max(steps)})

    add("learned", "", ours, taken)
    average = math.ceil(rows[0]["average_steps"] - 1e-9)
    plan = [(rule, "@Avg", average) for rule in mdmvi.RULES]
    plan += [(rule, "@Max", max(taken)) for rule in mdmvi.RULES]
    plan += [(rule, "one a step", int(blank[1].sum(1).max())) for rule in CELL_BY_CELL]
    for rule, match, steps in tqdm(plan, desc="scoring", unit="rule"):
        solved, used = attempt(denoiser, None, puzzles, blank, rule, steps, seed)
        add(rule, match, solved, used, None if match == "one a step" else mcnemar(ours, solved))
    return rows


def print_table(rows):
    lines = [("method", "steps", "[min, max]", "solved %", "p")]
    for row in rows:
        low, high = wilson(round(row["solved"] * row["problems"]), row["problems"])
        line = (f"{row['method']} {row['match']}".strip(), f"{row['average_steps']:.2f}")
        line += (f"[{row['min_steps']}, {row['max_steps']}]",)
        lines.append(
            (*line, f"{100 * row['solved']:.1f} [{low:.1f}, {high:.1f}]", p_text(row["p"]))
        )
    about = "p: exact McNemar test of learned against a rule"
    print(f"\n{rows[0]['problems']} held-out puzzles; {about}\n")
    print(aligned(lines))


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

BOXES = {"2x2": (2, 2), "2x3": (2, 3), "2x4": (2, 4), "3x3": (3, 3)}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--box", choices=BOXES, default="2x3", help="rows x columns of a box; 3x3 is the 9x9 grid")
    add("--size", choices=train.SIZES, default="small", help="shape of the denoiser")
    add("--steps", type=positive, default=6000, help="plain training steps")
    add("--batch", type=positive, default=32, help="puzzles in each")
    add("--budget", type=positive, default=9, help="steps of generation, T")
    add("--problems", type=positive, default=500, help="held-out puzzles that are scored")
    add("--seed", type=whole, default=0, help="seed of the puzzles, the weights and every draw")
    gpu = torch.cuda.is_available()
    add_device(parser)
    add("--compile", action=BooleanOptionalAction, default=gpu, help="torch.compile the denoiser")
    add("--json", type=writable, metavar="FILE", help="write the rows of the table as JSON")
    args = parser.parse_args(argv)
    if args.budget == 1:
        raise UserError("--budget is 1: with one step there is no order, give 2 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    box, device, budget = BOXES[args.box], torch.device(args.device), args.budget
    known = problems(TRAINING, args.seed, False, box)
    puzzles = problems(args.problems, args.seed + 1, True, box)
    data = [x.to(device) for x in encode(known)]
    answers, blank = ([x.to(device) for x in encode(puzzles, kind)] for kind in (True, False))
    denoiser, policy = make_networks(box, args.size, args.seed, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    train_denoiser(denoiser, data, args.steps, args.batch, generator, args.compile)
    train_policy(denoiser, policy, data, budget, generator)
    learned, uniform = bounds(denoiser, policy, *(x[:256] for x in answers), budget, args.seed)
    rows = score(denoiser, policy, puzzles, blank, budget, args.seed)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nELBO at T={budget}, nats per blank, {min(256, len(puzzles))} held-out puzzles:")
    print(f"  learned order          {learned:.4f}\n  uniform random order   {uniform:.4f}")
    print_table(rows)


if __name__ == "__main__":
    run_main(main)
