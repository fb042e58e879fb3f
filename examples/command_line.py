"""What the scripts share: flags, plain tables, one line on stderr for what a user can mend."""

import argparse
import contextlib
import ctypes
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch

os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its client would log every retry


class UserError(Exception):
    """Something the user can put right: printed as one line on stderr, exit code 2."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the examples as written, and show every default that is set."""

    def _get_help_string(self, action):
        unset = action.default in (None, "", (), [])
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with our one line on stderr instead of its usage block."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def within(least, most=2**31 - 1, kind=int):
    """argparse type: a number from `least` to `most`; the default most is valid as a seed."""

    def number(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not in {least} .. {most}")
        return value

    return number


positive, whole = within(1), within(0)
amount, above_zero, share = within(0, kind=float), within(1e-6, kind=float), within(0, 1, float)


def text(value):
    """argparse type: a text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value")
    return value


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name):
    """argparse type: the name of a device that is there; on CUDA, fp32 products may use TF32."""
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError, ImportError):
        kind = None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not there: choose cpu, or cuda where there is a GPU")
    if kind == "cuda":
        torch.cuda.set_device(torch.device(name).index or 0)
        torch.set_float32_matmul_precision("high")
    return name


def add_device(parser):
    """The flag --device, by default a GPU if there is one."""
    help = "cpu, cuda, cuda:1, ..."
    parser.add_argument("--device", type=usable_device, default=DEVICE, help=help)


def add_data(parser):
    """The flag --data, by default the embedded problems that a checkpoint goes with."""
    help = ".json/.jsonl(.gz/.xz) file, folder or hub name (default: embedded ones)"
    parser.add_argument("--data", type=text, help=help)


def add_fields(parser, flags, file):
    """A flag for each field of the dataclass `flags`, which is written in `file`.

    A field's annotation is the flag's type or choices, the comment behind it the text of --help.
    """
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(file).read_text("utf-8"), re.M))
    for field in fields(flags):
        options = {"default": field.default, "help": helps[field.name]}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_args(field.type):
            options["choices"] = get_args(field.type)
        else:
            options["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def writable(path):
    """argparse type: a file that can be written, found out before the long work."""
    file = Path(path).absolute()
    target = file if file.exists() else file.parent
    if not os.access(target, os.W_OK) or file.is_dir() or not file.parent.is_dir():
        raise UserError(f"cannot write {path}: give a file in a folder that can be written")
    return path


def aligned(lines):
    """Rows of cells as plain text in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
    return "\n".join(rows)


def complain(message):
    """Leave with one line on stderr and exit code 2."""
    line = " ".join(str(message).splitlines())  # a file's name may have several
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def while_read(write):
    """Call write(), whose reader may have left: `tee` does on Ctrl-C, before the run is saved."""
    with contextlib.suppress(BrokenPipeError):
        write()


def keep_memory():
    """Have glibc keep what is freed, as a step needs as much as the last one: faster on a CPU."""
    trim_threshold, mmap_threshold = -1, -3  # M_... in malloc.h
    with contextlib.suppress(AttributeError, TypeError):  # there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # larger blocks go back, as they do without this


def run_main(main):
    """Run a script: what the user can mend is one line on stderr and exit code 2, Ctrl-C is 130."""
    keep_memory()
    sys.stderr = sys.stderr or open(os.devnull, "w")  # it may be closed
    with contextlib.suppress(AttributeError):  # there may be no standard output
        sys.stdout.reconfigure(errors="replace")  # for what its encoding lacks
    try:
        try:
            main()
        finally:  # argparse leaves by SystemExit after --help
            if sys.stdout:
                sys.stdout.flush()
    except KeyboardInterrupt as stop:  # train.py says where
        with contextlib.suppress(BrokenPipeError):
            print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, head say, has seen enough; nothing to flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        complain(error)
    except OSError as error:
        complain(f"{error}: give another file or folder")
    except UnicodeDecodeError as error:
        complain(f"the input is not UTF-8 text ({error.reason})")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
            raise
        complain(
            "too little memory: lower --batch or --max-len, or raise --accumulate, if it has one"
        )
