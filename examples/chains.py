"""Word problems whose answer depends on the order of work: one or two people, chains of operations.

    python -m examples.chains --problems 5            # five training problems, as JSON lines
    python train.py --data chains --max-len 72 --canvas-len 41        # to train on them

"Ben has 8 cups, halves them and finds 2. Ann has 3, doubles them and sells 1. How many cups in
all?" Each person's operations must be done in the order told, because they do not commute. The two
people's equations may be interleaved in any way, and the sum comes last:

    <<8/2=4>> <<3*2=6>> <<4+2=6>> <<6-1=5>> <<6+5=11>> #### 11

So there are several right solutions, each equation depends on earlier ones, and the length varies.
Every value lies within 1 to 9, only the sum may be larger. Which equation comes next is a choice,
and what it says depends on all before it.
"""

import hashlib
import itertools
import random

PEOPLE = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("pens", "cups", "mugs", "books", "hats", "toys", "lamps", "bowls")
WORDS = {
    "+": ("finds {}", "buys {}"),
    "-": ("sells {}", "loses {}"),
    "*2": ("doubles them",),
    "*3": ("triples them",),
    "/2": ("halves them",),
}
HELD_OUT = 8  # one set of numbers in eight is kept for testing
# Operations of each person, drawn alike: one problem in three is about one person.
LENGTHS = ((3,), (4,), (5,), (2, 2), (2, 2), (2, 3), (2, 3), (3, 2), (3, 2))


def apply(value, operation):
    """Value after an operation like "+3", "*2" or "/2"; None if it is no whole number in 1 to 9."""
    sign, number = operation[0], int(operation[1:])
    if sign == "/" and value % number:
        return None
    result = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}
    return result[sign] if 1 <= result[sign] <= 9 else None


def draw_chain(rng, length):
    """[start, operation, ..] of `length` operations, each possible where it stands."""
    start = value = rng.randint(2, 9)
    operations = []
    while len(operations) < length:
        kind = rng.choice(list(WORDS))
        operation = kind + str(rng.randint(1, 8)) if kind in "+-" else kind
        result = apply(value, operation)
        if result is not None:
            operations.append(operation)
            value = result
        elif rng.random() < 0.05:  # few starts leave no way on; begin again
            return draw_chain(rng, length)
    return [start, *operations]


def is_held_out(chains):
    """Split by the numbers of a problem, whatever its names, its wording and who comes first."""
    numbers = repr(sorted(map(str, chains)))
    return hashlib.sha256(numbers.encode()).digest()[0] % HELD_OUT == 0


def solution(chains, turns):
    """The solution whose k-th equation is the next one of person `turns[k]`."""
    values, done, equations = [chain[0] for chain in chains], [0] * len(chains), []
    for person in turns:
        done[person] += 1
        operation = chains[person][done[person]]
        result = apply(values[person], operation)
        equations.append(f"<<{values[person]}{operation}={result}>>")
        values[person] = result
    if len(chains) > 1:
        equations.append(f"<<{values[0]}+{values[1]}={sum(values)}>>")
    return f"{' '.join(equations)} #### {sum(values)}"


def solutions(chains):
    """All right solutions: every interleaving, and the sum with either person first."""
    turns = [person for person, chain in enumerate(chains) for _ in chain[1:]]
    texts = {solution(chains, order) for order in set(itertools.permutations(turns))}
    if len(chains) > 1:
        texts |= {swapped(text) for text in texts}
    return sorted(texts)


def swapped(text):
    """The solution with the sum's two numbers the other way round."""
    rest, _, last = text.rpartition("<<")
    total, _, answer = last.partition("=")
    first, second = total.split("+")
    return f"{rest}<<{second}+{first}={answer}"


def wording(rng, chains):
    """The question, in words."""
    thing, sentences = rng.choice(THINGS), []
    for person, (start, *operations) in zip(rng.sample(PEOPLE, len(chains)), chains):
        parts = []
        for operation in operations:
            kind = operation if operation in WORDS else operation[0]
            parts.append(rng.choice(WORDS[kind]).format(operation[1:]))
        told = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "and " + parts[0]
        counted = f"{start} {thing}" if not sentences else str(start)
        sentences.append(f"{person} has {counted}{',' if len(parts) > 1 else ''} {told}.")
    return f"{' '.join(sentences)} How many {thing} {'in all' if len(chains) > 1 else 'now'}?"


def problems(n, seed, held_out):
    """n dicts {question, answer, solutions} from a seeded stream; `held_out` picks the side.

    One problem in three is about one person with three to five operations, the others about two
    with two or three each. The interleaving is drawn at random. No held-out question comes twice.
    """
    rng, found, asked = random.Random(seed), [], set()
    while len(found) < n:
        lengths = rng.choice(LENGTHS)
        chains = [draw_chain(rng, length) for length in lengths]
        if is_held_out(chains) != held_out:
            continue
        question = wording(rng, chains)
        if held_out and question in asked:
            continue
        asked.add(question)
        turns = [person for person, length in enumerate(lengths) for _ in range(length)]
        rng.shuffle(turns)
        answer = solution(chains, turns)
        problem = {"question": question, "answer": answer, "solutions": solutions(chains)}
        found.append(problem)
    return found


def main(argv=None):
    import eval_gsm8k  # which imports this file

    eval_gsm8k.print_problems(problems, __doc__, argv)


if __name__ == "__main__":
    from eval_gsm8k import run_main

    run_main(main)
