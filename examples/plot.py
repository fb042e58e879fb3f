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

BESIDE = (0, -16), (7, 8), (-7, 8)  # of a label from its circle: those of neighbours do not meet
TABLE_NEEDS = {"match": "sweep", "method": "learned"}
NUMBERS = ("average_steps", "budget", "answered", "solved")


def read_rows(paths):
    """The rows of several files of eval_gsm8k.py --json. Raises UserError for anything else."""
    rows = []
    for path in paths:
        for where, row in read_records(Path(path)):
            fits = isinstance(row, dict) and all(
                isinstance(row.get(key), str) for key in ("method", "match")
            )
            fits = fits and all(
                type(row.get(key)) in (int, float) and 0 <= row[key] < 1e9 for key in NUMBERS
            )
            if not fits:
                raise UserError(f"{where} is no row of a table: give what --json wrote")
            rows.append(row)
    if not rows:
        raise UserError(f"{paths[0]} holds no row of a table: give what --json wrote")
    return rows


def catching_up(rows):
    """Table of the average steps at which each rule is first right as often as a learned order."""
    lines = [("rule", "T", "catches up at", "learned order takes")]
    for ours in (row for row in rows if row["method"] == "learned"):
        for name in dict.fromkeys(row["method"] for row in rows if row["match"] == "sweep"):
            swept = [r for r in rows if r["method"] == name and r["match"] == "sweep"]
            level = [r["average_steps"] for r in swept if r["answered"] >= ours["answered"]]
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


def points(rows, name):
    """(steps, right answers in percent) of a rule, the best row where two have as many steps."""
    best = {}
    for row in (row for row in rows if row["method"] == name):
        steps = round(row["average_steps"], 1)
        best[steps] = max(100 * row["answered"], best.get(steps, 0.0))
    return sorted(best.items())


def draw(rows, path, title="", paper=(), unsure=()):
    """Right answers against average steps: learned orders are marks, rules lines.

    Rules are drawn from the rows of the sweep, which are of one run, or from all if there are none.
    Learned orders of `rows` are circles, with their T beside them. Those of `paper` and `unsure`,
    the paper's orders without and with train.py's --unsure, are squares, hollow and full.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    hollow = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 2, "zorder": 3}
    full = {"markersize": 4, "zorder": 3}
    for marks, style, label, of in (
        ("ko", hollow, "learned, with its T", rows),
        ("ks", hollow, "the paper's orders", paper),
        ("ks", full, "the same with --unsure", unsure),
    ):
        dots = [row for row in of if row["method"] == "learned"]
        for i, row in enumerate(sorted(dots, key=lambda row: row["average_steps"])):
            dot = (row["average_steps"], 100 * row["answered"])
            axes.plot(*dot, marks, label=label if i == 0 else None, **style)
            if of is rows:
                beside = {"textcoords": "offset points", "xytext": BESIDE[i % 3]}
                text = {"ha": "center", "fontsize": 8, "fontweight": "bold", "zorder": 4}
                axes.annotate(str(row["budget"]), dot, **beside, **text)
    fixed = [row for row in rows if row["method"] != "learned"]
    fixed = [row for row in fixed if row["match"] == "sweep"] or fixed
    for name in dict.fromkeys(row["method"] for row in fixed):
        rule, _, eos = name.partition("+")
        style = {"linestyle": "--" if eos else "-", "marker": "x" if eos else "."}
        style["color"] = f"C{STRATEGIES.index(rule)}" if rule in STRATEGIES else "grey"
        axes.plot(*zip(*points(fixed, name)), label=name, **style)
    labels = {"xlabel": "average steps (forward passes), log scale", "ylabel": "right answers, %"}
    axes.set(xscale="log", ymargin=0.08, **labels)
    axes.set_title(title, parse_math=False)
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
    parser.add_argument(
        "--unsure", nargs="+", default=[], metavar="FILE", help="with --unsure too: full squares"
    )
    args = parser.parse_args(argv)
    if (args.title or args.paper or args.unsure) and not args.out:
        raise UserError("--title, --paper and --unsure are for the picture: give --out too")
    if args.out and not Path(args.out).suffix:  # matplotlib would add one
        raise UserError(f"--out {args.out} has no ending: give one, .png, .svg or .pdf")
    rows = read_rows(args.rows)
    if all(any(row[key] == value for row in rows) for key, value in TABLE_NEEDS.items()):
        print(f"steps at which a rule is as often right\n\n{catching_up(rows)}")
    else:
        print("no table of when rules catch up: it needs a learned order and --sweep")
    if args.out:
        squares = (read_rows(paths) if paths else [] for paths in (args.paper, args.unsure))
        draw(rows, args.out, args.title, *squares)


if __name__ == "__main__":
    run_main(main)
