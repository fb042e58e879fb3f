"""The two embedded tasks: word problems with many right solutions, and a strict checker.

    python -m examples.arithmetic --problems 5                  # shopping, train.py's default
    python -m examples.arithmetic --problems 5 --task carries   # how to train on it: README.md

"shopping": "Ben has 52 euros. Hats cost 3, 1, 6 or 2. He buys two. What is left?" has twelve right
solutions, one for each choice and its order, among them

    52-6=46-1=45 #### 6 1 45

What is bought is a free choice, and all that is written must agree on it, the answer too. Tokens
that are open and depend on each other cannot be revealed together, so the answer depends on the
order of the tokens. One to three things are bought, in half of the problems three.

"carries": "Ben has 52 hats. He buys 3, finds 1 and gets 9. How many hats does he have now?" has six
right solutions, one for each order of its changes, written as GSM8K's notes are:

    <<52+3=55>> <<55+1=56>> <<56+9=65>> #### 65

There are two to four changes. The answer is the same for all orders, but a small model cannot add
that many numbers in one pass: it needs its own totals, each of which depends on the one before it.
The sums take half an hour to learn.
"""

import hashlib
import itertools
import json
import random

from examples.command_line import Parser, UserError, positive, run_main, whole

PEOPLE = {"Ann": "she", "Ben": "he", "Eva": "she", "Leo": "he", "Mia": "she", "Sam": "he"}
PEOPLE |= {"Tom": "he", "Zoe": "she"}
THINGS = ("pens", "cups", "mugs", "books", "hats", "toys", "plants", "lamps", "cakes", "bowls")
VERBS = {1: ("buys", "finds", "gets"), -1: ("sells", "loses", "lends")}
COUNTS = ("no", "one", "two", "three")
HELD_OUT = 8  # one set of numbers in eight is kept for testing


def is_held_out(numbers):
    """Split by the numbers of a problem, whatever its wording and the order of its changes."""
    start, *changes = numbers
    return hashlib.sha256(repr([start, *sorted(changes)]).encode()).digest()[0] % HELD_OUT == 0


def draw_problems(n, seed, held_out, with_solutions, draw_numbers, tell):
    """n dicts {question, answer, solutions} from a seeded stream; `held_out` picks the side.

    draw_numbers(rng) -> what the split goes by. tell(rng, numbers) -> (question, choices, k,
    write): write(order) is a solution for each order of k of the choices. The answer is one of
    them, drawn evenly, and `solutions` are all; to list them takes most of the time, and training
    does not need them. No held-out question comes twice: UserError where there are not that many.
    """
    rng, found, asked, repeated = random.Random(seed), [], set(), 0
    while len(found) < n:
        numbers = draw_numbers(rng)
        if is_held_out(numbers) != held_out:
            continue
        question, choices, k, write = tell(rng, numbers)
        if held_out and question in asked:
            repeated += 1
            if repeated > 1000 + 10 * n:
                raise UserError(f"this task has hardly more than {len(found)} held-out questions")
            continue
        asked.add(question)
        found.append({"question": question, "answer": write(rng.sample(choices, k))})
        if with_solutions:
            every = {write(order) for order in itertools.permutations(choices, k)}
            found[-1]["solutions"] = sorted(every)
    return found


# ------------------------------------------------------------------------------------------------
# shopping
# ------------------------------------------------------------------------------------------------


def euros_and_prices(rng):
    """[euros, price 1 .. price 4], the prices all different."""
    return [rng.randint(30, 99), *rng.sample(range(1, 7), 4)]


def tell_shopping(rng, numbers):
    start, *prices = numbers
    name, things = rng.choice(list(PEOPLE)), rng.choice(THINGS)
    k = rng.choice((1, 2, 3, 3))  # the third sum is the last one that a model learns
    told = f"{', '.join(map(str, prices[:-1]))} or {prices[-1]}"
    question = (
        f"{name} has {start} euros. {things.title()} cost {told}. {PEOPLE[name].title()} buys "
        f"{COUNTS[k]}. What is left?"
    )

    def receipt(bought):
        totals = list(itertools.accumulate((start, *(-price for price in bought))))
        steps = (f"-{price}={left}" for price, left in zip(bought, totals[1:]))
        return f"{start}{''.join(steps)} #### {' '.join(map(str, bought))} {totals[-1]}"

    return question, prices, k, receipt


# ------------------------------------------------------------------------------------------------
# carries
# ------------------------------------------------------------------------------------------------


def gains_or_losses(rng):
    """[start, change 1 .. change k], k from 2 to 4, gains only or losses only, two-digit totals."""
    k = rng.choice((2, 3, 4))
    while True:
        sign = rng.choice((1, -1))
        numbers = [rng.randint(10, 99), *(sign * rng.randint(1, 9) for _ in range(k))]
        if 10 <= sum(numbers) <= 99:
            return numbers


def tell_changes(rng, numbers):
    start, *changes = numbers
    name, thing = rng.choice(list(PEOPLE)), rng.choice(THINGS)
    parts = [f"{rng.choice(VERBS[1 if v > 0 else -1])} {abs(v)}" for v in changes]
    told = f"{', '.join(parts[:-1])} and {parts[-1]}"
    they = PEOPLE[name]
    question = (
        f"{name} has {start} {thing}. {they.title()} {told}. How many {thing} does {they} have now?"
    )

    def notes(order):
        totals = list(itertools.accumulate((start, *order)))
        equations = (f"<<{a}{v:+d}={b}>>" for a, v, b in zip(totals, order, totals[1:]))
        return f"{' '.join(equations)} #### {totals[-1]}"

    return question, changes, len(changes), notes


def shopping(n, seed, held_out, with_solutions=True):
    """n problems of shopping, see `draw_problems`."""
    return draw_problems(n, seed, held_out, with_solutions, euros_and_prices, tell_shopping)


def carries(n, seed, held_out, with_solutions=True):
    """n problems of carries, see `draw_problems`."""
    return draw_problems(n, seed, held_out, with_solutions, gains_or_losses, tell_changes)


TASKS = {"shopping": shopping, "carries": carries}


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=TASKS, default="shopping", help="whose problems to print")
    parser.add_argument("--problems", type=positive, default=10, help="how many")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the draws")
    parser.add_argument("--held-out", action="store_true", help="test problems, not training ones")
    args = parser.parse_args(argv)
    for problem in TASKS[args.task](args.problems, args.seed, args.held_out):
        print(json.dumps(problem))


if __name__ == "__main__":
    run_main(main)
