"""Tests of examples/spread.py:  python -m pytest examples/test_spread.py"""

import itertools

import pytest
import torch

import mdmvi
from examples import spread


def tiny_config(canvas_len=8):
    return mdmvi.ModelConfig(
        vocab_size=3,
        max_len=10,
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_hidden=16,
        mask_id=3,
        eos_id=0,
        canvas_len=canvas_len,
    )


def problems(rows=4, canvas_len=8):
    """Solutions after prompts of one or two tokens; the rest lies behind the canvas."""
    torch.manual_seed(0)
    tokens = torch.randint(3, (rows, 10))
    start = 1 + torch.arange(rows)[:, None] % 2
    place = torch.arange(10)
    return tokens, (place >= start) & (place < start + canvas_len)


def networks():
    torch.manual_seed(0)
    config = tiny_config()
    posterior = spread.SpreadPosterior(config, 4)
    policy = spread.SpreadPolicy(config, posterior.timetable)
    return mdmvi.Denoiser(config), policy, posterior


def randomise(network):
    torch.manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=1.0)
    return network


def test_equal_parts():
    assert spread.equal_parts(8, 8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert spread.equal_parts(8, 4).tolist() == [0, 2, 1, 3, 0, 2, 1, 3]
    assert spread.equal_parts(5, 9).tolist() == [0, 3, 2, 4, 1]
    assert spread.equal_parts(5, 2).tolist() == [0, 1, 0, 1, 0]
    assert spread.equal_parts(1, 3).tolist() == [0]


@pytest.mark.parametrize(
    "budget, canvas_len, parts",
    [
        (4, 8, [{0, 4}, {2, 6}, {1, 5}, {3, 7}]),
        (2, 8, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        (3, 6, [{0, 4}, {2, 1}, {5, 3}]),  # ranks 0 4 2 6 1 5
        (9, 3, [{0}, {2}, {1}]),
    ],
)
def test_it_starts_as_a_timetable_of_equal_parts(budget, canvas_len, parts):
    """Whatever the text and the prompt: places count from the start of the canvas."""
    tokens, canvas = problems(canvas_len=canvas_len)
    posterior = spread.SpreadPosterior(tiny_config(canvas_len), budget)
    masked, log_alpha = canvas, posterior(tokens, canvas)
    for part in parts:
        log_rho = mdmvi.reveal_log_prob(log_alpha, masked, tau=0.01)  # sharp: rho is 0 or 1
        reveal = masked & (log_rho > -1)
        for row, on in zip(reveal, canvas):
            places = on.nonzero().squeeze(1).tolist()
            assert {places.index(i) for i in row.nonzero().squeeze(1).tolist()} == part
        masked = masked & ~reveal
    assert not masked.any()


def test_log_alpha_is_minus_the_step():
    tokens, canvas = problems()
    log_alpha = spread.SpreadPosterior(tiny_config(), 4)(tokens, canvas)
    for row, on in zip(log_alpha, canvas):
        assert row[on].tolist() == [0, -20, -10, -30, 0, -20, -10, -30]


def test_the_timetable_is_in_the_checkpoint():
    ours, theirs = (spread.SpreadPosterior(tiny_config(), budget) for budget in (4, 2))
    policies = [spread.SpreadPolicy(tiny_config(), x.timetable) for x in (ours, theirs)]
    assert not torch.equal(policies[0].logit, policies[1].logit)
    policies[1].load_state_dict(policies[0].state_dict())
    assert torch.equal(policies[0].logit, policies[1].logit)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.timetable, ours.timetable)
    assert theirs.timetable.tolist() == [0, 2, 1, 3, 0, 2, 1, 3]


def test_any_canvas_without_canvas_len():
    tokens, _ = problems()
    canvas = torch.ones_like(tokens).bool()
    config = tiny_config(canvas_len=0)
    posterior = spread.SpreadPosterior(config, 4)
    assert posterior(tokens, canvas).isfinite().all()
    policy = spread.SpreadPolicy(config, posterior.timetable)
    assert policy(torch.randn(4, 10, 16), canvas).isfinite().all()


def test_the_policy_says_what_the_timetable_says():
    """Whatever the hidden states are: so KL is next to nothing."""
    tokens, canvas = problems()
    _, policy, posterior = networks()
    hidden, masked = 5 * torch.randn(4, 10, 16), canvas
    for part in ({0, 4}, {2, 6}, {1, 5}, {3, 7}):
        pi = policy(hidden, masked).sigmoid()
        for row, on, left in zip(pi, canvas, masked):
            for place, i in enumerate(on.nonzero().squeeze(1).tolist()):
                if left[i]:
                    assert abs(row[i].item() - (place in part)) == pytest.approx(4.54e-5, abs=1e-6)
        masked = masked & (pi < 0.5)
    assert not masked.any()
    for tau in (0.05, 0.1, 1.0):
        generator = torch.Generator().manual_seed(0)
        _, kl = mdmvi.importance_order_loss(*networks(), tokens, canvas, 4, tau, 2, generator)
        assert 0 <= kl.item() < 0.001


def test_where_a_part_is_not_done_its_rest_comes_next():
    """Seven of eight are left: their ranks stand for places 0 .. 6, of which 0 and 4 are due."""
    _, policy, posterior = networks()
    masked = torch.arange(10)[None] < 7
    pi = policy(torch.randn(1, 10, 16), masked).sigmoid()
    assert [round(x, 2) for x in pi[0, :7].tolist()] == [1, 0, 0, 0, 1, 0, 0]
    policy.follow(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    five = torch.arange(10)[None] < 5  # taken as places 0, 1, 3, 4, 6
    pi = policy(torch.randn(1, 10, 16), five).sigmoid()
    assert [round(x, 2) for x in pi[0, :5].tolist()] == [1, 1, 1, 0, 0]
    policy.follow(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]))
    pi = policy(torch.randn(1, 10, 16), masked).sigmoid()
    assert [round(x, 2) for x in pi[0, :7].tolist()] == [0, 1, 1, 1, 1, 1, 1]


def solution_log_prob(denoiser, tokens, canvas, timetable):
    """sum_i log p_theta(x^i | what earlier steps reveal), nats, from logits of every position."""
    total, steps = 0.0, range(int(timetable.max()) + 1)
    for row, on in zip(tokens, canvas):
        places = on.nonzero().squeeze(1)
        for s in steps:
            x = row.clone()
            x[places[timetable >= s]] = 3  # MASK
            log_p = denoiser.logits(denoiser(x[None])[0]).log_softmax(-1)
            total += sum(log_p[i, row[i]].item() for i in places[timetable == s])
    return total


@torch.no_grad()
def test_no_swap_betters_the_timetable_that_the_search_ends_with():
    denoiser, _, posterior = networks()
    randomise(denoiser)
    tokens, canvas = problems(rows=6)
    start, generator = posterior.timetable, torch.Generator().manual_seed(0)
    assert torch.equal(spread.search_timetable(denoiser, tokens, canvas, start, 4), start)
    found = spread.search_timetable(denoiser, tokens, canvas, start, 404, generator)
    assert start.tolist() == [0, 2, 1, 3, 0, 2, 1, 3] and sorted(found) == sorted(start)
    best = solution_log_prob(denoiser, tokens, canvas, found)
    assert best > solution_log_prob(denoiser, tokens, canvas, start) + 1
    many = [x.repeat(11, 1) for x in (tokens, canvas)]  # more than go through a pass together
    timetables = []
    for data in ((tokens, canvas), many):
        generator = torch.Generator().manual_seed(0)
        timetables.append(spread.search_timetable(denoiser, *data, start, 64, generator))
    assert torch.equal(*timetables) and not torch.equal(timetables[0], start)
    for a, b in itertools.combinations(range(8), 2):
        if abs(found[a] - found[b]) == 1:
            other = found.clone()
            other[a], other[b] = found[b], found[a]
            assert solution_log_prob(denoiser, tokens, canvas, other) < best + 1e-4


def test_the_bound_is_that_of_the_timetable():
    denoiser, policy, posterior = networks()
    randomise(denoiser)
    tokens, canvas = problems()
    generator = torch.Generator().manual_seed(0)
    bound = mdmvi.order_elbo(denoiser, policy, posterior, tokens, canvas, 4, 0.1, 9, generator)
    exact = solution_log_prob(denoiser, tokens, canvas, posterior.timetable)
    assert bound.sum().item() == pytest.approx(exact, rel=0.002)


def test_a_search_needs_canvases_of_one_length():
    denoiser, _, posterior = networks()
    tokens, canvas = problems()
    canvas[0, 5:] = False
    with pytest.raises(ValueError, match="each canvas must have 8 places"):
        spread.search_timetable(denoiser, tokens, canvas, posterior.timetable, 9)


def loss_of(networks, data):
    generator = torch.Generator().manual_seed(0) if data[0].device.type == "cpu" else None
    return mdmvi.importance_order_loss(*networks, *data, 4, 0.1, 2, generator)[0]


def test_a_step_never_waits_for_the_device():
    """A meta tensor has no values: any that the host had to look at would raise."""
    on_meta = [network.to("meta") for network in networks()]
    loss = loss_of(on_meta, [x.to("meta") for x in problems()])
    loss.backward()
    assert loss.is_meta and on_meta[0].lm_head.weight.grad.is_meta


def test_autocast():
    trained, data = networks(), problems(rows=64)
    exact = loss_of(trained, data)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(trained, data).item() == pytest.approx(exact.item(), rel=0.02)
