"""GSM8K: reading its files, holding problems out of them, and checking answers.

    python -m examples.gsm8k train.jsonl --problems 5      # problems as train.py reads them
    python -m examples.gsm8k openai/gsm8k --answers full

A record has the columns {question, answer}, prose with <<...>> notes that ends in "#### N" (as
openai/gsm8k), or {question, cot, answer} (as GSM8k-Aug). Also read: what examples/arithmetic.py
prints.
"""

import gzip
import itertools
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import torch

from examples.command_line import Parser, UserError, positive, run_main, text

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
SPLITS = ("train", "test", "valid", "validation", "val", "dev", "eval")
SUFFIXES = tuple(kind + packed for kind in (".json", ".jsonl") for packed in ("", ".gz", ".xz"))


def read_records(path):
    """Yield (where, object) for each record of a file: a line of JSON each, or one JSON array."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; give UTF-8 .json or .jsonl, .gz or .xz too")
    is_array = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_array else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except (ValueError, RecursionError) as error:  # a number may have too many digits
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


def files_of(folder, split):
    """The data files of a folder that are named after a split, or those named after none."""
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))

    def named(file, *splits):
        words = re.split("[^a-z]+", file.name.lower())
        return any(name.lower() in words for name in splits)

    own = [file for file in files if named(file, split)]
    own = own or [file for file in files if not named(file, *SPLITS)]
    if files and not own:
        raise UserError(f"{folder} has only files of other splits than {split}: give one by name")
    return own


def load_gsm8k(data, answers="equations", split="train"):
    """Problems {question, answer} from a file, a folder of files, or a hub name.

    A folder's files are those named after the split, or those named after none.
    answers: "equations" keeps the <<...>> notes and the #### line, "full" the whole solution.
    Raises UserError for what cannot be read or is no such problem.
    """
    path = Path(data)
    if path.is_dir():
        records = itertools.chain.from_iterable(map(read_records, files_of(path, split)))
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
    if answers == "equations" and not any("=" in problem["answer"] for problem in problems):
        print(f"{data} has no <<...>> notes: only #### N is kept of each answer", file=sys.stderr)
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
    record = {**record, "answer": str(record["answer"])}
    solution, mark, final = record["answer"].rpartition("####")
    if not mark and "cot" not in record or final_number(f"#### {final}") is None:
        raise UserError(f"{where} has no final answer: needed is '#### N', or a cot and a number")
    if "solutions" in record:  # an embedded problem
        solutions = record["solutions"]
        if not isinstance(solutions, list) or not all(isinstance(x, str) for x in solutions):
            raise UserError(f"{where} has solutions that are no list of texts: mend or remove it")
        if record["answer"] not in solutions:
            raise UserError(f"{where} has solutions without its answer: mend or remove it")
        return {key: record[key] for key in ("question", "answer", "solutions")}
    solution, final = record.get("cot", solution), final.strip()
    if answers == "equations":
        notes = re.findall(r"<<[^<>]*>>", solution)
        return {"question": record["question"], "answer": " ".join([*notes, f"#### {final}"])}
    return {"question": record["question"], "answer": f"{solution.strip()}\n#### {final}"}


def hold_out(problems, n):
    """(training, held-out problems): about n of them, at most a tenth. Raises UserError if too few.

    Variants of one problem differ in their numbers only. They stay on one side of the split, and
    beyond those of the first text no more than a tenth of the problems are taken from training.
    """
    limit = len(problems) // 10
    if limit == 0:
        raise UserError(f"the data has {len(problems)} problems: at least 10 are needed")
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    words = ["".join(filter(str.isalpha, problem["question"])) for problem in problems]
    variants, seen, held_out, room = Counter(words), set(), [], limit
    for i in order:
        more = 0 if words[i] in seen else variants[words[i]]
        if len(held_out) < min(n, limit) and (more <= room or not seen):
            held_out.append(problems[i])
            seen.add(words[i])
            room = max(0, room - more)
    training = [problems[i] for i in order if words[i] not in seen]
    if not training:
        raise UserError("the data holds one text with different numbers only: add others")
    return training, held_out


def final_number(text):
    """The last number after `####`, $ and commas dropped, as a float; None if there is none."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None
    number = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    numbers = re.findall(number, tail.replace(",", "").replace("$", ""))
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


def main(argv=None):
    parser = Parser(__doc__)
    about = ".json/.jsonl(.gz/.xz) file, folder or hub name"
    parser.add_argument("data", type=text, help=about)
    parser.add_argument(
        "--answers",
        choices=("equations", "full"),
        default="equations",
        help="the <<...>> notes, or all",
    )
    parser.add_argument("--split", default="train", help="of a folder or hub data set")
    parser.add_argument("--problems", type=positive, help="how many (default: all)")
    args = parser.parse_args(argv)
    for problem in load_gsm8k(args.data, args.answers, args.split)[: args.problems]:
        print(json.dumps(problem))


if __name__ == "__main__":
    run_main(main)
