"""Tests of examples/runs.py:  python -m pytest examples/test_runs.py"""

import contextlib
import itertools
import math

import pytest
import torch

import mdmvi
from examples import runs


def tiny_config(n_layer=1):
    return mdmvi.ModelConfig(5, 16, n_layer, 2, 8, 12, mask_id=5, eos_id=0)


def randomise(module):
    """Weights from N(0, 0.6), norms around 1; seeds what comes after it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(float("norm" in name), 0.6)
    return module


def problems():
    """Canvases of many sizes and shapes, the first of them empty."""
    torch.manual_seed(0)
    tokens = torch.randint(3, (30, 6))
    return tokens, torch.rand(30, 6) < torch.linspace(0, 1.5, 30)[:, None]


def places(row):
    return row.nonzero().flatten().tolist()


def slow_log_p(denoiser, x, M):
    """log p_theta [N] of each token of x, one row, with the positions M masked."""
    hidden = denoiser(
        torch.tensor([[denoiser.mask_id if i in M else int(t) for i, t in enumerate(x)]])
    )
    log_p = denoiser.logits(hidden[0]).double().log_softmax(1)
    return [log_p[i, t].item() for i, t in enumerate(x)]


def test_run_posterior():
    """log alpha falls by the cut, sigmoid(2 score), at each place of the canvas."""
    tokens, canvas = problems()
    posterior = randomise(runs.RunPosterior(tiny_config(n_layer=2)))
    scores, log_alpha = posterior.scores(tokens, canvas), posterior(tokens, canvas)
    assert scores.shape == (30, 6) and scores.std() > 0.5
    for row in range(30):
        level = 0.0
        for i in range(6):
            if canvas[row, i]:
                level += torch.sigmoid(2 * scores[row, i]).item()
            assert log_alpha[row, i].item() == pytest.approx(-level, abs=1e-5)


def test_a_new_posterior_is_a_soft_front_from_the_left():
    """At tau = 0.1, rho falls to 1 / e in eight places: each step reveals about as many."""
    tokens, canvas = problems()
    log_rho = runs.RunPosterior(tiny_config())(tokens, canvas).diff() / 0.1
    assert torch.allclose(log_rho[canvas[:, 1:]], torch.tensor(-1 / 8), atol=0.01)
    assert (log_rho[~canvas[:, 1:]] == 0).all()


def test_run_posterior_starts_from_the_denoiser():
    model, (tokens, canvas) = mdmvi.Denoiser(tiny_config(n_layer=3)), problems()
    posterior = runs.RunPosterior(model.config).start_from(model)
    theirs = model.trunk.state_dict()
    for name, ours in posterior.trunk.state_dict().items():
        assert torch.equal(ours, theirs[name]) and ours.data_ptr() != theirs[name].data_ptr()
    frozen = [name for name, p in posterior.named_parameters() if not p.requires_grad]
    assert frozen == ["trunk.wte.weight"] and model.trunk.wte.weight.requires_grad
    assert len(posterior.trunk.blocks) == 2 and posterior(tokens, canvas).isfinite().all()


def holed_problems():
    """All solutions of four tokens, on canvases after a prompt or with a hole."""
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)
    canvas = torch.ones_like(tokens).bool()
    canvas[::3, 1] = False
    canvas[::4, 0] = False
    return tokens, canvas


def test_run_log_prob_are_the_log_probabilities_of_runs():
    denoiser, (tokens, canvas) = randomise(mdmvi.Denoiser(tiny_config())), holed_problems()
    values = runs.run_log_prob(denoiser, tokens, canvas)
    assert values.shape == (81, 4, 5)
    for x, on, found in zip(tokens, canvas, values):
        positions = places(on)
        for i in range(len(positions)):
            log_p = slow_log_p(denoiser, x, positions[i:])
            for j in range(i, len(positions) + 1):
                run = sum(log_p[k] for k in positions[i:j])
                assert found[i, j].item() == pytest.approx(run, abs=1e-5)
        assert torch.equal(found[:, len(positions) :], found[:, len(positions) :, None][:, :, 0])


@pytest.mark.parametrize("T, optimism", [(2, 0.0), (3, 0.0), (6, 0.0), (3, 0.7), (6, 10.0)])
def test_cut_loss_is_the_mean_over_all_cuts(T, optimism):
    """And its gradient: every way to cut, with its probability; after T - 1 cuts no more count."""
    denoiser, (tokens, canvas) = randomise(mdmvi.Denoiser(tiny_config())), holed_problems()
    posterior = randomise(runs.RunPosterior(tiny_config(n_layer=2)))
    values, price = runs.run_log_prob(denoiser, tokens, canvas), 0.7
    cut = posterior.scores(tokens, canvas).double().sigmoid()
    total = 0.0
    for row, on in enumerate(canvas):
        positions, mean = places(on), 0.0
        for cuts in itertools.product((0, 1), repeat=len(positions) - 1):
            p = math.prod(
                cut[row, i] if c else 1 - cut[row, i] for i, c in zip(positions[1:], cuts)
            )
            starts = [0, *(k for k, c in enumerate(cuts, 1) if c)][:T]
            ends = [*starts[1:], len(positions)]
            value = sum(values[row, i, j].double() - price for i, j in zip(starts, ends))
            mean = mean + p * ((optimism * value).exp() if optimism else value)
        mean = mean.log() / optimism if optimism else mean
        total = total - mean / len(positions) / len(canvas)
    loss = runs.cut_loss(posterior, tokens, canvas, values, T, optimism, price)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    weights = [p for p in posterior.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(x, weights, retain_graph=True) for x in (total, loss))
    for slow, fast in zip(*gradients):
        assert torch.allclose(slow, fast, rtol=1e-3, atol=1e-5)


def test_search_cuts_finds_where_a_cut_pays(monkeypatch):
    """0 goes with 2, 1 with 3, in pairs: only a cut between the two of a hidden pair pays."""

    class Pairs:
        """Knows a token where its partner is revealed, and nothing else."""

        mask_id, eos_id = 4, 0

        def __call__(self, tokens, place=None):
            partner = torch.tensor([2, 3, 0, 1, 4])[tokens.view(-1, 2, 2).flip(2)].flatten(1)
            hidden = 9.0 * torch.nn.functional.one_hot(partner, 5).float()
            return hidden if place is None else hidden.flatten(0, 1)[place]

        def logits(self, hidden):
            return hidden[..., :4]

    monkeypatch.setattr(runs, "SEARCH_STEPS", 200)  # other tests need fewer
    torch.manual_seed(0)
    first = torch.randint(2, (128, 2))
    tokens = torch.stack((first, first + 2), 2).flatten(1)
    canvas = torch.arange(4).repeat(128, 1) > 0
    canvas[64:, 1] = False  # the second batch has shorter canvases
    posterior, entered, hopes = runs.RunPosterior(tiny_config()), [], []
    cut_loss = runs.cut_loss
    monkeypatch.setattr(runs, "cut_loss", lambda *a: hopes.append(a[5]) or cut_loss(*a))

    @contextlib.contextmanager
    def forward():
        entered.append(torch.is_grad_enabled())
        yield

    groups = mdmvi.parameter_groups(None, None, posterior, posterior_lr=1e-2)
    optimizers, generator = [torch.optim.AdamW(groups)], torch.Generator().manual_seed(0)
    runs.search_cuts(Pairs(), posterior, tokens, canvas, 3, optimizers, generator, forward)
    assert len(entered) == 2 + runs.SEARCH_STEPS
    falling = [10.0 * (1 - step / 150) for step in range(150)]  # optimism: none in the last quarter
    assert hopes == pytest.approx([*falling, *[0.0] * 50])
    cuts = posterior.scores(tokens, canvas).sigmoid()
    assert (cuts[:, 3] > 0.9).all() and (cuts[:64, 2] < 0.1).all()
    with pytest.raises(ValueError, match="budget is 1: with one step there is nothing to cut"):
        runs.search_cuts(None, posterior, tokens, canvas, 1, optimizers)


def test_a_posterior_that_has_learned_the_cuts_draws_the_order():
    """Sure of its cuts, its levels are the steps: q gives the order at small tau."""
    step = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 3], [-1, 0, 1, 1, 1, 1, 2, 2]]).repeat(200, 1)
    canvas, tokens = step >= 0, torch.zeros_like(step)
    posterior = runs.RunPosterior(tiny_config())
    posterior.scores = lambda tokens, canvas: scores
    scores = torch.where(step > step.roll(1, 1).clamp(min=0), 20.0, -20.0)
    log_alpha = posterior(tokens, canvas)
    assert torch.allclose(log_alpha[canvas], -step[canvas].float(), atol=1e-5)
    masked, _ = mdmvi.draw_path(log_alpha, canvas, torch.full((400,), 2), 2, 0.02)
    assert torch.equal(masked, step >= 2)


def test_run_policy():
    """pi is the product of a plain policy's pi over the masked positions, without the first."""
    policy, hidden = randomise(runs.RunPolicy(tiny_config())), torch.randn(3, 6, 8)
    masked = torch.rand(3, 6) < 0.6
    seen = policy.block(hidden)  # what the others hold, too
    u = mdmvi.UnmaskPolicy.forward(policy, seen, masked).double().sigmoid().detach()
    pi = policy(hidden, masked).double().sigmoid()
    for row, i in masked.nonzero().tolist():
        before = [u[row, j].item() for j in range(i + 1) if masked[row, j]]
        assert pi[row, i].item() == pytest.approx(math.prod(before[1:]), rel=1e-4)
    assert (runs.RunPolicy(tiny_config()).outer.bias == 3).all()
    for bias in (-90.0, 90.0):
        torch.nn.init.constant_(policy.outer.bias, bias)
        logits = policy(hidden, masked)
        gradients = torch.autograd.grad(logits[masked].sum(), list(policy.parameters()))
        assert all(x.isfinite().all() for x in (logits[masked], *gradients))
        first = masked & (masked.cumsum(1) == 1)
        assert (logits[masked & ~first] * bias > 0).all() and (logits[first] > 13).all()
