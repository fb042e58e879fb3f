"""Orders of runs, train.py's default: a step reveals neighbouring tokens, from left to right.

    python train.py --orders runs

The canvas is cut into runs. The posterior says where; a search first teaches it the best cuts of
some training problems under the denoiser, by dynamic programming. So an order is learned in a tenth
of the steps that the paper's free scores need. It suits text whose neighbours can be predicted
together. To copy it: this file and mdmvi.py (the README's snippet).
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import mdmvi

SEARCH_STEPS, SEARCH_BATCH = 200, 32  # of the posterior's training on the cuts that were searched


class RunPosterior(mdmvi.OrderPosterior):
    """An `OrderPosterior` whose orders are runs: log alpha falls by up to SPACING at each position.

    A cut is a sigmoid in front of each position, sharpened by SHARPEN; log alpha is minus SPACING
    times the sum of the cuts up to a position. When each token has a number of its own, errors of
    about tau put tokens that belong together into different steps; here a run moves as one. SPACING
    is meant for tau <= 0.1: then even a cut of 0.5 lowers log alpha by 5 tau, which keeps two runs
    in different steps. It starts as a soft front from the left.
    """

    SPACING, SHARPEN = 1.0, 2.0

    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, -2.2)  # tau = 0.1: rho falls to 1 / e in 8 places

    def forward(self, tokens, canvas):
        cut = (self.SHARPEN * self.scores(tokens, canvas)).sigmoid()
        return -self.SPACING * (cut * canvas).cumsum(1)

    def start_from(self, denoiser):
        """Copy embedding, first blocks and norm of a `Denoiser`: it can read. Returns itself.

        The embedding is frozen: with a large vocabulary it is most of the cost. Both need one
        config, but for the lengths: RuntimeError where width or vocabulary differ, KeyError where
        the denoiser has too few blocks; another number of heads is not noticed.
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
def run_log_prob(denoiser, tokens, canvas):
    """log p_theta of every run, nats fp32 [B, L, L + 1], from one denoiser pass a canvas place.

    Entry [:, i, j] is for the places i .. j - 1 of known solutions, revealed together after all
    before i; it is 0 for j <= i. L is the length of the batch's longest canvas.
    """
    L = int(canvas.sum(1).max())
    position, _ = canvas_positions(canvas, L)
    before, values = canvas.cumsum(1) - 1, []
    for i in range(L):
        log_p, _ = mdmvi.token_log_prob(denoiser, tokens, canvas & (before >= i))
        values.append(log_p.gather(1, position).cumsum(1))
    return F.pad(torch.stack(values, 1), (1, 0))


def cut_loss(posterior, tokens, canvas, values, budget, optimism=0.0, price=0.3):
    """Teaches a `RunPosterior` where to cut: a loss in nats per canvas token (scalar).

    It is minus the expected log p_theta of a solution that is revealed in runs, plus `price` nats
    for each run: a cut must gain more than that. values: fp32 [B, L, L + 1], as `run_log_prob`
    returns them; L may exceed the longest canvas. Cuts are drawn one by one from sigmoid(scores),
    not yet sharpened; the mean over all cuts is exact. V_t(i), what can be had
    from place i on in t steps, is E_j [values(i, j) - price + V_{t-1}(j)]. With optimism a > 0 it
    is log E_j exp(a [...]) / a, between the mean and the maximum: begun with a high one that falls
    to 0 (`search_optimism`), training first finds out which cuts can be good at all, and gets stuck
    less often.
    Raises ValueError on a budget below 2 or an optimism below 0.
    """
    if budget < 2:
        raise ValueError(f"budget is {budget}: with one step there is nothing to cut")
    if optimism < 0:
        raise ValueError(f"optimism is {optimism}: it must not be below 0")
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


def search_optimism(done):
    """`optimism` of `cut_loss` when a share of its steps is done: from 10 straight to 0 at 3/4."""
    return 10 * max(0.0, 1 - done / 0.75)


def search_cuts(
    denoiser,
    posterior,
    tokens,
    canvas,
    budget,
    optimizers,
    generator=None,
    forward=contextlib.nullcontext,
):
    """Teach a `RunPosterior` the best cuts of some known solutions under the denoiser.

    tokens int [M, N], clean; canvas bool [M, N]; optimizers: of the groups of
    `mdmvi.parameter_groups(None, None, posterior)`; forward() is a context for passes, as autocast.
    Costs a pass of each problem for each canvas place, and SEARCH_STEPS steps of the posterior.
    """
    parts = list(zip(tokens.split(64), canvas.split(64)))
    with forward():
        bar = tqdm(parts, desc="search", unit="batch", mininterval=1.0)
        values = torch.cat([run_log_prob(denoiser, x.long(), on) for x, on in bar])
    bar = tqdm(range(SEARCH_STEPS), desc="cuts", unit="step", mininterval=1.0)
    for step in bar:
        shape = (SEARCH_BATCH,)
        rows = torch.randint(len(values), shape, device=values.device, generator=generator)
        data = (tokens[rows].long(), canvas[rows], values[rows])
        with forward():
            optimism = search_optimism(step / SEARCH_STEPS)
            loss = cut_loss(posterior, *data, budget, optimism)
        loss.backward()
        mdmvi.update(optimizers, step, SEARCH_STEPS)
        if step % 20 == 19:
            bar.set_postfix_str(f"loss {float(loss.detach()):.4f}", refresh=False)
