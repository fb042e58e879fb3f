"""Tests of examples/vmd.py:  python -m pytest examples/test_vmd.py

The bounds are held against problems so small that every order can be enumerated, and z integrated
by the trapezoid rule. That is written anew here, in plain loops and float64, and calls nothing of
mdmvi.
Random results are compared over many rows: means within five standard errors, counts by chi-square.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import eval_gsm8k
import mdmvi
from examples import vmd

torch.set_num_threads(1)
TAU = 0.5
X0 = torch.tensor([[2, 0, 1, 1], [1, 2, 0, 0]])
CANVAS = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()  # of unequal length, each with a prompt
EPSILON = torch.linspace(-8, 8, 129, dtype=torch.double)
NORMAL = (-EPSILON.square() / 2).exp() / math.sqrt(2 * math.pi)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def replicate(n, *tensors):
    return [x.repeat(n, *[1] * (x.dim() - 1)) for x in tensors]


class Toy:
    """Denoiser, policy, posterior and encoder that look up their answers, an entry a sequence.

    Logits and pi move linearly with z [B, 1]. The last entry of a hidden state is the policy's.
    """

    mask_id, eos_id, latent_dim = 3, 0, 1

    def __init__(self, seed=0):
        g, states = rng(seed), 4**4
        self.base = (1.5 * torch.randn(states, 4, 4, generator=g)).requires_grad_()
        self.slope = (1.5 * torch.randn(states, 4, 4, generator=g)).requires_grad_()
        self.score = torch.randn(states, 4, generator=g).requires_grad_()
        self.code = (0.7 * torch.randn(states, 2, generator=g)).requires_grad_()

    def state(self, tokens):
        return (tokens * 4 ** torch.arange(4)).sum(1)

    def __call__(self, tokens, z):
        state = self.state(tokens)
        return self.base[state] + self.slope[state] * z[:, :, None]

    def logits(self, hidden):
        return hidden[..., :3]

    def policy(self, hidden, masked=None):
        return hidden[..., 3]

    def posterior(self, tokens, canvas=None):
        return F.logsigmoid(self.score[self.state(tokens)])

    def encoder(self, tokens, canvas=None):
        return self.code[self.state(tokens)].chunk(2, -1)


def orders(canvas, T):
    """All paths as {position: the step that reveals it}, so that M_s = {i: order[i] >= s}."""
    places = canvas.nonzero().flatten().tolist()
    for steps in itertools.product(range(T), repeat=len(places)):
        yield dict(zip(places, steps))


def look(toy, x0, M, z):
    """(log p_theta [Z, N, V], pi [Z, N]) on x0 with the positions M masked, for each of z [Z]."""
    x_s = torch.tensor([[toy.mask_id if i in M else int(x) for i, x in enumerate(x0)]])
    hidden = toy(x_s.repeat(len(z), 1), z[:, None])
    return hidden[..., :3].double().log_softmax(2), hidden[..., 3].double().sigmoid()


def joint(toy, x0, order, T, z):
    """log p(r | z) and log p(x_0 | r, z), [Z]: step T-1 reveals all that is left."""
    log_order = log_tokens = torch.zeros_like(z)
    for s in range(T):
        M = [i for i in order if order[i] >= s]
        log_p, pi = look(toy, x0, M, z)
        for i in M:
            if s < T - 1:
                log_order = log_order + (pi[:, i] if order[i] == s else 1 - pi[:, i]).log()
            if order[i] == s:
                log_tokens = log_tokens + log_p[:, i, x0[i]]
    return log_order, log_tokens


def q_path(toy, x0, order, T):
    """q(r), from rho_i = (alpha_i / max over M_s of alpha)^(1/tau)."""
    alpha, q = toy.posterior(x0[None])[0].double().exp(), torch.ones((), dtype=torch.double)
    for s in range(T - 1):
        M = [i for i in order if order[i] >= s]
        for i in M:
            rho = (alpha[i] / max(alpha[j] for j in M)) ** (1 / TAU)
            q = q * (rho if order[i] == s else 1 - rho)
    return q


def exact_given(toy, x0, canvas, T, learned, z):
    """(log p(x_0 | z), bound), [Z]: of the learned order, or of uniformly random steps."""
    log_p, bound = [], 0.0
    for order in orders(canvas, T):
        log_order, log_tokens = joint(toy, x0, order, T, z)
        if not learned:
            q = torch.tensor(T ** -float(len(order)), dtype=torch.double)
            log_order = q.log()  # each token picks its step
        else:
            q = q_path(toy, x0, order, T)
        log_p.append(log_order + log_tokens)
        if q > 0:
            bound = bound + q * (log_p[-1] - q.log())
    return torch.stack(log_p).logsumexp(0), bound


def exact(toy, x0, canvas, T, learned):
    """log p(x_0 | c), and the VMD bound E_q[bound given z] - E_q[log q(z) - log p(z)]."""
    log_p = exact_given(toy, x0, canvas, T, learned, EPSILON)[0]
    mu, log_var = (x.double().squeeze() for x in toy.encoder(x0[None]))
    z = mu + (log_var / 2).exp() * EPSILON
    bound = exact_given(toy, x0, canvas, T, learned, z)[1]
    log_q_over_prior = z.square() / 2 - EPSILON.square() / 2 - log_var / 2
    integral = torch.trapezoid(NORMAL * log_p.exp(), EPSILON).log()
    return integral, torch.trapezoid(NORMAL * (bound - log_q_over_prior), EPSILON)


def assert_mean(samples, expected, precision):
    """samples [n, ...] average to `expected` within five standard errors, which are small."""
    samples, expected = samples.detach().double(), torch.as_tensor(expected).detach().double()
    error, scale = samples.std(0) / len(samples) ** 0.5, expected.norm()
    assert error.norm() <= precision * scale, f"no power: {error.norm() / scale:.3g} of the value"
    off = (samples.mean(0) - expected).abs() / (5 * error + 1e-4 * scale + 1e-12)
    assert off.max() < 1, f"{5 * off.max():.1f} standard errors off"


def assert_distribution(outcomes, probability):
    """Chi-square of a list of outcomes against {outcome: probability}; rare ones share a cell."""
    n, counts = len(outcomes), Counter(outcomes)
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)
    assert all(probability.get(outcome, 0) > 0 for outcome in counts), "an outcome that cannot be"
    cells = [(counts[o], n * p) for o, p in probability.items() if n * p >= 10]
    rest = (n - sum(c for c, _ in cells), n - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 10 else []
    free = len(cells) - 1
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    assert statistic < free + 5 * math.sqrt(2 * free), f"chi-square {statistic:.0f} on {free}"


# --------------------------------------------------------------------------------------------------
# Bounds
# --------------------------------------------------------------------------------------------------


def test_latent_and_its_kl():
    mu, log_var = torch.randn(2, 3, generator=rng(0)), torch.randn(2, 3, generator=rng(1))
    q, prior = Normal(mu, (log_var / 2).exp()), Normal(torch.zeros(3), torch.ones(3))
    expected = kl_divergence(q, prior).sum(1)
    assert torch.allclose(vmd.gaussian_kl(mu, log_var), expected, rtol=1e-5)
    assert vmd.gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    codes = replicate(20000, mu, log_var)
    z, kl = vmd.draw_latent(lambda tokens, canvas: codes, None, None, rng(0))
    assert torch.allclose(kl.view(-1, 2), expected.expand(20000, 2), rtol=1e-5)
    z = z.view(-1, 2, 3)
    numeric = q.log_prob(z).sum(2) - prior.log_prob(z).sum(2)
    assert_mean(numeric, expected, precision=0.02)
    assert_mean(z, mu, precision=0.02)
    away, one = (z - mu).double(), torch.eye(3)
    own = away[:, :, :, None] * away[:, :, None]
    assert_mean(own + one, torch.diag_embed(log_var.exp()) + one, precision=0.03)
    other = away[:, :, :, None] * away.flip(1)[:, :, None]  # with the other row
    assert_mean(other + one, one.expand(2, 3, 3), precision=0.03)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_vmd_elbo(learned, T):
    toy = Toy()
    tokens, canvas = replicate(10000, X0, CANVAS)
    models = (toy.policy, toy.posterior) if learned else (None, None)
    samples = vmd.vmd_elbo(toy, *models, tokens, canvas, T, TAU, 2, rng(T))
    for row in range(2):
        log_p, bound = exact(toy, X0[row], CANVAS[row], T, learned)
        assert bound < log_p - 0.01
        assert_mean(samples[row::2], bound, precision=0.01)


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_losses_and_their_gradients(learned, T):
    toy = Toy(seed=3)
    tokens, canvas = replicate(1000, X0, CANVAS)
    parameters = [toy.base, toy.slope, toy.code] + [toy.score] * learned
    bounds = [exact(toy, *row, T, learned)[1] / row[1].sum() for row in zip(X0, CANVAS)]
    loss = -sum(bounds) / 2
    q = Normal(toy.encoder(X0)[0], (toy.encoder(X0)[1] / 2).exp())
    kl = (kl_divergence(q, Normal(0.0, 1.0))[:, 0] / CANVAS.sum(1)).mean()
    expected = [loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)]
    assert all(gradient.any() for gradient in expected[1:4])
    samples = []
    for seed in range(80):
        if learned:
            models = (toy.policy, toy.posterior)
            estimate, stats = vmd.vmd_order_loss(toy, *models, tokens, canvas, T, TAU, 4, rng(seed))
            assert stats["latent_kl"].item() == pytest.approx(kl.item(), rel=1e-4)
            total = (stats["latent_kl"] - stats["elbo"]).item()
            assert estimate.item() == pytest.approx(total, rel=1e-4)
        else:
            estimate = vmd.vmd_loss(toy, tokens, canvas, T, rng(seed))
        gradients = torch.autograd.grad(estimate, parameters, materialize_grads=True)
        samples.append((estimate, *gradients))
    for draws, value in zip(zip(*samples), expected):
        assert_mean(torch.stack(draws), value, precision=0.03)


class GaussianToy:
    """One token, log p(0 | z) = -(w z - y)^2 / 2 - c: then z is Gaussian, and the bound tight."""

    mask_id, eos_id, latent_dim = 2, 1, 1
    w, y, c = 1.3, 0.7, 0.2
    mu, var = w * y / (1 + w * w), 1 / (1 + w * w)  # of z given the token 0
    log_p = -c - math.log(1 + w * w) / 2 - y * y / (1 + w * w) / 2

    def __call__(self, tokens, z):
        self.z = z.double()
        first = -(self.w * self.z - self.y).square() / 2 - self.c
        return torch.stack((first, (-torch.expm1(first)).log()), -1)

    def logits(self, hidden):
        return hidden

    def encoder(self, tokens, canvas):
        mu, log_var = torch.tensor(self.mu), torch.tensor(self.var).log()
        return mu.expand(len(tokens), 1), log_var.expand(len(tokens), 1)


@pytest.mark.parametrize("shift, factor", [(0, 1), (0.3, 1), (0, 2), (0, 0.5), (-0.7, 1)])
def test_bound_is_tight_where_the_encoder_is_right(shift, factor):
    toy = GaussianToy()
    tokens, canvas = torch.zeros(20000, 1).long(), torch.ones(20000, 1).bool()
    likelihood = (-(toy.w * EPSILON - toy.y).square() / 2 - toy.c).exp()
    integral = torch.trapezoid(NORMAL * likelihood, EPSILON).log()
    assert integral.item() == pytest.approx(toy.log_p, abs=1e-9)
    right = Normal(toy.mu, toy.var**0.5)
    toy.mu, toy.var = toy.mu + shift, toy.var * factor
    q, prior = Normal(toy.mu, toy.var**0.5), Normal(0.0, 1.0)
    gap = kl_divergence(q, right)  # what an encoder that is not right loses
    samples = vmd.vmd_elbo(toy, None, None, tokens, canvas, 1, TAU, 1, rng(0)).double()
    assert_mean(samples, toy.log_p - gap, precision=0.01)
    # With log q(z) - log p(z) in place of the KL, each sample of the right one is log p(x_0).
    at_z = (q.log_prob(toy.z) - prior.log_prob(toy.z)).squeeze(1)
    estimate = samples + kl_divergence(q, prior) - at_z
    assert ((estimate - toy.log_p).abs().max() < 1e-4) == (gap < 1e-6)
    losses = [vmd.vmd_loss(toy, tokens, canvas, 1, rng(seed)) for seed in range(10)]
    assert_mean(torch.stack(losses), gap - toy.log_p, precision=0.005)


def test_paths_share_their_latent():
    seen = []

    class Recorder(Toy):
        def __call__(self, tokens, z):
            seen.append((tokens, z))
            return super().__call__(tokens, z)

    toy = Recorder()
    tokens, canvas = replicate(3, X0, CANVAS)
    vmd.vmd_order_loss(toy, toy.policy, toy.posterior, tokens, canvas, 3, TAU, 8, rng(0))
    (_, first), (later, z) = seen  # a pass on the full canvas, then eight paths
    assert len(first.unique()) == 6 and torch.equal(z, first.repeat_interleave(8, 0))
    prompt = later[:, [2, 0]].view(3, 2, 8, 2)  # and the paths are those of the same problem
    assert (prompt[:, 0, :, 0] == X0[0, 2]).all() and (prompt[:, 1, :, 1] == X0[1, 0]).all()


@pytest.mark.parametrize("name, value", [("budget", 0), ("samples", 0), ("paths", 0), ("tau", 0)])
def test_bad_values(name, value):
    toy = Toy()
    models = (toy, toy.policy, toy.posterior, X0, CANVAS)
    if name == "budget":
        with pytest.raises(ValueError, match="budget is 0"):
            vmd.vmd_loss(toy, X0, CANVAS, value)
        with pytest.raises(ValueError, match="budget is 0"):
            vmd.generate(toy, X0, CANVAS, "random", value)
    if name != "samples":
        values = {"budget": 2, "tau": TAU, "paths": 2, name: value}
        with pytest.raises(ValueError, match=f"{name} is 0"):
            vmd.vmd_order_loss(*models, **values)
    if name in ("budget", "samples"):
        values = {"budget": 2, "tau": TAU, "samples": 2, name: value}
        with pytest.raises(ValueError, match=f"{name} is 0"):
            vmd.vmd_elbo(*models, **values)
    for strategy in ("learned", "best"):
        with pytest.raises(ValueError, match=strategy):
            vmd.generate(toy, X0, CANVAS, strategy, 2)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


class ShowsLatents:
    """Notes which z came with which row; a row's number is its first token, in the prompt."""

    mask_id, eos_id, latent_dim = 9999, 0, 2

    def __init__(self):
        self.seen = {}

    def __call__(self, tokens, z):
        for row, latent in zip(tokens[:, 0].tolist(), z.tolist(), strict=True):
            self.seen.setdefault(row, []).append(tuple(latent))
        return torch.zeros(*tokens.shape, 3)

    def logits(self, hidden):
        return hidden

    def policy(self, hidden, masked=None):
        return hidden[..., 0]


def ragged():
    """Problems with canvases of every size, the first of them empty; the first token is the row."""
    canvas = torch.rand(40, 6, generator=rng(1)) < torch.linspace(0, 1.2, 40)[:, None]
    canvas[:, 0] = False
    return torch.arange(40)[:, None].repeat(1, 6), canvas


@pytest.mark.parametrize("strategy", ["learned", "iid", "random", "left_to_right", "top_prob"])
def test_a_latent_stays_with_its_row(strategy):
    tokens, canvas = ragged()
    runs = []
    for seed, budget in ((0, 6), (0, 6), (0, 2), (1, 6)):
        model = ShowsLatents()
        options = (model.policy, 1.0, rng(seed))
        out = vmd.generate(model, tokens, canvas, strategy, budget, *options)
        assert all(len(set(seen)) == 1 for seen in model.seen.values())
        latents = {row: seen[0] for row, seen in model.seen.items()}
        assert len({x for z in latents.values() for x in z}) == 2 * 40
        runs.append((latents, out.tokens.tolist()))
    assert len(set(out.steps.tolist())) > 2  # rows are finished at different times
    assert runs[0] == runs[1] and runs[0][0] == runs[2][0]  # drawn before the first step
    assert not set(runs[0][0].values()) & set(runs[3][0].values())


@pytest.mark.parametrize("T", [1, 2])
def test_distribution_of_tokens(T):
    toy, x0, canvas, probability = Toy(seed=5), X0[1].clone(), CANVAS[1], {}
    for tokens in itertools.product(range(3), repeat=2):
        x0[canvas] = torch.tensor(tokens)
        steps = [{1: 0, 2: 0}] if T == 1 else [{1: 0, 2: 1}, {1: 1, 2: 0}]
        given = [joint(toy, x0, order, T, EPSILON)[1].exp() for order in steps]
        p = torch.trapezoid(NORMAL * sum(given) / len(given), EPSILON)
        probability[tokens] = p.item()
    rows = replicate(40000, X0[1:], CANVAS[1:])
    out = vmd.generate(toy, *rows, "random", T, None, 1.0, rng(0))
    assert_distribution(list(map(tuple, out.tokens[:, canvas].tolist())), probability)


def tiny_config():
    return mdmvi.ModelConfig(5, 16, 2, 2, 8, 12, mask_id=5, eos_id=0)


def tiny_denoiser(latent_dim=2):
    """A LatentDenoiser with weights large enough for probabilities far from uniform."""
    torch.manual_seed(0)
    model = vmd.LatentDenoiser(tiny_config(), latent_dim)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(float(weight.dim() == 1), 0.6)
    return model


@pytest.mark.parametrize("strategy", [*mdmvi.CONFIDENCE_RULES, "left_to_right", "learned"])
@pytest.mark.parametrize("budget", [1, 3, 9])
def test_without_its_latent_it_is_generate_of_mdmvi(strategy, budget):
    """Where nothing is left to chance: temperature 0, and a policy that is sure."""
    model = tiny_denoiser()
    model.from_z.weight.data.zero_()
    plain = mdmvi.Denoiser(tiny_config())
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens, canvas = ragged()
    tokens = tokens % 5

    def policy(hidden, masked):
        return (hidden[..., 0] - 0.8) * 1e6

    ours = vmd.generate(model, tokens, canvas, strategy, budget, policy)
    theirs = mdmvi.generate(plain, tokens, canvas, strategy, budget, policy)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
    assert budget == 1 or len(set(ours.steps.tolist())) > 2


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def test_denoiser_adds_z_to_every_position():
    model, tokens = tiny_denoiser(), torch.randint(6, (3, 9), generator=rng(0))
    plain = mdmvi.Denoiser(tiny_config())
    plain.load_state_dict(model.state_dict(), strict=False)
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, -1.0]])
    hidden = model(tokens, z)
    assert torch.equal(hidden[1], plain(tokens)[1])
    for row in (0, 2):  # a row's own z, as if its embedding had been another
        moved = mdmvi.Denoiser(tiny_config())
        moved.load_state_dict(plain.state_dict())
        moved.trunk.wte.weight.data += model.from_z.weight @ z[row]
        assert torch.allclose(hidden[row], moved(tokens)[row], atol=1e-5)
        assert (hidden[row] != plain(tokens)[row]).any(-1).all()
    names = {name.split(".")[0] for name in model.state_dict().keys() - plain.state_dict().keys()}
    assert names == {"from_z", "encoder"}


def test_encoder_pools_over_the_canvas():
    model = tiny_denoiser()
    tokens = torch.randint(3, (20, 6), generator=rng(0))
    canvas = torch.rand(20, 6, generator=rng(1)) < 0.5
    canvas[:, 3] = True
    mu, log_var = model.encoder(tokens, canvas)
    hidden = model.encoder.trunk(tokens)
    for row in range(20):
        pooled = hidden[row, canvas[row]].mean(0)
        both = model.encoder.out.weight @ pooled + model.encoder.out.bias
        assert torch.allclose(torch.cat((mu[row], log_var[row])), both, atol=1e-5)
    assert mu.shape == log_var.shape == (20, 2)
    for changed in range(6):  # it reads the prompt as well as the canvas
        other = tokens.index_fill(1, torch.tensor([changed]), 4)
        assert (model.encoder(other, canvas)[0] != mu).any(1).all()


def test_seeds():
    model = tiny_denoiser()
    tokens, canvas = ragged()
    tokens, canvas = tokens[20:] % 5, canvas[20:]
    canvas[:, 3] = True
    rest = mdmvi.UnmaskPolicy(8), mdmvi.OrderPosterior(tiny_config())
    before = torch.get_rng_state()
    for draw in (
        lambda g: vmd.vmd_loss(model, tokens, canvas, 3, g).item(),
        lambda g: vmd.vmd_order_loss(model, *rest, tokens, canvas, 3, TAU, 2, g)[0].item(),
        lambda g: vmd.vmd_elbo(model, *rest, tokens, canvas, 3, TAU, 1, g).tolist(),
        lambda g: vmd.generate(model, tokens, canvas, "learned", 3, rest[0], 0.0, g)[0].tolist(),
        lambda g: vmd.draw_pairs("d2", 20, g)[0].tolist(),
    ):
        assert draw(rng(1)) == draw(rng(1)) != draw(rng(2))
    assert torch.equal(torch.get_rng_state(), before)  # every draw is from the generator given


# --------------------------------------------------------------------------------------------------
# Pairs, Sudoku, the command line
# --------------------------------------------------------------------------------------------------

SHARES = {"d1": [0.1] * 10, "d2": [k / 55 for k in range(1, 11)]}


class RiggedPairs:
    """The pair that z picks by the shares of a kind, or digits that are uniform and independent."""

    mask_id, eos_id, latent_dim = 11, 0, 1

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, tokens, z=None):
        assert (tokens == torch.tensor([10, 11, 11])).all()  # both in one step
        hidden = torch.full((*tokens.shape, 11), -math.inf)
        if self.kind is None:
            hidden[..., :10] = 0.0
            return hidden
        limits = torch.tensor(SHARES[self.kind]).cumsum(0)[:-1]
        first = torch.bucketize(torch.special.ndtr(z[:, 0]), limits)
        for place in (1, 2):
            hidden[torch.arange(len(tokens)), place, (first + place - 1) % 10] = 0.0
        return hidden

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("kind", ["d1", "d2"])
def test_pairs_and_their_score(kind):
    tokens, canvas = vmd.draw_pairs(kind, 20000, rng(0))
    pairs = [(10, k, (k + 1) % 10) for k in range(10)]
    assert_distribution(list(map(tuple, tokens.tolist())), dict(zip(pairs, SHARES[kind])))
    assert torch.equal(canvas, torch.tensor([False, True, True]).expand(20000, 3))

    def score(method, rigged):
        return vmd.score_pairs(method, RiggedPairs(rigged), kind, 1, 1.0, 0, "cpu")

    valid, distance = score(vmd.PLAIN, None)
    assert abs(valid - 0.1) < 0.02
    away = sum(max(share - 0.01, 0) for share in SHARES[kind])  # what pairs have above 1 in 100
    assert abs(distance - away) < 0.02
    valid, distance = score(vmd.VMD, kind)
    assert valid == pytest.approx(1) and distance < 0.03
    other = {"d1": "d2", "d2": "d1"}[kind]
    valid, distance = score(vmd.VMD, other)
    assert valid == pytest.approx(1)
    apart = sum(abs(a - b) for a, b in zip(SHARES["d1"], SHARES["d2"])) / 2
    assert abs(distance - apart) < 0.03


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the program."""
    code = 0
    try:
        eval_gsm8k.run_main(lambda: vmd.main([*map(str, argv), "--device", "cpu"]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_pairs_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vmd, "DRAWN", 500)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1)):
        flags = ("--steps", 25, "--budget", 2, "--latent-dim", 3, "--seed", seed, "--json", file)
        code, out, _ = run(capsys, *flags)
        assert code == 0
    rows = json.loads(files[0].read_text())
    keys = [(row["data"], row["model"], row["temperature"]) for row in rows]
    assert keys == list(itertools.product(("d1", "d2"), ("plain MDM", "VMD"), (1.0, 0.0)))
    assert "500 pairs a row, T=2, 3 latent dimensions" in out
    assert "d1: no bound can be above -2.303" in out
    entropy = -sum(share * math.log(share) for share in SHARES["d2"])
    assert f"d2: no bound can be above {-entropy:.3f}" in out
    assert out.count("plain MDM") == out.count("VMD") == 4
    assert files[0].read_text() == files[1].read_text() != files[2].read_text()


def test_a_short_training_learns_something():
    recipe = {**vmd.RECIPES["pairs"], "steps": 60}

    def draw(n, generator):
        return vmd.draw_pairs("d2", n, generator)

    denoiser = vmd.train_denoiser(vmd.PLAIN, recipe, 11, 3, draw, 0, "cpu", "d2")
    tokens, canvas = vmd.draw_pairs("d2", 2000, rng(0))
    bound = vmd.mean_bound(vmd.PLAIN, denoiser, tokens, canvas, 1, 0)
    entropy = -sum(share * math.log(share) for share in SHARES["d2"])
    assert abs(bound + 2 * entropy) < 0.1  # the best that independent digits can do


def test_sudoku_end_to_end(tmp_path, capsys, monkeypatch):
    pytest.importorskip("examples.sudoku", reason="no examples/sudoku.py")
    monkeypatch.setattr(vmd, "TRAINING", 40)
    monkeypatch.setattr(vmd, "PUZZLES", 20)
    monkeypatch.setattr(vmd, "BOX", (2, 2))
    flags = ("--sudoku", "--steps", 2, "--json", tmp_path / "rows.json")
    code, out, _ = run(capsys, *flags)
    assert code == 0 and "20 held-out puzzles, T=3, 4 latent dimensions" in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    keys = [(row["model"], row["rule"]) for row in rows]
    assert keys == list(itertools.product(("plain MDM", "VMD"), vmd.RULES))
    assert all(0 <= row["solved"] <= 1 and row["bound"] < 0 for row in rows)


def one_line(result, *words):
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--data d3", "d3"),
        ("--data d1 --sudoku", "--data"),
        ("--latent-dim 0", "--latent-dim"),
        ("--budget 0", "--budget"),
        ("--steps -1", "--steps"),
        ("--steps many", "many"),
        ("--seed -1", "--seed"),
        ("--device nowhere", "nowhere"),
        ("--json missing/rows.json", "missing"),
        ("--pairs d1", "--pairs"),
    ],
)
def test_bad_input_is_one_line(flags, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = 0, "", ""
    with pytest.raises(SystemExit) as stop:
        eval_gsm8k.run_main(lambda: vmd.main(flags.split()))
    code, (out, err) = stop.value.code, capsys.readouterr()
    one_line((code, out, err), word)


def test_a_loss_that_is_no_number_stops(capsys, tmp_path, monkeypatch):
    def broken(denoiser, tokens, canvas, budget, generator):
        return vmd.random_steps_loss(denoiser, tokens, canvas, budget, generator) * math.nan

    monkeypatch.setattr(vmd, "PLAIN", vmd.PLAIN._replace(loss=broken))
    code, out, err = run(capsys, "--steps", 30, "--json", tmp_path / "rows.json")
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert "loss is nan at step 20" in last and "--seed" in last
    assert not (tmp_path / "rows.json").exists()
