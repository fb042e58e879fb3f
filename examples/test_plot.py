"""Tests of plot.py: when a rule catches up, the picture, mistakes of the user."""

import json
import math
import re
import sys

import pytest

from examples import plot
from examples.command_line import run_main


def row(method, match, budget, steps, answered, solved=0.0):
    about = {"method": method, "match": match, "budget": budget}
    return about | {"average_steps": steps, "answered": answered, "solved": solved}


ROWS = [row("learned", "", 5, 2.5, 0.5), row("learned", "", 9, 4.5, 0.7)]
ROWS += [row("iid", "@Avg", 5, 3.0, 0.9)]  # no row of the sweep
ROWS += [row("iid", "sweep", *n) for n in ((1, 1.0, 0.3), (2, 2.0, 0.5), (8, 8.0, 0.6))]
ROWS += [row("entropy+eos", "sweep", *n) for n in ((1, 1.0, 0.3), (8, 5.25, 0.8))]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def call(*argv):
    """Exit code of the program."""
    try:
        run_main(lambda: plot.main(list(argv)))
    except SystemExit as stop:
        return stop.code
    return 0


def table_cells(line):
    return re.split(r"  +", line.strip())


def complaint(capsys, message):
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert re.search(message, line), line


def test_catching_up():
    lines = plot.catching_up(ROWS).split("\n")[1:]
    assert [table_cells(line) for line in lines] == [
        ["iid", "5", "2.00", "2.50"],
        ["entropy+eos", "5", "5.25", "2.50"],
        ["iid", "9", "not in 8", "4.50"],
        ["entropy+eos", "9", "5.25", "4.50"],
    ]


def test_prints_what_several_files_say(files, capsys):
    (files / "first.json").write_text(json.dumps(ROWS[:3]))
    (files / "second.json").write_text(json.dumps(ROWS[3:]))
    assert call("first.json", "second.json") == 0
    assert plot.catching_up(ROWS) in capsys.readouterr().out


def test_without_a_sweep_there_is_no_table(files, capsys):
    (files / "few.json").write_text(json.dumps([r for r in ROWS if r["match"] != "sweep"]))
    assert call("few.json") == 0
    out = capsys.readouterr().out
    assert "--sweep" in out and "catches up" not in out


def test_picture(files):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, start in (("order.png", b"\x89PNG"), ("order.svg", b"<?xml")):
        assert call("rows.json", "--out", name) == 0
        assert (files / name).read_bytes().startswith(start)
    drawn = (files / "order.svg").read_text()
    names = ("learned, with its T", "iid", "entropy+eos", "5", "9")
    assert all(f"<!-- {name} -->" in drawn for name in names)


def test_lines_are_of_the_sweep(files, monkeypatch):
    """@Avg rows of other files are of other models; without a sweep they are all there is."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    points = plot.points
    monkeypatch.setattr(plot, "points", lambda rows, *a: drawn.append(rows) or points(rows, *a))
    plot.draw(ROWS, files / "a.svg")
    assert {row["match"] for rows in drawn for row in rows} == {"sweep"}
    drawn.clear()
    plot.draw(ROWS[:3], files / "a.svg")
    assert drawn == [ROWS[2:3]]


def test_every_dot_has_its_label(files):
    """On another side than the two dots before it, in the order of their steps."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    close = [row("learned", "", T, steps, 0.97) for T, steps in ((9, 4.1), (5, 4.0), (2, 2.0))]
    plot.draw([*close, *ROWS[3:]], files / "a.svg")
    texts = plt.gcf().axes[0].texts
    assert [(text.get_text(), text.xy) for text in texts] == [
        ("2", (2.0, 97.0)),
        ("5", (4.0, 97.0)),
        ("9", (4.1, 97.0)),
    ]
    sides = [text.get_position() for text in texts]
    assert len(set(sides)) == 3


def test_orders_of_the_paper_are_squares(files):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    (files / "paper.json").write_text(json.dumps([row("learned", "", 9, 9.0, 0.9), ROWS[2]]))
    (files / "unsure.json").write_text(json.dumps([row("learned", "", 9, 8.0, 0.99)]))
    more = ("--paper", "paper.json", "--unsure", "unsure.json")
    assert call("rows.json", *more, "--out", "order.svg") == 0
    lines, marks = plt.gcf().axes[0].lines, []
    for x in lines:
        hollow = x.get_markerfacecolor() == "none"
        marks.append((x.get_marker(), hollow, x.get_xdata()[0], x.get_label()))
    assert [mark[1:] for mark in marks if mark[0] == "s"] == [
        (True, 9.0, "the paper's orders"),
        (False, 8.0, "the same with --unsure"),
    ]
    circles = [(hollow, label) for marker, hollow, _, label in marks if marker == "o"]
    assert circles[0] == (True, "learned, with its T") and len(circles) == 2
    assert len(plt.gcf().axes[0].texts) == 2  # T stands beside the circles alone


def test_points_are_of_the_best_model():
    shares = ((4.0, 0.2), (3.96, 0.3), (2.0, 0.0))
    rows = [{"method": "iid", "average_steps": s, "answered": share} for s, share in shares]
    rows.append({"method": "random", "average_steps": 4.0, "answered": 0.9})
    assert plot.points(rows, "iid") == [(2.0, 0.0), (4.0, 30.0)]


def test_picture_without_matplotlib(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("rows.json", "--out", "order.png") == 2
    complaint(capsys, "pip install matplotlib")


@pytest.mark.parametrize(
    "text, argv, message",
    [
        ("[]", "bad.json", "bad.json holds no row"),
        ("{}", "bad.json", "bad.json line 1 is no row"),
        ("[3]", "bad.json", "bad.json record 1 is no row"),
        (json.dumps([ROWS[0] | {"solved": "all"}]), "bad.json", "record 1 is no row"),
        ("", "bad.json", "bad.json holds no row"),
        ("x", "bad.json", "bad.json line 1 is not JSON"),
        (json.dumps([ROWS[0] | {"solved": True}]), "bad.json", "record 1 is no row"),
        (json.dumps([ROWS[0] | {"solved": math.nan}]), "bad.json", "record 1 is no row"),
        (json.dumps([ROWS[0] | {"solved": -1}]), "bad.json", "record 1 is no row"),
        (json.dumps([ROWS[0] | {"budget": 10**400}]), "bad.json", "record 1 is no row"),
        ("[]", "rows.json --out order", "--out order has no ending: give one"),
        ("[]", "none.json", "cannot read none.json"),
        ("[]", "rows.json --out no/order.png", "cannot write no/order.png"),
        ("[]", "rows.json --out order.xyz", "cannot write order.xyz .*: give .*png"),
        ("[]", "", "rows"),
        ("[]", "rows.json --paper none.json", "--unsure are for the picture: give --out"),
        ("[]", "rows.json --title Shopping", "--title, .* are for the picture: give --out"),
    ],
)
def test_mistakes(text, argv, message, files, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (files / "bad.json").write_text(text)
    before = sorted(files.iterdir())
    assert call(*argv.split()) == 2
    complaint(capsys, message)
    assert sorted(files.iterdir()) == before
