"""Problems and how they are scored: tokenizer, GSM8K reader, checkers, checkpoints, the table.

    python eval_gsm8k.py --checkpoint out/checkpoint.pt --budget 5 10 15
    python eval_gsm8k.py --data test.jsonl                    # real GSM8K problems
    python eval_gsm8k.py --sweep 1 2 3 4 5 8 --json rows.json     # for python -m examples.plot

A problem is a dict {question, answer}; its answer is a chain of <<...>> notes, then "#### N". An
embedded one lists all its right solutions; the others are judged by their equations, against the
reference.
"""

import argparse
import ast
import gzip
import json
import lzma
import math
import operator
import os
import re
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import mdmvi
from examples.arithmetic import TASKS

SEPARATOR = "||"  # between question and answer, as in SMDM's fine-tuning data
VERSION = 2  # of the checkpoints
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its client would tell of each of its tries


class UserError(Exception):
    """Something the user can put right: printed as one line on stderr, exit code 2."""


# ------------------------------------------------------------------------------------------------
# Tokenizer: lossless; digits one token each, the marks of an equation, frequent words, else bytes
# ------------------------------------------------------------------------------------------------

SYMBOLS = (">> <<", ">> #### ", " #### ", "<<", ">>", "####", "||", "+", "-", "*", "/", "=")
MARKS = (*SYMBOLS, *"0123456789")
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
                ids.extend(1 + b for b in piece.encode("utf-8", "surrogatepass"))
        return ids

    def decode(self, ids):
        text = b"".join(self.token_bytes(i) for i in ids)
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # bytes a model strung together
            return text.decode("utf-8", "replace")

    def token_bytes(self, i):
        if i in (self.eos_id, self.mask_id):
            return b""
        return bytes([i - 1]) if i < 257 else self.pieces[i - 257].encode("utf-8", "surrogatepass")


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


def tokenizer_of(pieces):
    """The tokenizer of a checkpoint: its list of pieces, or the text of a tokenizer.json."""
    return LlamaTokenizer(pieces) if isinstance(pieces, str) else Tokenizer(pieces)


# ------------------------------------------------------------------------------------------------
# GSM8K: reading data files, checking answers
# ------------------------------------------------------------------------------------------------

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = tuple(kind + packed for kind in (".json", ".jsonl") for packed in ("", ".gz", ".xz"))


def read_records(path):
    """Yield (where, object) for each record: JSON lines, or one JSON array in a .json file."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; give UTF-8 .json or .jsonl, .gz or .xz too")
    if not text.strip():
        raise UserError(f"{path} is empty: give a file with one JSON object a line")
    if text.lstrip().startswith("["):
        yield from ((f"record {i}", r) for i, r in enumerate(parsed(text, path, 1), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parsed(line, path, number)


def parsed(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path} line {line} is not JSON ({error.msg}): mend or remove it")
    except RecursionError:
        raise UserError(f"{path} line {first_line} is nested too deeply: mend or remove it")


def hub_records(name, split):
    """(where, row) for each row of a data set on the hub."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} is a hub name: pip install datasets, or give a local file")
    try:
        subset = "main" if name == "openai/gsm8k" else None
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:140]
        raise UserError(
            f"cannot load {name} from the hub ({reason}): go online or give a local file"
        )
    return ((f"row {i}", row) for i, row in enumerate(rows))


def load_gsm8k(data, answers="equations", split="train"):
    """Problems {question, answer, reference} from a file, a folder of files, or a hub name.

    answers: "equations" keeps the <<...>> notes and the #### line, "full" the whole solution.
    Raises UserError for what cannot be read or is no such problem.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"no .json or .jsonl file (plain, .gz, .xz) in the folder {path}")
        sources = [(file, read_records(file)) for file in files]
    elif path.exists():
        sources = [(path, read_records(path))]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith(SUFFIXES):
        sources = [(data, hub_records(data, split))]
    else:
        raise UserError(f"no data at {data}: give a .json/.jsonl file, a folder, or a hub name")
    problems = []
    for source, records in sources:
        problems += [gsm8k_problem(r, answers, f"{source} {where}") for where, r in records]
    if not problems:
        raise UserError(f"{data} holds no problem: give a file with one JSON object a line")
    return problems


def gsm8k_problem(record, answers, where):
    """One row of openai/gsm8k (prose with notes) or of GSM8k-Aug (question, cot, answer)."""
    columns = ("question", "answer", "cot")
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        raise UserError(f"{where} has no columns question and answer: mend or remove it")
    for column in columns:
        # A final answer alone may be a number
        number = column == "answer" and isinstance(record[column], (int, float))
        if column in record and not isinstance(record[column], str) and not number:
            raise UserError(f"{where} has a {column} that is no text: mend or remove it")
    solution, mark, final = str(record["answer"]).rpartition("####")
    if "cot" in record:
        solution = record["cot"]
    elif not mark:
        raise UserError(f"{where} has no final answer: needed is '#### N', or a column cot")
    if final_number(f"#### {final}") is None:
        raise UserError(f"{where} has no number in its final answer: mend or remove it")
    final = final.strip()
    if "solutions" in record:  # an embedded problem
        solutions = record["solutions"]
        if not isinstance(solutions, list) or not all(isinstance(x, str) for x in solutions):
            raise UserError(f"{where} has solutions that are no list of texts: mend or remove it")
        return {key: record[key] for key in ("question", "answer", "solutions")}
    equations = " ".join(re.findall(r"<<[^<>]*>>", solution))
    if answers == "equations":
        text = f"{equations} #### {final}".lstrip()
    else:
        text = f"{solution.strip()}\n#### {final}"
    return {"question": record["question"], "answer": text, "reference": f"#### {final}"}


def final_number(text):
    """The last number after `####`, $ and commas dropped, as a float; None if there is none."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None
    numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", tail.replace(",", "").replace("$", ""))
    return float(numbers[-1]) if numbers else None


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def arithmetic_value(expression):
    """Value of a + - * / expression with brackets and %, or None if it is anything else."""

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return {ast.USub: -1, ast.UAdd: 1}[type(node.op)] * value(node.operand)
        return float(node.value)

    expression = re.sub("[,$]", "", expression)
    if not re.fullmatch(r"[\d\s.+*/()%-]*", expression):
        return None
    expression = re.sub(r"(\d+\.?\d*|\.\d+)\s*%", r"(\1/100)", expression)
    expression = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # 007 is a number here
    try:
        with warnings.catch_warnings():  # of what looks like a call, 2(3)
            warnings.simplefilter("ignore")
            return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, AttributeError, TypeError, ArithmeticError):
        return None
    except (RecursionError, MemoryError):  # a model can write a great many brackets
        return None


def solves_equations(text, reference):
    """Is every <<a op b=c>> true (to the cent), is there one, and is the last the right answer?"""
    right, result = final_number(reference), None
    for note in re.findall(r"<<([^<>]*)>>", text):
        left, _, written = note.rpartition("=")
        value, result = arithmetic_value(left), arithmetic_value(written)
        if value is None or result is None or not abs(value - result) <= 0.0101:
            return False
    if result is None or right is None or abs(result - right) > 1e-6:
        return False
    return final_number(text) == right


# ------------------------------------------------------------------------------------------------
# From problems to tensors and back; checkpoints
# ------------------------------------------------------------------------------------------------


def encode_problems(problems, tokenizer, max_len, canvas_len, with_answers=True):
    """Lay problems out as prompt, canvas of `canvas_len` tokens filled with EOS, then EOS off it.

    Returns (tokens int32 [M, max_len], canvas bool [M, max_len], fits: list of M bools). A problem
    that does not fit has an empty canvas.
    """
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
    """The networks of a checkpoint; policy is None before stage 2, plain without a baseline."""

    denoiser: mdmvi.Denoiser
    policy: mdmvi.UnmaskPolicy
    posterior: mdmvi.OrderPosterior
    plain: mdmvi.Denoiser


def make_orders(kind, config):
    """A new (policy, posterior): "runs" from the left, or "free" orders as in the paper."""
    if kind == "runs":
        return mdmvi.RunPolicy(config), mdmvi.RunPosterior(config)
    return mdmvi.UnmaskPolicy(config), mdmvi.OrderPosterior(config)


PARTS = {name: dict for name in ("args", "config", "denoiser", "policy", "posterior")}
PARTS |= {"plain": (dict, type(None)), "tokenizer": (list, str), "optimizers": list}
PARTS |= {"stage": str, "step": int, "generator": torch.Tensor}


def load_checkpoint(path, device="cpu"):
    """The dict that train.py wrote (see train.Run.save). Raises UserError if it cannot be used."""
    advice = "give the checkpoint.pt that train.py wrote"
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: {advice}, or run python train.py first")
    if os.path.getsize(path) == 0:
        raise UserError(f"checkpoint {path} is empty: {advice}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        reason = type(error).__name__
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({reason}): {advice}")
    if not isinstance(checkpoint, dict) or checkpoint.get("program") != "mdmvi":
        raise UserError(f"checkpoint {path} was written by another program: {advice}")
    if checkpoint.get("version") != VERSION:
        raise UserError(f"checkpoint {path} was written by an older version: train again")
    for name, kind in PARTS.items():
        if name not in checkpoint or not isinstance(checkpoint[name], kind):
            raise UserError(f"checkpoint {path} is damaged (its {name} is missing): {advice}")
    return checkpoint


def fill(network, state, where):
    """load_state_dict, or UserError where the tensors do not fit the network."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(
            f"{where} does not fit the rest of the checkpoint: it is damaged, train again"
        )


def build_models(checkpoint, device="cpu"):
    """The Models of a checkpoint, ready for use. Raises UserError where its parts do not fit."""
    args, has_plain = checkpoint["args"], checkpoint["plain"] is not None
    try:
        config = mdmvi.ModelConfig(**checkpoint["config"])
        orders = make_orders(args["orders"], config)
        plain = mdmvi.Denoiser(config) if has_plain else None
        models = Models(mdmvi.Denoiser(config), *orders, plain)
        begun = checkpoint["stage"] == "order" and checkpoint["step"] > 0
        has_order = args["order_steps"] > 0 and (begun or checkpoint["stage"] == "done")
        fits = tokenizer_of(checkpoint["tokenizer"]).vocab_size == config.vocab_size
        fits = fits and args["budget"] >= 1 and config.canvas_len < config.max_len
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError):
        fits = False
    if not fits:
        raise UserError("this checkpoint is damaged, its parts do not fit each other: train again")
    for name, network in models._asdict().items():
        if network is not None:
            fill(network, checkpoint[name], f"the part {name!r}")
            network.to(device).eval()
    return models if has_order else models._replace(policy=None)


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


def after_mark(text):
    """What stands after the last ####, or all of the text."""
    return text.rpartition("####")[2].strip()


def is_answered(text, problem):
    """Is what stands after #### right: as in one of the solutions, or the reference's number?"""
    if "solutions" in problem:
        return "####" in text and after_mark(text) in map(after_mark, problem["solutions"])
    right = final_number(problem["reference"])
    return final_number(text) is not None and final_number(text) == right


def is_solved(text, problem):
    if "solutions" in problem:
        return text in problem["solutions"]
    return solves_equations(text, problem["reference"])


def attempt(
    problems, tokenizer, tokens, canvas, strategy, budget, denoiser, batch, seed, **options
):
    """Generate a solution for every problem with one strategy; an empty canvas stays unsolved.

    Returns a dict: answered and solved (lists of bools), steps (list), seconds, texts.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    options = {"generator": generator, **options}
    texts, steps, start = [], [], time.perf_counter()
    for x, on in zip(tokens.split(batch), canvas.split(batch)):
        out = mdmvi.generate(denoiser, x.long(), on, strategy, budget, **options)
        rows = zip(out.tokens.cpu(), on.cpu())
        texts += [answer_text(tokenizer, row, place) for row, place in rows]
        steps += out.steps.tolist()
    return {
        "answered": [is_answered(text, problem) for text, problem in zip(texts, problems)],
        "solved": [is_solved(text, problem) for text, problem in zip(texts, problems)],
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "texts": texts,
    }


def all_rules():
    """(strategy, eos_aware) of every fixed rule."""
    rules = [(strategy, False) for strategy in mdmvi.STRATEGIES if strategy != "learned"]
    return rules + [(strategy, True) for strategy in mdmvi.CONFIDENCE_RULES]


def parse_rules(names):
    """[(strategy, eos_aware)] from names like top_prob or top_prob+eos."""
    known = {rule_name(*rule): rule for rule in all_rules()}
    for name in names:
        if name not in known:
            raise UserError(f"unknown strategy {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def rule_name(strategy, eos_aware):
    return strategy + ("+eos" if eos_aware else "")


def score(run, models, budgets, rules, sweep):
    """Yield (row, attempt) for the table: the learned order, then every rule at its average steps,
    rounded up, and at its largest number; without a policy, every rule at the budgets; then every
    rule at the steps of `sweep`.

    run(strategy, budget, denoiser, **options) is an attempt. Each rule runs on the order-trained
    denoiser and on the plain one, and keeps the one with more right answers.
    """
    done = {}

    def best_model(strategy, eos_aware, steps):
        tries = [("order" if models.policy else "plain", models.denoiser)]
        tries += [("plain", models.plain)] if models.plain else []
        results = [(name, run(strategy, steps, d, eos_aware=eos_aware)) for name, d in tries]
        return max(results, key=lambda r: (sum(r[1]["answered"]), sum(r[1]["solved"])))

    def rule_rows(budget, match, steps, ours=None):
        for rule in rules:
            if (rule, steps) not in done:
                done[rule, steps] = best_model(*rule, steps)
            model, result = done[rule, steps]
            yield make_row(rule_name(*rule), budget, match, model, result, ours), result

    for budget in budgets:
        if models.policy is None:
            yield from rule_rows(budget, "", budget)
            continue
        ours = run("learned", budget, models.denoiser, policy=models.policy)
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
        "problems_per_second": n / result["seconds"],
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
    """The learned order's average steps by number of equations in the reference, as plain text."""
    lines = [("equations", "problems", "average steps", "answer %", "solved %")]
    answers = [problem["answer"] for problem in problems]
    lengths = [answer.count("<<") or answer.count("=") for answer in answers]  # prose has = too
    for n in sorted(set(lengths)):
        chosen = [i for i, length in enumerate(lengths) if length == n]
        steps, answered, solved = (
            sum(result[key][i] for i in chosen) / len(chosen)
            for key in ("steps", "answered", "solved")
        )
        shares = (f"{100 * answered:.1f}", f"{100 * solved:.1f}")
        lines.append((str(n), str(len(chosen)), f"{steps:.2f}", *shares))
    return aligned(lines)


def print_scores(
    problems,
    tokenizer,
    max_len,
    canvas_len,
    models,
    budgets,
    rules=None,
    sweep=(),
    batch=128,
    seed=0,
    json_file=None,
):
    """Score, print the table and the learned order by length, write the rows to `json_file`."""
    layout = (tokenizer, max_len, canvas_len)
    tokens, canvas, fits = encode_problems(problems, *layout, with_answers=False)
    if not all(fits):
        print(f"{fits.count(False)} prompts do not fit and count as wrong", file=sys.stderr)
    device = next(models.denoiser.parameters()).device
    tokens, canvas = tokens.to(device), canvas.to(device)
    rules = all_rules() if rules is None else rules
    count = len(rules) * (len(budgets) * (2 if models.policy else 1) + len(sweep))
    count += len(budgets) if models.policy else 0

    def run(strategy, budget, denoiser, **options):
        data = (problems, tokenizer, tokens, canvas)
        return attempt(*data, strategy, budget, denoiser, batch, seed, **options)

    results = []
    with tqdm(score(run, models, budgets, rules, sweep), "scoring", count, unit="row") as bar:
        for row, result in bar:
            results.append((row, result))
            bar.set_postfix_str(f"{row['method']} {100 * row['answered']:.1f}%", refresh=False)
    rows = [row for row, _ in results]
    precision = "TF32" if device.type == "cuda" else "fp32"
    print(
        f"\n{len(problems)} problems, {precision}; p: exact McNemar test, learned against a rule\n"
    )
    print(table(rows))
    for row, result in results:
        if row["method"] == "learned":
            print(f"\nlearned order, T={row['budget']}, by number of equations\n")
            print(by_length(problems, result))
    if json_file:
        write_file(json_file, json.dumps(rows, indent=1) + "\n")


def check_file(path):
    """Raise UserError if no file can be written there: to be asked before the long work."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"cannot write {path}: give a file in a folder that can be written")


def write_file(path, text):
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another file")


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


def positive(text):
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def seed(text):
    """argparse type: a whole number that torch takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 .. 2^63 - 1")
    return value


def check_device(name):
    """Raise UserError if there is no such device; on CUDA, let fp32 products use TF32."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not there: choose cpu, or cuda on a machine with a GPU"
        )
    if torch.device(name).type == "cuda":
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.set_float32_matmul_precision("high")


def pick_problems(checkpoint, data, n):
    """The first n problems of --data, or of the held-out stream that the checkpoint goes with."""
    if data:
        return load_gsm8k(data, checkpoint["args"]["answers"], "test")[:n]
    if checkpoint["args"]["data"] in TASKS:
        return TASKS[checkpoint["args"]["data"]](n or 2000, 1, True)
    raise UserError("this checkpoint was trained on --data: give --data here, a file or hub name")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add("--data", help=".json/.jsonl(.gz/.xz) file, folder or hub name (default: embedded ones)")
    add("--budget", type=positive, nargs="+", help="budgets T (default: the one trained for)")
    add("--strategies", nargs="+", metavar="RULE", help="rules to compare with (default: all)")
    add("--sweep", type=positive, nargs="+", default=(), help="score the rules at these steps too")
    add("--problems", type=positive, help="how many (default: 2000 embedded ones, or the file)")
    add("--batch", type=positive, default=128, help="problems generated together")
    add("--seed", type=seed, default=0, help="seed of the draws")
    add("--device", default=device, help="cpu, cuda, cuda:1, ...")
    add("--json", metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.json:
        check_file(args.json)
    rules = parse_rules(args.strategies) if args.strategies else None
    checkpoint = load_checkpoint(args.checkpoint)
    models = build_models(checkpoint, args.device)
    problems = pick_problems(checkpoint, args.data, args.problems)
    layout = (checkpoint["config"]["max_len"], checkpoint["config"]["canvas_len"])
    print_scores(
        problems,
        tokenizer_of(checkpoint["tokenizer"]),
        *layout,
        models,
        args.budget or [checkpoint["args"]["budget"]],
        rules,
        args.sweep,
        args.batch,
        args.seed,
        args.json,
    )


def run_main(main):
    """Run a script: a UserError is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        try:
            main()
        finally:  # argparse leaves by SystemExit after --help
            sys.stdout.flush()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, head say, has seen enough; nothing to flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    run_main(main)
