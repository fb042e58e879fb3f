"""Training: stage 1 (plain MDM), the equal-compute baseline, stage 2 (orders), and the table.

    python train.py                                    # embedded word problems, CPU, minutes
    python train.py --data openai/gsm8k --max-len 256 --canvas-len 96   # or a file, or a folder
    python train.py --resume                           # go on from out/checkpoint.pt
    python train.py --start out/plain.pt --budget 10 --out out10      # stage 2, another budget

Everything is in one file, out/checkpoint.pt; out/plain.pt is that file as it was before stage 2,
and out/log.jsonl tells what happened on the way. The method is in mdmvi.py, data and scoring are
in eval_gsm8k.py; here are the flags, the loop and the checkpoints.
"""

import contextlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import eval_gsm8k
import mdmvi
from eval_gsm8k import UserError
from examples import smdm
from examples.muon import make_optimizers

#           layers, heads, width, hidden
SIZES = {
    "tiny": (2, 2, 64, 128),
    "small": (4, 4, 96, 256),
    "6m": (8, 8, 256, 680),
    "170m": (18, 12, 768, 3072),
}
STAGES = ("plain", "baseline", "order", "done")
SEARCH_STEPS, SEARCH_BATCH = 200, 32  # the posterior's training on the runs that were searched
SAVE_COST = 0.02  # the share of the time that saving may take
FREE = {"out", "resume", "start", "device", "compile", "problems"}  # may differ when a run goes on
STAGE_1 = {"answers", "size", "init", "max_len", "canvas_len"}  # may not differ from --start's run


@dataclass
class Args:
    """The flags of a run. The comment behind a field is its help; checkpoints keep them all."""

    data: str = "shopping"  # or carries; a .json/.jsonl(.gz/.xz) file, folder or hub name
    answers: str = "equations"  # with --data: "equations" are the <<...>> notes only, or "full"
    out: str = "out"  # folder for checkpoint.pt, plain.pt, log.jsonl and results.json
    resume: bool = False  # go on from OUT/checkpoint.pt
    start: str = None  # plain.pt of another run: take stage 1 and baseline from it
    seed: int = 0  # seed of the weights and of every draw
    size: str = "small"  # shape of the model: tiny, small, 6m or 170m
    init: str = None  # start from smdm-170m, or a folder with SMDM .safetensors and tokenizer.json
    max_len: int = 59  # tokens in prompt and canvas together (256 for GSM8K)
    canvas_len: int = 27  # tokens in the canvas (96 for GSM8K)
    steps: int = 5000  # stage 1: plain steps
    batch: int = 32  # stage 1: sequences a step
    lr: float = 2e-3  # stage 1: peak learning rate
    order_steps: int = 500  # stage 2: steps; the baseline sees as many sequences; 0: stage 1 only
    order_batch: int = 16  # stage 2: problems a step
    paths: int = 3  # stage 2: paths a problem, K
    order_lr: float = 1e-3  # stage 2, baseline: peak rate of the denoiser; 0 leaves it frozen
    head_lr: float = 3e-3  # stage 2: peak rate of the policy and the search; posterior: a tenth
    search: int = 512  # stage 2: problems whose best runs it starts from; 0: none
    budget: int = 5  # stage 2: steps of generation, T
    tau: float = 0.1  # stage 2: temperature of the posterior
    orders: str = "runs"  # stage 2: runs from the left, or free ones, as in the paper
    estimator: str = "importance"  # stage 2: importance, or uniform, the paper's
    optimizer: str = "muon"  # muon (AdamW for what is no block matrix), or adamw for everything
    end_lr: float = 0.01  # share of the peak learning rates that is left at the end of a stage
    accumulate: int = 1  # split each step into so many micro-batches
    problems: int = 500  # held-out problems in the closing table; 0: no table
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, ...
    compile: bool = torch.cuda.is_available()  # torch.compile the passes


CHOICES = {
    "answers": ("equations", "full"),
    "size": tuple(SIZES),
    "orders": ("runs", "free"),
    "estimator": ("importance", "uniform"),
    "optimizer": ("muon", "adamw"),
}
AT_LEAST_0 = ("seed", "order_steps", "search", "problems")


def parse_args(argv=None):
    """Args from the command line; raises UserError for what is out of range."""
    parser = eval_gsm8k.Parser(__doc__)
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Args), re.M))
    for field in fields(Args):
        name, text = "--" + field.name.replace("_", "-"), helps[field.name]
        if field.type is bool:
            parser.add_argument(
                name, action=BooleanOptionalAction, default=field.default, help=text
            )
        else:
            choices = CHOICES.get(field.name)
            options = {"type": field.type, "default": field.default, "choices": choices}
            parser.add_argument(name, help=text, **options)
    args = Args(**vars(parser.parse_args(argv)))
    for field in fields(Args):
        flag, value = "--" + field.name.replace("_", "-"), getattr(args, field.name)
        least = 0 if field.name in AT_LEAST_0 else 1
        if field.type is int and not least <= value < 2**63:
            raise UserError(f"{flag} is {value}: it must be at least {least}, and below 2^63")
        if field.type is float and not 0 <= value < math.inf:
            raise UserError(f"{flag} is {value}: it must be 0 or more")
    if args.tau == 0 or args.end_lr > 1:
        raise UserError("--tau must be above 0, and --end-lr at most 1")
    if args.batch % args.accumulate or args.order_batch % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} must divide --batch and --order-batch")
    if args.orders == "free" and args.search:
        raise UserError("--orders free cannot learn what is searched, runs: give --search 0")
    if args.canvas_len >= args.max_len:
        raise UserError(
            f"--canvas-len {args.canvas_len} leaves no prompt in --max-len {args.max_len}"
        )
    if args.init and args.size != "170m":
        raise UserError("--init needs --size 170m")
    eval_gsm8k.check_device(args.device)
    return args


# ------------------------------------------------------------------------------------------------
# The run: models, data, checkpoint
# ------------------------------------------------------------------------------------------------


class Run:
    """What a run consists of: flags, tokenizer, networks, generator, and where it stands."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.device = args, tokenizer, torch.device(args.device)
        n_layer, n_head, n_embd, n_hidden = SIZES[args.size]
        self.config = mdmvi.ModelConfig(
            vocab_size=tokenizer.vocab_size,
            max_len=args.max_len,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            n_hidden=n_hidden,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            canvas_len=args.canvas_len,
            rope_bf16=args.init is not None,
        )
        torch.manual_seed(args.seed)
        self.denoiser = mdmvi.Denoiser(self.config).to(self.device)
        self.plain = None  # the baseline's denoiser
        self.begin_orders()
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.stage, self.step, self.optimizers = "plain", 0, None

    def begin_orders(self):
        """New policy and posterior, as stage 2 starts with them."""
        torch.manual_seed(self.args.seed)
        orders = eval_gsm8k.make_orders(self.args.orders, self.config)
        self.policy, self.posterior = (network.to(self.device) for network in orders)
        if self.args.orders == "runs":
            self.posterior.start_from(self.denoiser)

    def begin_baseline(self):
        """The baseline goes on from where stage 1 ended."""
        self.plain = mdmvi.Denoiser(self.config).to(self.device)
        self.plain.load_state_dict(self.denoiser.state_dict())

    def save(self, path, optimizers=()):
        """Write to a temporary file and rename: a kill at any moment leaves a whole checkpoint."""
        state = {
            "program": "mdmvi",
            "version": eval_gsm8k.VERSION,
            "args": asdict(self.args),
            "config": asdict(self.config),
            "tokenizer": self.tokenizer.pieces,
            "denoiser": self.denoiser.state_dict(),
            "policy": self.policy.state_dict(),
            "posterior": self.posterior.state_dict(),
            "plain": self.plain.state_dict() if self.plain else None,
            "stage": self.stage,
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": self.generator.get_state(),
        }
        try:
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"cannot write {path} ({reason}): make room, then go on with --resume")

    def load(self, path, may_differ, parts):
        """Go on from a checkpoint. Raises UserError where its flags or vocabulary are others."""
        state = eval_gsm8k.load_checkpoint(path, self.device)
        for name, here in asdict(self.args).items():
            flag, there = "--" + name.replace("_", "-"), state["args"].get(name)
            if name not in may_differ and there != here:
                raise UserError(
                    f"{path} has {flag} {there}, not {here}: give its, or another --out"
                )
        if state["tokenizer"] != self.tokenizer.pieces:
            raise UserError(f"{path} has another vocabulary: give the --data it was trained with")
        if state["plain"] is not None:
            self.begin_baseline()
        for name in parts:
            if state[name] is not None:
                where = f"{path}: the part {name!r}"
                eval_gsm8k.fill(getattr(self, name), state[name], where)
        try:
            self.generator.set_state(state["generator"].cpu())
            STAGES.index(state["stage"])
        except (RuntimeError, TypeError, ValueError):
            raise UserError(f"{path} is damaged (generator or stage): train again")
        self.stage, self.step = state["stage"], state["step"]
        self.optimizers = state["optimizers"]


def load_problems(args):
    """(training problems, held-out problems), never overlapping."""
    wanted = max(args.problems, 256)
    if args.data in eval_gsm8k.TASKS:
        draw = eval_gsm8k.TASKS[args.data]
        return draw(60_000, 0, False), draw(wanted, 1, True)
    problems = eval_gsm8k.load_gsm8k(args.data, args.answers)
    held_out = min(wanted, len(problems) // 10)
    if held_out == 0:
        raise UserError(f"{args.data} has {len(problems)} problems: at least 10 are needed")
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    test = [problems[i] for i in order[:held_out]]
    # Variants of one problem differ in their numbers only: keep them on one side of the split.
    seen = {wording(problem) for problem in test}
    return [problems[i] for i in order[held_out:] if wording(problems[i]) not in seen], test


def wording(problem):
    return "".join(c for c in problem["question"] if c.isalpha())


def make_tokenizer(args, problems):
    """Built from the training text, or the one that --init comes with."""
    if args.init:
        return eval_gsm8k.LlamaTokenizer(smdm.read_tokenizer(args.init))
    sample = problems[:: max(1, len(problems) // 20_000)]
    texts = (p["question"] + eval_gsm8k.SEPARATOR + p["answer"] for p in sample)
    return eval_gsm8k.Tokenizer.build(texts)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def passes(args):
    """Denoiser passes that stage 2 spends on a problem; the baseline sees as many sequences."""
    return args.paths + (args.estimator == "importance")


def baseline_steps(args):
    """Steps of stage 2, and what its search costs: a pass without gradient is a third of one."""
    searched = args.search * args.canvas_len / 3
    return args.order_steps + math.ceil(searched / (args.order_batch * passes(args)))


def stage_groups(run, stage):
    """(parameter groups, number of steps, problems a step) of a stage."""
    args = run.args
    if stage == "plain":
        return mdmvi.parameter_groups(run.denoiser, None, None, args.lr), args.steps, args.batch
    if stage == "baseline":
        groups = mdmvi.parameter_groups(run.plain, None, None, args.order_lr)
        return groups, baseline_steps(args), args.order_batch * passes(args)
    run.denoiser.requires_grad_(args.order_lr > 0)
    networks = (run.denoiser, run.policy, run.posterior)
    groups = mdmvi.parameter_groups(*networks, args.order_lr, args.head_lr, args.head_lr / 10)
    return groups, args.order_steps, args.order_batch


def pick(data, n, generator):
    """n random rows of each tensor in `data`."""
    rows = torch.randint(len(data[0]), (n,), device=data[0].device, generator=generator)
    return [x[rows] for x in data]


def stage_loss(run, stage, data, n):
    """(loss, kl or None) of a stage, on n problems drawn from data = (tokens, canvas)."""
    args, generator = run.args, run.generator
    tokens, canvas = pick(data, n, generator)
    if stage != "order":
        denoiser = run.denoiser if stage == "plain" else run.plain
        return mdmvi.mdm_loss(denoiser, tokens.long(), canvas, generator), None
    networks = (run.denoiser, run.policy, run.posterior)
    estimator = {"importance": mdmvi.importance_order_loss, "uniform": mdmvi.order_loss}
    return estimator[args.estimator](
        *networks, tokens.long(), canvas, args.budget, args.tau, args.paths, generator
    )


def train_step(run, stage, step, steps, data, n, optimizers):
    """One update on n problems, in micro-batches: (loss, kl or None), still on the device."""
    total, parts = 0.0, run.args.accumulate
    for _ in range(parts):
        with autocast(run.device):
            loss, kl = stage_loss(run, stage, data, n // parts)
        (loss / parts).backward()
        total = total + loss.detach() / parts
    mdmvi.update(optimizers, step, steps, run.args.end_lr)
    return total, kl


def compile_passes(run, stage, data, n):
    """torch.compile the passes with their loss, and try it on a micro-batch of this stage.

    Returns the function as it was, to be put back when the stage ends.
    """
    eager, state = mdmvi.token_log_prob, run.generator.get_state()
    if not run.args.compile:
        return eager
    mdmvi.token_log_prob = torch.compile(eager, dynamic=False)
    try:
        with autocast(run.device):
            loss, _ = stage_loss(run, stage, data, n // run.args.accumulate)
        loss.backward()
    except Exception as error:  # a compiler that is missing or broken raises many kinds
        reason = type(error).__name__
        print(f"torch.compile does not work here ({reason}): going on without it", file=sys.stderr)
        mdmvi.token_log_prob, run.args.compile = eager, False
    for network in (run.denoiser, run.policy, run.posterior, run.plain):
        if network is not None:
            network.zero_grad(set_to_none=True)
    run.generator.set_state(state)
    return eager


def train_stage(run, stage, data, stop, log):
    """Train one stage to its end from run.step on. `stop` is a list that a signal fills."""
    args, path = run.args, Path(run.args.out, "checkpoint.pt")
    groups, steps, n = stage_groups(run, stage)
    optimizers = make_optimizers(groups, args.optimizer)
    try:
        for optimizer, state in zip(optimizers, run.optimizers or ()):
            optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"the optimisers in {path} do not fit: it is damaged, train again")
    run.optimizers = None
    eager = compile_passes(run, stage, data, n)
    total, since, began = 0.0, 0, time.perf_counter()
    saved, cost = time.perf_counter(), 1.0
    bar = tqdm(total=steps, initial=run.step, desc=stage, unit="step", mininterval=1.0)
    while run.step < steps:
        loss, kl = train_step(run, stage, run.step, steps, data, n, optimizers)
        total, since = total + loss, since + 1
        run.step += 1
        bar.update()
        saving = stop or time.perf_counter() - saved > cost / SAVE_COST
        if saving or run.step % 20 == 0 or run.step == steps:
            mean = float(total) / since  # the only place that waits for the device
            if not math.isfinite(mean):
                bar.close()
                raise UserError(
                    f"loss is {mean} at {stage} step {run.step}: {path} is as last saved; "
                    "lower the learning rate"
                )
            rate = since / (time.perf_counter() - began)
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            row = {"stage": stage, "step": run.step, "loss": mean, "steps_per_second": rate}
            log(row if kl is None else {**row, "kl": float(kl)})
            total, since, began = 0.0, 0, time.perf_counter()
        if saving:
            start = time.perf_counter()
            run.save(path, optimizers)
            saved = time.perf_counter()
            cost = max(saved - start, 0.2)
        if stop:
            bar.close()
            print(f"stopped at {stage} step {run.step}; go on with --resume", file=sys.stderr)
            raise KeyboardInterrupt
    bar.close()
    mdmvi.token_log_prob = eager


def stop_search(stop):
    """End the run if a signal has filled the list `stop`; the search is made again after it."""
    if stop:
        print("\nstopped in the search for orders; go on with --resume", file=sys.stderr)
        raise KeyboardInterrupt


def search_orders(run, data, stop):
    """The posterior learns which cuts are best under the denoiser, on some training problems."""
    args, values = run.args, []
    tokens, canvas = pick(data, args.search, run.generator)
    parts = list(zip(tokens.split(64), canvas.split(64)))
    for x, on in tqdm(parts, desc="search", unit="batch", mininterval=1.0):
        with autocast(run.device):
            values.append(mdmvi.run_log_prob(run.denoiser, x.long(), on))
        stop_search(stop)
    values = torch.cat(values)
    groups = mdmvi.parameter_groups(None, None, run.posterior, posterior_lr=args.head_lr)
    optimizers = make_optimizers(groups, args.optimizer)
    bar = tqdm(range(SEARCH_STEPS), desc="cuts", unit="step", mininterval=1.0)
    for step in bar:
        x, on, value = pick((tokens, canvas, values), SEARCH_BATCH, run.generator)
        with autocast(run.device):
            loss = mdmvi.cut_loss(run.posterior, x.long(), on, value, args.budget)
        loss.backward()
        mdmvi.update(optimizers, step, SEARCH_STEPS, args.end_lr)
        if step % 20 == 19:
            bar.set_postfix_str(f"loss {float(loss.detach()):.4f}", refresh=False)
        stop_search(stop)


def train(run, data, stop):
    """Run the stages that are left, each saved when done."""
    args, out = run.args, Path(run.args.out)
    after = {"plain": "baseline", "baseline": "order", "order": "done"}
    if args.order_steps == 0:
        after["plain"] = "done"
    elif args.order_lr == 0:  # a frozen denoiser is its own baseline
        after["plain"] = "order"
    with open(out / "log.jsonl", "a" if args.resume else "w") as file:

        def log(row):
            file.write(json.dumps(row) + "\n")
            file.flush()

        while run.stage != "done":
            if run.stage == "order" and run.step == 0:
                run.begin_orders()
                if args.search and args.budget > 1:
                    search_orders(run, data, stop)
            train_stage(run, run.stage, data, stop, log)
            run.stage, run.step = after[run.stage], 0
            if run.stage == "baseline":
                run.begin_baseline()
            if run.stage == "order":
                run.save(out / "plain.pt")
            run.save(out / "checkpoint.pt")


def trim_log(path, stage, step):
    """Drop what a killed run logged after its last checkpoint, and a line it left half written."""
    if not path.exists() or stage == "done":
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if (STAGES.index(row["stage"]), row["step"]) <= (STAGES.index(stage), step):
                kept.append(line + "\n")
    path.write_text("".join(kept))


def print_bounds(run, problems):
    """The bounds of learned and of uniformly random orders on held-out problems."""
    args = run.args
    layout = (run.tokenizer, args.max_len, args.canvas_len)
    tokens, canvas, fits = eval_gsm8k.encode_problems(problems, *layout)
    tokens, canvas = tokens[fits][:256].long().to(run.device), canvas[fits][:256].to(run.device)
    generator = torch.Generator(run.device).manual_seed(args.seed)

    data, bounds = (tokens, canvas, args.budget), {}
    if args.order_steps:
        networks = (run.denoiser, run.policy, run.posterior)
        bounds["learned order"] = mdmvi.order_elbo(*networks, *data, args.tau, 4, generator)
    for name, denoiser in (("same", run.denoiser), ("plain", run.plain)):
        if denoiser is not None:
            nats = mdmvi.uniform_elbo(denoiser, *data, 4, generator)
            bounds[f"uniform random order, {name} model"] = nats
    print(f"\nELBO at T={args.budget}, nats per canvas token, {len(tokens)} held-out problems:")
    for name, nats in bounds.items():
        print(f"  {name:35}{float(nats.sum() / canvas.sum()):.4f}")


def prepare_folder(args):
    """Make the output folder, or raise UserError if that cannot be or would overwrite a run."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {out} ({error.strerror}): give another --out")
    if (out / "checkpoint.pt").exists() and not args.resume:
        raise UserError(f"{out}/checkpoint.pt exists: pass --resume, or another --out")
    return out


def main(argv=None):
    args = parse_args(argv)
    out = prepare_folder(args)
    problems, held_out = load_problems(args)
    run = Run(args, make_tokenizer(args, problems))
    if args.init:
        smdm.load_smdm(args.init, run.denoiser)
    layout = (run.tokenizer, args.max_len, args.canvas_len)
    tokens, canvas, fits = eval_gsm8k.encode_problems(problems, *layout)
    if not any(fits):
        raise UserError("no problem fits: raise --max-len or --canvas-len")
    data = (tokens[fits].to(run.device), canvas[fits].to(run.device))
    count = sum(p.numel() for p in run.denoiser.parameters())
    print(
        f"{len(data[0]):,} problems ({len(fits) - len(data[0]):,} do not fit), vocabulary "
        f"{run.tokenizer.vocab_size}, {count / 1e6:.2f}M parameters, seed {args.seed}, "
        f"{run.device}",
        flush=True,
    )
    if args.resume:
        run.load(out / "checkpoint.pt", FREE, ("denoiser", "plain", "policy", "posterior"))
        trim_log(out / "log.jsonl", run.stage, run.step)
    elif args.start:
        run.load(args.start, set(asdict(args)) - STAGE_1, ("denoiser", "plain"))
        if (run.stage, run.step) != ("order", 0):
            raise UserError(f"{args.start} is no plain.pt: give the file as it was before stage 2")
        run.generator.manual_seed(args.seed)
        run.save(out / "checkpoint.pt")
    stop = []
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(1))
    train(run, data, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print_bounds(run, held_out)
    if args.problems:
        models = eval_gsm8k.Models(
            run.denoiser, run.policy if args.order_steps else None, run.posterior, run.plain
        )
        problems = held_out[: args.problems]
        eval_gsm8k.print_scores(
            problems, *layout, models, [args.budget], json_file=out / "results.json"
        )


if __name__ == "__main__":
    eval_gsm8k.run_main(main)
