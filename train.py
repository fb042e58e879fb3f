"""Training: stage 1 (plain MDM), a baseline of as many passes, stage 2 (orders), and the table.

    python train.py                                    # embedded word problems, CPU, minutes
    python train.py --data openai/gsm8k --max-len 256 --canvas-len 96 --middle 0
    python train.py --resume               # go on from out/checkpoint.pt, with the same flags
    python train.py --start out/plain.pt --budget 10 --out out10      # stage 2, another budget

A run is in one file, out/checkpoint.pt; out/plain.pt is that file as it was before stage 2,
out/log.jsonl tells what happened on the way. The method is in mdmvi.py, other kinds of orders in
examples/runs.py and spread.py, scoring in eval_gsm8k.py, data in examples/arithmetic.py, gsm8k.py
and tokenizer.py; here are the flags, the loop and the checkpoints.
"""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import eval_gsm8k
import mdmvi
from examples import bounds, gsm8k, runs, smdm, spread
from examples.command_line import (
    DEVICE,
    Parser,
    UserError,
    above_zero,
    add_fields,
    amount,
    positive,
    run_main,
    share,
    text,
    usable_device,
    while_read,
    whole,
)
from examples.muon import make_optimizers
from examples.tokenizer import SEPARATOR, Tokenizer, encode_problems

#           layers, heads, width, hidden
SIZES = {
    "tiny": (2, 2, 64, 128),
    "mini": (3, 3, 96, 256),
    "small": (4, 4, 96, 256),
    "6m": (8, 8, 256, 680),
    "30m": (8, 8, 512, 1536),
    "170m": (18, 12, 768, 3072),
}
MIDDLE = (0.2, 0.7)  # mask rates: below, a sum can be copied; above, its numbers are hidden
# What --compile compiles
COMPILED = ((mdmvi, "token_log_prob"), (mdmvi, "step_bound"), (mdmvi.OrderPosterior, "scores"))
TIMETABLE_PASSES = 400  # of the search for a timetable, on each of its problems
HELD_OUT = 256  # problems kept from training on a file; the closing bounds are taken on so many
SAVE_EVERY = 300  # seconds between saves; to save 170M parameters may take five of them
MAY_DIFFER = {"out", "resume", "start", "device", "compile", "problems"}  # when a run goes on
MUST_MATCH = ("answers", "size", "init", "max_len", "canvas_len")  # the run of --start
DIVERGED = "files are as last saved; train again with a lower learning rate and another --out"
SHORT_BASELINE = (
    "the baseline in {} has seen less than this stage 2 takes, so the table favours the order; "
    "to train one of as many passes, --start from a run of --order-steps 0"
)


@dataclass
class Args:
    """The flags of a run, kept in checkpoints. A field's annotation is the flag's type or choices,
    its comment the text of --help."""

    data: text = "shopping"  # shopping, carries, a .json/.jsonl(.gz/.xz) file, folder or hub name
    answers: Literal["equations", "full"] = "equations"  # kept of GSM8K's: <<...>> notes, or all
    out: text = "out"  # folder for checkpoint.pt, plain.pt, log.jsonl and results.json
    resume: bool = False  # go on from OUT/checkpoint.pt
    start: text = None  # plain.pt of another run, with its stage 1 and its baseline as they are
    seed: whole = 0  # of the weights and of every draw in training, not of the problems
    size: Literal[tuple(SIZES)] = "mini"  # shape of the model
    init: text = None  # start from smdm-170m, or a folder with SMDM .safetensors and tokenizer.json
    max_len: positive = 52  # tokens in prompt and canvas together (256 for GSM8K)
    canvas_len: positive = 27  # tokens in the canvas (96 for GSM8K)
    steps: positive = 7000  # stage 1: plain steps
    middle: share = 0.5  # stage 1: share at its start with mask rates from 0.2 to 0.7 (GSM8K: 0)
    batch: positive = 32  # stage 1: sequences a step
    lr: amount = 2e-3  # stage 1: peak learning rate
    order_steps: whole = 500  # stage 2: steps; the baseline takes as many passes; 0: stage 1 only
    order_batch: positive = 16  # stage 2: problems a step
    paths: positive = 2  # stage 2: paths a problem, K (spread: always 1, as all are alike)
    order_lr: amount = 1e-3  # stage 2, baseline: peak rate of the denoiser; 0 leaves it frozen
    head_lr: amount = 3e-3  # stage 2: peak rate of the policy and of the search; posterior: a tenth
    search: whole = 512  # stage 2: problems to search the first orders on (paper: always 0)
    budget: positive = 5  # stage 2: steps of generation, T
    unsure: share = 0.0  # stage 2: share at its start with pi from 0.01 to 0.99 (spread: always 0)
    tau: above_zero = 0.1  # stage 2: temperature of the posterior
    orders: Literal["runs", "spread", "paper"] = "runs"  # stage 2; paper: its loss as well (README)
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the trunks' matrices; AdamW the rest
    accumulate: positive = 1  # split each step into so many micro-batches
    problems: whole = 500  # held-out problems in the closing table (of a file up to 256); 0: none
    device: usable_device = DEVICE  # cpu, cuda, cuda:1, ...
    compile: bool = torch.cuda.is_available()  # torch.compile; on a CPU it needs a C++ compiler


def parse_args(argv=None):
    """Args from the command line; raises UserError for what is out of range."""
    parser = Parser(__doc__)
    add_fields(parser, Args, __file__)
    args = Args(**vars(parser.parse_args(argv)))
    if args.batch % args.accumulate or args.order_batch % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} must divide --batch and --order-batch")
    if args.start and args.order_steps == 0:
        raise UserError("--start is for stage 2, and --order-steps 0 leaves it out: drop one")
    if args.orders == "paper":
        args.search = 0
    if args.orders == "spread":
        args.paths, args.unsure = 1, 0.0  # its policy is a table
        if args.order_steps and args.order_lr == 0:
            raise UserError("--orders spread trains the denoiser only: --order-lr must be above 0")
    return args


# ------------------------------------------------------------------------------------------------
# The run: models, data, checkpoint
# ------------------------------------------------------------------------------------------------


class Run:
    """What a run consists of: flags, tokenizer, networks, generator, and where it stands."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.device = args, tokenizer, torch.device(args.device)
        shape = (tokenizer.vocab_size, args.max_len, *SIZES[args.size])
        ids = (tokenizer.mask_id, tokenizer.eos_id)
        more = {"canvas_len": args.canvas_len, "rope_bf16": args.init is not None}
        self.config = mdmvi.ModelConfig(*shape, *ids, **more)
        torch.manual_seed(args.seed)
        self.denoiser = mdmvi.Denoiser(self.config).to(self.device)
        self.policy = self.posterior = self.baseline = None
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.stage, self.step, self.logged, self.optimizers = "plain", 0, 0, []

    def begin_orders(self):
        """New policy and posterior, as stage 2 starts with them."""
        torch.manual_seed(self.args.seed)
        orders = eval_gsm8k.make_orders(self.args.orders, self.config, self.args.budget)
        self.policy, self.posterior = (network.to(self.device) for network in orders)
        if self.args.orders == "runs":
            self.posterior.start_from(self.denoiser)

    def save(self, path, optimizers=()):
        """Write to a temporary file and rename: a kill at any moment leaves a whole checkpoint."""
        networks = {name: getattr(self, name) for name in eval_gsm8k.Models._fields}
        states = {name: network and network.state_dict() for name, network in networks.items()}
        weights = [x for state in states.values() if state for x in state.values()]
        if not all(x.isfinite().all() for x in weights):
            raise UserError(f"a weight is not finite at {self.stage} step {self.step}: {DIVERGED}")
        state = {
            "version": eval_gsm8k.VERSION,
            "args": asdict(self.args),
            "config": asdict(self.config),
            "tokenizer": self.tokenizer.pieces,
            **states,
            "stage": self.stage,
            "step": self.step,
            "logged": self.logged,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": self.generator.get_state(),
        }
        try:
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        except (OSError, RuntimeError) as error:
            Path(f"{path}.tmp").unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"cannot write {path} ({reason}): make room, or give another --out")

    def load(self, path, same):
        """Take over a checkpoint's networks and, with --resume, all else; returns its Args.

        Raises UserError where flags of `same` or tokens differ.
        """
        state, tokenizer, models = eval_gsm8k.load_checkpoint(path, self.device)
        try:
            there = Args(**state["args"])
        except TypeError:
            raise UserError(f"{path} has other flags than this train.py: train again")
        old, new = asdict(there), asdict(self.args)
        differ = [name for name in same if old[name] != new[name]]
        if differ:
            flags = (f"--{name.replace('_', '-')} {old[name]}, not {new[name]}" for name in differ)
            raise UserError(f"{path} has {'; '.join(flags)}: give its flags")
        if tokenizer.pieces != self.tokenizer.pieces:
            raise UserError(f"{path} has another vocabulary: give the --data it was trained with")
        self.denoiser, self.policy, self.posterior, self.baseline = models
        self.stage, self.step = state["stage"], state["step"]
        if self.args.resume:
            self.logged, self.optimizers = state["logged"], state["optimizers"]
            try:
                self.generator.set_state(state["generator"].cpu())
            except RuntimeError:
                where = f"does not fit the device {self.device}: go on where it was written"
                raise UserError(f"{path} has a generator that {where}, or use --start")
        return there


def load_problems(args):
    """(training problems, held-out problems), never overlapping."""
    if args.data in eval_gsm8k.TASKS:
        draw = eval_gsm8k.TASKS[args.data]
        held_out = draw(max(args.problems, HELD_OUT), 1, True)
        return draw(60_000, 0, False, with_solutions=False), held_out
    problems = gsm8k.load_gsm8k(args.data, args.answers)
    return gsm8k.hold_out(problems, HELD_OUT)


def make_tokenizer(args, problems):
    """Built from the training text, or the one that --init comes with."""
    if args.init:
        return smdm.LlamaTokenizer(smdm.read_tokenizer(args.init))
    sample = problems[:: max(1, len(problems) // 20_000)]
    texts = (p["question"] + SEPARATOR + p["answer"] for p in sample)
    return Tokenizer.build(texts)


def encode_on_device(run, problems):
    """(tokens, canvas) of the problems that fit."""
    tokens, canvas, fits = encode_problems(problems, run.tokenizer, run.config)
    return tokens[fits].to(run.device), canvas[fits].to(run.device)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def baseline_size(args):
    """(number of steps, problems a step) of the baseline: as many passes as stage 2 takes."""
    later = args.paths if args.budget > 1 else 0  # beside f_0, of importance_order_loss
    n = args.order_batch * (args.paths if args.orders == "paper" else 1 + later)
    passes = args.canvas_len if args.orders == "runs" else TIMETABLE_PASSES
    # Those of the search have no gradient: three count as one
    searched = math.ceil(args.search * passes / 3 / n) if args.budget > 1 else 0
    return args.order_steps + searched, n


def stage_groups(run, stage):
    """(parameter groups, number of steps, problems a step); freezes what is not to be trained."""
    args = run.args
    if stage == "plain":
        return mdmvi.parameter_groups(run.denoiser, None, None, args.lr), args.steps, args.batch
    if stage == "baseline":
        groups = mdmvi.parameter_groups(run.baseline, None, None, args.order_lr)
        return groups, *baseline_size(args)
    run.denoiser.requires_grad_(args.order_lr > 0)
    if args.orders == "runs":
        run.posterior.trunk.wte.requires_grad_(False)  # RunPosterior.start_from, after --resume too
    networks = (run.denoiser, run.policy, run.posterior)
    rates = (args.order_lr, args.head_lr, 0.1 * args.head_lr)
    groups = mdmvi.parameter_groups(*networks, *rates)
    return groups, args.order_steps, args.order_batch


def pick(data, n, generator):
    """n random rows of each tensor in `data`."""
    rows = torch.randint(len(data[0]), (n,), device=data[0].device, generator=generator)
    return [x[rows] for x in data]


def stage_loss(run, stage, data, n):
    """(loss, kl) of a stage, on n problems drawn from data = (tokens, canvas)."""
    args, generator = run.args, run.generator
    tokens, canvas = pick(data, n, generator)
    if stage != "order":
        denoiser = run.denoiser if stage == "plain" else run.baseline
        middle = stage == "plain" and run.step < round(args.middle * args.steps)
        rates = MIDDLE if middle else (0.0, 1.0)
        loss = mdmvi.mdm_loss(denoiser, tokens.long(), canvas, generator, rates)
        return loss, torch.zeros_like(loss)
    policy = run.policy
    if run.step < round(args.unsure * args.order_steps):
        policy = functools.partial(mdmvi.unsure, run.policy)
    networks = (run.denoiser, policy, run.posterior)
    order_loss = mdmvi.order_loss if args.orders == "paper" else mdmvi.importance_order_loss
    settings = (args.budget, args.tau, args.paths, generator)
    return order_loss(*networks, tokens.long(), canvas, *settings)


def train_step(run, stage, steps, data, n, optimizers):
    """One update on n problems, in micro-batches: loss and kl [2], still on the device."""
    total, parts = 0.0, run.args.accumulate
    for _ in range(parts):
        with autocast(run.device):
            loss, kl = stage_loss(run, stage, data, n // parts)
        (loss / parts).backward()
        total = total + torch.stack((loss.detach(), kl)) / parts
    mdmvi.update(optimizers, run.step, steps)
    return total


@contextlib.contextmanager
def compiled(run, stage, data, n):
    """torch.compile what a step spends its time in, or go on without it where that fails.

    It is tried on a micro-batch of this stage, which leaves weights and generator as they were.
    """
    if not run.args.compile:
        yield
        return
    state = run.generator.get_state()
    with contextlib.ExitStack() as set_back:
        # On a CPU the number of scored places differs from step to step
        dynamic = False if run.device.type == "cuda" else None
        for owner, name in COMPILED:
            function = getattr(owner, name)
            set_back.callback(setattr, owner, name, function)
            setattr(owner, name, torch.compile(function, dynamic=dynamic))
        try:
            with autocast(run.device):
                loss, _ = stage_loss(run, stage, data, n // run.args.accumulate)
            loss.backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that is missing or broken raises many kinds
            why = f"torch.compile does not work here ({type(error).__name__})"
            print(f"{why}: going on without it", file=sys.stderr)
            run.args.compile = False
            set_back.close()
        for network in (run.denoiser, run.policy, run.posterior, run.baseline):
            if network is not None:
                network.zero_grad(set_to_none=True)
        run.generator.set_state(state)
        yield


def train_stage(run, data, stop, log):
    """Train one stage to its end from run.step on. `stop` is a list that a signal fills."""
    args, stage, path = run.args, run.stage, Path(run.args.out, "checkpoint.pt")
    groups, steps, n = stage_groups(run, stage)
    optimizers = make_optimizers(groups, args.optimizer)
    try:
        for optimizer, state in zip(optimizers, run.optimizers):
            optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"the optimisers in {path} do not fit: it is damaged, train again")
    run.optimizers = []
    with (
        compiled(run, stage, data, n),  # first, so that the bar's rate is without it
        tqdm(total=steps, initial=run.step, desc=stage, unit="step", mininterval=1.0) as bar,
    ):
        total, since, began = 0.0, 0, time.perf_counter()
        saved = began
        while run.step < steps:
            total = total + train_step(run, stage, steps, data, n, optimizers)
            since += 1
            run.step += 1
            while_read(bar.update)
            saving = stop or time.perf_counter() - saved > SAVE_EVERY
            if saving or run.step % 20 == 0 or run.step == steps:
                loss, kl = (total / since).tolist()  # no other line of a step waits for the device
                if not math.isfinite(loss):
                    raise UserError(f"loss is {loss} at {stage} step {run.step}: {DIVERGED}")
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                row = {"stage": stage, "step": run.step, "loss": loss, "kl": kl}
                row["steps_per_second"] = since / (time.perf_counter() - began)
                print(json.dumps(row), file=log, flush=True)
                run.logged = log.tell()
                total, since, began = 0.0, 0, time.perf_counter()
            if saving:
                run.save(path, optimizers)
                saved = time.perf_counter()
                if stop:
                    while_read(bar.close)
                    where = f"stopped at {stage} step {run.step}"
                    raise KeyboardInterrupt(f"{where}; go on with --resume")
        while_read(bar.close)


def search_orders(run, tokens, canvas):
    """Teach new orders what is best for some problems under the denoiser."""
    args, forward = run.args, functools.partial(autocast, run.device)
    if args.orders == "spread":
        settings = (run.posterior.timetable, TIMETABLE_PASSES, run.generator)
        with forward():
            timetable = spread.search_timetable(run.denoiser, tokens, canvas, *settings)
        run.posterior.timetable.copy_(timetable)
        run.policy.follow(timetable)
    else:
        groups = mdmvi.parameter_groups(None, None, run.posterior, posterior_lr=args.head_lr)
        settings = (args.budget, make_optimizers(groups, args.optimizer), run.generator, forward)
        runs.search_cuts(run.denoiser, run.posterior, tokens, canvas, *settings)


def train(run, data):
    """Run the stages that are left, each saved when done."""
    args, out, stop = run.args, Path(run.args.out), []
    after = {"plain": "baseline", "baseline": "order", "order": "done"}
    if args.order_steps == 0:
        after["plain"] = "done"
    elif args.order_lr == 0:  # a frozen denoiser is its own baseline
        after["plain"] = "order"
    with open(out / "log.jsonl", "a" if args.resume else "w") as log:
        log.truncate(min(run.logged, log.tell()))  # drop what a killed run told after it had saved
        while run.stage != "done":
            if run.stage == "baseline" and run.step == 0:
                run.baseline = copy.deepcopy(run.denoiser)
            if run.stage == "order" and run.step == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is unsaved here
                run.begin_orders()
                if args.search and args.budget > 1:
                    search_orders(run, *pick(data, args.search, run.generator))
            signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(1))
            train_stage(run, data, stop, log)
            run.stage, run.step = after[run.stage], 0
            if run.stage == "order":
                run.save(out / "plain.pt")
            run.save(out / "checkpoint.pt")
            if stop:  # while it was saved
                raise KeyboardInterrupt("stopped between two stages; go on with --resume")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv=None):
    args = parse_args(argv)
    out, path = Path(args.out), Path(args.out, "checkpoint.pt")
    if path.exists() and not args.resume:
        raise UserError(f"{path} exists: pass --resume, or another --out")
    if args.resume and not path.exists():
        raise UserError(f"no checkpoint at {path}: give the run's --out, or no --resume")
    problems, held_out = load_problems(args)
    run = Run(args, make_tokenizer(args, problems))
    if args.init and not (args.resume or args.start):
        smdm.load_smdm(args.init, run.denoiser)
    data = encode_on_device(run, problems)
    if len(data[0]) == 0:
        raise UserError("no problem fits: raise --max-len or --canvas-len")
    count = sum(p.numel() for p in run.denoiser.parameters())
    size = f"vocabulary {run.tokenizer.vocab_size}, {count / 1e6:.2f}M parameters"
    fit = f"{len(data[0]):,} problems ({len(problems) - len(data[0]):,} do not fit)"
    print(f"{fit}, {size}, seed {args.seed}, {run.device}", flush=True)
    if args.resume:
        run.load(path, [name for name in asdict(args) if name not in MAY_DIFFER])
    elif args.start:
        there = run.load(args.start, MUST_MATCH)
        if run.policy is not None or run.stage not in ("order", "done"):
            raise UserError(f"{args.start} is no plain.pt: give the file as it was before stage 2")
        run.stage = "order"  # or it was a run of stage 1 alone, which is done
        # Stage 1 alone, or a run with a frozen denoiser, had no baseline
        if run.baseline is None and args.order_lr > 0:
            run.stage = "baseline"
        elif args.order_lr > 0 and math.prod(baseline_size(there)) < math.prod(baseline_size(args)):
            print(SHORT_BASELINE.format(args.start), file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    if args.start and not args.resume:
        run.save(path)
    train(run, data)
    models = eval_gsm8k.Models(run.denoiser, run.policy, run.posterior, run.baseline)
    known = encode_on_device(run, held_out[:HELD_OUT])
    if len(known[0]) > 0:
        bounds.print_bounds(models, asdict(args), *known, args.budget, seed=args.seed)
    if args.problems:
        scored = (held_out[: args.problems], run.tokenizer, models, [args.budget])
        eval_gsm8k.print_scores(*scored, file=out / "results.json")


if __name__ == "__main__":
    run_main(main)
