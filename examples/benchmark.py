"""Speed of both training stages and of the samplers, on random tokens with new weights.

    python -m examples.benchmark                               # the model of the default run
    python -m examples.benchmark --paper                       # 170M, the paper's shape: for a GPU
    python -m examples.benchmark --paper --batch 8 --against-plain    # beside plain PyTorch

What is compared runs in turn, in one process. Training is timed as train.py does it, sampling in
the precision that eval_gsm8k.py scores in: TF32 on CUDA, fp32 on a CPU.
"""

import os
import time
from argparse import BooleanOptionalAction

import torch
import torch.nn.functional as F
from torch import nn

import mdmvi
import train
from examples.command_line import (
    Parser,
    UserError,
    add_device,
    aligned,
    positive,
    run_main,
    within,
)
from examples.muon import make_optimizers

# Dense bf16 products with fp32 sums, FLOP/s, by a part of the GPU's name; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
DEFAULT = {"size": "mini", "batch": 64, "max_len": 52, "canvas_len": 27, "vocab": 314}
PAPER = {"size": "170m", "batch": 256, "max_len": 256, "canvas_len": 96, "vocab": 32_000}
STAGES = ("plain", "order")
PASSES = 4  # a problem, in a step of stage 2
ORDERS = {"runs": PASSES - 1, "paper": PASSES}  # paths a problem: runs take f_0 beside them


def shape_parser(about):
    """The flags that say what is measured, also those of examples/memory.py."""
    parser = Parser(about)
    add = parser.add_argument
    add("--paper", action="store_true", help="170m, 256 tokens, canvas 96, batch 256, AdamW")
    add("--size", choices=tuple(train.SIZES), help="shape of the model (mini)")
    add("--batch", type=positive, help="sequences in a step of either stage (64)")
    add("--max-len", type=positive, help="tokens in a sequence (52)")
    add("--canvas-len", type=positive, help="tokens of it in the canvas (27)")
    add("--vocab", type=within(2), help="tokens in the vocabulary (314)")
    add("--budget", type=positive, default=5, help="steps of generation")
    add("--orders", choices=ORDERS, default="runs", help="as in train.py; paper: its loss as well")
    return parser


def filled(flags):
    """The flags of `shape_parser`, filled up from --paper or the defaults."""
    for name, value in (PAPER if flags.paper else DEFAULT).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.canvas_len >= flags.max_len:
        raise UserError(f"--canvas-len {flags.canvas_len} must be below --max-len {flags.max_len}")
    if flags.batch % PASSES:
        raise UserError(f"--batch {flags.batch} is no multiple of {PASSES}, a problem's passes")
    return flags


def parse_args(argv=None):
    parser = shape_parser(__doc__)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--accumulate", type=positive, help="micro-batches of a step (1; --paper: 8)")
    add_device(parser)
    add("--compile", action=BooleanOptionalAction, default=gpu, help="torch.compile the steps")
    add("--repeats", type=positive, default=5, help="the best of so many is printed")
    add("--against-plain", action="store_true", help="only a step, beside plain PyTorch")
    flags = filled(parser.parse_args(argv))
    problems = flags.batch // PASSES
    if flags.accumulate is None:
        flags.accumulate = 8 if flags.paper and problems % 8 == 0 else 1
    if problems % flags.accumulate:
        raise UserError(
            f"--accumulate {flags.accumulate} must divide {problems}, a step's problems"
        )
    return flags


def make_args(flags, accumulate, device, compile=False):
    """train.Args of a shape; --paper has the README's recipe."""
    alone = flags.orders == "runs" and flags.budget == 1  # f_0's pass is a problem's only one
    return train.Args(
        size=flags.size,
        max_len=flags.max_len,
        canvas_len=flags.canvas_len,
        batch=flags.batch,
        order_batch=flags.batch // (1 if alone else PASSES),
        orders=flags.orders,
        paths=ORDERS[flags.orders],
        budget=flags.budget,
        optimizer="adamw" if flags.paper else "muon",
        accumulate=accumulate,
        device=device,
        compile=compile,
    )


class RandomTokens:
    """Stands where a tokenizer does when there is no text."""

    eos_id, pieces = 0, ()

    def __init__(self, vocab_size):
        self.vocab_size = self.mask_id = vocab_size


def random_data(flags, device):
    """(tokens, canvas) of 256 random problems, the canvas at the end."""
    tokens = torch.randint(flags.vocab, (256, flags.max_len), device=device)
    place = torch.arange(flags.max_len, device=device).expand(256, -1)
    return tokens, place >= flags.max_len - flags.canvas_len


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def seconds_of(function, device, calls=1):
    """Seconds of a call, with all that it has started on the device; the mean of some in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def in_turn(functions, device, repeats):
    """{name: seconds of a call, the best of `repeats`}, after a first call that does not count.

    On a GPU five calls follow each other without a wait between them, as in training.
    """
    calls = 5 if device.type == "cuda" else 1
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds_of(function, device, calls))
    return {name: min(values) for name, values in times.items()}


def flops_of(config, places):
    """Of a plain step on one sequence: products and attention of the blocks, and at `places` alone
    the end of the last block and the logits."""
    attention = 3 * config.n_embd**2 + 2 * config.n_embd * config.max_len
    end = config.n_embd**2 + 3 * config.n_embd * config.n_hidden
    trunk = config.max_len * (config.n_layer * (attention + end) - end)
    return 6.0 * (trunk + places * (end + config.n_embd * config.vocab_size))


def describe(device):
    """The processor with what limits it, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    limits = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    words = [f"CPU with {torch.backends.cpu.get_cpu_capability()}", *limits]
    return ", ".join([*words, f"{torch.get_num_threads()} threads"])


def make_step(run, stage, data):
    """A function that takes a training step of a stage, half-way through it."""
    groups, steps, n = train.stage_groups(run, stage)
    optimizers = make_optimizers(groups, run.args.optimizer)

    def step():
        run.step = steps // 2
        train.train_step(run, stage, steps, data, n, optimizers)

    return step


def stage_peaks(run, data):
    """{stage: its peak of memory on the GPU, with no other's optimiser}; {} on a CPU."""
    peaks = {}
    for stage in STAGES if run.device.type == "cuda" else ():
        step = make_step(run, stage, data)
        step()  # it compiles, and makes the optimiser's state
        torch.cuda.reset_peak_memory_stats(run.device)
        step()
        peaks[stage] = torch.cuda.max_memory_allocated(run.device)
        del step
        for network in (run.denoiser, run.policy, run.posterior):
            network.zero_grad(set_to_none=True)
    return peaks


def optimizer_share(run, step):
    """The optimiser's share in a step."""
    spent, update = [], mdmvi.update
    mdmvi.update = lambda *args: spent.append(seconds_of(lambda: update(*args), run.device))
    try:
        whole = [seconds_of(step, run.device) for _ in range(3)]
    finally:
        mdmvi.update = update
    return min(part / total for part, total in zip(spent, whole))


def print_stages(run, flags, data):
    """The steps of both stages, at the same number of sequences."""
    device = run.device
    with train.compiled(run, "order", data, run.args.order_batch):
        peaks = stage_peaks(run, data)
        steps = {stage: make_step(run, stage, data) for stage in STAGES}
        best = in_turn(steps, device, flags.repeats)
        share = optimizer_share(run, steps["plain"])
    rows = [("", "ms", "tokens/s", "against plain", "peak GiB" if peaks else "")]
    for stage, seconds in best.items():
        rate = f"{flags.batch * flags.max_len / seconds:,.0f}"
        peak = f"{peaks[stage] / 2**30:.2f}" if peaks else ""
        ratio = f"{seconds / best['plain']:.2f}"
        rows.append((f"{stage} step", f"{1e3 * seconds:.1f}", rate, ratio, peak))
    print(aligned(rows))
    rate = flags.batch * flops_of(run.config, flags.canvas_len / 2) / best["plain"]
    peak = next((peak for part, peak in PEAKS.items() if part in describe(device)), None)
    line = f"plain step: {rate / 1e12:.3f} TFLOP/s" + (f", MFU {rate / peak:.1%}" if peak else "")
    print(f"{line}; the optimiser takes {share:.0%} of it")


def print_samplers(run, flags, data):
    """Every strategy, and how much longer it takes than its forward passes alone."""
    n = min(128, flags.batch)
    tokens, canvas = (x[:n] for x in data)
    rows = [("sampler", "problems/s", "steps", "time / bare passes")]

    @torch.no_grad()
    def bare():
        run.denoiser(tokens)

    for strategy in mdmvi.STRATEGIES:
        options = {"policy": run.policy, "generator": run.generator}
        used = []

        def sample(strategy=strategy, options=options, used=used):
            out = mdmvi.generate(run.denoiser, tokens, canvas, strategy, flags.budget, **options)
            used.append(out.steps)

        best = in_turn({"bare": bare, "sample": sample}, run.device, flags.repeats)
        steps = torch.stack(used).double().mean().item()
        row = (strategy, f"{n / best['sample']:.1f}", f"{steps:.2f}")
        rows.append((*row, f"{best['sample'] / (steps * best['bare']):.2f}"))
    precision = "TF32" if run.device.type == "cuda" else "fp32"
    print(f"\n{n} problems together, {precision}\n\n{aligned(rows)}")


# ------------------------------------------------------------------------------------------------
# The same step in plain PyTorch, with all logits; it shares nothing with mdmvi.py
# ------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        def turned(y):
            first, second = y.chunk(2, dim=-1)
            return (y * cos + torch.cat((-second, first), dim=-1) * sin).type_as(y)

        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)
        shape = (config.n_embd, config.n_head, config.n_hidden)
        self.blocks = nn.ModuleList(PlainBlock(*shape) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        angle = torch.outer(torch.arange(config.max_len), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))

    def loss(self, tokens, canvas):
        """The loss of stage 1, from the logits of all places."""
        t = torch.rand(len(tokens), 1, device=tokens.device).clamp(min=1e-3)
        masked = canvas & (torch.rand(tokens.shape, device=tokens.device) < t)
        logits = self(tokens.masked_fill(masked, self.head.out_features)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return (loss.view_as(masked) * masked / t / canvas.sum(1, keepdim=True)).sum(1).mean()


def all_logits(denoiser, tokens, masked):
    """mdmvi.token_log_prob, but from the hidden states and logits of all places."""
    hidden = denoiser(tokens.masked_fill(masked, denoiser.mask_id))
    logits = denoiser.logits(hidden).flatten(0, 1)
    log_p = -F.cross_entropy(logits, tokens.flatten(), reduction="none").view(tokens.shape)
    return log_p.masked_fill(~masked, 0.0)


def print_against_plain(run, flags, data):
    """A step of stage 1 as built, the same at all places, and one of plain PyTorch."""
    torch.manual_seed(0)
    model, eager = PlainModel(run.config).to(run.device), mdmvi.token_log_prob
    losses = (eager, all_logits, model.loss)
    scored, full, plain = (torch.compile(f) for f in losses) if flags.compile else losses
    parts = run.args.accumulate

    def step_with(network, loss_of):
        groups = mdmvi.parameter_groups(network, None, None, 1e-4)
        optimizers = make_optimizers(groups, run.args.optimizer)

        def step():
            for _ in range(parts):
                tokens, canvas = train.pick(data, flags.batch // parts, run.generator)
                with train.autocast(run.device):
                    loss = loss_of(tokens, canvas)
                (loss / parts).backward()
            mdmvi.update(optimizers, 500, 1000)

        return step

    def ours(log_prob):
        def loss_of(tokens, canvas):
            mdmvi.token_log_prob = log_prob
            return mdmvi.mdm_loss(run.denoiser, tokens, canvas, run.generator)

        return loss_of

    steps = {
        "as built": step_with(run.denoiser, ours(scored)),
        "at all places": step_with(run.denoiser, ours(full)),
        "plain PyTorch": step_with(model, plain),
    }
    try:
        best = in_turn(steps, run.device, flags.repeats)
    finally:
        mdmvi.token_log_prob = eager
    rows = [("a step of stage 1", "ms", "tokens/s", "as built is faster by")]
    for name, s in best.items():
        rate = f"{flags.batch * flags.max_len / s:,.0f}"
        rows.append((name, f"{1e3 * s:.1f}", rate, f"{s / best['as built']:.2f}"))
    print(aligned(rows))


def make_run(flags, args):
    """A run with new networks; prints their shape."""
    run = train.Run(args, RandomTokens(flags.vocab))
    run.begin_orders()
    count = sum(p.numel() for p in run.denoiser.parameters()) / 1e6
    print(
        f"{flags.size}, {count:.1f}M parameters, {flags.batch} sequences of {flags.max_len}, "
        f"canvas {flags.canvas_len}, vocabulary {flags.vocab}\n"
    )
    return run


def main(argv=None):
    flags = parse_args(argv)
    device = torch.device(flags.device)
    print(describe(device))
    run = make_run(flags, make_args(flags, flags.accumulate, flags.device, flags.compile))
    data = random_data(flags, device)
    if flags.against_plain:
        return print_against_plain(run, flags, data)
    print_stages(run, flags, data)
    print_samplers(run, flags, data)


if __name__ == "__main__":
    run_main(main)
