"""Tests of mdmvi.py and of the scripts. Run: python -m pytest test_mdmvi.py

The first part holds the mathematics to account on problems so small that every order, token and
mask can be enumerated. The enumeration is written anew, in plain loops and float64, and calls
nothing of mdmvi, so that one mistake cannot be on both sides. Random results are compared over
many replicated rows, from fixed seeds: means within five standard errors, distributions by
chi-square. The second part runs train.py, eval_gsm8k.py and sample.py: resume, tables, bad input.
"""

import functools
import gzip
import html.parser
import io
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import eval_gsm8k
import mdmvi
import sample
import train
from examples import arithmetic, command_line, gsm8k, page, runs, smdm, spread
from examples.muon import make_optimizers
from examples.tokenizer import MARKS, SEPARATOR, Tokenizer, answer_text, encode_problems

torch.set_num_threads(1)

TAU = 0.5
X0 = torch.tensor([[2, 0, 1, 1], [1, 2, 0, 0]])
CANVAS = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()  # of unequal length, each with a prompt

# ------------------------------------------------------------------------------------------------
# Small models, slow enumerations, and how to compare with them
# ------------------------------------------------------------------------------------------------


class Toy:
    """Denoiser, policy and posterior that look up their answers, an entry for each sequence.

    The hidden state of a position is its logits followed by its policy logit.
    """

    def __init__(self, length=4, vocab=3, seed=0):
        g, states = rng(seed), (vocab + 1) ** length
        self.mask_id, self.eos_id = vocab, 0
        self.base = (vocab + 1) ** torch.arange(length)
        self.token = (1.5 * torch.randn(states, length, vocab, generator=g)).requires_grad_()
        self.pi = torch.randn(states, length, 1, generator=g).requires_grad_()
        self.score = torch.randn(states, length, generator=g).requires_grad_()

    def __call__(self, tokens, place=None):
        state = (tokens * self.base).sum(1)
        hidden = torch.cat((self.token[state], self.pi[state]), dim=2)
        return hidden if place is None else hidden.flatten(0, 1)[place]

    def logits(self, hidden):
        assert hidden.dim() == 2
        return hidden[:, :-1]

    def policy(self, hidden, masked=None):
        return hidden[..., -1]

    def posterior(self, tokens, canvas):
        """Off the canvas alpha is nearly 1, which must not count."""
        return F.logsigmoid(self.scores(tokens)).where(canvas, -1e-3)

    def scores(self, tokens, canvas=None):
        return self.score[(tokens * self.base).sum(1)]

    def parameters(self):
        return [self.token, self.pi, self.score]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def replicate(n, *tensors):
    return [x.repeat(n, *[1] * (x.dim() - 1)) for x in tensors]


def tiny_config(vocab_size=5, mask_id=5, n_layer=1, **more):
    return mdmvi.ModelConfig(vocab_size, 16, n_layer, 2, 8, 12, mask_id, eos_id=0, **more)


def tiny_denoiser(*args, **more):
    """A Denoiser with weights large enough for probabilities far from uniform."""
    return randomise(mdmvi.Denoiser(tiny_config(*args, **more)))


def tiny_models(**more):
    """Denoiser, policy and posterior, none of them at its start."""
    denoiser = tiny_denoiser(**more)
    policy, posterior = runs.RunPolicy(denoiser.config), runs.RunPosterior(denoiser.config)
    return denoiser, randomise(policy), randomise(posterior)


def randomise(module):
    """Weights from N(0, 0.6), norms around 1; seeds what comes after it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(float("norm" in name), 0.6)
    return module


def problems():
    """Canvases of many sizes and shapes, the first of them empty."""
    tokens = torch.randint(3, (30, 6), generator=rng(0))
    return tokens, torch.rand(30, 6, generator=rng(1)) < torch.linspace(0, 1.5, 30)[:, None]


def places(row):
    return row.nonzero().flatten().tolist()


def orders(canvas, T):
    """All paths r as {position: the step that reveals it}, so that M_s = {i: order[i] >= s}."""
    positions = places(canvas)
    for steps in itertools.product(range(T), repeat=len(positions)):
        yield dict(zip(positions, steps))


def look(toy, x0, M):
    """(log p_theta [N, V], pi [N]) in float64 on x0 with the positions M masked."""
    x = torch.tensor([toy.mask_id if i in M else int(x0[i]) for i in range(len(x0))])
    hidden = toy(x[None])[0]
    return toy.logits(hidden).double().log_softmax(1), toy.policy(hidden).double().sigmoid()


def joint(toy, x0, order, T):
    """log p(r) and log p(x_0 | r): r_i ~ Bern(pi_i) before step T-1, which reveals the rest."""
    log_order, log_tokens = torch.zeros(2, dtype=torch.double)
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
    """q of the first `steps` steps of a path; rho_i = (alpha_i / max over M_s of alpha)^(1/tau)."""
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
    """E_q[log p(x_0, r) - log q(r)] and its KL part."""
    elbo, kl, log_alpha = 0.0, 0.0, toy.posterior(x0[None], canvas[None])[0]
    for order in orders(canvas, T):
        q = q_path(log_alpha, order, T - 1)
        if q > 0:
            log_order, log_tokens = joint(toy, x0, order, T)
            elbo = elbo + q * (log_order + log_tokens - q.log())
            kl = kl + q * (q.log() - log_order)
    return elbo, kl


def exact_mdm(toy, x0, canvas):
    """(bound, log-likelihood) of the plain model: orders of single tokens, all equally likely."""
    log_p = []
    for permutation in itertools.permutations(places(canvas)):
        left = [permutation[j:] for j in range(len(permutation))]
        log_p.append(sum(look(toy, x0, M)[0][M[0], x0[M[0]]] for M in left))
    log_p = torch.stack(log_p)
    return log_p.mean(), log_p.exp().mean().log()


def exact_uniform(toy, x0, canvas, T):
    """(bound, log-likelihood) of uniformly random orders in T steps."""
    log_p = torch.stack([joint(toy, x0, order, T)[1] for order in orders(canvas, T)])
    return log_p.mean(), log_p.exp().mean().log()


def assert_mean(samples, expected, precision):
    """samples [n, ...] average to `expected` within five standard errors, which are to be small."""
    samples, expected = samples.detach().double(), torch.as_tensor(expected).detach().double()
    error, scale = samples.std(0) / len(samples) ** 0.5, expected.norm()
    assert error.norm() <= precision * scale, f"no power: error is {error.norm() / scale:.3g}"
    off = (samples.mean(0) - expected).abs() / (5 * error + 1e-4 * scale + 1e-12)
    assert off.max() < 1, f"{5 * off.max():.1f} standard errors off"


def assert_distribution(outcomes, probability):
    """Chi-square of a list of outcomes against {outcome: probability}; rare ones share a cell."""
    n, counts = len(outcomes), Counter(outcomes)
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)
    assert all(probability.get(o, 0) > 0 for o in counts), "an outcome that cannot be"
    cells = [(counts[o], n * p) for o, p in probability.items() if n * p >= 10]
    rest = (n - sum(c for c, _ in cells), n - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 10 else []
    dof = len(cells) - 1
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    assert statistic <= dof + 5 * math.sqrt(2 * dof), f"chi-square {statistic:.0f}, {dof} freedoms"


def test_enumerated_likelihood_sums_to_one():
    total, x0 = 0.0, X0[1].clone()
    for tokens in itertools.product(range(3), repeat=2):
        x0[CANVAS[1]] = torch.tensor(tokens)
        total += exact_log_p(Toy(), x0, CANVAS[1], T=3).exp().item()
    assert total == pytest.approx(1, abs=1e-9)


# ------------------------------------------------------------------------------------------------
# 1. Model
# ------------------------------------------------------------------------------------------------


def slow_trunk(trunk, tokens, n_head, shift=0.0):
    """The network on one sequence in float64, a head at a time: hidden [N, D]."""
    w = {name: x.detach().double() for name, x in trunk.named_parameters()}
    D = w["norm.weight"].numel()
    size = D // n_head
    position = torch.arange(len(tokens), dtype=torch.double)
    angle = torch.outer(position, 10000.0 ** (-2 * torch.arange(size // 2).double() / size))

    def norm(x, name):
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turn(x):  # a feature of the first half and its partner in the second are a complex number
        z = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), 1)

    x = w["wte.weight"][tokens] + shift
    for layer in range(len(trunk.blocks)):
        name = f"blocks.{layer}."
        h, mixed = norm(x, name + "norm_1.weight"), []
        for wq, wk, wv in w[name + "qkv.weight"].view(n_head, 3, size, D):
            attention = torch.exp(turn(h @ wq.T) @ turn(h @ wk.T).T / math.sqrt(size))
            mixed.append(attention / attention.sum(1, keepdim=True) @ (h @ wv.T))
        x = x + torch.cat(mixed, 1) @ w[name + "proj.weight"].T
        h = norm(x, name + "norm_2.weight")
        gate = h @ w[name + "w1.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ w[name + "w2.weight"].T)) @ w[name + "w3.weight"].T
    return norm(x, "norm.weight")


def test_denoiser_agrees_with_a_slow_one():
    model, tokens = tiny_denoiser(n_layer=2), torch.randint(6, (3, 9), generator=rng(0))
    hidden = model(tokens)
    for row, fast in zip(tokens, hidden):
        slow = slow_trunk(model.trunk, row, n_head=2)
        assert (fast - slow).abs().max() < 1e-5
        logits = slow @ model.lm_head.weight.double().T
        assert (model.logits(fast) - logits).abs().max() < 1e-5


@pytest.mark.parametrize("n_layer", [1, 2])
def test_hidden_states_at_some_places(n_layer):
    """Rows of those of a whole pass, in any order, some twice, or none; so are their gradients."""
    model, tokens = tiny_denoiser(n_layer=n_layer), torch.randint(6, (3, 9), generator=rng(0))
    weights = list(model.trunk.parameters())
    for place in (torch.tensor([26, 0, 4, 4, 13]), torch.zeros(0).long()):
        some, rows = model(tokens, place), model(tokens).flatten(0, 1)[place]
        assert some.shape == (len(place), 8) and torch.allclose(some, rows, atol=1e-5)
        gradients = (torch.autograd.grad(x.square().sum(), weights) for x in (some, rows))
        for one, other in zip(*gradients):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_denoiser_contract():
    model, tokens = tiny_denoiser(mask_id=3, canvas_len=7), torch.full((1, 16), 3)
    hidden = model(tokens)
    logits = model.logits(hidden[0])
    assert hidden.shape == (1, 16, 8) and logits.shape == (16, 5)
    assert torch.equal(logits == -math.inf, (torch.arange(5) == 3).expand(16, 5))  # never MASK
    assert (model.mask_id, model.eos_id, model.canvas_len) == (3, 0, 7)
    for changed in (0, 15):  # every position sees both ends
        assert (model(tokens.index_fill(1, torch.tensor([changed]), 1)) != hidden).any(-1).all()
    with pytest.raises(ValueError, match="17 tokens .* context of 16"):
        model(torch.zeros(1, 17).long())


def test_weights_at_the_start():
    config = mdmvi.ModelConfig(50, 8, 8, 2, 64, 96, mask_id=50, eos_id=0)
    for name, weight in mdmvi.Denoiser(config).named_parameters():
        std = 0.02 / 4 if name.endswith(("proj.weight", "w3.weight")) else 0.02
        assert weight.dim() == 1 or weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("n_layer", [0, 2])
def test_policy_is_a_small_head(n_layer):
    policy, hidden = (
        randomise(mdmvi.UnmaskPolicy(tiny_config(), n_layer)),
        torch.randn(3, 8, generator=rng(0)),
    )
    expected = hidden
    for layer in policy.inner:
        h = expected @ layer.weight.T + layer.bias
        expected = h * h.sigmoid()
    expected = expected @ policy.outer.weight[0] + policy.outer.bias
    assert len(policy.inner) == n_layer and torch.allclose(
        policy(hidden, None), expected, atol=1e-6
    )


class NotOnTheCPU(TorchFunctionMode):
    """Tensors say that they are on another device, which takes the path made for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("meta")
        kwargs = {key: x for key, x in (kwargs or {}).items() if key != "device"}
        return func(*args, **kwargs)


def on_gpu_path(function, *args):
    with NotOnTheCPU():
        return function(*args)


@pytest.mark.parametrize("canvas_len", [None, 0, 3, 9])
@pytest.mark.parametrize("gpu_path", [False, True])
def test_token_log_prob(gpu_path, canvas_len, monkeypatch):
    toy, rows = Toy(), []
    if canvas_len is not None:  # a foreign denoiser need not have it
        toy.canvas_len = canvas_len
    full = CANVAS[:1].expand(2, 4)  # 3 places each: as many as there is room for
    for masked in (full, CANVAS, CANVAS & (torch.arange(4) > 1), CANVAS & False):
        with monkeypatch.context() as m:
            m.setattr(toy, "logits", lambda h: rows.append(len(h)) or Toy.logits(toy, h))
            call = on_gpu_path if gpu_path else lambda function, *args: function(*args)
            log_p = call(mdmvi.token_log_prob, toy, X0, masked)
        assert rows.pop() == (2 * min(canvas_len or 4, 4) if gpu_path else masked.sum())
        slow = torch.zeros(2, 4, dtype=torch.double)
        for b in range(2):
            M = places(masked[b])
            for i in M:
                slow[b, i] = look(toy, X0[b], M)[0][i, X0[b, i]]
        assert log_p.dtype == torch.float32 and (log_p - slow).abs().max() < 1e-5
        hidden = toy(X0.masked_fill(masked, toy.mask_id))  # or from a pass that was made already
        assert torch.equal(call(mdmvi.token_log_prob, toy, X0, masked, hidden), log_p)
        weight = torch.randn(2, 4, generator=rng(1))
        fast, exact = (
            torch.autograd.grad(
                (weight * x).sum(), toy.token, materialize_grads=True, allow_unused=True
            )
            for x in (log_p, slow + 0 * toy.token.sum())
        )
        assert torch.allclose(fast[0], exact[0], atol=1e-5)


def test_a_pad_token_that_no_logit_is_for():
    """MASK off the canvas is padding; on a GPU spare places may lie there."""
    denoiser = tiny_denoiser()
    tokens, canvas = torch.randint(1, 5, (2, 8), generator=rng(0)), torch.zeros(2, 8).bool()
    tokens[:, :2] = denoiser.mask_id
    canvas[:, 3:5] = True
    here = mdmvi.token_log_prob(denoiser, tokens, canvas)
    there = on_gpu_path(mdmvi.token_log_prob, denoiser, tokens, canvas)
    assert (here[canvas] < 0).all() and (here[~canvas] == 0).all()
    assert torch.allclose(here, there, atol=1e-6)


def test_log_probabilities_of_a_network_by_each_way():
    """Counted or with room for more places, and from a pass that was made already."""
    model, (tokens, canvas) = tiny_denoiser(n_layer=2, canvas_len=5), some_problems()
    masked = canvas & (torch.rand(canvas.shape, generator=rng(0)) < 0.6)
    weights = list(model.parameters())
    hidden = model(tokens.masked_fill(masked, model.mask_id))
    args = model, tokens, masked
    ways = mdmvi.token_log_prob(*args), on_gpu_path(mdmvi.token_log_prob, *args)
    ways = *ways, mdmvi.token_log_prob(*args, hidden)
    factor = torch.randn(masked.shape, generator=rng(1))
    first, *others = ([x, *torch.autograd.grad((factor * x).sum(), weights)] for x in ways)
    assert first[0][masked].abs().min() > 0 and (first[0][~masked] == 0).all()
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_canvas_that_is_too_long_gives_nan():
    """On a GPU there is room for canvas_len places a row: better nan than a bound that is off."""
    toy = Toy()
    toy.canvas_len = 2
    masked = CANVAS & torch.tensor([[True], [False]])  # one row of three, the batch has room for 4
    assert on_gpu_path(mdmvi.token_log_prob, toy, X0, masked).isfinite().all()
    assert on_gpu_path(mdmvi.token_log_prob, toy, X0, CANVAS).isnan().all()  # 5 places
    assert mdmvi.token_log_prob(toy, X0, CANVAS).isfinite().all()  # no such limit on a CPU


# ------------------------------------------------------------------------------------------------
# 2. Posterior over orders
# ------------------------------------------------------------------------------------------------


def test_posterior_starts_as_a_random_order_and_sees_the_canvas():
    tokens, canvas = problems()
    config = tiny_config(n_layer=3)
    posterior = mdmvi.OrderPosterior(config)
    start = posterior(tokens, canvas)
    assert start.shape == tokens.shape and (start < 0).all()
    left, _ = mdmvi.draw_path(start, canvas, torch.ones(len(tokens), dtype=torch.int64), 1, 0.1)
    assert left.sum() > 0.25 * canvas.sum()  # the first step does not reveal all
    small = mdmvi.OrderPosterior(tiny_config(n_layer=1))
    assert [len(p.trunk.blocks) for p in (posterior, small)] == [2, 1]
    randomise(posterior)
    for row, on, fast in zip(tokens, canvas, posterior(tokens, canvas)):
        shift = on[:, None] * posterior.on_canvas.detach().double()
        hidden = slow_trunk(posterior.trunk, row, n_head=2, shift=shift)
        score = hidden @ posterior.score.weight[0].double() + posterior.score.bias
        assert (fast - score.sigmoid().log()).abs().max() < 1e-5


def test_log_rho():
    log_alpha, masked = -torch.rand(40, 5, generator=rng(0)), torch.rand(40, 5) < 0.6
    log_alpha[~masked] = -1e-4  # better than all, but not in the set
    for row, M, log_r in zip(
        log_alpha.exp().double(), masked, mdmvi.reveal_log_prob(log_alpha, masked, 0.3)
    ):
        best = max((row[i] for i in places(M)), default=None)
        rho = [(row[i] / best) ** (1 / 0.3) if M[i] else 1.0 for i in range(5)]
        assert torch.allclose(log_r.exp().double(), torch.tensor(rho).double(), atol=1e-5)
        assert not M.any() or (log_r[M] == 0).any()  # of the best one, exactly


def test_log_one_minus():
    log_p = torch.tensor([-20.0, -3.0, -0.5, -0.05, -1e-3, -1e-5, 0.0], requires_grad=True)
    value = mdmvi.log_one_minus(log_p)
    exact = (1 - log_p[:-1].double().exp()).log()
    assert torch.allclose(value[:-1].double(), exact, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    p = log_p.detach()[:-2].exp()
    assert torch.allclose(gradient[:-2], -p / (1 - p), rtol=1e-2)
    assert gradient[-1] == 0 and value[-1].item() == pytest.approx(
        math.log(1e-6), abs=0.1
    )  # rho = 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_draw_path_and_its_log_q(steps):
    log_alpha = F.logsigmoid(torch.tensor([0.3, -0.5, 2.0, 0.9, -1.2]))
    canvas = torch.tensor([1, 1, 0, 1, 1]).bool()
    rows = replicate(20000, log_alpha[None], canvas[None], torch.tensor([steps]))
    masked, log_q = mdmvi.draw_path(*rows, steps, TAU, rng(steps))
    probability = {}  # of (M_steps, log q): a path is known by its log q
    for order in orders(canvas, steps + 1):
        q = q_path(log_alpha, order, steps).item()
        if q > 0:
            probability[tuple(i for i in order if order[i] == steps), math.log(q)] = q
    outcomes = []
    for M, value in zip(masked, log_q.tolist()):
        M = tuple(places(M))
        exact = min((x for other, x in probability if other == M), key=lambda x: abs(x - value))
        assert abs(exact - value) < 1e-4
        outcomes.append((M, exact))
    assert_distribution(outcomes, probability)


def test_draw_path_rows():
    steps, canvas = torch.arange(400) % 6, torch.rand(400, 5, generator=rng(0)) < 0.7
    log_alpha = F.logsigmoid(torch.randn(400, 5, generator=rng(1)))
    masked, log_q = mdmvi.draw_path(log_alpha, canvas, steps, 5, TAU, rng(2))
    assert not (masked & ~canvas).any()
    assert (masked.sum(1) <= (canvas.sum(1) - steps).clamp(min=0)).all()  # at least one a step
    assert torch.equal(masked[steps == 0], canvas[steps == 0]) and (log_q[steps == 0] == 0).all()
    changed = torch.where(torch.arange(400) % 7 == 0, steps, 5 - steps)
    same = changed == steps  # neither the other rows' steps nor the bound on them matter to these
    for bound in (5, 8):
        again = mdmvi.draw_path(log_alpha, canvas, changed, bound, TAU, rng(2))
        assert torch.equal(again[0][same], masked[same])
        assert torch.equal(again[1][same], log_q[same])


# ------------------------------------------------------------------------------------------------
# 3. Bounds and their gradients
# ------------------------------------------------------------------------------------------------


def test_stratified_uniform():
    u = torch.stack([mdmvi.stratified_uniform(5, "cpu", rng(seed)) for seed in range(2000)])
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u.sort(1).values.diff(dim=1), torch.tensor(0.2), atol=1e-5)
    for row in range(5):
        assert_distribution((u[:, row] * 10).int().tolist(), dict.fromkeys(range(10), 0.1))


def test_plain_loss_is_the_bound_of_random_single_token_orders():
    toy, (tokens, canvas) = Toy(seed=4), replicate(3000, X0, CANVAS)
    exact = [exact_mdm(toy, x0, c) for x0, c in zip(X0, CANVAS)]
    assert all(bound < log_p - 0.01 for bound, log_p in exact)
    expected = -sum(bound / c.sum() for (bound, _), c in zip(exact, CANVAS)) / 2
    losses = [mdmvi.mdm_loss(toy, tokens, canvas, rng(seed)) for seed in range(60)]
    assert_mean(torch.stack(losses), expected, precision=0.005)
    gradients = torch.stack([torch.autograd.grad(loss, toy.token)[0] for loss in losses])
    assert_mean(gradients, torch.autograd.grad(expected, toy.token)[0], precision=0.02)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.2, 0.7)])
def test_plain_loss_spreads_its_masking_rates(monkeypatch, low, high):
    """Each token counts once in the mean, whatever the rate."""
    shares, canvas = [], torch.arange(8000).expand(4, 8000) >= 2000

    def count(denoiser, tokens, masked):
        assert not (masked & ~canvas).any()
        shares.append((masked.sum(1) / 6000).sort().values)
        return -masked.float()

    monkeypatch.setattr(mdmvi, "token_log_prob", count)
    loss = mdmvi.mdm_loss(None, torch.zeros(4, 8000), canvas, rng(0), (low, high))
    assert loss.item() == pytest.approx(1, abs=0.05)
    part = (high - low) / 4
    assert torch.allclose(shares[0].diff(), torch.tensor(part), atol=0.03)
    assert low - 0.03 < shares[0][0] < low + part + 0.03


@pytest.mark.parametrize("T", [1, 2, 3])
def test_order_elbo(T):
    toy, (tokens, canvas) = Toy(), replicate(15000, X0, CANVAS)
    learned = mdmvi.order_elbo(toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 2, rng(T))
    uniform = mdmvi.uniform_elbo(toy, tokens, canvas, T, 2, rng(T))
    assert not learned.requires_grad
    for row, (x0, on) in enumerate(zip(X0, CANVAS)):
        bound, log_p = exact_elbo(toy, x0, on, T)[0], exact_log_p(toy, x0, on, T)
        assert abs(bound - log_p) < 1e-9 if T == 1 else bound < log_p - 0.01  # one order at T = 1
        assert_mean(learned[row::2], bound, precision=0.005)
        assert_mean(uniform[row::2], exact_uniform(toy, x0, on, T)[0], precision=0.005)


ORDER_LOSSES = [mdmvi.order_loss, mdmvi.importance_order_loss]


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("order_loss", ORDER_LOSSES)
def test_order_losses_and_their_gradients(order_loss, T):
    toy, (tokens, canvas) = Toy(seed=3), replicate(1000, X0, CANVAS)
    exact = [exact_elbo(toy, x0, c, T) for x0, c in zip(X0, CANVAS)]
    elbo, kl = (sum(e[j] / c.sum() for e, c in zip(exact, CANVAS)) / 2 for j in (0, 1))
    expected = [-elbo, kl]
    expected += torch.autograd.grad(-elbo, toy.parameters(), materialize_grads=True)
    samples = []
    for seed in range(40):  # rows of a call are stratified together: standard errors are over calls
        loss, kl = order_loss(toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 6, rng(seed))
        assert not kl.requires_grad
        gradient = torch.autograd.grad(loss, toy.parameters(), materialize_grads=True)
        samples.append((loss, kl, *gradient))
    for draws, value in zip(zip(*samples), expected):
        assert_mean(torch.stack(draws), value, precision=0.02)


def test_leave_one_out():
    value = torch.randn(3, 4, generator=rng(0))
    for b, k in itertools.product(range(3), range(4)):
        others = [value[b, j].item() for j in range(4) if j != k]
        assert mdmvi.leave_one_out(value)[b, k].item() == pytest.approx(sum(others) / 3, abs=1e-6)
    assert (mdmvi.leave_one_out(value[:, :1]) == 0).all()


@pytest.mark.parametrize(
    "order_loss, first", [(mdmvi.order_loss, 0), (mdmvi.importance_order_loss, 1)]
)
def test_paths_of_a_group_share_x0_and_step(order_loss, first, monkeypatch):
    toy, (tokens, canvas), seen = Toy(), replicate(3, X0, CANVAS), []
    certain = -100.0 * torch.arange(4).expand(6, 4)  # one token a step: all paths are alike
    draw_path, leave_one_out = mdmvi.draw_path, mdmvi.leave_one_out

    def spy(log_alpha, canvas, steps, *rest):
        seen.append(steps)
        assert torch.equal(log_alpha, certain[0].expand(48, 4))
        assert torch.equal(canvas, CANVAS.repeat(3, 1).repeat_interleave(8, 0))
        return draw_path(log_alpha, canvas, steps, *rest)

    monkeypatch.setattr(mdmvi, "draw_path", spy)
    monkeypatch.setattr(mdmvi, "leave_one_out", lambda f: seen.append(f) or leave_one_out(f))
    order_loss(toy, toy.policy, lambda *_: certain, tokens, canvas, 3, TAU, 8, rng(0))
    for x in (seen[0].view(6, 8), seen[1]):
        assert x.shape == (6, 8) and (x == x[:, :1]).all()
    counts = Counter(seen[0][::8].tolist())
    assert set(counts) == set(range(first, 3))
    assert first or set(counts.values()) == {2}  # stratified: each step comes equally often


@pytest.mark.parametrize("order_loss", ORDER_LOSSES)
def test_the_baseline_halves_the_variance(order_loss, monkeypatch):
    (model, policy, _), T = tiny_models(), 4
    tokens = torch.randint(5, (1, 16), generator=rng(1))
    log_alpha = F.logsigmoid(torch.randn(1, 16, generator=rng(0)))
    tokens, canvas, log_alpha = replicate(400, tokens, torch.arange(16)[None] > 0, log_alpha)

    def variance():
        leaf = log_alpha.clone().requires_grad_()  # for each row, so that it has its own gradient
        loss, _ = order_loss(model, policy, lambda *_: leaf, tokens, canvas, T, TAU, 8, rng(0))
        return torch.autograd.grad(loss, leaf)[0].var(0).sum()

    with_baseline = variance()
    monkeypatch.setattr(mdmvi, "leave_one_out", torch.zeros_like)
    assert with_baseline < 0.5 * variance()


def test_importance_lowers_the_variance_of_the_policys_gradient():
    """At as many passes: K + 1 a problem against K + 1."""
    toy, variance = Toy(seed=3), []
    for order_loss, paths in zip(ORDER_LOSSES, (7, 6)):
        gradients = []
        for seed in range(100):
            models = toy, toy.policy, toy.posterior
            loss, _ = order_loss(*models, X0, CANVAS, 6, TAU, paths, rng(seed))
            gradients.append(torch.autograd.grad(loss, toy.pi)[0])
        variance.append(torch.stack(gradients).var(0).sum())
    assert variance[1] < 0.5 * variance[0]


def test_draw_step():
    """Each step comes as often as it says, and those that a path does not reach come seldom."""
    log_alpha = F.logsigmoid(torch.tensor([[0.3, -0.5, 2.0, 0.9, -1.2]]))
    log_alpha, canvas = replicate(20000, log_alpha, torch.tensor([[1, 1, 0, 1, 1]]).bool())
    s, p = mdmvi.draw_step(log_alpha, canvas, 5, TAU, 3, rng(0))
    assert s.min() == 1 and s.max() == 4 and (p > 0).all() and (p <= 1).all()
    for k in range(1, 5):
        assert_mean((s == k) / p, 1.0, precision=0.05)
    certain = -100.0 * torch.arange(5).expand(20000, 5)  # one token a step: four steps
    s, p = mdmvi.draw_step(certain, canvas, 9, TAU, 3, rng(0))
    share = {k: 0.2 / 8 + (0.8 / 3 if k < 4 else 0) for k in range(1, 9)}
    counts = Counter(
        s.tolist()
    )  # stratified: each as often as it should be, and not only on average
    assert all(abs(counts[k] - 20000 * share[k]) <= 2 for k in share) and set(counts) == set(share)
    assert torch.allclose(p, torch.tensor([share[k] for k in s.tolist()]), atol=1e-5)
    s, p = mdmvi.draw_step(certain, canvas, 2, TAU, 3, rng(0))
    assert (s == 1).all() and torch.allclose(p, torch.ones(20000))  # at T = 2 there is no choice
    certain = torch.stack((certain[0], torch.tensor([0.0, -100, -100, -100, -100])))  # a second row
    s, p = mdmvi.draw_step(certain, canvas[:2], 9, TAU, 3, rng(0))  # that takes two steps
    expected = [share[s[0].item()], 0.2 / 8 + (0.8 if s[1] == 1 else 0)]
    assert p.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("order_loss", ORDER_LOSSES)
def test_losses_and_gradients_are_finite_at_the_extremes(order_loss):
    """Scores all alike, or far apart; a policy that is sure; steps with nothing left."""
    toy = Toy()
    for apart, sure in itertools.product((0.0, 100.0), (0.0, 80.0, -80.0)):
        log_alpha = (-1 - apart * torch.arange(4.0).expand(2, 4)).requires_grad_()
        policy = functools.partial(lambda sure, hidden, masked: toy.policy(hidden) + sure, sure)
        posterior = functools.partial(lambda x, *_: x, log_alpha)
        loss, kl = order_loss(toy, policy, posterior, X0, CANVAS, 5, 0.1, 4, rng(0))
        gradients = torch.autograd.grad(loss, (toy.token, toy.pi, log_alpha))
        assert all(x.isfinite().all() for x in (loss, kl, *gradients))


def test_what_the_bounds_refuse():
    toy = Toy()
    models = toy, toy.policy, toy.posterior
    bad = ("budget is 0", (0, 0.1, 2)), ("paths is 0", (2, 0.1, 0)), ("tau is 0", (2, 0, 2))
    for loss, (word, values) in itertools.product(ORDER_LOSSES, (*bad, ("nan", (2, math.nan, 2)))):
        with pytest.raises(ValueError, match=word):
            loss(*models, X0, CANVAS, *values)
    for word, values in (("budget is 0", (0, 0.1, 2)), ("samples is 0", (2, 0.1, 0))):
        with pytest.raises(ValueError, match=word):
            mdmvi.order_elbo(*models, X0, CANVAS, *values)
    for word, values in (("budget is 0", (0, 2)), ("samples is 0", (2, 0))):
        with pytest.raises(ValueError, match=word):
            mdmvi.uniform_elbo(toy, X0, CANVAS, *values)


# ------------------------------------------------------------------------------------------------
# 4. Samplers
# ------------------------------------------------------------------------------------------------

RULES = ("top_prob", "top_prob_margin", "entropy", "threshold", "threshold_left", "left_to_right")
RANDOM = ("iid", "random", "learned")
EOS_RULES = ("top_prob+eos", "top_prob_margin+eos", "entropy+eos")
ALL = RULES + RANDOM + EOS_RULES


def test_the_list_of_strategies_is_whole():
    assert sorted(mdmvi.STRATEGIES) == sorted(RULES + RANDOM)
    assert sorted(mdmvi.EOS_RULES) == sorted(EOS_RULES)


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
    forced = [max(M, key=pi.get)] if strategy == "learned" else M  # one of them, if none was drawn
    none = math.prod(1 - pi[i] for i in M)
    return p + (none / len(forced) if len(R) == 1 and R[0] in forced else 0.0)


def test_the_coldest_draw_is_the_most_likely_token():
    logits = torch.tensor([[1.0, 5.0, 3.0, -math.inf]]).expand(99, 4)
    for temperature in (0.0, 1e-3, 1e-40):
        assert (mdmvi.draw_tokens(logits, temperature, rng(0)) == 1).all()


def test_a_policy_that_never_reveals_reveals_the_first_place():
    masked = torch.tensor([[0, 1, 1], [0, 0, 0]]).bool()
    reveal = mdmvi.choose_by_policy(torch.full((2, 3), -math.inf), masked, rng(0))
    assert reveal.tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("T, temperature", [(2, 1.0), (3, 0.6)])
@pytest.mark.parametrize("strategy", RANDOM)
def test_distribution_of_tokens_and_steps(strategy, T, temperature):
    toy, canvas, x0 = Toy(seed=5), CANVAS[0], X0[0].clone()
    probability = {}
    for *tokens, order in itertools.product(*[(0, 1, 2)] * 3, orders(canvas, T)):
        x0[canvas], p = torch.tensor(tokens), 1.0
        for s in range(max(order.values()) + 1):
            M = [i for i in order if order[i] >= s]
            R = [i for i in order if order[i] == s]
            log_p, pi = look(toy, x0, M)
            p *= reveal_probability(strategy, M, R, pi, T - s)
            p *= math.prod((log_p[i] / temperature).softmax(-1)[x0[i]].item() for i in R)
        probability[(*tokens, *order.values())] = p
    out = mdmvi.generate(
        toy, *replicate(40000, x0[None], canvas[None]), strategy, T, toy.policy, temperature, rng(T)
    )
    outcomes = torch.cat((out.tokens[:, canvas], out.reveal_step[:, canvas]), 1)
    assert_distribution(list(map(tuple, outcomes.tolist())), probability)


def slow_rule(strategy, p, M, left, eos_id, threshold):
    """The positions of M that a fixed rule reveals, from p [N, V]."""
    score = {
        "top_prob": lambda i: max(p[i]),
        "threshold": lambda i: max(p[i]),
        "threshold_left": lambda i: max(p[i]),
        "top_prob_margin": lambda i: max(p[i]) - sorted(p[i])[-2],
        "entropy": lambda i: sum(x * math.log(x) for x in p[i] if x > 0),
        "left_to_right": lambda i: -i,
    }[strategy]
    eos = [i for i in M if p[i].index(max(p[i])) == eos_id]
    ranked = sorted((i for i in M if i not in eos), key=score, reverse=True)
    if strategy == "threshold":
        return eos + ranked[:1] + [i for i in ranked[1:] if score(i) > threshold]
    if strategy == "threshold_left":
        unsure = [i for i in ranked if score(i) <= threshold]
        return eos + [i for i in ranked if i not in unsure] + sorted(unsure)[:1]
    return eos + ranked[: math.ceil(len(ranked) / left)]


@pytest.mark.parametrize("strategy", RULES + EOS_RULES)
@pytest.mark.parametrize("with_mask", [False, True])
def test_rules_agree_with_slow_ones(strategy, with_mask, monkeypatch):
    """MASK is 3, in the vocabulary (with probability 0) or beyond it."""
    monkeypatch.setattr(mdmvi, "THRESHOLD", 0.6)
    model, (tokens, canvas) = Toy(length=6), problems()
    if with_mask:
        model.logits = lambda hidden: F.pad(hidden[:, :-1], (0, 1), value=-math.inf)
    for budget in (1, 2, 3, 4, 9):
        out = mdmvi.generate(model, tokens, canvas, strategy, budget)
        for row in range(len(tokens)):
            x, M, steps = tokens[row].clone(), places(canvas[row]), 0
            reveal_step = [-1] * len(x)
            while M:
                p, left = look(model, x, M)[0].exp().tolist(), budget - steps
                rule, eos_id = strategy.removesuffix("+eos"), model.eos_id
                eos_id = eos_id if strategy in EOS_RULES else None
                R = M if left == 1 else slow_rule(rule, p, M, left, eos_id, 0.6)
                for i in R:
                    x[i], reveal_step[i] = p[i].index(max(p[i])), steps
                M, steps = [i for i in M if i not in R], steps + 1
            assert out.reveal_step[row].tolist() == reveal_step and out.steps[row] == steps
            assert torch.equal(out.tokens[row], x)


@pytest.mark.parametrize("strategy", ALL)
def test_what_every_sampler_promises(strategy):
    (model, policy, _), (tokens, canvas) = tiny_models(mask_id=3), problems()
    given, other = tokens.clone(), tokens.where(~canvas, 2 - tokens)
    for budget, temperature in itertools.product((1, 3, 20), (0.0, 1.0)):
        out, again = (
            mdmvi.generate(model, x, canvas, strategy, budget, policy, temperature, rng(1))
            for x in (tokens, other)
        )
        assert all(
            torch.equal(a, b) for a, b in zip(out, again)
        )  # the canvas' old tokens are ignored
        assert torch.equal(tokens, given)  # and the argument is left alone
        assert torch.equal(out.tokens[~canvas], tokens[~canvas])
        assert (out.reveal_step[~canvas] == -1).all() and (out.steps <= budget).all()
        assert (out.tokens[canvas] != model.mask_id).all()
        for c, reveal_step, steps in zip(canvas, out.reveal_step, out.steps):
            assert set(reveal_step[c].tolist()) == set(range(steps))  # all, at least one a step


def test_rows_that_reach_the_denoiser():
    (model, policy, posterior), seen = tiny_models(), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
    tokens, canvas = torch.zeros(4, 4).long(), torch.arange(4) < torch.tensor([[4], [0], [1], [2]])
    out = mdmvi.generate(model, tokens, canvas, "left_to_right", budget=4)
    assert out.steps.tolist() == [4, 0, 1, 2] and seen == [3, 2, 1, 1]  # the finished ones leave
    mdmvi.generate(model, tokens, canvas & False, "iid", budget=4)
    assert len(seen) == 4
    canvas[1] = True
    for order_loss, passes in zip(ORDER_LOSSES, ([4 * 8], [4, 4 * 8])):
        seen.clear()
        order_loss(model, policy, posterior, tokens, canvas, 3, TAU, paths=8)
        assert seen == passes
    seen.clear()
    mdmvi.order_elbo(model, policy, posterior, tokens, canvas, 3, TAU, samples=2)
    assert seen == [4] * 6


def test_what_generate_refuses():
    for strategy, budget, word in (
        ("best", 3, "best"),
        ("iid", 0, "budget"),
        ("learned", 3, "policy"),
        ("iid+eos", 3, "unknown strategy 'iid.eos': choose from learned, iid, .* top_prob.eos"),
        ("left_to_right+eos", 3, "unknown"),
        ("learned+eos", 3, "unknown"),
    ):
        with pytest.raises(ValueError, match=word):
            mdmvi.generate(Toy(), X0, CANVAS, strategy, budget)
    for temperature in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            mdmvi.generate(Toy(), X0, CANVAS, "iid", 3, temperature=temperature)


# ------------------------------------------------------------------------------------------------
# 5. Beyond the paper (importance_order_loss and draw_step: see 3)
# ------------------------------------------------------------------------------------------------


def test_unsure():
    """pi is between 0.01 and 0.99, in the order that it was; what is not certain hardly changes."""
    logits = torch.linspace(-30, 30, 121)
    squashed = mdmvi.unsure(lambda hidden, masked: hidden + masked, logits - 1, torch.ones(121))
    pi = squashed.sigmoid()
    assert 0.0099 < pi.min() < 0.011 and 0.989 < pi.max() < 0.9901
    assert (squashed.diff() >= 0).all() and torch.equal(squashed, -squashed.flip(0))
    assert (squashed - logits)[logits.abs() <= 1].abs().max() < 0.02


@pytest.mark.parametrize("order_loss", ORDER_LOSSES)
def test_an_order_that_is_not_expected_costs_an_unsure_policy_less(order_loss):
    (denoiser, policy, posterior), (tokens, canvas) = tiny_models(), some_problems()
    torch.nn.init.constant_(policy.outer.bias, 40.0)
    results = []
    for given in (policy, functools.partial(mdmvi.unsure, policy)):
        networks = (denoiser, given, posterior)
        loss, kl = order_loss(*networks, tokens, canvas, 3, TAU, 2, rng(0))
        results.append((loss.item(), kl.item()))
    assert results[1][0] < results[0][0] - 1 and results[1][1] < results[0][1] - 1


def test_parameter_groups():
    denoiser, policy, posterior = tiny_models()
    posterior.trunk.wte.requires_grad_(False)
    networks = {"denoiser": denoiser, "policy": policy, "posterior": posterior}
    groups = mdmvi.parameter_groups(denoiser, policy, posterior, 0.1, 0.2, 0.3)
    assert [g["network"] for g in groups] == ["denoiser", "policy", "posterior"]
    assert [(g["lr"], g["peak"]) for g in groups] == [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]
    for group in groups:
        named = networks[group["network"]].named_parameters()
        assert dict(group["params"]) == {name: p for name, p in named if p.requires_grad}
    assert "trunk.wte.weight" not in dict(groups[2]["params"])
    for frozen in (Toy(), denoiser.requires_grad_(False)):
        names = [g["network"] for g in mdmvi.parameter_groups(frozen, policy, posterior)]
        assert names == ["policy", "posterior"]


@pytest.mark.parametrize(
    "step, steps, share",
    [
        (0, 1000, 0.1),  # 1% of the steps to warm up
        (4, 1000, 0.5),
        (9, 1000, 1.0),
        (0, 50, 1.0),
        (250, 1000, 0.01 + 0.99 * (0.5 + 0.5 * math.sqrt(0.5))),
        (500, 1000, 0.505),
        (1000, 1000, 0.01),
        (1500, 1000, 0.01),
    ],
)
def test_update_sets_the_rate_and_clips_each_network_by_itself(step, steps, share):
    """Plain gradient descent, so that the change of a weight shows its rate and its gradient."""
    large, other, small = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))

    def group(parameter, peak, network):
        rates = {"lr": -1.0, "peak": peak, "warm_up": 0.2 if network == "posterior" else 0.01}
        return {"params": [parameter], "network": network, **rates}

    optimizers = [  # a network's weights may be in two of them
        torch.optim.SGD([group(large, 2.0, "denoiser"), group(small, 3.0, "policy")]),
        torch.optim.SGD([group(other, 5.0, "denoiser")]),
    ]
    large.grad, other.grad = torch.tensor([30.0, 0.0]), torch.tensor([0.0, -40.0])  # norm 50
    small.grad = torch.tensor([0.3, 0.4])  # norm 0.5: not clipped
    mdmvi.update(optimizers, step, steps)
    large_one, other_one = (large, [0.6, 0.0], 2.0), (other, [0.0, -0.8], 5.0)
    for parameter, gradient, peak in (large_one, other_one, (small, [0.3, 0.4], 3.0)):
        expected = -peak * share * torch.tensor(gradient)
        assert torch.allclose(parameter.detach(), expected, rtol=1e-3, atol=1e-6)
        assert parameter.grad is None
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(5 * share, rel=1e-3)


def test_the_posterior_waits_for_the_policy():
    networks = tiny_models()
    rates = []
    for groups in (
        mdmvi.parameter_groups(*networks),
        mdmvi.parameter_groups(None, None, networks[2]),
    ):
        optimizer = torch.optim.SGD(groups)
        for step in (0, 49, 99, 199):
            for p in networks[2].parameters():
                p.grad = torch.zeros_like(p)
            mdmvi.update([optimizer], step, 1000)
            falling = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / 1000))
            rates.append([g["lr"] / g["peak"] / falling for g in optimizer.param_groups][-1])
    assert rates == pytest.approx([0.005, 0.25, 0.5, 1.0, 0.1, 1.0, 1.0, 1.0])


# ------------------------------------------------------------------------------------------------
# The whole program: seeds, foreign models, host synchronisation, bfloat16, torch.compile
# ------------------------------------------------------------------------------------------------


def plain_loss(denoiser, policy, posterior, tokens, canvas, generator=None):
    return mdmvi.mdm_loss(denoiser, tokens, canvas, generator)


def paper_loss(*args, generator=None):
    return mdmvi.order_loss(*args, 4, TAU, 3, generator)[0]


def importance_loss(*args, generator=None):
    return mdmvi.importance_order_loss(*args, 4, TAU, 3, generator)[0]


LOSSES = [plain_loss, paper_loss, importance_loss]


def train_step(loss_of, models, tokens, canvas, generator=None):
    """Forward, backward and an update with AdamW: the loss."""
    optimizer = torch.optim.AdamW(mdmvi.parameter_groups(*models))
    loss = loss_of(*models, tokens, canvas, generator=generator)
    loss.backward()
    mdmvi.update([optimizer], step=0, steps=10)
    return loss.detach()


def some_problems(rows=16):
    tokens = torch.randint(5, (rows, 8), generator=rng(0))
    return tokens, (torch.arange(8) >= 3).expand(rows, 8)


def test_seeds():
    models, (tokens, canvas) = tiny_models(), some_problems()
    calls = [lambda g, f=f: f(*models, tokens, canvas, generator=g) for f in LOSSES]
    calls.append(lambda g: mdmvi.order_elbo(*models, tokens, canvas, 4, TAU, 2, g))
    calls.append(lambda g: mdmvi.uniform_elbo(models[0], tokens, canvas, 4, 2, g))
    for strategy in RULES + RANDOM:
        calls.append(
            lambda g, rule=strategy: torch.cat(
                mdmvi.generate(models[0], tokens, canvas, rule, 4, models[1], 1.0, g)[:2]
            )
        )
    for call in calls:
        before = torch.get_rng_state()
        first, again, other = call(rng(1)), call(rng(1)), call(rng(2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)  # the global one is left alone
        torch.manual_seed(1)
        assert torch.equal(call(None), first)  # and used where there is no other
        torch.set_rng_state(before)


def test_a_plain_function_is_a_denoiser():
    toy = Toy()

    def model(tokens, place=None):
        return toy(tokens, place)

    model.logits, model.mask_id = toy.logits, toy.mask_id
    models = model, toy.policy, toy.posterior
    for loss in LOSSES[:3]:
        assert loss(*models, X0, CANVAS, generator=rng(0)).isfinite()
    assert mdmvi.order_elbo(*models, X0, CANVAS, 3, TAU, 1).isfinite().all()
    for strategy in ALL:
        model.__dict__.pop("eos_id", None)
        if strategy in EOS_RULES:  # only these need it
            model.eos_id = toy.eos_id
        out = mdmvi.generate(model, X0, CANVAS, strategy, 3, toy.policy)
        assert (out.tokens[CANVAS] < 3).all()


@pytest.mark.parametrize("canvas_len", [0, 5])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_step_never_waits_for_the_device(loss_of, canvas_len):
    """A meta tensor has no values: any that the host had to look at would raise."""
    models = [model.to("meta") for model in tiny_models(canvas_len=canvas_len)]
    tokens, canvas = (x.to("meta") for x in some_problems())
    assert train_step(loss_of, models, tokens, canvas).is_meta


class NoBFloat16(TorchDispatchMode):
    """Raises where a bfloat16 tensor goes into an operation or comes out of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.bfloat16, func
        return out


@pytest.mark.parametrize("loss_of", LOSSES)
def test_no_bfloat16_unless_asked_for(loss_of):
    models, (tokens, canvas) = tiny_models(), some_problems()
    with NoBFloat16():
        train_step(loss_of, models, tokens, canvas)
        for strategy in ALL:
            mdmvi.generate(models[0], tokens, canvas, strategy, 3, models[1], 1.0)
    with NoBFloat16(), pytest.raises(AssertionError), torch.autocast("cpu", torch.bfloat16):
        train_step(loss_of, models, tokens, canvas)  # so it does look


@pytest.mark.parametrize("loss_of", LOSSES)
def test_autocast(loss_of):
    tokens, canvas = some_problems(256)
    exact = train_step(loss_of, tiny_models(), tokens, canvas, rng(0))
    models = tiny_models()
    with torch.autocast("cpu", torch.bfloat16):
        loss = train_step(loss_of, models, tokens, canvas, rng(0))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.02)
        for strategy in ALL:
            out = mdmvi.generate(models[0], tokens, canvas, strategy, 3, models[1], 1.0, rng(0))
            assert (out.tokens < 5).all() and torch.equal(out.reveal_step >= 0, canvas)
    assert all(p.dtype == torch.float32 for model in models for p in model.parameters())


class NoBlock(torch.nn.Module):
    """In a block's place: half a minute of a compiler's time less."""

    def forward(self, x, place=None):
        return x if place is None else x.flatten(0, 1)[place]


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # what can be captured and differentiated
        pytest.param(
            "inductor",  # with generated C++
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++"),
        ),
    ],
)
def test_compiled_loss_is_the_eager_one(backend):
    denoiser, (tokens, canvas) = tiny_denoiser(), some_problems()
    if backend == "inductor":
        denoiser.trunk.blocks = torch.nn.ModuleList([NoBlock()])
    compiled, results = torch.compile(mdmvi.token_log_prob, backend=backend), []
    weights = list(denoiser.parameters())
    few = canvas & (torch.arange(canvas.shape[1]) % 2 == 0)  # another number of places
    masks = (canvas, few) if backend == "aot_eager" else (canvas,)
    for function in (mdmvi.token_log_prob, compiled):
        results.append([])
        for masked in masks:
            log_p = function(denoiser, tokens, masked)
            results[-1] += [log_p.detach(), *torch.autograd.grad(log_p.sum(), weights)]
    torch._dynamo.reset()
    for eager, other in zip(*results):
        assert torch.allclose(eager, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["runs", "spread", "paper"])
def test_a_pass_on_a_gpu_is_one_graph(kind):
    """fullgraph raises where the capture breaks, as it would where the host needs a value."""
    model, data = tiny_denoiser(canvas_len=5).to("meta"), [x.to("meta") for x in some_problems()]
    policy, posterior = (x.to("meta") for x in eval_gsm8k.make_orders(kind, model.config, 3))
    last, log_rho = data[1][:, 0], torch.zeros(data[1].shape, device="meta")
    calls = [(mdmvi.token_log_prob, (model, *data))]
    calls.append((mdmvi.step_bound, (model, policy, *data, log_rho, last)))
    if kind != "spread":  # that one is a table
        calls.append((mdmvi.OrderPosterior.scores, (posterior, *data)))
    for function, args in calls:
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert tree_leaves(compiled(*args))[0].is_meta
    torch._dynamo.reset()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_step_on_cuda_never_waits(loss_of, optimizer):
    models = [model.cuda() for model in tiny_models(canvas_len=5)]
    tokens, canvas = (x.cuda() for x in some_problems())
    used = models[:1] if loss_of is plain_loss else models
    groups = mdmvi.parameter_groups(*used, *[None] * (3 - len(used)))
    optimizers = make_optimizers(groups, optimizer)

    def step():
        with train.autocast(tokens.device):
            loss = loss_of(*models, tokens, canvas)
        loss.backward()
        mdmvi.update(optimizers, step=5, steps=10)

    step()  # makes the state of the optimisers
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_cuda_gives_what_the_cpu_gives():
    models, (tokens, canvas) = tiny_models(canvas_len=5), some_problems(64)
    masked = canvas & (torch.rand(tokens.shape, generator=rng(0)) < 0.6)
    last, results = torch.arange(len(tokens)) % 2 == 0, []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the scripts let it use TF32
    for device in ("cpu", "cuda"):
        denoiser, policy, posterior = (model.to(device) for model in models)
        data = [x.to(device) for x in (tokens, canvas, masked, last)]
        log_rho = mdmvi.reveal_log_prob(posterior(*data[:2]), data[2], TAU)
        f = mdmvi.step_bound(denoiser, policy, data[0], data[2], log_rho, data[3])
        f = (*f, mdmvi.token_log_prob(denoiser, data[0], data[2]))
        outs = [mdmvi.generate(denoiser, *data[:2], rule, 3) for rule in RULES]
        results.append([x.detach().cpu() for x in (*f, *(y for out in outs for y in out))])
        for strategy in ALL:
            more = policy, 1.0, rng(0) if device == "cpu" else None
            out = mdmvi.generate(denoiser, *data[:2], strategy, 3, *more)
            assert (out.tokens < 5).all() and torch.equal(out.reveal_step >= 0, data[1])
    torch.set_float32_matmul_precision(precision)
    for on_cpu, on_cuda in zip(*results):
        assert torch.allclose(on_cpu, on_cuda, rtol=1e-4, atol=1e-4)


class Pairs:
    """A denoiser that is no nn.Module and knows its task: 8 + x follows each x below 8.

    Its 32 features: the logits of 16 tokens, is it masked, and the position.
    """

    mask_id, eos_id = 16, 0

    def __call__(self, tokens, place=None):
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        first = position % 2 == 1  # of a pair; position 0 is the prompt
        other = torch.where(first, tokens.roll(-1, 1), tokens.roll(1, 1))
        partner = F.one_hot((other + torch.where(first, -8, 8)) % 16, 16).bool()
        own = torch.arange(16) // 8 == torch.where(first, 0, 1)[..., None]
        masked, right = (tokens == 16)[..., None], partner | (other == 16)[..., None]
        logits = torch.where(own & right, 0.0, -30.0)
        hidden = torch.cat((logits, masked, F.one_hot(position, 15)), 2)
        return hidden if place is None else hidden.flatten(0, 1)[place]

    def logits(self, hidden):
        return hidden[:, :16]


def pairs(n):
    """A prompt of one token and four pairs: in five steps all of them can be right."""
    x = torch.randint(8, (n, 5))
    tokens = torch.stack((x, x + 8), 2).view(n, 10)[:, 1:]
    return tokens, torch.arange(9).expand(n, 9) > 0


def test_the_snippet_in_the_readme_finds_the_best_order_of_a_denoiser_of_another_kind(
    tmp_path, monkeypatch
):
    readme, snippet = Path(__file__).with_name("README.md").read_text(), tmp_path / "snippet.py"
    snippet.write_text(readme.split("\n## Copy it")[1].split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(runs, "SEARCH_STEPS", 60)
    config = mdmvi.ModelConfig(17, 9, 1, 2, 32, 32, mask_id=16, eos_id=0)
    torch.manual_seed(0)
    ran = runpy.run_path(
        str(snippet), {"config": config, "denoiser": Pairs(), "batch": pairs, "steps": 100}
    )
    tokens, canvas = ran["tokens"], ran["canvas"]
    right = (ran["out"].tokens[:, 2::2] == ran["out"].tokens[:, 1::2] + 8).all(1)
    assert right.float().mean() > 0.98 and ran["out"].steps.max() <= 5
    best = -4 * math.log(8)  # each x is free, its partner is not
    learned = mdmvi.order_elbo(*ran["networks"], tokens, canvas, 5, 0.1, 4, rng(0)).mean()
    uniform = mdmvi.uniform_elbo(Pairs(), tokens, canvas, 5, 4, rng(0)).mean()
    assert best - 0.1 < learned <= best + 1e-3 and uniform < best - 1.0


# ================================================================================================
# The scripts
# ================================================================================================

FOLDER = Path(train.__file__).resolve().parent
GSM8K = FOLDER.parent / "shared" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="no ../shared/gsm8k")
runs.SEARCH_STEPS, train.TIMETABLE_PASSES = 3, 40  # enough here
train.SIZES["tiny"] = (1, 2, 32, 64)  # so is half of it


# ------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces \t and\r\nlines\n\n",
    "日本語 € é e\u0301 ﬁ \u200d 🙂",
    "\x00\x1c\x85\u2028\ufeff",
    "<<3*2=6>> <<6-1=5>> #### 5||",
    "<<<>>>> <<>> >> << #####||| ####5 #### 5 -+*/==",
    "12 apples and12 7 007 ٣٤ ½ x2y",
    "Ann's (half-) price: $1,234.50!? 50%",
]


def small_tokenizer():
    return Tokenizer.build(["Ann's 12 apples cost $5 and 7 more."] * 9)


def test_tokenizer_is_lossless():
    tokenizer, rng = small_tokenizer(), random.Random(0)
    signs = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]  # no halves of a pair
    texts = ODD_TEXTS + ["".join(rng.choices(signs, k=40)) for _ in range(60)]
    texts += ["".join(rng.choices([*MARKS, " ", "a", "Ann"], k=30)) for _ in range(60)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 < i < tokenizer.vocab_size for i in ids)  # neither EOS nor MASK


def test_tokenizer_pieces():
    tokenizer = small_tokenizer()
    assert tokenizer.mask_id == tokenizer.vocab_size == 257 + len(tokenizer.pieces)
    assert len(set(tokenizer.pieces)) == len(tokenizer.pieces)
    assert len(tokenizer.encode("<<12*3=36>> <<6-1=5>> #### 5")) == 16  # digits and marks alone
    assert len(tokenizer.encode(" apples cost")) == 2
    again = Tokenizer(tokenizer.pieces)
    assert all(again.encode(text) == tokenizer.encode(text) for text in ODD_TEXTS)
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.mask_id]) == ""
    for stray in ([200, 255, 1], [0xED + 1, 0xA0 + 1, 0x80 + 1]):  # bytes that are no text
        assert tokenizer.decode(stray).encode()  # and can be printed
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    rare = ["one of a kind"] * 4 + ["often"] * 5
    assert " of" not in Tokenizer.build(rare).pieces
    few = Tokenizer.build(["b a c"] * 9, max_pieces=len(MARKS) + 2)
    assert few.pieces[-2:] == [" a", " c"]  # as often as "b": in alphabetical order


def llama_text(special=("<unk>", "<s>", "</s>")):
    """The text of a small tokenizer.json, of special tokens, single bytes and a few merges."""
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    bpe = package.Tokenizer(package.models.BPE())
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special), "show_progress": False}
    trainer = package.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    bpe.train_from_iterator(["Ann has 12 apples and buys 5 apples"] * 5, trainer)
    return bpe.to_str()


def test_llama_tokenizer():
    tokenizer = smdm.LlamaTokenizer(llama_text())
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (32_000, 32_000, 2)
    for text in ODD_TEXTS:
        if text.isprintable() and not any("\ud800" <= c <= "\udfff" for c in text):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(command_line.UserError, match=r"not a tokenizer\.json.*give"):
        smdm.LlamaTokenizer("{}")
    with pytest.raises(command_line.UserError, match="has another </s>: give the one"):
        smdm.LlamaTokenizer(llama_text(special=["[PAD]", "[UNK]", "[CLS]"]))


def test_a_tokenizer_with_larger_ids_than_the_model(monkeypatch):
    monkeypatch.setattr(smdm.LlamaTokenizer, "vocab_size", 5)
    with pytest.raises(command_line.UserError, match="has an id .*: give the one of TinyLlama"):
        smdm.LlamaTokenizer(llama_text())


def test_llama_tokenizer_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(command_line.UserError, match="pip install tokenizers"):
        smdm.LlamaTokenizer("{}")


def test_init_takes_the_tokenizer_beside_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text(llama_text())
    args = train.parse_args(["--size", "170m", "--init", str(tmp_path)])
    assert isinstance(train.make_tokenizer(args, []), smdm.LlamaTokenizer)


# ------------------------------------------------------------------------------------------------
# Checkers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 72", 72),
        ("x #### $1,234.50.", 1234.5),
        ("#### 5 apples, so #### 6.00", 6),
        ("#### 12 of 30", 30),
        ("#### -3", -3),
        ("####.5", 0.5),
        ("#### 2e+16", 2e16),
        ("#### -5E-05", -5e-5),
        ("#### 3 eggs, 4e", 4),
        ("#### 7.", 7),
        ("72", None),
        ("####", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert gsm8k.final_number(text) == number


VALUES = (
    "48/2:24 5/20%:25 200*50%:100 12.5%*8:1 2+3*4:14 (2+3)*4:20 2-3-4:-5 8/4/2:1 -(3-5):2 "
    "$1,200+.5:1200.5 007+1.007:8.007 3.*2:6"  # 5/20% is 5/(20/100)
)
NO_VALUES = "1/0 2**3 7//2 5%3 x+1 5+ [5] max(1,2) __import__('os') 1\x002 5j {5} 5:=3 5;6"


def test_arithmetic_value():
    for pair in VALUES.split(" "):
        expression, _, value = pair.partition(":")
        assert gsm8k.arithmetic_value(expression) == pytest.approx(float(value)), expression
    assert gsm8k.arithmetic_value(" 5 + 5 ") == 10
    deep = ["(" * 9999 + "5" + ")" * 9999, "-" * 99_999 + "5"]
    for expression in [*NO_VALUES.split(" "), "", *deep]:
        assert gsm8k.arithmetic_value(expression) is None, expression


@pytest.mark.parametrize("text", ["True", "'5'", "b'5'", "0x10", "1e999-1e999"])
def test_what_is_no_number_has_no_arithmetic_value(text):
    assert gsm8k.arithmetic_value(text) is None


@pytest.mark.parametrize(
    "text, right",
    [
        ("<<48/2=24>> <<48+24=72>> #### 72", True),
        ("<<10/3=3.33>> <<3.33*21.62162=72>> #### 72", True),
        ("<<360*20%=72>> #### 72", True),
        ("<<14.4/20%=72>> #### 72", True),
        ("<<(2+7)*8=72>>prose <<80-8=72>>\n#### 72.00", True),
        ("<<1/3=.33>> <<72=72>> #### 72", True),  # to the cent
        ("<<1/3=.31>> <<72=72>> #### 72", False),
        ("<<48/2=25>> <<47+25=72>> #### 72", False),
        ("<<48/2=24>> <<48+24=72>> #### 70", False),
        ("<<48/2=24>> #### 72", False),
        ("<<48+24=72>> <<48/2=24>> #### 72", False),
        ("<<48+24=72>>", False),
        ("<<48+24>> #### 72", False),
        ("<<>> #### 72", False),
        ("#### 72", False),
        ("<<1/0=72>> #### 72", False),
        ("<<__import__('os')=72>> #### 72", False),
        ("<<1e999-1e999=72>> #### 72", False),
    ],
)
def test_solves_equations(text, right):
    assert gsm8k.solves_equations(text, "prose #### 72") == right
    assert not gsm8k.solves_equations(text, "#### 73")
    assert not gsm8k.solves_equations(text, "no answer")


def test_a_strange_note_gives_no_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert gsm8k.arithmetic_value("5or 3") is None
    assert not caught


# ------------------------------------------------------------------------------------------------
# Data files
# ------------------------------------------------------------------------------------------------

ROWS = [
    {
        "question": f"Ann has {a} pens in box {chr(63 + a)}{chr(63 + b)} and buys {b}. How many?",
        "answer": f"She has <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}",
    }
    for a in range(2, 9)
    for b in range(2, 9)
]
AUG = {"question": "Q", "cot": "<<2+3=5>> <<5*2=10>>", "answer": "10"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def put_rows(path, rows):
    """Write JSON lines, packed as the name says; returns the path as text."""
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_without_notes_are_told_of(tmp_path, capsys):
    rows = [{"question": "2 and 3?", "answer": "2 + 3 is 5.\n#### 5"}]
    path = put_rows(tmp_path / "a.jsonl", rows)
    assert gsm8k.load_gsm8k(path) == [{"question": "2 and 3?", "answer": "#### 5"}]
    assert capsys.readouterr().err.count("no <<...>> notes") == 1
    assert gsm8k.load_gsm8k(path, "full")[0]["answer"].startswith("2 + 3")
    gsm8k.load_gsm8k(put_rows(tmp_path / "b.jsonl", ROWS))
    assert capsys.readouterr().err == ""


def test_data_files_of_both_layouts(tmp_path):
    expected = gsm8k.load_gsm8k(put_rows(tmp_path / "a.jsonl", ROWS))
    assert expected[0] == {
        "question": ROWS[0]["question"],
        "answer": "<<2+2=4>> #### 4",
    }
    full = gsm8k.load_gsm8k(str(tmp_path / "a.jsonl"), "full")
    assert [p["answer"] for p in full] == [row["answer"] for row in ROWS]
    for answer in ("10", 10):
        path = put_rows(tmp_path / "aug.jsonl", [AUG | {"answer": answer}])
        assert gsm8k.load_gsm8k(path)[0]["answer"] == "<<2+3=5>> <<5*2=10>> #### 10"
    for name in ("b.json", "b.json.gz", "b.json.xz", "b.jsonl.gz", "b.jsonl.xz"):
        assert gsm8k.load_gsm8k(put_rows(tmp_path / name, ROWS)) == expected
    (tmp_path / "array.json").write_text("\n" + json.dumps(ROWS, indent=1))
    assert gsm8k.load_gsm8k(str(tmp_path / "array.json")) == expected
    (tmp_path / "gaps.jsonl").write_bytes("\r\n\r\n".join(json.dumps(row) for row in ROWS).encode())
    assert gsm8k.load_gsm8k(str(tmp_path / "gaps.jsonl")) == expected
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    assert gsm8k.load_gsm8k(str(tmp_path / "marked.jsonl")) == expected  # it begins with a BOM


def test_a_folder_of_data_files(tmp_path):
    put_rows(tmp_path / "b.json.xz", ROWS[2:])
    put_rows(tmp_path / "a.jsonl.gz", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    found = gsm8k.load_gsm8k(str(tmp_path))
    assert [p["question"] for p in found] == [row["question"] for row in ROWS]


def test_the_splits_of_a_folder_stay_apart(tmp_path):
    put_rows(tmp_path / "latest_train.jsonl", ROWS[2:])
    put_rows(tmp_path / "latest_test.jsonl", ROWS[:2])
    for split, rows in (("train", ROWS[2:]), ("test", ROWS[:2])):
        found = [p["question"] for p in gsm8k.load_gsm8k(str(tmp_path), split=split)]
        assert found == [row["question"] for row in rows]
    for split in ("validation", "train[:10]", "("):
        with pytest.raises(command_line.UserError, match="only files of other splits than"):
            gsm8k.load_gsm8k(str(tmp_path), split=split)
    put_rows(tmp_path / "more.jsonl", ROWS[1:2])  # named after none
    found = gsm8k.load_gsm8k(str(tmp_path), split="validation")
    assert [p["question"] for p in found] == [ROWS[1]["question"]]


@pytest.mark.parametrize("name, subset", [("openai/gsm8k", "main"), ("zen-E/GSM8k-Aug", None)])
def test_a_hub_name(monkeypatch, name, subset):
    asked, rows = [], [AUG] if subset is None else ROWS

    def load_dataset(*args, **options):
        asked.append((args, options))
        return rows

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = gsm8k.load_gsm8k(name, split="test")
    assert asked == [((name, subset), {"split": "test"})]
    assert [p["question"] for p in found] == [row["question"] for row in rows]


def no_network(reason="no route\nto the hub"):
    """A stand-in for the package datasets on a machine that is offline."""

    def load_dataset(*args, **options):
        raise ConnectionError(reason)

    return types.SimpleNamespace(load_dataset=load_dataset)


@pytest.mark.parametrize(
    "package, says",
    [
        (
            no_network(),
            r"cannot load a/b from the hub \(ConnectionError: no route to the hub\): go online",
        ),
        (None, "pip install datasets"),
        (no_network(""), "go online"),
    ],
)
def test_a_hub_name_without_network(monkeypatch, package, says):
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(command_line.UserError, match=says):
        gsm8k.load_gsm8k("a/b")


def test_a_number_as_the_answer_of_an_embedded_problem(tmp_path):
    row = {"question": "Q", "cot": "", "answer": 5, "solutions": ["5"]}
    (problem,) = gsm8k.load_gsm8k(put_rows(tmp_path / "a.jsonl", [row]))
    assert problem["answer"] == "5"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": "Q", "answer": "5"}, "no final answer"),
        ({"question": "Q", "answer": "<<2+3=5>>5"}, "no final answer"),
        ({"question": "Q", "answer": "five ####"}, "answer"),
        ({"question": "Q", "answer": "#### none"}, "answer"),
        (AUG | {"answer": ""}, "answer"),
        ({"question": "Q", "cot": "", "answer": True}, "answer"),
        ({"question": "Q"}, "no columns question and answer"),
        ({"answer": "#### 5"}, "no columns question and answer"),
        (["Q", "#### 5"], "no columns question and answer"),
        (5, "no columns question and answer"),
        ({"question": 5, "answer": "#### 5"}, "question that is no text"),
        ({"question": "Q", "answer": None}, "answer that is no text"),
        ({"question": "Q", "answer": ["#### 5"]}, "answer that is no text"),
        (AUG | {"cot": 5}, "cot that is no text"),
        (ROWS[0] | {"solutions": 5}, "solutions"),
        (ROWS[0] | {"solutions": []}, "solutions without its answer"),
    ],
)
def test_a_record_that_is_no_problem(tmp_path, row, says):
    path = put_rows(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(command_line.UserError, match=rf"a\.jsonl line 2 .*{says}.*: "):
        gsm8k.load_gsm8k(path)
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], row]))
    with pytest.raises(command_line.UserError, match=rf"a\.json record 2 .*{says}.*: "):
        gsm8k.load_gsm8k(str(tmp_path / "a.json"))


@needs_gsm8k
@pytest.mark.parametrize("name, rows, unsolved", [("test", 1319, 111), ("train", 7473, 474)])
def test_real_gsm8k_files(name, rows, unsolved):
    problems = gsm8k.load_gsm8k(str(GSM8K / f"{name}.jsonl"))
    assert len(problems) == rows
    for p in problems:
        assert gsm8k.final_number(p["answer"]) is not None
    answered, solved = zip(*(eval_gsm8k.judge(p["answer"], p) for p in problems))
    # some have no note at all, or none for their last step
    assert all(answered) and len(solved) - sum(solved) == unsolved
    tokenizer = small_tokenizer()
    for p in problems[::100]:
        text = p["question"] + SEPARATOR + p["answer"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_gsm8k
def test_real_augmented_file(tmp_path):
    with lzma.open(GSM8K / "train_aug.jsonl.xz", "rt", encoding="utf-8") as file:
        lines = file.read().strip().split("\n")
    assert len(lines) == 308_530
    (tmp_path / "some.jsonl").write_text("\n".join(lines[::200]))
    for p in gsm8k.load_gsm8k(str(tmp_path / "some.jsonl")):
        assert gsm8k.solves_equations(p["answer"], p["answer"])


def test_variants_of_a_test_problem_are_not_trained_on(tmp_path):
    asked = itertools.product("abcdefghijklmnopqrst", range(2, 5))
    rows = [{"question": f"Ann {name} {n}", "answer": f"#### {n}"} for name, n in asked]
    args = train.parse_args(["--data", put_rows(tmp_path / "a.jsonl", rows)])
    training, held_out = train.load_problems(args)
    words = [{re.sub("[0-9]", "", p["question"]) for p in part} for part in (training, held_out)]
    assert len(held_out) == 6 and not words[0] & words[1]
    assert train.load_problems(args) == (training, held_out)
    rows *= 50  # the split is the same for any number of --problems
    args = train.parse_args(["--data", put_rows(tmp_path / "b.jsonl", rows)])
    split = train.load_problems(args)
    args.problems = 2000
    assert train.load_problems(args) == split and len(split[1]) == 256
    assert len(split[0]) >= 0.9 * len(rows)  # twenty texts: to hold out all would leave nothing
    few = [{"question": f"{name} {n}", "answer": "#### 1"} for name in "abcde" for n in range(200)]
    split = train.load_problems(train.parse_args(["--data", put_rows(tmp_path / "c.jsonl", few)]))
    assert [len(part) for part in split] == [800, 100]  # one of the five texts
    one = train.parse_args(["--data", put_rows(tmp_path / "d.jsonl", few[:200])])
    with pytest.raises(command_line.UserError, match="one text with different numbers"):
        train.load_problems(one)


# ------------------------------------------------------------------------------------------------
# Problems as tensors
# ------------------------------------------------------------------------------------------------


def test_problems_as_tensors_and_back():
    tokenizer, config = small_tokenizer(), types.SimpleNamespace(max_len=14, canvas_len=3)
    problems = [{"question": q, "answer": a} for q, a in (("Ann", "5"), ("x" * 9, ""), ("", "77"))]
    tokens, canvas, fits = encode_problems(problems, tokenizer, config)
    blank, same_canvas, _ = encode_problems(problems, tokenizer, config, False)
    assert fits == [True, True, True] and torch.equal(canvas, same_canvas)
    assert tokens.shape == canvas.shape == (3, 14) and canvas.sum(1).tolist() == [3, 3, 3]
    for problem, row, on, without in zip(problems, tokens, canvas, blank):
        prompt = tokenizer.encode(problem["question"] + "||")
        answer = tokenizer.encode(problem["answer"])
        filled = prompt + answer
        assert row.tolist() == filled + [tokenizer.eos_id] * (14 - len(filled))
        assert without.tolist() == prompt + [tokenizer.eos_id] * (14 - len(prompt))
        assert on.nonzero().flatten().tolist() == [len(prompt) + i for i in range(3)]
        assert answer_text(tokenizer, row, on) == problem["answer"]
    row = torch.tensor(tokenizer.encode("||5") + [tokenizer.eos_id] + tokenizer.encode("7"))
    assert answer_text(tokenizer, row, torch.arange(4) > 0) == "5"  # up to the first EOS


def test_problems_that_do_not_fit():
    tokenizer, config = small_tokenizer(), types.SimpleNamespace(max_len=13, canvas_len=3)
    problems = [{"question": q, "answer": a} for q, a in (("x" * 10, "5"), ("x" * 9, "5678"))]
    tokens, canvas, fits = encode_problems(problems, tokenizer, config)
    assert fits == [False, False] and not canvas.any() and (tokens == tokenizer.eos_id).all()
    _, canvas, fits = encode_problems(problems, tokenizer, config, with_answers=False)
    assert fits == [False, True] and canvas.sum(1).tolist() == [0, 3]


# ------------------------------------------------------------------------------------------------
# Statistics and the table
# ------------------------------------------------------------------------------------------------


def slow_wilson(right, n, z=1.96):
    """The shares that lie within z standard errors of the one seen, in percent, by bisection."""

    def bound(far, seen):
        for _ in range(60):
            middle = (far + seen) / 2
            inside = abs(right / n - middle) <= z * math.sqrt(middle * (1 - middle) / n)
            far, seen = (far, middle) if inside else (middle, seen)
        return 100 * seen

    return bound(0.0, right / n), bound(1.0, right / n)


@pytest.mark.parametrize("n", [1, 2, 10, 500])
def test_wilson(n):
    for right in range(0, n + 1, max(1, n // 20)):
        assert eval_gsm8k.wilson(right, n) == pytest.approx(slow_wilson(right, n), abs=1e-6)
    assert eval_gsm8k.wilson(8, 10) == pytest.approx((49.02, 94.33), abs=0.01)


def slow_mcnemar(first, second):
    """Share of the sign patterns of the pairs that differ which are as uneven as the one seen."""
    signs = [a - b for a, b in zip(first, second) if a != b]
    patterns = list(itertools.product((-1, 1), repeat=len(signs)))
    return sum(abs(sum(p)) >= abs(sum(signs)) for p in patterns) / len(patterns)


def test_mcnemar():
    rng = random.Random(0)
    for n in (1, 2, 5, 12, 16):
        for _ in range(5):
            first, second = ([rng.random() < p for _ in range(n)] for p in (0.8, 0.3))
            expected = slow_mcnemar(first, second)
            assert eval_gsm8k.mcnemar(first, second) == pytest.approx(expected)
            assert eval_gsm8k.mcnemar(second, first) == pytest.approx(expected)
    assert eval_gsm8k.mcnemar([True] * 9, [True] * 9) == 1.0
    assert eval_gsm8k.mcnemar([True] * 3000, [False] * 3000) == 0.0  # too small for a float


@pytest.mark.parametrize(
    "p, text",
    [(None, ""), (1.0, "1.000"), (0.0316, "0.032"), (0.00099, "9.9e-04"), (1e-10, "1.0e-10")]
    + [(0.99e-10, "< 1e-10"), (0.0, "< 1e-10")],
)
def test_p_text(p, text):
    assert eval_gsm8k.p_text(p) == text


class FakeRun:
    """Attempts with known outcomes. `right` tells how many of 4 answers a denoiser gets right."""

    def __init__(self, learned_steps, right):
        self.learned_steps, self.right, self.calls = learned_steps, right, []

    def __call__(self, strategy, budget, denoiser):
        self.calls.append((strategy, budget, denoiser))
        steps = self.learned_steps if strategy == "learned" else [budget] * 4
        answered, solved = (
            [i < n for i in range(4)] for n in self.right.get((strategy, denoiser), (3, 2))
        )
        return {"answered": answered, "solved": solved, "steps": steps}


def fake_score(run, rules, sweep=(), budgets=(9,), policy="policy", baseline="baseline"):
    """(rows, attempts), as lists."""
    models = eval_gsm8k.Models("order", policy, "posterior", baseline)
    return zip(*eval_gsm8k.score(run, models, budgets, rules, sweep))


@pytest.mark.parametrize(
    "steps, avg, most",
    [
        ([2, 2, 2, 3], 3, 3),  # 2.25
        ([1, 2, 3, 9], 4, 9),  # 3.75
        ([2, 2, 2, 2], 2, 2),
        ([1, 2, 4, 5], 3, 5),  # 3 exactly
        ([0, 0, 2, 3], 3, 3),  # two problems did not fit
        ([0, 0, 0, 0], 1, 1),
    ],
)
def test_rules_get_the_average_steps_rounded_up_and_the_most(steps, avg, most):
    run = FakeRun(steps, {})
    rows, attempts = fake_score(run, ["iid", "entropy+eos"], sweep=(1, 7))
    about = [(row["method"], row["match"], row["budget"], row["max_steps"]) for row in rows]
    assert about == [
        ("learned", "", 9, max(steps)),
        *((rule, "@Avg", 9, avg) for rule in ("iid", "entropy+eos")),
        *((rule, "@Max", 9, most) for rule in ("iid", "entropy+eos")),
        *((rule, "sweep", n, n) for n in (1, 7) for rule in ("iid", "entropy+eos")),
    ]
    assert attempts[0]["steps"] == steps
    assert all(max(x["steps"]) == row["max_steps"] for row, x in zip(rows, attempts))
    assert [row["p_answered"] is None for row in rows] == [True, *[False] * 4, *[True] * 4]
    taken = [n for n in steps if n] or [0]
    assert rows[0]["average_steps"] == sum(taken) / len(taken)
    assert rows[0]["min_steps"] == min(taken)
    assert len(set(run.calls)) == len(run.calls)  # nothing twice


@pytest.mark.parametrize(
    "order, baseline, better",
    [((3, 1), (2, 2), "order"), ((2, 2), (3, 1), "baseline"), ((2, 1), (2, 2), "baseline")]
    + [((2, 2), (2, 1), "order")],
)
def test_the_better_of_two_models_is_chosen_by_answers(order, baseline, better):
    rules = {("iid", "order"): order, ("iid", "baseline"): baseline, ("learned", "order"): (4, 0)}
    rows, _ = fake_score(FakeRun([2] * 4, rules), ["iid"])
    right = order if better == "order" else baseline
    for row in rows[1:]:
        assert (row["model"], 4 * row["answered"], 4 * row["solved"]) == (better, *right)
        assert row["p_answered"] == slow_mcnemar([True] * (4 - right[0]), [False] * (4 - right[0]))
        assert row["p_solved"] == slow_mcnemar([True] * right[1], [False] * right[1])


def test_scores_of_one_model():
    rows, _ = fake_score(FakeRun([], {}), ["iid"], (), (2, 5), None, None)
    about = [(row["method"], row["budget"], row["max_steps"], row["match"]) for row in rows]
    assert about == [("iid", 2, 2, ""), ("iid", 5, 5, "")]
    assert {r["model"] for r in rows} == {"stage 1"}
    rows, _ = fake_score(FakeRun([2] * 4, {}), ["iid"], baseline=None)
    assert {r["model"] for r in rows} == {"order"}


def test_the_models_of_plain_pt_have_names_of_their_own():
    def run(rule, budget, denoiser):
        right = [denoiser == "stage 1's"] * 2
        return {"answered": right, "solved": right, "steps": [budget] * 2}

    models = eval_gsm8k.Models("stage 1's", None, None, "baseline's")
    ((row, _),) = eval_gsm8k.score(run, models, (2,), ["iid"], ())
    assert row["model"] == "stage 1" and row["answered"] == 1


def test_strategy_names():
    names = eval_gsm8k.ALL_RULES
    assert len(set(names)) == len(names) == 11
    assert "learned" not in names and "top_prob+eos" in names and "iid+eos" not in names


def table_cells(line):
    return re.split(r"  +", line.strip())


def expected_cells(row):
    """What the table should say of a row of --json."""
    cells = [f"{row['method']} {row['match']}".strip(), str(row["budget"]), row["model"]]
    cells += [f"{row['average_steps']:.2f}", f"[{row['min_steps']}, {row['max_steps']}]"]
    for key in ("answered", "solved"):
        low, high = slow_wilson(round(row[key] * row["problems"]), row["problems"])
        cells.append(f"{100 * row[key]:.1f} [{low:.1f}, {high:.1f}]")
        cells += [] if row["p_" + key] is None else [eval_gsm8k.p_text(row["p_" + key])]
    return cells


def test_table():
    run = FakeRun([1, 2, 3, 9], {("iid", "order"): (1, 4)})
    rows, _ = fake_score(run, ["iid", "top_prob_margin+eos"], (1,))
    lines = eval_gsm8k.table(rows).split("\n")
    assert table_cells(lines[0])[:5] == ["method", "T", "model", "steps", "[min, max]"]
    assert [table_cells(line) for line in lines[1:]] == [expected_cells(row) for row in rows]
    starts = {line.index("[") for line in lines}
    assert len(starts) == 1  # the columns are aligned
    assert eval_gsm8k.table(rows).isascii() and not any(line.endswith(" ") for line in lines)


def test_by_length():
    answers = ["1+1=2+1=3 #### 3", "1+1 = <<1+1=2>>2", "<<1+1=2>> <<2+1=3>> #### 3", "#### 1"]
    answers += ["<<1+1=2>> <<2+2=4>> #### 4", "1=1=1=1"]
    problems = [{"answer": answer} for answer in answers]
    result = {
        "steps": [3, 1, 4, 1, 0, 0],  # two do not fit
        "answered": [True, True, False, True, False, False],
        "solved": [False, True, False, False, False, False],
    }
    lines = eval_gsm8k.by_length(problems, result).split("\n")[1:]
    assert [table_cells(line) for line in lines] == [
        ["0", "1", "1.00", "100.0", "0.0"],
        ["1", "1", "1.00", "100.0", "100.0"],
        ["2", "3", "3.50", "33.3", "0.0"],
        ["3", "1", "0.00", "0.0", "0.0"],
    ]


# ------------------------------------------------------------------------------------------------
# train.py
# ------------------------------------------------------------------------------------------------

ON_CPU = ["--device", "cpu"]
LAYOUT = ["--size", "tiny", "--max-len", "64", "--canvas-len", "24"]
PLAIN, BASELINE, ORDER = 6, 11, 5  # steps of each stage; 6 of the baseline pay for the search
SHORT = f"--steps {PLAIN} --batch 4 --order-steps {ORDER} --order-batch 2 --paths 2"
SHORT = [*f"{SHORT} --search 4 --problems 0 --no-compile".split(), *ON_CPU]


def call(script, *args):
    """Run a script's main in this process; returns its exit code."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        command_line.run_main(lambda: script.main([str(arg) for arg in args]))
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data.jsonl, a tiny run in out/, and one of stage 1 only in stage_1/."""
    folder = tmp_path_factory.mktemp("trained")
    put_rows(folder / "data.jsonl", ROWS)
    assert call(train, *flags(folder), "--out", folder / "out") == 0
    assert call(train, *flags(folder), "--order-steps", 0, "--out", folder / "stage_1") == 0
    return folder


def flags(folder):
    return ["--data", folder / "data.jsonl", *LAYOUT, *SHORT]


def state_of(path):
    return torch.load(path, weights_only=True)


def leaves(state, prefix=""):
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from leaves(value, f"{prefix}.{key}")
    else:
        yield prefix, state


def alike(first, second, but=("out", "resume", "start", "compile")):
    """Are two checkpoints equal bit for bit, apart from flags that do not matter?"""
    first, second = (dict(leaves(state_of(path))) for path in (first, second))
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, second[key]):
                return False
        elif value != second[key] and key not in {".logged", *(f".args.{name}" for name in but)}:
            return False
    return True


def logged(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def test_a_run_leaves_its_files(trained):
    out = trained / "out"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "log.jsonl", "plain.pt"]
    assert [(row["stage"], row["step"]) for row in logged(out)] == [
        ("plain", PLAIN),
        ("baseline", BASELINE),
        ("order", ORDER),
    ]
    last, before = state_of(out / "checkpoint.pt"), state_of(out / "plain.pt")
    assert (last["stage"], before["stage"], before["step"]) == ("done", "order", 0)
    assert all(torch.equal(last["baseline"][k], before["baseline"][k]) for k in last["baseline"])
    assert before["policy"] is before["posterior"] is None
    assert any(not torch.equal(last["denoiser"][k], x) for k, x in before["denoiser"].items())
    assert any(
        not torch.equal(before["baseline"][k], before["denoiser"][k]) for k in before["baseline"]
    )
    embedding = "trunk.wte.weight"  # the posterior's is the plain model's, and frozen
    assert torch.equal(last["posterior"][embedding], before["denoiser"][embedding])


def interrupt(monkeypatch, at):
    """Ctrl-C in the training step with this number. Returns the steps begun."""
    begun, step = [], train.train_step

    def interrupted(*args):
        begun.append(1)
        if len(begun) == at:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    return begun


@pytest.mark.parametrize("at", [1, PLAIN, 13, PLAIN + BASELINE, 20])
def test_ctrl_c_saves_and_resuming_equals_not_having_stopped(
    trained, tmp_path, monkeypatch, capsys, at
):
    begun = interrupt(monkeypatch, at)
    assert call(train, *flags(trained), "--out", tmp_path) == 130
    assert re.search(r"^stopped .* --resume$", capsys.readouterr().err, re.MULTILINE)
    assert len(begun) == at  # the step is finished, no other is begun
    with open(tmp_path / "log.jsonl", "a") as file:  # what a kill after the last save would leave
        file.write('{"stage": "order", "step": 5, "loss": 1.0}\n{"stage": "or')
    assert call(train, *flags(trained), "--out", tmp_path, "--resume") == 0
    assert alike(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")
    assert alike(tmp_path / "plain.pt", trained / "out" / "plain.pt")
    stages = list(eval_gsm8k.STAGES)
    places = [(stages.index(row["stage"]), row["step"]) for row in logged(tmp_path)]
    assert places == sorted(set(places)) and "kl" in logged(tmp_path)[-1]


def test_a_checkpoint_from_before_stage_2_has_no_order(trained):
    files = (trained / "out" / name for name in ("plain.pt", "checkpoint.pt"))
    before, after = (eval_gsm8k.load_checkpoint(file)[2] for file in files)
    assert before.policy is before.posterior is None
    assert after.policy is not None and after.posterior is not None


def test_ctrl_c_after_a_step_that_was_not_to_be_saved(trained, tmp_path, monkeypatch):
    """The step's loss is waited for between the decision to save and the end of the step."""
    dumps, rows = json.dumps, []

    def interrupted(row):
        rows.append(row)
        if len(rows) == 1:
            signal.raise_signal(signal.SIGINT)
        return dumps(row)

    more = ["--steps", 30, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(train.json, "dumps", interrupted)
        assert call(train, *flags(trained), *more) == 130
    assert (rows[0]["step"], state_of(tmp_path / "checkpoint.pt")["step"]) == (20, 21)


@pytest.mark.parametrize("stage", ["baseline", "order", "done"])
def test_ctrl_c_while_a_stage_is_saved(trained, tmp_path, monkeypatch, capsys, stage):
    save = train.Run.save

    def interrupted(run, path, *args):
        save(run, path, *args)
        if (path.name, run.stage, run.step) == ("checkpoint.pt", stage, 0):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", interrupted)
        assert call(train, *flags(trained), "--out", tmp_path) == 130
    assert "stopped between two stages; go on with --resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    assert call(train, *flags(trained), "--out", tmp_path, "--resume") == 0
    assert alike(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")


class Unread(tqdm):
    """A bar into a pipe whose reader has left."""

    def update(self, n=1):
        raise BrokenPipeError

    def close(self):
        closed = self.disable
        super().close()
        if not closed:
            raise BrokenPipeError


@pytest.mark.parametrize("at, code", [(3, 130), (None, 0)])
def test_nobody_reads_the_bar(trained, tmp_path, monkeypatch, at, code):
    """As in `python train.py 2>&1 | tee log`, where Ctrl-C ends tee before a step is done."""
    interrupt(monkeypatch, at)
    monkeypatch.setattr(train, "tqdm", Unread)
    assert call(train, *flags(trained), "--out", tmp_path) == code
    if at:
        assert state_of(tmp_path / "checkpoint.pt")["step"] == at
    else:
        assert alike(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")


def test_rows_are_written_before_the_table(trained, tmp_path, monkeypatch):
    def fail(rows):
        raise command_line.UserError("nobody reads it")

    monkeypatch.setattr(eval_gsm8k, "table", fail)
    args = scored(trained, "--strategies", "iid", "--json", tmp_path / "rows.json")
    assert call(eval_gsm8k, *args) == 2
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3


def test_a_cpu_without_enough_memory(capsys):
    assert call(types.SimpleNamespace(main=lambda _: torch.empty(2**60))) == 2
    complaint(capsys, "too little memory: lower --batch or")


def test_too_little_memory_for_a_checkpoint_is_no_damage(trained, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    assert call(eval_gsm8k, "--checkpoint", trained / "out" / "checkpoint.pt") == 2
    complaint(capsys, "too little memory: lower --batch")


def test_names_of_several_lines(capsys):
    assert call(sample, "Ann", "--checkpoint", "a\nb.pt") == 2
    complaint(capsys, "no checkpoint at a b.pt: give")


def test_config_refuses_odd_heads():
    with pytest.raises(ValueError, match="n_layer is 0"):
        mdmvi.ModelConfig(5, 16, 0, 2, 8, 12, mask_id=5, eos_id=0)
    with pytest.raises(ValueError, match="n_head is 0"):
        mdmvi.ModelConfig(5, 16, 1, 0, 8, 12, mask_id=5, eos_id=0)
    with pytest.raises(ValueError, match="n_embd 12 is no multiple of 2 n_head, 8"):
        mdmvi.ModelConfig(5, 8, 1, 4, 12, 8, mask_id=5, eos_id=0)


def test_a_second_ctrl_c_stops_at_once(trained, tmp_path, monkeypatch):
    def twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "train_step", twice)
    assert call(train, *flags(trained), "--out", tmp_path) == 130
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resuming_a_run_that_is_done_changes_nothing(trained, tmp_path, capsys):
    for file in (trained / "out").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    log = (tmp_path / "log.jsonl").read_text()
    assert call(train, *flags(trained), "--out", tmp_path, "--resume") == 0
    assert "bounds on log p at T = 5" in capsys.readouterr().out
    assert alike(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_fresh_run_begins_a_fresh_log(trained, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "plain", "step": 20, "loss": 1.0}\n')
    assert call(train, *flags(trained), "--order-steps", 0, "--out", tmp_path) == 0
    assert [row["step"] for row in logged(tmp_path)] == [PLAIN]


def test_the_seed_decides(trained, tmp_path):
    """That the same one gives the same run is in `test_nobody_reads_the_bar`."""
    drawn = []  # the weights, which a rate of 0 leaves as they were drawn, and the generator
    for seed in (0, 1):
        out = tmp_path / str(seed)
        stage_1 = ["--order-steps", 0, "--lr", 0, "--seed", seed, "--out", out]
        assert call(train, *flags(trained), *stage_1) == 0
        state = state_of(out / "checkpoint.pt")
        drawn.append([state["denoiser"]["lm_head.weight"], state["generator"]])
    assert not any(torch.equal(*pair) for pair in zip(*drawn))


@pytest.mark.skipif("SLOW" not in os.environ, reason="twenty kills take minutes: set SLOW=1")
def test_twenty_kills_at_random_moments(trained, tmp_path):
    line = [sys.executable, "train.py", *map(str, flags(trained)), "--steps", "300"]
    line += ["--order-steps", "100", "--out", str(tmp_path)]
    rng, nothing = random.Random(0), subprocess.DEVNULL
    for _ in range(20):
        resume = ["--resume"] if (tmp_path / "checkpoint.pt").exists() else []
        process = subprocess.Popen(line + resume, cwd=FOLDER, stdout=nothing, stderr=nothing)
        time.sleep(rng.uniform(1, 9))
        process.kill()
        process.wait()
        if (tmp_path / "checkpoint.pt").exists():
            eval_gsm8k.load_checkpoint(tmp_path / "checkpoint.pt")
    resume = ["--resume"] if (tmp_path / "checkpoint.pt").exists() else []
    straight = [*line[:-1], str(tmp_path / "straight")]
    for whole in (line + resume, straight):
        assert subprocess.run(whole, cwd=FOLDER, check=False).returncode == 0
    assert alike(tmp_path / "checkpoint.pt", tmp_path / "straight" / "checkpoint.pt")


def break_loss(monkeypatch, name, at):
    """Make the loss of this name NaN at its call number `at`."""
    loss, calls = getattr(mdmvi, name), []

    def broken(*args):
        calls.append(1)
        factor = math.nan if len(calls) == at else 1.0
        result = loss(*args)
        if isinstance(result, tuple):
            return result[0] * factor, result[1]
        return result * factor

    monkeypatch.setattr(mdmvi, name, broken)


@pytest.mark.parametrize(
    "name, at, saved",
    [("mdm_loss", 4, ("plain", 3)), ("mdm_loss", PLAIN + 3, ("baseline", 2))]
    + [("importance_order_loss", 2, ("order", 1))],
)
def test_a_nan_loss_stops_before_the_checkpoint_is_touched(
    trained, tmp_path, monkeypatch, capsys, name, at, saved
):
    break_loss(monkeypatch, name, at)
    monkeypatch.setattr(train, "SAVE_EVERY", -1)  # save after each step
    assert call(train, *flags(trained), "--out", tmp_path) == 2
    assert "; train again with a lower learning rate" in capsys.readouterr().err
    state = state_of(tmp_path / "checkpoint.pt")
    assert (state["stage"], state["step"]) == saved
    weights = [x for _, x in leaves(state) if isinstance(x, torch.Tensor)]
    assert all(x.isfinite().all() for x in weights if x.is_floating_point())


def test_the_message_of_a_nan_loss_has_a_line_of_its_own(trained, tmp_path, monkeypatch, capsys):
    break_loss(monkeypatch, "mdm_loss", 4)
    assert call(train, *flags(trained), "--out", tmp_path) == 2
    complaint(capsys, "loss is nan at plain step")


def test_a_weight_that_is_not_finite_is_not_saved(trained, tmp_path, monkeypatch, capsys):
    update, calls = mdmvi.update, []

    def broken(optimizers, step, steps):
        update(optimizers, step, steps)
        calls.append(step)
        if len(calls) == PLAIN:
            optimizers[0].param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(mdmvi, "update", broken)
    assert call(train, *flags(trained), "--out", tmp_path) == 2
    assert "a weight is not finite at baseline step 0" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoints_are_written_beside_and_renamed(trained, tmp_path, monkeypatch):
    written, moved, save, replace = [], [], torch.save, os.replace

    def watched_save(state, path):
        written.append(Path(path).name)
        save(state, path)

    def watched_replace(source, target):
        moved.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(torch, "save", watched_save)
    monkeypatch.setattr(os, "replace", watched_replace)
    assert call(train, *flags(trained), "--out", tmp_path) == 0
    assert set(written) == {"checkpoint.pt.tmp", "plain.pt.tmp"}
    assert moved == [(name, name.removesuffix(".tmp")) for name in written]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk(trained, tmp_path, monkeypatch, capsys):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert call(train, *flags(trained), "--out", tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("checkpoint.pt")]


class Bomb:
    """A pickle that makes a folder when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"program": "mdmvi", "bomb": Bomb(tmp_path / "gone off")}, tmp_path / "bad.pt")
    with pytest.raises(command_line.UserError, match="damaged or not a checkpoint"):
        eval_gsm8k.load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "gone off").exists()


def test_a_start_without_a_baseline_trains_one(trained, tmp_path, capsys):
    short = [*flags(trained), "--order-steps", 2, "--search", 0]
    assert call(train, *short, "--order-lr", 0, "--out", tmp_path / "a") == 0
    assert state_of(tmp_path / "a" / "plain.pt")["baseline"] is None
    start = [*short, "--start", tmp_path / "a" / "plain.pt"]
    assert call(train, *start, "--out", tmp_path / "b") == 0
    assert {row["stage"] for row in logged(tmp_path / "b")} == {"baseline", "order"}
    assert state_of(tmp_path / "b" / "checkpoint.pt")["baseline"] is not None
    capsys.readouterr()
    longer = ["--order-lr", 0, "--order-steps", 4]  # a frozen denoiser needs no baseline
    assert call(train, *start, *longer, "--out", tmp_path / "c") == 0
    assert {row["stage"] for row in logged(tmp_path / "c")} == {"order"}
    assert "has seen less" not in capsys.readouterr().err


def test_a_start_from_a_run_of_stage_1_alone(trained, tmp_path):
    """Its checkpoint.pt is "done"; what comes next is the baseline, as after any stage 1."""
    short = [*flags(trained), "--order-steps", 2, "--search", 0]
    frozen = [*short, "--order-lr", 0, "--out", tmp_path / "frozen"]
    assert call(train, *frozen) == 0  # plain.pt without a baseline
    for name, start in (
        ("a", tmp_path / "frozen/plain.pt"),
        ("b", trained / "stage_1/checkpoint.pt"),
    ):
        assert call(train, *short, "--start", start, "--out", tmp_path / name) == 0
    assert {row["stage"] for row in logged(tmp_path / "b")} == {"baseline", "order"}
    ours, theirs = (tmp_path / name / "checkpoint.pt" for name in "ba")
    assert alike(ours, theirs, ("out", "start"))


def test_a_baseline_that_has_seen_less_is_told(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *args: None)  # it is told before
    start = ["--problems", 0, "--start", trained / "out" / "plain.pt", "--out"]
    for name, more, short in (
        ("same", ["--budget", 3], False),
        ("less", ["--search", 0], False),
        ("more", ["--paths", 5], True),
        ("paper", ["--orders", "paper", "--paths", 9], True),
    ):
        assert call(train, *flags(trained), *more, *start, tmp_path / name) == 0
        assert ("has seen less than this stage 2 takes" in capsys.readouterr().err) == short


def test_no_folder_is_made_for_a_run_that_cannot_begin(trained, tmp_path, capsys):
    out = tmp_path / "new"
    assert call(train, "--data", tmp_path / "none.jsonl", "--out", out) == 2
    assert call(train, *flags(trained), "--resume", "--out", out) == 2
    assert not out.exists()


def test_published_weights_are_read_once(trained, tmp_path, monkeypatch):
    """--init is for a new stage 1: --resume and --start have its weights in their file."""
    built, read = train.make_tokenizer(train.Args(), eval_gsm8k.TASKS["carries"](60, 0, False)), []
    monkeypatch.setattr(train, "make_tokenizer", lambda *args: built)
    monkeypatch.setattr(smdm, "load_smdm", lambda *args: read.append(args))
    short = ["--steps", 1, "--order-steps", 1, "--search", 0]
    init = [*flags(trained), *short, "--init", "published", "--out"]
    assert call(train, *init, tmp_path / "a") == 0
    assert [name for name, _ in read] == ["published"]
    assert call(train, *init, tmp_path / "a", "--resume") == 0
    assert call(train, *init, tmp_path / "b", "--start", tmp_path / "a" / "plain.pt") == 0
    assert len(read) == 1


def test_another_budget_starts_from_stage_1(trained, tmp_path):
    start = ["--start", trained / "out" / "plain.pt", "--out"]
    assert call(train, *flags(trained), "--budget", 3, *start, tmp_path / "a") == 0
    ours, theirs = (state_of(d / "checkpoint.pt") for d in (tmp_path / "a", trained / "out"))
    assert ours["args"]["budget"] == 3 and {r["stage"] for r in logged(tmp_path / "a")} == {"order"}
    assert all(torch.equal(ours["baseline"][k], theirs["baseline"][k]) for k in theirs["baseline"])
    for orders in ("paper", "spread"):
        again = [tmp_path / orders / name for name in "ab"]
        for out in again:  # with other flags of stage 2, and not depending on what ran before
            more = ["--orders", orders, "--search", 2, "--tau", 0.2, "--order-batch", 3]
            assert call(train, *flags(trained), *more, *start, out) == 0
        assert alike(again[0] / "checkpoint.pt", again[1] / "checkpoint.pt")
    for run, copied in ((tmp_path / "a", True), (tmp_path / "paper", False)):
        after = state_of(next(run.rglob("checkpoint.pt")))["posterior"]
        before = state_of(trained / "out" / "plain.pt")["denoiser"]
        words = [state["trunk.wte.weight"] for state in (before, after)]
        assert torch.equal(*words) == copied  # and frozen
    for orders in ("paper", "runs"):
        args = [*map(str, flags(trained)), "--orders", orders, "--head-lr", "0.06"]
        run = train.Run(train.parse_args(args), small_tokenizer())
        run.begin_orders()
        groups, _, _ = train.stage_groups(run, "order")
        peaks = {group["network"]: group["peak"] for group in groups}
        posterior_lr = pytest.approx(0.006)
        assert peaks == {"denoiser": 1e-3, "policy": 0.06, "posterior": posterior_lr}
        assert groups[-1]["warm_up"] == 0.2
        assert run.posterior.trunk.wte.weight.requires_grad == (orders != "runs")


@pytest.mark.parametrize(
    "orders, module, search",
    [("runs", runs, "run_log_prob"), ("spread", spread, "search_timetable")],
)
def test_a_stop_in_the_search_after_start_can_be_resumed(
    trained, tmp_path, monkeypatch, orders, module, search
):
    same = [*flags(trained), "--orders", orders]
    start = [*same, "--start", trained / "out" / "plain.pt"]
    assert call(train, *start, "--out", tmp_path / "whole") == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, search, interrupted)
        assert call(train, *start, "--out", tmp_path / "cut") == 130
    assert call(train, *same, "--resume", "--out", tmp_path / "cut") == 0
    assert alike(tmp_path / "whole" / "checkpoint.pt", tmp_path / "cut" / "checkpoint.pt")


def test_another_seed_for_stage_2_of_the_embedded_task(tmp_path, few_problems):
    short = [*SHORT, *["--size", "tiny", "--steps", "1", "--order-steps", "2"]]
    assert call(train, *short, "--out", tmp_path / "a") == 0
    start = ["--start", tmp_path / "a" / "plain.pt", "--seed", 1, "--out", tmp_path / "b"]
    assert call(train, *short, *start) == 0


def test_a_frozen_denoiser_is_its_own_baseline(trained, tmp_path, capsys):
    assert call(train, *flags(trained), "--order-lr", 0, "--out", tmp_path) == 0
    before, after = (state_of(tmp_path / name) for name in ("plain.pt", "checkpoint.pt"))
    assert before["baseline"] is after["baseline"] is None
    assert all(torch.equal(before["denoiser"][k], after["denoiser"][k]) for k in after["denoiser"])
    assert [row["stage"] for row in logged(tmp_path)] == ["plain", "order"]
    assert "baseline" not in capsys.readouterr().out


def test_stage_1_only(trained, capsys):
    out = trained / "stage_1"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert {row["stage"] for row in logged(out)} == {"plain"}
    data = ["--data", trained / "data.jsonl", "--problems", 3, *ON_CPU]
    checkpoint = ["--checkpoint", out / "checkpoint.pt"]
    assert call(eval_gsm8k, *checkpoint, *data, "--budget", 2, 4, "--strategies", "iid") == 0
    printed = capsys.readouterr().out
    assert "learned order" not in printed and printed.count("\niid") == 2
    assert call(sample, "Ann has 2 pens.", *checkpoint, "--strategy", "iid") == 0


def test_a_table_of_stage_1_only(trained, tmp_path, capsys):
    args = "--order-steps", 0, "--problems", 3, "--budget", 2, "--out", tmp_path
    assert call(train, *flags(trained), *args) == 0
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert "learned" not in printed.replace("test of learned", "").replace("test, learned", "")
    assert len(rows) == 11 and {row["model"] for row in rows} == {"stage 1"}


def record(monkeypatch, *names):
    """Count the calls of functions of mdmvi or examples/runs.py: {name: list of batch sizes}."""
    sizes = {name: [] for name in names}
    for name in names:
        owner = mdmvi if hasattr(mdmvi, name) else runs

        def counted(original, batches, *args):
            batches.append(len(next(arg for arg in args if isinstance(arg, torch.Tensor))))
            return original(*args)

        watched = functools.partial(counted, getattr(owner, name), sizes[name])
        monkeypatch.setattr(owner, name, watched)
    return sizes


LOSS_NAMES = ("mdm_loss", "cut_loss", "importance_order_loss", "order_loss")


@pytest.mark.parametrize(
    "more, baseline, known, importance, uniform",
    [
        ("", [6] * 11, [32] * 3, [2] * 5, []),
        ("--search 0", [6] * 5, [], [2] * 5, []),
        ("--budget 1", [2] * 5, [], [2] * 5, []),
        ("--orders paper", [4] * 5, [], [], [2] * 5),
        ("--orders spread", [4] * 9, [], [2] * 5, []),
        ("--orders spread --search 0", [4] * 5, [], [2] * 5, []),
        ("--accumulate 2", [3] * 22, [32] * 3, [1] * 10, []),
        ("--order-steps 1", [6] * 7, [32] * 3, [2], []),
    ],
)
def test_what_is_trained_on_which_flags(
    trained, tmp_path, monkeypatch, more, baseline, known, importance, uniform
):
    """Problems or sequences a call. The baseline is paid for all passes of stage 2, where spread
    orders have one path a problem, and for those of the search: 24 or 12 for each of 4 problems
    here, a third of a training pass each."""
    monkeypatch.setattr(train, "TIMETABLE_PASSES", 12)
    real, searched = spread.search_timetable, []
    monkeypatch.setattr(
        spread, "search_timetable", lambda *args: searched.append(args) or real(*args)
    )
    sizes = record(monkeypatch, *LOSS_NAMES)
    assert call(train, *flags(trained), *more.split(), "--out", tmp_path) == 0
    stage_1 = [2] * 12 if "accumulate" in more else [4] * 6
    assert sizes["mdm_loss"] == stage_1 + baseline
    assert [sizes[name] for name in LOSS_NAMES[1:]] == [known, importance, uniform]
    assert len(searched) == (more == "--orders spread")
    models = eval_gsm8k.load_checkpoint(tmp_path / "checkpoint.pt")[2]
    kinds = {
        "paper": (mdmvi.UnmaskPolicy, mdmvi.OrderPosterior),
        "spread": (spread.SpreadPolicy, spread.SpreadPosterior),
        "": (runs.RunPolicy, runs.RunPosterior),
    }
    expected = next(kind for name, kind in kinds.items() if name in more)
    assert (type(models.policy), type(models.posterior)) == expected


@pytest.mark.parametrize("orders", ["runs", "spread", "paper"])
def test_the_flags_of_stage_2_reach_its_loss(trained, monkeypatch, orders):
    more = f"--orders {orders} --budget 4 --tau 0.2 --paths 2".split()
    args = train.parse_args([*map(str, flags(trained)), *more])
    run, seen = train.Run(args, small_tokenizer()), []
    run.begin_orders()
    name = "order_loss" if orders == "paper" else "importance_order_loss"
    monkeypatch.setattr(mdmvi, name, lambda *args: seen.append(args))
    data = torch.arange(40, dtype=torch.int32).view(2, 20), torch.ones(2, 20).bool()
    train.stage_loss(run, "order", data, 3)
    networks, (tokens, canvas), settings = seen[0][:3], seen[0][3:5], seen[0][5:]
    assert networks == (run.denoiser, run.policy, run.posterior)
    assert tokens.dtype == torch.int64 and tokens.shape == canvas.shape == (3, 20)
    assert settings == (4, 0.2, 1 if orders == "spread" else 2, run.generator)


def test_posterior_and_policy_start_from_the_timetable_found(trained, monkeypatch):
    args = train.parse_args([*map(str, flags(trained)), "--orders", "spread", "--search", "5"])
    run = train.Run(args, small_tokenizer())
    run.begin_orders()
    start = run.posterior.timetable.clone()

    def search(denoiser, tokens, canvas, timetable, passes, generator):
        assert denoiser is run.denoiser and tokens.shape == canvas.shape == (5, 20)
        assert torch.equal(timetable, start) and passes == 40 and generator is run.generator
        return start.flip(0)

    monkeypatch.setattr(spread, "search_timetable", search)
    train.search_orders(run, torch.zeros(5, 20), torch.ones(5, 20).bool())
    assert torch.equal(run.posterior.timetable, start.flip(0))
    assert not torch.equal(start, start.flip(0))
    expected = spread.SpreadPolicy(run.config, start.flip(0))
    assert torch.equal(run.policy.logit, expected.logit)


@pytest.mark.parametrize("share, steps", [(0, 0), (0.3, 2), (None, 3), (1, 6)])
def test_middle_rates_are_the_first_of_stage_1(trained, tmp_path, monkeypatch, share, steps):
    real, seen = mdmvi.mdm_loss, []

    def record(*args):
        seen.append(args[4])
        return real(*args)

    monkeypatch.setattr(mdmvi, "mdm_loss", record)
    given = [] if share is None else ["--middle", share]
    given += ["--order-steps", 1, "--search", 0]  # and so one step of the baseline
    assert call(train, *flags(trained), *given, "--out", tmp_path) == 0
    assert seen == [(0.2, 0.7)] * steps + [(0.0, 1.0)] * (PLAIN - steps + 1)


@pytest.mark.parametrize(
    "more, steps",
    [("", 0), ("--unsure 0.6", 3), ("--unsure 1", 5), ("--unsure 1 --orders spread", 0)],
)
def test_the_policy_is_unsure_in_the_first_steps_of_stage_2(
    trained, tmp_path, monkeypatch, more, steps
):
    real, seen = mdmvi.importance_order_loss, []

    def record(denoiser, policy, *args):
        seen.append(getattr(policy, "func", None) is mdmvi.unsure)
        return real(denoiser, policy, *args)

    monkeypatch.setattr(mdmvi, "importance_order_loss", record)
    start = ["--start", trained / "out" / "plain.pt", "--search", 0]
    assert call(train, *flags(trained), *start, *more.split(), "--out", tmp_path) == 0
    assert seen == [True] * steps + [False] * (ORDER - steps)


def originals():
    """What --compile replaces."""
    return [getattr(owner, name) for owner, name in train.COMPILED]


def test_a_compiled_run_is_the_eager_one(tmp_path, trained, monkeypatch):
    real, calls = torch.compile, []

    def compiled(function, dynamic):
        assert dynamic is None  # on a GPU False: there all shapes are the same in each step
        fast = real(function, backend="eager", dynamic=dynamic)
        return lambda *args: calls.append(function.__name__) or fast(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    before, logs = originals(), []
    short = ["--steps", 2, "--order-steps", 1, "--search", 0]
    for flag in ("--no-compile", "--compile"):
        calls.clear()
        assert call(train, *flags(trained), *short, flag, "--out", tmp_path / flag) == 0
        logs.append([json.loads(x) for x in (tmp_path / flag / "log.jsonl").open()])
    torch._dynamo.reset()
    assert before == originals()
    steps = {row["stage"]: row["step"] for row in logs[1]}
    plain = steps["plain"] + steps["baseline"]  # an order step has two bounds and one posterior
    assert calls.count("step_bound") >= 4 and calls.count("scores") >= 2
    assert calls.count("token_log_prob") >= plain
    for eager, fast in zip(*logs, strict=True):
        assert fast["loss"] == pytest.approx(eager["loss"], rel=1e-4)


@pytest.mark.parametrize("breaks", ["token_log_prob", "step_bound", "scores"])
def test_without_a_compiler_training_goes_on(tmp_path, trained, monkeypatch, capsys, breaks):

    def broken(function, dynamic):
        def fail(*args):
            raise RuntimeError("no compiler")

        return fail if function.__name__ == breaks else function

    monkeypatch.setattr(torch, "compile", broken)
    assert call(train, *flags(trained), "--compile", "--out", tmp_path) == 0
    message = "torch.compile does not work here (RuntimeError)"
    assert capsys.readouterr().err.count(message) == 1  # later stages do not try again
    assert alike(tmp_path / "checkpoint.pt", trained / "out" / "checkpoint.pt")


def test_too_little_memory_is_not_taken_for_a_missing_compiler(
    tmp_path, trained, monkeypatch, capsys
):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    assert call(train, *flags(trained), "--compile", "--out", tmp_path) == 2
    complaint(capsys, "too little memory: lower --batch .*, or raise --accumulate")


def test_nothing_stays_compiled_after_a_stop(tmp_path, trained, monkeypatch):
    before = originals()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *args: function(*args))
    interrupt(monkeypatch, 2)
    assert call(train, *flags(trained), "--compile", "--out", tmp_path) == 130
    assert before == originals()


def test_accumulating_is_the_mean_of_the_parts(trained, monkeypatch):
    args = train.parse_args([*map(str, flags(trained)), "--accumulate", "2"])
    run, steps = train.Run(args, small_tokenizer()), []
    monkeypatch.setattr(mdmvi, "update", lambda *args: steps.append(args))
    weight = run.denoiser.trunk.norm.weight
    parts = iter([(3.0, 0.5), (7.0, 0.1)])

    def loss_of(*args):
        factor, kl = next(parts)
        return factor * weight.sum(), torch.tensor(kl)

    monkeypatch.setattr(train, "stage_loss", loss_of)
    run.step = 3
    total = train.train_step(run, "plain", 9, None, 4, [])
    assert torch.allclose(weight.grad, torch.full_like(weight, 5.0)) and steps == [([], 3, 9)]
    assert total.tolist() == pytest.approx([5 * len(weight), 0.3])


def test_no_bounds_where_no_held_out_problem_fits(trained, tmp_path, monkeypatch, capsys):
    real, long = train.load_problems, {"question": "too long" * 99, "answer": "#### 1"}
    monkeypatch.setattr(train, "load_problems", lambda args: (real(args)[0], [long]))
    assert call(train, *flags(trained), "--out", tmp_path) == 0
    assert "bounds on log p" not in capsys.readouterr().out


@pytest.fixture
def few_problems(monkeypatch):
    """Training sets of the embedded task with 300 problems instead of 60,000."""
    draw = arithmetic.shopping

    def few(n, *args, **kwargs):
        return draw({60_000: 300, 256: 20}.get(n, n), *args, **kwargs)

    monkeypatch.setitem(eval_gsm8k.TASKS, "shopping", few)


def test_the_embedded_task_end_to_end(tmp_path, few_problems, capsys):
    short = [*SHORT, "--size", "tiny", "--problems", 12, "--budget", 3]
    assert call(train, *short, "--optimizer", "adamw", "--out", tmp_path) == 0
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert "bounds on log p at T = 3, 20 problems" in printed
    for row in ("learned +order", "uniform +order", "uniform +baseline"):
        assert re.search(rf"^{row} +-\d+\.\d+ \[", printed, re.MULTILINE)
    assert len(rows) == 1 + 2 * 11 and all(row["problems"] == 12 for row in rows)
    checkpoint = ["--checkpoint", tmp_path / "checkpoint.pt", "--problems", 12, *ON_CPU]
    assert call(eval_gsm8k, *checkpoint, "--json", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == rows
    assert printed.endswith(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# eval_gsm8k.py
# ------------------------------------------------------------------------------------------------


def scored(trained, *args):
    """Arguments that score six problems on the tiny run."""
    data = ["--data", trained / "data.jsonl", "--problems", 6, *ON_CPU]
    return ["--checkpoint", trained / "out" / "checkpoint.pt", *data, *args]


def test_json_is_what_is_printed(trained, tmp_path, capsys):
    more = ["--budget", 2, 3, "--strategies", "iid", "top_prob+eos", "--sweep", 1, 24, "--batch", 4]
    assert call(eval_gsm8k, *scored(trained, *more, "--json", tmp_path / "rows.json")) == 0
    shown, rows = capsys.readouterr(), json.loads((tmp_path / "rows.json").read_text())
    assert shown.out.isascii() and "6 problems" in shown.out
    blocks = shown.out.strip().split("\n\n")
    assert [table_cells(line) for line in blocks[1].split("\n")[1:]] == [
        expected_cells(row) for row in rows
    ]
    rules = ["iid", "top_prob+eos"]
    assert [row["method"] for row in rows] == 2 * ["learned", *rules, *rules] + 2 * rules
    assert all(row["max_steps"] <= row["budget"] for row in rows)
    assert blocks[2] == "learned order, T=2, by number of equations"


def test_prompts_that_do_not_fit_count_as_wrong(trained, tmp_path, capsys):
    rows = [ROWS[0] | {"question": "pens " * 99}, *ROWS[:2]]
    args = scored(trained, "--strategies", "iid", "--json", tmp_path / "rows.json")
    args[args.index("--data") + 1] = put_rows(tmp_path / "long.jsonl", rows)
    assert call(eval_gsm8k, *args) == 0
    assert "1 prompts do not fit and count as wrong" in capsys.readouterr().err
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {row["problems"] for row in found} == {3} and found[0]["min_steps"] > 0
    put_rows(tmp_path / "long.jsonl", rows[:1])
    assert call(eval_gsm8k, *args) == 2
    complaint(capsys, "no prompt fits this model's context: give others, or another --checkpoint")


# ------------------------------------------------------------------------------------------------
# sample.py
# ------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page shows: its text, and the step and text of each token."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "span":
            self.tokens.append([int(dict(attrs)["data-step"]), ""])
        assert not {"src", "href"} & dict(attrs).keys()  # self-contained

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "span":
            self.tokens[-1][1] += data


def test_every_token_is_shown_on_one_line():
    tokenizer = small_tokenizer()
    shown = {text: sample.token_text(tokenizer, 1 + ord(text)) for text in "\x07\x08\t\r\x1b\x7f"}
    assert set(shown.values()) == {"▯"}
    assert sample.token_text(tokenizer, 1 + ord("\n")) == "⏎"
    assert sample.token_text(tokenizer, 201) == "▯"
    assert sample.token_text(tokenizer, tokenizer.eos_id) == "·"
    assert all(sample.token_text(tokenizer, i).isprintable() for i in range(tokenizer.vocab_size))


def test_a_space_before_a_word_is_shown():
    class Llama:
        eos_id, pieces = 0, ["", " a", " b", "c"]

        def encode(self, text):
            return [self.pieces.index(" " + text)]

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids).removeprefix(" ")

    assert [sample.token_text(Llama(), i) for i in range(4)] == ["·", " a", " b", "c"]


def test_what_a_page_shows_is_escaped():
    shown = Page(page.page("<i>a</i> & b", [("<b>x</b>", ["<u>", "&lt;"], [1, 0], 2)]))
    assert shown.tokens == [[1, "<u>"], [0, "&lt;"]]
    assert "<i>a</i> & b" in shown.text and "<b>x</b>" in shown.text


def test_sample_shows_the_order(trained, tmp_path, capsys):
    checkpoint = ["--checkpoint", trained / "out" / "checkpoint.pt", "--budget", 3]
    names = ["learned", "left_to_right", "top_prob+eos"]
    prompt = 'Ann has <b>2</b> pens & "3".'
    more = ["--strategy", *names, "--html", tmp_path / "o.html"]
    assert call(sample, prompt, *checkpoint, *more) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "o.html").read_text(encoding="utf-8")
    assert printed.count("answer:\n") == 3
    steps = dict(re.findall(r"^(\S+), (\d) steps$", printed, re.MULTILINE))
    assert list(steps) == names and steps["left_to_right"] == "3"
    last = [line for line in printed.split("\n") if line.startswith("step 3: ")]
    assert last and not any(line.count("_") for line in last)  # nothing is left hidden
    page = Page(written)
    assert prompt in page.text and len(page.tokens) == 3 * 24
    orders = re.findall(r"^order:  (.*)$", printed, re.MULTILINE)
    shown = [int(part.rpartition(":")[2]) - 1 for line in orders for part in line.split(" ")]
    assert shown == [step for step, _ in page.tokens]
    assert shown[24:48] == sorted(shown[24:48])  # left to right
    assert "http" not in written and "max=3 value=3" in written


def test_sample_reads_standard_input_and_draws_with_a_seed(trained, capsys, monkeypatch):
    args = ["--checkpoint", trained / "out" / "checkpoint.pt", "--strategy", "random"]
    printed = []
    for seed in (0, 0, 1):
        monkeypatch.setattr("sys.stdin", io.StringIO(ROWS[0]["question"] + "\n"))
        assert call(sample, *args, "--temperature", 1.5, "--seed", seed) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2] and "random, 5 steps" in printed[0]


def test_a_prompt_that_is_no_text(trained, tmp_path):
    args = ["--checkpoint", trained / "out" / "checkpoint.pt", "--html", tmp_path / "o.html"]
    assert call(sample, "Ann \udcff", *args) == 0


# ------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, exit code 2, no traceback, nothing overwritten
# ------------------------------------------------------------------------------------------------

TRAIN = "--data {data} --size tiny --max-len 64 --canvas-len 24 --out "
AGAIN = f"{TRAIN} {{out}} --resume {' '.join(SHORT)}"
SCORE = "--checkpoint {good} --data {data} --problems 1 --strategies iid"

BAD = [
    (eval_gsm8k, "--checkpoint no.pt", "no checkpoint at no.pt: give"),
    (eval_gsm8k, "--checkpoint none", "no checkpoint at none: give"),
    (eval_gsm8k, "--checkpoint empty.pt", "damaged or not a checkpoint .*: give"),
    (eval_gsm8k, "--checkpoint cut.pt", "damaged or not a checkpoint .*: give"),
    (eval_gsm8k, "--checkpoint text.pt", "damaged or not a checkpoint .*: give"),
    (eval_gsm8k, "--checkpoint foreign.pt", "damaged or not a checkpoint .*: give"),
    (eval_gsm8k, "--checkpoint tensor.pt", "damaged or not a checkpoint .*: give"),
    (eval_gsm8k, "--checkpoint old.pt", "older version: train again"),
    (eval_gsm8k, "--checkpoint {good}", "trained on --data: give other problems"),
    (eval_gsm8k, "--checkpoint {good} --data no.jsonl", "no data at no.jsonl: give"),
    (eval_gsm8k, "--checkpoint {good} --data empty.jsonl", "empty.jsonl holds no problem: give"),
    (eval_gsm8k, "--checkpoint {good} --data bad.jsonl", "bad.jsonl line 2 is not JSON .*: mend"),
    (eval_gsm8k, "--checkpoint {good} --data bad.json", "bad.json line 3 is not JSON .*: mend"),
    (eval_gsm8k, "--checkpoint {good} --data columns.jsonl", "line 1 has no columns .*: mend"),
    (eval_gsm8k, "--checkpoint {good} --data cut.jsonl.gz", "cannot read cut.jsonl.gz.*; give"),
    (eval_gsm8k, "--checkpoint {good} --data fake.json.gz", "cannot read fake.json.gz.*; give"),
    (eval_gsm8k, "--checkpoint {good} --data fake.json.xz", "cannot read fake.json.xz.*; give"),
    (eval_gsm8k, "--checkpoint {good} --data latin.jsonl", "cannot read latin.jsonl.*UTF-8"),
    (eval_gsm8k, "--checkpoint {good} --data none", "none holds no problem: give"),
    (eval_gsm8k, "--checkpoint {good} --data owner/name", "from the hub .*: go online"),
    (
        eval_gsm8k,
        f"{SCORE} --strategies best",
        "strategies: invalid choice: 'best' .choose from 'iid',",
    ),
    (
        eval_gsm8k,
        f"{SCORE} --strategies iid+eos",
        "strategies: invalid choice: 'iid.eos' .choose from",
    ),
    (eval_gsm8k, f"{SCORE} --device gpu", "--device gpu is not there: choose"),
    (eval_gsm8k, f"{SCORE} --json no/rows.json", "cannot write no/rows.json.*: give"),
    (eval_gsm8k, f"{SCORE} --json none", "cannot write none.*: give"),
    (eval_gsm8k, "--nonsense", "unrecognized arguments: --nonsense .see .* --help"),
    (sample, "hello --checkpoint no.pt", "no checkpoint at no.pt: give"),
    (
        sample,
        "hello --checkpoint {good} --strategy best",
        "strategy: invalid choice: 'best' .choose",
    ),
    (sample, "hello --checkpoint {stage_1}", "has no learned order: give another --strategy"),
    (sample, "{long} --checkpoint {good}", r"prompt has \d+ tokens, .* leaves 40: shorten it"),
    (sample, "{blank} --checkpoint {good}", "prompt is empty: give it"),
    (sample, "--checkpoint {good}", "prompt is empty: give it"),  # nothing on standard input
    (sample, "hello --checkpoint {good} --html no/o.html", "cannot write no/o.html.*: give"),
    (sample, "hello --checkpoint {good} --device cuda:77", "--device cuda:77 is not there: choose"),
    (train, "--size huge", "--size: invalid choice: 'huge' .choose from"),
    (train, "--orders none", "--orders: invalid choice"),
    (train, "--answers none", "--answers: invalid choice"),
    (train, "--device cuda:77", "--device cuda:77 is not there: choose"),
    (train, "--bud 3", "unrecognized arguments"),
    (train, f"{TRAIN} new --max-len 20 --canvas-len 20", "no problem fits: raise"),
    (train, "--batch 4 --accumulate 3", "--accumulate 3 must divide --batch and --order-batch"),
    (train, "--batch 6 --order-batch 4 --accumulate 3", "--accumulate 3 must divide"),
    (train, "--tau 1e-9", "--tau: 1e-09 is not in 1e-06 .. "),
    (
        train,
        "--start {plain} --order-steps 0",
        "--start is for stage 2, and --order-steps 0 .*drop",
    ),
    (train, "--orders spread --order-lr 0", "trains the denoiser only: --order-lr must be above 0"),
    (train, "--middle 1.1", "--middle: 1.1 is not in 0 .. 1"),
    (train, "--unsure 1.1", "--unsure: 1.1 is not in 0 .. 1"),
    (train, f"{TRAIN} new --init x", "cannot read tokenizer.json: put"),
    (train, "--data few.jsonl --out new", "the data has 9 problems: at least 10"),
    (train, f"{TRAIN} new --max-len 8 --canvas-len 4", "no problem fits: raise"),
    (train, f"{TRAIN} file/out", "file/out.: give another file or folder"),
    (train, f"{TRAIN} file", "'file': give another file or folder"),
    (train, f"{TRAIN} /proc/no", "'/proc/no': give another file or folder"),
    (train, f"{TRAIN} {{out}}", "checkpoint.pt exists: pass --resume, or another --out"),
    (train, f"{TRAIN} none --resume", "no checkpoint at none/checkpoint.pt: give the run's --out"),
    (train, f"{AGAIN} --tau 0.2", "has --tau 0.1, not 0.2: give its flags"),
    (train, f"{AGAIN} --size small", "has --size tiny, not small: give its flags"),
    (train, f"{AGAIN} --max-len 65", "has --max-len 64, not 65: give its flags"),
    (train, f"{AGAIN} --seed 1", "has --seed 0, not 1: give its flags"),
    (train, f"{AGAIN} --seed 1 --tau 0.2", "has --seed 0, not 1; --tau 0.1, not 0.2: give its"),
    (train, f"{AGAIN} --orders paper", "--orders runs, not paper: give its flags"),
    (train, f"{AGAIN} --orders spread", "--orders runs, not spread: give its flags"),
    (train, "--batch 2147483648", "--batch: 2147483648 is not in 1 .. 2147483647"),
    (train, "--start=", "--start: it is empty: give a value"),
    (train, "--data=", "--data: it is empty: give a value"),
    (train, f"{AGAIN} --data other.jsonl", "has --data .*, not other.jsonl: give its flags"),
    (train, f"{TRAIN} new --data other.jsonl --start {{plain}}", "another vocabulary: give"),
    (train, f"{TRAIN} new --size small --start {{plain}}", "has --size tiny, not small"),
    (train, f"{TRAIN} new --canvas-len 25 --start {{plain}}", "has --canvas-len 24, not 25"),
    (train, f"{TRAIN} new --start no.pt", "no checkpoint at no.pt: give"),
    (train, f"{TRAIN} new --start cut.pt", "damaged or not a checkpoint .*: give"),
    (train, f"{TRAIN} new --start {{good}}", "is no plain.pt: give"),
    pytest.param(eval_gsm8k, "--checkpoint {good} --data list.json", "list.json"),
    pytest.param(eval_gsm8k, "--checkpoint {good} --data flip.jsonl.gz", "flip"),
    pytest.param(eval_gsm8k, "--checkpoint {good} --data deep.json", "deep"),
    (eval_gsm8k, "--checkpoint {good} --data digits.jsonl", "digits.jsonl line 1 is not JSON"),
    (eval_gsm8k, f"{SCORE} --device meta", "--device meta is not there: choose"),
    (eval_gsm8k, f"{SCORE} --device hpu", "--device hpu is not there: choose"),
    (
        train,
        f"{TRAIN} new --max-len 1000000000000",
        "max-len: 1000000000000 is not in 1 .. 2147483647",
    ),
    *(
        pytest.param(*case, "seed")
        for case in (
            (eval_gsm8k, f"{SCORE} --seed {2**64}"),
            (sample, f"hello --checkpoint {{good}} --seed {2**64}"),
            (train, f"{TRAIN} new --seed {2**64}"),
        )
    ),
]


def make_bad_files(folder, trained):
    checkpoint = (trained / "out" / "checkpoint.pt").read_bytes()
    row, packed = json.dumps(ROWS[0]).encode(), bytearray(gzip.compress(bytes(range(256)) * 9))
    packed[20:40] = b"x" * 20
    files = {
        "empty.pt": b"",
        "cut.pt": checkpoint[: len(checkpoint) // 2],
        "text.pt": b"hello",
        "empty.jsonl": b" \n",
        "bad.jsonl": row + b'\n{"question": oops}\n',
        "bad.json": b"[1,\n2,\n",
        "columns.jsonl": b'{"text": "a"}\n',
        "list.json": b"[]",
        "cut.jsonl.gz": gzip.compress(row)[:-9],
        "fake.json.gz": row,
        "fake.json.xz": row,
        "latin.jsonl": b'{"question": "caf\xe9"}',
        "few.jsonl": (row + b"\n") * 9,
        "flip.jsonl.gz": bytes(packed),
        "deep.json": b"[" * 99_999,
        "digits.jsonl": b'{"question": "Q", "cot": "", "answer": ' + b"1" * 5000 + b"}",
        "file": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    other = [{k: text.replace("pens", "caps") for k, text in r.items()} for r in ROWS]
    put_rows(folder / "other.jsonl", other)
    torch.save({"model": {}}, folder / "foreign.pt")
    torch.save(torch.ones(3), folder / "tensor.pt")
    torch.save({"program": "mdmvi", "version": 1}, folder / "old.pt")
    (folder / "none").mkdir()


@pytest.fixture(scope="module")
def bad_files(trained):
    """A folder with files that are wrong in many ways."""
    (trained / "bad").mkdir()
    make_bad_files(trained / "bad", trained)
    return trained / "bad"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complaint(capsys, *said):
    """The one line that a script wrote on stderr, beside bars; `said` is what it must say."""
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "%|" not in line]
    assert len(lines) == 1, lines
    for text in said:
        assert re.search(text, lines[0]), lines[0]
    return lines[0]


@pytest.mark.parametrize("script, line, says", BAD)
def test_bad_input(trained, bad_files, monkeypatch, capsys, script, line, says):
    monkeypatch.chdir(bad_files)
    monkeypatch.setitem(sys.modules, "datasets", no_network())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = {"good": trained / "out" / "checkpoint.pt", "plain": trained / "out" / "plain.pt"}
    words |= {"data": trained / "data.jsonl", "out": trained / "out"}
    words |= {"stage_1": trained / "stage_1" / "checkpoint.pt", "long": "pens " * 99, "blank": " "}
    before = contents(trained)
    assert call(script, *(word.format(**words) for word in line.split())) == 2
    complaint(capsys, says)
    assert contents(trained) == before
    assert not (bad_files / "new").exists()


@pytest.mark.parametrize(
    "script, line",
    [
        (eval_gsm8k, f"{SCORE} --json no/rows.json"),
        (sample, "a --checkpoint {good} --html no/o.html"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_out_before_the_work(
    trained, bad_files, monkeypatch, capsys, script, line
):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(mdmvi, "generate", None)  # must not be reached
    words = {"good": trained / "out" / "checkpoint.pt", "data": trained / "data.jsonl"}
    assert call(script, *(word.format(**words) for word in line.split())) == 2
    complaint(capsys, "cannot write")


MAY_BE_0 = {"seed", "order_steps", "search", "problems"}  # whole numbers


@pytest.mark.parametrize(
    "name", [f.name for f in fields(train.Args) if type(f.default) in (int, float)]
)
def test_numbers_out_of_range_in_training(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flag, whole = "--" + name.replace("_", "-"), isinstance(getattr(train.Args, name), int)
    values = ["-1", "nan", "inf", "x", ""]
    values += ["1.5", *(["0"] if name not in MAY_BE_0 else [])] if whole else ["-inf"]
    for value in values:
        assert call(train, f"{flag}={value}") == 2
        complaint(capsys, flag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, flags",
    [(eval_gsm8k, ["budget", "sweep", "problems", "batch"]), (sample, ["budget"])],
)
def test_whole_numbers_out_of_range(script, flags, capsys):
    for flag in flags:
        for value in ("0", "-1", "nan", "inf", "1.5", "x", ""):
            assert call(script, f"--{flag}={value}") == 2
            complaint(capsys, f"--{flag}")


NO_NUMBERS = [(sample, "temperature", value) for value in ("-0.1", "nan", "inf", "x")]
NO_NUMBERS += [(script, "seed", text) for script in (sample, eval_gsm8k) for text in ("nan", "x")]


@pytest.mark.parametrize("script, flag, value", NO_NUMBERS)
def test_other_numbers_out_of_range(script, flag, value, capsys):
    assert call(script, f"--{flag}={value}") == 2
    complaint(capsys, f"--{flag}")


def without(key):
    return lambda state: state.pop(key)


def changed(*keys, value):
    """A change of one entry of a checkpoint, by its path."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def narrowed(name):
    """The tensors of one network cut to half of their rows."""
    return lambda state: state.update({name: {k: x[::2] for k, x in state[name].items()}})


DAMAGE = {
    "no config": without("config"),
    "no args": without("args"),
    "no baseline": without("baseline"),
    "args of another type": changed("args", value=5),
    "another width": changed("config", "n_embd", value=64),
    "an unknown field": changed("config", "depth", value=2),
    "unknown orders": changed("args", "orders", value="none"),
    "mask inside the vocabulary": changed("config", "mask_id", value=3),
    "half a denoiser": narrowed("denoiser"),
    "half a policy": narrowed("policy"),
    "half a posterior": narrowed("posterior"),
    "half a baseline": narrowed("baseline"),
    "a denoiser of another type": changed("denoiser", value=[1, 2]),
    "a width that is text": changed("config", "n_embd", value="wide"),
    "no denoiser": without("denoiser"),
    "no tokenizer": without("tokenizer"),
    "no heads": changed("config", "n_head", value=0),
    "fewer pieces": lambda state: state["tokenizer"].pop(),
    "more pieces": lambda state: state["tokenizer"].append(" more"),
    "pieces of another type": changed("tokenizer", value=5),
    "no budget": lambda state: state["args"].pop("budget"),
    "half a step as budget": changed("args", "budget", value=2.5),
    "no tau": lambda state: state["args"].pop("tau"),
    "no data": lambda state: state["args"].pop("data"),
    "no answers": lambda state: state["args"].pop("answers"),
    "tau is nan": changed("args", "tau", value=math.nan),
    "heads that do not fit the width": changed("config", "n_head", value=3),
    "a length that is text": changed("config", "canvas_len", value="x"),
    "half a place": changed("config", "max_len", value=20.5),
    "an empty denoiser": changed("denoiser", value=None),
    "a policy alone": changed("posterior", value=None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_whose_parts_do_not_fit(trained, tmp_path, capsys, name):
    state = state_of(trained / "out" / "checkpoint.pt")
    DAMAGE[name](state)
    torch.save(state, tmp_path / "bad.pt")
    args = scored(trained, "--strategies", "iid")
    args[1] = tmp_path / "bad.pt"
    assert call(eval_gsm8k, *args) == 2
    complaint(capsys, "damaged|does not fit")
    assert call(sample, "Ann", "--checkpoint", tmp_path / "bad.pt") == 2
    complaint(capsys, "damaged|does not fit")


@pytest.mark.parametrize(
    "damage",
    [without("baseline"), without("optimizers"), without("args")]
    + [changed("args", "depth", value=2)]
    + [changed("stage", value="end"), changed("step", value="x"), changed("generator", value=5)]
    + [changed("step", value=math.inf), changed("step", value=-1), changed("step", value=1)]
    + [changed("optimizers", value=[{}]), changed("generator", value=torch.ones(3))]
    + [changed("generator", value=torch.zeros(16, dtype=torch.uint8))],  # as CUDA has it
)
def test_resuming_a_checkpoint_whose_parts_do_not_fit(trained, tmp_path, capsys, damage):
    state = state_of(trained / "out" / "plain.pt")
    damage(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    (tmp_path / "log.jsonl").touch()
    before = contents(tmp_path)
    assert call(train, *flags(trained), "--out", tmp_path, "--resume") == 2
    complaint(capsys, "damaged|does not fit|has other flags")
    assert contents(tmp_path) == before


def test_starting_from_a_run_on_another_device(trained, tmp_path):
    state = state_of(trained / "out" / "plain.pt")
    start = ["--start", trained / "out" / "plain.pt", "--out"]
    assert call(train, *flags(trained), *start, tmp_path / "a") == 0
    state["generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA has it
    torch.save(state, tmp_path / "plain.pt")
    start[1] = tmp_path / "plain.pt"
    assert call(train, *flags(trained), *start, tmp_path / "b") == 0
    assert alike(tmp_path / "a" / "checkpoint.pt", tmp_path / "b" / "checkpoint.pt")


# ------------------------------------------------------------------------------------------------
# Help, and the scripts as processes
# ------------------------------------------------------------------------------------------------

EVAL_FLAGS = {"checkpoint": "out/checkpoint.pt", "batch": 128, "seed": 0}
EVAL_FLAGS |= dict.fromkeys(["data", "budget", "strategies", "problems", "json"])
SAMPLE_FLAGS = {"checkpoint": "out/checkpoint.pt", "temperature": 0.0, "seed": 0, "device": "cpu"}
SAMPLE_FLAGS |= dict.fromkeys(("budget", "html"))


@pytest.mark.parametrize(
    "script, defaults",
    [
        (train, {f.name.replace("_", "-"): f.default for f in fields(train.Args)}),
        (eval_gsm8k, EVAL_FLAGS),
        (sample, SAMPLE_FLAGS),
    ],
)
def test_help_names_every_flag_and_its_default(script, defaults, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    assert call(script, "--help") == 0
    shown = capsys.readouterr().out
    assert script.__doc__.strip().split("\n")[0] in shown
    for flag, default in defaults.items():
        line = re.search(rf"^  --{flag}[ ,].*(\n {{9,}}.*)?", shown, re.MULTILINE)
        assert line and len(re.split("\n|  ", line[0].strip())) > 1, flag
        assert default is None or f"(default: {default})" in line[0], line[0]


def test_help_shows_the_examples_as_they_are_written():
    for script in (train, eval_gsm8k, sample):
        lines = [line for line in script.__doc__.split("\n") if "python " in line]
        assert lines and all(line.startswith("    python ") for line in lines)


def process(*line, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, line)], cwd=FOLDER, **pipes, **options)


def test_bad_input_as_a_process(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets", reason="datasets is not installed")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    no_hub = process("train.py", "--data", "no/body", "--out", tmp_path / "out", env=offline)
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    no_text = ("sample.py", "--checkpoint", trained / "out" / "checkpoint.pt")
    no_text = process(*no_text, stdin=subprocess.PIPE, env=strict)
    no_text.stdin.buffer.write(b"caf\xe9")
    to_safetensors = ["to-safetensors", "absent.pt", str(tmp_path / "absent.st")]
    ended = []  # the examples in this process: each of their own would take seconds to import torch
    for name, line in (("smdm", to_safetensors), ("transformers_train", ["--model", "absent"])):
        file = str(FOLDER / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [file, *line])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(file, run_name="__main__")
        ended.append((stop.value.code, *capsys.readouterr()))
    for run in (no_hub, no_text):
        out, err = run.communicate()
        ended.append((run.returncode, out, err))
    for (code, out, err), says in zip(
        ended,
        (
            "smdm.py: no checkpoint at absent.pt: ",
            "transformers_train.py: the following arguments are required: --data (",
            "train.py: cannot load no/body from the hub (",
            "sample.py: the input is not UTF-8 text (",
        ),
        strict=True,
    ):
        assert code == 2 and not out and err.count("\n") == 1 and err.startswith(says)
    assert not (tmp_path / "absent.st").exists()


def test_a_closed_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    bar = []
    command_line.run_main(lambda: bar.extend(tqdm(range(3))))
    assert bar == [0, 1, 2]


def test_a_file_that_must_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("[]")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == tmp_path)
    assert command_line.writable(str(tmp_path / "new.json")) == str(tmp_path / "new.json")
    for name in ("rows.json", "rows.json/new.json"):
        with pytest.raises(command_line.UserError, match="cannot write"):
            command_line.writable(str(tmp_path / name))


def test_memory_is_kept_for_the_next_step():
    resource = pytest.importorskip("resource", reason="page faults are not counted here")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**20) for _ in range(16)]  # 64 MiB, 16,384 pages
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    command_line.keep_memory()
    assert min(faults() for _ in range(10)) < 1000  # the first find a heap with holes


@pytest.mark.parametrize("library", [lambda name: object(), None])
def test_a_c_library_that_is_not_glibc(monkeypatch, library):
    monkeypatch.setattr(command_line.ctypes, "CDLL", library)
    command_line.keep_memory()


def test_ctrl_c_as_a_process(trained, tmp_path):
    more = ["--steps", 100_000, "--out", tmp_path]
    run = process("train.py", *flags(trained), *more)
    assert "45 problems" in run.stdout.readline()
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130 and "Traceback" not in err
    assert re.search(r"^stopped at plain step \d+; go on with --resume$", err, re.MULTILINE)
    assert state_of(tmp_path / "checkpoint.pt")["step"] > 0


def test_output_survives_a_reader_that_goes_away():
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    started = []
    for body in ("[print(i) for i in range(100_000)]", "print('short')"):
        code = "import sys, types; cuda = types.SimpleNamespace(is_available=bool)\n"
        code += "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"  # it takes seconds
        code += f"from examples import command_line; command_line.run_main(lambda: {body})"
        started.append(process("-c", code, env=env))
        started[-1].stdout.close()
    for run in started:
        assert run.stderr.read() == "" and run.wait() == 141
