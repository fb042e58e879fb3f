"""Tests of mdmvi.py and of the scripts around it. Run: pytest test_mdmvi.py

Section "exactness" holds the mathematics to account on problems so small that every order, token and mask
can be enumerated. The enumeration is written anew, in plain loops and float64, and calls nothing of mdmvi,
so that one mistake cannot be on both sides. Random results are compared over many replicated rows, from
fixed seeds: means within five standard errors, distributions by chi-square.
Sections for the scripts follow below it.
"""

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
        return hidden.squeeze(-1)

    def posterior(self, tokens):
        return F.logsigmoid(self.score[(tokens * self.base).sum(1)])


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
    """(log p_theta [N, V], pi [N]) on x0 with the positions M masked."""
    logits, hidden = toy(torch.tensor([[toy.mask_id if i in M else int(x) for i, x in enumerate(x0)]]))
    return logits[0].double().log_softmax(-1), toy.policy(hidden)[0].double().sigmoid()


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
    """E_q[log p(x_0, r) - log q(r)], its KL part, and the share of steps that find nothing masked."""
    elbo, kl, finished = 0.0, 0.0, 0.0
    for order in orders(canvas, T):
        q = q_path(toy.posterior(x0[None])[0], order, T - 1)
        if q > 0:
            log_order, log_tokens = joint(toy, x0, order, T)
            elbo = elbo + q * (log_order + log_tokens - q.log())
            kl = kl + q * (q.log() - log_order)
            finished = finished + q * (T - 1 - max(order.values())) / T
    return elbo, kl, finished


def exact_mdm(toy, x0, canvas):
    """Of the plain model: (bound, log-likelihood) where every order of single tokens is as likely."""
    log_p = []
    for permutation in itertools.permutations(places(canvas)):
        left = [permutation[j:] for j in range(len(permutation))]
        log_p.append(sum(look(toy, x0, M)[0][M[0], x0[M[0]]] for M in left))
    log_p = torch.stack(log_p)
    return log_p.mean(), log_p.exp().mean().log()


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
        log_p_given_r = [joint(toy, X0[row], order, T)[1] for order in orders(CANVAS[row], T)]
        assert_mean(uniform[row::2], torch.stack(log_p_given_r).mean(), precision=0.005)


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
        samples.append((estimate, stats["elbo"], stats["kl"], stats["finished"], *gradient))
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
    mdmvi.order_loss(toy, toy.policy, lambda _: certain, tokens, canvas, 3, TAU, 8, rng(0))
    assert seen[0].shape == (6, 8) and (seen[0] == seen[0][:, :1]).all()
    assert len(seen[0].unique()) > 4


def test_rloo_halves_the_variance(monkeypatch):
    model = tiny_denoiser()
    policy, log_alpha = mdmvi.UnmaskPolicy(model.config), F.logsigmoid(torch.randn(1, 16, generator=rng(0)))
    tokens, canvas = torch.randint(5, (1, 16), generator=rng(1)), torch.arange(16)[None] > 0
    tokens, canvas, log_alpha = replicate(500, tokens, canvas, log_alpha)

    def variance():
        leaf = log_alpha.clone().requires_grad_()  # one for each row, so that a row has its own gradient
        loss, _ = mdmvi.order_loss(model, policy, lambda _: leaf, tokens, canvas, 4, TAU, 8, rng(0))
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


def tiny_denoiser(vocab_size=5, mask_id=5, n_layer=1):
    """A Denoiser with weights large enough for probabilities far from uniform. Seeds what comes after it."""
    torch.manual_seed(0)
    model = mdmvi.Denoiser(mdmvi.ModelConfig(vocab_size, 16, n_layer, 2, 8, 12, mask_id, eos_id=0))
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
    assert seen[4:] == [4 * 8]


def test_seeds():
    model, (tokens, canvas) = tiny_denoiser(), problems()
    tokens, canvas = tokens[15:], canvas[15:]
    policy, posterior = mdmvi.UnmaskPolicy(model.config), mdmvi.OrderPosterior(model.config)

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


def slow_denoiser(model, tokens):
    """The network on one sequence in float64, a head at a time: logits [N, V], hidden [N, D]."""
    w = {name.removeprefix("trunk."): x.detach().double().numpy() for name, x in model.named_parameters()}
    D, heads = model.config.n_embd, model.config.n_head
    size = D // heads
    angle = np.outer(np.arange(len(tokens)), 10000.0 ** (-2 * np.arange(size // 2) / size))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * w[name]

    def turn(x):  # each feature of the first half and its partner in the second are one complex number
        z = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * np.exp(1j * angle)
        return np.concatenate((z.real, z.imag), 1)

    x = w["wte.weight"][tokens]
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
    model, tokens = tiny_denoiser(n_layer=2), torch.randint(6, (3, 9), generator=rng(0))
    for row, *fast in zip(tokens, *model(tokens)):
        for a, b in zip(fast, slow_denoiser(model, row.numpy())):
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


def test_posterior_starts_from_the_denoiser():
    model, (tokens, _) = tiny_denoiser(n_layer=3), problems()
    posterior = mdmvi.OrderPosterior(model.config).start_from(model)
    assert len(posterior.trunk.blocks) == 2 and posterior(tokens).shape == tokens.shape
    assert (posterior(tokens) < 0).all()
    ours, theirs = posterior.trunk.blocks[1].qkv.weight, model.trunk.blocks[1].qkv.weight
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


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


@pytest.mark.parametrize("most_items", [2, 3])
def test_held_out_problems_are_never_in_the_training_stream(most_items):
    train_set = eval_gsm8k.arithmetic_problems(20_000, 0, False, most_items)
    test_set = eval_gsm8k.arithmetic_problems(2000, 1, True, most_items)
    numbers = lambda problems: {tuple(sorted(p["items"])) for p in problems}
    assert not numbers(train_set) & numbers(test_set)
    assert len({p["question"] for p in test_set}) == 2000
    assert {len(p["items"]) for p in test_set} == {len(p["items"]) for p in train_set} == set(range(1, most_items + 1))
    args = train.parse_args(["--items", str(most_items)])
    tokenizer = eval_gsm8k.Tokenizer.build(p["question"] + eval_gsm8k.SEPARATOR + p["answer"] for p in train_set)
    for problems in (train_set, test_set):
        assert all(eval_gsm8k.encode_problems(problems, tokenizer, args.max_len, args.canvas_len)[2])
        assert all(eval_gsm8k.solves_arithmetic(p["answer"], p["items"]) for p in problems)


def test_checker_takes_every_valid_order_and_nothing_else():
    items, solutions, generator = [(2, 3), (3, 4), (2, 7)], set(), random.Random(0)
    for _ in range(500):
        solutions.add(eval_gsm8k.arithmetic_solution(items, generator))
    assert len(solutions) == 12  # 3! orders of the items, two places for the first sum
    for text in solutions:
        assert eval_gsm8k.solves_arithmetic(text, items)
        assert eval_gsm8k.solves_equations(text, "#### 21")
        for i, c in enumerate(text):  # any one digit changed makes it wrong
            if c.isdigit():
                assert not eval_gsm8k.solves_arithmetic(text[:i] + str((int(c) + 1) % 10) + text[i + 1 :], items)
    for text in ("", "#### 21", "<<2+3=5>> #### 5", "<<2+3=5>> <<2+3=5>> <<3+4=7>> <<5+5=10>> <<10+7=17>> #### 17"):
        assert not eval_gsm8k.solves_arithmetic(text, items)
    twice = [(2, 3), (2, 3)]
    assert eval_gsm8k.solves_arithmetic("<<2+3=5>> <<3+2=5>> <<5+5=10>> #### 10", twice)
    assert not eval_gsm8k.solves_arithmetic("<<2+3=5>> <<5+5=10>> #### 10", twice)
    # 5 + 7 is an item and two subtotals at once: read as whichever makes the whole right
    assert eval_gsm8k.solves_arithmetic("<<2+3=5>> <<3+4=7>> <<5+7=12>> <<5+7=12>> <<12+12=24>> #### 24", [(5, 7), (2, 3), (3, 4)])
    assert not eval_gsm8k.solves_arithmetic("<<2+3=5>> <<3+4=7>> <<5+7=12>> #### 12", [(5, 7), (2, 3), (3, 4)])


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

TINY = "--steps 6 --batch 4 --order-steps 4 --order-batch 2 --paths 2 --save-every 2 --problems 0".split()


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


def tensors(state, prefix=""):
    if isinstance(state, torch.Tensor):
        yield prefix, state
    elif isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{prefix}.{key}")


def same(first, second):
    first, second = (dict(tensors(torch.load(path, weights_only=True))) for path in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("at", [3, 8, 13])  # in stage 1, in the baseline, in stage 2
def test_ctrl_c_saves_and_resuming_equals_not_having_stopped(trained, tmp_path, monkeypatch, capsys, at):
    steps, step = [], train.train_step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(train, *gsm8k(trained), "--out", tmp_path) == 130
    assert len(steps) == at and "--resume" in capsys.readouterr().err
    with open(tmp_path / "log.jsonl", "a") as file:  # what a kill after the last checkpoint would leave
        file.write('{"stage": "order", "step": 4}\n{"stage": "or')
    assert run(train, *gsm8k(trained), "--out", tmp_path, "--resume") == 0
    assert same(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")
    assert same(tmp_path / "plain.pt", trained / "out" / "plain.pt")
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


def test_benchmark_needs_no_data(capsys):
    assert run(train, "--benchmark", "--order-batch", 1, "--paths", 2, "--max-len", 12, "--canvas-len", 6) == 0
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
    (train, "--items 9", "--items is 9"),
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
