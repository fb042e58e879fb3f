"""The two embedded tasks: word problems whose sums may be done in any order.

    python -m examples.arithmetic --problems 5                  # as JSON lines
    python -m examples.arithmetic --problems 5 --task carries
    python train.py --data carries                              # the first one is the default

"Ben has 52 hats. He buys 3, finds 1 and gets 8. How many hats does he have now?" has six right
solutions, one for each order of the three changes:

    52+3=55+1=56+8=64 #### 64

Which change comes next is a choice, and each total depends on the one before it. A small model
cannot add all of them in one pass, it needs its own totals: so the answer depends on the order in
which the tokens are revealed. There are 2 to 4 changes, and totals have two digits.

In "arithmetic" all changes are gains, and small ones are more frequent (Benford's law). Then the
last total alone tells something of the next one's units, and a small model learns the sums in
minutes. In "carries" gains or losses from 1 to 9 are all alike, which takes much longer, and the
solution is written as GSM8K's notes are: <<52+3=55>> <<55+1=56>> <<56+8=64>> #### 64.
"""

import hashlib
import itertools
import json
import math
import random

PEOPLE = {"Ann": "she", "Ben": "he", "Eva": "she", "Leo": "he", "Mia": "she", "Sam": "he"}
PEOPLE |= {"Tom": "he", "Zoe": "she"}
THINGS = ("pens", "cups", "mugs", "books", "hats", "toys", "plants", "lamps", "cakes", "bowls")
BENFORD = [math.log10(1 + 1 / v) for v in range(1, 10)]
VERBS = {1: ("buys", "finds", "gets"), -1: ("sells", "loses", "lends")}
HELD_OUT = 8  # one set of numbers in eight is kept for testing


def is_held_out(numbers):
    """Split by the numbers of a problem, whatever its wording and the order of its changes."""
    start, *changes = numbers
    return hashlib.sha256(repr([start, *sorted(changes)]).encode()).digest()[0] % HELD_OUT == 0


def chain(start, changes):
    """The solution that makes the changes in this order, each total written once."""
    totals = list(itertools.accumulate((start, *changes)))
    steps = (f"{v:+d}={total}" for v, total in zip(changes, totals[1:]))
    return f"{start}{''.join(steps)} #### {totals[-1]}"


def notes(start, changes):
    """The same with an equation for each change, as in GSM8K."""
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


def gains(rng, n):
    """[start, change 1 .. change n], gains only, small ones more frequent."""
    return [rng.randint(10, 99), *rng.choices(range(1, 10), BENFORD, k=n)]


def gains_or_losses(rng, n):
    """[start, change 1 .. change n], all gains or all losses, all sizes alike."""
    sign = rng.choice((1, -1))
    return [rng.randint(10, 99), *(sign * rng.randint(1, 9) for _ in range(n))]


def draw_problems(n, seed, held_out, draw_numbers, solution):
    """n dicts {question, answer, solutions} from a seeded stream; held_out picks the side.

    The answer makes the changes in random order, and `solutions` are all right answers. No held-out
    question comes twice.
    """
    rng, found, asked = random.Random(seed), [], set()
    while len(found) < n:
        length = rng.choice((2, 3, 4))
        numbers = draw_numbers(rng, length)
        while not 10 <= sum(numbers) <= 99:
            numbers = draw_numbers(rng, length)
        if is_held_out(numbers) != held_out:
            continue
        start, *changes = numbers
        question = wording(rng, start, changes)
        if held_out and question in asked:
            continue
        asked.add(question)
        orders = set(itertools.permutations(changes))
        solutions = sorted(solution(start, order) for order in orders)
        answer = solution(start, rng.sample(changes, len(changes)))
        found.append({"question": question, "answer": answer, "solutions": solutions})
    return found


def arithmetic(n, seed, held_out):
    """n problems of gains, written as chains."""
    return draw_problems(n, seed, held_out, gains, chain)


def carries(n, seed, held_out):
    """n problems of gains or losses, written as notes."""
    return draw_problems(n, seed, held_out, gains_or_losses, notes)


TASKS = {"arithmetic": arithmetic, "carries": carries}


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
