"""Learned generation orders for masked diffusion models, in one file of plain PyTorch.

A masked diffusion model fills a canvas of MASK tokens, several per forward pass. Which positions to
reveal together is a latent variable r here, learned by variational inference (Fox et al., arXiv
2602.23968, "[F]"). Read from top to bottom:

    1. model      p_theta(x^i | x_s) and pi_i(x_s): the denoiser and the policy head
    2. posterior  q_phi(r | x_0): an order that is drawn without running the denoiser
    3. bound      plain MDM loss, the ELBO over orders, its RLOO gradient; orders to start from
    4. latent     optional: one Gaussian z shared by all tokens (VMD; Zhang et al., arXiv 2510.23606, "[V]")
    5. samplers   the learned order and the fixed rules it is compared with

Shapes: B batch, N sequence length, V vocabulary, D width, T = budget (steps). `canvas` is a bool [B, N],
true where the answer goes, in at least one place of every row; `masked` is the part of it that is still
hidden (M_s). x_0 is the clean sequence, c its prompt (all off the canvas), and x_s is x_0 with M_s replaced
by MASK. `generator` is a torch.Generator on the tensors' device, or None for the global one. All
log-probabilities are in nats. Passages marked (R) are rebuilt from published summaries of [F], not from its text.

A denoiser is anything callable as tokens int64 [B, N] -> (logits [B, N, V], hidden [B, N, D]) that carries the
attributes `mask_id` and (for eos_aware rules) `eos_id`, and does not predict MASK; `Denoiser` below is one.
A policy is a callable hidden -> pi_logits float [B, N], a posterior (tokens, canvas) -> log_alpha float [B, N].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------
# 1. Model: a LLaMA-shaped transformer that attends over everything, so that the published SMDM
#    checkpoints (Nie et al., arXiv 2410.18514) fit by renaming keys. No time conditioning.
# ---------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """Shape of a denoiser. `mask_id` may lie inside the vocabulary or be equal to `vocab_size`, in which
    case only the embedding has a row for it. `rope_bf16` rounds the rotary tables as SMDM did.
    `latent_dim` above 0 adds the shared latent of section 4."""

    vocab_size: int
    max_len: int
    n_layer: int
    n_head: int
    n_embd: int
    n_hidden: int
    mask_id: int
    eos_id: int
    rope_bf16: bool = False
    latent_dim: int = 0


def rotary_tables(head_size, length, rope_bf16=False):
    """cos and sin [length, head_size] of rotary position embedding, base 10000, half-rotation form."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    return (cos.bfloat16().float(), sin.bfloat16().float()) if rope_bf16 else (cos, sin)


def rotate(x, cos, sin):
    """Rotate x [B, heads, N, head_size]: its first half is paired with its second half."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class Block(nn.Module):
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

    def forward(self, x, cos, sin):
        B, N, D = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, N, self.n_head, 3, D // self.n_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.proj(y.transpose(1, 2).reshape(B, N, D))
        y = self.norm_2(x)
        return x + self.w3(F.silu(self.w1(y)) * self.w2(y))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: tokens [B, N] -> hidden [B, N, D]."""

    def __init__(self, config, n_layer):
        super().__init__()
        self.max_len = config.max_len
        self.wte = nn.Embedding(max(config.vocab_size, config.mask_id + 1), config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        cos, sin = rotary_tables(config.n_embd // config.n_head, config.max_len, config.rope_bf16)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("proj.weight", "w3.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02)

    def forward(self, tokens, shift=None):
        N = tokens.shape[1]
        if N > self.max_len:
            raise ValueError(f"sequence of {N} tokens is longer than the model's context of {self.max_len}")
        x = self.wte(tokens) if shift is None else self.wte(tokens) + shift
        for block in self.blocks:
            x = block(x, self.cos[:N], self.sin[:N])
        return self.norm(x)


class Denoiser(nn.Module):
    """p_theta(x^i | x_s): tokens int64 [B, N] -> (logits [B, N, V], hidden [B, N, D]).

    The MASK token is never predicted: its logit is -inf if it has one. Raises ValueError where N is
    longer than `config.max_len`. With `config.latent_dim` it takes z [B, latent_dim] as well (section 4; z = 0
    where it is left out) and carries the encoder of z.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id, self.eos_id = config, config.mask_id, config.eos_id
        self.trunk = Trunk(config, config.n_layer)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.latent_dim = config.latent_dim
        if self.latent_dim:
            self.from_z = nn.Linear(config.latent_dim, config.n_embd, bias=False)
            nn.init.normal_(self.from_z.weight, std=0.02)
            self.encoder = LatentEncoder(config)

    def forward(self, tokens, z=None):
        hidden = self.trunk(tokens, None if z is None else self.from_z(z)[:, None])
        logits = self.lm_head(hidden)
        if self.mask_id < self.config.vocab_size:
            is_mask = torch.arange(self.config.vocab_size, device=logits.device) == self.mask_id
            logits = logits.masked_fill(is_mask, -math.inf)
        return logits, hidden


def smdm_name(name):
    """The key of a published SMDM checkpoint for one of `Denoiser`'s parameters."""
    for ours, theirs in (
        ("trunk.wte", "transformer.wte"), ("trunk.norm", "transformer.ln_f"), ("trunk.blocks", "transformer.h"),
        (".qkv.", ".attn.attn."), (".proj.", ".attn.proj."),
        (".w1.", ".mlp.swiglu.w1."), (".w2.", ".mlp.swiglu.w2."), (".w3.", ".mlp.swiglu.w3."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


class UnmaskPolicy(nn.Module):
    """pi_i(x_s) = sigmoid(pi_logits): hidden [B, N, D] -> pi_logits [B, N] (R for the form).

    A small head on the denoiser's last hidden states, so that a step of generation costs one pass; n_layer: its
    hidden layers.
    """

    def __init__(self, config, n_layer=1):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(config.n_embd, config.n_embd) for _ in range(n_layer))
        self.outer = nn.Linear(config.n_embd, 1)

    def forward(self, hidden):
        for layer in self.inner:
            hidden = F.silu(layer(hidden))
        return self.outer(hidden).squeeze(-1).float()


# ---------------------------------------------------------------------------------------------------
# 2. Posterior over orders (R): alpha = alpha_phi(c, x_0) in (0, 1), one score a position, once, and
#    q(r | x_s, x_0) = prod_{i in M_s} Bern(r_i; rho_i),  rho_i = (alpha_i / max_{j in M_s} alpha_j)^(1/tau).
#    The best masked position has rho = 1, so a step always reveals something; positions with scores
#    within about tau of it are revealed along with it.
# ---------------------------------------------------------------------------------------------------


class OrderPosterior(nn.Module):
    """log alpha_phi(c, x_0): clean tokens int64 [B, N] (and canvas bool [B, N]) -> log_alpha [B, N], below 0.

    The canvas tells it which tokens are given; where it always is the same part of the text it may be left out.
    log alpha = -SPACING * E[level] with levels 1, 2, .. (1 is revealed first), the classes of a softmax sharpened
    by SHARPEN, so that tokens which go together have scores within tau of each other and others lie SPACING
    apart (ours, not in [F]): when each token has a number of its own, errors of about tau put tokens that belong
    together into different steps. SPACING is made for tau = 0.1; change it along with tau.
    n_layer: depth of its own trunk (default: 2, or the denoiser's depth if that is less). Scores start all
    alike, which reveals everything at once; section 3 finds better orders to start from.
    """

    SPACING, SHARPEN = 0.4, 2.0

    def __init__(self, config, n_layer=None, levels=32):
        super().__init__()
        self.trunk = Trunk(config, min(2, config.n_layer) if n_layer is None else n_layer)
        self.on_canvas = nn.Parameter(torch.zeros(config.n_embd))
        self.level = nn.Linear(config.n_embd, levels)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def start_from(self, denoiser):
        """Copy the denoiser's embedding and first blocks: it has already learned to read the text. The embedding
        stays as it is, which saves most of what training a posterior costs where the vocabulary is large."""
        state = denoiser.trunk.state_dict()
        self.trunk.load_state_dict({name: state[name] for name in self.trunk.state_dict()})
        self.trunk.wte.requires_grad_(False)
        return self

    def level_logits(self, tokens_clean, canvas=None):
        """Logits [B, N, levels] of each token's place in the order, from first to last."""
        shift = None if canvas is None else canvas[:, :, None] * self.on_canvas
        return self.level(self.trunk(tokens_clean, shift)).float()

    def forward(self, tokens_clean, canvas=None):
        p = (self.SHARPEN * self.level_logits(tokens_clean, canvas)).softmax(-1)
        return -self.SPACING * (p * torch.arange(1, p.shape[-1] + 1, device=p.device)).sum(-1)


def log_rho(log_alpha, masked, tau):
    """log rho_i = (log alpha_i - max_{j in M_s} log alpha_j) / tau, [B, N]; 0 off the masked set.

    log_alpha float [B, N]; masked bool [B, N]; tau > 0. The largest masked score has log rho = 0 exactly.
    """
    best = log_alpha.masked_fill(~masked, -math.inf).amax(dim=1, keepdim=True)
    return torch.where(masked, (log_alpha - best) / tau, 0.0)


def log_one_minus(log_p):
    """log(1 - exp(log_p)) for log_p <= 0, cut off at log 1e-6 with gradient 0 where p is (nearly) 1."""
    return torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))


def stratified_uniform(n, device, generator=None):
    """n draws in [0, 1), fp32 [n], each uniform on its own, evenly spread together (low discrepancy)."""
    u = torch.rand((), device=device, generator=generator)
    return (torch.arange(n, device=device) / n + u) % 1.0


def draw_reveal(log_r, masked, generator=None):
    """r_s ~ q: bool [B, N], each place of `masked` (bool [B, N]) with its probability rho (log_r float [B, N])."""
    u = torch.rand(log_r.shape, device=log_r.device, generator=generator)
    return masked & (u.log() < log_r)  # log u < 0 always: rho = 1 is always revealed


def draw_path(log_alpha, canvas, steps, tau, generator=None, max_steps=None):
    """Draw M_steps ~ q by revealing `steps` times from the full canvas, with no network call.

    log_alpha float [B, N]; canvas bool [B, N]; steps int64 [B], how many steps each row takes;
    max_steps: an upper bound on `steps`, known on the host (given, the function does not wait for
    the GPU; must not be below steps.max()). Returns (masked bool [B, N], log_q [B]): what is still hidden, and
    log q(r_0 .. r_{steps-1} | x_0), differentiable in log_alpha.
    """
    masked, log_q = canvas, log_alpha.new_zeros(len(log_alpha))
    for s in range(int(steps.max()) if max_steps is None else max_steps):
        moving = masked & (s < steps)[:, None]
        log_r = log_rho(log_alpha, moving, tau)
        reveal = draw_reveal(log_r, moving, generator)
        log_q = log_q + torch.where(reveal, log_r, torch.where(moving, log_one_minus(log_r), 0.0)).sum(1)
        masked = masked & ~reveal
    return masked, log_q


@torch.no_grad()
def draw_step(log_alpha, canvas, budget, tau, paths, generator=None):
    """A step s of 1 .. T-1 to train on, int64 [B], and its probability P(s), fp32 [B].

    Most steps of a large budget find nothing left to reveal. So s is drawn, four times in five, in proportion to
    how many of some paths have something left at s: `paths` of them for each row, drawn for this purpose only; the
    fifth time from all steps alike, so that every P(s) > 0 (ours, not in [F]). log_alpha float [B, N]; canvas
    bool [B, N]; budget T above 1.
    """
    masked, log_alpha = canvas.repeat_interleave(paths, 0), log_alpha.repeat_interleave(paths, 0)
    busy = []
    for _ in range(budget - 1):
        masked = masked & ~draw_reveal(log_rho(log_alpha, masked, tau), masked, generator)
        busy.append(masked.any(1))
    busy = torch.stack(busy, 1).view(-1, paths, budget - 1).float().mean(1) + 1e-6
    p = 0.8 * busy / busy.sum(1, keepdim=True) + 0.2 / (budget - 1)
    u = stratified_uniform(len(p), p.device, generator)
    s = (p.cumsum(1) < u[:, None]).sum(1).clamp(max=budget - 2)
    return s + 1, p.gather(1, s[:, None]).squeeze(1)


# ---------------------------------------------------------------------------------------------------
# 3. Bounds and losses.
# ---------------------------------------------------------------------------------------------------


def token_log_prob(logits, tokens):
    """log p_theta(x_0^i | x_s), fp32 [B, N], of tokens int64 [B, N], all below V, under logits [B, N, V]."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return -loss.view(tokens.shape)


def at_least_one(**values):
    """Raise ValueError for the first of the named values that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def mdm_loss(denoiser, tokens, canvas, generator=None, budget=None):
    """Plain masked-diffusion loss, nats per canvas token (scalar): one draw of the mean of -mdm_elbo / L.

    t ~ U(0, 1]; each canvas token is masked with probability t; sum over masked of CE / t over the
    canvas length L (SMDM's objective). tokens int64 [B, N] clean; canvas bool [B, N].
    budget: given, t is one of 1/T, 2/T, .., 1, and the loss is minus the bound of uniformly random orders
    in T steps (`order_elbo` without a posterior): 1 / t = T / (T - s) at step s.
    """
    t = 1.0 - stratified_uniform(len(tokens), tokens.device, generator)
    if budget is not None:
        t = (t * budget).ceil() / budget
    masked = canvas & (torch.rand(tokens.shape, device=tokens.device, generator=generator) < t[:, None])
    logits, _ = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
    log_p = torch.where(masked, token_log_prob(logits, tokens), 0.0).sum(1)
    return -(log_p / t / canvas.sum(1)).mean()


@torch.no_grad()
def mdm_elbo(denoiser, tokens, canvas, samples, generator=None):
    """Monte Carlo estimate [B] (nats per sequence) of the plain model's bound on log p(x_0 | c).

    Equal in expectation to the integral over t in `mdm_loss`, with less variance: the number m of masked
    tokens is uniform on 1..L, which ones is uniform, and the sum of their log p is weighted L / m.
    tokens int64 [B, N] clean; canvas bool [B, N]. Raises ValueError on fewer than 1 samples.
    """
    at_least_one(samples=samples)
    length, total = canvas.sum(1), 0.0
    for _ in range(samples):
        u = stratified_uniform(len(tokens), tokens.device, generator)
        count = 1 + (u * length).long().clamp(max=length - 1)
        noise = torch.rand(tokens.shape, device=tokens.device, generator=generator)
        masked = top_k(noise, canvas, count)
        logits, _ = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
        total = total + torch.where(masked, token_log_prob(logits, tokens), 0.0).sum(1) * length / count
    return total / samples


def step_bound(denoiser, policy, tokens, masked, log_r, last):
    """f_s of the ELBO [B], in two parts (tokens, kl) with f_s = tokens - kl:

        f_s = sum_{i in M_s} [ rho_i log p_theta(x_0^i | x_s) - KL( Bern(rho_i) || Bern(pi_i) ) ]

    The token term is Rao-Blackwellised: the expectation over r_s is taken in closed form. tokens int64 [B, N]
    clean; masked bool [B, N] (M_s); log_r is log rho float [B, N]. Rows with `last` true (bool [B]) are at
    s = T - 1, where rho = pi = 1.
    """
    logits, hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
    pi_logits = policy(hidden)
    log_r = log_r.masked_fill(last[:, None], 0.0)
    rho = log_r.exp()
    token_term = torch.where(masked, rho * token_log_prob(logits, tokens), 0.0).sum(1)
    kl = rho * (log_r - F.logsigmoid(pi_logits))
    kl = kl + (1 - rho) * (log_one_minus(log_r) - F.logsigmoid(-pi_logits))
    return token_term, torch.where(masked & ~last[:, None], kl, 0.0).sum(1)


def leave_one_out(value):
    """RLOO baseline: for value [B, K], the mean of the other K - 1 entries of its row (0 if K = 1)."""
    K = value.shape[1]
    return (value.sum(1, keepdim=True) - value) / (K - 1) if K > 1 else torch.zeros_like(value)


def order_loss(denoiser, policy, posterior, tokens, canvas, budget, tau, paths, generator=None):
    """Negative ELBO over orders, nats per canvas token, with its RLOO gradient ([F]).

    The ELBO is E_q sum_s f_s(M_s). Each x_0 gets one denoiser pass on its full canvas, where all paths begin, for
    f_0, and `paths` passes on M_s ~ q, for one step s >= 1 that its paths share, drawn by `draw_step`: the estimate
    is f_0 + mean_k f_s / P(s), from B (K + 1) passes ([F] draws s from all steps alike and takes T f_s).
    Its gradient goes through log p, pi and rho in f, plus (f_s / P(s) - b) grad log q(r_0 .. r_{s-1}) with b the
    leave-one-out mean over the paths of the same x_0; all divided by the row's canvas length.

    tokens int64 [B, N] clean; canvas bool [B, N]; budget T and paths K at least 1; tau above 0.
    Returns (loss scalar, stats: dict of detached scalars: elbo and kl in nats per canvas token, and steps, how
    many a path takes). Raises ValueError on a budget or paths below 1, or tau not above 0.
    """
    at_least_one(budget=budget, paths=paths)
    if not tau > 0:
        raise ValueError(f"tau is {tau}: it must be above 0")
    B, T, K = len(tokens), budget, paths if budget > 1 else 0
    log_alpha, length = posterior(tokens, canvas), canvas.sum(1)
    s, weight = torch.zeros(B, K + 1, device=tokens.device).long(), torch.ones(B, K + 1, device=tokens.device)
    if K:
        step, p = draw_step(log_alpha, canvas, T, tau, K, generator)
        s[:, 1:], weight[:, 1:] = step[:, None], 1 / (K * p[:, None])
    s = s.flatten()
    tokens, canvas, log_alpha = (x.repeat_interleave(K + 1, 0) for x in (tokens, canvas, log_alpha))
    masked, log_q = draw_path(log_alpha, canvas, s, tau, generator, max_steps=T - 1)
    log_r = log_rho(log_alpha, masked, tau)
    token_term, kl = step_bound(denoiser, policy, tokens, masked, log_r, s == T - 1)
    elbo, kl, busy = (weight * x.view(B, K + 1) for x in (token_term - kl, kl, masked.any(1)))
    value, log_q = elbo.detach()[:, 1:], log_q.view(B, K + 1)[:, 1:]
    advantage = value - leave_one_out(value)
    # The value is the negative ELBO; the score-function term adds to the gradient only.
    score_term = (advantage * (log_q - log_q.detach())).sum(1)
    stats = {
        "elbo": (elbo.detach().sum(1) / length).mean(),
        "kl": (kl.detach().sum(1) / length).mean(),
        "steps": busy.sum(1).mean(),
    }
    return -((elbo.sum(1) + score_term) / length).mean(), stats


@torch.no_grad()
def order_elbo(denoiser, policy, posterior, tokens, canvas, budget, tau, samples, generator=None):
    """Monte Carlo estimate [B] (nats per sequence) of the ELBO over orders, over `samples` full paths:

        log p(x_0 | c) >= E_{M ~ q} sum_{s < T} f_s(M_s).

    With policy and posterior None: the bound of uniformly random orders at this budget, where every token
    picks its step uniformly (rho_i = pi_i = 1 / (T - s), so KL = 0). tokens int64 [B, N] clean; canvas bool
    [B, N]. Takes samples * T denoiser passes. Raises ValueError on a budget or samples below 1.
    """
    at_least_one(budget=budget, samples=samples)
    total = torch.zeros(len(tokens), device=tokens.device)
    log_alpha = None if posterior is None else posterior(tokens, canvas)
    for _ in range(samples):
        masked = canvas
        for s in range(budget):
            last = torch.full((len(tokens),), s == budget - 1, device=tokens.device)
            if posterior is None:
                log_r = torch.full(tokens.shape, -math.log(budget - s), device=tokens.device)
                uniform = torch.logit(log_r.exp())
                token_term, kl = step_bound(denoiser, lambda hidden: uniform, tokens, masked, log_r, last)
            else:
                log_r = log_rho(log_alpha, masked, tau)
                token_term, kl = step_bound(denoiser, policy, tokens, masked, log_r, last)
            total += token_term - kl
            masked = masked & ~draw_reveal(log_r, masked, generator)
    return total / samples


@torch.no_grad()
def left_to_right_order(denoiser, tokens, canvas, budget, least=0.5, lean=0.6):
    """The best left-to-right order of known tokens in `budget` steps: step int64 [B, N], -1 off the canvas.

    tokens int64 [B, N] clean; canvas bool [B, N], of L places. The canvas is cut into at most T runs of
    neighbours, one a step, by dynamic programming: with
    gain(a, b) = sum_{a <= i < b} log p(x_0^i | all but the canvas from a on) - least - lean a / L, in nats,
    best_k(b) = max_a best_{k-1}(a) + gain(a, b). So a cut falls where a token has to be known before the next can
    be, and nowhere else: it has to gain `least` nats, and up to `lean` nats more the further it lies to the right,
    so that of cuts about as good the one furthest left is taken: what can wait for more to be known does. One
    forward pass for each place of the canvas gives all gains, [B, L, L + 1] numbers.

    This is where the posterior starts (ours, not in [F]): the gradient of the bound improves on an order, but
    finds a poor one from nothing in a short training. Raises ValueError on a budget below 1.
    """
    at_least_one(budget=budget)
    length, T = canvas.sum(1), budget
    B, L = len(tokens), int(length.max())
    place = canvas.cumsum(1) - 1
    gain = torch.full((B, L, L + 1), -math.inf, device=tokens.device)
    for a in range(L):
        masked = canvas & (place >= a)
        logits, _ = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
        log_p = torch.where(masked, token_log_prob(logits, tokens), 0.0)
        by_place = torch.zeros_like(gain[:, 0]).scatter_add_(1, place.clamp(min=0) + 1, log_p)
        gain[:, a, a:] = by_place[:, a:].cumsum(1) - least - lean * (a / length)[:, None]
    best, cuts = torch.full_like(gain[:, 0], -math.inf), []
    best[:, 0] = 0.0
    total = []
    for _ in range(T):
        best, cut = (best[:, :L, None] + gain).max(1)
        cuts.append(cut)
        total.append(best[:, L])
    runs = torch.stack(total, 1).argmax(1)  # one less than the number of runs of a row
    step, end = torch.zeros_like(tokens), torch.full_like(runs, L)
    for k in reversed(range(T)):
        start = torch.where(k <= runs, cuts[k].gather(1, end[:, None]).squeeze(1), end)
        step = torch.where((place >= start[:, None]) & (place < end[:, None]), k, step)
        end = start
    return torch.where(canvas, step, -1)


def level_loss(posterior, tokens, canvas, step):
    """Cross-entropy (scalar, nats) of an `OrderPosterior`'s levels with known orders: step int64 [B, N] as the
    searches return it, -1 off the canvas; tokens int64 [B, N] clean; canvas bool [B, N]."""
    logits = posterior.level_logits(tokens, canvas)
    step = step.clamp(max=logits.shape[-1] - 1)
    return F.cross_entropy(logits.flatten(0, 1), step.flatten(), ignore_index=-1)


@torch.no_grad()
def sure_first_order(denoiser, tokens, canvas, budget, sure=0.95):
    """Known tokens in the order in which the denoiser becomes sure of them: step int64 [B, N], -1 off the canvas.

    Each step reveals, as known, all places whose most likely token has a probability above `sure` (the surest
    one where there is none), the last step all that is left. For canvases without a direction, like a grid.
    tokens int64 [B, N] clean; canvas bool [B, N]. Takes T passes. Raises ValueError on a budget below 1.
    """
    at_least_one(budget=budget)
    masked, step = canvas, torch.full_like(tokens, -1)
    for s in range(budget):
        logits, _ = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
        p = logits.float().softmax(-1).amax(-1)
        reveal = masked if s == budget - 1 else masked & (p > sure) | top_1(p, masked)
        step, masked = step.masked_fill(reveal, s), masked & ~reveal
    return step


# ---------------------------------------------------------------------------------------------------
# 4. Optional latent variable, VMD ([V]): z ~ N(0, I), one for all positions, carries what tokens revealed
#    in the same step have in common.  log p(x_0 | c) >= E_{z ~ q(z | c, x_0)} bound(x_0 | c, z)
#    - KL( q(z | c, x_0) || N(0, I) ), for any bound of section 3 on the denoiser given z.
# ---------------------------------------------------------------------------------------------------


class LatentEncoder(nn.Module):
    """q(z | c, x_0) = N(mu, diag exp(log_var)): clean tokens int64 [B, N], canvas bool [B, N] ->
    (mu, log_var), each float [B, latent_dim]."""

    def __init__(self, config):
        super().__init__()
        self.trunk = Trunk(config, min(2, config.n_layer))
        self.out = nn.Linear(config.n_embd, 2 * config.latent_dim)

    def forward(self, tokens_clean, canvas):
        weight = (canvas / canvas.sum(1, keepdim=True))[:, :, None]
        return self.out((self.trunk(tokens_clean) * weight).sum(1)).float().chunk(2, dim=-1)


def given(denoiser, z):
    """The denoiser with its latent fixed to z [B, latent_dim], as the losses, bounds and searches take one
    (not `generate`, which draws z itself and drops finished rows). Given several times B rows, each z is for as
    many neighbours."""

    def with_z(tokens):
        return denoiser(tokens, z.repeat_interleave(len(tokens) // len(z), 0))

    with_z.mask_id = denoiser.mask_id
    return with_z


def gaussian_kl(mu, log_var):
    """KL( N(mu, diag exp(log_var)) || N(0, I) ) in nats, [B], from mu and log_var [B, latent_dim]."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(-1)


def draw_latent(encoder, tokens, canvas, generator=None):
    """z ~ q(z | c, x_0) [B, latent_dim], reparameterised, and KL( q || N(0, I) ) [B] in nats."""
    mu, log_var = encoder(tokens, canvas)
    noise = torch.randn(mu.shape, device=mu.device, generator=generator)
    return mu + (0.5 * log_var).exp() * noise, gaussian_kl(mu, log_var)


def vmd_loss(denoiser, tokens, canvas, budget, generator=None):
    """Negative VMD bound, nats per canvas token (scalar), for generation in `budget` uniformly random steps.

    The budget matters: with as many steps as tokens the plain bound can already be tight, and a latent has
    nothing to add to it.
    """
    z, kl = draw_latent(denoiser.encoder, tokens, canvas, generator)
    return mdm_loss(given(denoiser, z), tokens, canvas, generator, budget) + (kl / canvas.sum(1)).mean()


def vmd_order_loss(denoiser, policy, posterior, tokens, canvas, budget, tau, paths, generator=None):
    """`order_loss` with the latent: one z for each x_0, shared by its paths; the KL of z added."""
    z, kl = draw_latent(denoiser.encoder, tokens, canvas, generator)
    loss, stats = order_loss(given(denoiser, z), policy, posterior, tokens, canvas, budget, tau, paths, generator)
    latent_kl = (kl / canvas.sum(1)).mean()
    return loss + latent_kl, dict(stats, latent_kl=latent_kl.detach())


@torch.no_grad()
def vmd_elbo(denoiser, policy, posterior, tokens, canvas, budget, tau, samples, generator=None):
    """`order_elbo` with the latent: Monte Carlo estimate [B] (nats per sequence), a new z for each sample."""
    total = 0.0
    for _ in range(samples):
        z, kl = draw_latent(denoiser.encoder, tokens, canvas, generator)
        bound = order_elbo(given(denoiser, z), policy, posterior, tokens, canvas, budget, tau, 1, generator)
        total = total + bound - kl
    return total / samples


# ---------------------------------------------------------------------------------------------------
# 5. Samplers: the learned order and the fixed rules.
# ---------------------------------------------------------------------------------------------------

CONFIDENCE_RULES = ("top_prob", "top_prob_margin", "entropy", "threshold")  # these may be eos_aware
STRATEGIES = ("learned", "iid", *CONFIDENCE_RULES, "left_to_right", "random")


class Generation(NamedTuple):
    tokens: torch.Tensor  # int64 [B, N]
    reveal_step: torch.Tensor  # int64 [B, N], the step that revealed each position, -1 off the canvas
    steps: torch.Tensor  # int64 [B], forward passes used


def top_k(score, candidates, k):
    """bool [B, N]: the k[b] (int64 [B]) candidates of highest score in each row, all if there are fewer."""
    order = score.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    return candidates & (order.argsort(dim=1) < k[:, None])


def top_1(score, candidates):
    """bool [B, N]: the candidate of highest score in each row (none if there are none)."""
    best = score.masked_fill(~candidates, -math.inf).argmax(dim=1)
    return candidates & F.one_hot(best, score.shape[1]).bool()


def rule_score(strategy, logits, generator=None):
    """What a fixed rule ranks positions by, highest first: float [B, N] from logits [B, N, V]."""
    B, N, _ = logits.shape
    if strategy == "random":
        return torch.rand(B, N, device=logits.device, generator=generator)
    if strategy == "left_to_right":
        return -torch.arange(N, device=logits.device).float().expand(B, N)
    if strategy == "entropy":
        log_p = logits.float().log_softmax(-1)
        return (log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)  # the MASK token has log p = -inf
    p = logits.float().softmax(-1)
    if strategy == "top_prob_margin":
        best, second = p.topk(2, dim=-1).values.unbind(-1)
        return best - second
    return p.amax(-1)


def choose_by_rule(strategy, logits, masked, steps_left, eos_id=None, threshold=0.9, generator=None):
    """Positions a fixed rule reveals, bool [B, N], at least one in each row that has any left.

    logits [B, N, V]; masked bool [B, N]; steps_left int, this one counted. The rules that rank take the best
    K = masked / steps_left, rounded up; iid draws each with probability 1 / steps_left; "threshold" takes all
    above `threshold`; these two take their best one where that gives none.
    eos_id: given, the rule is EOS-aware: masked positions whose most likely token is EOS are revealed
    at once and do not count towards K.
    """
    if strategy == "iid":  # each with probability 1 / steps_left, and the smallest draw if there is none
        u = torch.rand(masked.shape, device=masked.device, generator=generator)
        return masked & (u < 1 / steps_left) | top_1(-u, masked)
    eos = torch.zeros_like(masked) if eos_id is None else masked & (logits.argmax(-1) == eos_id)
    candidates = masked & ~eos
    score = rule_score(strategy, logits, generator)
    if strategy == "threshold":
        return eos | candidates & (score > threshold) | top_1(score, candidates)
    k = (candidates.sum(1) + steps_left - 1) // steps_left
    return eos | top_k(score, candidates, k)


def choose_by_policy(pi_logits, masked, generator=None):
    """r_i ~ Bern(pi_i) for i in M_s, bool [B, N]; the position of largest pi where no r_i = 1 (the bound is for
    the model that would spend an empty step there)."""
    u = torch.rand(masked.shape, device=masked.device, generator=generator)
    reveal = masked & (u < pi_logits.sigmoid())
    return reveal | top_1(pi_logits, masked) & ~reveal.any(1, keepdim=True)


def draw_tokens(logits, temperature, generator=None):
    """Tokens int64 [B, N] from softmax(logits / temperature); the most likely ones at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    u = torch.rand(logits.shape, device=logits.device, generator=generator)
    return (logits.float() / temperature - (-u.log()).log()).argmax(-1)  # Gumbel-max


@torch.no_grad()
def generate(
    denoiser, tokens, canvas, strategy, budget, policy=None, temperature=0.0, generator=None,
    eos_aware=False, threshold=0.9,
):  # fmt: skip
    """Fill the canvas in at most `budget` forward passes. Rows that are finished leave the batch.

    tokens int64 [B, N] (what lies on the canvas is ignored); canvas bool [B, N]; strategy: one of
    STRATEGIES ("learned" needs `policy`); eos_aware: see `choose_by_rule`, for CONFIDENCE_RULES only;
    threshold: the probability above which "threshold" reveals; temperature of the tokens' draw, 0 for the
    most likely ones. The last step reveals all that is left.
    A denoiser with a latent gets one z ~ N(0, I) a row, drawn before the first step.
    Returns a Generation. Raises ValueError on an unknown strategy, a budget below 1, "learned" without a
    policy, or eos_aware with another rule.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
    at_least_one(budget=budget)
    if strategy == "learned" and policy is None:
        raise ValueError("strategy 'learned' needs a policy")
    if eos_aware and strategy not in CONFIDENCE_RULES:
        raise ValueError(f"eos_aware goes with {', '.join(CONFIDENCE_RULES)}, not with {strategy!r}")
    tokens = tokens.masked_fill(canvas, denoiser.mask_id)
    reveal_step = torch.full_like(tokens, -1)
    steps = torch.zeros_like(tokens[:, 0])
    latent_dim = getattr(denoiser, "latent_dim", 0)
    if latent_dim:
        z = torch.randn(len(tokens), latent_dim, device=tokens.device, generator=generator)
    rows = canvas.any(1).nonzero().squeeze(1)
    for s in range(budget):
        if len(rows) == 0:
            break
        x, masked = tokens[rows], canvas[rows] & (reveal_step[rows] < 0)
        logits, hidden = denoiser(x, z[rows]) if latent_dim else denoiser(x)
        if s == budget - 1:
            reveal = masked
        elif strategy == "learned":
            reveal = choose_by_policy(policy(hidden), masked, generator)
        else:
            eos_id = denoiser.eos_id if eos_aware else None
            reveal = choose_by_rule(strategy, logits, masked, budget - s, eos_id, threshold, generator)
        tokens[rows] = torch.where(reveal, draw_tokens(logits, temperature, generator), x)
        reveal_step[rows] = reveal_step[rows].masked_fill(reveal, s)
        steps[rows] = s + 1
        rows = rows[(masked & ~reveal).any(1)]
    return Generation(tokens, reveal_step, steps)
