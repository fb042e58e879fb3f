"""Problems and how they are scored: data, the embedded task, tokenizer, checkers, checkpoints, the table.

As a program it scores a checkpoint with every strategy at matched steps:

    python eval_gsm8k.py --checkpoint out/checkpoint.pt --budget 5 10 15
    python eval_gsm8k.py --data test.jsonl                # real GSM8K problems
"""

import argparse
import ast
import gzip
import hashlib
import itertools
import json
import lzma
import math
import operator
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import mdmvi

SEPARATOR = "||"  # between question and answer, as in SMDM's fine-tuning data
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network the hub's client would tell of each of its tries


class UserError(Exception):
    """Something the user can put right: printed as one line on stderr, exit code 2."""


# ---------------------------------------------------------------------------------------------------
# Tokenizer: lossless; digits one token each, the marks of an equation, frequent words, bytes for the rest
# ---------------------------------------------------------------------------------------------------

MARKS = (">> <<", ">> #### ", "<<", ">>", "####", "||", "+", "-", "*", "/", "=", *"0123456789")
# A word takes the space before it along, and the space after it where a number follows.
PIECE = re.compile("|".join(map(re.escape, MARKS)) + r"| ?[A-Za-z]+(?: (?=[0-9]))?| ?[^\sA-Za-z0-9](?: (?=[0-9]))?|\s", re.DOTALL)


class Tokenizer:
    """Ids: 0 is EOS (no text), 1..256 the bytes, then the pieces. `mask_id` is one past the last."""

    eos_id = 0

    def __init__(self, pieces):
        self.pieces = list(pieces)
        self.ids = {piece: 257 + i for i, piece in enumerate(self.pieces)}
        self.vocab_size = self.mask_id = 257 + len(self.pieces)

    @classmethod
    def build(cls, texts, max_pieces=4096, min_count=5):
        """Marks, then the most frequent pieces of `texts` (ties in alphabetical order)."""
        count = Counter(piece for text in texts for piece in PIECE.findall(text))
        frequent = sorted((p for p in count if count[p] >= min_count and p not in MARKS), key=lambda p: (-count[p], p))
        return cls([*MARKS, *frequent[: max_pieces - len(MARKS)]])

    def encode(self, text):
        ids = []
        for piece in PIECE.findall(text):
            known = self.ids.get(piece)
            ids.extend([known] if known else [1 + b for b in piece.encode("utf-8", "surrogatepass")])
        return ids

    def decode(self, ids):
        text = b"".join(self.token_bytes(i) for i in ids)
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # bytes a model strung together
            return text.decode("utf-8", "replace")

    def token_bytes(self, i):
        if i > 256:
            return self.pieces[i - 257].encode("utf-8", "surrogatepass") if i != self.mask_id else b""
        return bytes([i - 1]) if i else b""


class LlamaTokenizer:
    """The LLaMA BPE of a published checkpoint, from the text of its tokenizer.json (needs `tokenizers`)."""

    eos_id, vocab_size, mask_id = 2, 32_000, 32_000

    def __init__(self, pieces):
        try:
            import tokenizers
        except ImportError:
            raise UserError("the LLaMA tokenizer needs the tokenizers package: pip install tokenizers")
        try:
            self.pieces, self.bpe = pieces, tokenizers.Tokenizer.from_str(pieces)
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"this is not a tokenizer.json ({str(error)[:80]}): give the one of TinyLlama")

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(ids))


def tokenizer_of(pieces):
    """The tokenizer a checkpoint was trained with: its list of pieces, or the text of a tokenizer.json."""
    return LlamaTokenizer(pieces) if isinstance(pieces, str) else Tokenizer(pieces)


# ---------------------------------------------------------------------------------------------------
# The embedded task: word problems whose steps may be written in any order
# ---------------------------------------------------------------------------------------------------

PEOPLE = (("Ann", "she"), ("Ben", "he"), ("Eva", "she"), ("Leo", "he"), ("Mia", "she"), ("Sam", "he"), ("Tom", "he"), ("Zoe", "she"))
THINGS = ("pen", "cup", "mug", "book", "hat", "toy", "plant", "lamp", "cake", "bowl")
VERBS = {1: ("buys", "finds", "gets"), -1: ("sells", "loses", "lends")}
HELD_OUT = 8  # one in 8 problems is kept for testing


def possible_problems(n):
    """All [start, change 1, .., change n], the changes in the order they are told, all gains or all losses, whose
    totals have two digits, the first of which stays the same.

    No carries and one direction: what is uncertain in a solution is which change comes next, and nothing else.
    """
    gains = [c for c in itertools.product(range(1, 10), repeat=n) if sum(c) <= 9]
    fits = lambda start, change: 0 <= start % 10 + change <= 9
    return [[start, *(sign * v for v in c)] for sign in (1, -1) for c in gains for start in range(10, 100) if fits(start, sign * sum(c))]


def is_held_out(items):
    """Split by the numbers of a problem, `items` [start, changes..], whatever its wording and the changes' order."""
    start, *changes = items
    return hashlib.sha256(repr([start, *sorted(changes)]).encode()).digest()[0] % HELD_OUT == 0


def arithmetic_problems(n, seed, held_out, most_items=4):
    """n dicts {question, answer, items} of 1 to `most_items` changes from a seeded stream; `held_out` picks the
    side of the split. The steps of the answer are in random order. Held-out questions are all different."""
    rng, problems, asked = random.Random(seed), [], set()
    choices = [[items for items in possible_problems(k) if is_held_out(items) == held_out] for k in range(1, most_items + 1)]
    enough = sum(len(c) * len(PEOPLE) * len(THINGS) * len(VERBS[1]) ** k for k, c in enumerate(choices, 1)) // 2
    if held_out and n > enough:
        raise UserError(f"{n} held-out problems are asked for: there are enough for {enough}")
    while len(problems) < n:
        start, *changes = rng.choice(rng.choice(choices))
        (who, they), thing = rng.choice(PEOPLE), rng.choice(THINGS)
        parts = [f"{rng.choice(VERBS[1 if v > 0 else -1])} {abs(v)}" for v in changes]
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        question = f"{who} has {start} {thing}s. {they.title()} {listed}. How many {thing}s does {they} have now?"
        if held_out and question in asked:
            continue
        asked.add(question)
        steps, total = [], start
        for v in rng.sample(changes, len(changes)):
            steps.append(f"<<{total}{v:+d}={total + v}>>")
            total += v
        problems.append({"question": question, "answer": f"{' '.join(steps)} #### {total}", "items": [start, *changes]})
    return problems


def solves_arithmetic(text, items):
    """Is `text` a right solution: every change once, in whatever order, each step true and going on from the last?"""
    equations, _, answer = text.partition(" #### ")
    steps = [re.fullmatch(r"<<(0|[1-9]\d*)([+-][1-9]\d*)=(0|[1-9]\d*)>>", equation, re.ASCII) for equation in equations.split(" ")]
    if not all(steps):
        return False
    total = items[0]
    for m in steps:
        if int(m[1]) != total or int(m[1]) + int(m[2]) != int(m[3]):
            return False
        total = int(m[3])
    return sorted(int(m[2]) for m in steps) == sorted(items[1:]) and answer == str(total)


# ---------------------------------------------------------------------------------------------------
# Sudoku (Kim et al., arXiv 2502.06768): clues are the prompt, blanks the canvas
# ---------------------------------------------------------------------------------------------------


def sudoku_units(box):
    """For each cell its three units (row, column, box), as numbers; `box` is (rows, columns) of a box."""
    r, c = box
    side = r * c
    return [(i // side, side + i % side, 2 * side + i // side // r * r + i % side // c) for i in range(side * side)]


def sudoku_solutions(grid, box, limit, rng=None):
    """Up to `limit` solutions of a grid (list of ints, 0 blank), by backtracking on the cell with fewest choices."""
    units, side = sudoku_units(box), box[0] * box[1]
    free, grid, found = [(1 << side) - 1] * (3 * side), list(grid), []
    for i, value in enumerate(grid):
        if value:
            for unit in units[i]:
                free[unit] &= ~(1 << value - 1)

    def search(blanks):
        if not blanks:
            return found.append(list(grid))
        _, i = min((((free[a] & free[b] & free[c]).bit_count(), i) for i in blanks for a, b, c in (units[i],)), key=lambda x: x[0])
        values = [v for v in range(side) if all(free[unit] >> v & 1 for unit in units[i])]
        for v in rng.sample(values, len(values)) if rng else values:
            grid[i] = v + 1
            for unit in units[i]:
                free[unit] ^= 1 << v
            search([j for j in blanks if j != i])
            for unit in units[i]:
                free[unit] ^= 1 << v
            if len(found) >= limit:
                break
        grid[i] = 0

    search([i for i, value in enumerate(grid) if not value])
    return found


def dig(solution, box, rng):
    """A puzzle with this one solution and no clue to spare: cells blanked in random order while it stays the only one."""
    puzzle = list(solution)
    for i in rng.sample(range(len(puzzle)), len(puzzle)):
        value, puzzle[i] = puzzle[i], 0
        if len(sudoku_solutions(puzzle, box, 2)) > 1:
            puzzle[i] = value
    return puzzle


def shuffled_sudoku(puzzle, solution, box, rng):
    """The same puzzle with digits, bands, stacks, and the lines in them permuted: as hard, and still with one solution."""
    (r, c), side = box, box[0] * box[1]
    lines = lambda size: [b * size + i for b in rng.sample(range(side // size), side // size) for i in rng.sample(range(size), size)]
    columns, digit = lines(c), [0, *rng.sample(range(1, side + 1), side)]
    cells = [row * side + column for row in lines(r) for column in columns]
    return [digit[puzzle[i]] for i in cells], [digit[solution[i]] for i in cells]


def sudoku_problems(n, seed, held_out, box, base=400):
    """n dicts {question, answer, box}: puzzle and solution as text, rows of digits, "." for a blank.

    `base` puzzles are dug from random grids, the rest are permutations of them. One grid in 8 is held out.
    """
    rng, side, problems = random.Random(seed), box[0] * box[1], []
    text = lambda grid: "\n".join("".join(map(str, grid[i : i + side])) for i in range(0, len(grid), side)).replace("0", ".")
    grids = [sudoku_solutions([0] * side * side, box, 1, rng)[0] for _ in range(base)]
    puzzles = [(dig(grid, box, rng), grid) for grid in grids]
    while len(problems) < n:
        puzzle, solution = map(text, shuffled_sudoku(*rng.choice(puzzles), box, rng))
        if (zlib.crc32(solution.encode()) % HELD_OUT == 0) == held_out:
            problems.append({"question": puzzle, "answer": solution, "box": box})
    return problems


def solves_sudoku(text, problem):
    """Does the grid keep every clue and have each digit once in each row, column and box?"""
    if len(text) != len(problem["question"]) or any(q not in (".", t) for q, t in zip(problem["question"], text)):
        return False
    cells, side = text.replace("\n", ""), problem["box"][0] * problem["box"][1]
    filled = {(unit, v) for v, units in zip(cells, sudoku_units(problem["box"])) for unit in units}
    return set(cells) == set("123456789"[:side]) and len(filled) == 3 * side * side


# ---------------------------------------------------------------------------------------------------
# The two-token task of variational masked diffusion (Zhang et al., arXiv 2510.23606)
# ---------------------------------------------------------------------------------------------------

PAIRS = {"d1": [1] * 10, "d2": list(range(1, 11))}  # weight of the pair (k, k + 1 mod 10)


def pair_problems(n, seed, kind):
    """n dicts {question, answer}: an empty question, and two digits k and k + 1 mod 10."""
    first = random.Random(seed).choices(range(10), PAIRS[kind], k=n)
    return [{"question": "", "answer": f"{k}{(k + 1) % 10}"} for k in first]


def score_pairs(tokenizer, denoiser, kind, temperature=1.0, n=10_000, seed=0):
    """Both tokens drawn in one step, n times: (share of valid pairs, total variation from the true frequencies)."""
    device = next(denoiser.parameters()).device
    tokens, canvas, _ = encode_problems(pair_problems(n, 0, kind), tokenizer, 3, 2, with_answers=False)
    generator = torch.Generator(device).manual_seed(seed)
    out = mdmvi.generate(denoiser, tokens.long().to(device), canvas.to(device), "random", 1, temperature=temperature, generator=generator)
    count = Counter(answer_text(tokenizer, row, on) for row, on in zip(out.tokens.cpu(), canvas))
    truth = {f"{k}{(k + 1) % 10}": w / sum(PAIRS[kind]) for k, w in enumerate(PAIRS[kind])}
    distance = sum(abs(count[pair] / n - truth.get(pair, 0)) for pair in truth.keys() | count.keys()) / 2
    return sum(count[pair] for pair in truth) / n, distance


# ---------------------------------------------------------------------------------------------------
# GSM8K: reading data files, checking answers
# ---------------------------------------------------------------------------------------------------

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.xz", ".jsonl.xz")


def read_records(path):
    """Yield (where, object) for each record of a file: JSON lines, or one JSON array in a .json file."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {error}; give a UTF-8 .json or .jsonl file, plain, .gz or .xz")
    if not text.strip():
        raise UserError(f"{path} is empty: give a file with one JSON object a line")
    if text.lstrip().startswith("["):
        try:
            yield from ((f"record {i}", record) for i, record in enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno} is not JSON ({error.msg}): mend or remove it")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove that line")


def hub_records(name, split):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} is a hub name and needs the datasets package: pip install datasets, or give a local file")
    try:
        rows = datasets.load_dataset(name, "main" if name == "openai/gsm8k" else None, split=split)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"cannot load {name} from the hub ({type(error).__name__}: {reason}): go online or give a local file")
    return ((f"row {i}", row) for i, row in enumerate(rows))


def load_gsm8k(data, answers="equations", split="train"):
    """Problems {question, answer, reference} from a file, a folder of files, or a hub name.

    answers: "equations" keeps the <<...>> notes and the #### line, "full" the whole solution.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"no .json or .jsonl file (plain, .gz, .xz) in the folder {path}")
        sources = [(f, read_records(f)) for f in files]
    elif path.exists():
        sources = [(path, read_records(path))]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith(SUFFIXES):
        sources = [(data, hub_records(data, split))]
    else:
        raise UserError(f"no data at {data}: give a .json/.jsonl file, a folder of them, or a hub name like openai/gsm8k")
    problems = []
    for source, records in sources:
        for where, record in records:
            missing = [c for c in ("question", "answer") if not isinstance(record, dict) or c not in record]
            if missing:
                raise UserError(f"{source} {where} has no column {missing[0]!r}: needed are question, answer (and cot, or an answer ending in '#### N')")
            problems.append(gsm8k_problem(record, answers))
    return problems


def gsm8k_problem(record, answers):
    """One row of openai/gsm8k (prose with notes) or of GSM8k-Aug (question, cot, answer)."""
    solution, _, final = str(record["answer"]).rpartition("####")
    if "cot" in record:
        solution, final = record["cot"], str(record["answer"]).rpartition("####")[2]
    final = final.strip()
    equations = " ".join(re.findall(r"<<[^<>]*>>", solution))
    text = f"{equations} #### {final}".lstrip() if answers == "equations" else f"{solution.strip()}\n#### {final}"
    return {"question": record["question"], "answer": text, "reference": f"#### {final}"}


def final_number(text):
    """The last number after `####`, $ and commas dropped, as a float; None if there is none."""
    _, mark, tail = text.rpartition("####")
    numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", tail.replace(",", "").replace("$", "")) if mark else []
    return float(numbers[-1]) if numbers else None


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def arithmetic_value(expression):
    """Value of a + - * / expression with brackets and %, or None if it is anything else."""

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return {ast.USub: -1, ast.UAdd: 1}[type(node.op)] * value(node.operand)
        return float(node.value)

    # "007" is a number here, not a syntax error
    expression = re.sub(r"(?<![\d.])0+(?=\d)", "", expression.replace(",", "").replace("$", "").replace("%", "/100"))
    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def solves_equations(text, reference):
    """Is every <<a op b=c>> true (to the cent), is there one, and is the last result the right answer?"""
    right, notes = final_number(reference), re.findall(r"<<([^<>]*)>>", text)
    result = None
    for note in notes:
        left, _, written = note.rpartition("=")
        value, result = arithmetic_value(left), arithmetic_value(written)
        if value is None or result is None or abs(value - result) > 0.0101:
            return False
    return result is not None and right is not None and abs(result - right) < 1e-6 and final_number(text) == right


# ---------------------------------------------------------------------------------------------------
# From problems to tensors and back
# ---------------------------------------------------------------------------------------------------


def encode_problems(problems, tokenizer, max_len, canvas_len, with_answers=True):
    """Lay problems out as prompt, canvas of `canvas_len` tokens filled up with EOS, then EOS off the canvas.

    Returns (tokens int32 [M, max_len], canvas bool [M, max_len], fits: list of M bools); a problem that
    does not fit has an empty canvas. Of a Sudoku the canvas is its blanks, and nothing is filled up.
    """
    tokens = torch.full((len(problems), max_len), tokenizer.eos_id, dtype=torch.int32)
    canvas = torch.zeros(len(problems), max_len, dtype=torch.bool)
    fits = []
    for i, problem in enumerate(problems):
        if "box" in problem:
            ids = tokenizer.encode(SEPARATOR + problem["answer" if with_answers else "question"])
            tokens[i], canvas[i, 1:] = torch.tensor(ids), torch.tensor([c == "." for c in problem["question"]])
            fits.append(True)
            continue
        prompt = tokenizer.encode(problem["question"] + SEPARATOR)
        answer = tokenizer.encode(problem["answer"]) if with_answers else []
        fits.append(len(prompt) + canvas_len <= max_len and len(answer) <= canvas_len)
        if fits[-1]:
            tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer, dtype=torch.int32)
            canvas[i, len(prompt) : len(prompt) + canvas_len] = True
    return tokens, canvas, fits


def answer_text(tokenizer, tokens, canvas):
    """The text on one row's canvas, up to the first EOS."""
    ids = tokens[canvas].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)


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
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__}): {advice}")
    if not isinstance(checkpoint, dict) or checkpoint.get("program") != "mdmvi":
        raise UserError(f"checkpoint {path} was written by another program: {advice}")
    if "policy_layers" not in checkpoint:
        raise UserError(f"checkpoint {path} was written by an older version: train again")
    return checkpoint


def build_models(checkpoint, device="cpu"):
    """(denoiser, policy, posterior, plain): `plain` is the equal-compute baseline's denoiser, or None;
    `policy` is None where no order was trained."""
    config = mdmvi.ModelConfig(**checkpoint["config"])
    denoiser, policy = mdmvi.Denoiser(config), mdmvi.UnmaskPolicy(config, checkpoint["policy_layers"])
    posterior = mdmvi.OrderPosterior(config)
    plain = mdmvi.Denoiser(config) if checkpoint["plain"] is not None else None
    for name, model in dict(denoiser=denoiser, policy=policy, posterior=posterior, plain=plain).items():
        if model is not None:
            model.load_state_dict(checkpoint[name])
            model.to(device).eval()
    return denoiser, policy if checkpoint["order_steps"] else None, posterior, plain


# ---------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------


def wilson(right, n, z=1.96):
    """95% Wilson interval of a share, in percent."""
    p, middle = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (middle - half), 100 * (middle + half)


def mcnemar(first, second):
    """Exact two-sided McNemar p-value of two lists of bools on the same problems."""
    wins = sum(a and not b for a, b in zip(first, second))
    losses = sum(b and not a for a, b in zip(first, second))
    n, tail = wins + losses, sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def attempt(problems, tokenizer, tokens, canvas, strategy, budget, denoiser, batch=128, seed=0, **options):
    """Generate a solution for every problem with one strategy; a problem with an empty canvas stays unsolved.

    Returns a dict: solved and answered (lists of bools), steps (list), seconds, texts.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    texts, steps, start = [], [], time.perf_counter()
    for at in range(0, len(problems), batch):
        x, on = tokens[at : at + batch].long(), canvas[at : at + batch]
        out = mdmvi.generate(denoiser, x, on, strategy, budget, generator=generator, **options)
        part = [torch.arange(x.shape[1]) > 0] * len(x) if "box" in problems[0] else on.cpu()  # a Sudoku is read whole
        texts += [answer_text(tokenizer, row, c) for row, c in zip(out.tokens.cpu(), part)]
        steps += out.steps.tolist()
    seconds = time.perf_counter() - start
    solved = [is_solved(text, problem) for text, problem in zip(texts, problems)]
    if "box" in problems[0]:
        return dict(solved=solved, answered=solved, steps=steps, seconds=seconds, texts=texts)
    answered = [final_number(t) is not None and final_number(t) == final_number(p.get("reference", p["answer"])) for t, p in zip(texts, problems)]
    return dict(solved=solved, answered=answered, steps=steps, seconds=seconds, texts=texts)


def is_solved(text, problem):
    if "items" in problem:
        return solves_arithmetic(text, problem["items"])
    if "box" in problem:
        return solves_sudoku(text, problem)
    return solves_equations(text, problem["reference"])


def all_rules(eos=True):
    """(strategy, eos_aware) of every fixed rule; eos: with the eos_aware ones (a grid has no EOS)."""
    rules = [(s, False) for s in mdmvi.STRATEGIES if s != "learned"]
    return rules + [(s, True) for s in mdmvi.CONFIDENCE_RULES] if eos else rules


def score(problems, tokenizer, tokens, canvas, models, budgets, rules=None, batch=128, seed=0, single=False, progress=None):
    """Rows for the table: the learned order, then every rule at its average and its largest number of steps.

    Each rule runs on the order-trained denoiser and on the plain one, and keeps the one with more solved.
    single: first every rule at one token a step. Without a policy the rules run at the budgets themselves.
    Returns (rows, learned): dicts as `--json` writes them, and {budget: attempt of the learned order}.
    """
    denoiser, policy, _, plain = models
    rules = all_rules() if rules is None else rules
    run = lambda *args, **options: attempt(problems, tokenizer, tokens, canvas, *args, batch=batch, seed=seed, **options)
    rows, learned, done = [], {}, {}

    def add_rules(budget, match, steps, ours=None):
        for strategy, eos_aware in rules:
            if (strategy, eos_aware, steps) not in done:
                tries = [("plain" if policy is None else "order", run(strategy, steps, denoiser, eos_aware=eos_aware))]
                if plain is not None:
                    tries.append(("plain", run(strategy, steps, plain, eos_aware=eos_aware)))
                done[strategy, eos_aware, steps] = max(tries, key=lambda t: sum(t[1]["solved"]))
            model, best = done[strategy, eos_aware, steps]
            rows.append(make_row(strategy, eos_aware, budget, match, model, best, ours and mcnemar(ours["solved"], best["solved"])))
            if progress:
                progress(rows[-1])

    if single:
        most = int(canvas.sum(1).max())
        add_rules(most, "own", most)
    for budget in budgets:
        if policy is None:
            add_rules(budget, "own", budget)
            continue
        ours = learned[budget] = run("learned", budget, denoiser, policy=policy)
        rows.append(make_row("learned", False, budget, "own", "order", ours, None))
        average, most = rows[-1]["average_steps"], rows[-1]["max_steps"]
        add_rules(budget, "avg", max(1, round(average)), ours)
        add_rules(budget, "max", max(1, most), ours)
    return rows, learned


def make_row(strategy, eos_aware, budget, match, model, result, p_value):
    n, steps = len(result["steps"]), [s for s in result["steps"] if s] or [0]  # 0: the prompt did not fit
    return {
        "strategy": strategy, "eos_aware": eos_aware, "budget": budget, "match": match, "model": model,
        "problems": n, "average_steps": sum(steps) / len(steps), "min_steps": min(steps), "max_steps": max(steps),
        "answer_accuracy": sum(result["answered"]) / n, "solved": sum(result["solved"]) / n,
        "p_value": p_value, "problems_per_second": n / result["seconds"],
    }  # fmt: skip


def table(rows):
    """The rows as aligned plain text."""
    head = "method", "budget", "model", "steps", "[min, max]", "answer % [95% interval]", "solved % [95% interval]", "p", "problems/s"
    lines = [head]
    for r in rows:
        name = r["strategy"] + (" eos_aware" if r["eos_aware"] else "") + {"avg": " @Avg", "max": " @Max", "own": ""}[r["match"]]
        shares = []
        for key in ("answer_accuracy", "solved"):
            low, high = wilson(round(r[key] * r["problems"]), r["problems"])
            shares.append(f"{100 * r[key]:.1f} [{low:.1f}, {high:.1f}]")
        p = "" if r["p_value"] is None else f"{r['p_value']:.1e}" if r["p_value"] < 0.001 else f"{r['p_value']:.3f}"
        lines.append((name, str(r["budget"]), r["model"], f"{r['average_steps']:.2f}", f"[{r['min_steps']}, {r['max_steps']}]", *shares, p, f"{r['problems_per_second']:.0f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def steps_by_items(problems, result):
    """The learned order's average steps by number of items in the problem, as plain text."""
    lines = ["items  problems  average steps  solved %"]
    for n in sorted({len(p["items"]) - 1 for p in problems}):
        chosen = [i for i, p in enumerate(problems) if len(p["items"]) == n + 1]
        steps, solved = (sum(result[key][i] for i in chosen) / len(chosen) for key in ("steps", "solved"))
        lines.append(f"{n:5d}  {len(chosen):8d}  {steps:13.2f}  {100 * solved:8.1f}")
    return "\n".join(lines)


def print_scores(problems, tokenizer, tokens, canvas, models, budgets, rules=None, batch=128, seed=0, single=False, json_file=None, plot_file=None):
    """Score, then print the table (and steps by number of items on the embedded task), write the files."""
    if rules is None:
        rules = all_rules(eos="box" not in problems[0])
    runs = len(rules) * (len(budgets) * (1 if models[1] is None else 2) + single)
    with tqdm(total=runs, desc="scoring", unit="rule", dynamic_ncols=True) as bar:

        def progress(row):
            bar.update()
            bar.set_postfix_str(f"{row['strategy']} {100 * row['solved']:.1f}%", refresh=False)

        rows, learned = score(problems, tokenizer, tokens, canvas, models, budgets, rules, batch, seed, single, progress)
    print(f"\n{len(problems)} held-out problems; p: exact McNemar test of learned against each rule, on solved\n")
    print(table(rows))
    for budget in learned if "items" in problems[0] else ():
        print(f"\nlearned order, budget {budget}, by number of items in the problem\n")
        print(steps_by_items(problems, learned[budget]))
    if json_file:
        write_file(json_file, json.dumps(rows, indent=1) + "\n")
    if plot_file:
        plot(rows, plot_file)
    return rows


def print_pairs(tokenizer, denoiser, kind, json_file=None):
    """Table of `score_pairs`; at temperature 0 all chance lies in the latent, and a plain model has none."""
    model = f"VMD, {denoiser.latent_dim} latent dimensions" if denoiser.latent_dim else "plain MDM"
    print(f"\n10,000 pairs ({kind}), both tokens in one step\n\nmodel                     temperature  valid pairs %  total variation from the truth")
    rows = []
    for temperature in (1.0, 0.0) if denoiser.latent_dim else (1.0,):
        valid, distance = score_pairs(tokenizer, denoiser, kind, temperature)
        rows.append({"pairs": kind, "latent_dim": denoiser.latent_dim, "temperature": temperature, "valid": valid, "distance": distance})
        print(f"{model:24s}  {temperature:11.1f}  {100 * valid:13.1f}  {distance:30.3f}")
    if json_file:
        write_file(json_file, json.dumps(rows, indent=1) + "\n")


def write_file(path, text):
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another file")


def plot(rows, path):
    """Share of solved problems against steps, a line a method."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for strategy, eos_aware in dict.fromkeys((r["strategy"], r["eos_aware"]) for r in rows):
        mine = sorted((r["average_steps"], 100 * r["solved"]) for r in rows if (r["strategy"], r["eos_aware"]) == (strategy, eos_aware))
        style = dict(color="black", linewidth=2.5, zorder=3) if strategy == "learned" else dict(linestyle="--" if eos_aware else "-")
        axes.plot(*zip(*mine), marker="o", label=strategy + (" eos_aware" if eos_aware else ""), **style)
    axes.set(xlabel="average steps (forward passes)", ylabel="solved, %")
    axes.legend(fontsize=7)
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path} ({error}): give another file, .png, .svg or .pdf")


def held_out_problems(about, n):
    """Test problems of an embedded task; `about` is a checkpoint, or the flags of a run."""
    if about["task"] == "arithmetic":
        return arithmetic_problems(n, 1, True, about["items"])
    if about["task"] == "sudoku":
        return sudoku_problems(n, 1, True, about["box"])
    return pair_problems(n, 1, about["pairs"])


def pick_problems(checkpoint, args):
    """The problems that a checkpoint's task and --data ask for."""
    if args.data:
        if checkpoint["task"] != "gsm8k":
            raise UserError(f"--data goes with a gsm8k checkpoint, {args.checkpoint} was trained on {checkpoint['task']}")
        problems = load_gsm8k(args.data, checkpoint["answers"], "test")
        return problems[: args.problems] if args.problems else problems
    if checkpoint["task"] == "gsm8k":
        raise UserError("a gsm8k checkpoint needs --data: a file, a folder, or a hub name like openai/gsm8k")
    return held_out_problems(checkpoint, args.problems or 2000)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the examples as written, and show every default that is set."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with our one line on stderr instead of its usage block."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_rules(names):
    """[(strategy, eos_aware)] from names like top_prob or top_prob+eos."""
    rules = []
    for name in names:
        strategy, plus, flag = name.partition("+")
        if (strategy, bool(plus)) not in all_rules() or flag not in ("", "eos"):
            known = [s + ("+eos" if e else "") for s, e in all_rules()]
            raise UserError(f"unknown strategy {name!r}: choose from {', '.join(known)}")
        rules.append((strategy, bool(plus)))
    return rules


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/checkpoint.pt", help="what train.py wrote")
    add("--data", help="gsm8k: a .json/.jsonl(.gz/.xz) file, a folder of them, or a hub name (its test split)")
    add("--budget", type=int, nargs="+", help="budgets T of the learned order (default: the one it was trained for)")
    add("--strategies", nargs="+", metavar="RULE", help="rules to compare with, +eos for eos_aware (default: all)")
    add("--single", action="store_true", help="score the rules at one token a step as well")
    add("--problems", type=int, help="score so many problems (default: 2000 of the embedded task, or the whole file)")
    add("--batch", type=int, default=128, help="problems generated together")
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--plot", metavar="FILE", help="draw solved against steps (needs matplotlib)")
    args = parser.parse_args(argv)
    check_device(args.device)
    rules = None if args.strategies is None else parse_rules(args.strategies)
    checkpoint = load_checkpoint(args.checkpoint, args.device)
    budgets = args.budget or [checkpoint["budget"]]
    for name, value in [("--budget", min(budgets)), ("--batch", args.batch), ("--problems", args.problems or 1)]:
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    models = build_models(checkpoint, args.device)
    tokenizer = tokenizer_of(checkpoint["tokenizer"])
    if checkpoint["task"] == "pairs":
        return print_pairs(tokenizer, models[0], checkpoint["pairs"], args.json)
    problems = pick_problems(checkpoint, args)
    tokens, canvas, fits = encode_problems(problems, tokenizer, checkpoint["config"]["max_len"], checkpoint["canvas_len"], with_answers=False)
    if not all(fits):
        print(f"{fits.count(False)} prompts are longer than the context and count as wrong", file=sys.stderr)
    print_scores(problems, tokenizer, tokens.to(args.device), canvas.to(args.device), models, budgets, rules, args.batch, args.seed, args.single, args.json, args.plot)


def check_device(name):
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not there: choose cpu, or cuda on a machine with a GPU")


def run_main(main):
    """Run a script: a UserError is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, head say, has seen enough; Python must not flush to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    run_main(main)
