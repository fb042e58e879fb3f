"""Problems and how they are scored: tokenizer, GSM8K reader, checkers, checkpoints, the table.

    python eval_gsm8k.py --checkpoint out/checkpoint.pt --budget 5 10 15
    python eval_gsm8k.py --data test.jsonl                    # real GSM8K problems
    python eval_gsm8k.py --sweep 1 2 3 4 5 8 --json rows.json     # for python -m examples.plot

A problem is a dict {question, answer}; its answer ends in "#### N". An embedded one lists all its
right solutions; the others are judged by their <<...>> equations, against the reference.
"""

import argparse
import functools
import gzip
import itertools
import json
import lzma
import math
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import mdmvi
from examples import spread
from examples.arithmetic import TASKS

SEPARATOR = "||"  # between question and answer, as in SMDM's fine-tuning data
VERSION = 7  # of the checkpoints
RULES = [rule for rule in mdmvi.STRATEGIES if rule != "learned"]
RULES += [f"{rule}+eos" for rule in mdmvi.CONFIDENCE_RULES]  # eos_aware
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its client would tell of each of its tries


class UserError(Exception):
    """Something the user can put right: printed as one line on stderr, exit code 2."""


# ------------------------------------------------------------------------------------------------
# Tokenizer: lossless; digits one token each, the marks of an equation, frequent words, else bytes
# ------------------------------------------------------------------------------------------------

MARKS = (">> <<", ">> #### ", " #### ", "<<", ">>", "####", "||", *"+-*/=0123456789")
# A word takes the space before it along, and the space after it where a number follows.
WORD = r" ?[A-Za-z]+(?: (?=[0-9]))?| ?[^\sA-Za-z0-9](?: (?=[0-9]))?|\s"
PIECE = re.compile("|".join(map(re.escape, MARKS)) + "|" + WORD, re.DOTALL)


class Tokenizer:
    """Ids: 0 is EOS (no text), 1..256 the bytes, then the pieces; `mask_id` comes after them."""

    eos_id = 0

    def __init__(self, pieces):
        self.pieces = [str(piece) for piece in pieces]
        self.ids = {piece: 257 + i for i, piece in enumerate(self.pieces)}
        self.vocab_size = self.mask_id = 257 + len(self.pieces)
        encoded = [piece.encode("utf-8", "replace") for piece in self.pieces]
        self.bytes = [b"", *(bytes([b]) for b in range(256)), *encoded, b""]  # of each id

    @classmethod
    def build(cls, texts, max_pieces=4096, min_count=5):
        """Marks, then the most frequent pieces of `texts` (ties in alphabetical order)."""
        count = Counter(piece for text in texts for piece in PIECE.findall(text))
        frequent = [piece for piece in count if count[piece] >= min_count and piece not in MARKS]
        frequent.sort(key=lambda piece: (-count[piece], piece))
        return cls([*MARKS, *frequent[: max_pieces - len(MARKS)]])

    def encode(self, text):
        ids = []
        for piece in PIECE.findall(text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids.extend(1 + b for b in piece.encode("utf-8", "replace"))
        return ids

    def decode(self, ids):
        # A model may string bytes together that are no text
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")


class LlamaTokenizer:
    """The LLaMA BPE of a published checkpoint, from the text of its tokenizer.json."""

    eos_id, vocab_size, mask_id = 2, 32_000, 32_000

    def __init__(self, pieces):
        try:
            import tokenizers
        except ImportError:
            raise UserError("the LLaMA tokenizer needs its package: pip install tokenizers")
        try:
            self.pieces, self.bpe = pieces, tokenizers.Tokenizer.from_str(pieces)
        except Exception as error:  # tokenizers raises plain Exception
            reason = str(error)[:80]
            raise UserError(f"this is not a tokenizer.json ({reason}): give the one of TinyLlama")

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(ids))


# ------------------------------------------------------------------------------------------------
# GSM8K: reading data files, checking answers
# ------------------------------------------------------------------------------------------------

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = tuple(kind + packed for kind in (".json", ".jsonl") for packed in ("", ".gz", ".xz"))


def read_records(path):
    """Yield (where, object) for each record of a file: a line of JSON each, or one JSON array."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; give UTF-8 .json or .jsonl, .gz or .xz too")
    is_array = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_array else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except (json.JSONDecodeError, RecursionError) as error:
            line, why = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
            raise UserError(f"{path} line {line} is not JSON ({why}): mend or remove it")
        if is_array:
            yield from ((f"{path} record {i}", record) for i, record in enumerate(found, 1))
        else:
            yield f"{path} line {number}", found


def hub_records(name, split):
    """(where, row) for each row of a data set on the hub."""
    try:
        import datasets

        subset = "main" if name == "openai/gsm8k" else None
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        why = " ".join(f"{type(error).__name__}: {error}".split())[:140]
        advice = "go online, pip install datasets, or give a local file"
        raise UserError(f"cannot load {name} from the hub ({why}): {advice}")
    return ((f"{name} row {i}", row) for i, row in enumerate(rows))


def load_gsm8k(data, answers="equations", split="train"):
    """Problems {question, answer} from a file, a folder of files, or a hub name.

    answers: "equations" keeps the <<...>> notes and the #### line, "full" the whole solution.
    Raises UserError for what cannot be read or is no such problem.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        records = itertools.chain.from_iterable(map(read_records, files))
    elif path.exists():
        records = read_records(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith(SUFFIXES):
        records = hub_records(data, split)
    else:
        raise UserError(f"no data at {data}: give a .json/.jsonl file, a folder, or a hub name")
    problems = [gsm8k_problem(record, answers, where) for where, record in records]
    if not problems:
        raise UserError(
            f"{data} holds no problem: give .json or .jsonl (.gz, .xz), an object a line"
        )
    return problems


def gsm8k_problem(record, answers, where):
    """One row of openai/gsm8k (prose with notes) or of GSM8k-Aug (question, cot, answer)."""
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        raise UserError(f"{where} has no columns question and answer: mend or remove it")
    # A final answer alone may be a number
    kinds = {"question": str, "answer": (str, int, float), "cot": str}
    for column, kind in kinds.items():
        if column in record and not isinstance(record[column], kind):
            raise UserError(f"{where} has a {column} that is no text: mend or remove it")
    solution, mark, final = str(record["answer"]).rpartition("####")
    if not mark and "cot" not in record or final_number(f"#### {final}") is None:
        raise UserError(f"{where} has no final answer: needed is '#### N', or a cot and a number")
    if "solutions" in record:  # an embedded problem
        solutions = record["solutions"]
        if not isinstance(solutions, list) or not all(isinstance(x, str) for x in solutions):
            raise UserError(f"{where} has solutions that are no list of texts: mend or remove it")
        return {key: record[key] for key in ("question", "answer", "solutions")}
    solution, final = record.get("cot", solution), final.strip()
    if answers == "equations":
        notes = re.findall(r"<<[^<>]*>>", solution)
        return {"question": record["question"], "answer": " ".join([*notes, f"#### {final}"])}
    return {"question": record["question"], "answer": f"{solution.strip()}\n#### {final}"}


def final_number(text):
    """The last number after `####`, $ and commas dropped, as a float; None if there is none."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None
    numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", tail.replace(",", "").replace("$", ""))
    return float(numbers[-1]) if numbers else None


def arithmetic_value(expression):
    """Value of a + - * / expression with brackets and %, or None if it is anything else."""
    expression = re.sub("[,$]", "", expression)
    expression = re.sub(r"(\d+(?:\.\d*)?|\.\d+)\s*%", r"(\1/100)", expression)
    expression = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # 007 is a number here
    # eval sees these characters only: no names, no powers, and no calls such as 2(3)
    if re.search(r"[^\d\s.+*/()-]|\*\*|//|[\d.)]\s*\(", expression):
        return None
    try:
        return float(eval(expression.strip()))
    except Exception:  # it divides by zero, say, or has a great many brackets
        return None


def solves_equations(text, reference):
    """Is every <<a op b=c>> true (to the cent), is there one, and is the last the right answer?"""
    right, result = final_number(reference), None
    for note in re.findall(r"<<([^<>]*)>>", text):
        left, _, written = note.rpartition("=")
        value, result = arithmetic_value(left), arithmetic_value(written)
        if None in (value, result) or not abs(value - result) <= 0.0101:
            return False
    return (
        None not in (result, right) and abs(result - right) <= 1e-6 and final_number(text) == right
    )


# ------------------------------------------------------------------------------------------------
# From problems to tensors and back; checkpoints
# ------------------------------------------------------------------------------------------------


def encode_problems(problems, tokenizer, config, with_answers=True):
    """Lay problems out as prompt, canvas of `canvas_len` tokens filled with EOS, then EOS off it.

    Returns (tokens int32 [M, max_len], canvas bool [M, max_len], fits: list of M bools). A problem
    that does not fit has an empty canvas.
    """
    max_len, canvas_len = config.max_len, config.canvas_len
    tokens = torch.full((len(problems), max_len), tokenizer.eos_id, dtype=torch.int32)
    canvas = torch.zeros(len(problems), max_len, dtype=torch.bool)
    fits = []
    for i, problem in enumerate(problems):
        prompt = tokenizer.encode(problem["question"] + SEPARATOR)
        answer = tokenizer.encode(problem["answer"]) if with_answers else []
        fits.append(len(prompt) + canvas_len <= max_len and len(answer) <= canvas_len)
        if fits[-1]:
            ids = torch.tensor(prompt + answer, dtype=torch.int32)
            tokens[i, : len(ids)] = ids
            canvas[i, len(prompt) : len(prompt) + canvas_len] = True
    return tokens, canvas, fits


def answer_text(tokenizer, tokens, canvas):
    """The text on one row's canvas, up to the first EOS."""
    ids = tokens[canvas].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)


class Models(NamedTuple):
    """The networks of a run; the orders are None before stage 2, plain without a baseline."""

    denoiser: mdmvi.Denoiser
    policy: torch.nn.Module
    posterior: torch.nn.Module
    plain: mdmvi.Denoiser


def make_orders(kind, config, budget):
    """A new (policy, posterior): "runs" from the left, "spread" over the text, or one score for
    each position, "free" with a policy that sees places, "paper" with the paper's networks (R)."""
    if kind == "runs":
        return mdmvi.RunPolicy(config), mdmvi.RunPosterior(config)
    if kind == "spread":
        posterior = spread.SpreadPosterior(config, budget)
        return spread.SpreadPolicy(config, posterior.timetable), posterior
    policy = mdmvi.PlacePolicy if kind == "free" else mdmvi.UnmaskPolicy
    return policy(config), mdmvi.OrderPosterior(config)


def load_checkpoint(path, device="cpu"):
    """What train.py wrote: (the dict, see train.Run.save; its tokenizer; its Models, on `device`).

    Raises UserError if it cannot be used.
    """
    advice = "give the checkpoint.pt that train.py wrote"
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: {advice}, or run python train.py first")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint.get("version", VERSION) != VERSION:
            raise UserError(f"checkpoint {path} was written by an older version: train again")
        args, config = checkpoint["args"], mdmvi.ModelConfig(**checkpoint["config"])
        pieces = checkpoint["tokenizer"]  # or the text of a tokenizer.json
        tokenizer = LlamaTokenizer(pieces) if isinstance(pieces, str) else Tokenizer(pieces)
        if tokenizer.vocab_size != config.vocab_size or args["budget"] < 1:
            raise ValueError
        orders = make_orders(args["orders"], config, args["budget"])
        networks = (mdmvi.Denoiser(config), *orders, mdmvi.Denoiser(config))
        states = [checkpoint[name] for name in Models._fields]
        for network, state in zip(networks, states):
            if state is not None:
                network.to(device).load_state_dict(state)
        models = Models(*(state and network for network, state in zip(networks, states)))
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        why = type(error).__name__
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({why}): {advice}")
    return checkpoint, tokenizer, models


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------


def wilson(right, n, z=1.96):
    """95% Wilson interval of a share, in percent."""
    p, middle = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def mcnemar(first, second):
    """Exact two-sided McNemar p-value of two lists of bools on the same problems."""
    wins = sum(a and not b for a, b in zip(first, second))
    losses = sum(b and not a for a, b in zip(first, second))
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def judge(text, problem):
    """(Is what stands after #### right, is all of it?), by the solutions or by the reference."""
    if "solutions" in problem:
        endings = [solution.rpartition("####")[2].strip() for solution in problem["solutions"]]
        _, mark, ending = text.rpartition("####")
        return mark != "" and ending.strip() in endings, text in problem["solutions"]
    reference = problem["answer"]
    return final_number(text) == final_number(reference), solves_equations(text, reference)


def attempt(problems, tokenizer, tokens, canvas, policy, batch, seed, rule, budget, denoiser):
    """Generate a solution for every problem with one rule; an empty canvas stays unsolved.

    Returns a dict of lists: answered, solved (bools), steps (numbers).
    """
    strategy, _, eos = rule.partition("+")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    options = {"policy": policy, "generator": generator, "eos_aware": bool(eos)}
    texts, steps = [], []
    for x, on in zip(tokens.split(batch), canvas.split(batch)):
        out = mdmvi.generate(denoiser, x.long(), on, strategy, budget, **options)
        rows = zip(out.tokens.cpu(), on.cpu())
        texts += [answer_text(tokenizer, row, place) for row, place in rows]
        steps += out.steps.tolist()
    answered, solved = zip(*map(judge, texts, problems))
    return {"answered": answered, "solved": solved, "steps": steps}


def score(run, models, budgets, rules, sweep):
    """Yield (row, attempt) for the table: the learned order, then every rule at its average steps,
    rounded up, and at its largest number; without a policy, every rule at the budgets; then every
    rule at the steps of `sweep`.

    run(rule, budget, denoiser) is an attempt. Each rule runs on the order-trained denoiser and on
    the plain one, and keeps the one with more right answers.
    """
    tries = [("order" if models.policy else "plain", models.denoiser)]
    tries += [("plain", models.plain)] if models.plain else []

    @functools.cache
    def best_model(rule, steps):
        results = [(name, run(rule, steps, denoiser)) for name, denoiser in tries]
        return max(results, key=lambda r: (sum(r[1]["answered"]), sum(r[1]["solved"])))

    def rule_rows(budget, match, steps, ours=None):
        for rule in rules:
            model, result = best_model(rule, steps)
            yield make_row(rule, budget, match, model, result, ours), result

    for budget in budgets:
        if models.policy is None:
            yield from rule_rows(budget, "", budget)
            continue
        ours = run("learned", budget, models.denoiser)
        row = make_row("learned", budget, "", "order", ours, None)
        yield row, ours
        yield from rule_rows(budget, "@Avg", max(1, math.ceil(row["average_steps"] - 1e-9)), ours)
        yield from rule_rows(budget, "@Max", max(1, max(ours["steps"])), ours)
    for steps in sweep:
        yield from rule_rows(steps, "sweep", steps)


def make_row(name, budget, match, model, result, ours):
    """One row as --json writes it; p-values are of `ours`, the learned order, against it."""
    n, steps = len(result["steps"]), [s for s in result["steps"] if s] or [0]  # 0: did not fit
    row = {
        "method": name,
        "budget": budget,
        "match": match,
        "model": model,
        "problems": n,
        "average_steps": sum(steps) / len(steps),
        "min_steps": min(steps),
        "max_steps": max(steps),
    }
    for key in ("answered", "solved"):
        row[key] = sum(result[key]) / n
        row["p_" + key] = None if ours is None else mcnemar(ours[key], result[key])
    return row


def p_text(p):
    if p is None:
        return ""
    return "< 1e-10" if p < 1e-10 else f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def aligned(lines):
    """Rows of cells as plain text in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
    return "\n".join(rows)


def table(rows):
    """The rows as plain text."""
    lines = [("method", "T", "model", "steps", "[min, max]", "answer %", "p", "solved %", "p")]
    for row in rows:
        cells = [f"{row['method']} {row['match']}".strip(), str(row["budget"]), row["model"]]
        cells += [f"{row['average_steps']:.2f}", f"[{row['min_steps']}, {row['max_steps']}]"]
        for key in ("answered", "solved"):
            low, high = wilson(round(row[key] * row["problems"]), row["problems"])
            cells += [f"{100 * row[key]:.1f} [{low:.1f}, {high:.1f}]", p_text(row["p_" + key])]
        lines.append(cells)
    return aligned(lines)


def by_length(problems, result):
    """The learned order by number of equations in the reference, as plain text."""
    lines = [("equations", "problems", "average steps", "answer %", "solved %")]
    answers = [problem["answer"] for problem in problems]
    lengths = [answer.count("<<") or answer.count("=") for answer in answers]  # prose has = too
    for n in sorted(set(lengths)):
        chosen = [i for i, length in enumerate(lengths) if length == n]
        steps = [result["steps"][i] for i in chosen if result["steps"][i]] or [0]
        cells = [str(n), str(len(chosen)), f"{sum(steps) / len(steps):.2f}"]
        for key in ("answered", "solved"):
            cells.append(f"{100 * sum(result[key][i] for i in chosen) / len(chosen):.1f}")
        lines.append(cells)
    return aligned(lines)


def print_scores(
    problems, tokenizer, models, budgets, rules=RULES, sweep=(), batch=128, seed=0, json_file=None
):
    """Score, print the table and the learned order by length, write the rows to `json_file`."""
    config = models.denoiser.config
    tokens, canvas, fits = encode_problems(problems, tokenizer, config, with_answers=False)
    if not all(fits):
        print(f"{fits.count(False)} prompts do not fit and count as wrong", file=sys.stderr)
    device = next(models.denoiser.parameters()).device
    data = (problems, tokenizer, tokens.to(device), canvas.to(device), models.policy, batch, seed)
    rows_of_budget = 1 + 2 * len(rules) if models.policy else len(rules)
    count = len(budgets) * rows_of_budget + len(sweep) * len(rules)
    run, results = functools.partial(attempt, *data), []
    with tqdm(score(run, models, budgets, rules, sweep), "scoring", count, unit="row") as bar:
        for row, result in bar:
            results.append((row, result))
            bar.set_postfix_str(f"{row['method']} {100 * row['answered']:.1f}%", refresh=False)
    rows = [row for row, _ in results]
    precision = "TF32" if device.type == "cuda" else "fp32"
    note = f"{precision}; p: exact McNemar test, learned against a rule"
    print(f"\n{len(problems)} problems, {note}\n\n{table(rows)}")
    for row, result in results:
        if row["method"] == "learned":
            print(f"\nlearned order, T={row['budget']}, by number of equations\n")
            print(by_length(problems, result))
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")


def writable(path):
    """argparse type: a file that can be written, found out before the long work."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"cannot write {path}: give a file in a folder that can be written")
    return path


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the examples as written, and show every default that is set."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with our one line on stderr instead of its usage block."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def at_least(least, kind=int):
    """argparse type: a number from `least` up that torch takes, as a seed too."""

    def number(text):
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{value} is not in {least} .. 2^63 - 1")
        return value

    return number


positive, whole, amount = at_least(1), at_least(0), at_least(0, float)


def check_device(name):
    """Raise UserError if there is no such device; on CUDA, let fp32 products use TF32."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not there: choose cpu, or cuda where there is a GPU")
    if torch.device(name).type == "cuda":
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.set_float32_matmul_precision("high")


def pick_problems(checkpoint, data, n):
    """The first n problems of --data, or of the held-out stream that the checkpoint goes with."""
    if data:
        return load_gsm8k(data, checkpoint["args"]["answers"], "test")[:n]
    if checkpoint["args"]["data"] in TASKS:
        return TASKS[checkpoint["args"]["data"]](n or 2000, 1, True)
    raise UserError("this checkpoint was trained on --data: give other problems as --data here")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add("--data", help=".json/.jsonl(.gz/.xz) file, folder or hub name (default: embedded ones)")
    add("--budget", type=positive, nargs="+", help="budgets T (default: the one trained for)")
    names = {"choices": RULES, "default": RULES, "metavar": "RULE"}
    add("--strategies", nargs="+", help="rules to compare with", **names)
    add("--sweep", type=positive, nargs="+", default=(), help="score the rules at these steps too")
    add("--problems", type=positive, help="how many (default: 2000 embedded ones, or the file)")
    add("--batch", type=positive, default=128, help="problems generated together")
    add("--seed", type=whole, default=0, help="seed of the draws")
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    add("--json", type=writable, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(argv)
    check_device(args.device)
    checkpoint, tokenizer, models = load_checkpoint(args.checkpoint, args.device)
    problems = pick_problems(checkpoint, args.data, args.problems)
    data = (problems, tokenizer, models, args.budget or [checkpoint["args"]["budget"]])
    print_scores(*data, args.strategies, args.sweep, args.batch, args.seed, args.json)


def complain(message):
    """Leave with one line on stderr and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def run_main(main):
    """Run a script: what the user can mend is one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        try:
            main()
        finally:  # argparse leaves by SystemExit after --help
            sys.stdout.flush()
    except KeyboardInterrupt as stop:  # train.py says where
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, head say, has seen enough; nothing to flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        complain(error)
    except OSError as error:
        complain(f"{error}: give another file or folder")
    except torch.OutOfMemoryError:
        complain("the GPU has too little memory: lower --batch, or raise --accumulate of train.py")


if __name__ == "__main__":
    run_main(main)
