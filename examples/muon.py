"""Muon (Jordan et al.) for matrices, in fp32 on a CPU: the optimiser of train.py's default run.

    from examples.muon import make_optimizers

torch's own takes the matrices one by one, in bf16 on any device, and many CPUs have no bf16
arithmetic. Here all matrices of one shape go through the iteration together.
"""

import math

import torch


def orthogonalised(matrices):
    """Newton-Schulz iteration on a stack of matrices [n, rows, columns]: singular values near 1."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """groups: as torch's optimisers take them, with "lr", of matrices that all have gradients.

    An update has the size of AdamW's, so that one learning rate serves both (Liu et al., arXiv
    2502.16982).
    """

    def __init__(self, groups):
        super().__init__(groups, {"weight_decay": 0.1, "momentum": 0.95})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {p.shape for p in group["params"]}
            for shape in sorted(shapes):
                self.step_shape([p for p in group["params"] if p.shape == shape], group)

    def step_shape(self, params, group):
        for p in params:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
        on_gpu = nesterov.device.type == "cuda"
        update = orthogonalised(nesterov.bfloat16() if on_gpu else nesterov).float()
        size = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * size)


def make_optimizers(groups, name):
    """A list of optimisers for the groups of `mdmvi.parameter_groups`.

    name "adamw": AdamW alone; "muon": AdamW, and Muon for the matrices in the trunks' blocks.
    """

    def for_muon(named):
        key, p = named
        return name == "muon" and p.dim() == 2 and "blocks." in key

    rest = [{**g, "params": [x for x in g["params"] if not for_muon(x)]} for g in groups]
    matrices = [{**g, "params": [x for x in g["params"] if for_muon(x)]} for g in groups]
    matrices = [g for g in matrices if g["params"]]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return [adamw, Muon(matrices)] if matrices else [adamw]
