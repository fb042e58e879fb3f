"""Tests of examples/sudoku.py:  python -m pytest examples/test_sudoku.py"""

import functools
import itertools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import mdmvi
import train
from examples import command_line, sudoku

torch.set_num_threads(1)
BOXES = {  # which box each cell is in
    (2, 2): "0011 0011 2233 2233",
    (2, 3): "000111 000111 222333 222333 444555 444555",
    (3, 3): "000111222 000111222 000111222 333444555 333444555 333444555 "
    "666777888 666777888 666777888",
}


def rng(seed):
    return torch.Generator().manual_seed(seed)


def same_unit(i, j, box):
    side, boxes = box[0] * box[1], BOXES[box].replace(" ", "")
    return i // side == j // side or i % side == j % side or boxes[i] == boxes[j]


def legal(text, box):
    cells = text.replace("\n", "")
    pairs = itertools.combinations(range(len(cells)), 2)
    full = set(cells) == set("123456789"[: box[0] * box[1]])
    return full and all(cells[i] != cells[j] for i, j in pairs if same_unit(i, j, box))


@functools.cache
def grids_2x2():
    """Every grid of 2 x 2 boxes, as text."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    halves = [f"{a}\n{b}" for a in rows for b in rows if not set(a[:2]) & set(b[:2])]
    halves = [half for half in halves if not set(half[2:4]) & set(half[7:])]
    grids = (f"{a}\n{b}" for a in halves for b in halves)
    return [grid for grid in grids if legal(grid, (2, 2))]


def fitting(puzzle):
    """The grids of 2 x 2 boxes that keep the clues of a puzzle."""
    return [g for g in grids_2x2() if all(q in (".", c) for q, c in zip(puzzle, g))]


def slow_solutions(cells, box):
    """The solutions of a puzzle without line breaks, from a blank with the fewest digits left."""
    digits, left = set("123456789"[: box[0] * box[1]]), {}
    for i in (i for i, c in enumerate(cells) if c == "."):
        left[i] = digits - {c for j, c in enumerate(cells) if same_unit(i, j, box)}
    if not left:
        return [cells]
    i = min(left, key=lambda i: len(left[i]))
    tries = (cells[:i] + digit + cells[i + 1 :] for digit in left[i])
    return [found for tried in tries for found in slow_solutions(tried, box)]


# --------------------------------------------------------------------------------------------------
# Puzzles
# --------------------------------------------------------------------------------------------------


def test_the_solver_finds_every_grid():
    empty = [0] * 16
    found = sudoku.solutions(empty, (2, 2), 1000, random.Random(0))
    assert sorted(sudoku.as_text(grid, 4) for grid in found) == sorted(grids_2x2())
    assert len(found) == 288 and empty == [0] * 16
    assert len(sudoku.solutions(empty, (2, 2), 5)) == 5
    for impossible in ([1, 1] + [0] * 14, [1, 2, 0, 0, 0, 0, 3, 0, 0, 0, 4] + [0] * 5):
        assert sudoku.solutions(impossible, (2, 2), 5) == []


def test_the_solver_against_brute_force():
    draw = random.Random(0)
    for _ in range(200):
        grid = draw.choice(grids_2x2())
        puzzle = "".join(c if c == "\n" or draw.random() < 0.3 else "." for c in grid)
        cells = [int(c) for c in puzzle.replace("\n", "").replace(".", "0")]
        found = sudoku.solutions(cells, (2, 2), 1000)
        assert sorted(sudoku.as_text(grid, 4) for grid in found) == sorted(fitting(puzzle))


@pytest.mark.parametrize("box, n, base", [((2, 2), 1000, 40), ((2, 3), 40, 20), ((3, 3), 2, 1)])
def test_problems(box, n, base):
    found = sudoku.problems(n, 1, False, box, base)
    assert len(found) == n and found == sudoku.problems(n, 1, False, box, base)
    assert found[: n // 2] == sudoku.problems(n // 2, 1, False, box, base)
    for p in found:
        puzzle, answer = p["question"], p["answer"]
        assert legal(answer, box) and "." in puzzle and p["box"] == box
        if box == (2, 2):
            assert fitting(puzzle) == [answer]
        else:
            assert slow_solutions(puzzle.replace("\n", ""), box) == [answer.replace("\n", "")]
    # permutations reach all of the 288 but the held-out eighth
    assert len({p["answer"] for p in found}) > (220 if box == (2, 2) else n - 1)
    for puzzle in (p["question"] for p in found[:20] if box == (2, 2)):  # no clue to spare
        clues = [i for i, c in enumerate(puzzle) if c.isdigit()]
        assert all(len(fitting(puzzle[:i] + "." + puzzle[i + 1 :])) > 1 for i in clues)


@pytest.mark.parametrize("box, seeds", [((2, 2), (1, 2)), ((2, 3), (1,))])
def test_both_sides_of_the_split_share_no_grid(box, seeds):
    """Of 2 x 3 boxes there are 28 million grids: only one seed would draw the same ones twice."""
    known = {p["answer"] for p in sudoku.problems(300, 1, False, box, 20)}
    for seed in seeds:
        held_out = sudoku.problems(300, seed, True, box, 20)
        assert len(held_out) == 300 and not known & {p["answer"] for p in held_out}


def test_solves():
    for p in sudoku.problems(5, 1, True, (2, 2)):
        for grid in grids_2x2():  # only the one that keeps the clues
            assert sudoku.solves(grid, p) == (grid == p["answer"])
    for box in ((2, 2), (2, 3)):
        p = sudoku.problems(1, 3, True, box, 5)[0]
        text, clue = p["answer"], next(c for c in p["question"] if c.isdigit())
        assert sudoku.solves(text, p)
        for i, c in enumerate(text):  # a cell or a line break
            others = (text[:i] + other + text[i + 1 :] for other in set("0123456789.\n ") - {c})
            assert not any(sudoku.solves(wrong, p) for wrong in others)
        other = "2" if clue == "1" else "1"
        swapped = text.translate(str.maketrans(clue + other, other + clue))
        assert legal(swapped, box) and not sudoku.solves(swapped, p)  # not of these clues
        for wrong in ("", text[:-1], text + "1", text + "\n", p["question"]):
            assert not sudoku.solves(wrong, p)


@pytest.mark.parametrize("box", BOXES)
def test_encode(box):
    problems, side = sudoku.problems(3, 1, True, box, base=1), box[0] * box[1]
    (clean, canvas), (blank, same_canvas) = (sudoku.encode(problems, a) for a in (True, False))
    assert clean.shape == (3, side * (side + 1)) and clean.dtype == torch.int64
    assert torch.equal(canvas, same_canvas) and torch.equal(clean[~canvas], blank[~canvas])
    assert (blank[canvas] == 0).all()  # without a word of the answer
    for p, solved, asked, on in zip(problems, clean.tolist(), blank.tolist(), canvas.tolist()):
        assert on == [False] + [c == "." for c in p["question"]]
        assert sudoku.grid_text(solved) == p["answer"]
        assert sudoku.grid_text(asked) == p["question"]
        assert sudoku.solves(sudoku.grid_text(solved), p)


# --------------------------------------------------------------------------------------------------
# Orders
# --------------------------------------------------------------------------------------------------


class Toy:
    """Looks up random hidden states, which are its logits, for each sequence of four tokens."""

    mask_id, eos_id = 3, 0

    def __init__(self, seed=0):
        self.table = 1.5 * torch.randn(4**4, 4, 3, generator=rng(seed))

    def __call__(self, tokens, place=None):
        hidden = self.table[(tokens * 4 ** torch.arange(4)).sum(1)]
        return hidden if place is None else hidden.flatten(0, 1)[place]

    def logits(self, hidden):
        return hidden


def toy_problems():
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)[::2]
    canvas = torch.ones_like(tokens).bool()
    canvas[::3, 1] = False
    return tokens, canvas


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_sure_first_order_against_a_slow_one(monkeypatch, T):
    monkeypatch.setattr(sudoku, "SURE", 0.7)
    toy, (tokens, canvas), longest = Toy(seed=3), toy_problems(), set()
    for row, on, got in zip(tokens, canvas, sudoku.sure_first_order(toy, tokens, canvas, T)):
        rest, expected = on.nonzero().flatten().tolist(), {}
        for s in range(T):
            x = torch.tensor([toy.mask_id if i in rest else int(row[i]) for i in range(4)])
            p = toy(x[None])[0].softmax(-1).amax(-1).tolist()
            now = [i for i in rest if p[i] > 0.7] or sorted(rest, key=lambda i: p[i])[-1:]
            now = rest if s == T - 1 else now
            expected.update({i: s for i in now})
            rest = [i for i in rest if i not in now]
        assert got.tolist() == [expected.get(i, -1) for i in range(4)]
        longest.add(max(expected.values()))
    assert len(longest) == min(T, 4)


def test_the_posterior_follows_the_search():
    toy, (tokens, canvas), T = Toy(), toy_problems(), 4
    step = sudoku.sure_first_order(toy, tokens, canvas, T)
    log_alpha = sudoku.search_posterior(toy, T, 0.1)(tokens, canvas)
    assert (log_alpha[canvas] < 0).all()
    for s in range(T + 1):
        taken = torch.full((len(tokens),), s)
        masked, _ = mdmvi.draw_path(log_alpha, canvas, taken, T, 0.1, rng(s))
        assert torch.equal(masked, step >= s)


def test_states_on_the_way():
    toy, (tokens, canvas), T = Toy(), toy_problems(), 4
    step = sudoku.sure_first_order(toy, tokens, canvas, T)
    hidden, reveal = sudoku.states_on_the_way(toy, tokens, canvas, T)
    expected = []
    for s, row in itertools.product(range(T - 1), range(len(tokens))):
        seen = toy(torch.where(step[row] >= s, toy.mask_id, tokens[row])[None])[0]
        cells = (i for i in range(4) if step[row, i] >= s)
        expected += [(*seen[i].tolist(), float(step[row, i] == s)) for i in cells]
    assert [(*h, r) for h, r in zip(hidden.tolist(), reveal.tolist())] == expected


# --------------------------------------------------------------------------------------------------
# Training, scoring, the command line
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A tiny model, few puzzles, few steps."""
    monkeypatch.setitem(train.SIZES, "small", (1, 2, 16, 32))
    constants = {"TRAINING": 300, "SEARCHED": 64, "STATE_STEPS": 40, "BOUND_STEPS": 3}
    for name, value in constants.items():
        monkeypatch.setattr(sudoku, name, value)
    monkeypatch.setattr(sudoku, "problems", functools.partial(sudoku.problems, base=20))


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the program."""
    code = 0
    try:
        command_line.run_main(lambda: sudoku.main([*map(str, argv), "--device", "cpu"]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("box, seeds", [("2x2", (0, 0, 1)), ("2x3", (1,))])
def test_end_to_end(small, box, seeds, tmp_path, capsys):
    files = [tmp_path / name for name in "abc"[: len(seeds)]]
    for file, seed in zip(files, seeds):
        flags = ("--box", box, "--steps", 25, "--budget", 4, "--problems", 20, "--seed", seed)
        code, out, _ = run(capsys, *flags, "--json", file)
        assert code == 0
    if len(files) > 1:
        assert files[0].read_text() == files[1].read_text() != files[2].read_text()
    rows = json.loads(files[-1].read_text())
    assert [(row["method"], row["match"]) for row in rows] == [
        ("learned", ""),
        *((rule, match) for match in ("@Avg", "@Max") for rule in mdmvi.RULES),
        *((rule, "one a step") for rule in ("random", "top_prob", "top_prob_margin")),
    ]
    ours, by_name = rows[0], {(row["method"], row["match"]): row for row in rows}
    assert ours["max_steps"] <= 4 and ours["p"] is None
    average = by_name["top_prob", "@Avg"]["max_steps"]
    assert ours["average_steps"] <= average < ours["average_steps"] + 1  # rounded up
    assert by_name["top_prob", "@Max"]["max_steps"] == ours["max_steps"]
    puzzles = sudoku.problems(20, 2, True, sudoku.BOXES[box])
    blanks = [p["question"].count(".") for p in puzzles]
    assert by_name["random", "one a step"]["average_steps"] == sum(blanks) / 20
    assert all(row["problems"] == 20 and 0 <= row["solved"] <= 1 for row in rows)
    assert "ELBO at T=4" in out and "learned order" in out and "uniform random order" in out
    assert out.count("@Avg") == out.count("@Max") == len(mdmvi.RULES)


def test_without_a_compiler(small, capsys, monkeypatch):
    def broken(tokens, place):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    class Compiled(torch.nn.Module):
        def __init__(self, denoiser):
            super().__init__()
            self.mask_id, self.forward = denoiser.mask_id, broken

    monkeypatch.setattr(torch, "compile", Compiled)
    code, _, err = run(capsys, "--box", "2x2", "--problems", 4, "--compile")
    assert code == 2 and "does not work here (TorchDynamoException): pass --no-compile" in err


def test_scores_are_of_whole_grids():
    puzzles = sudoku.problems(5, 1, True, (2, 2))
    clean, canvas = sudoku.encode(puzzles)
    clean[1, canvas[1].nonzero()[0]] = 0  # one cell of the second one is wrong

    class Oracle:
        mask_id, eos_id = 6, 0

        def __call__(self, tokens):
            assert (tokens == clean)[~canvas].all()  # clues are never masked
            return F.one_hot(clean, 6).float()

        def logits(self, hidden):
            return hidden

    blank = sudoku.encode(puzzles, with_answers=False)
    solved, steps = sudoku.attempt(Oracle(), None, puzzles, blank, "left_to_right", 2, 0)
    assert solved == [True, False, True, True, True] and steps == [2] * 5


def test_the_policy_learns_the_search(small):
    data = sudoku.encode(sudoku.problems(64, 0, False, (2, 2)))
    denoiser, policy = sudoku.make_networks((2, 2), "small", 0, "cpu")
    torch.nn.init.normal_(denoiser.lm_head.weight)  # sure of some cells and not of others
    step = sudoku.sure_first_order(denoiser, *data, 4)
    assert step.amax() > 1
    hidden, reveal = sudoku.states_on_the_way(denoiser, *data, 4)

    def loss():
        return F.binary_cross_entropy_with_logits(policy(hidden, None), reveal).item()

    before = loss()
    sudoku.train_policy(denoiser, policy, data, 4, rng(0))
    assert loss() < 0.8 * before


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--box 3", "--box"),
        ("--box 4x4", "--box"),
        ("--budget 0", "--budget"),
        ("--budget 1", "--budget"),
        ("--steps -1", "--steps"),
        ("--problems many", "many"),
        ("--size huge", "huge"),
        ("--seed -1", "--seed"),
        ("--json missing/rows.json", "missing"),
        ("--json .", "cannot write ."),
        ("--device nowhere", "nowhere"),
        ("--task sudoku", "--task"),
    ],
)
def test_bad_input_is_one_line(flags, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command_line.run_main(lambda: sudoku.main(flags.split()))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and word in err


def test_help_tells_the_defaults(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and err == ""
    out = " ".join(out.split())
    assert "(default: 2x3)" in out and "(default: 9)" in out


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (None, 2)])
def test_interrupted_or_no_number(small, error, code, capsys, tmp_path, monkeypatch):
    def broken(denoiser, tokens, canvas, generator):
        if error:
            raise error
        return mdmvi.token_log_prob(denoiser, tokens, canvas).sum() * math.nan

    monkeypatch.setattr(mdmvi, "mdm_loss", broken)
    flags = ("--box", "2x2", "--steps", 30, "--json", tmp_path / "rows.json")
    stopped, out, err = run(capsys, *flags)
    assert stopped == code and out == "" and "Traceback" not in err
    assert error or "loss is nan at step 20" in err.splitlines()[-1]
    assert not (tmp_path / "rows.json").exists()
