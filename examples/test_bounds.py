"""Tests of examples/bounds.py:  python -m pytest examples/test_bounds.py"""

import itertools

import pytest
import torch

import eval_gsm8k
import mdmvi
from examples import bounds


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
@pytest.mark.parametrize("rule", bounds.RULES)
def test_a_rule_has_one_path_to_each_solution(rule, budget):
    """So the probabilities of all 81 solutions along their paths sum to 1."""
    canvas = torch.tensor([[False, True, True, True, True]]).expand(81, 5)
    tokens = torch.tensor([(1, *x) for x in itertools.product(range(3), repeat=4)])
    nats = bounds.rule_bound(tiny_denoiser(), tokens, canvas, rule, budget)
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert nats.exp().std() > 0.001


def test_left_to_right_by_hand():
    """Two places of four in the first of two steps."""
    denoiser, tokens = tiny_denoiser(), torch.tensor([[1, 2, 0, 1, 2]])
    canvas = torch.tensor([[False, True, True, True, True]])
    first = denoiser.logits(denoiser(torch.tensor([[1, 3, 3, 3, 3]])))[0].log_softmax(-1)
    second = denoiser.logits(denoiser(torch.tensor([[1, 2, 0, 3, 3]])))[0].log_softmax(-1)
    expected = first[1, 2] + first[2, 0] + second[3, 1] + second[4, 2]
    nats = bounds.rule_bound(denoiser, tokens, canvas, "left_to_right", 2)
    assert nats.item() == pytest.approx(expected.item(), abs=1e-5)


def test_interval():
    mean, low, high = (float(x.strip("[],")) for x in bounds.interval(torch.arange(100.0)).split())
    assert mean == 49.5 and 42 < low < 46 and 53 < high < 57  # 1.96 standard errors are 5.7


def test_refuses_a_checkpoint_without_orders(tmp_path, monkeypatch):
    with pytest.raises(eval_gsm8k.UserError, match="no checkpoint"):
        bounds.main(["--checkpoint", str(tmp_path / "none.pt")])
    monkeypatch.setattr(eval_gsm8k, "load_checkpoint", lambda path: {})
    models = eval_gsm8k.Models(tiny_denoiser(), None, None, None)
    monkeypatch.setattr(eval_gsm8k, "build_models", lambda checkpoint, device: models)
    with pytest.raises(eval_gsm8k.UserError, match="no learned order"):
        bounds.main([])
