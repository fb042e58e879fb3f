"""Tests of examples/chains.py:  python -m pytest examples/test_chains.py

Questions, solutions and the split are read anew here, in plain loops that call nothing of it.
"""

import functools
import itertools
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import eval_gsm8k
import train
from examples import chains as task

ROOT = Path(__file__).resolve().parent.parent
WORDS = {"finds": "+", "buys": "+", "sells": "-", "loses": "-"}
FIXED = {"doubles": "*2", "triples": "*3", "halves": "/2"}
TRICKY = [  # equal people, equal values, operations that commute, the same equation twice
    [[3, "+1"], [3, "+1"]],
    [[2, "*2", "/2"], [4, "/2", "*2"]],
    [[5, "+1", "+2"], [5, "+2", "+1"]],
    [[4, "-1", "+1", "-1"], [3, "+1"]],
    [[2, "+2", "*2"], [2, "*2", "+2"]],
    [[6, "/2", "*3", "-1"]],
]


def told(question):
    """The chains of a question, from its words."""
    chains = []
    for sentence in question.split(". ")[:-1]:
        words = sentence.replace(",", "").split()
        chains.append([int(words[2])])
        for word, following in zip(words, words[1:] + [""]):
            if word in WORDS:
                chains[-1].append(WORDS[word] + following)
            elif word in FIXED:
                chains[-1].append(FIXED[word])
    return chains


def slow_values(chain):
    """The values that a person has, one after the other."""
    values = [chain[0]]
    for operation in chain[1:]:
        values.append(eval(f"{values[-1]}{operation}"))
    return values


def interleavings(chains):
    """Every order in which the people can take their turns, as lists of person numbers."""
    turns = [person for person, chain in enumerate(chains) for _ in chain[1:]]
    return sorted(set(itertools.permutations(turns)))


def right_answers(chains):
    """The set of all right solutions, as texts."""
    values = [[int(value) for value in slow_values(chain)] for chain in chains]
    last = [v[-1] for v in values]
    sums = [""] if len(chains) == 1 else [f" <<{a}+{b}={a + b}>>" for a, b in (last, last[::-1])]
    found = set()
    for turns in interleavings(chains):
        done, notes = [0] * len(chains), []
        for person in turns:
            k = done[person]
            before, after = values[person][k : k + 2]
            notes.append(f"<<{before}{chains[person][k + 1]}={after}>>")
            done[person] += 1
        found |= {f"{' '.join(notes)}{total} #### {sum(last)}" for total in sums}
    return found


@functools.cache
def problem_sets():
    """(training problems, held-out problems)."""
    return task.problems(6000, 0, False), task.problems(1500, 1, True)


def numbers(problem):
    """What a problem is made of, whoever is told of first."""
    return tuple(sorted(json.dumps(chain) for chain in told(problem["question"])))


def test_no_test_problem_has_the_numbers_of_a_training_problem():
    training, held_out = problem_sets()
    assert not {numbers(p) for p in training} & {numbers(p) for p in held_out}
    assert len({p["question"] for p in held_out}) == len(held_out)
    for p in training[:300]:  # the side does not depend on who is told of first
        assert not task.is_held_out(told(p["question"])[::-1])


def test_the_solutions_are_those_of_the_question_and_the_values_are_small():
    for p in itertools.chain(*problem_sets()):
        chains = told(p["question"])
        for chain in chains:
            assert all(value in range(1, 10) for value in slow_values(chain))
        people = [sentence.split()[0] for sentence in p["question"].split(". ")[:-1]]
        assert len(set(people)) == len(people) == len(chains)
        assert p["answer"] in p["solutions"]
    for p in itertools.chain(*(problems[:200] for problems in problem_sets())):
        assert set(p["solutions"]) == right_answers(told(p["question"])), p["question"]
        assert len(p["solutions"]) == len(set(p["solutions"]))


def test_problem_lengths():
    expected = Counter(task.LENGTHS)
    assert sum(expected[lengths] for lengths in expected if len(lengths) == 1) * 3 == len(
        task.LENGTHS
    )
    for problems in problem_sets():
        found = Counter(tuple(len(chain) - 1 for chain in told(p["question"])) for p in problems)
        assert found.keys() == expected.keys()
        for lengths, times in expected.items():
            p = times / len(task.LENGTHS)
            error = (p * (1 - p) / len(problems)) ** 0.5
            # the split turns some lengths away a little more often than others
            assert abs(found[lengths] / len(problems) - p) < 5 * error + 0.02


def test_problems_fit_the_canvas_of_the_readme_and_leave_no_room_unused():
    training, held_out = problem_sets()
    args = train.parse_args(["--data", "chains", "--max-len", "72", "--canvas-len", "41"])
    tokenizer = train.make_tokenizer(args, training)
    prompts = [len(tokenizer.encode(p["question"] + "||")) for p in training + held_out]
    answers = [len(tokenizer.encode(a)) for p in training[:900] for a in p["solutions"]]
    assert max(prompts) + args.canvas_len <= args.max_len
    assert args.canvas_len - 4 <= max(answers) <= args.canvas_len
    layout = (tokenizer, args.max_len, args.canvas_len)
    assert all(eval_gsm8k.encode_problems(training + held_out, *layout)[2])


def test_seeds():
    first = task.problems(50, 0, False)
    assert first == task.problems(50, 0, False) == task.problems(80, 0, False)[:50]
    assert first != task.problems(50, 1, False)
    assert task.problems(0, 0, True) == []


def test_every_interleaving_is_drawn_alike():
    texts = {}
    for p in task.problems(6000, 0, False):
        chains = told(p["question"])
        if [len(chain) for chain in chains] == [3, 3]:
            right = {task.solution(chains, t): t for t in interleavings(chains)}
            if len(right) == 6:  # none of the six texts can come about in two ways
                turns = right[p["answer"]]
                texts[turns] = texts.get(turns, 0) + 1
    n = sum(texts.values())
    assert n > 500 and len(texts) == 6
    assert sum((count - n / 6) ** 2 / (n / 6) for count in texts.values()) < 25.7  # p 1e-4


@pytest.mark.parametrize("chains", TRICKY, ids=str)
def test_solutions_of_tricky_problems(chains):
    assert set(task.solutions(chains)) == right_answers(chains)
    if len(chains) > 1:
        assert task.solutions(chains) == task.solutions(chains[::-1])


def test_right_solutions_also_pass_the_checker_of_equations():
    for p in task.problems(200, 0, False):
        assert eval_gsm8k.solves_equations(p["answer"], p["answer"])


@pytest.mark.parametrize("operation", ["+1", "-1", "*2", "*3", "/2", "+8", "-8"])
def test_apply(operation):
    for value in range(1, 10):
        exact = eval(f"{value}{operation}")
        expected = int(exact) if exact in range(1, 10) else None
        assert task.apply(value, operation) == expected


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def command(monkeypatch, *args):
    """Run the module as a script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["chains.py", *args])
    try:
        runpy.run_path(str(ROOT / "examples" / "chains.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_json_lines(monkeypatch, capsys):
    assert command(monkeypatch, "--problems", "7", "--seed", "3", "--held-out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == task.problems(7, 3, True)
    assert command(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == task.problems(10, 0, False)


def test_json_lines_can_be_read_back(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "--problems", "5") == 0
    (tmp_path / "data.jsonl").write_text(capsys.readouterr().out)
    problems = eval_gsm8k.load_gsm8k(str(tmp_path / "data.jsonl"))
    assert problems == task.problems(5, 0, False)
    assert all(eval_gsm8k.is_solved(p["answer"], p) for p in problems)
    assert all(eval_gsm8k.is_answered(p["answer"], p) for p in problems)


def test_help_tells_the_defaults(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--problems", "--seed", "--held-out", "default 10", "default 0"):
        assert flag in shown.replace("default: ", "default ")


@pytest.mark.parametrize("args", ["--problems 0", "--problems -3", "--problems x", "--seed x"])
def test_bad_input(monkeypatch, capsys, args):
    assert command(monkeypatch, *args.split()) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1 and args.split()[0] in shown.err


def test_output_survives_a_reader_that_goes_away():
    line = [sys.executable, "-m", "examples.arithmetic", "--problems", "3000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 141 and error == b""
