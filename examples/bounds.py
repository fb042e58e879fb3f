"""Bounds on the log-probability of given solutions, in nats a canvas token: the learned order,
uniform ones, and fixed rules.

    python -m examples.bounds --checkpoint out/checkpoint.pt                  # embedded problems
    python -m examples.bounds --checkpoint out5/checkpoint.pt --data test.jsonl

A rule that looks at x_s alone has one path to each x_0, so its bound is the log-probability of the
tokens along that path. Intervals: 95%, bootstrap over problems.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_gsm8k
import mdmvi
from eval_gsm8k import Parser, UserError, positive, run_main, seed

RULES = (*mdmvi.CONFIDENCE_RULES, "left_to_right")  # none of them draws


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
        spread = masked.to(log_p.dtype).masked_scatter(masked, log_p)
        total += (spread * reveal).sum(1)
        masked = masked & ~reveal
    return total


def interval(nats, draws=2000):
    """Mean and 95% bootstrap interval of a vector, as text."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(nats), (draws, len(nats)), generator=generator)
    low, high = nats[rows].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(nats.mean()):.4f} [{low:.4f}, {high:.4f}]"


def measure(bound, tokens, canvas, batch, name):
    """bound(tokens, canvas) -> nats [B], batch by batch, as nats a canvas token [M] on the CPU."""
    parts = list(zip(tokens.split(batch), canvas.split(batch)))
    nats = [bound(x, on) for x, on in tqdm(parts, desc=name, unit="batch", mininterval=1.0)]
    return torch.cat(nats).cpu() / canvas.sum(1).cpu()


def main(argv=None):
    parser = Parser(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add("--data", help=".json/.jsonl(.gz/.xz) file, folder or hub name (default: embedded ones)")
    add("--problems", type=positive, help="how many (default: 2000 embedded ones, or the file)")
    add("--samples", type=positive, default=4, help="paths drawn for each problem")
    add("--batch", type=positive, default=64, help="problems scored together")
    add("--seed", type=seed, default=0, help="seed of the draws")
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    eval_gsm8k.check_device(args.device)
    checkpoint = eval_gsm8k.load_checkpoint(args.checkpoint)
    models = eval_gsm8k.build_models(checkpoint, args.device)
    if models.policy is None or models.plain is None:
        raise UserError("this checkpoint has no learned order and baseline: give one after stage 2")
    problems = eval_gsm8k.pick_problems(checkpoint, args.data, args.problems)
    tokenizer = eval_gsm8k.tokenizer_of(checkpoint["tokenizer"])
    layout = (checkpoint["config"]["max_len"], checkpoint["config"]["canvas_len"])
    tokens, canvas, fits = eval_gsm8k.encode_problems(problems, tokenizer, *layout)
    if not any(fits):
        raise UserError("no problem fits this model's context: give others, or train a longer one")
    tokens, canvas = tokens[fits].long().to(args.device), canvas[fits].to(args.device)
    budget, tau = checkpoint["args"]["budget"], checkpoint["args"]["tau"]
    generator = torch.Generator(args.device).manual_seed(args.seed)

    def over_orders(denoiser, policy=None, posterior=None):
        networks, options = (denoiser, policy, posterior), (budget, tau, args.samples, generator)
        return lambda x, on: mdmvi.order_elbo(*networks, x, on, *options)

    def along(rule):
        return lambda x, on: rule_bound(models.plain, x, on, rule, budget)

    bounds = {
        ("learned", "order"): over_orders(models.denoiser, models.policy, models.posterior),
        ("uniform", "order"): over_orders(models.denoiser),
        ("uniform", "plain"): over_orders(models.plain),
        **{(rule, "plain"): along(rule) for rule in RULES},
    }
    lines = [("order", "model", "nats a token")]
    for (order, model), bound in bounds.items():
        nats = measure(bound, tokens, canvas, args.batch, order)
        lines.append((order, model, interval(nats)))
    print(f"\n{len(tokens)} of {len(fits)} problems fit; T = {budget}, bounds on log p\n")
    print(eval_gsm8k.aligned(lines))


if __name__ == "__main__":
    run_main(main)
