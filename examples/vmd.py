"""Variational masked diffusion (Zhang et al., arXiv 2510.23606): a latent shared by all positions.

    python -m examples.vmd                          # two tokens in one step: the table, 4 minutes
    python -m examples.vmd --data d1 --seed 1       # one of the two data sets
    python -m examples.vmd --sudoku                 # 6x6 Sudoku in three steps

Tokens revealed in one step are drawn independently. Here z ~ N(0, I) is drawn first, and all of
them see it, so it can carry what they have in common. The bound of the denoiser given z becomes

    log p(x_0 | c) >= E_{z ~ q(z | c, x_0)} bound(x_0 | c, z) - KL( q(z | c, x_0) || N(0, I) ).

No order is learned: in the bound each token picks its step uniformly, and sampling follows a fixed
rule. Two models are trained, with the latent and without; they differ by nothing else.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import mdmvi
import train
from eval_gsm8k import wilson
from examples import sudoku
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

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class LatentEncoder(nn.Module):
    """q(z | c, x_0) = N(mu, diag exp(log_var)): clean tokens int64 [B, N], canvas bool [B, N] ->
    (mu, log_var), each float [B, latent_dim]. It reads everything and pools over the canvas."""

    def __init__(self, config, latent_dim):
        super().__init__()
        self.trunk = mdmvi.Trunk(config, min(2, config.n_layer))
        self.out = nn.Linear(config.n_embd, 2 * latent_dim)

    def forward(self, tokens, canvas):
        share = canvas / canvas.sum(1, keepdim=True)
        pooled = (self.trunk(tokens) * share[:, :, None]).sum(1)
        return self.out(pooled).float().chunk(2, dim=-1)


class LatentDenoiser(mdmvi.Denoiser):
    """p_theta(x^i | x_s, z): tokens int64 [B, N], z float [B, latent_dim] -> hidden [B, N, D].

    z is mapped into the embedding of every position. The encoder of z is a part of it.
    """

    def __init__(self, config, latent_dim):
        super().__init__(config)
        self.latent_dim = latent_dim
        self.from_z = nn.Linear(latent_dim, config.n_embd, bias=False)
        nn.init.normal_(self.from_z.weight, std=0.02)
        self.encoder = LatentEncoder(config, latent_dim)

    def forward(self, tokens, z, place=None):
        return self.trunk(tokens, self.from_z(z)[:, None], place)


class Given:
    """The denoiser with z [B, latent_dim] fixed: a denoiser as the bounds below take one.

    It is called with B rows, so it is not for mdmvi.generate, where finished rows leave the batch.
    """

    def __init__(self, denoiser, z):
        self.denoiser, self.z = denoiser, z
        self.logits = denoiser.logits
        self.mask_id = denoiser.mask_id

    def __call__(self, tokens, place=None):
        return self.denoiser(tokens, self.z, place)


# ------------------------------------------------------------------------------------------------
# Bounds
# ------------------------------------------------------------------------------------------------


def gaussian_kl(mu, log_var):
    """KL( N(mu, diag exp(log_var)) || N(0, I) ) in nats, [B]; mu and log_var [B, latent_dim]."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(-1)


def draw_latent(encoder, tokens, canvas, generator=None):
    """z ~ q(z | c, x_0) [B, latent_dim], reparameterised, and KL( q || N(0, I) ) [B] in nats."""
    mu, log_var = encoder(tokens, canvas)
    noise = torch.randn(mu.shape, device=mu.device, generator=generator)
    return mu + (0.5 * log_var).exp() * noise, gaussian_kl(mu, log_var)


def random_steps_loss(denoiser, tokens, canvas, budget, generator=None):
    """Negative bound of generation in T = budget uniformly random steps, nats per canvas token.

    At step s a token is still masked with probability t = (T - s) / T, and is revealed with
    probability 1 / (T - s) = 1 / (t T): mdmvi.mdm_loss, with t of 1/T, 2/T .. 1 only. Raises
    ValueError on a budget below 1.
    """
    mdmvi.check_positive(budget=budget)
    t = 1.0 - mdmvi.stratified_uniform(len(tokens), tokens.device, generator)
    t = (t * budget).ceil() / budget
    u = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    log_p = mdmvi.token_log_prob(denoiser, tokens, canvas & (u < t[:, None]))
    return -(log_p.sum(1) / t / canvas.sum(1)).mean()


def vmd_loss(denoiser, tokens, canvas, budget, generator=None):
    """Negative VMD bound for `budget` uniformly random steps, nats per canvas token (scalar).

    The budget matters: with a step for each token the bound without a latent can be tight
    already, and z has nothing to add. Raises ValueError on a budget below 1.
    """
    z, kl = draw_latent(denoiser.encoder, tokens, canvas, generator)
    loss = random_steps_loss(Given(denoiser, z), tokens, canvas, budget, generator)
    return loss + (kl / canvas.sum(1)).mean()


@torch.no_grad()
def vmd_elbo(denoiser, tokens, canvas, budget, samples, generator=None):
    """The bound that `vmd_loss` trains: estimate [B], nats per sequence.

    Each of the samples has a z and a path of its own. Raises ValueError on a budget or samples
    below 1.
    """
    mdmvi.check_positive(samples=samples)
    total = 0.0
    for _ in range(samples):
        z, kl = draw_latent(denoiser.encoder, tokens, canvas, generator)
        bound = mdmvi.uniform_elbo(Given(denoiser, z), tokens, canvas, budget, 1, generator)
        total = total + bound - kl
    return total / samples


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(denoiser, tokens, canvas, strategy, budget, temperature=0.0, generator=None):
    """mdmvi.generate with a latent: each row draws z ~ N(0, I) first and keeps it in all its steps.

    strategy: of mdmvi.RULES. Finished rows stay in the batch, so that rows and z go together.
    Returns an mdmvi.Generation. Raises ValueError on another strategy or a budget below 1.
    """
    if strategy not in mdmvi.RULES:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(mdmvi.RULES)}")
    mdmvi.check_positive(budget=budget)
    z = torch.randn(len(tokens), denoiser.latent_dim, device=tokens.device, generator=generator)
    tokens = tokens.masked_fill(canvas, denoiser.mask_id)
    reveal_step = torch.full_like(tokens, -1)
    masked = canvas
    for s in range(budget):
        if not masked.any():
            break
        logits = denoiser.logits(denoiser(tokens, z)[masked])
        if s == budget - 1:
            reveal = masked
        else:
            reveal = mdmvi.choose_by_rule(strategy, logits, masked, budget - s, None, generator)
        drawn = mdmvi.draw_tokens(logits, temperature, generator)
        tokens = torch.where(reveal, tokens.masked_scatter(masked, drawn), tokens)
        reveal_step = reveal_step.masked_fill(reveal, s)
        masked = masked & ~reveal
    return mdmvi.Generation(tokens, reveal_step, reveal_step.amax(1) + 1)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    name: str
    loss: Callable  # (denoiser, tokens, canvas, budget, generator) -> scalar
    elbo: Callable  # (denoiser, tokens, canvas, budget, samples, generator) -> [B]
    generate: Callable  # (denoiser, tokens, canvas, strategy, budget, temperature=, generator=)


PLAIN = Method("plain MDM", random_steps_loss, mdmvi.uniform_elbo, mdmvi.generate)
VMD = Method("VMD", vmd_loss, vmd_elbo, generate)
# In two dimensions the pairs often settle on a ring; on a line their slices of N(0, 1) are sharper.
RECIPES = {
    "pairs": {"size": "tiny", "latent_dim": 1, "budget": 1, "steps": 4000, "batch": 64, "lr": 1e-2},
    "sudoku": {
        "size": "small",
        "latent_dim": 4,
        "budget": 3,
        "steps": 5500,
        "batch": 32,
        "lr": 6e-3,
    },
}


def train_denoiser(method, recipe, vocab_size, length, draw, seed, device, label):
    """A denoiser trained by `method` on draw(n, generator) -> (tokens, canvas), of `length` tokens
    below `vocab_size`. Raises UserError where the loss is no number."""
    shape = train.SIZES[recipe["size"]]
    config = mdmvi.ModelConfig(vocab_size, length, *shape, mask_id=vocab_size, eos_id=0)
    torch.manual_seed(seed)
    if method is VMD:
        denoiser = LatentDenoiser(config, recipe["latent_dim"]).to(device)
    else:
        denoiser = mdmvi.Denoiser(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    groups = mdmvi.parameter_groups(denoiser, None, None, recipe["lr"])

    def loss_of():
        data = draw(recipe["batch"], generator)
        return method.loss(denoiser, *data, recipe["budget"], generator)

    sudoku.minimise(groups, loss_of, recipe["steps"], f"{label}, {method.name}")
    return denoiser.eval()


def mean_bound(method, denoiser, tokens, canvas, budget, seed):
    """Average bound of tokens [B, N], nats per sequence (float), from four samples each."""
    generator = torch.Generator(tokens.device).manual_seed(seed)
    return float(method.elbo(denoiser, tokens, canvas, budget, 4, generator).mean())


# ------------------------------------------------------------------------------------------------
# Two tokens: the pairs (k, k + 1 mod 10)
# ------------------------------------------------------------------------------------------------

WEIGHTS = {"d1": [1] * 10, "d2": list(range(1, 11))}  # of k = 0 .. 9
START = 10  # a prompt: attention sees distances only, to which two MASKs alone would look the same
DRAWN = 10_000  # pairs scored in each row of the table


def draw_pairs(kind, n, generator):
    """START and n pairs of digits: (tokens int64 [n, 3], canvas bool [n, 3])."""
    weights = torch.tensor(WEIGHTS[kind], dtype=torch.float, device=generator.device)
    first = torch.multinomial(weights, n, replacement=True, generator=generator)
    tokens = torch.stack((torch.full_like(first, START), first, (first + 1) % 10), 1)
    return tokens, tokens != START


def true_pairs(kind):
    """Probability of each pair of tokens, float64 [11, 11]."""
    truth = torch.zeros(START + 1, START + 1, dtype=torch.double)
    for k, weight in enumerate(WEIGHTS[kind]):
        truth[k, (k + 1) % 10] = weight / sum(WEIGHTS[kind])
    return truth


def score_pairs(method, denoiser, kind, budget, temperature, seed, device):
    """(share of valid pairs, total variation distance from the truth) of DRAWN generated pairs."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([[START, 0, 0]], device=device).repeat(DRAWN, 1)
    options = {"temperature": temperature, "generator": generator}
    out = method.generate(denoiser, tokens, tokens != START, "random", budget, **options)
    truth = true_pairs(kind)
    found = out.tokens.cpu() @ torch.tensor([0, START + 1, 1])
    share = torch.bincount(found, minlength=truth.numel()).view(truth.shape).double() / DRAWN
    return float(share[truth > 0].sum()), float((share - truth).abs().sum() / 2)


def run_pairs(kind, recipe, seed, device):
    """Train both models on the pairs of a kind: rows of the table, as --json writes them."""
    tokens, canvas = draw_pairs(kind, DRAWN, torch.Generator(device).manual_seed(seed + 1))
    rows = []
    draw = functools.partial(draw_pairs, kind)
    for method in (PLAIN, VMD):
        denoiser = train_denoiser(method, recipe, START + 1, 3, draw, seed, device, kind)
        bound = mean_bound(method, denoiser, tokens, canvas, recipe["budget"], seed)
        for temperature in (1.0, 0.0):
            valid, distance = score_pairs(
                method, denoiser, kind, recipe["budget"], temperature, seed, device
            )
            row = {"data": kind, "model": method.name, "temperature": temperature}
            rows.append({**row, "valid": valid, "total_variation": distance, "bound": bound})
    return rows


def print_pairs(rows, recipe):
    names = ("data", "model", "temperature", "valid pairs %", "total variation", "bound, nats")
    lines = [names]
    for row in rows:
        line = (row["data"], row["model"], f"{row['temperature']:.0f}", f"{100 * row['valid']:.1f}")
        lines.append((*line, f"{row['total_variation']:.3f}", f"{row['bound']:.3f}"))
    latent = f"{recipe['latent_dim']} latent dimensions"
    print(f"\n{DRAWN:,} pairs a row, T={recipe['budget']}, {latent}")
    for kind in dict.fromkeys(row["data"] for row in rows):
        truth = true_pairs(kind)
        print(f"{kind}: no bound can be above {float(truth.xlogy(truth).sum()):.3f}")
    print(f"\n{aligned(lines)}")


# ------------------------------------------------------------------------------------------------
# Sudoku, its cells in a few steps
# ------------------------------------------------------------------------------------------------

BOX = (2, 3)  # rows and columns of a box
TRAINING = 60_000  # puzzles to train on
PUZZLES = 500  # held-out ones that are scored


def run_sudoku(recipe, seed, device):
    """Train both models on puzzles: rows of the table, as --json writes them."""
    known = sudoku.problems(TRAINING, seed, False, BOX)
    held_out = sudoku.problems(PUZZLES, seed + 1, True, BOX)
    data = [x.to(device) for x in sudoku.encode(known, with_answers=True)]
    test = [x.to(device) for x in sudoku.encode(held_out, with_answers=True)]
    blank = [x.to(device) for x in sudoku.encode(held_out, with_answers=False)]
    vocab_size, length, budget = int(data[0].max()) + 1, data[0].shape[1], recipe["budget"]
    rows = []
    draw = functools.partial(train.pick, data)
    for method in (PLAIN, VMD):
        denoiser = train_denoiser(method, recipe, vocab_size, length, draw, seed, device, "sudoku")
        bound = mean_bound(method, denoiser, *test, budget, seed)
        for rule in mdmvi.RULES:
            generator = torch.Generator(device).manual_seed(seed)
            out = method.generate(denoiser, *blank, rule, budget, generator=generator)
            texts = [sudoku.grid_text(row.tolist()) for row in out.tokens]
            solved = sum(sudoku.solves(text, puzzle) for text, puzzle in zip(texts, held_out))
            row = {"data": "sudoku", "model": method.name, "rule": rule}
            rows.append({**row, "solved": solved / PUZZLES, "bound": bound})
    return rows


def print_sudoku(rows, recipe):
    lines = [("rule", PLAIN.name, VMD.name)]
    for rule in mdmvi.RULES:
        shares = []
        for method in (PLAIN, VMD):
            row = next(r for r in rows if (r["rule"], r["model"]) == (rule, method.name))
            low, high = wilson(round(row["solved"] * PUZZLES), PUZZLES)
            shares.append(f"{100 * row['solved']:.1f} [{low:.1f}, {high:.1f}]")
        lines.append((rule, *shares))
    bounds = {row["model"]: f"{row['bound']:.3f}" for row in rows}
    lines.append(("bound, nats", bounds[PLAIN.name], bounds[VMD.name]))
    latent = f"{recipe['latent_dim']} latent dimensions"
    about = f"{PUZZLES} held-out puzzles, T={recipe['budget']}, {latent}; solved %"
    print(f"\n{about}\n\n{aligned(lines)}")


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """(args, recipe) from the command line; raises UserError for what is out of range."""
    parser = Parser(__doc__)
    pairs, grids = RECIPES["pairs"], RECIPES["sudoku"]

    def add(name, text, **options):
        parser.add_argument(name, help=text, **options)

    def add_number(name, text):
        both = f"{text} (default: {pairs[name]}, with --sudoku {grids[name]})"
        add("--" + name.replace("_", "-"), both, type=positive)

    add("--data", "pairs: d1 is uniform, d2 is not (default: d1 d2)", nargs="+", choices=WEIGHTS)
    add("--sudoku", "puzzles instead of pairs", action="store_true")
    add_number("latent_dim", "dimensions of z")
    add_number("budget", "steps of generation, T")
    add_number("steps", "training steps of each model")
    add("--seed", "seed of the weights and of every draw", type=whole, default=0)
    add_device(parser)
    add("--json", "write the rows of the table as JSON", type=writable, metavar="FILE")
    args = parser.parse_args(argv)
    if args.data and args.sudoku:
        raise UserError("--data names pairs, --sudoku is without: give one of the two")
    recipe = dict(grids if args.sudoku else pairs)
    given = {name: getattr(args, name) for name in ("latent_dim", "budget", "steps")}
    recipe.update({name: value for name, value in given.items() if value is not None})
    return args, recipe


def main(argv=None):
    args, recipe = parse_args(argv)
    if args.sudoku:
        rows = run_sudoku(recipe, args.seed, args.device)
    else:
        kinds = dict.fromkeys(args.data or WEIGHTS)
        rows = [row for kind in kinds for row in run_pairs(kind, recipe, args.seed, args.device)]
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print_rows = print_sudoku if args.sudoku else print_pairs
    print_rows(rows, recipe)


if __name__ == "__main__":
    run_main(main)
