"""Tests of examples/arithmetic.py:  python -m pytest examples/test_arithmetic.py

Questions, solutions and the split are read anew here, in plain loops that call nothing of it.
"""

import functools
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import eval_gsm8k
import train
from examples import arithmetic

ROOT = Path(__file__).resolve().parent.parent
SIGNS = {"buys": 1, "finds": 1, "gets": 1, "sells": -1, "loses": -1, "lends": -1}


@functools.cache
def problem_sets(task):
    """(training problems, held-out problems)."""
    draw = arithmetic.TASKS[task]
    return draw(6000, 0, False), draw(2000, 1, True)


each_task = pytest.mark.parametrize("task", ["arithmetic", "carries"])


def told(question):
    """(start, changes) of a question, from its words."""
    words = question.replace(",", "").replace(".", "").split()
    changes = [SIGNS[w] * int(following) for w, following in zip(words, words[1:]) if w in SIGNS]
    return int(words[2]), changes


def right_answers(start, changes):
    found = set()
    for order in itertools.permutations(changes):
        notes, total = [], start
        for change in order:
            sign = "+" if change > 0 else "-"
            notes.append(f"<<{total}{sign}{abs(change)}={total + change}>>")
            total += change
        found.add(f"{' '.join(notes)} #### {total}")
    return found


@each_task
def test_no_test_problem_has_the_numbers_of_a_training_problem(task):
    sets = [
        {(told(p["question"])[0], *sorted(told(p["question"])[1])) for p in problems}
        for problems in problem_sets(task)
    ]
    assert not sets[0] & sets[1]
    held_out = problem_sets(task)[1]
    assert len({p["question"] for p in held_out}) == len(held_out)


@each_task
def test_solutions_are_those_of_the_question(task):
    for p in itertools.chain(*problem_sets(task)):
        start, changes = told(p["question"])
        assert set(p["solutions"]) == right_answers(start, changes), p["question"]
        assert len(p["solutions"]) == len(set(p["solutions"])) and p["answer"] in p["solutions"]
        assert eval_gsm8k.solves_equations(p["answer"], p["answer"])


@each_task
def test_totals_have_two_digits_and_lengths_are_much_alike(task):
    for problems in problem_sets(task):
        lengths, carried = Counter(), 0
        for p in problems:
            start, changes = told(p["question"])
            lengths[len(changes)] += 1
            assert len({(c > 0) for c in changes}) == 1
            assert all(9 < total < 100 for total in itertools.accumulate((start, *changes)))
            carried += start // 10 != (start + sum(changes)) // 10
        assert lengths.keys() == ({1, 2, 3} if task == "arithmetic" else {2, 3, 4})
        assert all(abs(n / len(problems) - 1 / 3) < 0.08 for n in lengths.values())
        share = carried / len(problems)
        assert share == 0 if task == "arithmetic" else 0.8 < share < 0.95


@each_task
def test_no_set_of_numbers_is_left_out_or_favoured(task, monkeypatch):
    every = itertools.product(range(10, 100), (v for v in range(-9, 10) if v))
    kept = {(a, v) for a, v in every if 9 < a + v < 100}
    possible = {(a, v) for a, v in kept if task == "carries" or a // 10 == (a + v) // 10}

    with monkeypatch.context() as patch:  # the task's own rule, from the call it makes
        patch.setattr(arithmetic, "draw_problems", lambda *arguments: arguments)
        *_, is_possible = arithmetic.TASKS[task](1, 0, False)
    count = {}
    for held_out in (False, True):
        n = 4000 if held_out else 30_000
        drawn = arithmetic.draw_problems(n, 0, held_out, (1,), is_possible)
        count[held_out] = Counter((told(p["question"])[0], *told(p["question"])[1]) for p in drawn)
    assert count[False].keys() | count[True].keys() == possible
    for counts in count.values():
        mean = sum(counts.values()) / len(counts)
        spread = sum((n - mean) ** 2 / mean for n in counts.values()) / (len(counts) - 1)
        assert spread < 1.4  # chi-square over its degrees of freedom: 1 where all are drawn alike


@pytest.mark.parametrize(
    "flags", [[], ["--data", "carries", "--max-len", "64", "--canvas-len", "36"]]
)
def test_problems_fit_the_canvas_and_leave_no_room_unused(flags):
    args = train.parse_args(flags)
    training, held_out = problem_sets(args.data)
    tokenizer = train.make_tokenizer(args, training)
    prompts = [len(tokenizer.encode(p["question"] + "||")) for p in training + held_out]
    answers = [len(tokenizer.encode(p["answer"])) for p in training]
    assert max(prompts) + args.canvas_len == args.max_len
    assert max(answers) + 1 == args.canvas_len  # one EOS at the least


def test_seeds_and_orders():
    first = arithmetic.problems(50, 0, False)
    assert first == arithmetic.problems(50, 0, False) == arithmetic.problems(80, 0, False)[:50]
    assert first != arithmetic.problems(50, 1, False)
    places = Counter()
    for p in problem_sets("arithmetic")[0]:
        if len(p["solutions"]) == 6:
            start, changes = told(p["question"])
            orders = itertools.permutations(range(3))
            texts = [arithmetic.solution(start, [changes[i] for i in order]) for order in orders]
            places[texts.index(p["answer"])] += 1
    n = sum(places.values())
    assert n > 500 and len(places) == 6
    assert sum((count - n / 6) ** 2 / (n / 6) for count in places.values()) < 25.7  # p 1e-4


def test_the_command_line():
    line = [sys.executable, "-m", "examples.arithmetic", "--problems", "3", "--held-out"]
    for extra, draw in ([], arithmetic.problems), (["--task", "carries"], arithmetic.carries):
        done = subprocess.run(line + extra, cwd=ROOT, capture_output=True, text=True, check=True)
        assert [json.loads(x) for x in done.stdout.splitlines()] == draw(3, 0, True)
