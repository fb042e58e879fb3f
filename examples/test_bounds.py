"""Tests of examples/bounds.py:  python -m pytest examples/test_bounds.py"""

import itertools
import re

import pytest
import torch

import eval_gsm8k
import mdmvi
from examples import bounds, command_line, gsm8k, spread
from examples.tokenizer import Tokenizer


def tiny_denoiser():
    config = mdmvi.ModelConfig(
        vocab_size=3,
        max_len=5,
        n_layer=1,
        n_head=1,
        n_embd=8,
        n_hidden=8,
        mask_id=3,
        eos_id=0,
    )
    torch.manual_seed(0)
    denoiser = mdmvi.Denoiser(config)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=1.0)
    return denoiser


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", [*bounds.FIXED_RULES, "timetable"])
def test_a_rule_has_one_path_to_each_solution(rule, budget):
    """So the probabilities of all 81 solutions along their paths sum to 1."""
    canvas = torch.tensor([[False, True, True, True, True]]).expand(81, 5)
    tokens = torch.tensor([(1, *x) for x in itertools.product(range(3), repeat=4)])
    data = (tiny_denoiser(), tokens, canvas)
    if rule == "timetable":
        nats = bounds.timetable_bound(*data, torch.tensor([2, 0, 1, 3]) * budget // 4)
    else:
        nats = bounds.rule_bound(*data, rule, budget)
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert nats.exp().std() > 0.001


@pytest.mark.parametrize("rule, early", [("left_to_right", (1, 2)), ("spread", (1, 3))])
def test_rules_by_hand(rule, early):
    """Two places of four in the first of two steps. Spread out, they come as 0 2 1 3."""
    denoiser, tokens = tiny_denoiser(), torch.tensor([[1, 2, 0, 1, 2]])
    canvas, nats, x_s = torch.arange(5)[None] > 0, 0.0, torch.tensor([[1, 3, 3, 3, 3]])
    for places in (early, {1, 2, 3, 4} - set(early)):
        log_p = denoiser.logits(denoiser(x_s))[0].log_softmax(-1)
        for i in places:
            nats += log_p[i, tokens[0, i]].item()
            x_s[0, i] = tokens[0, i]
    if rule == "spread":
        found = bounds.timetable_bound(denoiser, tokens, canvas, spread.equal_parts(4, 2))
    else:
        found = bounds.rule_bound(denoiser, tokens, canvas, rule, 2)
    assert found.item() == pytest.approx(nats, abs=1e-5)


def test_interval():
    mean, low, high = (float(x.strip("[],")) for x in bounds.interval(torch.arange(100.0)).split())
    assert mean == 49.5 and 43.3 < low < 44.4 and 54.6 < high < 55.7  # 1.96 standard errors: 5.66


def test_best_runs():
    """The best of all cuts, each by its own log-probability; canvases of three and four places."""
    denoiser = tiny_denoiser()
    tokens = torch.tensor([(1, *x) for x in itertools.product(range(3), repeat=4)])
    canvas = torch.ones_like(tokens).bool()
    canvas[:, 0] = canvas[::2, 2] = False
    budgets = (1, 2, 3, 4)
    found = [bounds.best_runs(denoiser, tokens, canvas, budget).tolist() for budget in budgets]
    for x, on, *nats in zip(tokens, canvas, *found):
        places, best = on.nonzero().flatten().tolist(), [-float("inf")] * 4
        log_p = []  # of each token, with the places from the i-th on masked
        for i in range(len(places)):
            x_s = x.clone()
            x_s[places[i:]] = 3
            all_log_p = denoiser.logits(denoiser(x_s[None]))[0].log_softmax(-1)
            log_p.append([all_log_p[k, t].item() for k, t in enumerate(x.tolist())])
        for cuts in itertools.product((0, 1), repeat=len(places) - 1):
            starts = [0, *(k for k, cut in enumerate(cuts, 1) if cut)]
            runs = zip(starts, [*starts[1:], len(places)])
            value = sum(log_p[i][k] for i, j in runs for k in places[i:j])
            best = [max(b, value) if len(starts) <= T else b for T, b in zip(budgets, best)]
        assert nats == pytest.approx(best, abs=1e-4)


CHOICES = [(None, None), ("runs", None), ("spread", ["best runs", "spread"])]


@pytest.mark.parametrize("orders, chosen", CHOICES)
def test_the_table(orders, chosen, monkeypatch, capsys):
    config, has_order = tiny_denoiser().config, orders is not None
    args = {"budget": 3 if orders == "spread" else 4, "tau": 0.3, "orders": orders}
    checkpoint = {"args": args, "config": vars(config)}
    networks = eval_gsm8k.make_orders(orders, config, 3) if has_order else (None, None)
    plain = tiny_denoiser() if has_order else None
    if has_order:
        torch.nn.init.normal_(plain.lm_head.weight)
    if orders == "spread":
        networks[1].timetable.copy_(torch.tensor([2, 2, 1, 0, 1]))
    models = eval_gsm8k.Models(tiny_denoiser(), *networks, plain)
    tokens, canvas = torch.tensor([[1, 2, 0, 1, 2]] * 6), torch.arange(5).expand(6, 5) > 0
    canvas[1::2, 4] = False  # canvases of four and three places
    loaded = (checkpoint, Tokenizer([]), models)
    monkeypatch.setattr(eval_gsm8k, "load_checkpoint", lambda *args: loaded)
    monkeypatch.setattr(eval_gsm8k, "pick_problems", lambda *args: [None] * 6)
    monkeypatch.setattr(bounds, "encode_problems", lambda *args: (tokens, canvas, [True] * 6))
    more, on_cpu = ["--strategies", *chosen] if chosen else [], ["--device", "cpu"]
    bounds.main([*on_cpu, "--batch", "4", "--budget", "3", *more])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "bounds on log p at T = 3, 6 problems"
    number = r"(-?[0-9.]+) \[(-?[0-9.]+), (-?[0-9.]+)\]"
    row = re.compile(rf"(\S+(?: runs)?) +(order|baseline|stage 1) +{number}(?: +{number})?")
    names, nats, ahead = [], [], []
    for line in lines[4:]:
        order, model, mean, _, _, more, low, high = row.fullmatch(line).groups()
        names.append((order, model))
        nats.append(float(mean))
        ahead.append(more and [float(x) for x in (more, low, high)])
    learned = [("learned", "order"), ("uniform", "order")] if has_order else []
    other = "baseline" if has_order else "stage 1"
    rules = [(rule, other) for rule in chosen or bounds.ROWS]
    rules += [("searched", other)] if orders == "spread" else []
    assert names == [*learned, ("uniform", other), *rules]
    if orders == "spread":
        for name, timetable in (("spread", [0, 1, 0, 2]), ("searched", [2, 2, 1, 0])):
            exact = bounds.timetable_bound(plain, tokens, canvas, torch.tensor(timetable))
            found = nats[names.index((name, other))]
            assert found == pytest.approx((exact / canvas.sum(1)).mean().item(), abs=1e-4)
        more = ["--strategies", "spread", "--budget", "2"]
        bounds.main([*on_cpu, *more])  # its timetable has other steps
        assert "searched" not in capsys.readouterr().out
    assert ("learned is ahead by" in lines[3]) == has_order
    if not has_order:
        assert not any(ahead)
        return
    generator, exact = torch.Generator().manual_seed(0), []
    for part in zip(tokens.split(4), canvas.split(4)):
        exact.append(mdmvi.order_elbo(*models[:3], *part, 3, 0.3, 4, generator) / part[1].sum(1))
    assert nats[0] == pytest.approx(torch.cat(exact).mean().item(), abs=1e-4)
    assert ahead[0] is None
    for theirs, (more, low, high) in zip(nats[1:], ahead[1:]):
        assert more == pytest.approx(nats[0] - theirs, abs=2e-4) and low <= more <= high


def test_a_frozen_denoiser_is_in_the_table_once(capsys):
    orders = eval_gsm8k.make_orders("paper", tiny_denoiser().config, 3)
    models = eval_gsm8k.Models(tiny_denoiser(), *orders, None)
    tokens, canvas = torch.tensor([[1, 2, 0]] * 4), torch.arange(3).expand(4, 3) > 0
    bounds.print_bounds(models, {"tau": 0.1, "orders": "paper"}, tokens, canvas, 3)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [["learned", "order"], ["uniform", "order"]]


def test_refuses_no_checkpoint(tmp_path):
    with pytest.raises(command_line.UserError, match="no checkpoint"):
        bounds.main(["--checkpoint", str(tmp_path / "none.pt")])


@pytest.mark.parametrize(
    "program, flag", [(bounds, "--data="), (eval_gsm8k, "--data="), (gsm8k, "")]
)
def test_refuses_an_empty_name(program, flag):
    """As of a variable that is not set: it stood for the embedded problems, or this folder."""
    with pytest.raises(command_line.UserError, match="data: it is empty: give a value"):
        program.main([flag])
