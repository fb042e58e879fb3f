"""Training: stage 1 (plain MDM), the equal-compute baseline (more of it), stage 2 (orders), then the table.

    python train.py                                        # embedded task, CPU, minutes
    python train.py --task gsm8k --data openai/gsm8k       # or a local .jsonl(.gz|.xz) file or folder
    python train.py --task sudoku                          # adaptive inference, 6x6 grids
    python train.py --task pairs --latent-dim 2            # variational masked diffusion, two tokens
    python train.py --resume                               # go on from out/checkpoint.pt
    python train.py --start out/plain.pt --budget 10 --out out10    # stage 2 only, for another budget
    python train.py --benchmark                            # speed and memory; no data needed

Everything is in one file, out/checkpoint.pt; out/plain.pt is that file as it was before stage 2, and
out/log.jsonl tells what happened on the way.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_gsm8k
import mdmvi
from eval_gsm8k import UserError

#           layers, heads, width, hidden
SIZES = {"tiny": (2, 2, 64, 128), "small": (4, 4, 96, 256), "6m": (8, 8, 256, 680), "170m": (18, 12, 768, 3072)}
STAGES = ("plain", "baseline", "search", "order")
# What differs between the tasks where a flag is not given
STAGE_2 = dict(order_batch=8, paths=7, head_lr=3e-3, policy_layers=1, freeze_denoiser=False, search=2048, search_steps=400)
DEFAULTS = {
    "arithmetic": dict(STAGE_2, size="small", steps=4200, batch=32, lr=6e-3, order_steps=600, budget=5),
    "gsm8k": dict(STAGE_2, size="small", steps=3000, batch=32, lr=6e-3, order_steps=800, budget=5),
    "sudoku": dict(
        size="small", steps=5500, batch=32, lr=6e-3, order_steps=300, budget=9,
        order_batch=32, paths=1, head_lr=1e-3, policy_layers=2, freeze_denoiser=True, search=4096, search_steps=3000,
    ),
    "pairs": dict(STAGE_2, size="tiny", steps=4000, batch=64, lr=1e-2, order_steps=0, budget=1),
}  # fmt: skip
START_LR = 1e-2  # of the posterior, or the policy, while it learns the orders that stage 2 starts from
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # dense FLOP/s


def parse_args(argv=None):
    parser = eval_gsm8k.Parser(__doc__)
    add = parser.add_argument
    by_task = lambda name: "default: " + ", ".join(f"{task} {values[name]}" for task, values in DEFAULTS.items())
    add("--task", default="arithmetic", help="arithmetic, sudoku, pairs (embedded, no download) or gsm8k (needs --data)")
    add("--data", help="gsm8k: a .json/.jsonl(.gz/.xz) file, a folder of them, or a hub name")
    add("--answers", default="equations", choices=("equations", "full"), help="gsm8k: only the <<...>> notes, or the whole solution")
    add("--items", type=int, default=2, help="arithmetic: problems of 1 to so many changes, 2 to 5")
    add("--box", default="2x3", help="sudoku: rows x columns of a box; 3x3 is the 9x9 grid")
    add("--pairs", default="d1", choices=eval_gsm8k.PAIRS, help="pairs: weights of the ten pairs, d1 uniform, d2 rising")
    add("--latent-dim", type=int, default=0, help="dimensions of a latent shared by all tokens, trained for generation in --budget steps (0: none)")
    add("--out", default="out", help="folder for checkpoint.pt, log.jsonl and results.json")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--start", metavar="FILE", help="take stage 1 and the baseline from the plain.pt of another run, train stage 2 only")
    add("--seed", type=int, default=0, help="seed of the weights and of every draw")
    add("--size", choices=SIZES, help=f"shape of the model ({by_task('size')})")
    add("--init", metavar="FILE", help="start stage 1 from an SMDM .safetensors file, or smdm-170m from the hub (needs --size 170m)")
    add("--tokenizer", metavar="FILE", help="with --init: its tokenizer.json (default: TinyLlama's from the hub)")
    add("--max-len", type=int, help="tokens in prompt and canvas together (default: as arithmetic needs, 256 for gsm8k)")
    add("--canvas-len", type=int, help="tokens in the canvas (default: as arithmetic needs, 96 for gsm8k)")
    add("--steps", type=int, help=f"stage 1: plain steps ({by_task('steps')})")
    add("--batch", type=int, help=f"stage 1: sequences a step ({by_task('batch')})")
    add("--lr", type=float, help=f"stage 1: peak learning rate ({by_task('lr')})")
    add("--order-steps", type=int, help=f"stage 2: steps; the baseline sees as many sequences; 0: stage 1 only ({by_task('order_steps')})")
    add("--order-batch", type=int, help=f"stage 2: problems a step ({by_task('order_batch')})")
    add("--paths", type=int, help=f"stage 2: paths a problem, K; one more pass is for the canvas they start from ({by_task('paths')})")
    add("--order-lr", type=float, default=1e-3, help="stage 2 and baseline: peak learning rate of the denoiser")
    add("--head-lr", type=float, help=f"stage 2: peak learning rate of the policy ({by_task('head_lr')})")
    add("--policy-layers", type=int, help=f"stage 2: hidden layers of the policy ({by_task('policy_layers')})")
    add("--posterior-lr", type=float, default=1e-3, help="stage 2: peak learning rate of the posterior")
    add("--end-lr", type=float, default=0.01, help="every stage: share of its peak learning rates that is left at its end")
    add("--budget", type=int, help=f"stage 2: steps of generation (T) ({by_task('budget')})")
    add("--search", type=int, help=f"stage 2: problems whose best orders it starts from; 0: from nothing ({by_task('search')})")
    add("--search-steps", type=int, help=f"stage 2: steps in which these orders are learned ({by_task('search_steps')})")
    add("--tau", type=float, default=0.1, help="stage 2: temperature of the posterior")
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="muon: Muon for the blocks' matrices, AdamW for the rest")
    add("--freeze-denoiser", action=argparse.BooleanOptionalAction, help=f"stage 2: leave the denoiser as the baseline has it ({by_task('freeze_denoiser')})")
    add("--no-baseline", action="store_true", help="leave out the equal-compute plain baseline")
    add("--accumulate", type=int, default=1, help="split each step into so many micro-batches")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--problems", type=int, default=500, help="held-out problems in the closing table (0: no table)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the denoiser (default: on CUDA only)")
    add("--benchmark", action="store_true", help="time both stages and the samplers on random tokens, then stop")
    args = parser.parse_args(argv)
    if args.task not in DEFAULTS:
        raise UserError(f"unknown task {args.task!r}: choose from {', '.join(DEFAULTS)}")
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("budget", "order_batch", "batch", "paths", "accumulate", "save_every", "policy_layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    eval_gsm8k.check_device(args.device)
    if not args.tau > 0:
        raise UserError(f"--tau is {args.tau}: it must be above 0")
    if not 0 <= args.end_lr <= 1:
        raise UserError(f"--end-lr is {args.end_lr}: it must be a share of the peak, 0 to 1")
    if args.task == "gsm8k" and not args.data and not args.benchmark:
        raise UserError("--task gsm8k needs --data: a file, a folder, or a hub name like openai/gsm8k")
    if args.batch % args.accumulate or args.order_batch % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} must divide --batch {args.batch} and --order-batch {args.order_batch}")
    if not 2 <= args.items <= 5:
        raise UserError(f"--items is {args.items}: choose 2 to 5")
    if not re.fullmatch("[1-9]x[1-9]", args.box) or not 4 <= int(args.box[0]) * int(args.box[2]) <= 9:
        raise UserError(f"--box is {args.box}: give ROWSxCOLUMNS of a box of 4 to 9 cells, 2x3 or 3x3, say")
    args.box = int(args.box[0]), int(args.box[2])
    side = args.box[0] * args.box[1]
    if min(args.latent_dim, args.order_steps, args.search) < 0 or args.search_steps < 1:
        raise UserError("--latent-dim, --order-steps and --search must be at least 0, --search-steps at least 1")
    if args.task in ("sudoku", "pairs") and (args.init or args.max_len or args.canvas_len):
        raise UserError(f"--init, --max-len and --canvas-len do not go with --task {args.task}, whose layout is fixed: leave them out")
    if args.init and args.latent_dim:
        raise UserError("--init and --latent-dim do not go together: the published checkpoint has no latent")
    # A change takes 3 tokens of the prompt and 8 of the canvas; rows of a grid are parted by a token.
    canvas = {"arithmetic": 8 * args.items + 4, "gsm8k": 96, "sudoku": side * side, "pairs": 2}[args.task]
    args.canvas_len = args.canvas_len or canvas
    prompt = {"arithmetic": 16 + 3 * args.items, "gsm8k": 256 - args.canvas_len, "sudoku": side, "pairs": 1}[args.task]
    args.max_len = args.max_len or prompt + args.canvas_len
    if args.compile is None:
        args.compile = args.device.startswith("cuda")
    return args


# ---------------------------------------------------------------------------------------------------
# The run: models, data, checkpoint
# ---------------------------------------------------------------------------------------------------


def load_problems(args):
    """(training problems, held-out problems), never overlapping."""
    if args.task != "gsm8k":
        held_out = eval_gsm8k.held_out_problems(vars(args), max(args.problems, 256))
    if args.task == "arithmetic":
        return eval_gsm8k.arithmetic_problems(60_000, args.seed, False, args.items), held_out
    if args.task == "sudoku":
        return eval_gsm8k.sudoku_problems(60_000, 2 + args.seed, False, args.box), held_out
    if args.task == "pairs":
        return eval_gsm8k.pair_problems(60_000, args.seed, args.pairs), held_out
    problems = eval_gsm8k.load_gsm8k(args.data, args.answers)
    held_out = min(max(args.problems, 256), len(problems) // 10)
    if held_out == 0:
        raise UserError(f"{args.data} has {len(problems)} problems: at least 10 are needed")
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    # Variants of one problem differ in their numbers only: keep them on one side of the split.
    wording = lambda p: "".join(c for c in p["question"] if c.isalpha())
    test = [problems[i] for i in order[:held_out]]
    seen = {wording(p) for p in test}
    return [problems[i] for i in order[held_out:] if wording(problems[i]) not in seen], test


def make_tokenizer(args, problems):
    """Built from the training text, or the one that --init comes with."""
    if args.init:
        path = args.tokenizer or hub_file("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tokenizer.json")
        try:
            return eval_gsm8k.LlamaTokenizer(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): give a tokenizer.json")
    sample = problems[:: max(1, len(problems) // 20_000)]
    return eval_gsm8k.Tokenizer.build(p["question"] + eval_gsm8k.SEPARATOR + p["answer"] for p in sample)


class Run:
    """What a run consists of: configuration, tokenizer, the four networks, where it stands."""

    def __init__(self, args, tokenizer):
        n_layer, n_head, n_embd, n_hidden = SIZES[args.size]
        self.args, self.device, self.tokenizer = args, torch.device(args.device), tokenizer
        self.config = mdmvi.ModelConfig(
            tokenizer.vocab_size, args.max_len, n_layer, n_head, n_embd, n_hidden,
            tokenizer.mask_id, tokenizer.eos_id, rope_bf16=args.init is not None, latent_dim=args.latent_dim,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        self.denoiser = mdmvi.Denoiser(self.config).to(self.device)
        self.plain = None
        self.begin_orders()
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.stage, self.step, self.optimizer_state = "plain", 0, None

    def models(self):
        return self.denoiser, self.policy, self.posterior, self.plain

    def begin_orders(self):
        """New policy and posterior, as stage 2 starts with them. A denoiser that is not trained on is the baseline's:
        the rules and the learned order share one network."""
        if self.args.freeze_denoiser and self.plain is not None:
            self.denoiser, self.plain = self.plain, None
        torch.manual_seed(self.args.seed)
        self.policy = mdmvi.UnmaskPolicy(self.config, self.args.policy_layers).to(self.device)
        self.posterior = mdmvi.OrderPosterior(self.config).to(self.device).start_from(self.denoiser)

    def without_latent(self, n):
        """The denoiser as the searches for orders take one: a latent, if it has one, is 0 for all n sequences."""
        if not self.args.latent_dim:
            return self.denoiser
        return mdmvi.given(self.denoiser, torch.zeros(n, self.args.latent_dim, device=self.device))

    def log_alpha(self, tokens, canvas):
        """The posterior over orders. Which cells of a grid follow from which is more than a small network can tell
        from the solution, so there the search itself is q: nothing in it is learned, and it costs T passes."""
        if self.args.task != "sudoku":
            return self.posterior(tokens, canvas)
        step = mdmvi.sure_first_order(self.without_latent(len(tokens)), tokens, canvas, self.args.budget)
        return -10 * self.args.tau * (step + 1.0)  # rho is as good as 0 or 1

    def copy_plain(self):
        """The baseline goes on from where stage 1 ended."""
        self.plain = mdmvi.Denoiser(self.config).to(self.device)
        self.plain.load_state_dict(self.denoiser.state_dict())

    def save(self, path, optimizers=None):
        """Write to a temporary file and rename: a kill at any moment leaves a whole checkpoint behind."""
        state = {
            "program": "mdmvi", "task": self.args.task, "answers": self.args.answers,
            "canvas_len": self.args.canvas_len, "items": self.args.items, "box": self.args.box, "pairs": self.args.pairs,
            "policy_layers": self.args.policy_layers, "budget": self.args.budget, "tau": self.args.tau, "seed": self.args.seed, "order_steps": self.args.order_steps,
            "config": asdict(self.config), "tokenizer": self.tokenizer.pieces,
            "denoiser": self.denoiser.state_dict(), "policy": self.policy.state_dict(),
            "posterior": self.posterior.state_dict(), "plain": self.plain.state_dict() if self.plain else None,
            "stage": self.stage, "step": self.step, "optimizer": [o.state_dict() for o in optimizers] if optimizers else None,
            "generator": self.generator.get_state(),
        }  # fmt: skip
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    def load(self, path):
        state = eval_gsm8k.load_checkpoint(path, self.device)
        for name, here in (("task", self.args.task), ("answers", self.args.answers), ("items", self.args.items), ("box", self.args.box), ("pairs", self.args.pairs), ("canvas_len", self.args.canvas_len), ("policy_layers", self.args.policy_layers), ("config", asdict(self.config))):
            if state[name] != here:
                raise UserError(f"{path} has {name} {state[name]}, this run has {here}: give the flags it was trained with, or another --out")
        if state["stage"] == "done" and not state["order_steps"] and self.args.order_steps:
            raise UserError(f"{path} ended after stage 1 (--order-steps 0): train stages 1 and 2 together in another --out")
        if state["tokenizer"] != self.tokenizer.pieces:
            raise UserError(f"{path} has another vocabulary than this data gives: give the --data it was trained with")
        if state["plain"] is not None:
            self.copy_plain()
        for name in ("denoiser", "policy", "posterior", "plain"):
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.stage, self.step, self.optimizer_state = state["stage"], state["step"], state["optimizer"]


# ---------------------------------------------------------------------------------------------------
# The published SMDM base checkpoint. A .safetensors file is an 8-byte length, a JSON header and raw
# buffers, read here as data: nothing in it can run.
# ---------------------------------------------------------------------------------------------------

SMDM = {"smdm-170m": ("nieshen/SMDM", "mdm-170M-100e18.safetensors")}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def hub_file(repository, name):
    """Path of a file of a hub repository, downloaded once."""
    try:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, name)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise UserError(f"cannot get {name} of {repository} from the hub ({type(error).__name__}): go online or give a local file")


def read_safetensors(path):
    """{name: tensor} of a .safetensors file."""
    try:
        data = Path(path).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            raw = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = raw.view(entry["shape"])
        return tensors
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a .safetensors file, or {', '.join(SMDM)}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole .safetensors file ({type(error).__name__}): download it again")


def load_smdm(path, denoiser):
    """Fill a denoiser with an SMDM checkpoint; keys and shapes must be those of `mdmvi.smdm_name`."""
    tensors, state = read_safetensors(path), denoiser.state_dict()
    for name, weight in state.items():
        theirs = mdmvi.smdm_name(name)
        if theirs not in tensors:
            raise UserError(f"{path} has no {theirs}: it is not an SMDM checkpoint of {denoiser.config.n_layer} layers; check --size")
        if tensors[theirs].shape != weight.shape:
            raise UserError(f"{path} has {theirs} of shape {list(tensors[theirs].shape)}, this model {list(weight.shape)}: check --size and --tokenizer")
    extra = tensors.keys() - {mdmvi.smdm_name(name) for name in state}
    if extra:
        raise UserError(f"{path} has {min(extra)}, which this model has not: check --size")
    denoiser.load_state_dict({name: tensors[mdmvi.smdm_name(name)] for name in state})


def save_smdm(path, denoiser):
    """Write a denoiser in the layout that `load_smdm` reads, in fp32."""
    tensors = {mdmvi.smdm_name(name): w.detach().float().cpu().contiguous() for name, w in denoiser.state_dict().items()}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + 4 * tensor.numel()]}
        offset += 4 * tensor.numel()
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def share_of_peak(step, steps, end):
    """Learning rate schedule: 1% warm-up, then a cosine down to the share `end` of the peak."""
    warm_up = max(1, steps // 100)
    if step < warm_up:
        return (step + 1) / warm_up
    return end + (1 - end) / 2 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def wake(step, steps):
    """Factor of the posterior's rate: it waits for a tenth of stage 2, and takes another to come up to speed. Until
    the policy can follow an order, the KL outweighs what the order does for the tokens."""
    return min(1.0, max(0.0, 10 * step / steps - 1))


def autocast(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def compiled(model, args):
    """torch.compile'd, or the model as it is where that does not work here."""
    if not args.compile:
        return model
    try:
        fast = torch.compile(model)
        with autocast(torch.device(args.device)):
            fast(torch.zeros(2, args.max_len, dtype=torch.int64, device=args.device))
        return fast
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}): going on without it", file=sys.stderr)
        return model


def stage_setup(run, stage):
    """({module to train: peak learning rate}, steps, problems a step, loss function of a batch)."""
    args, g = run.args, run.generator
    if stage == "order":
        denoiser = compiled(run.denoiser, args)
        run.denoiser.requires_grad_(not args.freeze_denoiser)
        modules = {run.policy: args.head_lr}
        if args.task != "sudoku":
            modules[run.posterior] = args.posterior_lr
        if not args.freeze_denoiser:
            modules[run.denoiser] = args.order_lr

        order_loss = mdmvi.vmd_order_loss if args.latent_dim else mdmvi.order_loss

        def loss(tokens, canvas):
            return order_loss(denoiser, run.policy, run.log_alpha, tokens.long(), canvas, args.budget, args.tau, args.paths, g)

        return modules, args.order_steps, args.order_batch, loss
    model = run.denoiser if stage == "plain" else run.plain
    denoiser = compiled(model, args)
    if args.latent_dim:
        loss = lambda tokens, canvas: (mdmvi.vmd_loss(denoiser, tokens.long(), canvas, args.budget, g), {})
    else:
        loss = lambda tokens, canvas: (mdmvi.mdm_loss(denoiser, tokens.long(), canvas, g), {})
    if stage == "plain":
        return {model: args.lr}, args.steps, args.batch, loss
    return {model: args.order_lr}, args.order_steps, args.order_batch * (args.paths + 1), loss


def make_optimizers(modules, args):
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    modules: {module: peak learning rate}. Muon learns the embedded task in far fewer steps than AdamW alone;
    AdamW is the papers' optimiser.
    """
    matrices, rest = [], []
    for module, peak in modules.items():
        late = isinstance(module, mdmvi.OrderPosterior)
        in_block = lambda name, p: args.optimizer == "muon" and p.dim() == 2 and "blocks." in name
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        rest.append({"params": [p for name, p in named if not in_block(name, p)], "peak": peak, "late": late})
        matrices.append({"params": [p for name, p in named if in_block(name, p)], "peak": peak, "late": late})
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    matrices = [group for group in matrices if group["params"]]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train_step(optimizers, share, late_share, loss_of, data, batch, accumulate, generator):
    """One step on `batch` random rows of the tensors in `data`, which `loss_of` takes, at a share of the peak
    learning rates (`late_share` the posterior's).

    Returns (loss, stats), both still on the device.
    """
    total = 0.0
    for _ in range(accumulate):
        rows = torch.randint(len(data[0]), (batch // accumulate,), device=data[0].device, generator=generator)
        with autocast(data[0].device):
            loss, stats = loss_of(*(x[rows] for x in data))
        (loss / accumulate).backward()
        total = total + loss.detach() / accumulate
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:  # each clipped by itself: the posterior's gradient is rarely, but then by far, the largest
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = group["peak"] * (late_share if group["late"] else share)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, stats


def check(stop, where):
    """End the run if a signal has filled `stop`."""
    if stop:
        print(f"\nstopped {where}; go on with --resume", file=sys.stderr)
        raise KeyboardInterrupt


def train_stage(run, stage, tokens, canvas, stop, log):
    """Train one stage to its end from run.step on. `stop` is a list that a signal fills."""
    args, path = run.args, Path(run.args.out, "checkpoint.pt")
    modules, steps, batch, loss_of = stage_setup(run, stage)
    optimizers = make_optimizers(modules, args)
    for optimizer, state in zip(optimizers, run.optimizer_state or ()):
        optimizer.load_state_dict(state)
    run.optimizer_state = None
    sequences = batch * (args.paths + 1 if stage == "order" else 1)
    total, since, began = 0.0, 0, time.perf_counter()
    bar = tqdm(total=steps, initial=run.step, desc=stage, unit="step", dynamic_ncols=True, mininterval=1.0)
    while run.step < steps:
        share = share_of_peak(run.step, steps, args.end_lr)
        loss, stats = train_step(optimizers, share, share * wake(run.step, steps), loss_of, (tokens, canvas), batch, args.accumulate, run.generator)
        total, since = total + loss, since + 1
        run.step += 1
        bar.update()
        saving = run.step % args.save_every == 0 or stop or run.step == steps
        if saving or run.step % 20 == 0:
            mean = float(total) / since  # the only place that waits for the device; a NaN stays in the sum
            if not math.isfinite(mean):
                raise UserError(f"loss is {mean} at {stage} step {run.step}: {path} is as last saved; lower --{'lr' if stage == 'plain' else 'order-lr'}")
            rate = since * sequences / (time.perf_counter() - began)
            bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} sequences/s", refresh=False)
            log(dict(stage=stage, step=run.step, loss=mean, share_of_peak=share, sequences_per_second=rate, **{k: float(v) for k, v in stats.items()}))
            total, since, began = 0.0, 0, time.perf_counter()
        if saving and run.step < steps:
            run.save(path, optimizers)
        check(stop, f"at {stage} step {run.step}")
    bar.close()


def start_orders(run, tokens, canvas, stop):
    """Begin stage 2 from the best orders of some training problems: the posterior learns them, or on a grid,
    where the search itself is the posterior, the policy does."""
    args, g = run.args, torch.Generator(run.device).manual_seed(run.args.seed)
    run.begin_orders()
    if args.search == 0:
        return
    search = mdmvi.sure_first_order if args.task == "sudoku" else mdmvi.left_to_right_order
    rows = torch.randperm(len(tokens), device=run.device, generator=g)[: args.search]
    tokens, canvas, step, states = tokens[rows].long(), canvas[rows], [], []
    for x, on in tqdm(list(zip(tokens.split(64), canvas.split(64))), desc="search", unit="batch", dynamic_ncols=True):
        with autocast(run.device):
            step.append(search(run.without_latent(len(x)), x, on, args.budget))
            if args.task == "sudoku":
                states += states_of(run, x, step[-1])
        check(stop, "in the search for orders")
    if args.task == "sudoku":
        hidden, reveal = map(torch.cat, zip(*states))
        learner, data, batch = run.policy, (hidden, reveal), 1024

        def loss_of(hidden, reveal):
            return F.binary_cross_entropy_with_logits(run.policy(hidden), reveal), {}
    else:
        learner, data, batch = run.posterior, (tokens, canvas, torch.cat(step)), min(64, len(rows))

        def loss_of(x, on, step):
            return mdmvi.level_loss(run.posterior, x, on, step), {}

    optimizers = make_optimizers({learner: START_LR}, args)
    bar = tqdm(range(args.search_steps), desc="learning orders", unit="step", dynamic_ncols=True, mininterval=1.0)
    for s in bar:
        share = share_of_peak(s, args.search_steps, args.end_lr)
        loss, _ = train_step(optimizers, share, share, loss_of, data, batch, 1, g)
        if s % 20 == 0:
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
        check(stop, "in the search for orders")


@torch.no_grad()
def states_of(run, tokens, step):
    """What the policy sees on the way of each order, and should do: a list of (hidden [M, D], reveal [M]), one for
    each step but the last, over the M cells that are masked in it."""
    states = []
    for s in range(run.args.budget - 1):
        masked = step >= s
        hidden = run.without_latent(len(tokens))(tokens.masked_fill(masked, run.denoiser.mask_id))[1]
        states.append((hidden[masked].float(), (step == s)[masked].float()))
    return states


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


def train(run, tokens, canvas, stop):
    """Run the stages that are left, each saved when done."""
    args, out = run.args, Path(run.args.out)
    with open(out / "log.jsonl", "a") as file:

        def log(row):
            file.write(json.dumps(row) + "\n")
            file.flush()

        while run.stage != "done":
            stage = run.stage
            if stage == "search":
                start_orders(run, tokens, canvas, stop)
            else:
                train_stage(run, stage, tokens, canvas, stop, log)
            after_plain = "done" if args.order_steps == 0 else "search" if args.no_baseline else "baseline"
            run.stage, run.step = {"plain": after_plain, "baseline": "search", "search": "order", "order": "done"}[stage], 0
            if run.stage == "baseline":
                run.copy_plain()
            if run.stage == "search":
                run.save(out / "plain.pt")
            run.save(out / "checkpoint.pt")


def report(run, problems):
    """Print the bounds and the table, write results.json."""
    args = run.args
    if args.task == "pairs":
        return eval_gsm8k.print_pairs(run.tokenizer, run.denoiser, args.pairs, Path(args.out, "results.json"))
    tokens, canvas, fits = eval_gsm8k.encode_problems(problems, run.tokenizer, args.max_len, args.canvas_len)
    denoiser, policy, posterior, plain = run.models()
    x, on = tokens[fits][:256].long().to(run.device), canvas[fits][:256].to(run.device)
    generator = torch.Generator(run.device).manual_seed(args.seed)
    elbo = mdmvi.vmd_elbo if args.latent_dim else mdmvi.order_elbo
    bound = lambda *models: float(elbo(*models, x, on, args.budget, args.tau, 4, generator).sum() / on.sum())
    print(f"\nELBO at T={args.budget}, nats per canvas token, {len(x)} held-out problems, 4 paths each:")
    if args.order_steps:
        print(f"  learned order                      {bound(denoiser, policy, run.log_alpha):.4f}")
    print(f"  uniform random order, same model   {bound(denoiser, None, None):.4f}")
    if plain is not None:
        print(f"  uniform random order, plain model  {bound(plain, None, None):.4f}")
    if args.problems == 0:
        return
    problems = problems[: args.problems]
    tokens, canvas, _ = eval_gsm8k.encode_problems(problems, run.tokenizer, args.max_len, args.canvas_len, with_answers=False)
    models = denoiser, policy if args.order_steps else None, posterior, plain
    eval_gsm8k.print_scores(
        problems, run.tokenizer, tokens.to(run.device), canvas.to(run.device), models, [args.budget],
        single=args.task == "sudoku", json_file=Path(args.out, "results.json"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Benchmark
# ---------------------------------------------------------------------------------------------------


def seconds_of(function, device, repeats):
    """Seconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def benchmark(args, repeats=5):
    """Both stages at the same number of sequences, then the samplers, on random tokens, in one run."""
    run = Run(args, RandomTokens(32_000 if args.size == "170m" else 320))
    run.copy_plain()
    sequences, g = args.order_batch * (args.paths + 1), run.generator
    tokens = torch.randint(run.config.vocab_size, (512, args.max_len), generator=g, device=run.device)
    canvas = torch.arange(args.max_len, device=run.device).expand(512, -1) >= args.max_len - args.canvas_len
    steps = {}
    for stage in ("baseline", "order"):  # the baseline's batch is as many plain sequences as an order step has
        modules, _, batch, loss_of = stage_setup(run, stage)
        optimizers = make_optimizers(modules, args)
        steps[stage] = lambda o=optimizers, f=loss_of, b=batch: train_step(o, 0.01, 0.01, f, (tokens, canvas), b, args.accumulate, g)
        seconds_of(steps[stage], run.device, 2)
    times = {stage: [] for stage in steps}
    for _ in range(repeats):  # in turn, so that both meet the same machine
        for stage, step in steps.items():
            times[stage] += seconds_of(step, run.device, 1)
    plain, order = (sorted(times[stage])[repeats // 2] for stage in ("baseline", "order"))
    weights = sum(p.numel() for name, p in run.denoiser.named_parameters() if "wte" not in name)
    flops = sequences * args.max_len * (6 * weights + 12 * run.config.n_layer * run.config.n_embd * args.max_len)
    print(f"{args.size}: {weights / 1e6:.1f}M weights in products, {sequences} sequences of {args.max_len} a step, {run.device}")
    print(f"plain step  {1e3 * plain:9.1f} ms  {sequences * args.max_len / plain:11,.0f} tokens/s  {flops / plain / 1e12:7.2f} TFLOP/s{mfu(flops / plain)}")
    print(f"order step  {1e3 * order:9.1f} ms  {sequences * args.max_len / order:11,.0f} tokens/s  ratio to plain {order / plain:.2f}")
    n = min(64, sequences)
    rows, on = tokens[:n].clone(), canvas[:n]
    with torch.no_grad(), autocast(run.device):
        forward = lambda: run.denoiser(rows)
        seconds_of(forward, run.device, 2)
        print(f"\nsampling {n} sequences, budget {args.budget}; overhead: wall time / (forward passes taken x bare forward time)")
        for strategy in mdmvi.STRATEGIES:
            sample = lambda: mdmvi.generate(run.denoiser, rows, on, strategy, args.budget, policy=run.policy, generator=g)
            passes, wall, overhead = float(sample().steps.sum()) / n, [], []
            for _ in range(repeats):  # each beside its own forward passes: the machine's speed drifts
                bare = sum(seconds_of(forward, run.device, args.budget)) / args.budget
                wall += seconds_of(sample, run.device, 1)
                overhead.append(wall[-1] / (passes * bare))
            middle = lambda values: sorted(values)[repeats // 2]
            print(f"{strategy:16s} {n / middle(wall):9.1f} problems/s  {passes:5.2f} steps  overhead {middle(overhead):.2f}", flush=True)
    print(f"\npeak memory {peak_memory(run.device) / 2**30:.2f} GiB")


class RandomTokens:
    """Stands where a tokenizer does when there is no text."""

    eos_id, pieces = 0, None

    def __init__(self, vocab_size):
        self.vocab_size = self.mask_id = vocab_size


def mfu(rate):
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in BF16_PEAK.items() if key in name), None)
    return f"  MFU {100 * rate / peak:.1f}%" if peak else ""


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None):
    args = parse_args(argv)
    if args.benchmark:
        return benchmark(args)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {out} ({error.strerror}): give another --out")
    if (out / "checkpoint.pt").exists() and not args.resume:
        raise UserError(f"{out}/checkpoint.pt exists: pass --resume to go on from it, or another --out")
    problems, held_out = load_problems(args)
    run = Run(args, make_tokenizer(args, problems))
    tokenizer = run.tokenizer
    if args.init:
        load_smdm(hub_file(*SMDM[args.init]) if args.init in SMDM else args.init, run.denoiser)
    tokens, canvas, fits = eval_gsm8k.encode_problems(problems, tokenizer, args.max_len, args.canvas_len)
    if not any(fits):
        raise UserError(f"no problem fits {args.max_len} tokens with a canvas of {args.canvas_len}: raise --max-len or --canvas-len")
    tokens, canvas = tokens[fits].to(run.device), canvas[fits].to(run.device)
    count = sum(p.numel() for p in run.denoiser.parameters())
    print(f"{args.task}: {len(tokens):,} problems ({len(fits) - len(tokens):,} do not fit), vocabulary {tokenizer.vocab_size}, {count / 1e6:.2f}M parameters, seed {args.seed}, {run.device}", flush=True)
    if args.resume:
        run.load(out / "checkpoint.pt")
        trim_log(out / "log.jsonl", run.stage, run.step)
    elif args.start:
        run.load(args.start)
        if run.stage != "search":
            raise UserError(f"{args.start} is not the plain.pt of a run: give the file as it was before stage 2")
        run.generator.manual_seed(args.seed)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else sys.exit(130))
    train(run, tokens, canvas, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report(run, held_out)


if __name__ == "__main__":
    eval_gsm8k.run_main(main)
