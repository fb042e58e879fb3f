"""Orders of runs, train.py's default: a step reveals neighbouring tokens, from left to right.

    python train.py --orders runs

The canvas is cut into runs. The posterior says where; a search first teaches it the best cuts of
some training problems under the denoiser, by dynamic programming. After it a tenth of the steps
that the paper's free scores need is enough. It suits text whose neighbours can be predicted
together. To copy it: this file, mdmvi.py and tqdm (README).
"""

import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import mdmvi

SEARCH_STEPS, SEARCH_BATCH = 200, 32  # of the posterior's training, once all runs are measured


class RunPosterior(mdmvi.OrderPosterior):
    """An `OrderPosterior` whose orders are runs: log alpha falls by up to 1 at each position.

    A cut is a sigmoid in front of each position, sharpened by SHARPEN; log alpha is minus the sum
    of the cuts up to a position. When each token has a number of its own, errors of about tau put
    tokens that belong together into different steps; here a run moves as one. It is meant for
    tau <= 0.1: then even a cut of 0.5 lowers log alpha by 5 tau, which keeps two runs in different
    steps. It starts as a soft front from the left.
    """

    SHARPEN = 2.0

    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, -2.2)  # tau = 0.1: rho falls to 1 / e in 8 places

    def forward(self, tokens, canvas):
        cut = (self.SHARPEN * self.scores(tokens, canvas)).sigmoid()
        return -(cut * canvas).cumsum(1)

    def start_from(self, denoiser):
        """Copy embedding, first blocks and norm of a `Denoiser`: it can read. Returns itself.

        The embedding is frozen: with a large vocabulary it is most of the cost. Both need one
        config, but for the lengths: RuntimeError where width or vocabulary differ, KeyError where
        the denoiser has too few blocks, AttributeError where it is no `Denoiser` (then leave this
        out). Another number of heads is not noticed.
        """
        state = denoiser.trunk.state_dict()
        self.trunk.load_state_dict({name: state[name] for name in self.trunk.state_dict()})
        self.trunk.wte.requires_grad_(False)
        return self


class RunPolicy(mdmvi.UnmaskPolicy):
    """An `UnmaskPolicy` for runs: pi_i is the product of sigmoid(u_j) over j <= i in M_s.

    A position should be revealed only where all before it are likely to be. The product makes pi
    fall from left to right, which separate sigmoids do not ensure. The draws stay independent. The
    first position of M_s has no factor: pi = 1 (up to 1e-6), as rho = 1 there in every order of
    runs. A block of attention lets a position see what is at the others. `config` is of the width
    of the hidden states; no row may be longer than its max_len.
    """

    def __init__(self, config):
        super().__init__(config)
        self.block = mdmvi.Block(config)
        nn.init.constant_(self.outer.bias, 3.0)  # at first a run goes on with probability 0.95

    def forward(self, hidden, masked):
        log_go_on = F.logsigmoid(super().forward(self.block(hidden), masked))
        later = masked & (masked.cumsum(1) > 1)
        log_pi = log_go_on.masked_fill(~later, 0.0).cumsum(1)
        return log_pi - mdmvi.log_one_minus(log_pi)  # the logit of pi, at most 13.8


def canvas_positions(canvas, L):
    """Where the canvas of each row lies: (position int64 [B, L], used bool [B, L])."""
    position = canvas.int().argsort(dim=1, descending=True, stable=True)[:, :L]
    return position, torch.arange(L, device=canvas.device) < canvas.sum(1, keepdim=True)


@torch.no_grad()
def run_log_prob(denoiser, tokens, canvas, L=None):
    """log p_theta of every run, nats fp32 [B, L, L + 1], from one denoiser pass a canvas place.

    Entry [:, i, j] is for the places i .. j - 1 of known solutions, revealed together after all
    before i; it is 0 for j <= i. L, the most places a canvas has, is by default that of the batch.
    """
    L = L or int(canvas.sum(1).max())
    position, _ = canvas_positions(canvas, L)
    before, values = canvas.cumsum(1) - 1, []
    for i in range(L):
        log_p = mdmvi.token_log_prob(denoiser, tokens, canvas & (before >= i))
        values.append(log_p.gather(1, position).cumsum(1))
    return F.pad(torch.stack(values, 1), (1, 0))


def cut_loss(posterior, tokens, canvas, values, budget, optimism=0.0, price=0.3):
    """Teaches a `RunPosterior` where to cut: a loss in nats per canvas token (scalar).

    Minus the expected log p_theta of solutions revealed in runs, plus `price` nats a run. Cuts are
    drawn one by one from sigmoid(scores), not sharpened; the mean over all cuts is exact: from
    place i on, t steps are worth V_t(i) = E_j [values(i, j) - price + V_{t-1}(j)]. optimism a > 0:
    log E_j exp(a [...]) / a, nearer the maximum, so that good cuts are found before they are drawn.
    values: fp32 [B, L, L + 1], as from `run_log_prob`; L may exceed the longest canvas. T = budget.
    """
    L, values = values.shape[1], values - price
    position, used = canvas_positions(canvas, L)
    scores = posterior.scores(tokens, canvas).gather(1, position)
    scores = scores.masked_fill(~used, -30.0)  # no cut behind a short canvas
    # log P(a run from i ends before j): no cut at i + 1 .. j - 1, then one at j, or the end
    log_keep = F.pad(F.logsigmoid(-scores).cumsum(1), (1, 0))
    log_cut = F.pad(F.logsigmoid(scores), (0, 1))
    log_end = log_keep[:, None] - log_keep[:, 1:, None] + log_cut[:, None]
    after = torch.ones_like(values[0], dtype=torch.bool).triu(1)  # j > i
    log_end = log_end.masked_fill(~after, -math.inf)
    to_come = F.pad(values[:, :, L], (0, 1))  # V_1: the last step reveals all that is left
    for _ in range(budget - 1):
        gain = values + to_come[:, None]
        if optimism > 0:
            best = (log_end + optimism * gain).logsumexp(2) / optimism
        else:
            best = (log_end.exp() * gain).sum(2)
        to_come = F.pad(best, (0, 1))
    return -(to_come[:, 0] / canvas.sum(1)).mean()


def search_cuts(
    denoiser, posterior, tokens, canvas, budget, optimizers, generator=None, forward=nullcontext
):
    """Teach a `RunPosterior` the best cuts of some known solutions under the denoiser.

    tokens int [M, N], clean; canvas bool [M, N]; optimizers: of the groups of
    `mdmvi.parameter_groups(None, None, posterior)`; forward() is a new context for each forward
    pass, as autocast keeps the weights that it has cast. Costs a pass of each problem for each
    canvas place, and SEARCH_STEPS steps of the posterior. Raises ValueError on a budget below 2.
    """
    if budget < 2:
        raise ValueError(f"budget is {budget}: with one step there is nothing to cut")
    L, values = int(canvas.sum(1).max()), []
    parts = list(zip(tokens.split(64), canvas.split(64)))
    for x, on in tqdm(parts, desc="search", unit="batch", mininterval=1.0):
        with forward():
            values.append(run_log_prob(denoiser, x.long(), on, L))
    values = torch.cat(values)
    bar = tqdm(range(SEARCH_STEPS), desc="cuts", unit="step", mininterval=1.0)
    for step in bar:
        shape = (SEARCH_BATCH,)
        rows = torch.randint(len(values), shape, device=values.device, generator=generator)
        data = (tokens[rows].long(), canvas[rows], values[rows])
        optimism = 10 * max(0.0, 1 - step / SEARCH_STEPS / 0.75)  # none in the last quarter
        with forward():
            loss = cut_loss(posterior, *data, budget, optimism)
        loss.backward()
        mdmvi.update(optimizers, step, SEARCH_STEPS)
        if step % 20 == 19:
            bar.set_postfix_str(f"loss {float(loss.detach()):.4f}", refresh=False)
