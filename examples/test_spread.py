"""Tests of examples/spread.py:  python -m pytest examples/test_spread.py"""

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
    return mdmvi.Denoiser(config), mdmvi.PlacePolicy(config), spread.SpreadPosterior(config, 4)


def randomise(network):
    torch.manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=1.0)
    return network


def test_spread_ranks():
    assert spread.spread_ranks(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert spread.spread_ranks(5).tolist() == [0, 4, 2, 6, 1]
    assert spread.spread_ranks(1).tolist() == [0]


@pytest.mark.parametrize(
    "budget, canvas_len, parts",
    [
        (4, 8, [{0, 4}, {2, 6}, {1, 5}, {3, 7}]),
        (2, 8, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        (3, 6, [{0, 4}, {2, 1}, {5, 3}]),  # ranks 0 4 2 6 1 5
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


def test_what_x_0_is_moves_a_token():
    tokens, canvas = problems()
    posterior = randomise(spread.SpreadPosterior(tiny_config(), 4))
    scores, log_alpha = posterior.scores(tokens, canvas), posterior(tokens, canvas)
    assert scores.std() > 0.5
    step = [0, 2, 1, 3, 0, 2, 1, 3]
    for row in range(4):
        for place, i in enumerate(canvas[row].nonzero().squeeze(1).tolist()):
            expected = 0.1 * scores[row, i].item() - 0.5 * step[place]
            assert log_alpha[row, i].item() == pytest.approx(expected, abs=1e-5)


def test_the_timetable_is_in_the_checkpoint():
    ours, theirs = (spread.SpreadPosterior(tiny_config(), budget) for budget in (4, 2))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.timetable, ours.timetable)
    assert theirs.timetable.tolist() == [0, 2, 1, 3, 0, 2, 1, 3]


def test_any_canvas_without_canvas_len():
    tokens, _ = problems()
    canvas = torch.ones_like(tokens).bool()
    config = tiny_config(canvas_len=0)
    assert spread.SpreadPosterior(config, 4)(tokens, canvas).isfinite().all()
    hidden = torch.randn(4, 10, 16)
    assert mdmvi.PlacePolicy(config)(hidden, canvas).isfinite().all()


def test_a_timetable_can_be_foretold():
    """Training the policy alone brings KL down; the bound rises by as much."""
    tokens, canvas = problems(rows=8)
    denoiser, policy, posterior = trained = networks()
    posterior.start_from(denoiser)
    found = []
    optimizer = torch.optim.AdamW(mdmvi.parameter_groups(None, policy, None, policy_lr=1e-2))
    for step in range(101):
        generator = torch.Generator().manual_seed(step)
        data = (tokens, canvas, 4, 0.1, 2, generator)
        if step % 100 == 0:
            found.append(mdmvi.order_elbo(*trained, *data).mean().item())
        loss, _ = mdmvi.importance_order_loss(*trained, *data)
        loss.backward()
        mdmvi.update([optimizer], step, 101)
    uniform = mdmvi.uniform_elbo(denoiser, tokens, canvas, 4, 2).mean().item()
    assert found[0] < uniform - 3 and abs(found[1] - uniform) < 1.0


def loss_of(networks, data):
    generator = torch.Generator().manual_seed(0) if data[0].device.type == "cpu" else None
    return mdmvi.importance_order_loss(*networks, *data, 4, 0.1, 2, generator)[0]


def test_a_step_never_waits_for_the_device():
    """A meta tensor has no values: any that the host had to look at would raise."""
    on_meta = [network.to("meta") for network in networks()]
    loss = loss_of(on_meta, [x.to("meta") for x in problems()])
    loss.backward()
    assert loss.is_meta and on_meta[1].count.weight.grad.is_meta


def test_autocast():
    exact, data = loss_of(networks(), problems(rows=64)), problems(rows=64)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(networks(), data).item() == pytest.approx(exact.item(), rel=0.02)
