"""Tests of examples/arithmetic.py:  python -m pytest examples/test_arithmetic.py

Questions, solutions and the split are read anew here, in plain loops that call nothing of it.
"""

import functools
import itertools
import json
import random
import runpy
import sys
from collections import Counter

import pytest

import eval_gsm8k
import train
from examples import arithmetic, gsm8k
from examples.command_line import UserError

SIGNS = {"buys": 1, "finds": 1, "gets": 1, "sells": -1, "loses": -1, "lends": -1}
FLAGS = {"shopping": [], "carries": ["--data", "carries", "--max-len", "64", "--canvas-len", "36"]}

each_task = pytest.mark.parametrize("task", ["shopping", "carries"])


@functools.cache
def problem_sets(task):
    """(training problems, held-out problems)."""
    draw = arithmetic.TASKS[task]
    return draw(6000, 0, False), draw(2000, 1, True)


def told(question):
    """(start, prices or changes, how many are to be taken) of a question, from its words."""
    words = question.replace(",", "").replace(".", "").split()
    if "euros" in words:
        numbers = [int(word) for word in words if word.isdigit()]
        count = words[words.index("buys") + 1]
        return numbers[0], numbers[1:], {"one": 1, "two": 2, "three": 3}[count]
    changes = [SIGNS[w] * int(following) for w, following in zip(words, words[1:]) if w in SIGNS]
    return int(words[2]), changes, len(changes)


def right_answers(question):
    start, listed, k = told(question)
    found = set()
    for order in itertools.permutations(listed, k):
        total, chain, notes = start, str(start), []
        for number in order:
            if "euros" in question:
                total -= number
                chain += f"-{number}={total}"
            else:
                sign = "+" if number > 0 else "-"
                notes.append(f"<<{total}{sign}{abs(number)}={total + number}>>")
                total += number
        paid = " ".join(str(number) for number in order)
        found.add(f"{' '.join(notes)} #### {total}" if notes else f"{chain} #### {paid} {total}")
    return found


@each_task
def test_no_test_problem_has_the_numbers_of_a_training_problem(task):
    sets = []
    for problems in problem_sets(task):
        read = [told(p["question"]) for p in problems]
        sets.append({(start, *sorted(listed)) for start, listed, _ in read})
    assert not sets[0] & sets[1] and len(sets[1]) > 100
    held_out = problem_sets(task)[1]
    assert len({p["question"] for p in held_out}) == len(held_out)


@each_task
def test_solutions_are_those_of_the_question(task):
    for p in itertools.chain(*problem_sets(task)):
        assert set(p["solutions"]) == right_answers(p["question"]), p["question"]
        assert len(p["solutions"]) == len(set(p["solutions"])) and p["answer"] in p["solutions"]
        if task == "carries":
            assert gsm8k.solves_equations(p["answer"], p["answer"])


@each_task
def test_numbers_and_lengths(task):
    for problems in problem_sets(task):
        lengths, carried = Counter(), 0
        for p in problems:
            start, listed, k = told(p["question"])
            lengths[k] += 1
            if task == "shopping":
                assert 30 <= start <= 99 and len(listed) == 4 == len(set(listed) & set(range(1, 7)))
            else:
                assert len({v > 0 for v in listed}) == 1 and all(1 <= abs(v) <= 9 for v in listed)
                assert all(9 < total < 100 for total in itertools.accumulate((start, *listed)))
            carried += start // 10 != int(p["answer"].split()[-1]) // 10
        thirds = dict.fromkeys((2, 3, 4), 1 / 3)
        shares = {1: 1 / 4, 2: 1 / 4, 3: 1 / 2} if task == "shopping" else thirds
        assert lengths.keys() == shares.keys()
        assert all(abs(n / len(problems) - shares[k]) < 0.08 for k, n in lengths.items())
        assert 0.3 < carried / len(problems) < 0.95


def test_no_numbers_are_left_out_or_favoured():
    rng, n = random.Random(0), 30_000
    prices, starts = Counter(), Counter()
    for _ in range(n):
        start, *drawn = arithmetic.euros_and_prices(rng)
        starts[start] += 1
        prices[tuple(drawn)] += 1
    assert len(starts) == 70 and len(prices) == 6 * 5 * 4 * 3
    for counts in (starts, prices):
        mean = n / len(counts)
        assert sum((x - mean) ** 2 / mean for x in counts.values()) < 1.4 * len(counts)
    pairs = Counter()
    while sum(pairs.values()) < n:
        start, *changes = arithmetic.gains_or_losses(rng)
        assert 10 <= start + sum(changes) <= 99
        if 40 <= start < 60:  # far from where a sum may not be
            pairs[start, changes[0]] += 1
    mean = n / len(pairs)
    assert len(pairs) == 20 * 18
    assert sum((x - mean) ** 2 / mean for x in pairs.values()) < 1.4 * len(pairs)


@each_task
def test_problems_fit_the_canvas_and_leave_no_room_unused(task):
    args = train.parse_args(FLAGS[task])
    training, held_out = problem_sets(task)
    assert args.data == task
    tokenizer = train.make_tokenizer(args, training)
    prompts = [len(tokenizer.encode(p["question"] + "||")) for p in training + held_out]
    answers = [len(tokenizer.encode(p["answer"])) for p in training]
    assert max(prompts) + args.canvas_len == args.max_len
    assert max(answers) + 1 == args.canvas_len  # one EOS at the least


def test_seeds_and_orders():
    first = arithmetic.shopping(50, 0, False)
    assert first == arithmetic.shopping(50, 0, False) == arithmetic.shopping(80, 0, False)[:50]
    assert first != arithmetic.shopping(50, 1, False)
    unlisted = arithmetic.shopping(50, 0, False, with_solutions=False)
    assert unlisted == [{key: p[key] for key in ("question", "answer")} for p in first]
    places = Counter()
    for p in problem_sets("shopping")[0]:
        if len(p["solutions"]) == 12:  # two of four, told in random order
            bought = [int(word) for word in p["answer"].split("#### ")[1].split()[:2]]
            places[tuple(told(p["question"])[1].index(price) for price in bought)] += 1
    n = sum(places.values())
    assert n > 1500 and len(places) == 12
    assert sum((count - n / 12) ** 2 / (n / 12) for count in places.values()) < 37.4  # p 1e-4


def test_the_answer_is_judged_by_all_solutions():
    problem = {"solutions": ["52-6=46 #### 6 46", "52-1=51 #### 1 51"]}
    for text, answered, solved in (
        ("52-6=46 #### 6 46", True, True),
        ("52-6=47 #### 1 51", True, False),
        ("52-6=46 #### 6 51", False, False),
        ("52-6=46 6 46", False, False),
        ("6 46", False, False),
    ):
        assert eval_gsm8k.judge(text, problem) == (answered, solved)


def test_the_command_line(capsys, monkeypatch):
    flags = ["--problems", "3", "--held-out"]
    monkeypatch.setattr(sys, "argv", [arithmetic.__file__, *flags])
    runpy.run_path(arithmetic.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert [json.loads(x) for x in out.splitlines()] == arithmetic.shopping(3, 0, True)
    arithmetic.main([*flags, "--task", "carries"])
    out = capsys.readouterr().out
    assert [json.loads(x) for x in out.splitlines()] == arithmetic.carries(3, 0, True)


def test_more_held_out_questions_than_there_are():
    def draw_numbers(rng):
        return [rng.randint(1, 99), 1]

    def tell(rng, numbers):
        return str(numbers), [1], 1, lambda order: "1"

    there = sum(map(arithmetic.is_held_out, ([n, 1] for n in range(1, 100))))
    assert len(arithmetic.draw_problems(there, 0, True, True, draw_numbers, tell)) == there
    with pytest.raises(UserError, match=f"hardly more than {there} held-out"):
        arithmetic.draw_problems(there + 1, 0, True, True, draw_numbers, tell)
