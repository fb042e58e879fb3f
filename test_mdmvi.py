"""Tests of mdmvi.py and of the scripts around it. Run: pytest test_mdmvi.py

Section "exactness" holds the mathematics to account on problems so small that every order, token and mask
can be enumerated. The enumeration is written anew, in plain loops and float64, and calls nothing of mdmvi,
so that one mistake cannot be on both sides. Random results are compared over many replicated rows, from
fixed seeds: means within five standard errors, distributions by chi-square.
Sections for the scripts follow below it.
"""

import functools
import gzip
import io
import itertools
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_gsm8k
import mdmvi
import sample
import train

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------

TAU = 0.5
X0 = torch.tensor([[2, 0, 1, 1], [1, 2, 0, 0]])
CANVAS = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()  # of unequal length, each with a prompt


class Toy:
    """Denoiser, policy and posterior that look up their answers, one entry for each possible sequence."""

    def __init__(self, length=4, vocab=3, seed=0):
        g, states = rng(seed), (vocab + 1) ** length
        self.mask_id, self.eos_id = vocab, 0
        self.base = (vocab + 1) ** torch.arange(length)
        self.logits = (1.5 * torch.randn(states, length, vocab, generator=g)).requires_grad_()
        self.pi = torch.randn(states, length, 1, generator=g).requires_grad_()
        self.score = torch.randn(states, length, generator=g).requires_grad_()

    def __call__(self, tokens):
        state = (tokens * self.base).sum(1)
        return self.logits[state], self.pi[state]

    def policy(self, hidden):
        return hidden.squeeze(2)

    def posterior(self, tokens, canvas=None):
        return F.logsigmoid(self.score[(tokens * self.base).sum(1)])


class LatentToy(Toy):
    """A Toy that moves with z [B, 1]; its encoder looks up (mu, log_var). Without z it answers for all of
    `grid` at once, which adds a last dimension to everything that is computed from it below."""

    latent_dim = 1

    def __init__(self, length=4, vocab=3, seed=0):
        super().__init__(length, vocab, seed)
        g, self.grid = rng(seed + 100), None
        self.slope = (1.5 * torch.randn(self.logits.shape, generator=g)).requires_grad_()
        self.turn = torch.randn(self.pi.shape, generator=g).requires_grad_()
        self.code = (0.7 * torch.randn(len(self.pi), 2, generator=g)).requires_grad_()

    def __call__(self, tokens, z=None):
        state = (tokens * self.base).sum(1)
        move = (lambda x, by: x[..., None] + by[..., None] * self.grid) if z is None else (lambda x, by: x + by * z[:, None])
        return move(self.logits[state], self.slope[state]), move(self.pi[state], self.turn[state])

    def encoder(self, tokens, canvas):
        return self.code[(tokens * self.base).sum(1)].chunk(2, -1)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def replicate(n, *tensors):
    return [x.repeat(n, *[1] * (x.dim() - 1)) for x in tensors]


def places(row):
    return row.nonzero().flatten().tolist()


def orders(canvas, T):
    """All paths r as {position: the step that reveals it}, so that M_s = {i: order[i] >= s}."""
    positions = places(canvas)
    for steps in itertools.product(range(T), repeat=len(positions)):
        yield dict(zip(positions, steps))


def look(toy, x0, M):
    """(log p_theta [N, V], pi [N]) on x0 with the positions M masked; of a LatentToy [N, V, Z] and [N, Z]."""
    logits, hidden = toy(torch.tensor([[toy.mask_id if i in M else int(x) for i, x in enumerate(x0)]]))
    return logits[0].double().log_softmax(1), toy.policy(hidden)[0].double().sigmoid()


def joint(toy, x0, order, T):
    """log p(r) and log p(x_0 | r): r_i ~ Bern(pi_i) before step T-1, which reveals all that is left."""
    log_order, log_tokens = 0.0, 0.0
    for s in range(T):
        M = [i for i in order if order[i] >= s]
        log_p, pi = look(toy, x0, M)
        for i in M:
            if s < T - 1:
                log_order = log_order + (pi[i] if order[i] == s else 1 - pi[i]).log()
            if order[i] == s:
                log_tokens = log_tokens + log_p[i, x0[i]]
    return log_order, log_tokens


def q_path(log_alpha, order, steps):
    """q of the first `steps` steps of a path, from rho_i = (alpha_i / max over M_s of alpha)^(1/tau)."""
    alpha, q = log_alpha.double().exp(), torch.ones((), dtype=torch.double)
    for s in range(steps):
        M = [i for i in order if order[i] >= s]
        for i in M:
            rho = (alpha[i] / max(alpha[j] for j in M)) ** (1 / TAU)
            q = q * (rho if order[i] == s else 1 - rho)
    return q


def exact_log_p(toy, x0, canvas, T):
    return torch.stack([sum(joint(toy, x0, order, T)) for order in orders(canvas, T)]).logsumexp(0)


def exact_elbo(toy, x0, canvas, T):
    """E_q[log p(x_0, r) - log q(r)], its KL part, and how many steps find something masked."""
    elbo, kl, steps = 0.0, 0.0, 0.0
    for order in orders(canvas, T):
        q = q_path(toy.posterior(x0[None])[0], order, T - 1)
        if q > 0:
            log_order, log_tokens = joint(toy, x0, order, T)
            elbo = elbo + q * (log_order + log_tokens - q.log())
            kl = kl + q * (q.log() - log_order)
            steps = steps + q * (1 + max(order.values()))
    return elbo, kl, steps


def exact_mdm(toy, x0, canvas):
    """Of the plain model: (bound, log-likelihood) where every order of single tokens is as likely."""
    log_p = []
    for permutation in itertools.permutations(places(canvas)):
        left = [permutation[j:] for j in range(len(permutation))]
        log_p.append(sum(look(toy, x0, M)[0][M[0], x0[M[0]]] for M in left))
    log_p = torch.stack(log_p)
    return log_p.mean(), log_p.exp().mean().log()


def exact_uniform(toy, x0, canvas, T):
    """Of uniformly random orders in T steps: (log-likelihood, bound)."""
    log_p = torch.stack([joint(toy, x0, order, T)[1] for order in orders(canvas, T)])
    return log_p.logsumexp(0) - math.log(len(log_p)), log_p.mean(0)


EPSILON = torch.linspace(-8, 8, 129, dtype=torch.double)
NORMAL = (-EPSILON.square() / 2).exp() / math.sqrt(2 * math.pi)


def exact_vmd(toy, x0, canvas, T, learned):
    """log p(x_0 | c) and the VMD bound E_q[bound given z] - E_q[log q(z) - log p(z)], by the trapezoid rule over z."""

    def at(z):
        toy.grid = z
        return (exact_log_p(toy, x0, canvas, T), exact_elbo(toy, x0, canvas, T)[0]) if learned else exact_uniform(toy, x0, canvas, T)

    log_p = torch.trapezoid(NORMAL * at(EPSILON)[0].exp(), EPSILON).log()
    mu, log_var = (x.double().squeeze() for x in toy.encoder(x0[None], canvas[None]))
    z = mu + (log_var / 2).exp() * EPSILON
    log_q_over_prior = z.square() / 2 - EPSILON.square() / 2 - log_var / 2
    return log_p, torch.trapezoid(NORMAL * (at(z)[1] - log_q_over_prior), EPSILON)


def assert_mean(samples, expected, precision):
    """samples [n, ...] average to `expected` within five standard errors, small enough to mean something."""
    samples, expected = samples.detach().double(), torch.as_tensor(expected).detach().double()
    error, scale = samples.std(0) / len(samples) ** 0.5, expected.norm()
    assert error.norm() <= precision * scale, f"no power: error is {error.norm() / scale:.3g} of the value"
    off = (samples.mean(0) - expected).abs() / (5 * error + 1e-4 * scale + 1e-12)
    assert off.max() < 1, f"{5 * off.max():.1f} standard errors off"


def assert_distribution(outcomes, probability):
    """Chi-square of a list of outcomes against {outcome: probability}; the rare ones share one cell."""
    n, counts = len(outcomes), Counter(outcomes)
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)
    assert all(probability.get(o, 0) > 0 for o in counts), "an outcome that cannot be"
    cells = [(counts[o], n * p) for o, p in probability.items() if n * p >= 10]
    rest = (n - sum(c for c, _ in cells), n - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 10 else []
    dof = len(cells) - 1
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    assert statistic < dof + 5 * math.sqrt(2 * dof), f"chi-square {statistic:.0f} on {dof} degrees of freedom"


def test_enumerated_likelihood_sums_to_one():
    total, x0 = 0.0, X0[1].clone()
    for tokens in itertools.product(range(3), repeat=2):
        x0[CANVAS[1]] = torch.tensor(tokens)
        total += exact_log_p(Toy(), x0, CANVAS[1], T=3).exp().item()
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_order_elbo(T):
    toy, (tokens, canvas) = Toy(), replicate(20000, X0, CANVAS)
    learned = mdmvi.order_elbo(toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 2, rng(T))
    uniform = mdmvi.order_elbo(toy, None, None, tokens, canvas, T, TAU, 2, rng(T))
    for row in range(2):
        bound, log_p = exact_elbo(toy, X0[row], CANVAS[row], T)[0], exact_log_p(toy, X0[row], CANVAS[row], T)
        assert abs(bound - log_p) < 1e-9 if T == 1 else bound < log_p - 0.01  # at T = 1 no order is left
        assert_mean(learned[row::2], bound, precision=0.005)
        assert_mean(uniform[row::2], exact_uniform(toy, X0[row], CANVAS[row], T)[1], precision=0.005)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_order_loss_and_its_gradient(T):
    toy, (tokens, canvas) = Toy(seed=3), replicate(1000, X0, CANVAS)
    parameters = [toy.logits, toy.pi, toy.score]
    exact = [exact_elbo(toy, x0, c, T) for x0, c in zip(X0, CANVAS)]
    loss, kl = (sum(e[j] / c.sum() for e, c in zip(exact, CANVAS)) / 2 for j in (0, 1))
    expected = [-loss, loss, kl, (exact[0][2] + exact[1][2]) / 2]
    expected += torch.autograd.grad(-loss, parameters, materialize_grads=True)
    samples = []
    for seed in range(40):  # the rows of a call are stratified together: standard errors are over calls
        estimate, stats = mdmvi.order_loss(
            toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, paths=8, generator=rng(seed)
        )
        gradient = torch.autograd.grad(estimate, parameters, materialize_grads=True)
        samples.append((estimate, stats["elbo"], stats["kl"], stats["steps"], *gradient))
    for draws, value in zip(zip(*samples), expected):
        assert_mean(torch.stack(draws), value, precision=0.02)


def test_leave_one_out():
    value = torch.randn(3, 4, generator=rng(0))
    for b, k in itertools.product(range(3), range(4)):
        others = [value[b, j].item() for j in range(4) if j != k]
        assert mdmvi.leave_one_out(value)[b, k].item() == pytest.approx(sum(others) / 3, abs=1e-6)
    assert (mdmvi.leave_one_out(value[:, :1]) == 0).all()


def test_paths_of_a_group_share_x0_and_step(monkeypatch):
    toy, (tokens, canvas), seen = Toy(), replicate(3, X0, CANVAS), []
    monkeypatch.setattr(mdmvi, "leave_one_out", lambda value: seen.append(value) or value)
    certain = -100.0 * torch.arange(4).expand(6, 4)  # one token a step: paths of a kind are equal
    mdmvi.order_loss(toy, toy.policy, lambda *_: certain, tokens, canvas, 3, TAU, 8, rng(0))
    assert seen[0].shape == (6, 8) and (seen[0] == seen[0][:, :1]).all()
    assert len(seen[0].unique()) >= 3  # two steps of one x_0, one of the other


def test_rloo_halves_the_variance(monkeypatch):
    model = tiny_denoiser()
    policy, log_alpha = mdmvi.UnmaskPolicy(model.config), F.logsigmoid(torch.randn(1, 16, generator=rng(0)))
    tokens, canvas = torch.randint(5, (1, 16), generator=rng(1)), torch.arange(16)[None] > 0
    tokens, canvas, log_alpha = replicate(500, tokens, canvas, log_alpha)

    def variance():
        leaf = log_alpha.clone().requires_grad_()  # one for each row, so that a row has its own gradient
        loss, _ = mdmvi.order_loss(model, policy, lambda *_: leaf, tokens, canvas, 4, TAU, 8, rng(0))
        return torch.autograd.grad(loss, leaf)[0].var(0).sum()

    with_baseline = variance()
    monkeypatch.setattr(mdmvi, "leave_one_out", torch.zeros_like)
    assert with_baseline < 0.5 * variance()


def test_plain_loss_and_bound():
    toy, (tokens, canvas) = Toy(seed=4), replicate(20000, X0, CANVAS)
    exact = [exact_mdm(toy, x0, c) for x0, c in zip(X0, CANVAS)]
    samples = mdmvi.mdm_elbo(toy, tokens, canvas, 2, rng(0))
    for row, (bound, log_p) in enumerate(exact):
        assert bound < log_p - 0.01
        assert_mean(samples[row::2], bound, precision=0.005)
    losses = torch.stack([mdmvi.mdm_loss(toy, tokens[:4000], canvas[:4000], rng(seed)) for seed in range(60)])
    assert_mean(losses, -sum(bound / c.sum() for (bound, _), c in zip(exact, CANVAS)) / 2, precision=0.005)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_plain_loss_in_T_steps(T):
    toy, (tokens, canvas) = Toy(), replicate(2000, X0, CANVAS)
    exact = [-sum(exact_uniform(toy, x0, c, steps)[1] / c.sum() for x0, c in zip(X0, CANVAS)) / 2 for steps in (1, 2, 3)]
    assert exact[0] < exact[1] - 0.03 < exact[2] - 0.06  # far enough apart to tell a wrong T
    losses = torch.stack([mdmvi.mdm_loss(toy, tokens, canvas, rng(seed), T) for seed in range(200)])
    assert_mean(losses, exact[T - 1], precision=0.002)


def test_stratified_uniform():
    u = torch.stack([mdmvi.stratified_uniform(5, "cpu", rng(seed)) for seed in range(2000)])
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u.sort(1).values.diff(dim=1), torch.tensor(0.2), atol=1e-5)
    for row in range(5):
        assert_distribution((u[:, row] * 10).int().tolist(), dict.fromkeys(range(10), 0.1))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_draw_path_and_its_log_q(steps):
    log_alpha = F.logsigmoid(torch.tensor([0.3, -0.5, 2.0, 0.9, -1.2]))
    canvas = torch.tensor([1, 1, 0, 1, 1]).bool()
    masked, log_q = mdmvi.draw_path(
        *replicate(20000, log_alpha[None], canvas[None], torch.tensor([steps])), TAU, rng(steps)
    )
    probability = {}  # of (M_steps, log q): a path is known by its log q
    for order in orders(canvas, steps + 1):
        q = q_path(log_alpha, order, steps).item()
        if q > 0:
            probability[tuple(i for i in order if order[i] == steps), math.log(q)] = q
    outcomes = []
    for M, value in zip(masked.tolist(), log_q.tolist()):
        M = tuple(i for i in range(5) if M[i])
        exact = min((x for other, x in probability if other == M), key=lambda x: abs(x - value))
        assert abs(exact - value) < 1e-4
        outcomes.append((M, exact))
    assert_distribution(outcomes, probability)


def test_draw_step():
    """Each step comes as often as it says, and the ones that a path does not reach come seldom."""
    log_alpha = F.logsigmoid(torch.tensor([[0.3, -0.5, 2.0, 0.9, -1.2]]))
    log_alpha, canvas = replicate(20000, log_alpha, torch.tensor([[1, 1, 0, 1, 1]]).bool())
    s, p = mdmvi.draw_step(log_alpha, canvas, 5, TAU, 3, rng(0))
    assert s.min() == 1 and s.max() == 4
    for k in range(1, 5):
        assert_mean((s == k) / p, 1.0, precision=0.05)
    certain = -100.0 * torch.arange(5).expand(20000, 5)  # one token a step: four steps
    s, p = mdmvi.draw_step(certain, canvas, 9, TAU, 3, rng(0))
    share = {k: 0.2 / 8 + (0.8 / 3 if k < 4 else 0) for k in range(1, 9)}
    assert_distribution(s.tolist(), share)
    assert torch.allclose(p, torch.tensor([share[k] for k in s.tolist()]), atol=1e-5)


def test_log_one_minus():
    log_p = torch.tensor([-20.0, -3.0, -0.5, -0.05, -1e-3, -1e-5, 0.0], requires_grad=True)
    value = mdmvi.log_one_minus(log_p)
    assert torch.allclose(value[:-1].double(), (1 - log_p[:-1].double().exp()).log(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert gradient.isfinite().all() and gradient[-1] == 0 and value[-1].isfinite()  # rho = 1


def test_draw_path_rows():
    steps, canvas = torch.arange(400) % 6, torch.rand(400, 5, generator=rng(0)) < 0.7
    log_alpha = F.logsigmoid(torch.randn(400, 5, generator=rng(1)))
    masked, log_q = mdmvi.draw_path(log_alpha, canvas, steps, TAU, rng(2))
    assert not (masked & ~canvas).any()
    assert (masked.sum(1) <= (canvas.sum(1) - steps).clamp(min=0)).all()  # at least one a step
    assert torch.equal(masked[steps == 0], canvas[steps == 0]) and (log_q[steps == 0] == 0).all()
    changed = torch.where(torch.arange(400) % 7 == 0, steps, 5 - steps)
    same = changed == steps  # the other rows' steps and the bound on them make no difference to these
    for bound in (5, 8):
        again = mdmvi.draw_path(log_alpha, canvas, changed, TAU, rng(2), max_steps=bound)
        assert torch.equal(again[0][same], masked[same]) and torch.equal(again[1][same], log_q[same])


RULES = ("top_prob", "top_prob_margin", "entropy", "threshold", "left_to_right", "iid", "random", "learned")
EOS_AWARE = RULES[:4]
WITH_EOS = [(rule, False) for rule in RULES] + [(rule, True) for rule in EOS_AWARE]


def reveal_probability(strategy, M, R, pi, left):
    """That exactly the positions R of M are revealed with `left` steps to go."""
    if left == 1:
        return float(R == M)
    if strategy == "random":
        k = math.ceil(len(M) / left)
        return (len(R) == k) / math.comb(len(M), k)
    pi = {i: pi[i].item() if strategy == "learned" else 1 / left for i in M}
    if not R:
        return 0.0
    p = math.prod(pi[i] if i in R else 1 - pi[i] for i in M)
    forced = [max(M, key=pi.get)] if strategy == "learned" else M  # one of these where none was drawn
    return p + (math.prod(1 - pi[i] for i in M) / len(forced) if len(R) == 1 and R[0] in forced else 0.0)


@pytest.mark.parametrize("T, temperature", [(2, 1.0), (3, 0.6)])
@pytest.mark.parametrize("strategy", ["learned", "iid", "random"])
def test_distribution_of_tokens_and_steps(strategy, T, temperature):
    toy, canvas, x0 = Toy(seed=5), CANVAS[0], X0[0].clone()
    probability = {}
    for *tokens, order in itertools.product(*[(0, 1, 2)] * 3, orders(canvas, T)):
        x0[canvas], p = torch.tensor(tokens), 1.0
        for s in range(max(order.values()) + 1):
            M, R = [i for i in order if order[i] >= s], [i for i in order if order[i] == s]
            log_p, pi = look(toy, x0, M)
            p *= reveal_probability(strategy, M, R, pi, T - s)
            p *= math.prod((log_p[i] / temperature).softmax(-1)[x0[i]].item() for i in R)
        probability[(*tokens, *order.values())] = p
    out = mdmvi.generate(
        toy, *replicate(40000, x0[None], canvas[None]), strategy, T, toy.policy, temperature, rng(T)
    )
    outcomes = torch.cat((out.tokens[:, canvas], out.reveal_step[:, canvas]), 1)
    assert_distribution(list(map(tuple, outcomes.tolist())), probability)


def tiny_denoiser(vocab_size=5, mask_id=5, n_layer=1, latent_dim=0):
    """A Denoiser with weights large enough for probabilities far from uniform. Seeds what comes after it."""
    torch.manual_seed(0)
    model = mdmvi.Denoiser(mdmvi.ModelConfig(vocab_size, 16, n_layer, 2, 8, 12, mask_id, eos_id=0, latent_dim=latent_dim))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(float(weight.dim() == 1), 0.6)
    return model


def problems():
    """Canvases of every size and shape, the first of them empty."""
    tokens = torch.randint(3, (30, 6), generator=rng(0))
    return tokens, torch.rand(30, 6, generator=rng(1)) < torch.linspace(0, 1.5, 30)[:, None]


def slow_rule(strategy, p, M, left, eos_id, threshold):
    """The positions of M that a fixed rule reveals, from p [N, V]."""
    score = {
        "top_prob": lambda i: p[i].max(),
        "threshold": lambda i: p[i].max(),
        "top_prob_margin": lambda i: np.sort(p[i])[-1] - np.sort(p[i])[-2],
        "entropy": lambda i: sum(x * math.log(x) for x in p[i] if x > 0),
        "left_to_right": lambda i: -i,
    }[strategy]
    eos = [i for i in M if p[i].argmax() == eos_id]
    ranked = sorted((i for i in M if i not in eos), key=score, reverse=True)
    if strategy == "threshold":
        return eos + ranked[:1] + [i for i in ranked[1:] if score(i) > threshold]
    return eos + ranked[: math.ceil(len(ranked) / left)]


@pytest.mark.parametrize("strategy, eos_aware", [pair for pair in WITH_EOS if pair[0] in RULES[:5]])
def test_rules_agree_with_slow_ones(strategy, eos_aware):
    model, (tokens, canvas) = Toy(length=6), problems()
    for budget in (1, 2, 3, 4, 9):
        out = mdmvi.generate(model, tokens, canvas, strategy, budget, eos_aware=eos_aware, threshold=0.6)
        for row in range(len(tokens)):
            x, M, steps = tokens[row].masked_fill(canvas[row], model.mask_id), places(canvas[row]), 0
            reveal_step = [-1] * len(x)
            while M:
                p, left = model(x[None])[0][0].double().softmax(-1).detach().numpy(), budget - steps
                R = M if left == 1 else slow_rule(strategy, p, M, left, 0 if eos_aware else None, 0.6)
                for i in R:
                    x[i], reveal_step[i] = int(p[i].argmax()), steps
                M, steps = [i for i in M if i not in R], steps + 1
            assert out.reveal_step[row].tolist() == reveal_step and out.steps[row] == steps
            assert torch.equal(out.tokens[row], x)


@pytest.mark.parametrize("strategy, eos_aware", WITH_EOS)
def test_what_every_sampler_promises(strategy, eos_aware):
    model, (tokens, canvas) = tiny_denoiser(mask_id=3), problems()
    policy, other = mdmvi.UnmaskPolicy(model.config), tokens.where(~canvas, 2 - tokens)
    for budget, temperature in itertools.product((1, 3, 20), (0.0, 1.0)):
        out, again = (
            mdmvi.generate(model, x, canvas, strategy, budget, policy, temperature, rng(1), eos_aware)
            for x in (tokens, other)
        )
        assert all(torch.equal(a, b) for a, b in zip(out, again))  # what lies on the canvas is ignored
        assert torch.equal(out.tokens[~canvas], tokens[~canvas]) and (out.reveal_step[~canvas] == -1).all()
        assert (out.tokens[canvas] != model.mask_id).all() and (out.steps <= budget).all()
        for c, reveal_step, steps in zip(canvas, out.reveal_step, out.steps):
            assert set(reveal_step[c].tolist()) == set(range(steps))  # all, and at least one a step


def test_rows_that_reach_the_denoiser():
    model, seen = tiny_denoiser(), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
    tokens, canvas = torch.zeros(4, 4).long(), torch.arange(4) < torch.tensor([4, 0, 1, 2])[:, None]
    out = mdmvi.generate(model, tokens, canvas, "left_to_right", budget=4)
    assert out.steps.tolist() == [4, 0, 1, 2] and seen == [3, 2, 1, 1]
    mdmvi.generate(model, tokens, canvas & False, "iid", budget=4)
    assert len(seen) == 4
    policy, posterior = mdmvi.UnmaskPolicy(model.config), mdmvi.OrderPosterior(model.config)
    mdmvi.order_loss(model, policy, posterior, tokens, canvas, 3, TAU, paths=8)
    assert seen[4:] == [4 * 9]


def test_seeds():
    model, (tokens, canvas) = tiny_denoiser(), problems()
    tokens, canvas = tokens[15:], canvas[15:]
    policy, posterior = mdmvi.UnmaskPolicy(model.config), mdmvi.OrderPosterior(model.config)
    torch.nn.init.normal_(posterior.level.weight)  # scores all alike would reveal everything at once, whatever the seed

    def loss(seed):
        return mdmvi.order_loss(model, policy, posterior, tokens, canvas, 4, TAU, 3, rng(seed))[0].item()

    def sample(seed, strategy):
        out = mdmvi.generate(model, tokens, canvas, strategy, 4, policy, 1.0, rng(seed))
        return torch.cat((out.tokens, out.reveal_step)).tolist()

    assert loss(1) == loss(1) != loss(2)
    for strategy in RULES:
        assert sample(1, strategy) == sample(1, strategy) != sample(2, strategy)


def test_what_generate_refuses():
    for strategy, budget, word in (("best", 3, "best"), ("iid", 0, "budget"), ("learned", 3, "policy")):
        with pytest.raises(ValueError, match=word):
            mdmvi.generate(Toy(), X0, CANVAS, strategy, budget)
    for strategy in RULES[4:]:
        with pytest.raises(ValueError, match="eos_aware"):
            mdmvi.generate(Toy(), X0, CANVAS, strategy, 3, Toy().policy, eos_aware=True)


def test_what_the_bounds_refuse():
    toy, models = Toy(), (Toy(), Toy().policy, lambda x, on: torch.zeros(x.shape))
    for word, values in (("budget is 0", (0, 0.1, 2)), ("tau is 0", (2, 0, 2)), ("paths is 0", (2, 0.1, 0))):
        with pytest.raises(ValueError, match=word):
            mdmvi.order_loss(*models, X0, CANVAS, *values)
    for word, values in (("budget is 0", (0, 0.1, 2)), ("samples is 0", (2, 0.1, 0))):
        with pytest.raises(ValueError, match=word):
            mdmvi.order_elbo(*models, X0, CANVAS, *values)
    with pytest.raises(ValueError, match="samples is 0"):
        mdmvi.mdm_elbo(toy, X0, CANVAS, 0)
    for search in (mdmvi.left_to_right_order, mdmvi.sure_first_order):
        with pytest.raises(ValueError, match="budget is 0"):
            search(toy, X0, CANVAS, 0)


def slow_denoiser(model, tokens, z):
    """The network on one sequence and z [latent_dim] in float64, a head at a time: logits [N, V], hidden [N, D]."""
    w = {name.removeprefix("trunk."): x.detach().double().numpy() for name, x in model.named_parameters()}
    D, heads = model.config.n_embd, model.config.n_head
    size = D // heads
    angle = np.outer(np.arange(len(tokens)), 10000.0 ** (-2 * np.arange(size // 2) / size))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * w[name]

    def turn(x):  # each feature of the first half and its partner in the second are one complex number
        z = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * np.exp(1j * angle)
        return np.concatenate((z.real, z.imag), 1)

    x = w["wte.weight"][tokens] + w["from_z.weight"] @ z
    for layer in range(model.config.n_layer):
        name = f"blocks.{layer}."
        h, mixed = norm(x, name + "norm_1.weight"), []
        for wq, wk, wv in w[name + "qkv.weight"].reshape(heads, 3, size, D):
            attention = np.exp(turn(h @ wq.T) @ turn(h @ wk.T).T / math.sqrt(size))
            mixed.append(attention / attention.sum(1, keepdims=True) @ (h @ wv.T))
        x = x + np.concatenate(mixed, 1) @ w[name + "proj.weight"].T
        h = norm(x, name + "norm_2.weight")
        gate = h @ w[name + "w1.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[name + "w2.weight"].T)) @ w[name + "w3.weight"].T
    hidden = norm(x, "norm.weight")
    return hidden @ w["lm_head.weight"].T, hidden


def test_denoiser_agrees_with_a_slow_one():
    model, tokens = tiny_denoiser(n_layer=2, latent_dim=2), torch.randint(6, (3, 9), generator=rng(0))
    z = torch.randn(3, 2, generator=rng(1))
    for latent, outputs in ((z, model(tokens, z)), (0 * z, model(tokens))):
        for row, z_row, *fast in zip(tokens, latent, *outputs):
            for a, b in zip(fast, slow_denoiser(model, row.numpy(), z_row.numpy())):
                assert np.abs(a.detach().numpy() - b).max() < 1e-5


def test_denoiser_contract():
    model, tokens = tiny_denoiser(mask_id=3), torch.full((1, 16), 3)
    logits, hidden = model(tokens)
    assert logits.shape == (1, 16, 5) and hidden.shape == (1, 16, 8)
    assert torch.equal(logits == -math.inf, (torch.arange(5) == 3).expand(1, 16, 5))  # never predicts MASK
    for changed in (0, 15):  # every position sees both ends
        assert (model(tokens.index_fill(1, torch.tensor([changed]), 1))[1] != hidden).any(-1).all()
    with pytest.raises(ValueError, match="context"):
        model(torch.zeros(1, 17).long())


@pytest.mark.parametrize("T", [1, 2, 3, 4, 6])
def test_left_to_right_order_is_the_best_of_all(T):
    """Against all ways of cutting the canvas into at most T runs, priced one by one."""
    least, lean, toy = 0.1, 0.6, Toy(seed=3)
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)[::2]
    canvas = torch.ones_like(tokens).bool()
    canvas[::3, 1] = False  # a canvas with a hole, and rows of unequal length
    found = mdmvi.left_to_right_order(toy, tokens, canvas, T, least, lean)
    several = set()
    for row, on, got in zip(tokens, canvas, found):
        where, prices = places(on), {}
        for cuts in itertools.product([0, 1], repeat=len(where) - 1):
            if sum(cuts) >= T:
                continue
            steps = np.cumsum([0, *cuts])
            value = 0.0
            for n, (place, step) in enumerate(zip(where, steps)):
                value += log_prob_with_hidden(toy, row, [p for p, s in zip(where, steps) if s >= step])[place, row[place]].item()
                if n and steps[n] != steps[n - 1]:
                    value -= least + lean * n / len(where)
            prices[tuple(steps.tolist())] = value
        assert tuple(got[where].tolist()) == max(prices, key=prices.get)
        assert (got[~on] == -1).all()
        several.add(int(got.max()) + 1)
    assert len(several) == min(T, 4)  # easy ones take fewer steps
    for lean in (0.6, 1.2):
        together = mdmvi.left_to_right_order(toy, tokens, canvas, T, 0.0, lean)
        alone = [mdmvi.left_to_right_order(toy, row[None], on[None], T, 0.0, lean) for row, on in zip(tokens, canvas)]
        assert torch.equal(together, torch.cat(alone))  # whatever the length of the other rows


def log_prob_with_hidden(toy, row, hidden):
    x = row.clone()
    x[hidden] = toy.mask_id
    return toy(x[None])[0][0].log_softmax(-1).detach()


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_sure_first_order(T):
    toy, sure, several = Toy(seed=3), 0.7, set()
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)[::2]
    canvas = torch.ones_like(tokens).bool()
    canvas[::3, 1] = False
    for row, on, got in zip(tokens, canvas, mdmvi.sure_first_order(toy, tokens, canvas, T, sure)):
        rest, expected = places(on), {}
        for s in range(T):
            p = log_prob_with_hidden(toy, row, rest).exp().amax(-1)
            now = [i for i in rest if p[i] > sure] or sorted(rest, key=lambda i: p[i].item())[-1:]
            now = rest if s == T - 1 else now
            expected.update({i: s for i in now})
            rest = [i for i in rest if i not in now]
        assert got.tolist() == [expected.get(i, -1) for i in range(4)]
        several.add(max(expected.values()))
    assert len(several) == min(T, 4)


def test_posterior_starts_with_all_scores_alike_and_sees_the_canvas():
    model, (tokens, canvas) = tiny_denoiser(n_layer=1), problems()
    posterior = mdmvi.OrderPosterior(model.config)
    assert (posterior(tokens, canvas) == posterior(tokens, canvas)[0, 0]).all()
    torch.nn.init.normal_(posterior.level.weight)
    torch.nn.init.normal_(posterior.on_canvas)
    assert not torch.equal(posterior(tokens, canvas), posterior(tokens, ~canvas))
    assert torch.equal(posterior(tokens), posterior(tokens, torch.zeros_like(canvas)))


def test_scores_of_a_posterior_that_is_sure_of_its_levels():
    model, (tokens, canvas) = tiny_denoiser(n_layer=1), problems()
    posterior = mdmvi.OrderPosterior(model.config, levels=3)
    logits = 9.0 * torch.randn(*tokens.shape, 3, generator=rng(0))
    posterior.level_logits = lambda x, on: logits
    p = torch.softmax(2.0 * logits, -1)
    assert torch.allclose(posterior(tokens, canvas), -0.4 * (p[..., 0] + 2 * p[..., 1] + 3 * p[..., 2]))
    sure = p.amax(-1) > 0.999
    assert sure.float().mean() > 0.5
    assert torch.allclose(posterior(tokens, canvas)[sure], -0.4 * (1 + logits.argmax(-1)[sure]), atol=1e-3)


def test_level_loss_is_the_mean_over_the_canvas_and_late_steps_share_the_last_level():
    posterior = mdmvi.OrderPosterior(tiny_denoiser(n_layer=1).config, levels=3)
    tokens, canvas = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]).bool()
    logits = torch.randn(2, 4, 3, generator=rng(0))
    posterior.level_logits = lambda x, on: logits
    step = torch.tensor([[-1, 0, 1, 2], [-1, -1, 3, 7]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 1, 0] + log_p[0, 2, 1] + log_p[0, 3, 2] + log_p[1, 2, 2] + log_p[1, 3, 2]) / 5
    assert torch.allclose(mdmvi.level_loss(posterior, tokens, canvas, step), expected)


def test_the_posterior_waits_for_the_policy():
    assert [train.wake(step, 1000) for step in (0, 99, 150, 200, 999)] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("flags", ["", "--latent-dim 2", "--task sudoku"])
def test_a_step_never_waits_for_the_device(flags, monkeypatch):
    """A meta tensor has no values: any that the host had to look at would raise. AdamW is not fused there."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **rest: adamw(groups, **rest))
    args = train.parse_args(["--size", "tiny", *flags.split()])
    run = train.Run(args, train.RandomTokens(320))
    run.copy_plain()
    run.generator = None
    for model in run.models():
        model.to("meta")
    tokens = torch.zeros(64, args.max_len, dtype=torch.int32, device="meta")
    seen = {}
    for stage in ("plain", "baseline", "order"):
        modules, _, batch, loss_of = train.stage_setup(run, stage)
        model = run.plain if stage == "baseline" else run.denoiser
        hook = model.register_forward_hook(lambda module, inputs, outputs, stage=stage: seen.setdefault(stage, []).append(len(inputs[0])))
        loss, stats = train.train_step(train.make_optimizers(modules, args), 1.0, 1.0, loss_of, (tokens, tokens > 0), batch, 2, None)
        hook.remove()
        assert loss.is_meta and all(value.is_meta for value in stats.values())
    passes = seen["order"] if args.task != "sudoku" else seen["order"][args.budget :: args.budget + 1]  # less the search for an order
    assert passes == seen["baseline"]  # equal compute


def test_learning_rate_schedule():
    share = [train.share_of_peak(step, 1010, 0.1) for step in (0, 9, 10, 510, 1010)]
    assert share == pytest.approx([0.1, 1, 1, 0.55, 0.1])


def test_posterior_starts_from_the_denoiser():
    model, (tokens, _) = tiny_denoiser(n_layer=3), problems()
    posterior = mdmvi.OrderPosterior(model.config).start_from(model)
    assert len(posterior.trunk.blocks) == 2 and posterior(tokens).shape == tokens.shape
    assert (posterior(tokens) < 0).all()
    ours, theirs = posterior.trunk.blocks[1].qkv.weight, model.trunk.blocks[1].qkv.weight
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert not posterior.trunk.wte.weight.requires_grad and ours.requires_grad and model.trunk.wte.weight.requires_grad


def test_a_plain_function_is_a_denoiser():
    toy = Toy()

    def model(tokens):
        return toy(tokens)

    model.mask_id, model.eos_id = toy.mask_id, toy.eos_id
    for f, *arguments in (
        (mdmvi.mdm_loss, X0, CANVAS, rng(0)),
        (mdmvi.order_loss, toy.policy, toy.posterior, X0, CANVAS, 3, TAU, 8, rng(0)),
        *((mdmvi.generate, X0, CANVAS, rule, 3, toy.policy, 0.0, rng(0), e) for rule, e in WITH_EOS),
    ):
        f(model, *arguments)


# ---------------------------------------------------------------------------------------------------
# Latent variable
# ---------------------------------------------------------------------------------------------------


def test_latent_and_its_kl():
    mu, log_var = torch.randn(2, 3, generator=rng(0)), torch.randn(2, 3, generator=rng(1))
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(torch.zeros(3), torch.ones(3))).sum(1)
    assert torch.allclose(mdmvi.gaussian_kl(mu, log_var), exact, rtol=1e-5)
    assert mdmvi.gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    mus, log_vars = replicate(20000, mu, log_var)
    z, kl = mdmvi.draw_latent(lambda tokens, canvas: (mus, log_vars), None, None, rng(0))
    assert torch.allclose(kl.view(-1, 2), exact.expand(20000, 2), rtol=1e-5)
    assert_mean(z.view(-1, 2, 3), mu, precision=0.02)
    away = (z.view(-1, 2, 3) - mu).double()
    products = away[:, :, :, None] * away.flip(1)[:, :, None], away[:, :, :, None] * away[:, :, None]
    for product, covariance in zip(products, (torch.zeros(2, 3, 3), torch.diag_embed(log_var.exp()))):  # with the other row, with itself
        assert_mean(product + torch.eye(3), covariance + torch.eye(3), precision=0.03)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_vmd_elbo(learned, T):
    toy, (tokens, canvas) = LatentToy(), replicate(20000, X0, CANVAS)
    models = (toy.policy, toy.posterior) if learned else (None, None)
    samples = mdmvi.vmd_elbo(toy, *models, tokens, canvas, T, TAU, 2, rng(T))
    for row in range(2):
        log_p, bound = exact_vmd(toy, X0[row], CANVAS[row], T, learned)
        assert bound < log_p - 0.01
        assert_mean(samples[row::2], bound, precision=0.005)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_vmd_losses_and_their_gradients(learned, T):
    toy, (tokens, canvas) = LatentToy(seed=3), replicate(1000, X0, CANVAS)
    parameters = [toy.logits, toy.slope, toy.code] + [toy.pi, toy.turn, toy.score] * learned
    loss = -sum(exact_vmd(toy, x0, c, T, learned)[1] / c.sum() for x0, c in zip(X0, CANVAS)) / 2
    encoded, normal = torch.cat(toy.encoder(X0, None), 1), torch.distributions.Normal
    kl = sum(torch.distributions.kl_divergence(normal(m, (v / 2).exp()), normal(0.0, 1.0)) / c.sum() for (m, v), c in zip(encoded, CANVAS)) / 2
    expected = [loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)]
    assert all(gradient.any() for gradient in expected[1:4])
    samples = []
    for seed in range(40):
        if learned:
            estimate, stats = mdmvi.vmd_order_loss(toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 8, rng(seed))
            assert stats["latent_kl"].item() == pytest.approx(kl.item(), rel=1e-4)
            assert estimate.item() == pytest.approx((stats["latent_kl"] - stats["elbo"]).item(), rel=1e-4)
        else:
            estimate = mdmvi.vmd_loss(toy, tokens, canvas, T, rng(seed))
        samples.append((estimate, *torch.autograd.grad(estimate, parameters, materialize_grads=True)))
    for draws, value in zip(zip(*samples), expected):
        assert_mean(torch.stack(draws), value, precision=0.02)


class GaussianToy:
    """One token, and log p(0 | z) = -(w z - y)^2 / 2 - c: z given that token is Gaussian, so the bound can be tight."""

    mask_id, eos_id, latent_dim = 2, 1, 1
    w, y, c = 1.3, 0.7, 0.2
    mu, var = w * y / (1 + w * w), 1 / (1 + w * w)  # of z given the token 0
    log_p = -c - math.log(1 + w * w) / 2 - y * y / (1 + w * w) / 2

    def __call__(self, tokens, z):
        self.z = z.double()
        first = -(self.w * self.z - self.y).square() / 2 - self.c
        return torch.stack((first, (-torch.expm1(first)).log()), -1), torch.zeros(len(tokens), 1, 1)

    def encoder(self, tokens, canvas):
        return torch.full((len(tokens), 1), self.mu), torch.full((len(tokens), 1), math.log(self.var))


def test_vmd_bound_is_tight_where_the_encoder_is_right():
    toy, tokens, canvas = GaussianToy(), torch.zeros(20000, 1).long(), torch.ones(20000, 1).bool()
    integral = torch.trapezoid(NORMAL * (-(toy.w * EPSILON - toy.y).square() / 2 - toy.c).exp(), EPSILON).log()
    assert integral.item() == pytest.approx(toy.log_p, abs=1e-9)
    normal = lambda mu, var: torch.distributions.Normal(*torch.tensor([mu, var**0.5], dtype=torch.double))
    prior, right = normal(0.0, 1.0), normal(toy.mu, toy.var)
    for mu, var in ((toy.mu, toy.var), (toy.mu + 0.3, toy.var), (toy.mu, 2 * toy.var), (toy.mu, toy.var / 2), (0.0, 1.0), (-toy.mu, toy.var)):
        toy.mu, toy.var, q = mu, var, normal(mu, var)
        samples = mdmvi.vmd_elbo(toy, None, None, tokens, canvas, 1, TAU, 1, rng(0)).double()
        gap = torch.distributions.kl_divergence(q, right)  # what an encoder that is not right loses
        assert_mean(samples, toy.log_p - gap, precision=0.01)
        # With log q(z) - log p(z) at the z drawn in place of their KL, every sample of the right one is log p(x_0).
        estimate = samples + torch.distributions.kl_divergence(q, prior) - (q.log_prob(toy.z) - prior.log_prob(toy.z)).squeeze(1)
        assert (estimate - toy.log_p).abs().max() < 1e-4 if gap == 0 else samples.mean() < toy.log_p - 0.8 * gap < toy.log_p - 0.03
        losses = torch.stack([mdmvi.vmd_loss(toy, tokens, canvas, 1, rng(seed)) for seed in range(10)])
        assert_mean(losses, gap - toy.log_p, precision=0.005)


def test_paths_of_a_group_share_their_latent():
    seen, (tokens, canvas) = [], replicate(3, X0, CANVAS)

    class Recorder(LatentToy):
        def __call__(self, tokens, z):
            seen.append(z)
            return super().__call__(tokens, z)

    toy = Recorder()
    mdmvi.vmd_order_loss(toy, toy.policy, toy.posterior, tokens, canvas, 3, TAU, 8, rng(0))
    z = seen[0].view(6, 9)  # a pass on the full canvas, and eight paths
    assert len(seen) == 1 and (z == z[:, :1]).all() and len(z.unique()) == 6


class ShowsLatents:
    """Notes which z came with which row; a row's number is its first token, in the prompt."""

    mask_id, eos_id, latent_dim = 9999, 0, 2

    def __init__(self):
        self.seen = {}

    def __call__(self, tokens, z):
        for row, latent in zip(tokens[:, 0].tolist(), z.tolist()):
            self.seen.setdefault(row, []).append(tuple(latent))
        return torch.zeros(*tokens.shape, 3), torch.zeros(*tokens.shape, 1)


@pytest.mark.parametrize("strategy", ["learned", "iid", "random", "left_to_right", "top_prob"])
def test_a_latent_stays_with_its_row(strategy):
    canvas = torch.rand(40, 6, generator=rng(1)) < torch.linspace(0, 1.2, 40)[:, None]
    canvas[:, 0] = False
    tokens, runs = torch.arange(40)[:, None].repeat(1, 6), []
    for seed, budget in ((0, 6), (0, 6), (0, 2), (1, 6)):
        model = ShowsLatents()
        out = mdmvi.generate(model, tokens, canvas, strategy, budget, lambda hidden: hidden.squeeze(-1), 1.0, rng(seed))
        assert {row: len(seen) for row, seen in model.seen.items()} == {i: n for i, n in enumerate(out.steps.tolist()) if n}
        assert all(len(set(seen)) == 1 for seen in model.seen.values())
        runs.append(({row: seen[0] for row, seen in model.seen.items()}, out.tokens.tolist()))
        assert len({x for z in runs[-1][0].values() for x in z}) == 2 * len(model.seen)
    assert len(set(out.steps.tolist())) > 2  # rows have left the batch at different times
    assert runs[0] == runs[1] and runs[0][0] == runs[2][0]  # drawn before the first step: not a matter of the steps
    assert not set(runs[0][0].values()) & set(runs[3][0].values())


def test_distribution_of_tokens_with_a_latent():
    toy, x0, canvas, probability = LatentToy(seed=5), X0[0].clone(), CANVAS[0], {}
    for tokens in itertools.product(range(3), repeat=3):
        x0[canvas] = torch.tensor(tokens)
        probability[tokens] = exact_vmd(toy, x0, canvas, 1, learned=True)[0].exp().item()
    out = mdmvi.generate(toy, *replicate(40000, x0[None], canvas[None]), "random", 1, temperature=1.0, generator=rng(0))
    assert_distribution(list(map(tuple, out.tokens[:, canvas].tolist())), probability)


def test_without_a_latent_nothing_changes():
    shape, tokens = (5, 16, 2, 2, 8, 12, 5, 0), torch.randint(6, (3, 9), generator=rng(0))
    models, drawn = [], []
    for options in ({}, {"latent_dim": 0}, {"latent_dim": 2}):
        torch.manual_seed(0)
        models.append(mdmvi.Denoiser(mdmvi.ModelConfig(*shape, **options)))
        drawn.append(torch.rand(1))
    plain, zero, latent = (model.state_dict() for model in models)
    assert plain.keys() == zero.keys() and {name.split(".")[0] for name in plain} == {"trunk", "lm_head"}
    assert all(torch.equal(plain[k], zero[k]) and torch.equal(plain[k], latent[k]) for k in plain) and drawn[0] == drawn[1]
    assert {name.split(".")[0] for name in latent.keys() - plain.keys()} == {"from_z", "encoder"}
    outputs = [model(tokens) for model in models] + [models[2](tokens, torch.zeros(3, 2))]
    assert all(torch.equal(a, b) for output in outputs for a, b in zip(output, outputs[0]))
    moved = models[2](tokens, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]))[1] != outputs[0][1]
    assert moved[[0, 2]].any(-1).all() and not moved[1].any()  # its own row, and every position there


def test_latent_encoder():
    model, (tokens, canvas) = tiny_denoiser(latent_dim=2), problems()
    tokens, canvas = tokens[10:], canvas[10:]
    mu, log_var = model.encoder(tokens, canvas)
    hidden = model.encoder.trunk(tokens)
    for row in range(len(tokens)):
        pooled = hidden[row, canvas[row]].mean(0)
        both = model.encoder.out.weight @ pooled + model.encoder.out.bias
        assert torch.allclose(torch.cat((mu[row], log_var[row])), both, atol=1e-5)
    for changed in range(6):  # it reads the prompt as well as the canvas
        assert (model.encoder(tokens.index_fill(1, torch.tensor([changed]), 4), canvas)[0] != mu).any(1).all()


def test_seeds_with_a_latent():
    model, (tokens, canvas) = tiny_denoiser(latent_dim=2), problems()
    tokens, canvas = tokens[15:], canvas[15:]
    rest = mdmvi.UnmaskPolicy(model.config), mdmvi.OrderPosterior(model.config)
    before = torch.get_rng_state()
    for f in (
        lambda g: mdmvi.vmd_loss(model, tokens, canvas, 3, g).item(),
        lambda g: mdmvi.vmd_order_loss(model, *rest, tokens, canvas, 3, TAU, 2, g)[0].item(),
        lambda g: mdmvi.vmd_elbo(model, *rest, tokens, canvas, 3, TAU, 1, g).tolist(),
        lambda g: mdmvi.generate(model, tokens, canvas, "learned", 3, rest[0], 0.0, g).tokens.tolist(),
    ):
        assert f(rng(1)) == f(rng(1)) != f(rng(2))
    assert torch.equal(torch.get_rng_state(), before)  # every draw is from the generator that was given


# ---------------------------------------------------------------------------------------------------
# Tokenizer, tasks and checkers
# ---------------------------------------------------------------------------------------------------

SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/ with the GSM8K files is not here")
ROWS = [
    {"question": f"Ann has {a} pens in box {chr(63 + a)}{chr(63 + b)} and buys {b} more. How many?", "answer": f"She has <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
    for a in range(2, 9)
    for b in range(2, 9)
]


def test_tokenizer_is_lossless():
    tokenizer = eval_gsm8k.Tokenizer.build(["Ann buys 3 pens"] * 9)
    generator = random.Random(0)
    texts = ["", "Ann buys 12 pens", "<<3*2=6>> #### 6", "日本\t€ é\r\n\x00", "\ud800 lone surrogate", "e\u0301 >> <<  || ####5"]
    texts += ["".join(chr(generator.randrange(1, 0x11000)) for _ in range(30)) for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Ann buys 12 pens<<3*2=6>>")) == 12  # Ann| buys |1|2| pens|<<|3|*|2|=|6|>>
    assert tokenizer.decode([0, 200, 255]) is not None  # bytes that are no text


@pytest.mark.parametrize("most_items", [2, 3, 4, 5])
def test_held_out_problems_are_never_in_the_training_stream(most_items):
    train_set = eval_gsm8k.arithmetic_problems(8000, 0, False, most_items)
    test_set = eval_gsm8k.arithmetic_problems(2000, 1, True, most_items)
    numbers = lambda problems: {(p["items"][0], *sorted(p["items"][1:])) for p in problems}  # in whatever order told
    assert not numbers(train_set) & numbers(test_set)
    assert len({p["question"] for p in test_set}) == 2000
    assert all(eval_gsm8k.is_held_out(p["items"]) for p in test_set)
    assert not any(eval_gsm8k.is_held_out(p["items"]) for p in train_set)
    assert {len(p["items"]) - 1 for p in test_set} == {len(p["items"]) - 1 for p in train_set} == set(range(1, most_items + 1))
    args = train.parse_args(["--items", str(most_items)])
    tokenizer = eval_gsm8k.Tokenizer.build(p["question"] + eval_gsm8k.SEPARATOR + p["answer"] for p in train_set)
    for problems in (train_set, test_set):
        assert all(eval_gsm8k.encode_problems(problems, tokenizer, args.max_len, args.canvas_len)[2])
        assert all(eval_gsm8k.solves_arithmetic(p["answer"], p["items"]) for p in problems)
    longest = lambda texts: max(len(tokenizer.encode(text)) for text in texts)
    prompt, answer = longest(p["question"] + eval_gsm8k.SEPARATOR for p in train_set), longest(p["answer"] for p in train_set)
    assert (prompt + args.canvas_len, answer + 1) == (args.max_len, args.canvas_len)  # one EOS at the least, no room to spare


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_totals_keep_their_first_digit_in_every_order(k):
    changes = [v for v in range(-9, 10) if v]

    def fits(start, order):
        return {total // 10 for total in itertools.accumulate((start, *order))} == {start // 10}

    found = {(start, *order) for start, *order in eval_gsm8k.possible_problems(k)}
    assert len(found) == len(eval_gsm8k.possible_problems(k))
    assert all(fits(start, order) for start, *order in found for order in set(itertools.permutations(order)))
    assert all(min(order) > 0 or max(order) < 0 for _, *order in found)  # gains or losses, never both
    if k < 4:  # and no such problem is left out, told in any order
        every = itertools.product(range(10, 100), itertools.product(changes, repeat=k))
        assert found == {(start, *c) for start, c in every if fits(start, c) and (min(c) > 0 or max(c) < 0)}


def test_question_tells_the_items():
    sign = dict(buys=1, finds=1, gets=1, sells=-1, loses=-1, lends=-1)
    for p in eval_gsm8k.arithmetic_problems(500, 0, False):
        words = p["question"].replace(",", "").replace(".", "").split()
        changes = [sign[word] * int(words[i + 1]) for i, word in enumerate(words) if word in sign]
        assert [int(words[2]), *changes] == p["items"]


def test_checker_takes_every_order_and_nothing_else(monkeypatch):
    items = [4, 2, -3, 1, -1]
    monkeypatch.setattr(eval_gsm8k, "possible_problems", lambda k: [items])
    drawn = eval_gsm8k.arithmetic_problems(3000, 0, eval_gsm8k.is_held_out(items), 1)
    assert_distribution([p["answer"] for p in drawn], {answer: 1 / 24 for answer in {p["answer"] for p in drawn}})  # 4! orders
    assert all(p["items"] == items for p in drawn)
    right, wrong, answer = set(), {""}, " #### 3"
    write = lambda totals, order: [f"<<{a}{'+' if v > 0 else '-'}{abs(v)}={b}>>" for a, v, b in zip(totals, order, totals[1:])]
    for order in itertools.permutations(items[1:]):
        totals = list(itertools.accumulate((4, *order)))
        steps = write(totals, order)
        text = " ".join(steps) + answer
        right.add(text)
        for i in range(5):  # one sum is wrong, or the start, and the rest goes on from it
            wrong.add(" ".join(write(totals[:i] + [total + 1 for total in totals[i:]], order)) + " #### 4")
        wrong |= {text[:i] + other + text[i + 1 :] for i, c in enumerate(text) if c not in "<> #" for other in "0123456789+-=" if other != c}
        wrong |= {" ".join(steps[:i] + steps[i + 1 :]) + answer for i in range(4)}  # a step is missing,
        wrong |= {" ".join(steps[: i + 1] + steps[i:]) + answer for i in range(4)}  # repeated,
        wrong |= {" ".join(other) + answer for other in itertools.permutations(steps)}  # or does not go on from the last
        wrong |= {text + "4", text + " ", text[:-2], " ".join(steps), text.replace("> <", "><"), text + text, answer}
    assert {p["answer"] for p in drawn} == right and len(wrong - right) > 1000
    for text in right:
        assert eval_gsm8k.solves_arithmetic(text, items) and eval_gsm8k.solves_arithmetic(text, [4, *items[:0:-1]])
        assert eval_gsm8k.solves_equations(text, "#### 3")
        assert not eval_gsm8k.solves_arithmetic(text, [5, *items[1:]]) and not eval_gsm8k.solves_arithmetic(text, [*items, 1])
    for text in wrong - right:
        assert not eval_gsm8k.solves_arithmetic(text, items), text
    assert eval_gsm8k.solves_arithmetic("<<1+2=3>> <<3+2=5>> #### 5", [1, 2, 2])  # the same change twice
    assert not eval_gsm8k.solves_arithmetic("<<1+2=3>> #### 3", [1, 2, 2])
    assert not eval_gsm8k.solves_arithmetic("<<1+4=5>> <<5-1=4>> <<4+1=5>> #### 5", [1, 2, 2])


BOXES = {
    (2, 2): "0011 0011 2233 2233",
    (2, 3): "000111 000111 222333 222333 444555 444555",
    (3, 2): "001122 001122 001122 334455 334455 334455",
    (3, 3): "000111222 000111222 000111222 333444555 333444555 333444555 666777888 666777888 666777888",
}


def legal(text, box):
    """Each digit once in each row, column and box of a grid of text, rows apart by a line break."""
    cells, side = text.replace("\n", ""), box[0] * box[1]
    groups = [[j for j in range(side * side) if j // side == k] for k in range(side)]
    groups += [[j for j in range(side * side) if j % side == k] for k in range(side)]
    groups += [[j for j, b in enumerate(BOXES[box].replace(" ", "")) if b == str(k)] for k in range(side)]
    return all(sorted(cells[j] for j in group) == [str(v) for v in range(1, side + 1)] for group in groups)


@functools.cache
def grids_2x2():
    """Every grid of 2 x 2 boxes, as text."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    halves = [f"{a}\n{b}" for a in rows for b in rows if len(set(a[:2] + b[:2])) == len(set(a[2:] + b[2:])) == 4]
    grids = [f"{a}\n{b}" for a in halves for b in halves]
    return [grid for grid in grids if legal(grid, (2, 2))]


def slow_solutions(text, box):
    """The solutions of a puzzle, cell by cell from a blank with the fewest digits left; only for puzzles with few."""
    text, side, boxes = text.replace("\n", ""), box[0] * box[1], BOXES[box].replace(" ", "")
    sees = lambda i, j: i // side == j // side or i % side == j % side or boxes[i] == boxes[j]
    left = {i: set("123456789"[:side]) - {c for j, c in enumerate(text) if sees(i, j)} for i, c in enumerate(text) if c == "."}
    if not left:
        return [text]
    i = min(left, key=lambda i: len(left[i]))
    return [found for digit in left[i] for found in slow_solutions(text[:i] + digit + text[i + 1 :], box)]


@pytest.mark.parametrize("box", BOXES)
def test_sudoku_units(box):
    boxes, side = BOXES[box].replace(" ", ""), box[0] * box[1]
    expected = [(i // side, side + i % side, 2 * side + int(boxes[i])) for i in range(side * side)]
    assert eval_gsm8k.sudoku_units(box) == expected


def test_sudoku_solver_finds_every_grid():
    every, empty = grids_2x2(), [0] * 16
    assert len(every) == 288
    found = eval_gsm8k.sudoku_solutions(empty, (2, 2), 1000, random.Random(0))
    assert sorted("".join(map(str, grid)) for grid in found) == sorted(grid.replace("\n", "") for grid in every)
    assert len(eval_gsm8k.sudoku_solutions(empty, (2, 2), 5)) == 5 and empty == [0] * 16
    for impossible in ([1, 1] + [0] * 14, [1, 2, 0, 0, 0, 0, 3, 0, 0, 0, 4] + [0] * 5):
        assert eval_gsm8k.sudoku_solutions(impossible, (2, 2), 5) == []


@pytest.mark.parametrize("box, n, base", [((2, 2), 1000, 40), ((2, 3), 40, 20), ((3, 3), 2, 1)])
def test_sudoku_problems(box, n, base):
    problems, every = eval_gsm8k.sudoku_problems(n, 1, False, box, base=base), grids_2x2() if box == (2, 2) else ()
    assert len(problems) == n and problems == eval_gsm8k.sudoku_problems(n, 1, False, box, base=base)
    fits = lambda puzzle: [grid for grid in every if all(q in (".", c) for q, c in zip(puzzle, grid))]
    solutions = fits if every else lambda puzzle: slow_solutions(puzzle, box)
    for p in problems:
        assert legal(p["answer"], box) and "." in p["question"]
        assert [s.replace("\n", "") for s in solutions(p["question"])] == [p["answer"].replace("\n", "")]
    assert len({p["answer"] for p in problems}) > (220 if every else n - 1)  # permuting reaches all of the 288 but the held-out eighth
    for p in problems[:20] if every else ():  # no clue to spare
        assert all(len(fits(p["question"][:i] + "." + p["question"][i + 1 :])) > 1 for i, c in enumerate(p["question"]) if c.isdigit())


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes and 10 GiB; SLOW=1 runs it")
def test_full_size_with_random_weights(tmp_path):
    """The 170M shape: save and load the published layout, a step of each stage, save, load, sample."""
    args = train.parse_args(["--size", "170m", "--optimizer", "adamw", "--max-len", "48", "--canvas-len", "16", "--order-batch", "1", "--paths", "2", "--out", str(tmp_path)])
    run = train.Run(args, train.RandomTokens(32_000))
    train.save_smdm(tmp_path / "base.safetensors", run.denoiser)
    with torch.no_grad():
        first = run.denoiser(torch.arange(48)[None])[0]
        run.denoiser.lm_head.weight.zero_()
        train.load_smdm(tmp_path / "base.safetensors", run.denoiser)
        assert torch.equal(run.denoiser(torch.arange(48)[None])[0], first)
    tokens, canvas = torch.randint(32_000, (4, 48)), (torch.arange(48) >= 32).expand(4, -1)
    for stage in ("plain", "order"):
        modules, _, batch, loss_of = train.stage_setup(run, stage)
        loss, _ = train.train_step(train.make_optimizers(modules, args), 1.0, 1.0, loss_of, (tokens, canvas), 2 if stage == "plain" else batch, 1, run.generator)
        assert loss.isfinite()
    run.save(tmp_path / "checkpoint.pt")
    denoiser, policy, _, _ = eval_gsm8k.build_models(eval_gsm8k.load_checkpoint(tmp_path / "checkpoint.pt"))
    out = mdmvi.generate(denoiser, tokens, canvas, "learned", 5, policy=policy)
    assert (out.tokens[canvas] < 32_000).all() and (out.steps <= 5).all()


@pytest.fixture
def small(monkeypatch):
    """A smaller model, training sets of 300 problems, held-out sets of 40, 20 puzzles dug."""
    arithmetic, pairs, sudoku = (getattr(eval_gsm8k, f"{name}_problems") for name in ("arithmetic", "pair", "sudoku"))
    few = lambda n: {60_000: 300, 256: 40}.get(n, n)
    monkeypatch.setattr(eval_gsm8k, "arithmetic_problems", lambda n, *args: arithmetic(few(n), *args))
    monkeypatch.setattr(eval_gsm8k, "pair_problems", lambda n, *args: pairs(few(n), *args))
    monkeypatch.setattr(eval_gsm8k, "sudoku_problems", lambda n, *args, **options: sudoku(few(n), *args, base=20, **options))
    monkeypatch.setitem(train.SIZES, "small", (1, 2, 16, 32))


@pytest.mark.parametrize("box", ["2x2", "2x3"])
def test_sudoku_sets_share_no_grid(small, box):
    problems, held_out = train.load_problems(train.parse_args(["--task", "sudoku", "--box", box, "--problems", "300"]))
    assert (len(problems), len(held_out)) == (300, 300)
    assert not {p["answer"] for p in problems} & {p["answer"] for p in held_out}


def test_scoring_more_sudokus_begins_with_the_same():
    """What is scored later must be what training left out, whatever --problems says."""
    about = dict(task="sudoku", box=(2, 2))
    assert eval_gsm8k.held_out_problems(about, 40)[:20] == eval_gsm8k.held_out_problems(about, 20)


def test_solves_sudoku():
    for p in eval_gsm8k.sudoku_problems(5, 1, True, (2, 2)):
        for grid in grids_2x2():  # of all the grids there are, only the one that keeps the clues
            assert eval_gsm8k.solves_sudoku(grid, p) == (grid == p["answer"])
    for box in ((2, 2), (2, 3)):
        p = eval_gsm8k.sudoku_problems(1, 3, True, box)[0]
        text, clue = p["answer"], next(i for i, c in enumerate(p["question"]) if c.isdigit())
        assert eval_gsm8k.solves_sudoku(text, p)
        for i, c in enumerate(text):  # a cell or a line break
            for other in set("0123456789.\n ") - {c}:
                assert not eval_gsm8k.solves_sudoku(text[:i] + other + text[i + 1 :], p)
        other = "2" if text[clue] == "1" else "1"
        swapped = text.translate(str.maketrans(text[clue] + other, other + text[clue]))  # a good grid, but not of these clues
        assert legal(swapped, box) and not eval_gsm8k.solves_sudoku(swapped, p)
        for wrong in ("", text[:-1], text + "1", text + "\n", text.replace("\n", ""), p["question"]):
            assert not eval_gsm8k.solves_sudoku(wrong, p)


@pytest.mark.parametrize("box", [(2, 2), (2, 3), (3, 3)])
def test_sudoku_as_tensors(box):
    problems, side = eval_gsm8k.sudoku_problems(3, 1, True, box, base=1), box[0] * box[1]
    args = train.parse_args(["--task", "sudoku", "--box", f"{box[0]}x{box[1]}"])
    tokenizer = eval_gsm8k.Tokenizer.build([p["question"] + eval_gsm8k.SEPARATOR + p["answer"] for p in problems] * 9)
    assert args.max_len == 1 + side * side + side - 1
    clean, canvas, fits = eval_gsm8k.encode_problems(problems, tokenizer, args.max_len, args.canvas_len)
    blank, same_canvas, _ = eval_gsm8k.encode_problems(problems, tokenizer, args.max_len, args.canvas_len, with_answers=False)
    assert all(fits) and torch.equal(canvas, same_canvas) and torch.equal(clean[~canvas], blank[~canvas])
    for p, solved, asked, on in zip(problems, clean, blank, canvas):
        assert on.tolist() == [False] + [c == "." for c in p["question"]]
        assert tokenizer.decode(solved.tolist()) == eval_gsm8k.SEPARATOR + p["answer"]
        assert tokenizer.decode(asked.tolist()) == eval_gsm8k.SEPARATOR + p["question"]  # without a word of the answer


def test_a_sudoku_is_scored_as_a_whole_grid():
    problems = eval_gsm8k.sudoku_problems(3, 1, True, (2, 2))
    tokenizer = eval_gsm8k.Tokenizer.build([])
    clean, canvas, _ = eval_gsm8k.encode_problems(problems, tokenizer, 20, 16)
    clean[1, canvas[1].nonzero()[0]] = tokenizer.eos_id  # one cell of the second one wrong

    def oracle(tokens):
        assert (tokens == clean)[~canvas].all()  # clues are never masked
        return F.one_hot(clean.long(), tokenizer.vocab_size).float(), tokens[..., None].float()

    oracle.mask_id, oracle.eos_id = tokenizer.mask_id, tokenizer.eos_id
    tokens, canvas, _ = eval_gsm8k.encode_problems(problems, tokenizer, 20, 16, with_answers=False)
    result = eval_gsm8k.attempt(problems, tokenizer, tokens, canvas, "top_prob", 1, oracle)
    assert result["solved"] == result["answered"] == [True, False, True]


class RiggedPairs(torch.nn.Module):
    """Digits at every position: uniform and independent, or the pair that z picks by the weights of a kind."""

    def __init__(self, tokenizer, kind=None):
        super().__init__()
        self.weight, self.kind, self.tokenizer = torch.nn.Parameter(torch.zeros(1)), kind, tokenizer
        self.mask_id, self.eos_id, self.latent_dim = tokenizer.mask_id, 0, 1 if kind else 0
        self.digits = torch.tensor([tokenizer.encode(str(digit)) for digit in range(10)]).flatten()

    def forward(self, tokens, z=None):
        assert (tokens[:, 1:] == self.mask_id).all()  # both in one step
        logits = torch.full((*tokens.shape, self.tokenizer.vocab_size), -math.inf)
        if self.kind is None:
            logits[:, :, self.digits] = 0.0
            return logits, logits
        weights = torch.tensor({"d1": [1.0] * 10, "d2": [float(k + 1) for k in range(10)]}[self.kind])
        first = torch.bucketize(torch.special.ndtr(z[:, 0]), (weights / weights.sum()).cumsum(0)[:-1])
        for position in (1, 2):
            logits[torch.arange(len(tokens)), position, self.digits[(first + position - 1) % 10]] = 0.0
        logits[:, 0, 0] = 0.0
        return logits, logits


@pytest.mark.parametrize("kind, weights", [("d1", [0.1] * 10), ("d2", [k / 55 for k in range(1, 11)])])
def test_pairs(kind, weights):
    problems = eval_gsm8k.pair_problems(20_000, 0, kind)
    assert_distribution([p["answer"] for p in problems], dict(zip("01 12 23 34 45 56 67 78 89 90".split(), weights)))
    assert {p["question"] for p in problems} == {""} and problems != eval_gsm8k.pair_problems(20_000, 1, kind)
    tokenizer = eval_gsm8k.Tokenizer.build([])
    valid, distance = eval_gsm8k.score_pairs(tokenizer, RiggedPairs(tokenizer), kind, 5000)
    assert abs(valid - 0.1) < 0.02 and abs(distance - 0.9) < 0.02  # 0.1 / 10 in place of a weight, 0.9 on what is no pair
    valid, distance = eval_gsm8k.score_pairs(tokenizer, RiggedPairs(tokenizer, kind), kind, 5000)
    assert valid == 1 and distance < 0.035
    other = {"d1": "d2", "d2": "d1"}[kind]
    valid, distance = eval_gsm8k.score_pairs(tokenizer, RiggedPairs(tokenizer, other), kind, 5000)
    assert valid == 1 and abs(distance - sum(abs(0.1 - k / 55) for k in range(1, 11)) / 2) < 0.035


@pytest.mark.parametrize(
    "text, number",
    [("#### 72", 72), ("x #### $1,234.50.", 1234.5), ("#### 5 apples, so #### 6.00", 6), ("72", None), ("####", None), ("#### -3", -3), ("#### 12 of 30", 30)],
)
def test_final_number(text, number):
    assert eval_gsm8k.final_number(text) == number


@pytest.mark.parametrize(
    "text, right",
    [
        ("<<48/2=24>> <<48+24=72>> #### 72", True),
        ("<<10/3=3.33>> <<3.33*100=333>> #### 333", True),
        ("<<200*50%=100>> #### 100", True),
        ("<<(2+3)*4=20>>prose <<20-5=15>>\n#### 15", True),
        ("<<48/2=25>> <<48+24=72>> #### 72", False),
        ("<<48/2=24>> <<48+24=72>> #### 70", False),
        ("<<48/2=24>> #### 72", False),
        ("#### 72", False),
        ("<<1/0=72>> #### 72", False),
        ("<<__import__('os')=72>> #### 72", False),
    ],
)
def test_solves_equations(text, right):
    assert eval_gsm8k.solves_equations(text, "#### 72" if "72" in text or "70" in text else "####" + text.rpartition("####")[2]) == right


def test_statistics():
    assert eval_gsm8k.mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 0, 0]) == 2 / 2**4
    assert eval_gsm8k.mcnemar([1, 0], [0, 1]) == 1.0
    assert eval_gsm8k.mcnemar([1] * 8 + [0], [0] * 8 + [1]) == pytest.approx(2 * (1 + 9) / 2**9)
    low, high = eval_gsm8k.wilson(8, 10)
    assert (low, high) == (pytest.approx(49.02, abs=0.01), pytest.approx(94.33, abs=0.01))


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as file:
        file.write(text)
    return str(path)


def test_data_files_of_both_layouts(tmp_path, monkeypatch):
    aug = [{"question": "Q", "cot": "<<2+3=5>> <<5*2=10>>", "answer": "10"}]
    assert eval_gsm8k.load_gsm8k(write_rows(tmp_path / "aug.jsonl", aug))[0]["answer"] == "<<2+3=5>> <<5*2=10>> #### 10"
    expected = eval_gsm8k.load_gsm8k(write_rows(tmp_path / "a.jsonl", ROWS))
    assert expected[0] == {"question": ROWS[0]["question"], "answer": "<<2+2=4>> #### 4", "reference": "#### 4"}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl.gz", "b.json.xz"):
        write_rows(folder / name, ROWS)
    assert eval_gsm8k.load_gsm8k(str(folder)) == 2 * expected
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    assert eval_gsm8k.load_gsm8k(str(tmp_path / "list.json")) == expected
    assert eval_gsm8k.load_gsm8k(str(tmp_path / "a.jsonl"), "full")[0]["answer"] == ROWS[0]["answer"]
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: asked.update(name=name, config=config, split=split) or ROWS)
    assert eval_gsm8k.load_gsm8k("openai/gsm8k", split="test") == expected
    assert asked == {"name": "openai/gsm8k", "config": "main", "split": "test"}


@needs_shared
def test_real_gsm8k_files():
    test = eval_gsm8k.load_gsm8k(str(SHARED / "gsm8k" / "test.jsonl"))
    assert len(test) == 1319
    assert all(eval_gsm8k.final_number(p["reference"]) is not None for p in test)
    solved = sum(eval_gsm8k.solves_equations(p["answer"], p["reference"]) for p in test)
    assert solved > 0.9 * len(test)  # some references have no note for their last step


# ---------------------------------------------------------------------------------------------------
# The scripts
# ---------------------------------------------------------------------------------------------------

TINY = "--steps 6 --batch 4 --order-steps 4 --search 8 --search-steps 4 --order-batch 2 --paths 2 --save-every 2 --problems 0".split()


def run(script, *args):
    """Run a script's main in this process; returns its exit code."""
    try:
        eval_gsm8k.run_main(lambda: script.main([str(a) for a in args]))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny gsm8k run: data.jsonl and out/."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "data.jsonl", ROWS)
    assert run(train, *gsm8k(folder), "--out", folder / "out") == 0
    return folder


def gsm8k(folder):
    return ["--task", "gsm8k", "--data", folder / "data.jsonl", "--max-len", 64, "--canvas-len", 24, *TINY]


@pytest.fixture(scope="module")
def trained_latent(trained):
    """The same with a latent, in latent/."""
    assert run(train, *gsm8k(trained), "--latent-dim", 2, "--out", trained / "latent") == 0
    return trained / "latent"


def tensors(state, prefix=""):
    if isinstance(state, torch.Tensor):
        yield prefix, state
    elif isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{prefix}.{key}")


def same(first, second):
    first, second = (dict(tensors(torch.load(path, weights_only=True))) for path in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("at, latent_dim", [(3, 0), (8, 0), (12, 0), (17, 0), (3, 2), (17, 2)])  # in stage 1, in the baseline, before and in stage 2
def test_ctrl_c_saves_and_resuming_equals_not_having_stopped(trained, tmp_path, monkeypatch, capsys, request, at, latent_dim):
    straight = request.getfixturevalue("trained_latent") if latent_dim else trained / "out"
    flags = *gsm8k(trained), "--latent-dim", latent_dim, "--out", tmp_path
    steps, step = [], train.train_step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(train, *flags) == 130
    assert len(steps) == at and "--resume" in capsys.readouterr().err
    with open(tmp_path / "log.jsonl", "a") as file:  # what a kill after the last checkpoint would leave
        file.write('{"stage": "order", "step": 4}\n{"stage": "or')
    assert run(train, *flags, "--resume") == 0
    assert same(tmp_path / "checkpoint.pt", straight / "checkpoint.pt")
    assert same(tmp_path / "plain.pt", straight / "plain.pt")
    logged = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [(r["stage"], r["step"]) for r in logged] == sorted({(r["stage"], r["step"]) for r in logged}, key=lambda x: (train.STAGES.index(x[0]), x[1]))


def test_another_seed_gives_another_result(trained, tmp_path):
    assert run(train, *gsm8k(trained), "--out", tmp_path, "--seed", 1) == 0
    assert not same(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")


@pytest.mark.skipif("SLOW" not in os.environ, reason="20 kills take minutes: set SLOW=1")
def test_twenty_kills_at_random_moments(trained, tmp_path):
    command = [sys.executable, "train.py", *map(str, gsm8k(trained)), "--steps", "60", "--save-every", "1", "--out", str(tmp_path)]
    generator = random.Random(0)
    for _ in range(20):
        resume = ["--resume"] if (tmp_path / "checkpoint.pt").exists() else []
        process = subprocess.Popen(command + resume, cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(generator.uniform(1, 8))
        process.kill()
        process.wait()
        if (tmp_path / "checkpoint.pt").exists():
            eval_gsm8k.load_checkpoint(tmp_path / "checkpoint.pt")
    assert subprocess.run(command + ["--resume"], cwd=HERE).returncode == 0
    assert run(train, *gsm8k(trained), "--steps", 60, "--out", tmp_path / "straight") == 0
    assert same(tmp_path / "checkpoint.pt", tmp_path / "straight" / "checkpoint.pt")


def test_output_survives_a_reader_that_goes_away():
    program = "import eval_gsm8k; eval_gsm8k.run_main(lambda: [print(i) for i in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(train.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == b""


def test_a_nan_loss_stops_before_the_checkpoint_is_touched(trained, tmp_path, monkeypatch, capsys):
    loss, calls = mdmvi.mdm_loss, []

    def broken(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(mdmvi, "mdm_loss", broken)
    assert run(train, *gsm8k(trained), "--out", tmp_path) == 2
    assert "nan" in capsys.readouterr().err
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(x.isfinite().all() for _, x in tensors(state))


def test_another_budget_starts_from_stage_1(trained, tmp_path):
    assert run(train, *gsm8k(trained), "--out", tmp_path, "--budget", 3, "--start", trained / "out" / "plain.pt") == 0
    ours, theirs = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (tmp_path, trained / "out"))
    assert ours["budget"] == 3 and all(torch.equal(ours["plain"][k], theirs["plain"][k]) for k in theirs["plain"])
    assert run(train, *gsm8k(trained), "--out", tmp_path / "x", "--start", trained / "out" / "checkpoint.pt") == 2


def test_frozen_denoiser_and_no_baseline(trained, tmp_path):
    assert run(train, *gsm8k(trained), "--out", tmp_path, "--freeze-denoiser", "--no-baseline", "--optimizer", "adamw") == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("plain.pt", "checkpoint.pt"))
    assert after["plain"] is None
    assert all(torch.equal(before["denoiser"][k], after["denoiser"][k]) for k in before["denoiser"])
    assert any(not torch.equal(before["policy"][k], after["policy"][k]) for k in before["policy"])


def test_a_frozen_denoiser_is_the_baseline(trained, tmp_path):
    assert run(train, *gsm8k(trained), "--out", tmp_path, "--freeze-denoiser") == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("plain.pt", "checkpoint.pt"))
    assert after["plain"] is None and any(not torch.equal(before["plain"][k], before["denoiser"][k]) for k in before["plain"])
    assert all(torch.equal(before["plain"][k], after["denoiser"][k]) for k in before["plain"])


def test_scoring_writes_what_it_prints(trained, tmp_path, capsys):
    args = ["--checkpoint", trained / "out" / "checkpoint.pt", "--data", trained / "data.jsonl", "--problems", 6]
    assert run(eval_gsm8k, *args, "--budget", 2, 3, "--strategies", "iid", "top_prob+eos", "--json", tmp_path / "rows.json") == 0
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert [(r["strategy"], r["budget"], r["match"]) for r in rows[:4]] == [("learned", 2, "own"), ("iid", 2, "avg"), ("top_prob", 2, "avg"), ("iid", 2, "max")]
    keys = "strategy eos_aware budget match problems average_steps min_steps max_steps answer_accuracy solved p_value problems_per_second"
    assert all(set(keys.split()) <= set(row) for row in rows) and len(rows) == 10
    assert all(r["problems"] == 6 and r["max_steps"] <= r["budget"] for r in rows)
    assert "top_prob eos_aware @Avg" in printed and printed.isascii()


def test_sample_shows_the_order(trained, tmp_path, capsys, monkeypatch):
    checkpoint = ["--checkpoint", trained / "out" / "checkpoint.pt"]
    assert run(sample, ROWS[0]["question"], *checkpoint, "--budget", 3, "--strategy", "learned", "left_to_right", "--html", tmp_path / "o.html") == 0
    printed, page = capsys.readouterr().out, (tmp_path / "o.html").read_text()
    assert "left_to_right, 3 steps" in printed and printed.count("order:") == 2 and "\033" not in printed
    assert "step 3: " in printed and "_" not in printed.split("step 3: ")[1].split("\n")[0]
    assert page.count("data-step=") == 2 * 24 and "http" not in page and "<script>" in page
    monkeypatch.setattr("sys.stdin", io.StringIO(ROWS[0]["question"]))
    assert run(sample, *checkpoint) == 0


def test_scripts_with_a_latent(trained, trained_latent, capsys):
    checkpoint, budget = ["--checkpoint", trained_latent / "checkpoint.pt"], ["--budget", 3]
    assert run(eval_gsm8k, *checkpoint, *budget, "--data", trained / "data.jsonl", "--problems", 6, "--strategies", "iid") == 0
    assert run(sample, ROWS[0]["question"], *checkpoint, *budget, "--strategy", "learned", "random") == 0
    printed = capsys.readouterr().out
    assert "iid @Max" in printed and "random, 3 steps" in printed
    before, after = (torch.load(trained_latent / name, weights_only=True) for name in ("plain.pt", "checkpoint.pt"))
    torch.manual_seed(0)
    first = mdmvi.Denoiser(mdmvi.ModelConfig(**after["config"])).state_dict()
    for one, other in ((first, before["denoiser"]), (before["denoiser"], before["plain"]), (before["denoiser"], after["denoiser"])):
        assert not any(torch.equal(one[name], other[name]) for name in ("encoder.out.weight", "from_z.weight"))  # every stage trains them
    logged = [json.loads(line) for line in open(trained_latent / "log.jsonl")]
    assert all(("latent_kl" in row) == (row["stage"] == "order") for row in logged)


def without_speed(table):
    """The lines of a printed table but for the problems a second: what every run should agree on."""
    lines = [line for line in table.split("\n") if line.startswith(("method", *mdmvi.STRATEGIES)) and "[" in line]
    return [" ".join(line.split()[:-1]) for line in lines]


@pytest.mark.parametrize("flags", ["arithmetic --items 2 --latent-dim 1", "sudoku --box 2x2", "sudoku --box 2x2 --order-steps 0"])
def test_embedded_tasks_end_to_end(small, tmp_path, monkeypatch, capsys, flags):
    bounds = []
    for name in ("order_elbo", "vmd_elbo"):
        monkeypatch.setattr(mdmvi, name, lambda *args, name=name, bound=getattr(mdmvi, name): bounds.append(name) or bound(*args))
    assert run(train, *TINY, "--no-baseline", "--budget", 3, "--task", *flags.split(), "--problems", 20, "--out", tmp_path) == 0
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    sudoku, learned = "sudoku" in flags, "--order-steps 0" not in flags
    assert bounds[0] == ("vmd_elbo" if "latent" in flags else "order_elbo")
    assert ("learned order   " in printed) == learned == any(r["strategy"] == "learned" for r in rows)
    most = max(r["budget"] for r in rows)
    single = [r for r in rows if r["budget"] == most and r["match"] == "own"] if sudoku else []
    assert [r["strategy"] for r in single if not r["eos_aware"]] == [rule for rule in mdmvi.STRATEGIES if rule != "learned"] * sudoku
    assert all(most >= 10 and r["max_steps"] == most for r in single if r["strategy"] == "left_to_right")  # one cell a step
    rules = 7 if sudoku else 11  # a grid has no EOS
    assert len(rows) == rules * sudoku + (1 + 2 * rules if learned else rules) and all(r["problems"] == 20 for r in rows)
    assert ("items  problems" in printed) == (not sudoku)
    assert run(eval_gsm8k, "--checkpoint", tmp_path / "checkpoint.pt", "--problems", 20, *["--single"] * sudoku) == 0
    assert without_speed(capsys.readouterr().out) == without_speed(printed) and len(without_speed(printed)) == len(rows) + 1
    puzzle, shown = "1...\n..2.\n.3..\n...4", ["--checkpoint", tmp_path / "checkpoint.pt", "--strategy", "iid", "--html", tmp_path / "o.html"]
    assert run(sample, puzzle if sudoku else "Ann has 5 pens.", *shown) == 0
    assert (tmp_path / "o.html").read_text().count("data-step=") == (12 if sudoku else 20)  # blanks, or the canvas of two items
    capsys.readouterr()
    if sudoku:
        for wrong in ("1...", puzzle + "\n....", puzzle.replace("2", "5"), puzzle.replace("\n", " ")):
            assert run(sample, wrong, *shown) == 2
            assert capsys.readouterr().err.count("\n") == 1

def test_a_grid_has_the_search_for_posterior_and_its_policy_learns_the_states_on_the_way(small):
    args = train.parse_args([*TINY, *"--task sudoku --box 2x2 --seed 3 --search 64 --search-steps 200".split()])
    problems = eval_gsm8k.sudoku_problems(64, 0, False, (2, 2))
    grid = train.Run(args, train.make_tokenizer(args, problems))
    tokens, canvas, _ = eval_gsm8k.encode_problems(problems, grid.tokenizer, args.max_len, args.canvas_len)
    x, on = tokens.long(), canvas
    torch.nn.init.normal_(grid.denoiser.lm_head.weight)  # sure of some cells and not of others
    step = mdmvi.sure_first_order(grid.denoiser, x, on, args.budget)
    assert step.amax() > 1
    assert torch.equal(grid.log_alpha(x, on), -1.0 * (step + 1.0))
    masked, _ = mdmvi.draw_path(grid.log_alpha(x, on), on, torch.full((64,), 2), args.tau, rng(0))
    assert torch.equal(masked, step >= 2)  # q follows the search

    states = train.states_of(grid, x, step)
    assert len(states) == args.budget - 1
    for s, (hidden, reveal) in enumerate(states):
        cells = [(i, j) for i in range(64) for j in range(x.shape[1]) if step[i, j] >= s]
        assert reveal.tolist() == [float(step[i, j] == s) for i, j in cells]
        for (i, j), h in list(zip(cells, hidden))[::50]:
            seen = torch.where(step[i] >= s, grid.denoiser.mask_id, x[i])
            assert torch.allclose(h, grid.denoiser(seen[None])[1][0, j], atol=1e-4)

    def loss():
        hidden, reveal = map(torch.cat, zip(*states))
        return F.binary_cross_entropy_with_logits(grid.policy(hidden), reveal).item()

    before = loss()
    train.start_orders(grid, tokens, canvas, [])
    assert loss() < 0.7 * before


@pytest.mark.parametrize(
    "flags, name",
    [("--pairs d1", "plain MDM"), ("--pairs d2 --latent-dim 2", "VMD, 2 latent dimensions"), ("--latent-dim 1 --order-steps 2", "VMD, 1")],
)
def test_pairs_end_to_end(small, tmp_path, capsys, flags, name):
    assert run(train, "--task", "pairs", "--steps", 3, "--order-batch", 2, *flags.split(), "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["stage"] == "done" and state["pairs"] == ("d2" if "d2" in flags else "d1") and f"({state['pairs']})" in printed and name in printed
    assert run(eval_gsm8k, "--checkpoint", tmp_path / "checkpoint.pt") == 0
    again = capsys.readouterr().out
    assert again.startswith("\n10,000 pairs") and printed.endswith(again)
    assert run(sample, "", "--checkpoint", tmp_path / "checkpoint.pt", "--strategy", "random") == 0
    assert "random, 1 steps" in capsys.readouterr().out


def test_stage_1_only(trained, tmp_path, capsys):
    assert run(train, *gsm8k(trained), "--order-steps", 0, "--out", tmp_path) == 0
    assert not (tmp_path / "plain.pt").exists() and {json.loads(line)["stage"] for line in open(tmp_path / "log.jsonl")} == {"plain"}
    assert "learned" not in capsys.readouterr().out
    checkpoint = ["--checkpoint", tmp_path / "checkpoint.pt"]
    args = "--problems", 6, "--budget", 2, 4, "--strategies", "iid", "top_prob+eos", "--json", tmp_path / "rows.json"
    assert run(eval_gsm8k, *checkpoint, "--data", trained / "data.jsonl", *args) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["strategy"], r["budget"], r["match"], r["model"], r["p_value"]) for r in rows] == [
        (rule, budget, "own", "plain", None) for budget in (2, 4) for rule in ("iid", "top_prob")
    ]
    assert run(sample, ROWS[0]["question"], *checkpoint, "--strategy", "iid", "left_to_right") == 0
    capsys.readouterr()
    for strategy in ([], ["--strategy", "iid", "learned"]):
        assert run(sample, ROWS[0]["question"], *checkpoint, *strategy) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "no learned order" in shown.err and not shown.out


@pytest.mark.parametrize("task", train.DEFAULTS)
def test_defaults_of_each_task(task):
    needed = ["--task", task, *["--data", "x"] * (task == "gsm8k")]
    args, given = vars(train.parse_args(needed)), {name: "6m" if name == "size" else value + 1 for name, value in train.DEFAULTS[task].items()}
    given["freeze_denoiser"] = not train.DEFAULTS[task]["freeze_denoiser"]
    assert {name: args[name] for name in given} == train.DEFAULTS[task]
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value)) if name != "freeze_denoiser"]
    flags.append("--freeze-denoiser" if given["freeze_denoiser"] else "--no-freeze-denoiser")
    changed = vars(train.parse_args(needed + flags))
    assert {name: changed[name] for name in given} == given
    assert all(set(values) == set(given) for values in train.DEFAULTS.values())
    assert vars(train.parse_args(needed + ["--order-steps", "0"]))["order_steps"] == 0  # 0 is an answer, not a flag left out


@pytest.mark.parametrize("flags", [[], ["--latent-dim", 2]])
def test_benchmark_needs_no_data(small, capsys, flags):
    assert run(train, "--benchmark", "--order-batch", 1, "--paths", 2, "--max-len", 12, "--canvas-len", 6, *flags) == 0
    printed = capsys.readouterr().out
    assert "ratio to plain" in printed and "peak memory" in printed


# ---------------------------------------------------------------------------------------------------
# The SMDM checkpoint layout
# ---------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("rope_bf16, recorded, tolerance", [(False, "logits_fp32_rope", 1e-4), (True, "logits_bf16_rope", 2e-3)])
def test_smdm_logits(rope_bf16, recorded, tolerance):
    folder = SHARED / "smdm_fixture"
    c, arrays = json.loads((folder / "config.json").read_text()), np.load(folder / "smdm_tiny_logits.npz")
    config = mdmvi.ModelConfig(
        c["vocab_size"], c["block_size"], c["n_layer"], c["n_head"], c["n_embd"], c["intermediate_size"], c["mask_id"], 2, rope_bf16
    )
    model = mdmvi.Denoiser(config)
    train.load_smdm(folder / "smdm_tiny.safetensors", model)
    logits, _ = model(torch.from_numpy(arrays["ids"]).long())
    assert (logits - torch.from_numpy(arrays[recorded]).float()).abs().max() < tolerance


def test_smdm_layout_round_trip(tmp_path):
    config = mdmvi.ModelConfig(11, 16, 2, 2, 8, 12, 11, 0)
    model, again = mdmvi.Denoiser(config), mdmvi.Denoiser(config)
    train.save_smdm(tmp_path / "m.safetensors", model)
    train.load_smdm(tmp_path / "m.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    with pytest.raises(eval_gsm8k.UserError, match="transformer.h.2.norm_1.weight"):
        train.load_smdm(tmp_path / "m.safetensors", mdmvi.Denoiser(mdmvi.ModelConfig(11, 16, 3, 2, 8, 12, 11, 0)))
    with pytest.raises(eval_gsm8k.UserError, match="transformer.h.1.attn.attn.weight, which"):
        train.load_smdm(tmp_path / "m.safetensors", mdmvi.Denoiser(mdmvi.ModelConfig(11, 16, 1, 2, 8, 12, 11, 0)))
    with pytest.raises(eval_gsm8k.UserError, match=r"\[12, 8\], this model \[14, 8\]"):
        train.load_smdm(tmp_path / "m.safetensors", mdmvi.Denoiser(mdmvi.ModelConfig(13, 16, 2, 2, 8, 12, 13, 0)))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:400])
    with pytest.raises(eval_gsm8k.UserError, match="not a whole"):
        train.load_smdm(tmp_path / "cut.safetensors", model)


# ---------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, exit code 2, nothing overwritten
# ---------------------------------------------------------------------------------------------------


def broken_files(folder, trained):
    good = (trained / "out" / "checkpoint.pt").read_bytes()
    files = {
        "empty.pt": b"", "cut.pt": good[: len(good) // 2], "text.pt": b"hello", "empty.jsonl": b"",
        "bad.jsonl": b'{"question": "a", "answer": "#### 1"}\n{"question": oops}\n', "bad.json": b"[1,\n2",
        "columns.jsonl": b'{"text": "a"}\n', "cut.jsonl.gz": gzip.compress(b"x" * 9999)[:30], "few.jsonl": b'{"question": "a", "answer": "#### 1"}\n',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({"model": {}}, folder / "foreign.pt")
    (folder / "none").mkdir()
    (folder / "file").touch()


BAD = [
    (eval_gsm8k, "--checkpoint no.pt", "no checkpoint at"),
    (eval_gsm8k, "--checkpoint empty.pt", "is empty"),
    (eval_gsm8k, "--checkpoint cut.pt", "damaged or not a checkpoint"),
    (eval_gsm8k, "--checkpoint text.pt", "damaged or not a checkpoint"),
    (eval_gsm8k, "--checkpoint foreign.pt", "another program"),
    (eval_gsm8k, "--checkpoint GOOD", "needs --data"),
    (eval_gsm8k, "--checkpoint GOOD --data no.jsonl", "no data at"),
    (eval_gsm8k, "--checkpoint GOOD --data empty.jsonl", "is empty"),
    (eval_gsm8k, "--checkpoint GOOD --data bad.jsonl", "line 2 is not JSON"),
    (eval_gsm8k, "--checkpoint GOOD --data bad.json", "line 2 is not JSON"),
    (eval_gsm8k, "--checkpoint GOOD --data columns.jsonl", "line 1 has no column 'question'"),
    (eval_gsm8k, "--checkpoint GOOD --data cut.jsonl.gz", "cannot read"),
    (eval_gsm8k, "--checkpoint GOOD --data none", "no .json or .jsonl file"),
    (eval_gsm8k, "--checkpoint GOOD --data owner/name", "hub"),
    (eval_gsm8k, "--checkpoint GOOD --data DATA --budget 0", "--budget is 0"),
    (eval_gsm8k, "--checkpoint GOOD --data DATA --strategies best", "unknown strategy 'best'"),
    (eval_gsm8k, "--checkpoint GOOD --data DATA --strategies iid+eos", "unknown strategy"),
    (eval_gsm8k, "--checkpoint GOOD --data DATA --problems 1 --strategies iid --json none/no/rows.json", "cannot write"),
    (eval_gsm8k, "--nonsense", "unrecognized arguments"),
    (sample, "hello --checkpoint no.pt", "no checkpoint at"),
    (sample, "hello --checkpoint GOOD --budget 0", "--budget is 0"),
    (sample, "hello --checkpoint GOOD --strategy best", "unknown strategy 'best'"),
    (sample, "LONG --checkpoint GOOD", "shorten it"),
    (train, "--task chess", "unknown task 'chess'"),
    (train, "--task gsm8k", "needs --data"),
    (train, "--budget 0", "--budget is 0"),
    (train, "--tau 0", "--tau is 0"),
    (train, "--end-lr 2", "--end-lr is 2"),
    (train, "--items 6", "--items is 6"),
    *((train, f"--task sudoku --box {box}", "--box is") for box in ("3", "2x", "axb", "0x3", "1x1", "4x4", "2x3x1")),
    (train, "--latent-dim -1", "--latent-dim"),
    (train, "--order-steps -1", "--order-steps"),
    (train, "--pairs d3", "invalid choice: 'd3'"),
    (train, "--task gsm8k --data DATA --max-len 64 --canvas-len 24 --latent-dim 2 --out OUT --resume", "has config"),
    (train, "--device gpu", "--device gpu is not there"),
    (sample, "hello --device cuda:77", "--device cuda:77 is not there"),
    (train, "--task gsm8k --data DATA --max-len 64 --canvas-len 24 --size 170m --init no.st --tokenizer none/no --out new", "cannot read"),
    (train, "--task gsm8k --data few.jsonl --out new", "at least 10"),
    (train, "--task gsm8k --data DATA --out file/out", "cannot write to the output folder"),
    (train, "--task gsm8k --data DATA --max-len 8 --canvas-len 4 --out new", "no problem fits"),
    (train, "--out OUT", "pass --resume"),
    (train, "--out OUT --resume", "has task gsm8k"),
    (train, "--task gsm8k --data DATA --max-len 64 --canvas-len 24 --size 6m --out OUT --resume", "has config"),
    (train, "--task gsm8k --data DATA --out none --resume", "no checkpoint at"),
]


@pytest.mark.parametrize("script, line, says", BAD, ids=[f"{s.__name__} {line}" for s, line, _ in BAD])
def test_bad_input(trained, tmp_path, monkeypatch, capsys, script, line, says):
    broken_files(tmp_path, trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("no network")))
    words = {"GOOD": trained / "out" / "checkpoint.pt", "DATA": trained / "data.jsonl", "OUT": trained / "out", "LONG": "pens " * 99}
    snapshot = {p: p.read_bytes() for p in [*(trained / "out").iterdir(), *tmp_path.glob("*.*")]}
    assert run(script, *[words.get(word, word) for word in line.split()]) == 2
    error = capsys.readouterr().err
    message = [text for text in error.split("\n") if text and "rule/s" not in text]
    assert len(message) == 1 and says in message[0], error
    assert all(p.read_bytes() == content for p, content in snapshot.items())


@pytest.mark.parametrize("script", ["train", "sample", "eval_gsm8k"])
def test_as_a_process(script, tmp_path):
    """Exit code 2, one line, no traceback; --help tells every default."""
    bad = subprocess.run([sys.executable, f"{script}.py", "--no-such-flag"], cwd=HERE, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith(f"{script}.py: ") and bad.stderr.count("\n") == 1 and not bad.stdout
    shown = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=HERE, capture_output=True, text=True)
    assert shown.returncode == 0 and "(default: " in shown.stdout
