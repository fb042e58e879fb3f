"""Word problems whose equations may be written in any order: what train.py takes without --data.

    python -m examples.arithmetic --problems 5            # five training problems, as JSON lines

"Ben has 52 hats. He buys 3, finds 1 and gets 2. How many hats does he have now?" has six right
solutions, one for each order of the three changes:

    <<52+3=55>> <<55+1=56>> <<56+2=58>> #### 58

The first change of a solution is uncertain, each later equation depends on those before it, and the
answer is certain from the start. A problem has gains only or losses only, and its totals keep their
tens digit, so that a small model learns the sums in minutes.
"""

import hashlib
import itertools
import random

PEOPLE = {"Ann": "she", "Ben": "he", "Eva": "she", "Leo": "he", "Mia": "she", "Sam": "he"}
PEOPLE |= {"Tom": "he", "Zoe": "she"}
THINGS = ("pens", "cups", "mugs", "books", "hats", "toys", "plants", "lamps", "cakes", "bowls")
VERBS = {1: ("buys", "finds", "gets"), -1: ("sells", "loses", "lends")}
MOST = 3  # changes in a problem
HELD_OUT = 8  # one set of numbers in eight is kept for testing


def possible_numbers(n):
    """All [start, change 1 .. change n] whose totals have two digits and keep the first of them."""
    found = []
    for changes in itertools.product(range(1, 10), repeat=n):
        for start in range(10, 100):
            if start % 10 + sum(changes) <= 9:
                found.append([start, *changes])
            if start % 10 - sum(changes) >= 0:
                found.append([start, *(-change for change in changes)])
    return found


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


def problems(n, seed, held_out):
    """n dicts {question, answer, solutions} from a seeded stream; `held_out` picks the side.

    A problem has 1 to MOST changes, the answer makes them in random order, and `solutions` are all
    right answers. No held-out question comes twice.
    """
    rng, found, asked = random.Random(seed), [], set()
    choices = [
        [numbers for numbers in possible_numbers(k) if is_held_out(numbers) == held_out]
        for k in range(1, MOST + 1)
    ]
    while len(found) < n:
        start, *changes = rng.choice(rng.choice(choices))
        question = wording(rng, start, changes)
        if held_out and question in asked:
            continue
        asked.add(question)
        orders = set(itertools.permutations(changes))
        solutions = sorted(solution(start, order) for order in orders)
        answer = solution(start, rng.sample(changes, len(changes)))
        found.append({"question": question, "answer": answer, "solutions": solutions})
    return found


def main(argv=None):
    import eval_gsm8k  # which imports this file

    eval_gsm8k.print_problems(problems, __doc__, argv)


if __name__ == "__main__":
    from eval_gsm8k import run_main

    run_main(main)
