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
def problem_sets():
    """(training problems, held-out problems)."""
    return arithmetic.problems(6000, 0, False), arithmetic.problems(2000, 1, True)


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


def test_no_test_problem_has_the_numbers_of_a_training_problem():
    sets = [
        {(told(p["question"])[0], *sorted(told(p["question"])[1])) for p in problems}
        for problems in problem_sets()
    ]
    assert not sets[0] & sets[1]
    held_out = problem_sets()[1]
    assert len({p["question"] for p in held_out}) == len(held_out)


def test_solutions_are_those_of_the_question():
    for p in itertools.chain(*problem_sets()):
        start, changes = told(p["question"])
        assert set(p["solutions"]) == right_answers(start, changes), p["question"]
        assert len(p["solutions"]) == len(set(p["solutions"])) and p["answer"] in p["solutions"]
        assert eval_gsm8k.solves_equations(p["answer"], p["answer"])


def test_totals_keep_their_tens_digit_and_lengths_are_drawn_alike():
    for problems in problem_sets():
        lengths = Counter()
        for p in problems:
            start, changes = told(p["question"])
            lengths[len(changes)] += 1
            assert len({(c > 0) for c in changes}) == 1
            for order in itertools.permutations(changes):
                totals = itertools.accumulate((start, *order))
                assert {total // 10 for total in totals} == {start // 10} and start > 9
        assert lengths.keys() == {1, 2, 3}
        assert all(abs(n / len(problems) - 1 / 3) < 0.05 for n in lengths.values())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_set_of_numbers_is_left_out(n):
    found = {tuple(numbers) for numbers in arithmetic.possible_numbers(n)}
    assert len(found) == len(arithmetic.possible_numbers(n))
    every = itertools.product(range(10, 100), *[[v for v in range(-9, 10) if v]] * n)
    same_sign = (x for x in every if len({v > 0 for v in x[1:]}) == 1)
    assert found == {x for x in same_sign if x[0] // 10 == sum(x) // 10}


def test_problems_fit_the_default_canvas_and_leave_no_room_unused():
    training, held_out = problem_sets()
    args = train.parse_args([])
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
    for p in problem_sets()[0]:
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
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [json.loads(x) for x in done.stdout.splitlines()] == arithmetic.problems(3, 0, True)
