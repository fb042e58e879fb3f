"""Peaks of memory of both training stages and of the samplers, computed without a GPU.

    python -m examples.memory                  # the model of the default run
    python -m examples.memory --paper          # 170M, the paper's shape, and its hours

Fake tensors have shapes but no numbers, so any size runs on any machine.
"""

import copy
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mdmvi
import train
from examples import benchmark
from examples.command_line import aligned, run_main
from examples.muon import make_optimizers

SCORED = 128  # problems scored together


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, in `bytes`, and their `peak`.

    A fake tensor does not know how many places a mask has: they are taken to be the canvas.
    """

    def __init__(self, flags):
        super().__init__()
        self.flags, self.bytes, self.peak, self.seen = flags, 0, 0, weakref.WeakSet()

    def places(self, mask):
        flat = mask.numel()
        if flat == SCORED:  # of rows, not of tokens: in scoring alone
            return flat
        return flat * self.flags.canvas_len // self.flags.max_len

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "nonzero":
            out = args[0].new_empty((self.places(args[0]), args[0].dim()), dtype=torch.long)
        elif name == "index" and args[1][0] is not None and args[1][0].dtype == torch.bool:
            rest = args[0].shape[args[1][0].dim() :]
            out = args[0].new_empty((self.places(args[1][0]), *rest))
        else:
            out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            size = storage.nbytes()
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.bytes -= size


def flash(q, k, v):
    """Attention as a GPU keeps it in memory; fake tensors would be given one with a matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def peak_bytes(run, flags, accumulate, function):
    """Peak of function(a copy of run, data), with the networks."""
    names, fake = ("denoiser", "policy", "posterior"), copy.copy(run)
    fake.args = benchmark.make_args(flags, accumulate, "cpu")
    networks = {name: copy.deepcopy(getattr(run, name)) for name in names}
    attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, flash
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Live(flags) as live:
            for name, network in networks.items():
                setattr(fake, name, network.to_empty(device="cpu"))
            function(fake, benchmark.random_data(flags, run.device))
    finally:
        F.scaled_dot_product_attention = attention
    return live.peak


def training(stage):
    """For `peak_bytes`: an update for the state of the optimiser, then all that a step holds."""

    def two_updates(run, data):
        groups, steps, n = train.stage_groups(run, stage)
        optimizers, parts = make_optimizers(groups, run.args.optimizer), run.args.accumulate
        for part in range(2 if parts == 1 else 3):  # a third micro-batch is no more than the second
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = train.stage_loss(run, stage, data, n // parts)
            loss.backward()
            del loss
            if part != 1 or parts == 1:
                mdmvi.update(optimizers, steps // 2, steps)

    return two_updates


def scoring(strategy, temperature):
    """For `peak_bytes`: SCORED problems together."""

    def sample(run, data):
        tokens, canvas = (x[:SCORED] for x in data)
        options = {"policy": run.policy, "temperature": temperature}
        mdmvi.generate(run.denoiser, tokens, canvas, strategy, run.args.budget, **options)

    return sample


def print_memory(run, flags):
    """Peaks of everything at this shape, and the paper's 45,000 + 15,000 steps in FLOP."""
    problems, rows = run.args.order_batch, [("peak, GiB; accumulate:", "1", "2", "4", "8")]
    for stage in benchmark.STAGES:
        parts = [n for n in (1, 2, 4, 8) if problems % n == 0]
        cells = [f"{peak_bytes(run, flags, n, training(stage)) / 2**30:.1f}" for n in parts]
        rows.append((f"{stage} step", *cells, *[""] * (4 - len(cells))))
    for strategy in mdmvi.STRATEGIES:
        for temperature in (0.0, 1.0):
            peak = peak_bytes(run, flags, 1, scoring(strategy, temperature)) / 2**30
            name = f"scoring {SCORED} with {strategy}, temperature {temperature:.0f}"
            rows.append((name, f"{peak:.1f}", *[""] * 3))
    print("computed; the driver and the allocator take about 1 GiB more\n")
    print(aligned(rows))
    flops = flags.batch * benchmark.flops_of(run.config, flags.canvas_len / 2)
    flops *= 45_000 + 2 * 15_000
    print(
        f"\n45,000 plain, 15,000 further and 15,000 order steps: {flops:.2e} FLOP and more, at 40%"
    )
    for name in ("H100", "A100", "RTX 4090"):
        print(f"{name:10s}{flops / (0.4 * benchmark.PEAKS[name]) / 3600:6.1f} hours")


def main(argv=None):
    flags = benchmark.filled(benchmark.shape_parser(__doc__).parse_args(argv))
    run = benchmark.make_run(flags, benchmark.make_args(flags, 1, "cpu"))
    print_memory(run, flags)


if __name__ == "__main__":
    run_main(main)
