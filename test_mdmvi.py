"""Exactness tests of mdmvi.py. Run: python -m pytest test_mdmvi.py

They hold the mathematics to account on problems so small that every order, token and mask can be
enumerated. The enumeration is written anew, in plain loops and float64, and calls nothing of
mdmvi, so that one mistake cannot be on both sides. Random results are compared over many
replicated rows, from fixed seeds: means within five standard errors, distributions by chi-square.
"""

import copy
import functools
import itertools
import math
import os
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mdmvi

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

    def __call__(self, tokens):
        state = (tokens * self.base).sum(1)
        return torch.cat((self.token[state], self.pi[state]), dim=2)

    def logits(self, hidden):
        assert hidden.dim() == 2
        return hidden[:, :-1]

    def policy(self, hidden, masked=None):
        return hidden[..., -1]

    def posterior(self, tokens, canvas):
        """Off the canvas alpha is nearly 1, which must not count."""
        return F.logsigmoid(self.scores(tokens)[:, :, 0]).where(canvas, -1e-3)

    def scores(self, tokens, canvas=None):
        return self.score[(tokens * self.base).sum(1)][:, :, None]

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
    policy, posterior = mdmvi.RunPolicy(8), mdmvi.RunPosterior(denoiser.config)
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
    policy, hidden = randomise(mdmvi.UnmaskPolicy(8, n_layer)), torch.randn(3, 8, generator=rng(0))
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
        return func(*args, **(kwargs or {}))


def on_gpu_path(function, *args):
    with NotOnTheCPU():
        return function(*args)


@pytest.mark.parametrize("canvas_len", [None, 0, 3])
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
            log_p, hidden = call(mdmvi.token_log_prob, toy, X0, masked)
        assert rows.pop() == (2 * (canvas_len or 4) if gpu_path else masked.sum())
        slow = torch.zeros(2, 4, dtype=torch.double)
        for b in range(2):
            M = places(masked[b])
            for i in M:
                slow[b, i] = look(toy, X0[b], M)[0][i, X0[b, i]]
        assert log_p.dtype == torch.float32 and (log_p - slow).abs().max() < 1e-5
        assert torch.equal(hidden, toy(X0.masked_fill(masked, toy.mask_id)))
        weight = torch.randn(2, 4, generator=rng(1))
        fast, exact = (
            torch.autograd.grad(
                (weight * x).sum(), toy.token, materialize_grads=True, allow_unused=True
            )
            for x in (log_p, slow + 0 * toy.token.sum())
        )
        assert torch.allclose(fast[0], exact[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------
# 2. Posterior over orders
# ------------------------------------------------------------------------------------------------


def test_posterior_starts_with_all_scores_alike_and_sees_the_canvas():
    tokens, canvas = problems()
    config = tiny_config(n_layer=3)
    posterior = mdmvi.OrderPosterior(config)
    start = posterior(tokens, canvas)
    assert start.shape == tokens.shape and (start == start[0, 0]).all() and start[0, 0] < 0
    one, many = (
        mdmvi.OrderPosterior(tiny_config(n_layer=1)),
        mdmvi.OrderPosterior(config, n_layer=4),
    )
    assert [len(p.trunk.blocks) for p in (posterior, one, many)] == [2, 1, 4]
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
        log_alpha.exp().double(), masked, mdmvi.log_rho(log_alpha, masked, 0.3)
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
    masked, log_q = mdmvi.draw_path(
        *replicate(20000, log_alpha[None], canvas[None], torch.tensor([steps])), TAU, rng(steps)
    )
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
    masked, log_q = mdmvi.draw_path(log_alpha, canvas, steps, TAU, rng(2))
    assert not (masked & ~canvas).any()
    assert (masked.sum(1) <= (canvas.sum(1) - steps).clamp(min=0)).all()  # at least one a step
    assert torch.equal(masked[steps == 0], canvas[steps == 0]) and (log_q[steps == 0] == 0).all()
    changed = torch.where(torch.arange(400) % 7 == 0, steps, 5 - steps)
    same = changed == steps  # neither the other rows' steps nor the bound on them matter to these
    for bound in (5, 8):
        again = mdmvi.draw_path(log_alpha, canvas, changed, TAU, rng(2), max_steps=bound)
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


def test_plain_loss_spreads_its_masking_rates(monkeypatch):
    shares, canvas = [], torch.arange(8000).expand(4, 8000) >= 2000

    def count(denoiser, tokens, masked):
        assert not (masked & ~canvas).any()
        shares.append(masked.sum(1) / 6000)
        return torch.zeros(4, 8000), None

    monkeypatch.setattr(mdmvi, "token_log_prob", count)
    mdmvi.mdm_loss(None, torch.zeros(4, 8000), canvas, rng(0))
    assert torch.allclose(shares[0].sort().values.diff(), torch.tensor(0.25), atol=0.03)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_order_elbo(T):
    toy, (tokens, canvas) = Toy(), replicate(15000, X0, CANVAS)
    learned = mdmvi.order_elbo(toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 2, rng(T))
    uniform = mdmvi.order_elbo(toy, None, None, tokens, canvas, T, TAU, 2, rng(T))
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
    expected = [-elbo, elbo, kl]
    expected += torch.autograd.grad(-elbo, toy.parameters(), materialize_grads=True)
    samples = []
    for seed in range(40):  # rows of a call are stratified together: standard errors are over calls
        loss, stats = order_loss(
            toy, toy.policy, toy.posterior, tokens, canvas, T, TAU, 6, rng(seed)
        )
        assert not any(value.requires_grad for value in stats.values())
        gradient = torch.autograd.grad(loss, toy.parameters(), materialize_grads=True)
        samples.append((loss, stats["elbo"], stats["kl"], *gradient))
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

    def spy(log_alpha, canvas, steps, *rest, **more):
        seen.append(steps)
        assert torch.equal(log_alpha, certain[0].expand(48, 4))
        assert torch.equal(canvas, CANVAS.repeat(3, 1).repeat_interleave(8, 0))
        return draw_path(log_alpha, canvas, steps, *rest, **more)

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


@pytest.mark.parametrize("order_loss", ORDER_LOSSES)
def test_losses_and_gradients_are_finite_at_the_extremes(order_loss):
    """Scores all alike, or far apart; a policy that is sure; steps with nothing left."""
    toy = Toy()
    for spread, sure in itertools.product((0.0, 100.0), (0.0, 80.0, -80.0)):
        log_alpha = (-1 - spread * torch.arange(4.0).expand(2, 4)).requires_grad_()
        policy = functools.partial(lambda sure, hidden, masked: toy.policy(hidden) + sure, sure)
        posterior = functools.partial(lambda x, *_: x, log_alpha)
        loss, stats = order_loss(toy, policy, posterior, X0, CANVAS, 5, 0.1, 4, rng(0))
        gradients = torch.autograd.grad(loss, (toy.token, toy.pi, log_alpha))
        assert all(x.isfinite().all() for x in (loss, *stats.values(), *gradients))


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


# ------------------------------------------------------------------------------------------------
# 4. Samplers
# ------------------------------------------------------------------------------------------------

RULES = ("top_prob", "top_prob_margin", "entropy", "threshold", "left_to_right")
RANDOM = ("iid", "random", "learned")
EOS_AWARE = [(rule, True) for rule in RULES[:4]]
ALL = [(rule, False) for rule in RULES + RANDOM] + EOS_AWARE


def test_the_list_of_strategies_is_whole():
    assert sorted(mdmvi.STRATEGIES) == sorted(RULES + RANDOM)
    assert sorted(mdmvi.CONFIDENCE_RULES) == sorted(RULES[:4])


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
        "top_prob_margin": lambda i: max(p[i]) - sorted(p[i])[-2],
        "entropy": lambda i: sum(x * math.log(x) for x in p[i] if x > 0),
        "left_to_right": lambda i: -i,
    }[strategy]
    eos = [i for i in M if p[i].index(max(p[i])) == eos_id]
    ranked = sorted((i for i in M if i not in eos), key=score, reverse=True)
    if strategy == "threshold":
        return eos + ranked[:1] + [i for i in ranked[1:] if score(i) > threshold]
    return eos + ranked[: math.ceil(len(ranked) / left)]


@pytest.mark.parametrize("strategy, eos_aware", ALL[: len(RULES)] + EOS_AWARE)
@pytest.mark.parametrize("with_mask", [False, True])
def test_rules_agree_with_slow_ones(strategy, eos_aware, with_mask, monkeypatch):
    """MASK is 3, in the vocabulary (with probability 0) or beyond it."""
    monkeypatch.setattr(mdmvi, "THRESHOLD", 0.6)
    model, (tokens, canvas) = Toy(length=6), problems()
    if with_mask:
        model.logits = lambda hidden: F.pad(hidden[:, :-1], (0, 1), value=-math.inf)
    for budget in (1, 2, 3, 4, 9):
        out = mdmvi.generate(model, tokens, canvas, strategy, budget, eos_aware=eos_aware)
        for row in range(len(tokens)):
            x, M, steps = tokens[row].clone(), places(canvas[row]), 0
            reveal_step = [-1] * len(x)
            while M:
                p, left = look(model, x, M)[0].exp().tolist(), budget - steps
                eos_id = model.eos_id if eos_aware else None
                R = M if left == 1 else slow_rule(strategy, p, M, left, eos_id, 0.6)
                for i in R:
                    x[i], reveal_step[i] = p[i].index(max(p[i])), steps
                M, steps = [i for i in M if i not in R], steps + 1
            assert out.reveal_step[row].tolist() == reveal_step and out.steps[row] == steps
            assert torch.equal(out.tokens[row], x)


@pytest.mark.parametrize("strategy, eos_aware", ALL)
def test_what_every_sampler_promises(strategy, eos_aware):
    (model, policy, _), (tokens, canvas) = tiny_models(mask_id=3), problems()
    given, other = tokens.clone(), tokens.where(~canvas, 2 - tokens)
    for budget, temperature in itertools.product((1, 3, 20), (0.0, 1.0)):
        out, again = (
            mdmvi.generate(
                model, x, canvas, strategy, budget, policy, temperature, rng(1), eos_aware
            )
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
    ):
        with pytest.raises(ValueError, match=word):
            mdmvi.generate(Toy(), X0, CANVAS, strategy, budget)
    for strategy in RULES[4:] + RANDOM:
        with pytest.raises(ValueError, match="eos_aware"):
            mdmvi.generate(Toy(), X0, CANVAS, strategy, 3, Toy().policy, eos_aware=True)


# ------------------------------------------------------------------------------------------------
# 5. Beyond the paper (importance_order_loss and draw_step: see 3)
# ------------------------------------------------------------------------------------------------


def test_order_groups():
    denoiser, policy, posterior = tiny_models()
    posterior.trunk.wte.requires_grad_(False)
    networks = {"denoiser": denoiser, "policy": policy, "posterior": posterior}
    groups = mdmvi.order_groups(denoiser, policy, posterior, 0.1, 0.2, 0.3)
    assert [(g["network"], g["lr"], g["peak"]) for g in groups] == [
        ("denoiser", 0.1, 0.1), ("policy", 0.2, 0.2), ("posterior", 0.3, 0.3)
    ]  # fmt: skip
    for group in groups:
        named = networks[group["network"]].named_parameters()
        assert dict(group["params"]) == {name: p for name, p in named if p.requires_grad}
    assert "trunk.wte.weight" not in dict(groups[2]["params"])
    for frozen in (Toy(), denoiser.requires_grad_(False)):
        names = [g["network"] for g in mdmvi.order_groups(frozen, policy, posterior)]
        assert names == ["policy", "posterior"]


@pytest.mark.parametrize(
    "step, steps, end, share",
    [
        (0, 1000, 0.1, 0.1),  # 1% of the steps to warm up
        (4, 1000, 0.1, 0.5),
        (9, 1000, 0.1, 1.0),
        (0, 50, 0.1, 1.0),
        (250, 1000, 0.0, 0.5 + 0.5 * math.sqrt(0.5)),
        (500, 1000, 0.1, 0.55),
        (500, 1000, 0.0, 0.5),
        (1000, 1000, 0.1, 0.1),
        (1500, 1000, 0.1, 0.1),
    ],
)
def test_update_sets_the_rate_and_clips_each_network_by_itself(step, steps, end, share):
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
    mdmvi.update(optimizers, step, steps, end)
    for parameter, gradient, peak in (
        (large, [0.6, 0.0], 2.0), (other, [0.0, -0.8], 5.0), (small, [0.3, 0.4], 3.0)
    ):  # fmt: skip
        expected = -peak * share * torch.tensor(gradient)
        assert torch.allclose(parameter.detach(), expected, rtol=1e-3, atol=1e-6)
        assert parameter.grad is None
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(5 * share, rel=1e-3)


def test_the_posterior_waits_for_the_policy():
    networks = tiny_models()
    rates = []
    for groups in (mdmvi.order_groups(*networks), mdmvi.order_groups(None, None, networks[2])):
        optimizer = torch.optim.SGD(groups)
        for step in (0, 49, 99, 199):
            for p in networks[2].parameters():
                p.grad = torch.zeros_like(p)
            mdmvi.update([optimizer], step, 1000, 1.0)
            rates.append([g["lr"] / g["peak"] for g in optimizer.param_groups][-1])
    assert rates == pytest.approx([0.005, 0.25, 0.5, 1.0, 0.1, 1.0, 1.0, 1.0])


def test_run_posterior():
    """log alpha falls by SPACING times the cut, sigmoid(2 score), at each place of the canvas."""
    tokens, canvas = problems()
    posterior = randomise(mdmvi.RunPosterior(tiny_config(n_layer=2)))
    scores, log_alpha = posterior.scores(tokens, canvas), posterior(tokens, canvas)
    assert scores.shape == (30, 6, 1) and scores.std() > 0.5
    for row in range(30):
        level = 0.0
        for i in range(6):
            if canvas[row, i]:
                level += mdmvi.RunPosterior.SPACING * torch.sigmoid(2 * scores[row, i, 0]).item()
            assert log_alpha[row, i].item() == pytest.approx(-level, abs=1e-5)


def test_run_posterior_starts_from_the_denoiser():
    model, (tokens, canvas) = tiny_denoiser(n_layer=3), problems()
    posterior = mdmvi.RunPosterior(model.config).start_from(model)
    theirs = model.trunk.state_dict()
    for name, ours in posterior.trunk.state_dict().items():
        assert torch.equal(ours, theirs[name]) and ours.data_ptr() != theirs[name].data_ptr()
    frozen = [name for name, p in posterior.named_parameters() if not p.requires_grad]
    assert frozen == ["trunk.wte.weight"] and model.trunk.wte.weight.requires_grad
    assert len(posterior.trunk.blocks) == 2 and posterior(tokens, canvas).isfinite().all()


def runs_of(canvas, T):
    """Every cut of a row's canvas into at most T runs, as the step of each place."""
    positions = places(canvas)
    for cuts in itertools.product((0, 1), repeat=max(len(positions) - 1, 0)):
        if sum(cuts) < T:
            yield dict(zip(positions, itertools.accumulate(cuts, initial=0)))


def run_score(toy, x0, order, price):
    """log p of each token given what lies before its run, less the price of the cuts."""
    steps = list(order.values())
    cuts = [i for i in range(1, len(steps)) if steps[i] > steps[i - 1]]
    total = -price * sum(1 + i / 4 for i in cuts)
    for s in set(order.values()):
        log_p, _ = look(toy, x0, [i for i in order if order[i] >= s])
        total += sum(log_p[i, x0[i]].item() for i in order if order[i] == s)
    return total


@pytest.mark.parametrize("T, price", [(1, 0.5), (2, 0.5), (3, 0.0), (3, 1.0), (6, 0.2)])
def test_best_runs_are_the_best_of_all(T, price):
    toy = Toy(seed=3)
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)
    canvas = torch.ones_like(tokens).bool()
    canvas[::3, 1] = False  # with a hole
    canvas[::4, 0] = False  # after a prompt
    step = mdmvi.best_runs(toy, tokens, canvas, T, price)
    assert torch.equal(step < 0, ~canvas) and step.max() == (min(T, 4) - 1 if price < 1 else 2)
    for x, on, found in zip(tokens, canvas, step):
        scores = [run_score(toy, x, order, price) for order in runs_of(on, T)]
        order = {i: int(found[i]) for i in places(on)}
        assert order in list(runs_of(on, T))
        assert run_score(toy, x, order, price) == pytest.approx(max(scores), abs=1e-4)
    with pytest.raises(ValueError, match="budget is 0"):
        mdmvi.best_runs(toy, tokens, canvas, 0)


def test_run_loss_is_the_cross_entropy_of_the_cuts():
    tokens, canvas = problems()
    tokens, canvas = tokens[5:], canvas[5:]
    canvas[:, 2] = True
    rising = (torch.rand(canvas.shape, generator=rng(2)) < 0.5).long().cumsum(1)
    step = (rising - rising.masked_fill(~canvas, 9).amin(1, keepdim=True)).masked_fill(~canvas, -1)
    posterior = randomise(mdmvi.RunPosterior(tiny_config(n_layer=2)))
    scores = posterior.scores(tokens, canvas)[:, :, 0].double()
    rows = []
    for row, found in enumerate(step.tolist()):
        last, loss = 0, 0.0
        for i in places(canvas[row]):
            p = scores[row, i].sigmoid()
            loss -= (p if found[i] > last else 1 - p).log()
            last = found[i]
        rows.append(loss / len(places(canvas[row])))
    loss = mdmvi.run_loss(posterior, tokens, canvas, step)
    assert loss.item() == pytest.approx((sum(rows) / len(rows)).item(), rel=1e-5)


def test_a_posterior_that_has_learned_the_cuts_draws_the_order():
    """Sure of its cuts, its levels are SPACING times the steps: q gives the order at small tau."""
    step = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 3], [-1, 0, 1, 1, 1, 1, 2, 2]]).repeat(200, 1)
    canvas, tokens = step >= 0, torch.zeros_like(step)
    posterior = mdmvi.RunPosterior(tiny_config())
    posterior.scores = lambda tokens, canvas: scores[:, :, None]
    scores = torch.where(step > step.roll(1, 1).clamp(min=0), 20.0, -20.0)
    log_alpha = posterior(tokens, canvas)
    assert torch.allclose(log_alpha[canvas], -posterior.SPACING * step[canvas], atol=1e-5)
    masked, _ = mdmvi.draw_path(log_alpha, canvas, torch.full((400,), 2), 0.02, rng(0))
    assert torch.equal(masked, step >= 2)


def test_run_policy():
    """pi is the product of a plain policy's pi over the masked positions up to one."""
    policy, hidden = randomise(mdmvi.RunPolicy(8)), torch.randn(3, 6, 8, generator=rng(0))
    masked = torch.rand(3, 6, generator=rng(1)) < 0.6
    u = mdmvi.UnmaskPolicy.forward(policy, hidden, masked).double().sigmoid()
    pi = policy(hidden, masked).double().sigmoid()
    for row, i in masked.nonzero().tolist():
        before = [u[row, j] for j in range(i + 1) if masked[row, j]]
        assert torch.allclose(pi[row, i], torch.stack(before).prod(), rtol=1e-4)
    assert (mdmvi.RunPolicy(8).outer.bias == 3).all()
    for bias in (-90.0, 90.0):
        torch.nn.init.constant_(policy.outer.bias, bias)
        logits = policy(hidden, masked)
        gradients = torch.autograd.grad(logits[masked].sum(), list(policy.parameters()))
        assert all(x.isfinite().all() for x in (logits[masked], *gradients))
        assert (logits[masked] * bias > 0).all()


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
    optimizer = torch.optim.AdamW(mdmvi.order_groups(*models))
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
    calls.append(lambda g: mdmvi.order_elbo(models[0], None, None, tokens, canvas, 4, TAU, 2, g))
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

    def model(tokens):
        return toy(tokens)

    model.logits, model.mask_id = toy.logits, toy.mask_id
    models = model, toy.policy, toy.posterior
    for loss in LOSSES[:3]:
        assert loss(*models, X0, CANVAS, generator=rng(0)).isfinite()
    assert mdmvi.order_elbo(*models, X0, CANVAS, 3, TAU, 1).isfinite().all()
    for strategy, eos_aware in ALL:
        model.__dict__.pop("eos_id", None)
        if eos_aware:  # only these rules need it
            model.eos_id = toy.eos_id
        out = mdmvi.generate(model, X0, CANVAS, strategy, 3, toy.policy, eos_aware=eos_aware)
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
        for strategy, eos_aware in ALL:
            mdmvi.generate(models[0], tokens, canvas, strategy, 3, models[1], 1.0, None, eos_aware)
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
        for strategy, eos_aware in ALL:
            more = models[1], 1.0, rng(0), eos_aware
            out = mdmvi.generate(models[0], tokens, canvas, strategy, 3, *more)
            assert (out.tokens < 5).all() and torch.equal(out.reveal_step >= 0, canvas)
    assert all(p.dtype == torch.float32 for model in models for p in model.parameters())


SLOW = shutil.which("g++") and os.environ.get("MDMVI_SLOW")


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # what can be captured and differentiated
        pytest.param(
            "inductor",  # all of it, with generated C++
            marks=pytest.mark.skipif(not SLOW, reason="takes a minute and g++: set MDMVI_SLOW=1"),
        ),
    ],
)
def test_compiled_loss_is_the_eager_one(backend):
    models, (tokens, canvas) = tiny_models(), some_problems()
    compiled, results = torch.compile(mdmvi.token_log_prob, backend=backend), []
    weights = list(models[0].parameters())
    for function in (mdmvi.token_log_prob, compiled):
        log_p, _ = function(models[0], tokens, canvas)
        results.append((log_p.detach(), *torch.autograd.grad(log_p.sum(), weights)))
    torch._dynamo.reset()
    for eager, other in zip(*results):
        assert torch.allclose(eager, other, rtol=1e-4, atol=1e-4)


def test_a_pass_on_a_gpu_is_one_graph():
    """fullgraph raises where the capture breaks, as it would where the host needs a value."""
    model, (tokens, canvas) = tiny_denoiser().to("meta"), some_problems()
    compiled = torch.compile(mdmvi.token_log_prob, backend="eager", fullgraph=True)
    assert compiled(model, tokens.to("meta"), canvas.to("meta"))[0].is_meta
    torch._dynamo.reset()


def echoes(n):
    """A prompt of two random tokens, which the canvas of four says twice."""
    prompt = torch.randint(5, (n, 2))
    return prompt.repeat(1, 3), torch.arange(6).expand(n, 6) > 1


def test_the_snippet_in_the_readme_improves_the_bound(tmp_path):
    """It is given a denoiser of width 96 with its config, a batch of n problems and the steps."""
    readme, snippet = Path(__file__).with_name("README.md").read_text(), tmp_path / "snippet.py"
    snippet.write_text(readme.split("\n## Copy it")[1].split("```python\n")[1].split("```")[0])
    config = mdmvi.ModelConfig(5, 16, 1, 2, 96, 96, mask_id=5, eos_id=0)
    torch.manual_seed(0)
    denoiser = mdmvi.Denoiser(config)
    start = (copy.deepcopy(denoiser), mdmvi.RunPolicy(96), mdmvi.RunPosterior(config))
    names = {"config": config, "denoiser": denoiser, "batch": echoes, "steps": 60}
    ran = runpy.run_path(str(snippet), names)
    assert torch.equal(ran["out"].reveal_step >= 0, ran["canvas"])
    assert (ran["out"].tokens < 5).all() and ran["out"].steps.max() <= 5
    tokens, canvas = echoes(200)
    before, after = (
        mdmvi.order_elbo(*networks, tokens, canvas, 5, 0.1, 2, rng(0)).mean().item()
        for networks in (start, ran["networks"])
    )
    assert after > before + 1.0
    print(before, after)
