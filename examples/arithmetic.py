"""The two embedded tasks: word problems whose equations may be written in any order.

    python -m examples.arithmetic --problems 5                  # as JSON lines
    python -m examples.arithmetic --problems 5 --task carries
    python train.py --data carries                              # the first one is the default

"Ben has 52 hats. He buys 3, finds 1 and gets 2. How many hats does he have now?" has six right
solutions, one for each order of the three changes:

    <<52+3=55>> <<55+1=56>> <<56+2=58>> #### 58

Which change comes next is a choice, and each equation depends on all before it. A problem has gains
only or losses only. There are 1 to 3 changes whose totals keep their tens digit, so that a small
model learns the sums in minutes; it knows the answer at once, only the chain depends on the order.

In "carries" there are 2 to 4 changes and the tens digit may change. A small model cannot add all of
them in one pass then, so it needs its own intermediate totals, and the answer depends on the order.
"""

import hashlib
import itertools
import json
import random

PEOPLE = {"Ann": "she", "Ben": "he", "Eva": "she", "Leo": "he", "Mia": "she", "Sam": "he"}
PEOPLE |= {"Tom": "he", "Zoe": "she"}
THINGS = ("pens", "cups", "mugs", "books", "hats", "toys", "plants", "lamps", "cakes", "bowls")
VERBS = {1: ("buys", "finds", "gets"), -1: ("sells", "loses", "lends")}
HELD_OUT = 8  # one set of numbers in eight is kept for testing


def is_held_out(numbers):
    """Split by the numbers of a problem, whatever its wording and the order of its changes."""
    start, *changes = numbers
    return hashlib.sha256(repr([start, *sorted(changes)]).encode()).digest()[0] % HELD_OUT == 0


def solution(start, changes):
    """The solution that makes the changes in this order."""
    totals = list(itertools.accumulate((start, *changes)))
    equations = (f"<<{a}{v:+d}={b}>>" for a, v, b in zip(totals, changes, totals[1:]))
    return f"{' '.join(equations)} #### {totals[-1]}"


def wording(rng, start, changes):
    """The question, in words."""
    name, thing = rng.choice(list(PEOPLE)), rng.choice(THINGS)
    parts = [f"{rng.choice(VERBS[1 if v > 0 else -1])} {abs(v)}" for v in changes]
    told = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    they = PEOPLE[name]
    return (
        f"{name} has {start} {thing}. {they.title()} {told}. How many {thing} does {they} have now?"
    )


def draw_numbers(rng, n, is_possible):
    """[start, change 1 .. change n], all gains or all losses."""
    while True:
        sign = rng.choice((1, -1))
        numbers = [rng.randint(10, 99), *(sign * rng.randint(1, 9) for _ in range(n))]
        if is_possible(numbers[0], sum(numbers)):
            return numbers


def draw_problems(n, seed, held_out, lengths, is_possible):
    """n problems from a seeded stream, of as many changes as `lengths` says, about as often.

    is_possible(start, total) says which numbers may be asked for; held_out picks the side.
    """
    rng, found, asked = random.Random(seed), [], set()
    while len(found) < n:
        start, *changes = draw_numbers(rng, rng.choice(lengths), is_possible)
        if is_held_out([start, *changes]) != held_out:
            continue
        question = wording(rng, start, changes)
        if held_out and question in asked:
            continue
        asked.add(question)
        orders = set(itertools.permutations(changes))
        solutions = sorted(solution(start, order) for order in orders)
        answer = solution(start, rng.sample(changes, len(changes)))
        found.append({"question": question, "answer": answer, "solutions": solutions})
    return found


def problems(n, seed, held_out):
    """n dicts {question, answer, solutions}, totals keep their tens digit; `held_out`: the side.

    The answer makes the changes in random order, and `solutions` are all right answers. No held-out
    question comes twice.
    """
    return draw_problems(n, seed, held_out, (1, 2, 3), lambda start, t: start // 10 == t // 10)


def carries(n, seed, held_out):
    """As `problems`, with more changes, and any totals of two digits."""
    return draw_problems(n, seed, held_out, (2, 3, 4), lambda start, t: 10 <= t <= 99)


TASKS = {"arithmetic": problems, "carries": carries}


def main(argv=None):
    from eval_gsm8k import Parser, positive, seed  # which imports this file

    parser = Parser(__doc__)
    parser.add_argument("--task", choices=TASKS, default="arithmetic", help="which of the two")
    parser.add_argument("--problems", type=positive, default=10, help="how many")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the draws")
    parser.add_argument("--held-out", action="store_true", help="test problems, not training ones")
    args = parser.parse_args(argv)
    for problem in TASKS[args.task](args.problems, args.seed, args.held_out):
        print(json.dumps(problem))


if __name__ == "__main__":
    from eval_gsm8k import run_main

    run_main(main)
