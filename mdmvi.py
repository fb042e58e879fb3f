"""Learned generation orders for masked diffusion models, in one file of plain PyTorch.

A masked diffusion model fills a canvas of MASK tokens, several per forward pass. Which positions to
reveal together is a latent variable r here, learned by variational inference (Fox et al., arXiv
2602.23968, "[F]"). Read from top to bottom:

    1. model              p_theta(x^i | x_s) and pi_i(x_s): the denoiser and the policy head
    2. posterior          q_phi(r | x_0): an order that is drawn without running the denoiser
    3. bound, gradient    the ELBO over orders, its RLOO gradient (`order_loss`), plain MDM loss
    4. samplers           the learned order and the fixed rules it is compared with
    5. beyond the paper   a loss of less variance, and one recipe of training

Shapes: B batch, N sequence length, L canvas length, V vocabulary, D width, T = budget (steps), K
paths drawn for each sequence, M scored places in the whole batch. Log-probabilities are in nats.

    tokens      int64 [B, N], always the clean sequence x_0; x_s is x_0 with M_s replaced by MASK
    canvas      bool [B, N], true where the answer goes: M_0. What lies off it is the prompt c. All
                but `generate` need one place at least in every row.
    masked      bool [B, N], the set M_s: the part of the canvas that is still hidden
    generator   a torch.Generator on the tensors' device, or None for the global one

A path is M_0, M_1, ... as drawn from q. No network is told the step s, only what is masked.
(R) marks what is rebuilt from summaries of [F]: the policy's input, the posterior's form, the draw
of the step s. (ours) marks our own changes and rules.

A denoiser is any object with

    denoiser(tokens)          hidden [B, N, D], of the dtype of the policy's weights, no dropout
    denoiser(tokens, place)   hidden [M, D], at `place` int64 [M] of the flattened batch
    denoiser.logits(hidden)   [M, D] -> [M, V], -inf for MASK
    denoiser.mask_id          and, for EOS_RULES, denoiser.eos_id
    denoiser.canvas_len       optional: the most places a canvas has. On a GPU this saves work, and
                              where a batch has more masked places than rows times it, all is nan.

M may be 0 and places may repeat. Padding is prompt: the networks here attend to it, and a pad token
needs a row of every embedding. A policy maps (hidden, masked) -> pi_logits [B, N]. A posterior maps
(tokens, canvas) -> log_alpha [B, N]; only its differences matter.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


def check_positive(**values):
    """Raise ValueError for the first of the named values that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be above 0")


# ------------------------------------------------------------------------------------------------
# 1. Model: a LLaMA-shaped transformer that attends over everything, with no time conditioning, so
#    that the SMDM checkpoints (Nie et al., arXiv 2410.18514) fit by renaming keys.
# ------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """Shape of a denoiser. `mask_id` lies inside the vocabulary or is equal to `vocab_size`; then
    only the embedding has a row for it. `canvas_len` is the most places a canvas has (0: any
    number). `rope_bf16` rounds the rotary tables as SMDM did. Raises ValueError where there is no
    layer or head, or the width of a head would not be even."""

    vocab_size: int
    max_len: int
    n_layer: int
    n_head: int
    n_embd: int
    n_hidden: int
    mask_id: int
    eos_id: int
    canvas_len: int = 0
    rope_bf16: bool = False

    def __post_init__(self):
        check_positive(n_layer=self.n_layer, n_head=self.n_head)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} is no multiple of 2 n_head, {2 * self.n_head}")


def rotary_tables(head_size, length, rope_bf16):
    """cos and signed sin [length, head_size] of rotary embedding, base 10000, by halves."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    sin[:, : head_size // 2] *= -1  # y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin
    return (cos.bfloat16().float(), sin.bfloat16().float()) if rope_bf16 else (cos, sin)


def rotate(x, cos, sin):
    """Rotate x [B, heads, N, head_size]: its first half is paired with its second half.

    cos and sin are the first N rows of `rotary_tables`.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


class Block(nn.Module):
    """Pre-norm attention over everything, then SwiGLU: x [B, N, D] -> [B, N, D].

    With `place` int64 [M] only these rows of the flattened result, [M, D].
    """

    def __init__(self, config):
        super().__init__()
        D, H = config.n_embd, config.n_hidden
        self.n_head = config.n_head
        self.norm_1 = nn.RMSNorm(D, eps=1e-5)
        self.qkv = nn.Linear(D, 3 * D, bias=False)  # rows are (head, q|k|v, head_size), as in SMDM
        self.proj = nn.Linear(D, D, bias=False)
        self.norm_2 = nn.RMSNorm(D, eps=1e-5)
        self.w1 = nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(D, H, bias=False)
        self.w3 = nn.Linear(H, D, bias=False)
        cos, sin = rotary_tables(D // config.n_head, config.max_len, config.rope_bf16)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, place=None):
        B, N, D = x.shape
        cos, sin = self.cos[:N], self.sin[:N]
        qkv = self.qkv(self.norm_1(x)).view(B, N, self.n_head, 3, D // self.n_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        y = y.transpose(1, 2).reshape(B, N, D)
        if place is not None:  # what follows looks at each position alone
            x, y = x.flatten(0, 1)[place], y.flatten(0, 1)[place]
        x = x + self.proj(y)
        y = self.norm_2(x)
        return x + self.w3(F.silu(self.w1(y)) * self.w2(y))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: tokens int64 [B, N] -> hidden, with `place` as in `Block`.

    `shift` [B, N or 1, D] is added to the embedding. Raises ValueError where N is above max_len.
    """

    def __init__(self, config, n_layer):
        super().__init__()
        self.max_len = config.max_len
        self.wte = nn.Embedding(max(config.vocab_size, config.mask_id + 1), config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("proj.weight", "w3.weight"))
                std = 0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02
                nn.init.normal_(weight, std=std)

    def forward(self, tokens, shift=None, place=None):
        N = tokens.shape[1]
        if N > self.max_len:
            raise ValueError(f"{N} tokens are more than the model's context of {self.max_len}")
        x = self.wte(tokens) if shift is None else self.wte(tokens) + shift
        *first, last = self.blocks
        for block in first:
            x = block(x)
        return self.norm(last(x, place))


class Denoiser(nn.Module):
    """p_theta(x^i | x_s): a denoiser as the head of this file describes it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id, self.eos_id = config.mask_id, config.eos_id
        self.canvas_len = config.canvas_len
        self.trunk = Trunk(config, config.n_layer)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, tokens, place=None):
        return self.trunk(tokens, place=place)

    def logits(self, hidden):
        """hidden [..., D] -> fp32 logits [..., V]; -inf for MASK."""
        logits = self.lm_head(hidden).float()
        if self.mask_id < self.config.vocab_size:
            logits[..., self.mask_id] = -math.inf
        return logits


class UnmaskPolicy(nn.Module):
    """pi_i(x_s) = sigmoid(pi_logits): hidden [B, N, D], masked -> pi_logits fp32 [B, N] (R).

    A small head on the denoiser's last hidden states, so that a step of generation costs one pass.
    `config` is a `ModelConfig` of their width. Other policies (examples/runs.py) look at `masked`.
    """

    def __init__(self, config, depth=1):
        super().__init__()
        D = config.n_embd
        self.inner = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        self.outer = nn.Linear(D, 1)

    def forward(self, hidden, masked):
        for layer in self.inner:
            hidden = F.silu(layer(hidden))
        return self.outer(hidden).squeeze(-1).float()


def token_log_prob(denoiser, tokens, masked, hidden=None):
    """log p_theta(x_0^i | x_s), fp32 [B, N], 0 off M_s, from one pass on x_s.

    What only scored places need is computed at M_s alone: the logits, and without `hidden` the end
    of the last block. `hidden` [B, N, D]: what the denoiser gave on the same x_s, where it was
    called already. All is nan where M_s is larger than `canvas_len` allows on a GPU.
    """
    place, used = scored_places(denoiser, masked)
    if hidden is None:
        hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id), place)
    else:
        hidden = hidden.flatten(0, 1)[place]
    # What follows is -cross_entropy(logits, x_0) of these places, put back at M_s
    logits = denoiser.logits(hidden).float()
    target = tokens.flatten()[place].masked_fill(~used, -100)  # which cross_entropy leaves out
    log_p = -F.cross_entropy(logits, target, reduction="none")
    flat = log_p.new_zeros(tokens.numel()).scatter_add(0, place, log_p)
    return flat.masked_fill(used.sum() < masked.sum(), math.nan).view(tokens.shape)


def scored_places(denoiser, masked):
    """Where M_s lies in the flattened batch: (place int64 [M], used bool [M]).

    To count these places is free on a CPU. With a GPU the host would have to wait for the count, so
    there the result has room for one whole canvas a row, and `used` marks the places that count.
    The others are spread over the batch: gradients that all go to one place have to queue up.
    """
    if masked.device.type == "cpu":
        place = masked.flatten().nonzero().squeeze(1)
    else:
        B, N = masked.shape
        room = B * min(getattr(denoiser, "canvas_len", 0) or N, N)
        place = torch.nonzero_static(masked.flatten(), size=room, fill_value=-1).squeeze(1)
    used = place >= 0
    return torch.where(used, place, torch.arange(len(place), device=place.device)), used


# ------------------------------------------------------------------------------------------------
# 2. Posterior over orders (R): alpha = alpha_phi(c, x_0) in (0, 1), one score per position,
#    computed once,
#        q_phi(r_s | x_s, x_0) = prod_{i in M_s} Bern(r_si; rho_i)    for s < T - 1,
#        rho_i = (alpha_i / max_{j in M_s} alpha_j)^(1/tau).
#    The best masked position has rho = 1, so a step always reveals something; positions whose
#    log alpha is within about tau of the best are revealed along with it.
# ------------------------------------------------------------------------------------------------


class OrderPosterior(nn.Module):
    """log alpha_phi(c, x_0) below 0, [B, N], from clean tokens int64 [B, N], canvas bool [B, N].

    It has a trunk of its own, at most two blocks deep. The scores start apart by more than tau, as
    a random order: were they all alike, every rho would be 1, the first step would reveal
    everything, and later steps would have no gradient.
    """

    def __init__(self, config):
        super().__init__()
        self.trunk = Trunk(config, min(2, config.n_layer))
        self.on_canvas = nn.Parameter(torch.zeros(config.n_embd))  # added where the answer goes
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd))
        nn.init.zeros_(self.score.bias)

    def scores(self, tokens, canvas):
        """Real numbers [B, N]; examples/runs.py makes another log alpha of them."""
        hidden = self.trunk(tokens, canvas[:, :, None] * self.on_canvas)
        return self.score(hidden).squeeze(-1).float()

    def forward(self, tokens, canvas):
        return F.logsigmoid(self.scores(tokens, canvas))


def reveal_log_prob(log_alpha, masked, tau):
    """log rho_i = (log alpha_i - max_{j in M_s} log alpha_j) / tau, [B, N]; 0 off the masked set.

    log_alpha float [B, N]; masked bool [B, N]; tau > 0. The largest masked score has exactly 0, and
    so has all of a row in which nothing is masked.
    """
    best = log_alpha.masked_fill(~masked, -math.inf).amax(dim=1, keepdim=True)
    return torch.where(masked, (log_alpha - best) / tau, 0.0)


def log_one_minus(log_p):
    """log(1 - exp(log_p)) for log_p <= 0; log 1e-6 with gradient 0 where p is above 1 - 1e-6.

    This does not matter for the best place, where rho = 1: the KL multiplies the value by
    1 - rho = 0, the gradient of its log rho is 0, and `draw_path` always reveals it. Where a second
    score is within 1e-6 tau of the best, the true slope of the KL is unbounded, this one is not.
    """
    return torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))


def draw_reveal(log_rho, masked, generator=None):
    """r_s ~ q: bool [B, N], each place of `masked` (bool [B, N]) with probability exp(log_rho)."""
    u = torch.rand(log_rho.shape, device=log_rho.device, generator=generator)
    return masked & (u.log() < log_rho)  # log u < 0 always: rho = 1 is always revealed


def draw_path(log_alpha, canvas, s, max_s, tau, generator=None):
    """Draw M_s ~ q by revealing s times from the full canvas, with no network call.

    log_alpha float [B, N]; canvas bool [B, N]; s int64 [B], a step for each row; max_s, an int, is
    no smaller than any of them (to read s.max() would wait for a GPU). Returns (masked bool [B, N],
    what is still hidden; log q(r_0 .. r_{s-1} | x_0) [B], with its gradient in log_alpha).
    """
    masked, log_q = canvas, log_alpha.new_zeros(len(log_alpha))
    for t in range(max_s):
        moving = masked & (t < s)[:, None]  # not in rows that are at their M_s
        log_rho = reveal_log_prob(log_alpha, moving, tau)
        reveal = draw_reveal(log_rho, moving, generator)
        log_kept = torch.where(moving, log_one_minus(log_rho), 0.0)
        log_q = log_q + torch.where(reveal, log_rho, log_kept).sum(1)
        masked = masked & ~reveal
    return masked, log_q


# ------------------------------------------------------------------------------------------------
# 3. Bound and gradient. The model draws r_s ~ Bern(pi(x_s)) and then the tokens where r = 1,
#        p(x_0, r | c) = prod_s prod_{i in M_s} Bern(r_si; pi_i) prod_{r_si=1} p_theta(x_0^i | x_s)
#    with r_si = 1 for all that is left at s = T - 1, here as in q. So
#        log p(x_0 | c) >= ELBO = E_{M ~ q} sum_{s < T} f_s(M_s)           (f_s: see `step_bound`)
#        grad ELBO = E_s E_q [ grad f_s / P(s) + (f_s / P(s) - b) grad log q(r_0 .. r_{s-1} | x_0) ]
#    for a step s drawn with probability P(s), 1 / T in `order_loss` (R), and any b that does not
#    depend on this path: here the mean over the other K - 1 paths.
# ------------------------------------------------------------------------------------------------


def step_bound(denoiser, policy, tokens, masked, log_rho, last):
    """f_s of the ELBO, fp32 [B], in two parts (token_term, kl) with f_s = token_term - kl:

        f_s = sum_{i in M_s} [ rho_i log p_theta(x_0^i | x_s) - KL( Bern(rho_i) || Bern(pi_i) ) ]

    The token term is Rao-Blackwellised: the expectation over r_s is in closed form. masked bool
    [B, N] (M_s); log_rho float [B, N]; last bool [B]: the row is at s = T - 1, where rho = pi = 1.
    """
    hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
    log_p = token_log_prob(denoiser, tokens, masked, hidden)
    pi_logits = policy(hidden, masked)
    log_rho = log_rho.masked_fill(last[:, None], 0.0)
    rho = log_rho.exp()
    token_term = (rho * log_p).sum(1)  # log p is 0 off M_s
    kl = rho * (log_rho - F.logsigmoid(pi_logits))
    kl = kl + (1 - rho) * (log_one_minus(log_rho) - F.logsigmoid(-pi_logits))
    return token_term, torch.where(masked & ~last[:, None], kl, 0.0).sum(1)


def stratified_uniform(n, device, generator=None):
    """n draws in [0, 1), fp32 [n], each uniform, evenly spread by one shared random offset."""
    u = torch.rand((), device=device, generator=generator)
    return (torch.arange(n, device=device) / n + u) % 1.0


def leave_one_out(value):
    """RLOO baseline [B, K]: the mean of the other K - 1 values of a row (0 if K = 1)."""
    K = value.shape[1]
    return (value.sum(1, keepdim=True) - value) / (K - 1) if K > 1 else torch.zeros_like(value)


def path_bound(
    denoiser, policy, log_alpha, tokens, canvas, s, weight, budget, tau, paths, generator=None
):
    """weight * E_q f_s(M_s) from K paths that share x_0 and s: (value [B], kl [B]), in nats.

    s int64 [B]; weight float [B], 1 / P(s); log_alpha float [B, N]. The gradient of `value` is an
    unbiased estimate of that of weight * E_q f_s. `kl` is the KL part of `value`, detached.
    """
    B, K = len(tokens), paths
    tokens, canvas, log_alpha, s = (
        x.repeat_interleave(K, 0) for x in (tokens, canvas, log_alpha, s)
    )
    masked, log_q = draw_path(log_alpha, canvas, s, budget - 1, tau, generator)
    log_rho = reveal_log_prob(log_alpha, masked, tau)
    token_term, kl = step_bound(denoiser, policy, tokens, masked, log_rho, s == budget - 1)
    weighted = weight[:, None] * (token_term - kl).view(B, K)
    advantage = weighted.detach() - leave_one_out(weighted.detach())
    score_term = advantage * (log_q - log_q.detach()).view(B, K)  # its value is 0
    return (weighted + score_term).mean(1), weight * kl.detach().view(B, K).mean(1)


def order_loss(denoiser, policy, posterior, tokens, canvas, budget, tau, paths, generator=None):
    """Negative ELBO over orders, nats per canvas token, with its RLOO gradient: the paper's loss.

    Each x_0 gets one step s, uniform on 0 .. T-1 (R) and stratified over the batch, and K paths up
    to M_s: the estimate is the mean of T f_s(M_s), from B K denoiser passes. Returns two scalars in
    nats per canvas token: the loss, and the part of it that is KL, detached. Raises ValueError on a
    budget or paths below 1, or tau not above 0.
    """
    check_positive(budget=budget, tau=tau, paths=paths)
    u = stratified_uniform(len(tokens), tokens.device, generator)
    s = (u * budget).long().clamp(max=budget - 1)
    weight = torch.full_like(u, float(budget))  # 1 / P(s)
    log_alpha, length = posterior(tokens, canvas), canvas.sum(1)
    value, kl = path_bound(
        denoiser, policy, log_alpha, tokens, canvas, s, weight, budget, tau, paths, generator
    )
    return -(value / length).mean(), (kl / length).mean()


def mdm_loss(denoiser, tokens, canvas, generator=None, rates=(0.0, 1.0)):
    """Plain masked-diffusion loss, nats per canvas token (scalar); SMDM's objective.

    t ~ U(low, high] of `rates`, low discrepancy over the batch; each canvas token is masked with
    probability t; the cross-entropy of the masked ones is summed and divided by t and by the canvas
    length. Other rates than (0, 1) are ours, and then it is no bound.
    """
    low, high = rates
    t = high - (high - low) * stratified_uniform(len(tokens), tokens.device, generator)
    u = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    log_p = token_log_prob(denoiser, tokens, canvas & (u < t[:, None]))
    return -(log_p.sum(1) / t / canvas.sum(1)).mean()


@torch.no_grad()
def order_elbo(denoiser, policy, posterior, tokens, canvas, budget, tau, samples, generator=None):
    """Monte Carlo estimate [B] (nats per sequence) of the ELBO, over `samples` full paths.

    Takes samples * T passes. Raises ValueError on a budget or samples below 1, or tau not above 0.
    """
    check_positive(budget=budget, tau=tau, samples=samples)
    total = torch.zeros(len(tokens), device=tokens.device)
    log_alpha = posterior(tokens, canvas)
    for _ in range(samples):
        masked = canvas
        for s in range(budget):
            last = torch.full_like(canvas[:, 0], s == budget - 1)
            log_rho = reveal_log_prob(log_alpha, masked, tau)
            token_term, kl = step_bound(denoiser, policy, tokens, masked, log_rho, last)
            total += token_term - kl
            masked = masked & ~draw_reveal(log_rho, masked, generator)
    return total / samples


@torch.no_grad()
def uniform_elbo(denoiser, tokens, canvas, budget, samples, generator=None):
    """`order_elbo` of uniformly random orders: every token picks its step, rho_i = 1 / (T - s).

    pi_i is the same, so KL = 0; unlike a learned policy it is told s. Raises ValueError on a budget
    or samples below 1.
    """
    check_positive(budget=budget, samples=samples)
    total = torch.zeros(len(tokens), device=tokens.device)
    for _ in range(samples):
        masked = canvas
        for s in range(budget):
            total += token_log_prob(denoiser, tokens, masked).sum(1) / (budget - s)
            u = torch.rand(tokens.shape, device=tokens.device, generator=generator)
            masked = masked & (u > 1 / (budget - s))
    return total / samples


# ------------------------------------------------------------------------------------------------
# 4. Samplers: the learned order and fixed rules. [F] compares with iid, top_prob and
#    top_prob_margin (the last two: Kim et al., arXiv 2502.06768). threshold is Fast-dLLM's (arXiv
#    2505.22618); entropy, left_to_right and random are common; threshold_left and +eos are ours.
# ------------------------------------------------------------------------------------------------

CONFIDENCE_RULES = ("top_prob", "top_prob_margin", "entropy", "threshold", "threshold_left")
RULES = ("iid", *CONFIDENCE_RULES, "left_to_right", "random")
STRATEGIES = ("learned", *RULES)
EOS_RULES = ("top_prob+eos", "top_prob_margin+eos", "entropy+eos")  # predicted EOS at once (ours)
THRESHOLD = 0.9  # of the rules of this name: reveal what is more probable


class Generation(NamedTuple):
    tokens: torch.Tensor  # int64 [B, N]
    reveal_step: torch.Tensor  # int64 [B, N], when each was revealed, -1 off the canvas
    steps: torch.Tensor  # int64 [B], forward passes used


def top_k(score, candidates, k):
    """bool [B, N]: the k candidates of highest score in each row, all if there are fewer.

    k is an int, or int64 [B, 1].
    """
    score = score.clamp(min=torch.finfo(score.dtype).min)  # so that all candidates come first
    order = score.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    return candidates & (order.argsort(dim=1) < k)


def confidence(strategy, logits):
    """What a confidence rule ranks places by, highest first: float [M] from logits [M, V]."""
    if strategy == "entropy":
        return -torch.special.entr(logits.softmax(-1)).sum(-1)
    if strategy == "top_prob_margin":
        best, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return best - second
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()  # the largest probability


def choose_by_rule(strategy, logits, masked, steps_left, eos_id=None, generator=None):
    """Positions a fixed rule reveals, bool [B, N], at least one in each row that has any left.

    logits [M, V], of the M places of `masked` (bool [B, N]) in row-major order; steps_left int,
    this one counted. The rules that rank take their best 1 / steps_left of the candidates, rounded
    up; iid draws each with probability 1 / steps_left; threshold takes all above THRESHOLD. Where
    that gives none, iid takes one at random and threshold the most probable. threshold_left (ours)
    takes all above THRESHOLD and the leftmost other one. eos_id (ours, for EOS_RULES): masked
    positions whose most likely token is EOS are revealed at once and are no candidates.
    """
    if strategy in CONFIDENCE_RULES:
        score = masked.float().masked_scatter(masked, confidence(strategy, logits))
    elif strategy == "left_to_right":
        score = -torch.arange(masked.shape[1], device=masked.device).float().expand(masked.shape)
    else:
        score = torch.rand(masked.shape, device=masked.device, generator=generator)
    if strategy in ("iid", "threshold"):
        bar = THRESHOLD if strategy == "threshold" else 1 - 1 / steps_left
        return (masked & (score > bar)) | top_k(score, masked, 1)  # adds one where none is above
    if strategy == "threshold_left":
        below = masked & (score <= THRESHOLD)
        return (masked & ~below) | (below & (below.cumsum(1) == 1))
    eos = torch.zeros_like(masked)
    if eos_id is not None:
        eos = eos.masked_scatter(masked, logits.argmax(-1) == eos_id)
    candidates = masked & ~eos
    k = (candidates.sum(1, keepdim=True) + steps_left - 1) // steps_left
    return eos | top_k(score, candidates, k)


def choose_by_policy(pi_logits, masked, generator=None):
    """r_i ~ Bern(pi_i) for i in M_s, bool [B, N]; the position of largest pi where no r_i = 1.

    pi_logits float [B, N]. The model of the bound would reveal nothing there: this (ours) saves
    that pass.
    """
    u = torch.rand(masked.shape, device=masked.device, generator=generator)
    reveal = masked & (u < pi_logits.sigmoid())
    return reveal | (top_k(pi_logits, masked, 1) & ~reveal.any(1, keepdim=True))


def draw_tokens(logits, temperature, generator=None):
    """Tokens int64 [M] from softmax(logits [M, V] / temperature); the most likely ones at 0."""
    if temperature == 0:
        return logits.argmax(-1)
    u = torch.rand(logits.shape, device=logits.device, generator=generator)
    return (logits - temperature * (-u.log()).log()).argmax(-1)  # Gumbel-max


@torch.no_grad()
def generate(
    denoiser, tokens, canvas, strategy, budget, policy=None, temperature=0.0, generator=None
):
    """Fill the canvas in at most `budget` forward passes; the last one reveals all that is left.

    What lies on the canvas is ignored. strategy: one of STRATEGIES or EOS_RULES; "learned" needs
    `policy`. temperature: of the tokens' draw. Rows that are finished leave the batch. Returns a
    Generation. Raises ValueError on an unknown strategy, a budget below 1, a temperature below 0 or
    without end, or "learned" without a policy.
    """
    names = (*STRATEGIES, *EOS_RULES)
    if strategy not in names:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(names)}")
    check_positive(budget=budget)
    if strategy == "learned" and policy is None:
        raise ValueError("strategy 'learned' needs a policy")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be a number from 0 on")
    rule, _, eos = strategy.partition("+")
    eos_id = denoiser.eos_id if eos else None
    tokens = tokens.masked_fill(canvas, denoiser.mask_id)
    reveal_step = torch.full_like(tokens, -1)
    rows = canvas.any(1).nonzero().squeeze(1)
    for s in range(budget):
        if len(rows) == 0:
            break
        x, masked = tokens[rows], canvas[rows] & (reveal_step[rows] < 0)
        hidden = denoiser(x)
        logits = denoiser.logits(hidden[masked]).float()
        if s == budget - 1:
            reveal = masked
        elif strategy == "learned":
            reveal = choose_by_policy(policy(hidden, masked), masked, generator)
        else:
            reveal = choose_by_rule(rule, logits, masked, budget - s, eos_id, generator)
        filled = x.masked_scatter(masked, draw_tokens(logits, temperature, generator))
        tokens[rows] = torch.where(reveal, filled, x)
        reveal_step[rows] = reveal_step[rows].masked_fill(reveal, s)
        rows = rows[(masked & ~reveal).any(1)]
    return Generation(tokens, reveal_step, steps=reveal_step.amax(1) + 1)


# ------------------------------------------------------------------------------------------------
# 5. Beyond the paper (ours): a loss of less variance, and one recipe of training.
#    Other kinds of orders: examples/runs.py, which a search makes quick to learn, and spread.py.
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_step(log_alpha, canvas, budget, tau, paths, generator=None):
    """A step s of 1 .. T-1 to train on, int64 [B], and its probability P(s), fp32 [B]:

        P(s) = 0.8 busy_s / sum_t busy_t + 0.2 / (T - 1)

    Most steps of a large budget find nothing left to reveal. busy_s is the share of `paths` paths
    of a row, drawn for this only, that have something left at s; the second term keeps P(s) above
    0. The budget T must be above 1.
    """
    masked = canvas.repeat_interleave(paths, 0)
    log_alpha = log_alpha.repeat_interleave(paths, 0)
    busy = []
    for _ in range(budget - 1):
        masked = masked & ~draw_reveal(reveal_log_prob(log_alpha, masked, tau), masked, generator)
        busy.append(masked.any(1))
    busy = torch.stack(busy, 1).view(-1, paths, budget - 1).float().mean(1)  # of steps 1 .. T-1
    busy = busy + 1e-6  # where no path has anything left, all steps are alike
    p = 0.8 * busy / busy.sum(1, keepdim=True) + 0.2 / (budget - 1)
    u = stratified_uniform(len(p), p.device, generator)
    column = (p.cumsum(1) < u[:, None]).sum(1).clamp(max=budget - 2)
    return column + 1, p.gather(1, column[:, None]).squeeze(1)


def importance_order_loss(
    denoiser, policy, posterior, tokens, canvas, budget, tau, paths, generator=None
):
    """`order_loss` with less variance: f_0 exactly, plus f_s / P(s), from B (K + 1) passes.

    All paths of a problem begin with the full canvas, so f_0 takes one pass and is exact. One later
    step s is drawn by `draw_step`; with T = 1 there is none. Arguments, result and errors are those
    of `order_loss`.
    """
    check_positive(budget=budget, tau=tau, paths=paths)
    log_alpha, length = posterior(tokens, canvas), canvas.sum(1)
    log_rho = reveal_log_prob(log_alpha, canvas, tau)
    last = torch.full_like(canvas[:, 0], budget == 1)  # bool [B]: is step 0 the last one?
    token_term, kl = step_bound(denoiser, policy, tokens, canvas, log_rho, last)
    value = token_term - kl
    kl = kl.detach()
    if budget > 1:
        s, p = draw_step(log_alpha, canvas, budget, tau, paths, generator)
        later, later_kl = path_bound(
            denoiser, policy, log_alpha, tokens, canvas, s, 1 / p, budget, tau, paths, generator
        )
        value, kl = value + later, kl + later_kl
    return -(value / length).mean(), (kl / length).mean()


def unsure(policy, hidden, masked, limit=4.6):
    """A policy's logits, squashed to between -limit and limit: 4.6 keeps pi from 0.01 to 0.99.

    `functools.partial(unsure, policy)` takes the policy's place in a loss, for the first half or so
    of stage 2. A policy is soon certain of the order that it sees; any other one then costs ten
    nats of KL or more, and the gradient seldom leaves for a better one (RESULTS.md).
    """
    return limit * torch.tanh(policy(hidden, masked) / limit)


def parameter_groups(denoiser, policy, posterior, lr=1e-3, policy_lr=3e-3, posterior_lr=3e-4):
    """Parameter groups for any optimiser, a network each, with its peak learning rate.

    "params" are pairs (name, parameter), as torch's optimisers take them. A network that is None,
    frozen or no nn.Module has no group. "warm_up" is the share of the steps in which the rate
    rises. The posterior's is long where a policy is trained too: a new policy makes every order
    look bad (high KL), and at full rate the posterior would leave the good order that a search has
    found (examples/runs.py) before the policy has learned it.
    """
    groups = []
    for name, network, peak, share in (
        ("denoiser", denoiser, lr, 0.01),
        ("policy", policy, policy_lr, 0.01),
        ("posterior", posterior, posterior_lr, 0.01 if policy is None else 0.2),
    ):
        named = network.named_parameters() if isinstance(network, nn.Module) else ()
        params = [(key, p) for key, p in named if p.requires_grad]
        if params:
            group = {"params": params, "lr": peak, "peak": peak, "warm_up": share, "network": name}
            groups.append(group)
    return groups


def update(optimizers, step, steps):
    """After backward(), at `step` 0 .. steps - 1: clip, set the rates, step, clear the gradients.

    The optimizers' groups are from `parameter_groups`. Each network's gradient is clipped to norm 1
    by itself: the posterior's is now and then by far the largest, and clipped together it would
    shrink the others'. The rate warms up over the group's share of the steps and falls along a
    cosine to a hundredth of its peak.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for name in {group["network"] for group in groups}:
        params = [p for group in groups if group["network"] == name for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 1.0)
    factor = 0.01 + 0.99 / 2 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    for group in groups:
        group["lr"] = group["peak"] * factor * min(1.0, (step + 1) / (group["warm_up"] * steps))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
