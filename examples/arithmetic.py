"""Word problems whose answer depends on the order of work: one or two people, chains of operations.

    python -m examples.arithmetic --problems 5            # five training problems, as JSON lines

"Ben has 8 cups, halves them and finds 2. Ann has 3, doubles them and sells 1. How many cups in
all?" Each person's operations must be done in the order told, because they do not commute. The two
people's equations may be interleaved in any way, and the sum comes last:

    <<8/2=4>> <<3*2=6>> <<4+2=6>> <<6-1=5>> <<6+5=11>> #### 11

So there are several right solutions, each equation depends on earlier ones, and the length varies.
Every value lies within 1 to 9, only the sum may be larger. train.py takes these without --data.
"""

import argparse
import hashlib
import json
import random
import re

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


def are_chains(value):
    """Is `value`, read from a file, what `problems` calls chains?"""
    return (
        isinstance(value, list)
        and len(value) in (1, 2)
        and all(isinstance(chain, list) and len(chain) > 1 for chain in value)
        and all(isinstance(chain[0], int) for chain in value)
        and all(re.fullmatch(r"[+*/-][1-9]", str(op)) for chain in value for op in chain[1:])
    )


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
    """n dicts {question, answer, chains} from a seeded stream; `held_out` picks the side.

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
        found.append({"question": question, "answer": answer, "chains": chains})
    return found


def solves(text, chains):
    """Is `text` a right solution: does some interleaving of the chains explain all its equations?

    The sum may name the two people in either order.
    """
    equations, _, answer = text.partition(" #### ")
    notes = equations.split(" ")
    steps = sum(len(chain) - 1 for chain in chains)
    if len(notes) != steps + (len(chains) > 1):
        return False
    states = {tuple((chain[0], 0) for chain in chains)}  # (value, operations done) of each person
    for note in notes[:steps]:
        states = {after for before in states for after in explanations(before, note, chains)}
    for state in states:
        values = [value for value, _ in state]
        sums = {
            f"<<{a}+{b}={sum(values)}>>" for a in values for b in values if a + b == sum(values)
        }
        if answer == str(sum(values)) and (len(chains) == 1 or notes[-1] in sums):
            return True
    return False


def explanations(state, note, chains):
    """The states that follow from `state` if the equation `note` is some person's next one."""
    for person, (value, done) in enumerate(state):
        if done + 1 < len(chains[person]):
            operation = chains[person][done + 1]
            result = apply(value, operation)
            if note == f"<<{value}{operation}={result}>>":
                yield (*state[:person], (result, done + 1), *state[person + 1 :])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument("--held-out", action="store_true", help="test problems, not training ones")
    args = parser.parse_args()
    for problem in problems(args.problems, args.seed, args.held_out):
        print(json.dumps(problem))


if __name__ == "__main__":
    main()
