"""examples/muon.py beside torch's own Muon, which rounds to bf16 on the way."""

import torch

import mdmvi
from examples.muon import Muon, make_optimizers


def test_the_updates_are_torchs():
    """Two matrices of one shape, one wide and one tall, over three steps of changing gradients."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 4), (6, 4), (4, 8), (9, 4))]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    more = {"nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon([{"params": ours, **options}]), torch.optim.Muon(theirs, **options, **more)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        for optimizer in optimizers:
            optimizer.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() < 0.03 * (p - old).norm()
        with torch.no_grad():  # so that errors do not add up
            for p, q in zip(ours, theirs):
                q.copy_(p)


def test_who_gets_which_parameter():
    denoiser = mdmvi.Denoiser(mdmvi.ModelConfig(5, 8, 1, 2, 8, 16, mask_id=5, eos_id=0))
    groups = mdmvi.parameter_groups(denoiser, None, None)
    names = {id(p): name for name, p in denoiser.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in make_optimizers(groups, "muon")
    )
    assert muon == {f"trunk.blocks.0.{x}.weight" for x in ("qkv", "proj", "w1", "w2", "w3")}
    assert adamw | muon == set(names.values()) and not adamw & muon
    assert len(make_optimizers(groups, "adamw")) == 1
