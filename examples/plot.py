"""What a learned order saves: the steps at which each rule catches up with it, and a picture.

    python eval_gsm8k.py --sweep 1 2 3 4 5 6 8 --json rows.json
    python -m examples.plot rows.json --out steps.png                 # needs matplotlib
    python -m examples.plot rows.json out10/results.json --paper paper/results.json --out steps.png

Takes the rows that eval_gsm8k.py and train.py write, of one run or of several (other budgets).
"""

from pathlib import Path

from examples.command_line import Parser, UserError, aligned, run_main, writable
from examples.gsm8k import read_records
from mdmvi import STRATEGIES

LABELS = {"answered": "right answers, %", "solved": "right solutions, %"}
SIDES = ((-5, 6, "right"), (5, -12, "left"))  # of a dot, for its label: neighbours' do not meet
NUMBERS = ("average_steps", "budget", "answered", "solved")


def read_rows(paths):
    """The rows of several files of eval_gsm8k.py --json. Raises UserError for anything else."""
    rows = []
    for path in paths:
        for where, row in read_records(Path(path)):
            texts = isinstance(row, dict) and all(
                isinstance(row.get(key), str) for key in ("method", "match")
            )
            if not texts or not all(isinstance(row.get(key), (int, float)) for key in NUMBERS):
                raise UserError(f"{where} is no row of a table: give what --json wrote")
            rows.append(row)
    if not rows:
        raise UserError(f"{paths[0]} holds no row of a table: give what --json wrote")
    return rows


def measure(rows):
    """What tells the methods apart: answers, or whole solutions where all have 95% of those."""
    return "answered" if min(row["answered"] for row in rows) < 0.95 else "solved"


def catching_up(rows):
    """Table of the average steps at which each rule is first right as often as a learned order."""
    key = measure(rows)
    lines = [("rule", "T", "catches up at", "learned order takes")]
    for ours in (row for row in rows if row["method"] == "learned"):
        for name in dict.fromkeys(row["method"] for row in rows if row["match"] == "sweep"):
            swept = [r for r in rows if r["method"] == name and r["match"] == "sweep"]
            level = [r["average_steps"] for r in swept if r[key] >= ours[key]]
            when = f"{min(level):.2f}" if level else f"not in {max(r['budget'] for r in swept)}"
            lines.append((name, str(ours["budget"]), when, f"{ours['average_steps']:.2f}"))
    return aligned(lines)


def pyplot():
    """matplotlib.pyplot, which draws to files, or UserError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--out needs matplotlib: pip install matplotlib")
    return plt


def points(rows, name, key):
    """(steps, right in percent) of a rule, on its best model where two rows have as many steps."""
    best = {}
    for row in (row for row in rows if row["method"] == name):
        steps = round(row["average_steps"], 1)
        best[steps] = max(100 * row[key], best.get(steps, 0.0))
    return sorted(best.items())


def draw(rows, path, title="", paper=()):
    """Right answers, or whole solutions, against steps: learned orders are dots, rules lines.

    Rules are drawn from the rows of the sweep, which are of one run, or from all if there are none.
    Learned orders of `paper` are squares, those of `rows` circles.
    """
    plt, key = pyplot(), measure(rows)
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    hollow = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 2, "zorder": 3}
    dots = [("ko", row) for row in rows] + [("ks", row) for row in paper]
    dots = [(marker, row) for marker, row in dots if row["method"] == "learned"]
    names = {"ko": "learned, with its T", "ks": "the paper's orders"}
    for i, (marker, row) in enumerate(sorted(dots, key=lambda dot: dot[1]["average_steps"])):
        dot = (row["average_steps"], 100 * row[key])
        axes.plot(*dot, marker, label=names.pop(marker, None), **hollow)
        right, up, align = SIDES[i % 2]
        beside = {"textcoords": "offset points", "xytext": (right, up), "ha": align, "zorder": 4}
        axes.annotate(str(row["budget"]), dot, fontsize=8, fontweight="bold", **beside)
    fixed = [row for row in rows if row["method"] != "learned"]
    fixed = [row for row in fixed if row["match"] == "sweep"] or fixed
    for name in dict.fromkeys(row["method"] for row in fixed):
        rule, _, eos = name.partition("+")
        style = {"linestyle": "--" if eos else "-", "marker": "x" if eos else "."}
        style["color"] = f"C{STRATEGIES.index(rule)}" if rule in STRATEGIES else "grey"
        axes.plot(*zip(*points(fixed, name, key)), label=name, **style)
    labels = {"xlabel": "average steps (forward passes), log scale", "ylabel": LABELS[key]}
    axes.set(xscale="log", title=title, ymargin=0.08, **labels)
    axes.set_xticks(sorted({row["budget"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path} ({error}): give another file, .png, .svg or .pdf")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "rows", nargs="+", help="files of eval_gsm8k.py --json (table: with --sweep) or train.py"
    )
    parser.add_argument(
        "--out", type=writable, metavar="FILE", help="draw the picture there: .png, .svg or .pdf"
    )
    parser.add_argument("--title", default="", help="what stands above the picture")
    parser.add_argument(
        "--paper", nargs="+", default=[], metavar="FILE", help="of --orders paper: drawn as squares"
    )
    args = parser.parse_args(argv)
    rows = read_rows(args.rows)
    if any(row["match"] == "sweep" for row in rows):
        print(f"steps at which a rule is as often right ({measure(rows)})\n\n{catching_up(rows)}")
    else:
        print("no table of when rules catch up: it needs rows of eval_gsm8k.py --sweep")
    if args.out:
        draw(rows, args.out, args.title, read_rows(args.paper) if args.paper else [])


if __name__ == "__main__":
    run_main(main)
