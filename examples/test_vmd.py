"""Tests of examples/vmd.py:  python -m pytest examples/test_vmd.py

The bounds are held against problems so small that every order can be enumerated, and z integrated
by the trapezoid rule. That is written anew here, in plain loops and float64, and calls nothing of
mdmvi.
Random results are compared over many rows: means within five standard errors, counts by chi-square.
"""

import functools
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import mdmvi
from examples import command_line, vmd

torch.set_num_threads(1)
X0 = torch.tensor([[2, 0, 1, 1], [1, 2, 0, 0]])
CANVAS = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool()  # of unequal length, each with a prompt
EPSILON = torch.linspace(-8, 8, 129, dtype=torch.double)
NORMAL = (-EPSILON.square() / 2).exp() / math.sqrt(2 * math.pi)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def replicate(n, *tensors):
    return [x.repeat(n, *[1] * (x.dim() - 1)) for x in tensors]


class Toy:
    """Denoiser and encoder that look up their answers, an entry a sequence.

    Logits [B, N, 3] move linearly with z [B, 1].
    """

    mask_id, eos_id, latent_dim = 3, 0, 1

    def __init__(self, seed=0):
        g, states = rng(seed), 4**4
        self.base = (1.5 * torch.randn(states, 4, 3, generator=g)).requires_grad_()
        self.slope = (1.5 * torch.randn(states, 4, 3, generator=g)).requires_grad_()
        self.code = (0.7 * torch.randn(states, 2, generator=g)).requires_grad_()

    def state(self, tokens):
        return (tokens * 4 ** torch.arange(4)).sum(1)

    def __call__(self, tokens, z, place=None):
        state = self.state(tokens)
        hidden = self.base[state] + self.slope[state] * z[:, :, None]
        return hidden if place is None else hidden.flatten(0, 1)[place]

    def logits(self, hidden):
        return hidden

    def encoder(self, tokens, canvas=None):
        return self.code[self.state(tokens)].chunk(2, -1)


def orders(canvas, T):
    """All paths as {position: the step that reveals it}, so that M_s = {i: order[i] >= s}."""
    places = canvas.nonzero().flatten().tolist()
    for steps in itertools.product(range(T), repeat=len(places)):
        yield dict(zip(places, steps))


def look(toy, x0, M, z):
    """log p_theta [Z, N, V] on x0 with the positions M masked, for each of z [Z]."""
    x_s = torch.tensor([[toy.mask_id if i in M else int(x) for i, x in enumerate(x0)]])
    return toy(x_s.repeat(len(z), 1), z[:, None]).double().log_softmax(2)


def given_order(toy, x0, order, z):
    """log p(x_0 | r, z), [Z]."""
    log_p = torch.zeros_like(z)
    for i, step in order.items():
        M = [j for j in order if order[j] >= step]
        log_p = log_p + look(toy, x0, M, z)[:, i, x0[i]]
    return log_p


def exact_given(toy, x0, canvas, T, z):
    """log p(x_0 | z) of uniformly random steps, and its bound, [Z]: all orders are alike."""
    log_p = torch.stack([given_order(toy, x0, order, z) for order in orders(canvas, T)])
    return log_p.logsumexp(0) - math.log(len(log_p)), log_p.mean(0)


def exact(toy, x0, canvas, T):
    """log p(x_0 | c), and the VMD bound E_q[bound given z] - E_q[log q(z) - log p(z)]."""
    log_p = exact_given(toy, x0, canvas, T, EPSILON)[0]
    mu, log_var = (x.double().squeeze() for x in toy.encoder(x0[None]))
    z = mu + (log_var / 2).exp() * EPSILON
    bound = exact_given(toy, x0, canvas, T, z)[1]
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
def test_vmd_elbo(T):
    toy = Toy()
    tokens, canvas = replicate(10000, X0, CANVAS)
    samples = vmd.vmd_elbo(toy, tokens, canvas, T, 2, rng(T))
    for row in range(2):
        log_p, bound = exact(toy, X0[row], CANVAS[row], T)
        assert bound < log_p - 0.01
        assert_mean(samples[row::2], bound, precision=0.01)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_loss_and_its_gradient(T):
    toy = Toy(seed=3)
    tokens, canvas = replicate(1000, X0, CANVAS)
    parameters = [toy.base, toy.slope, toy.code]
    bounds = [exact(toy, *row, T)[1] / row[1].sum() for row in zip(X0, CANVAS)]
    loss = -sum(bounds) / 2
    expected = [loss, *torch.autograd.grad(loss, parameters)]
    assert all(gradient.any() for gradient in expected)
    samples = []
    for seed in range(80):
        estimate = vmd.vmd_loss(toy, tokens, canvas, T, rng(seed))
        samples.append((estimate, *torch.autograd.grad(estimate, parameters)))
    for draws, value in zip(zip(*samples), expected):
        assert_mean(torch.stack(draws), value, precision=0.03)


class GaussianToy:
    """One token, log p(0 | z) = -(w z - y)^2 / 2 - c: then z is Gaussian, and the bound tight."""

    mask_id, eos_id, latent_dim = 2, 1, 1
    w, y, c = 1.3, 0.7, 0.2
    mu, var = w * y / (1 + w * w), 1 / (1 + w * w)  # of z given the token 0
    log_p = -c - math.log(1 + w * w) / 2 - y * y / (1 + w * w) / 2

    def __call__(self, tokens, z, place=None):
        self.z = z.double()
        first = -(self.w * self.z - self.y).square() / 2 - self.c
        hidden = torch.stack((first, (-torch.expm1(first)).log()), -1)
        return hidden if place is None else hidden.flatten(0, 1)[place]

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
    samples = vmd.vmd_elbo(toy, tokens, canvas, 1, 1, rng(0)).double()
    assert_mean(samples, toy.log_p - gap, precision=0.01)
    # With log q(z) - log p(z) in place of the KL, each sample of the right one is log p(x_0).
    at_z = (q.log_prob(toy.z) - prior.log_prob(toy.z)).squeeze(1)
    estimate = samples + kl_divergence(q, prior) - at_z
    assert ((estimate - toy.log_p).abs().max() < 1e-4) == (gap < 1e-6)
    losses = [vmd.vmd_loss(toy, tokens, canvas, 1, rng(seed)) for seed in range(10)]
    assert_mean(torch.stack(losses), gap - toy.log_p, precision=0.005)


def test_bad_values():
    toy, z = Toy(), torch.zeros(2, 1)
    for call in (
        lambda: vmd.random_steps_loss(vmd.Given(toy, z), X0, CANVAS, 0),
        lambda: vmd.vmd_loss(toy, X0, CANVAS, 0),
        lambda: vmd.vmd_elbo(toy, X0, CANVAS, 0, 2),
        lambda: vmd.generate(toy, X0, CANVAS, "random", 0),
    ):
        with pytest.raises(ValueError, match="budget is 0"):
            call()
    with pytest.raises(ValueError, match="samples is 0"):
        vmd.vmd_elbo(toy, X0, CANVAS, 2, 0)
    for strategy in ("learned", "best"):
        with pytest.raises(ValueError, match=f"unknown strategy '{strategy}': choose from iid"):
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


def ragged():
    """Problems with canvases of every size, the first of them empty; the first token is the row."""
    canvas = torch.rand(40, 6, generator=rng(1)) < torch.linspace(0, 1.2, 40)[:, None]
    canvas[:, 0] = False
    return torch.arange(40)[:, None].repeat(1, 6), canvas


@pytest.mark.parametrize("strategy", ["iid", "random", "left_to_right", "top_prob"])
def test_a_latent_stays_with_its_row(strategy):
    tokens, canvas = ragged()
    runs = []
    for seed, budget in ((0, 6), (0, 6), (0, 2), (1, 6)):
        model = ShowsLatents()
        out = vmd.generate(model, tokens, canvas, strategy, budget, 1.0, rng(seed))
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
        given = [given_order(toy, x0, order, EPSILON).exp() for order in steps]
        p = torch.trapezoid(NORMAL * sum(given) / len(given), EPSILON)
        probability[tokens] = p.item()
    rows = replicate(40000, X0[1:], CANVAS[1:])
    out = vmd.generate(toy, *rows, "random", T, 1.0, rng(0))
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


@pytest.mark.parametrize("strategy", [*mdmvi.CONFIDENCE_RULES, "left_to_right"])
@pytest.mark.parametrize("budget", [1, 3, 9])
def test_without_its_latent_it_is_generate_of_mdmvi(strategy, budget):
    """Where nothing is left to chance: temperature 0, and a rule that draws nothing."""
    model = tiny_denoiser()
    model.from_z.weight.data.zero_()
    plain = mdmvi.Denoiser(tiny_config())
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens, canvas = ragged()
    tokens = tokens % 5
    ours = vmd.generate(model, tokens, canvas, strategy, budget)
    theirs = mdmvi.generate(plain, tokens, canvas, strategy, budget)
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
    place = torch.tensor([20, 3])
    given = vmd.Given(model, z)(tokens, place)
    assert torch.allclose(given, hidden.flatten(0, 1)[place], atol=1e-5)
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
    before = torch.get_rng_state()
    for draw in (
        lambda g: vmd.vmd_loss(model, tokens, canvas, 3, g).item(),
        lambda g: vmd.vmd_elbo(model, tokens, canvas, 3, 1, g).tolist(),
        lambda g: vmd.generate(model, tokens, canvas, "random", 3, 1.0, g)[0].tolist(),
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
        command_line.run_main(lambda: vmd.main([*map(str, argv), "--device", "cpu"]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_pairs_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vmd, "DRAWN", 500)
    found = []
    for more in (("--data", "d2", "--seed", 1), ("--data", "d2"), ()):
        flags = ("--steps", 4, "--budget", 2, "--latent-dim", 3, "--json", tmp_path / "rows.json")
        code, out, _ = run(capsys, *flags, *more)
        assert code == 0
        found.append(json.loads((tmp_path / "rows.json").read_text()))
    rows = found[2]
    keys = [(row["data"], row["model"], row["temperature"]) for row in rows]
    assert keys == list(itertools.product(("d1", "d2"), ("plain MDM", "VMD"), (1.0, 0.0)))
    assert "500 pairs a row, T=2, 3 latent dimensions" in out
    assert "d1: no bound can be above -2.303" in out
    entropy = -sum(share * math.log(share) for share in SHARES["d2"])
    assert f"d2: no bound can be above {-entropy:.3f}" in out
    assert out.count("plain MDM") == out.count("VMD") == 4
    assert rows[4:] == found[1] != found[0]  # the seed decides, and not what ran before


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
    few = functools.partial(vmd.sudoku.problems, base=20)
    monkeypatch.setattr(vmd.sudoku, "problems", few)
    flags = ("--sudoku", "--steps", 2, "--json", tmp_path / "rows.json")
    code, out, _ = run(capsys, *flags)
    assert code == 0 and "20 held-out puzzles, T=3, 4 latent dimensions" in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    keys = [(row["model"], row["rule"]) for row in rows]
    assert keys == list(itertools.product(("plain MDM", "VMD"), mdmvi.RULES))
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
        command_line.run_main(lambda: vmd.main(flags.split()))
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
