"""Tests of examples/arithmetic.py:  python -m pytest examples/test_arithmetic.py

Questions, solutions and the split are read anew here, in plain loops that call nothing of it.
"""

import functools
import itertools
import json
import math
import random
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


def right_answers(task, start, changes):
    found = set()
    for order in itertools.permutations(changes):
        text, total = str(start) if task == "arithmetic" else "", start
        for change in order:
            sign = "+" if change > 0 else "-"
            if task == "arithmetic":
                text += f"{sign}{abs(change)}={total + change}"
            else:
                text += f"<<{total}{sign}{abs(change)}={total + change}>> "
            total += change
        found.add(f"{text.strip()} #### {total}")
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
        assert set(p["solutions"]) == right_answers(task, start, changes), p["question"]
        assert len(p["solutions"]) == len(set(p["solutions"])) and p["answer"] in p["solutions"]
        if task == "carries":
            assert eval_gsm8k.solves_equations(p["answer"], p["answer"])


@each_task
def test_totals_have_two_digits_and_lengths_are_much_alike(task):
    for problems in problem_sets(task):
        lengths, carried, sizes, losses = Counter(), 0, Counter(), 0
        for p in problems:
            start, changes = told(p["question"])
            lengths[len(changes)] += 1
            assert len({(c > 0) for c in changes}) == 1
            assert all(9 < total < 100 for total in itertools.accumulate((start, *changes)))
            carried += start // 10 != (start + sum(changes)) // 10
            sizes.update(map(abs, changes))
            losses += changes[0] < 0
        assert lengths.keys() == {2, 3, 4}
        assert all(abs(n / len(problems) - 1 / 3) < 0.08 for n in lengths.values())
        assert 0.6 < carried / len(problems) < 0.95
        assert losses == 0 if task == "arithmetic" else 0.4 < losses / len(problems) < 0.6
        # Sizes near Benford's law, or all alike; large sums are seldom possible.
        ones, nines = (sizes[k] / sum(sizes.values()) for k in (1, 9))
        if task == "arithmetic":
            assert 0.28 < ones < 0.36 and 0.03 < nines < 0.055
        else:
            assert 0.10 < ones < 0.14 and 0.08 < nines < 0.12


@each_task
def test_no_start_is_left_out_or_favoured(task):
    """Among problems of one change, every pair of numbers comes as often as it should."""
    sizes = range(1, 10)
    if task == "arithmetic":
        draw, changes = arithmetic.gains, {v: math.log10(1 + 1 / v) for v in sizes}
    else:
        draw, changes = arithmetic.gains_or_losses, {s * v: 1 / 18 for v in sizes for s in (1, -1)}
    rng, n = random.Random(0), 60_000
    count = Counter(tuple(draw(rng, 1)) for _ in range(n))
    expected = {(a, v): n * p / 90 for a in range(10, 100) for v, p in changes.items()}
    assert count.keys() <= expected.keys()
    spread = sum((count[key] - mean) ** 2 / mean for key, mean in expected.items())
    assert abs(spread / len(expected) - 1) < 0.15  # chi-square over its degrees of freedom


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
    first = arithmetic.arithmetic(50, 0, False)
    assert first == arithmetic.arithmetic(50, 0, False) == arithmetic.arithmetic(80, 0, False)[:50]
    assert first != arithmetic.arithmetic(50, 1, False)
    places = Counter()
    for p in problem_sets("arithmetic")[0]:
        start, changes = told(p["question"])
        if len(changes) == 3 and len(set(changes)) == 3:
            orders = itertools.permutations(range(3))
            texts = [arithmetic.chain(start, [changes[i] for i in order]) for order in orders]
            places[texts.index(p["answer"])] += 1
    n = sum(places.values())
    assert n > 500 and len(places) == 6
    assert sum((count - n / 6) ** 2 / (n / 6) for count in places.values()) < 25.7  # p 1e-4


def test_the_command_line():
    line = [sys.executable, "-m", "examples.arithmetic", "--problems", "3", "--held-out"]
    for extra, draw in ([], arithmetic.arithmetic), (["--task", "carries"], arithmetic.carries):
        done = subprocess.run(line + extra, cwd=ROOT, capture_output=True, text=True, check=True)
        assert [json.loads(x) for x in done.stdout.splitlines()] == draw(3, 0, True)
